"""Memory and speed of a run, from the model's configuration alone, and the settings that would make it fit.

The model is built on PyTorch's "meta" device, where tensors have shapes and no data. Nothing but a configuration is
downloaded, and a model of 70 billion parameters takes a second. The adapter is selected on it as on the real model,
and `memory.budget` does the arithmetic. Before training the same code reads the model in memory.

A run that does not fit comes with settings that would make it fit. Each is computed, and the fastest comes first.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loratune import hub
from loratune.base import load as base
from loratune.base.model_config import CONFIG_FILE, read_config, without_data
from loratune.config import LoraConfig, Precision
from loratune.errors import ModelError
from loratune.fused.fit import recipe_fits
from loratune.fused.policy import TILE, ActivationPlan, Level
from loratune.lora.build import build
from loratune.lora.expert_targets import parameter_paths
from loratune.lora.inject import add
from loratune.lora.select import Selection, select
from loratune.memory.budget import PlanChoice, RowSetting, choose, peak, peak_of_modules, seconds, seconds_of_modules
from loratune.memory.devices import DeviceSpec
from loratune.memory.modules import ModuleRows
from loratune.memory.survey import LayerCopy, ModelSurvey, survey, without_values
from loratune.precision.contract import smallest_format, weight_format
from loratune.precision.linear import quantise_linears
from loratune.tables import PRECISIONS

_POLICIES = {level.name.lower(): level for level in (Level.NONE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD)}


@dataclass(frozen=True)
class EstimateRequest:
    """Settings of a run that determine its memory."""

    precision: Precision
    lora: LoraConfig
    setting: RowSetting
    activations: str = "auto"
    on_gpu: bool = True


@dataclass(frozen=True)
class SuggestedChange:
    """One or several changed settings, and the memory and speed of the changed run."""

    what: str
    choice: PlanChoice


@dataclass(frozen=True)
class RunEstimate:
    """Memory and speed of a run on a device."""

    survey: ModelSurvey
    request: EstimateRequest
    device: DeviceSpec
    limit: int
    """Bytes that the run may take; 0 for no limit, on a CPU."""
    choice: PlanChoice
    """The requested plan. With `auto` the fastest plan that fits, or the most frugal if none does."""
    changes: tuple[SuggestedChange, ...]
    """Changes that make the run fit, fastest first; empty if it fits."""
    why_rough: str | None = None
    """The reason why activations are estimated from widths; None if layers ran without data."""

    @property
    def fits(self) -> bool:
        """True if the run takes no more than the limit."""
        return self.choice.bytes.total <= self.limit or self.limit == 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second; None if the device's rates are unknown or the run does not fit."""
        if not self.device.flops or not self.choice.seconds or not self.fits:
            return None
        return self.request.setting.tokens * self.request.setting.rows / self.choice.seconds


def model_from_config(model: str, precision: Precision, trust_remote_code: bool = False) -> PreTrainedModel:
    """`model` without data, from its configuration. A folder needs to hold no more than config.json.

    Raises: ModelError: there is no usable configuration of a causal language model.
    """
    config = _config(model, trust_remote_code)
    dtype = base.DTYPES.get(precision) or getattr(config, "dtype", None) or torch.bfloat16
    return without_data(config, dtype, trust_remote_code=trust_remote_code)


def estimate(model: PreTrainedModel, request: EstimateRequest, device: DeviceSpec, limit: int) -> RunEstimate:
    """Memory and speed of training an adapter on `model`, which may be without data.

    Raises: AdapterError: the adapter's settings do not fit the model.
    """
    found = survey_of(model, request)
    rows = None if found.ledgers else ModuleRows(model, request.lora, on_gpu=device.memory_bytes > 0)
    choice = _choice(found, request, device, limit, rows)
    estimated = RunEstimate(found, request, device, limit, choice, (), rows.why_rough if rows else None)
    if estimated.fits:
        return estimated
    changes = [
        SuggestedChange(text, made)
        for text, other, on in _changes(model, request, found)
        if (rows is None or _always_there(on, other.setting) <= limit)
        and (made := _choice(on, other, device, limit, rows)).bytes.total <= limit
    ]
    changes.sort(key=lambda change: change.choice.seconds)
    return replace(estimated, changes=tuple(changes))


def survey_of(model: PreTrainedModel, request: EstimateRequest) -> ModelSurvey:
    """Sizes of the model and of the requested adapter. Raises: AdapterError: the settings do not fit the model."""
    selection = select(model, request.lora)
    trained = {target.base: target.parameters for target in selection.targets}
    trainable = sum(trained.values())
    trainable += sum(p.numel() for entry in selection.saved for p in entry.module.parameters())
    half = model.dtype in (torch.bfloat16, torch.float16)
    fuses = request.on_gpu and half and all(target.variant.low_rank_sum for target in selection.targets)
    fit = next((fit for fit in recipe_fits(model) if fit.why_not(model) is None), None) if fuses else None
    made = _layer_copy(request, selection)
    return survey(model, trained, trainable, precision=request.precision, fit=fit, layer_copy=made)


def _layer_copy(request: EstimateRequest, selection: Selection) -> LayerCopy:
    """Copies decoder layers as they will train: in the requested precision, with the requested adapter."""

    experts = parameter_paths((target.path, target.variant) for target in selection.targets)
    owners = {path.rpartition(".")[0] for path in experts}
    layers = [target.path for target in selection.targets if target.path not in owners]

    def made(path: str, layer: nn.Module) -> nn.Module:
        tree = _tree(path, without_values(layer))
        if request.precision in PRECISIONS:
            quantise_linears(tree, weight_format(request.precision).quantise)
        inside, stacked = ([name for name in names if name.startswith(f"{path}.")] for names in (layers, experts))
        if inside or stacked:
            chosen = {"target_modules": inside, "target_parameters": stacked or None}
            settings = replace(request.lora, **chosen, modules_to_save=None, bias="none")  # type: ignore[arg-type]
            found = select(tree, settings, strict=False)
            add(tree, "estimate", lambda: (found, build(tree, settings, found, None)))
        return tree.get_submodule(path)

    return made


def _tree(path: str, module: nn.Module) -> nn.Module:
    """A module that holds nothing but `module`, at `path`."""
    root = nn.Module()
    *parents, name = path.split(".")
    parent = root
    for each in parents:
        child = nn.Module()
        parent.add_module(each, child)
        parent = child
    parent.add_module(name, module)
    return root


def _choice(
    found: ModelSurvey, request: EstimateRequest, device: DeviceSpec, limit: int, rows: ModuleRows | None
) -> PlanChoice:
    if rows is not None:
        return _choice_of_modules(found, request, device, limit, rows)
    if request.activations == "auto":
        best = choose(found, request.setting, device, limit)
        if best is not None:
            return best
    plan = ActivationPlan.smallest(found.layers)
    if request.activations != "auto":
        plan = ActivationPlan.uniform(_POLICIES[request.activations], found.layers, TILE)
    return PlanChoice(plan, peak(found, request.setting, plan), seconds(found, request.setting, plan, device))


def _choice_of_modules(
    found: ModelSurvey, request: EstimateRequest, device: DeviceSpec, limit: int, rows: ModuleRows
) -> PlanChoice:
    """The first level that fits, or the last; on a CPU `auto` saves everything."""
    on_cpu, setting = device.memory_bytes == 0, request.setting
    levels = [_POLICIES[request.activations]] if request.activations != "auto" else list(_POLICIES.values())
    if not on_cpu and _always_there(found, setting) > limit:
        levels = levels[-1:]  # no level fits
    choice: PlanChoice | None = None
    for level in levels[:1] if on_cpu else levels:
        plan = ActivationPlan.uniform(level, found.layers)
        activations = rows(setting.tokens, level)
        needed = peak_of_modules(found, setting, activations, resident_bytes() if on_cpu else None)
        choice = PlanChoice(plan, needed, seconds_of_modules(found, setting, level, device))
        if needed.total <= limit:
            break
    assert choice is not None
    return choice


def _always_there(found: ModelSurvey, setting: RowSetting) -> int:
    """Bytes of weights, masters, gradients and optimizer, which no activation level changes."""
    return found.base_bytes + int((8 + setting.optimizer_bytes) * found.trainable)


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak_so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_so_far if sys.platform == "darwin" else peak_so_far * 1024


def _changes(
    model: PreTrainedModel, request: EstimateRequest, found: ModelSurvey
) -> Iterator[tuple[str, EstimateRequest, ModelSurvey]]:
    """Single changes and pairs of changes, each with its settings and sizes."""
    auto, setting = replace(request, activations="auto"), request.setting
    if request.activations != "auto":
        yield "--activations auto", auto, found
    shorter: list[tuple[str, RowSetting]] = []
    for factor in (2, 4, 8):
        tokens, rows = setting.tokens // factor, setting.rows * factor
        if tokens >= 128:
            text = f"--tokens-per-row {tokens} --gradient-accumulation-steps {rows}"
            shorter.append((text, replace(setting, tokens=tokens, rows=rows)))
    for text, less in shorter:
        yield text, replace(auto, setting=less), found
    precision: Any = smallest_format().name
    if found.quantised != precision:
        smaller = replace(auto, precision=precision)
        on = survey_of(model, smaller)
        yield f"--precision {precision}", smaller, on
        for text, less in shorter:
            yield f"--precision {precision} {text}", replace(smaller, setting=less), on


def _config(model: str, trust_remote_code: bool) -> Any:
    folder = Path(model).expanduser()
    if model != base.POCKET and (folder / CONFIG_FILE).is_file():
        return read_config(model, str(folder), trust_remote_code=trust_remote_code)
    if not folder.is_dir() and model != base.POCKET:
        try:
            source = hub.find(model, "model") or model
        except hub.NotOnHub as error:
            raise ModelError(f"{model}: no such folder here, and no configuration from the hub: {error}") from error
        return read_config(model, source, trust_remote_code=trust_remote_code)
    return base.load_config(model, trust_remote_code=trust_remote_code)
