"""Chooses row size, rows per step, passes and learning rate where the user has not set them.

`train`, `sweep`, `preview`, `estimate` and `lt.train` ask this one function, so all of them show the same numbers. A
choice depends on the lengths of the documents and the width of the model, and on nothing else. It becomes part of the
settings, so `run.toml` is complete and a second run from it is the same run.

A step takes a batch of whole documents, as in other trainers: 8, 16 or 32, the fewer the smaller the data. LoRA loses
more than full fine-tuning to large batches (Schulman et al. 2025, "LoRA Without Regret"). The passes give at least
`STEPS` steps, but there are at most `MOST_PASSES` of them.

The rate falls with the width of the model: 5e-4 (2000 / width)^0.63. "LoRA Without Regret" fits 5e-4 at width 2,000.
Our experiment on width 256 found 1.8e-3 (docs/experiments/lora-without-regret.md), and rates in use at width 4,096
are 2e-4 to 5e-4. The exponent joins them. The best rate does not depend on rank, batch or data to the same degree, so
they do not enter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.config import DataConfig, TrainConfig
from loratune.data.pack import best_fit, fullness
from loratune.errors import ConfigError

STEPS = 300
"""Optimizer steps that a run should have."""
MOST_PASSES = 10
ASSUMED_ROW = 2048
"""Row size of an estimate without data."""
_BATCHES = ((1_000, 8), (8_000, 16))
_LARGEST_BATCH = 32
"""Documents in a step: 8 below 1,000 documents, 16 below 8,000, otherwise 32."""
_ROW_STEP, _SHORTEST_ROW, _LONGEST_ROW = 64, 256, 2048
"""Rows are multiples of the first, and within the other two unless a single document is longer."""
_FULL = 0.9
_SAMPLED = 4_000
"""Documents that are packed to compare row sizes."""
_ALWAYS_ALLOWED = 16_384
"""Rows up to this many tokens are allowed for data of any size."""
_NARROWEST = 256
"""Width below which the rate does not rise, because nothing narrower was measured."""
_NEARLY_FULL, _FEW_STEPS = 0.8, 50


@dataclass(frozen=True, slots=True)
class SettingChoice:
    """One setting that was chosen for the user."""

    setting: str
    """Name as in `run.toml`."""
    value: float
    why: str

    def __str__(self) -> str:
        shown = f"{self.value:,}" if isinstance(self.value, int) else f"{self.value:g}"
        return f"{self.setting} = {shown}: {self.why}"


@dataclass(frozen=True, slots=True)
class ChosenSettings:
    """Complete settings, and the choices among them."""

    data: DataConfig
    training: TrainConfig
    choices: tuple[SettingChoice, ...]


def width_of(config: Any) -> int | None:
    """Hidden size of a transformers configuration; None if it has none."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None


def choose(
    data: DataConfig, training: TrainConfig, lengths: Sequence[int], held_out: Sequence[int], width: int | None
) -> ChosenSettings:
    """Completes the settings. A set value stays as it is, and the other choices follow it.

    Args:
        lengths, held_out: tokens of each training and held-out document.
        width: hidden size of the model, None if unknown.

    Raises: ConfigError: a row is far longer than all data.
    """
    choices: list[SettingChoice] = []
    batch = _documents_per_step(len(lengths))
    tokens = batch * sum(lengths) / len(lengths)
    if data.tokens_per_row is None:
        row, why = _row(lengths, held_out, tokens / training.rows_per_step, batch)
        data = replace(data, tokens_per_row=row)
        choices.append(SettingChoice("tokens_per_row", row, why))
    else:
        _check_row(data.tokens_per_row, sum(lengths))
    rows, full = _packed(lengths, data.row_tokens)
    if training.gradient_accumulation_steps is None:
        together = min(max(1, round(tokens / (data.row_tokens * full))), math.ceil(rows))
        training = replace(training, gradient_accumulation_steps=together)
        documents = len(lengths) * together / rows
        why = f"about {documents:,.0f} document{'s' * (round(documents) != 1)} in a step"
        choices.append(SettingChoice("gradient_accumulation_steps", together, why))
    if training.epochs is None and training.max_steps is None:
        passes, why = _passes(rows / training.rows_per_step)
        training = replace(training, epochs=passes)
        choices.append(SettingChoice("epochs", passes, why))
    elif training.epochs is None:
        training = replace(training, epochs=1)  # max_steps decides
    if training.learning_rate is None:
        rate, why = rate_of(width)
        training = replace(training, learning_rate=rate)
        choices.append(SettingChoice("learning_rate", rate, why))
    return ChosenSettings(data, training, tuple(choices))


def rate_of(width: int | None) -> tuple[float, str]:
    """The peak learning rate for a model of this hidden size, with two digits, and the reason."""
    if width is None:
        return 2e-4, "a usual rate; the model's configuration has no width"
    return float(f"{5e-4 * (2000 / max(width, _NARROWEST)) ** 0.63:.1e}"), f"for a model of width {width:,}"


def remarks(full: float, total_steps: int, tokens_per_row: int, longest: int) -> list[str]:
    """Warnings about a run that trains little or wastes its time.

    Args:
        full: share of the rows' tokens that belong to documents.
        longest: tokens of the longest document.
    """
    found = []
    if full < _NEARLY_FULL and tokens_per_row > _SHORTEST_ROW:
        found.append(
            f"rows are only {full:.0%} full, and padding takes as long as text; the longest document has "
            f"{longest:,} tokens, and a --tokens-per-row of a few times that packs better"
        )
    if total_steps < _FEW_STEPS:
        found.append(
            f"the run has only {total_steps:,} optimizer step{'s' * (total_steps != 1)}, which rarely suffices to "
            "learn; raise --epochs or --max-steps, or lower --tokens-per-row"
        )
    return found


def _documents_per_step(documents: int) -> int:
    return next((batch for below, batch in _BATCHES if documents < below), _LARGEST_BATCH)


def _row(lengths: Sequence[int], held_out: Sequence[int], tokens: float, batch: int) -> tuple[int, str]:
    """Row size for `tokens` tokens of documents in each row, and the reason."""
    longest = max(*lengths, *held_out) if held_out else max(lengths)
    row = _rounded(max(min(max(tokens, _SHORTEST_ROW), _LONGEST_ROW), longest))
    why = f"{batch} documents of {sum(lengths) / len(lengths):,.0f} tokens on average"
    if longest > row - _ROW_STEP and longest > tokens:
        why = f"the longest document has {longest:,} tokens"
    elif tokens > _LONGEST_ROW:
        why = "several rows make a step"
    elif tokens < _SHORTEST_ROW:
        why = "the shortest row; documents are very short"
    candidates = range(row, max(2 * row, _LONGEST_ROW) + 1, max(_ROW_STEP, _rounded(row / 8)))
    fuller = next((size for size in candidates if _packed(lengths, size)[1] >= _FULL), row)
    return fuller, why if fuller == row else f"{why}, rounded up to fill the rows"


def _rounded(tokens: float) -> int:
    return _ROW_STEP * math.ceil(tokens / _ROW_STEP)


def _packed(lengths: Sequence[int], row: int) -> tuple[float, float]:
    """Number of rows in an epoch and the full share of them, from a sample if there are many documents."""
    sample = lengths if len(lengths) <= _SAMPLED else random.Random(0).sample(lengths, _SAMPLED)
    rows = len(best_fit(sample, row, seed=0))
    return rows * len(lengths) / len(sample), fullness(sample, rows, row)


def _passes(steps_per_pass: float) -> tuple[int, str]:
    wanted = math.ceil(STEPS / steps_per_pass)
    passes = min(max(1, wanted), MOST_PASSES)
    steps = f"{math.ceil(passes * steps_per_pass):,} steps"
    if passes == 1:
        return 1, f"{steps} in one pass"
    return passes, f"{steps}" + (", as more passes would repeat the data too often" if wanted > passes else "")


def _check_row(row: int, tokens: int) -> None:
    if row > _ALWAYS_ALLOWED and row > 2 * tokens:
        raise ConfigError(
            f"tokens_per_row is {row:,}, but all training documents together have {tokens:,} tokens, so the row "
            "would be padding; leave out --tokens-per-row, and it follows the data"
        )
