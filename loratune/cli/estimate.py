"""`loratune estimate`: memory and speed of a run, before anything is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from tyro.conf import OmitArgPrefixes

from loratune.cli import process
from loratune.cli.common import ModelName, parse
from loratune.config import Activations, DataConfig, LoraConfig, Optim, Precision, TrainConfig
from loratune.errors import ConfigError


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
        "optim",
        "r",
        "target_modules",
        "target_parameters",
        "data",
        "json",
    )
    """Settings that --help shows; --help-all shows all."""

    model: ModelName
    """Base model: a local folder (config.json is enough), a hub id, or "loratune/pocket"."""
    gpu: str | None = None
    """A memory size such as 24GiB, or a card such as "RTX 4090"; by default this machine's GPU, else its CPU."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    activations: Activations = "auto"
    """Activations to recompute or offload, as in train."""
    memory: str | None = None
    """The most memory that the run may use; by default all of the device's."""
    tokens_per_row: int | None = None
    """Tokens in one packed row; by default as train chooses it for --data, otherwise 2,048."""
    gradient_accumulation_steps: int | None = None
    """Rows in one optimizer step; by default as train chooses it for --data, otherwise 1."""
    optim: Optim = "adamw"
    """Format of AdamW's moments, as in train."""
    data: list[str] = field(default_factory=list)
    """Training files, for train's choices and the duration of the run; needs the model's tokenizer."""
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
        from loratune.training.optim import STATE_BYTES
        from loratune.units import bytes_of

    device = named(given.gpu) if given.gpu is not None else at_hand()
    if given.memory and not device.memory_bytes:
        raise ConfigError("--memory limits GPU memory, and this estimate is for a CPU; name a GPU with --gpu")
    sizes = _run_of(given)
    request = estimate.EstimateRequest(
        given.precision,
        given.lora,
        RowSetting(sizes.row, sizes.rows_per_step, STATE_BYTES[given.optim]),
        given.activations,
        device.memory_bytes > 0,
    )
    limit = bytes_of(given.memory) if given.memory else device.memory_bytes
    model = estimate.model_from_config(given.model, given.precision, given.trust_remote_code)
    found = estimate.estimate(model, request, device, limit)
    if given.json:
        print(json.dumps(as_json(found) | {"tokens_per_row": sizes.row, "rows_per_step": sizes.rows_per_step}))
    else:
        console = process.console()
        draw(found, console, sizes.tokens)
        for choice in sizes.choices:
            console.print(choice, style="dim", markup=False, highlight=False)


@dataclass(frozen=True)
class _Run:
    """Sizes of the run whose memory and duration are estimated."""

    row: int
    rows_per_step: int
    tokens: int = 0
    """Of all rows of the run, padding included; 0 without data."""
    choices: tuple[str, ...] = ()


def _run_of(given: EstimateArguments) -> _Run:
    """The run that `train` would make of the data; without data, usual sizes."""
    from loratune.training import choices

    if not given.data:
        row = given.tokens_per_row or choices.ASSUMED_ROW
        why = (
            () if given.tokens_per_row else (f"tokens_per_row = {row:,}: assumed; --data FILE shows train's choice",)
        )
        return _Run(row, given.gradient_accumulation_steps or 1, choices=why)
    from loratune.base import load as base
    from loratune.data.feed import prepare, rows_of_epoch

    trust = given.trust_remote_code
    tokenizer = base.load_tokenizer(given.model, trust_remote_code=trust)
    config = base.load_config(given.model, trust_remote_code=trust)
    settings = DataConfig(tokens_per_row=given.tokens_per_row)
    dataset = prepare(
        given.data,
        tokenizer,
        settings,
        stop_ids=base.stop_ids(given.model, tokenizer, trust_remote_code=trust),
        max_tokens=base.max_document_tokens(config),
        seed=0,
        cache_dir=process.cache_dir(None),
    )
    train, held_out = ([len(example) for example in part] for part in (dataset.train, dataset.eval))
    training = TrainConfig(gradient_accumulation_steps=given.gradient_accumulation_steps)
    chosen = choices.choose(settings, training, train, held_out, choices.width_of(config))
    row, passes = chosen.data.row_tokens, chosen.training.passes
    tokens = len(rows_of_epoch(dataset.train, row, 0, seed=0, epoch=0)) * row * passes
    return _Run(row, chosen.training.rows_per_step, tokens, tuple(map(str, chosen.choices)))
