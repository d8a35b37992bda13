"""The command line: one file per verb, with its arguments and its action.

Only this package prints, exits, and reads or writes the environment and the settings of the process. A new verb is
one file with a function `run(words)` and one line in `dispatch.VERBS`.
"""

from loratune.cli.dispatch import VERBS as VERBS
from loratune.cli.dispatch import main as main
