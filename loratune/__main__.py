"""`python -m loratune VERB ...`: the command line for launchers that start a module, such as torchrun."""

import sys

from loratune.cli import main

if __name__ == "__main__":
    sys.exit(main())
