"""`python -m loratune.cli VERB ...`: the same as `loratune VERB ...`."""

import sys

from loratune.cli import main

if __name__ == "__main__":
    sys.exit(main())
