"""`loratune preview`: the data as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tyro.conf import OmitArgPrefixes

from loratune.cli import process
from loratune.cli.common import DataNames, ModelName, parse, require_data
from loratune.config import DataConfig, TrainConfig


@dataclass(kw_only=True)
class PreviewArguments:
    """Show your data as the model sees it: rendered tokens with the trained ones coloured, lengths, rows."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "examples",
        "tokens_per_row",
        "format",
        "train_on",
        "chat_template",
        "truncate",
        "eval_data",
    )
    """Settings that --help shows; --help-all shows all."""

    model: ModelName
    """Base model: a local folder, a hub id, or "loratune/pocket"."""
    data: DataNames
    """Training files."""
    examples: int = 3
    """Examples to show in full."""
    seed: int = 0
    """Seed of the held-out split and of packing, as in train."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    dataset: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require_data(self.data)


def run(words: list[str]) -> None:
    """Renders and packs the data as a run would, and shows the first examples."""
    given = parse(PreviewArguments, words, "preview")
    with process.library_imports():
        from loratune.base import load as base
        from loratune.data.feed import prepare, rows_of_epoch
        from loratune.runs.evaluation import pad_id
        from loratune.screen.preview import draw_preview
        from loratune.training import choices

    trust = given.trust_remote_code
    tokenizer = base.load_tokenizer(given.model, given.dataset.chat_template, trust_remote_code=trust)
    stop_ids = base.stop_ids(given.model, tokenizer, trust_remote_code=trust)
    model_config = base.load_config(given.model, trust_remote_code=trust)
    dataset = prepare(
        given.data,
        tokenizer,
        given.dataset,
        stop_ids=stop_ids,
        max_tokens=base.max_document_tokens(model_config),
        vocabulary=base.configured_vocabulary(model_config),
        seed=given.seed,
        cache_dir=process.cache_dir(given.dataset.cache_dir),
    )
    dataset.notes.extend(base.stop_note(given.model, tokenizer, dataset.forms, trust_remote_code=trust))
    train, held_out = ([len(example) for example in part] for part in (dataset.train, dataset.eval))
    chosen = choices.choose(given.dataset, TrainConfig(), train, held_out, choices.width_of(model_config))
    rows = rows_of_epoch(dataset.train, chosen.data.row_tokens, pad_id(tokenizer), seed=given.seed, epoch=0)
    draw_preview(process.console(), tokenizer, dataset, rows, stop_ids=stop_ids, show=given.examples, chosen=chosen)
