"""Whether a run fits, found out before its data are rendered: a plan is chosen, and one step of full size tried.

Every row has the same shape, so a row of arbitrary tokens needs what every row will need. The dry step runs forward
and backward with the optimizer's state put in as ballast, and changes nothing: neither the adapter nor the state of
a random generator. Where steps will be one CUDA graph it makes that graph too, which takes more than the work by
itself: another pool of memory, from which nothing can be given back on the way. A plan without room for it is passed
over for the next; if none has room, the first that fits without a graph is taken.

If the device is too small, that is an error after seconds, with what is missing and what to set, and not one after
hours. Where layers are not fused their memory is not arithmetic (`memory.budget`), and `auto` tries the policies
themselves, from fast to frugal.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.errors import TrainingError
from loratune.fused.policy import TILE, ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.many.capacity import free_bytes
from loratune.memory import budget, devices
from loratune.memory.budget import PeakMemory, RowSetting
from loratune.memory.devices import DeviceSpec
from loratune.memory.survey import ModelSurvey, ranks_of, survey
from loratune.precision.contract import smallest_format
from loratune.training.graph import GraphStep
from loratune.training.optim import STATE_BYTES, masters_on_device, masters_on_host
from loratune.training.step import HostClipped, row_loss
from loratune.units import bytes_of, size

LEVELS = {level.name.lower(): level for level in (Level.NONE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD)}
_CLOSER = (1.03, 1.0, 0.97, 0.93, 0.88)
"""Shares of the limit to plan for, one after the other, until a dry step fits. What is estimated is never below what
is measured and up to so much above it, hence the first."""
_QUICK = 5.0
"""Seconds of a step up to which it is worth a dry step to find out whether a plan fits that is estimated not to."""
_OF_THE_HOST = 0.8
"""Share of the host's free memory that may be pinned."""


@dataclass(frozen=True)
class FittedPlan:
    """What layers keep, and what that takes."""

    plan: ActivationPlan
    expected: PeakMemory | None
    """By arithmetic, where layers run fused on a GPU."""
    limit: int
    """Bytes that the run may take on the device; 0 on a CPU."""
    tried: int
    """Most that was allocated during the dry step; 0 on a CPU, which has none."""


@dataclass(frozen=True)
class DryStep:
    """A dry step that had room."""

    tried: int
    """As in `FittedPlan`."""
    recorded: bool
    """Steps may be CUDA graphs: there is room for one, or no graph can be made of this model anyhow."""


def fit(
    forward: PackedForward, parameters: Mapping[str, nn.Parameter], config: TrainConfig, tokens: int
) -> FittedPlan:
    """Chooses what layers keep, tries it, and leaves `forward.plan` at it.

    Args:
        parameters: what trains.
        tokens: of a row.

    Raises: TrainingError: the device is too small for every policy that the settings allow.
    """
    layers = len(decoder_layers(forward.model))
    device = forward.model.device
    if device.type != "cuda":
        forward.plan = ActivationPlan.uniform(LEVELS.get(config.activations, Level.NONE), layers)
        return FittedPlan(forward.plan, None, 0, 0)
    limit, forward.record = _limit(config, device), True
    trainable = sum(parameter.numel() for parameter in parameters.values())
    setting = RowSetting(tokens, config.gradient_accumulation_steps, STATE_BYTES[config.optim])
    what = _survey(forward, trainable)

    def trial(plan: ActivationPlan) -> DryStep | None:
        forward.plan = plan
        if plan.optimizer_on_host:
            masters_on_host(parameters.values())
        ballast = 0 if plan.optimizer_on_host else int(setting.optimizer_bytes * trainable)
        return _dry_step(forward, parameters, setting, ballast)

    found = first_with_room(_plans(what, setting, config, device, limit, layers), trial)
    if found is None:
        raise TrainingError(too_small(what, setting, config, devices.present(device), limit))
    forward.plan, forward.record = found[0], found[1].recorded
    if not forward.plan.optimizer_on_host:
        masters_on_device(parameters.values())
    expected = None if what.shape is None else budget.peak(what, setting, forward.plan)
    return FittedPlan(forward.plan, expected, limit, found[1].tried)


def first_with_room(
    plans: Iterable[ActivationPlan], trial: Callable[[ActivationPlan], DryStep | None]
) -> tuple[ActivationPlan, DryStep] | None:
    """The first plan that has room for a recorded step, else the first that has room without; None if none has.

    Args:
        trial: tries a plan; None if there is no room at all. Each plan is tried once.
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


def _limit(config: TrainConfig, device: torch.device) -> int:
    """Bytes that may be taken on the device, CUDA's context included; enforced from here on if the user set it."""
    free, whole = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    if config.memory is None:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        return free + ours + budget.CONTEXT
    limit = min(bytes_of(config.memory), free + ours + budget.CONTEXT)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (limit - budget.CONTEXT) / whole)), device)
    return limit


def _survey(forward: PackedForward, trainable: int) -> ModelSurvey:
    model = forward.model
    ranks = ranks_of(model)
    return survey(model, ranks, trainable, "auto", model.dtype, on_gpu=forward.fused is not None)


def _plans(
    what: ModelSurvey, setting: RowSetting, config: TrainConfig, device: torch.device, limit: int, layers: int
) -> Iterator[ActivationPlan]:
    """What to try, the fastest first."""
    if config.activations != "auto":
        level = LEVELS[config.activations]
        yield from (ActivationPlan.uniform(level, layers, tile) for tile in ((TILE, 1024) if level else (TILE,)))
    elif what.shape is None:
        yield from (ActivationPlan.uniform(level, layers) for level in LEVELS.values())
    else:
        yield from by_estimate(what, setting, devices.present(device), limit)
        yield ActivationPlan((Level.OFFLOAD,) * layers, 1024, embeddings_on_host=True, optimizer_on_host=True)


def by_estimate(what: ModelSurvey, setting: RowSetting, device: DeviceSpec, limit: int) -> Iterator[ActivationPlan]:
    """Plans that are estimated to fit into `limit` bytes or nearly so, the fastest first."""
    pinned = int(_OF_THE_HOST * free_bytes(torch.device("cpu")))
    for share in _CLOSER:
        choice = budget.choose(what, setting, device, int(share * limit), pinned)
        if choice is not None and (share <= 1 or choice.seconds <= _QUICK):
            yield choice.plan


def _dry_step(
    forward: PackedForward, parameters: Mapping[str, nn.Parameter], setting: RowSetting, ballast_bytes: int
) -> DryStep | None:
    """Runs one row forward and backward, and once more as it is recorded; None if there is no room for it."""
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
    """Dropout of the adapter as in training, since in modules its masks take memory too."""
    modules = [m for m in model.modules() if getattr(m, "lora_dropout", 0.0) > 0.0 and not m.training]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def _any_row(tokens: int, documents: int) -> Row:
    """So many documents of different lengths, of which seven eighths are trained: what takes the most memory of all
    rows of this length, since trained positions are gathered unless they are nearly all of a row."""
    documents = min(documents, tokens)
    first = max(1, 2 * tokens // 5)
    ends = [first + index * (tokens - first) // (documents - 1) for index in range(documents)]
    borders = torch.tensor([0, *ends], dtype=torch.int32)
    weights = torch.ones(tokens)
    weights[: -(-tokens // 8)] = 0.0
    weights[-1] = 0.0
    positions = torch.cat([torch.arange(length) for length in borders.diff().tolist()])
    ids = torch.zeros(tokens, dtype=torch.int64)
    return Row(tokens=ids, position_ids=positions, cu_seqlens=borders, targets=ids, weights=weights)


def too_small(what: ModelSurvey, setting: RowSetting, config: TrainConfig, device: DeviceSpec, limit: int) -> str:
    """The message for a run that does not fit into `limit` bytes: by how much, and what to set."""
    shorter = f"--tokens-per-row {max(2, setting.tokens // 2)} --gradient-accumulation-steps {2 * setting.rows}"
    if what.shape is None:
        return f"out of GPU memory: {size(limit)} are free and a row of {setting.tokens} does not fit; try {shorter}"
    plan = ActivationPlan((Level.OFFLOAD,) * what.layers, 1024, embeddings_on_host=True, optimizer_on_host=True)
    if config.activations != "auto":
        plan = ActivationPlan.uniform(LEVELS[config.activations], what.layers)
    needed = budget.peak(what, setting, plan).total
    fixes = [] if config.activations in ("auto", "offload") else ["--activations auto"]
    for factor in (2, 4, 8):
        tokens = setting.tokens // factor
        less = RowSetting(tokens, setting.rows * factor, setting.optimizer_bytes)
        if tokens and budget.choose(what, less, device, limit) is not None:
            fixes.append(f"--tokens-per-row {tokens} --gradient-accumulation-steps {less.rows}")
            break
    if not what.quantised:
        fixes.append(f"--precision {smallest_format().name}")
    if not fixes:
        fixes.append("a larger device, or a smaller model")
    return (
        f"out of GPU memory: a row of {setting.tokens} tokens takes {size(needed)}, of which {size(what.base_bytes)} "
        f"are the base model, and {size(limit)} may be taken: {size(max(0, needed - limit))} are missing. "
        f"Set {' or '.join(fixes)}"
    )
