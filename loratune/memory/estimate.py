"""What a run will need, from the model's configuration alone: bytes by cause, speed, and what would make it fit.

The model is built on PyTorch's "meta" device, where tensors have shapes and no data, so nothing is downloaded but a
configuration, and a model of 70 billion parameters takes a second. The adapter is selected on it as on the real one,
and `memory.budget` does the arithmetic; before training the same code looks at the model in memory.

What does not fit comes with the changes that would make it fit, each computed and not guessed, in the order of what
they cost in speed.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from loratune import hub
from loratune.base import load as base
from loratune.config import LoraConfig, Precision
from loratune.errors import ModelError
from loratune.fused.policy import TILE, ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.lora.select import select
from loratune.memory.budget import PeakMemory, PlanChoice, RowSetting, choose, peak, peak_of_modules, seconds
from loratune.memory.devices import DeviceSpec
from loratune.memory.simulate import simulate, without_data
from loratune.memory.survey import ModelSurvey, survey
from loratune.precision.contract import smallest_format

_POLICIES = {level.name.lower(): level for level in (Level.NONE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD)}


@dataclass(frozen=True)
class EstimateRequest:
    """The settings that memory depends on."""

    precision: Precision
    lora: LoraConfig
    setting: RowSetting
    activations: str = "auto"
    on_gpu: bool = True


@dataclass(frozen=True)
class SuggestedChange:
    """One change of the settings, or several, and what they lead to."""

    what: str
    choice: PlanChoice


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes on a device."""

    survey: ModelSurvey
    wish: EstimateRequest
    device: DeviceSpec
    limit: int
    """Bytes that it may take; 0 for no limit, on a CPU."""
    choice: PlanChoice
    """As it was asked for; with `auto` the fastest that fits, or the most frugal if none does."""
    changes: tuple[SuggestedChange, ...]
    """What makes it fit, fastest first; empty if it fits."""

    @property
    def fits(self) -> bool:
        """True if the run takes no more than it may."""
        return self.choice.bytes.total <= self.limit or self.limit == 0

    @property
    def tokens_per_second(self) -> float:
        """0 if the device's rates are not known."""
        return self.wish.setting.tokens * self.wish.setting.rows / self.choice.seconds if self.choice.seconds else 0.0


def model_from_config(model: str, precision: Precision) -> PreTrainedModel:
    """`model` without any data, from its configuration; a folder needs to hold no more than config.json.

    Raises: ModelError: there is no usable configuration of a causal language model.
    """
    config = _config(model)
    dtype = base.DTYPES.get(precision) or getattr(config, "dtype", None) or torch.bfloat16
    try:
        return without_data(config, dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{model}: no causal language model can be made of this configuration: {error}") from error


def estimate(model: PreTrainedModel, wish: EstimateRequest, device: DeviceSpec, limit: int) -> RunEstimate:
    """What training an adapter on `model` takes, which may be an imagined one.

    Raises: AdapterError: the adapter's settings do not fit the model.
    """
    what = survey_of(model, wish)
    choice = _choice(what, wish, device, limit, model)
    found = RunEstimate(what, wish, device, limit, choice, ())
    if found.fits:
        return found
    changes = [
        SuggestedChange(text, made)
        for text, other, on in _changes(model, wish, what)
        if (made := _choice(on, other, device, limit, model)).bytes.total <= limit
    ]
    changes.sort(key=lambda change: change.choice.seconds)
    return replace(found, changes=tuple(changes))


def survey_of(model: PreTrainedModel, wish: EstimateRequest) -> ModelSurvey:
    """What the model and the adapter on it are made of. Raises: AdapterError: the settings do not fit the model."""
    selection = select(model, wish.lora)
    ranks = {target.base: target.r for target in selection.targets}
    trainable = sum(target.parameters for target in selection.targets)
    trainable += sum(p.numel() for place in selection.saved for p in place.module.parameters())
    fuses = wish.on_gpu and all(target.variant.low_rank_sum for target in selection.targets)
    return survey(model, ranks, trainable, wish.precision, model.dtype, on_gpu=fuses)


def _choice(
    what: ModelSurvey, wish: EstimateRequest, device: DeviceSpec, limit: int, model: PreTrainedModel
) -> PlanChoice:
    if what.shape is None:
        return _choice_of_modules(what, wish, device, limit, model)
    if wish.activations == "auto":
        best = choose(what, wish.setting, device, limit)
        if best is not None:
            return best
    level = _POLICIES.get(wish.activations, Level.OFFLOAD)
    plan = ActivationPlan.uniform(level, what.layers, TILE)
    if wish.activations == "auto":
        plan = ActivationPlan((level,) * what.layers, 1024, embeddings_on_host=True, optimizer_on_host=True)
    return PlanChoice(plan, peak(what, wish.setting, plan), seconds(what, wish.setting, plan, device))


def _choice_of_modules(
    what: ModelSurvey, wish: EstimateRequest, device: DeviceSpec, limit: int, model: PreTrainedModel
) -> PlanChoice:
    """The first policy that fits, or the last; on a CPU `auto` keeps everything."""
    on_cpu = device.memory_bytes == 0
    levels = [_POLICIES[wish.activations]] if wish.activations != "auto" else list(_POLICIES.values())
    choice: PlanChoice | None = None
    for level in levels[:1] if on_cpu else levels:
        plan = ActivationPlan.uniform(level, what.layers)
        needed = module_bytes(model, what, wish, plan, resident_bytes() if on_cpu else None)
        choice = PlanChoice(plan, needed, 0.0)
        if needed.total <= limit:
            break
    assert choice is not None
    return choice


def module_bytes(
    model: PreTrainedModel, what: ModelSurvey, wish: EstimateRequest, plan: ActivationPlan, baseline: int | None
) -> PeakMemory:
    """What a model whose layers are not fused takes; see `memory.budget.peak_of_modules`."""
    dtype = model.dtype
    copy = without_data(model.config, dtype)
    attach(copy, wish.lora, name="estimate", seed=0)
    activations = simulate(copy, wish.setting.tokens, plan, on_gpu=baseline is None)
    return peak_of_modules(what, wish.setting, activations, baseline)


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak_so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_so_far if sys.platform == "darwin" else peak_so_far * 1024


def _changes(
    model: PreTrainedModel, wish: EstimateRequest, what: ModelSurvey
) -> Iterator[tuple[str, EstimateRequest, ModelSurvey]]:
    """Single changes and pairs of them, each with its settings."""
    auto = replace(wish, activations="auto")
    if wish.activations != "auto":
        yield "--activations auto", auto, what
    shorter = [
        (f"--tokens-per-row {tokens} --gradient-accumulation-steps {wish.setting.rows * factor}", tokens, factor)
        for factor in (2, 4, 8)
        if (tokens := wish.setting.tokens // factor) >= 128
    ]
    for text, tokens, factor in shorter:
        setting = replace(wish.setting, tokens=tokens, rows=wish.setting.rows * factor)
        yield text, replace(auto, setting=setting), what
    for precision in (smallest_format().name,):
        if what.quantised == precision:
            continue
        smaller = replace(auto, precision=precision)
        on = survey_of(model, smaller)
        yield f"--precision {precision}", smaller, on
        for text, tokens, factor in shorter:
            setting = replace(wish.setting, tokens=tokens, rows=wish.setting.rows * factor)
            yield f"--precision {precision} {text}", replace(smaller, setting=setting), on


def _config(model: str) -> Any:
    folder = Path(model).expanduser()
    if model != base.POCKET and (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(str(folder))
    if not folder.is_dir() and model != base.POCKET:
        try:
            return AutoConfig.from_pretrained(hub.find(model, "model") or model)
        except (OSError, ValueError, hub.NotOnHub) as error:
            raise ModelError(f"{model}: no such folder here, and no configuration from the hub: {error}") from error
    return base.load_config(model)
