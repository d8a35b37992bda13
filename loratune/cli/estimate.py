"""`loratune estimate`: memory and speed of a run, before anything is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from tyro.conf import OmitArgPrefixes

from loratune.cli import process
from loratune.cli.common import ModelName, parse
from loratune.config import Activations, DataConfig, LoraConfig, Precision, TrainConfig


@dataclass(kw_only=True)
class EstimateArguments:
    """Estimate a run before anything is downloaded: bytes by cause, speed, and settings that make it fit."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "gpu",
        "precision",
        "memory",
        "activations",
        "tokens_per_row",
        "gradient_accumulation_steps",
        "r",
        "target_modules",
        "data",
        "json",
    )
    """Settings that --help shows; --help-all shows all."""

    model: ModelName
    """Base model: a local folder (config.json is enough), a hub id, or "loratune/pocket"."""
    gpu: str | None = None
    """A memory size such as 24GiB, or a device such as "RTX 4090"; by default this machine's GPU, else its CPU."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    activations: Activations = "auto"
    """Activations to recompute or offload, as in train."""
    memory: str | None = None
    """The most memory that the run may use; by default all of the device's."""
    tokens_per_row: int = 2048
    """Tokens in one packed row, as in train."""
    gradient_accumulation_steps: int = 1
    """Rows in one optimizer step, as in train."""
    data: list[str] = field(default_factory=list)
    """Training files; adds the duration of one pass over them. Needs the model's tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    json: bool = False
    """Print one JSON object instead of a table."""
    lora: OmitArgPrefixes[LoraConfig] = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        # Each raises ConfigError if one of its values is out of range.
        TrainConfig(memory=self.memory, gradient_accumulation_steps=self.gradient_accumulation_steps)
        DataConfig(tokens_per_row=self.tokens_per_row)


def run(words: list[str]) -> None:
    """Estimates the run and shows the table."""
    given = parse(EstimateArguments, words, "estimate")
    with process.library_imports():
        from loratune.memory import estimate
        from loratune.memory.budget import RowSetting
        from loratune.memory.devices import at_hand, named
        from loratune.screen.estimate import as_json, draw
        from loratune.units import bytes_of

    device = named(given.gpu) if given.gpu else at_hand()
    request = estimate.EstimateRequest(
        given.precision,
        given.lora,
        RowSetting(given.tokens_per_row, given.gradient_accumulation_steps),
        given.activations,
        device.memory_bytes > 0,
    )
    limit = bytes_of(given.memory) if given.memory else device.memory_bytes
    model = estimate.model_from_config(given.model, given.precision, given.trust_remote_code)
    found = estimate.estimate(model, request, device, limit)
    if given.json:
        print(json.dumps(as_json(found)))
    else:
        tokens = _tokens_per_epoch(given.model, given.data, given.tokens_per_row, given.trust_remote_code)
        draw(found, process.console(), tokens)


def _tokens_per_epoch(model: str, data: list[str], tokens_per_row: int, trust_remote_code: bool) -> int:
    """Tokens of all rows of one pass over the data, padding included; 0 without data."""
    if not data:
        return 0
    from loratune.base import load as base
    from loratune.data.feed import prepare, rows_of_epoch

    tokenizer = base.load_tokenizer(model, trust_remote_code=trust_remote_code)
    dataset = prepare(
        data,
        tokenizer,
        DataConfig(tokens_per_row=tokens_per_row),
        stop_ids=base.stop_ids(model, tokenizer),
        max_tokens=base.max_document_tokens(base.load_config(model, trust_remote_code=trust_remote_code)),
        seed=0,
        cache_dir=process.cache_dir(None),
    )
    return len(rows_of_epoch(dataset.train, tokens_per_row, 0, seed=0, epoch=0)) * tokens_per_row
