"""Chooses the activations that layers save, and runs one step of full size before the first real one.

Every row has the same shape, so a row of arbitrary tokens takes the memory of every row. The dry step runs forward
and backward with a buffer in place of the optimizer's state. It changes neither the adapter nor a random generator.
If steps will be one CUDA graph, the dry step records that graph too. A recording takes more memory than the work
itself: a second pool, from which nothing can be returned before the recording ends. A plan without memory for its
recording is skipped. If no plan can be recorded, the first that fits runs without a recording.

So a device that is too small causes an error within seconds, with the missing bytes and the settings that help. If
layers are not fused, `auto` tries the levels one by one, from fast to frugal.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.errors import ConfigError, TrainingError
from loratune.fused.policy import TILE, ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.lora.contract import AdaptedLayer
from loratune.memory import budget, devices
from loratune.memory.budget import PeakMemory, RowSetting
from loratune.memory.devices import DeviceSpec, free_bytes
from loratune.memory.survey import ModelSurvey, survey, trained_in
from loratune.precision.contract import smallest_format
from loratune.training.graph import GraphStep
from loratune.training.optim import STATE_BYTES, masters_on_device, masters_on_host
from loratune.training.step import HostClipped, row_loss
from loratune.units import bytes_of, size

LEVELS = {level.name.lower(): level for level in (Level.NONE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD)}
_CLOSER = (1.03, 1.0, 0.97, 0.93, 0.88)
"""Shares of the limit to plan for, one after the other, until a dry step fits. The first share exceeds 1, because
estimates are up to 3 % above measured peaks and never below them."""
_QUICK = 5.0
"""A plan that is estimated not to fit is tried only if its step takes at most this many seconds."""
_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the layers that recompute, where layers run as modules."""
_OF_THE_HOST = 0.8
"""Share of the host's free memory that may be pinned."""


@dataclass(frozen=True)
class FittedPlan:
    """The chosen plan and its memory."""

    plan: ActivationPlan
    expected: PeakMemory | None
    """Estimated peak memory; None unless layers run fused on a GPU."""
    limit: int
    """Bytes that the run may take on the device; 0 on a CPU."""
    tried: int
    """Most bytes allocated during the dry step; 0 on a CPU, which has none."""


@dataclass(frozen=True)
class DryStep:
    """A dry step that fitted."""

    tried: int
    """Most bytes allocated during the dry step."""
    recorded: bool
    """False if the recording did not fit; True if it did, or if steps of this model are never recorded."""


def fit(
    forward: PackedForward, parameters: Mapping[str, nn.Parameter], config: TrainConfig, tokens: int
) -> FittedPlan:
    """Chooses a plan by dry steps under `memory_cap`, and sets `forward.plan`.

    Args:
        parameters: trained parameters by name.
        tokens: length of a row.

    Raises: TrainingError: the device is too small for every plan that the settings allow. ConfigError: as
        `check_limit`.
    """
    check_limit(config, forward.model.device)
    layers = len(decoder_layers(forward.model))
    device = forward.model.device
    if device.type != "cuda":
        forward.plan = ActivationPlan.uniform(LEVELS.get(config.activations, Level.NONE), layers)
        return FittedPlan(forward.plan, None, 0, 0)
    limit, forward.record = _limit(config, device), True
    trainable = sum(parameter.numel() for parameter in parameters.values())
    setting = RowSetting(tokens, config.rows_per_step, STATE_BYTES[config.optim])
    found = survey(forward.model, trained_in(forward.model), trainable, fit=forward.fused)

    def trial(plan: ActivationPlan) -> DryStep | None:
        forward.plan = plan
        if plan.optimizer_on_host:
            masters_on_host(parameters.values())
        ballast = 0 if plan.optimizer_on_host else int(setting.optimizer_bytes * trainable)
        return _dry_step(forward, parameters, setting, ballast)

    with memory_cap(config, device):
        fitted = first_that_fits(_plans(found, setting, config, device, limit), trial)
    if fitted is None:
        raise TrainingError(too_small(found, setting, config, devices.present(device), limit))
    forward.plan, forward.record = fitted[0], fitted[1].recorded
    if not forward.plan.optimizer_on_host:
        masters_on_device(parameters.values())
    expected = budget.peak(found, setting, forward.plan) if found.ledgers else None
    return FittedPlan(forward.plan, expected, limit, fitted[1].tried)


def check_limit(config: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError for a memory limit on a device that cannot enforce one."""
    if config.memory is not None and device.type != "cuda":
        raise ConfigError(
            f"memory {config.memory} limits GPU memory, and this run is on {device.type}, where no limit can be "
            "enforced. Leave it out; --activations full or a smaller --tokens-per-row saves memory"
        )


def first_that_fits(
    plans: Iterable[ActivationPlan], trial: Callable[[ActivationPlan], DryStep | None]
) -> tuple[ActivationPlan, DryStep] | None:
    """The first plan whose step can be recorded, else the first that fits without a recording; None if none fits.

    Args:
        trial: tries a plan; None if it does not fit. Each plan is tried once.
    """
    plain: tuple[ActivationPlan, DryStep] | None = None
    seen: set[ActivationPlan] = set()
    for plan in plans:
        if plan in seen:
            continue
        seen.add(plan)
        found = trial(plan)
        if found is not None and found.recorded:
            return plan, found
        if found is not None and plain is None:
            plain = plan, found
    return plain


@contextmanager
def memory_cap(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Context that caps PyTorch's memory on the device at `--memory`; no effect without that setting.

    PyTorch has one cap for all models of a process. A lower cap set by the user is not raised. The previous cap is
    restored on exit.
    """
    if config.memory is None or device.type != "cuda":
        yield
        return
    device = _numbered(device)
    before, whole = torch.cuda.get_per_process_memory_fraction(device), torch.cuda.mem_get_info(device)[1]
    share = max(0.0, (_limit(config, device) - budget.CONTEXT) / whole)
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _limit(config: TrainConfig, device: torch.device) -> int:
    """Bytes that the run may take on the device, CUDA's context included."""
    device = _numbered(device)
    free, whole = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    available = min(available, int(torch.cuda.get_per_process_memory_fraction(device) * whole)) + budget.CONTEXT
    return available if config.memory is None else min(bytes_of(config.memory), available)


def _numbered(device: torch.device) -> torch.device:
    """The device with its index, which PyTorch's memory caps require."""
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _plans(
    found: ModelSurvey, setting: RowSetting, config: TrainConfig, device: torch.device, limit: int
) -> Iterator[ActivationPlan]:
    """Plans to try, the fastest first."""
    if config.activations != "auto":
        level = LEVELS[config.activations]
        yield from (
            ActivationPlan.uniform(level, found.layers, tile) for tile in ((TILE, 1024) if level else (TILE,))
        )
    elif not found.ledgers:
        yield from plans_of_modules(found.layers)
    else:
        yield from by_estimate(found, setting, devices.present(device), limit)
        yield ActivationPlan.smallest(found.layers)


def plans_of_modules(layers: int) -> Iterator[ActivationPlan]:
    """Plans for layers that run as modules, whose time is not estimated: each saves less than the one before."""
    yield ActivationPlan.uniform(Level.NONE, layers)
    for share in _SHARES:
        yield ActivationPlan.mixed(Level.SELECTIVE, math.ceil(share * layers), Level.NONE, layers)
    yield ActivationPlan.uniform(Level.FULL, layers)
    for level in (Level.FULL, Level.OFFLOAD):
        yield replace(ActivationPlan.uniform(level, layers), embeddings_on_host=True)


def by_estimate(found: ModelSurvey, setting: RowSetting, device: DeviceSpec, limit: int) -> Iterator[ActivationPlan]:
    """Plans that are estimated to fit into `limit` bytes or nearly so, the fastest first."""
    pinned = int(_OF_THE_HOST * free_bytes(torch.device("cpu")))
    for share in _CLOSER:
        choice = budget.choose(found, setting, device, int(share * limit), pinned)
        if choice is not None and (share <= 1 or choice.seconds <= _QUICK):
            yield choice.plan


def _dry_step(
    forward: PackedForward, parameters: Mapping[str, nn.Parameter], setting: RowSetting, ballast_bytes: int
) -> DryStep | None:
    """Runs one row forward and backward, then records the same; None if the run itself is out of memory."""
    device = forward.model.device
    _clear(parameters)
    torch.cuda.reset_peak_memory_stats(device)
    ballast: list[Tensor] = []
    row, values = _any_row(setting.tokens, setting.documents), list(parameters.values())
    try:
        with torch.random.fork_rng(devices=[device]), _dropping(forward.model), forward.installed():
            ballast.append(torch.empty(ballast_bytes, dtype=torch.uint8, device=device))
            recorded = True
            step = GraphStep.for_device(forward, values, HostClipped(torch.optim.SGD(values)), 0.0)
            if step is None:
                row_loss(forward, row).backward()
            else:
                recorded = step.rehearse(row, accumulate=setting.rows > 1)
            return DryStep(torch.cuda.max_memory_allocated(device), recorded)
    except torch.OutOfMemoryError:
        return None
    finally:
        ballast.clear()
        _clear(parameters)


def _clear(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Context with the adapter's dropout as in training, because its masks take memory if layers run as modules."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer) and not module.training]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _any_row(tokens: int, documents: int) -> Row:
    """A row with the largest memory of its length: documents of different lengths, seven eighths of the tokens
    trained.

    With all tokens trained, no memory would be needed to gather the trained positions.
    """
    documents = min(documents, tokens)
    first = max(1, 2 * tokens // 5)
    ends = [first + index * (tokens - first) // (documents - 1) for index in range(documents)]
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    weights = torch.ones(tokens)
    weights[: -(-tokens // 8)] = 0.0
    weights[-1] = 0.0
    positions = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    ids = torch.zeros(tokens, dtype=torch.int64)
    return Row(tokens=ids, position_ids=positions, cu_seqlens=cu_seqlens, targets=ids, weights=weights)


def too_small(found: ModelSurvey, setting: RowSetting, config: TrainConfig, device: DeviceSpec, limit: int) -> str:
    """The message for a run that does not fit into `limit` bytes: the missing bytes, and settings that help."""
    shorter = f"--tokens-per-row {max(2, setting.tokens // 2)} --gradient-accumulation-steps {2 * setting.rows}"
    if not found.ledgers:
        return f"out of GPU memory: {size(limit)} are free and a row of {setting.tokens} does not fit; try {shorter}"
    plan = ActivationPlan.smallest(found.layers)
    if config.activations != "auto":
        plan = ActivationPlan.uniform(LEVELS[config.activations], found.layers)
    needed = budget.peak(found, setting, plan).total
    fixes = [] if config.activations in ("auto", "offload") else ["--activations auto"]
    for factor in (2, 4, 8):
        tokens = setting.tokens // factor
        less = RowSetting(tokens, setting.rows * factor, setting.optimizer_bytes)
        if tokens and budget.choose(found, less, device, limit) is not None:
            fixes.append(f"--tokens-per-row {tokens} --gradient-accumulation-steps {less.rows}")
            break
    if not found.quantised:
        fixes.append(f"--precision {smallest_format().name}")
    if not fixes:
        fixes.append("a larger device, or a smaller model")
    return (
        f"out of GPU memory: a row of {setting.tokens} tokens takes {size(needed)}, of which "
        f"{size(found.base_bytes)} are the base model, and {size(limit)} may be taken: "
        f"{size(max(0, needed - limit))} are missing. Set {' or '.join(fixes)}"
    )
