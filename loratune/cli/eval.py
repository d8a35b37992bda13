"""`loratune eval`: loss, perplexity and exact match of an adapter on held-out data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from loratune import atomic
from loratune.cli import process
from loratune.cli.common import AdapterFolder, DataNames, parse, require_data
from loratune.config import DataConfig, DataFormat, Precision, TrainOn
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class EvalArguments:
    """Measure an adapter on held-out data: loss, perplexity, and exact match of its generated answers."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "model",
        "limit",
        "generate",
        "max_new_tokens",
        "format",
        "precision",
        "json",
    )
    """Settings that --help shows; --help-all shows all."""

    adapter: AdapterFolder
    """Folder of an adapter, or a base model without one."""
    data: DataNames
    """Held-out files."""
    model: str | None = None
    """Base model, if it is not at the place that the adapter records."""
    chat_template: str | None = None
    """File with a Jinja chat template, instead of the one stored with the adapter."""
    max_new_tokens: int = 256
    """Longest answer to generate."""
    limit: int | None = None
    """Number of records to use, from the start; by default all."""
    generate: bool = True
    """Generate answers and compare them; otherwise only the loss is measured."""
    json: bool = False
    """Print one JSON object instead of a table."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    device: str | None = None
    """Torch device; by default the GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    tokens_per_row: int | None = None
    """Tokens in one packed row while the loss is measured; by default 2,048, or more for a longer record."""
    truncate: bool = False
    """Cut documents that are longer than a row while the loss is measured, as in train."""
    format: DataFormat = "auto"
    """Record format, as in train."""
    train_on: TrainOn | None = None
    """Tokens that count in the loss; by default as in the adapter's run."""

    def __post_init__(self) -> None:
        require_data(self.data)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; it is at least 1")
        DataConfig(tokens_per_row=self.tokens_per_row)  # raises ConfigError if it is out of range


def run(words: list[str]) -> None:
    """Measures one adapter or base and shows the result."""
    given = parse(EvalArguments, words, "eval")
    with process.library_imports():
        from loratune.data.prompting import difference, forms_of
        from loratune.data.records import read_records
        from loratune.infer.opened import open_folders
        from loratune.runs.evaluation import evaluate
        from loratune.screen.evaluate import as_json, draw

    records = read_records(given.data, given.format)[: given.limit]
    opened = open_folders(
        [given.adapter],
        model=given.model,
        precision=given.precision,
        device=given.device,
        trust_remote_code=given.trust_remote_code,
        chat_template=given.chat_template,
    )
    process.print_notes(opened.notes)
    train_on = given.train_on or (opened.run.dataset.train_on if opened.run else "assistant")
    settings = DataConfig(train_on=train_on, tokens_per_row=given.tokens_per_row, truncate=given.truncate)
    result = evaluate(
        opened.model,
        opened.tokenizer,
        records,
        name=next(iter(opened.adapters), opened.base),
        stop_ids=opened.stop_ids,
        settings=settings,
        generate=given.generate,
        max_new_tokens=given.max_new_tokens,
    )
    data = ", ".join(given.data)
    differs = difference(next(iter(opened.forms.values()), ()), forms_of(records))
    if given.json:
        note = {"note": differs} if differs else {}
        print(json.dumps(atomic.finite(as_json([result], data=data, answers=True) | note), ensure_ascii=False))
    else:
        draw([result], process.console(), data=data)
        if differs:
            process.console().print(f"note  {differs}", markup=False, soft_wrap=True)
