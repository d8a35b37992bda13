"""Dispatch: the table of verbs, the overview, and the exit status.

The table names each verb's function as "module:function". Its module is imported when the verb runs, so the overview
appears in a tenth of a second and loads no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loratune import foreign
from loratune.cli import process
from loratune.errors import ConfigError, LoratuneError, nearest
from loratune.tables import load_entry
from loratune.version import __version__

USAGE_ERROR = 2


class Verb(NamedTuple):
    """A command of the table: the location of its function, and its line in the overview."""

    function: str
    """"module:function"; the function takes the words after the verb and may return an exit status."""
    summary: str


VERBS: dict[str, Verb] = {
    "demo": Verb("loratune.cli.demo:run", "the whole journey on the bundled model; no network, no GPU needed"),
    "preview": Verb("loratune.cli.preview:run", "your data as the model sees it, token by token"),
    "train": Verb("loratune.cli.train:run", "one adapter from a model and your data"),
    "estimate": Verb("loratune.cli.estimate:run", "memory and speed of a run, from the model's configuration alone"),
    "sweep": Verb("loratune.cli.sweep:run", "many adapters at once: a grid of rates and ranks, compared"),
    "eval": Verb("loratune.cli.eval:run", "loss, perplexity and exact match on held-out data"),
    "chat": Verb("loratune.cli.chat:run", "talk to adapters, switch between them, compare"),
    "merge": Verb("loratune.cli.merge:run", "a merged checkpoint, verified against the adapter"),
    "combine": Verb("loratune.cli.combine:run", "one adapter from several: sums, TIES, DARE, pruning"),
    "resize": Verb("loratune.cli.resize:run", "an adapter with another rank"),
    "extract": Verb("loratune.cli.extract:run", "an adapter from the difference of two checkpoints"),
    "quantise": Verb("loratune.cli.quantise:run", "a 4-bit checkpoint of a model, in bitsandbytes' format"),
    "inspect": Verb("loratune.cli.inspect:run", "an adapter's base, shape, training data and settings"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    | status | meaning                                                                                        |
    |--------|------------------------------------------------------------------------------------------------|
    | 0      | done                                                                                            |
    | 2      | an error that the message explains                                                              |
    | 130    | stopped by Ctrl-C or SIGTERM; train and sweep have saved everything if they say so              |
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words) or 0
    except LoratuneError as error:
        process.print_error(str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        process.print_error("interrupted")
        return process.INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # the system refuses an operation that no check covers, such as reading a folder
        process.print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return USAGE_ERROR
    return 0


def _dispatch(words: list[str]) -> int | None:
    for word in words:
        foreign.check_name(word, ConfigError)
    if not words or words[0] in ("-h", "--help", "help"):
        _print_overview()
    elif words[0] in ("-V", "--version"):
        print(f"loratune {__version__}")
    elif words[0] in VERBS:
        run: Callable[[list[str]], int | None] = load_entry(VERBS[words[0]].function)
        return run(words[1:])
    else:
        raise ConfigError(f'unknown command "{words[0]}".{nearest(words[0], VERBS)} See loratune --help')
    return None


def _print_overview() -> None:
    from rich.text import Text

    from loratune.cli.help import screen_width, wrap

    console, width = process.console(), screen_width()
    console.print(Text.assemble(("loratune", "bold"), "  LoRA fine-tuning of open models\n"), soft_wrap=True)
    for name, verb in VERBS.items():
        lines = wrap(f"{name:<9}".replace(" ", "\N{NO-BREAK SPACE}") + f" {verb.summary}", width, hanging=12, first=2)
        console.print(Text.assemble((lines[0][:11], "cyan"), lines[0][11:]), soft_wrap=True)
        for line in lines[1:]:
            console.print(Text(line), soft_wrap=True)
    console.print()
    for line in wrap("loratune VERB --help shows a verb's settings. Start with: loratune demo", width):
        console.print(Text(line, style="dim"), soft_wrap=True)
