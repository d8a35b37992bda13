"""`loratune.train`: a run on a model in memory that shows its progress in a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.config import DataConfig, TrainConfig
from loratune.runs import run
from loratune.runs.folder import RunResult
from loratune.runs.run import Data, RunEvent
from loratune.screen.progress import drawing


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    training: TrainConfig | None = None,
    *,
    dataset: DataConfig | None = None,
    eval_data: Data | None = None,
    out: str | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
    progress: bool | None = None,
) -> RunResult:
    """Trains the active adapter of a model in memory.

    Args:
        model: a causal language model with exactly one active adapter, see `attach`.
        tokenizer: of the model, with a chat template if the data are conversations.
        data: a file, a list of files, a hub id, a list of dicts, or a `datasets.Dataset`. The fields of a dict are
            those of a line of JSONL.
        training, dataset: settings, with the defaults of the command line.
        eval_data: held-out data in the same forms; by default a part of the training records.
        out: folder for the files of `loratune train`; None writes none.
        on_event: called with every event, such as a step or an evaluation.
        progress: show losses and speed. By default True in a terminal and in a notebook, and False elsewhere.

    Returns: the summary; the model then has the best adapter on held-out data, or the last one.
    Raises: AdapterError: not exactly one adapter is active. ArgumentError: an argument has the wrong type. DataError,
        OutputError, TrainingError.
    """
    console = Console(highlight=False)
    shown = console.is_terminal or console.is_jupyter if progress is None else progress

    def train_with(handle: Callable[[RunEvent], None] | None) -> RunResult:
        return run.train(
            model, tokenizer, data, training, dataset=dataset, eval_data=eval_data, out=out, on_event=handle
        )

    if not shown:
        return train_with(on_event)
    with drawing(console) as draw:

        def handle(event: RunEvent) -> None:
            draw(event)
            if on_event is not None:
                on_event(event)

        return train_with(handle)
