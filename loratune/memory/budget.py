"""Peak memory of a run by cause, its speed, and the fastest plan of activations that fits.

Every row of a run has the same shape, so its memory is arithmetic. Weights, adapters, optimizer state and the buffers
of a row are always there. Activations grow layer by layer up to the head and shrink on the way back, while the
gradients of the adapters grow. `peak` follows that line with the bytes of each layer (`memory.ledger`) and takes the
highest sum. It must never be below a measured peak; `_SLACK` covers everything that the ledger does not count.

Speed is less exact. It adds the times of frozen products, attention and passes over memory, at rates that the device
reaches. That is enough to rank plans, and to distinguish a run of an hour from a run of a day.

`choose` takes the fastest plan that fits. Plans differ in the amount of recomputation: a plan that saves more
activations is faster. In a plan between two levels, the first layers get the frugal level.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from loratune.fused.policy import TILE, ActivationPlan, Level, tiles
from loratune.memory.devices import DeviceSpec
from loratune.memory.ledger import LayerBytes, LayerRun, LayerWidths
from loratune.memory.simulate import SimulatedBytes
from loratune.memory.survey import ModelSurvey
from loratune.ops.logprobs import chunk_rows
from loratune.ops.meter import rounded
from loratune.precision.contract import weight_format

_MIB = 1 << 20
CONTEXT = 520 * _MIB
"""CUDA's context, kernels and libraries, outside of PyTorch's allocator."""
_WORKSPACES = 2 * 32 * _MIB
"""Workspaces of cuBLAS: one for the thread of the forward, one for the thread of the backward. A recording has its
own; workspaces of eager work are freed before recording (`training.recordings`)."""
_SLACK = 0.015
"""Share of the peak added for everything that the ledger does not count."""
_FRAGMENTS = 0.06
"""Share of the activations that the allocator holds and cannot use."""
_LOOSE = 0.08
"""`_FRAGMENTS` for layers that run as modules, whose kernels may also allocate memory of their own."""
_HOLES = 320 * _MIB
"""Bytes that the allocator holds in a run of any size: pages of 20 MiB that are partly used, before and after a
recording. During a recording the allocator cannot return pages."""
_PASSES = 3.0
"""Passes over inputs and outputs of a linear layer that runs as a module: its own, those of the norm or activation
beside it, and those of the adapter."""
PlanFamily = Callable[[int], ActivationPlan]
"""Number of frugal layers -> a plan."""
_TILES = (TILE, 4096, 2048, 1024)


@dataclass(frozen=True)
class RowSetting:
    """Rows of a step and state of the optimizer, on which memory depends besides the model and the plan."""

    tokens: int
    """Tokens in a row."""
    rows: int = 1
    """Rows in a step, which run one after the other."""
    optimizer_bytes: float = 8.0
    """Bytes of optimizer state for each trained parameter."""
    even: bool = False
    """True if all documents of a row have the same length. Otherwise a row is assumed to have one per 128 tokens."""

    @property
    def documents(self) -> int:
        """Number of documents of different lengths, a power of two as in recordings; 0 if `even`."""
        return 0 if self.even else 1 << (max(2, self.tokens // 128) - 1).bit_length()


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of the device by cause, in bytes."""

    base: int
    adapters: int
    """Masters in float32 and working copies."""
    gradients: int
    optimizer: int
    kept: int
    """Activations saved for the backward."""
    temporary: int
    """Short-lived tensors: the largest products and their gradients, the head, the buffers of a row."""
    slack: int
    """Memory that the allocator holds unused, and a margin for uncertainty."""
    context: int

    @property
    def allocated(self) -> int:
        """Bytes as counted by `torch.cuda.max_memory_allocated`."""
        return self.total - self.slack - self.context + int(_SLACK * (self.total - self.context - self.slack))

    @property
    def total(self) -> int:
        """Memory of the device as other programs see it."""
        named = self.base + self.adapters + self.gradients + self.optimizer + self.kept + self.temporary
        return named + self.slack + self.context


def peak(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan) -> PeakMemory:
    """Peak memory of a run on a GPU whose layers run fused."""
    moments = list(_moments(survey, setting, plan))
    gradients, kept, temporary = max(moments, key=sum)
    if setting.rows > 1:
        gradients = 4 * survey.trainable
    masters = 0 if plan.optimizer_on_host else 4 * survey.trainable
    optimizer = 0 if plan.optimizer_on_host else int(setting.optimizer_bytes * survey.trainable)
    base = survey.base_bytes - (survey.embedding_bytes if plan.embeddings_on_host else 0)
    buffers = rounded(40 * setting.tokens) + 2 * rounded(setting.tokens * survey.rotary_dim * survey.element_bytes)
    temporary += buffers + _WORKSPACES
    copies = survey.copies_bytes(hold_transposed=False)
    if plan.hold_transposed:
        base += survey.copies_bytes(hold_transposed=True) - copies
    fixed = base + masters + copies + optimizer
    slack = _HOLES + int(_SLACK * fixed + (_SLACK + _FRAGMENTS) * (gradients + kept + temporary))
    return PeakMemory(
        base=base,
        adapters=masters + copies,
        gradients=gradients,
        optimizer=optimizer,
        kept=kept,
        temporary=temporary,
        slack=slack,
        context=CONTEXT,
    )


def peak_of_modules(
    survey: ModelSurvey, setting: RowSetting, activations: SimulatedBytes, baseline: int | None
) -> PeakMemory:
    """Peak memory of a run whose layers run as modules.

    Args:
        activations: bytes of one row, with the gradients of the adapters.
        baseline: resident bytes of the process without the model, for a CPU; None for a GPU.
    """
    masters, optimizer = 4 * survey.trainable, int(setting.optimizer_bytes * survey.trainable)
    gradients = masters
    kept, temporary = activations.saved, activations.peak - activations.saved
    temporary = max(0, temporary - gradients) + (_WORKSPACES if baseline is None else 0)
    slack = int(_SLACK * (survey.base_bytes + masters + optimizer) + _LOOSE * (kept + temporary))
    return PeakMemory(
        base=survey.base_bytes,
        adapters=masters,
        gradients=gradients,
        optimizer=optimizer,
        kept=kept,
        temporary=temporary,
        slack=slack,
        context=CONTEXT if baseline is None else baseline,
    )


def _moments(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan) -> Iterator[tuple[int, int, int]]:
    """Bytes of (gradients, saved, temporary) at each moment of a row at which their sum may be highest."""
    stream = rounded(setting.tokens * survey.width * survey.element_bytes)
    layers = _layers(survey, setting, plan)
    below, leaving = 0, [0, 0]  # bytes of the last two layers that `ops.host` is still copying out
    for layer in layers:
        yield 0, below, layer.forward + stream + sum(leaving)
        below += layer.saved
        leaving = [leaving[1], layer.away]
    chunk = chunk_rows(setting.tokens, survey.vocabulary) * survey.vocabulary * survey.element_bytes
    yield 0, below, 4 * stream + sum(leaving) + rounded(chunk)
    yield 0, below, 6 * stream + sum(leaving)
    gradients = 0
    for index, layer in reversed(list(enumerate(layers))):
        below -= layer.saved
        coming = layers[index - 1].away if index else 0
        yield gradients, below + layer.saved, layer.backward - layer.saved + coming
        gradients += 4 * survey.layer_trainable
        yield gradients, below, 2 * stream


def _layers(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan) -> list[LayerBytes]:
    """Bytes of each layer under the plan. Levels that save gate and up ignore the plan's tile."""

    def run(level: Level) -> LayerRun:
        tile = max(setting.tokens, TILE) if level.keeps_gate_up else min(plan.tile, max(setting.tokens, 1))
        return LayerRun(setting.tokens, setting.documents, level, tile, plan.hold_transposed)

    layers = list(zip(survey.ledgers, plan.levels, strict=True))
    known = {(ledger, level): ledger(run(level)) for ledger, level in set(layers)}
    return [known[layer] for layer in layers]


def seconds(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan, device: DeviceSpec) -> float:
    """Seconds of one optimizer step; 0 if the device's rates are unknown. Assumes one document per row."""
    if device.flops == 0 or not survey.ledgers:
        return 0.0
    widths, tokens, cost = survey.ledgers[0].widths, setting.tokens, weight_format(survey.quantised).cost
    forward = 2.0 * tokens * survey.layer_elements
    attention = 2.0 * tokens * min(tokens, 4096) * widths.query / 2
    columns = 14 * widths.stream + 4 * widths.heads + 2 * widths.up + 4 * widths.mlp
    passes = tokens * survey.element_bytes * columns
    unpacking = cost.unpack * survey.layer_elements / device.bytes_per_second
    once = (2 * forward + 3.5 * 2 * attention) / device.flops + passes / device.bytes_per_second + 2 * unpacking
    if not plan.hold_transposed:
        once += cost.transpose * survey.layer_elements / device.bytes_per_second
    # Each further tile reads, and unpacks, the MLP's weights again: in the forward, in the recomputation of the first
    # projection, and in the backward.
    mlp = (2 * widths.mlp_elements + widths.up * widths.stream) * (survey.element_bytes + cost.unpack)
    tiling = (len(tiles(tokens, plan.tile)) - 1) * mlp / device.bytes_per_second
    total = crossing = 0.0
    for level, layer in zip(plan.levels, _layers(survey, setting, plan), strict=True):
        again = _again(widths, level)
        total += once + tokens * again / device.flops + 1.05 * unpacking * again / (2.0 * survey.layer_elements)
        if not level.keeps_gate_up:
            total += tiling
        if level >= Level.FULL:
            total += 2 * attention / device.flops
        crossing += layer.away / (device.host_bytes_per_second or 1.0)
    # Copies overlap with the forward, a third of the work of a step. Only longer copies add time.
    total += max(0.0, crossing - 0.9 * survey.layers * once / 3) + 0.02 * crossing
    return setting.rows * (total + _head_seconds(survey, setting, plan, device)) + _update(
        survey, setting, plan, device
    )


def seconds_of_modules(survey: ModelSurvey, setting: RowSetting, level: Level, device: DeviceSpec) -> float:
    """Seconds of one optimizer step whose layers run as modules; 0 where the device's rates are unknown.

    Every operation of a module is a pass over its input and output. Experts count as far as a token uses them.
    """
    if device.flops == 0:
        return 0.0
    tokens, cost = setting.tokens, weight_format(survey.quantised).cost
    runs = 2 if level is Level.NONE else 3  # forward, backward, and the forward once more
    attention = 2.0 * tokens * min(tokens, 4096) * survey.width / 2 * survey.layers
    passes = _PASSES * tokens * survey.element_bytes * survey.active_columns
    weights = survey.base_bytes + cost.unpack * survey.active_elements
    products = runs * 2.0 * tokens * survey.active_elements + (3.5 + (level is not Level.NONE)) * 2 * attention
    row = products / device.flops + runs * (passes + weights) / device.bytes_per_second
    head = 4.0 * tokens * survey.width * survey.vocabulary / device.flops
    return setting.rows * (row + head) + 30 * survey.trainable / device.bytes_per_second + 1e-3


def _head_seconds(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan, device: DeviceSpec) -> float:
    """Seconds of the head for one row, and of its embeddings if they are on the host."""
    head = 4.0 * setting.tokens * survey.width * survey.vocabulary / device.flops
    if plan.embeddings_on_host:
        head += setting.tokens * survey.width * survey.element_bytes / device.host_bytes_per_second
    return head


def _update(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan, device: DeviceSpec) -> float:
    """Seconds of the optimizer, and a millisecond for all work that does not depend on sizes."""
    update = 30 * survey.trainable / device.bytes_per_second
    if plan.optimizer_on_host:
        update = (24 + 4 * setting.rows) * survey.trainable / device.host_bytes_per_second
    return update + 1e-3


def _again(widths: LayerWidths, level: Level) -> float:
    """Multiplications and additions per token that a layer repeats in its backward."""
    products = 0
    if not level.keeps_gate_up:
        products += widths.up * widths.stream
    if not level.keeps_heads:
        products += widths.heads * widths.stream
    if not level.keeps_attended:
        products += widths.query * widths.stream
    return 2.0 * products


@dataclass(frozen=True)
class PlanChoice:
    """A plan with its memory and speed."""

    plan: ActivationPlan
    bytes: PeakMemory
    seconds: float
    """Seconds of a step; 0 if unknown."""


def host_bytes(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan) -> int:
    """Pinned host memory: activations, and embeddings and optimizer state if the plan moves them to the host."""
    waiting = sum(layer.away for layer in _layers(survey, setting, plan))
    embeddings = survey.embedding_bytes if plan.embeddings_on_host else 0
    return waiting + embeddings + (int((4 + setting.optimizer_bytes) * survey.trainable) * plan.optimizer_on_host)


def choose(
    survey: ModelSurvey, setting: RowSetting, device: DeviceSpec, limit: int, host_limit: int | None = None
) -> PlanChoice | None:
    """The fastest plan whose total is within `limit` bytes; None if even the most frugal plan takes more.

    Args:
        host_limit: bytes of host memory that may be pinned; None for any number.
    """
    best: PlanChoice | None = None
    if survey.base_bytes - survey.embedding_bytes + CONTEXT > limit:
        return None
    ways = (True, False) if weight_format(survey.quantised).holds_transposed else (False,)
    for embeddings, optimizer in ((False, False), (True, False), (True, True)):
        for hold_transposed in ways:
            extras = _Extras(embeddings, optimizer, hold_transposed)
            for family in _families(survey.layers):
                found = _best_of(survey, setting, device, limit, functools.partial(_with_extras, family, extras))
                if found is None:
                    continue
                if host_limit is not None and host_bytes(survey, setting, found.plan) > host_limit:
                    continue  # with more frugal layers even more bytes would go to the host
                if best is None or (found.seconds, found.bytes.total) < (best.seconds, best.bytes.total):
                    best = found
                if set(found.plan.levels) == {Level.NONE}:
                    break  # everything is saved, so no other family is faster
        if best is not None and not best.plan.levels[0].on_host:
            break
    return best


class _Extras(NamedTuple):
    """The fields of a plan that do not depend on layers."""

    embeddings_on_host: bool
    optimizer_on_host: bool
    hold_transposed: bool


def _with_extras(family: PlanFamily, extras: _Extras, first: int) -> ActivationPlan:
    return replace(family(first), **extras._asdict())


def largest(
    survey: ModelSurvey, device: DeviceSpec, limit: int, host_limit: int | None = None, step: int = 256
) -> tuple[int, PlanChoice] | None:
    """The longest document, a multiple of `step` tokens, whose row is estimated to fit, and the plan for it.

    Returns: None if not even `step` tokens fit.
    """

    def found(count: int) -> PlanChoice | None:
        return choose(survey, RowSetting(count * step, even=True), device, limit, host_limit)

    if found(1) is None:
        return None
    enough = 1
    while found(2 * enough) is not None:
        enough *= 2
    count = enough + bisect_left(range(enough + 1, 2 * enough), True, key=lambda count: found(count) is None)
    choice = found(count)
    assert choice is not None
    return count * step, choice


def _best_of(
    survey: ModelSurvey, setting: RowSetting, device: DeviceSpec, limit: int, plan_of: PlanFamily
) -> PlanChoice | None:
    """The plan of a family with the fewest frugal layers that fits: fewer are faster and take more memory."""
    first = bisect_left(range(survey.layers), True, key=lambda n: peak(survey, setting, plan_of(n)).total <= limit)
    plan = plan_of(first)
    needed = peak(survey, setting, plan)
    if needed.total > limit:
        return None
    return PlanChoice(plan, needed, seconds(survey, setting, plan, device) or _recomputed(survey, plan))


def _recomputed(survey: ModelSurvey, plan: ActivationPlan) -> float:
    """Amount of recomputation; ranks plans in place of the time if the device's rates are unknown."""
    widths = survey.ledgers[0].widths
    return sum(_again(widths, level) + level.on_host for level in plan.levels) * (1 + 1e-3 * TILE / plan.tile)


def _families(layers: int) -> Iterator[PlanFamily]:
    """Families of plans: a frugal level for the first layers, a more generous level for the rest.

    With staged layers the link to the host is idle for half of a step, so some of these layers may offload heads too.
    """
    for tile in _TILES:
        for frugal in Level:
            for other in (Level.NONE, Level.WIDE, Level.SELECTIVE):
                if other < frugal:
                    yield functools.partial(_mixed, layers, frugal, 0.0, other, tile)
        for share in (1 / 8, 1 / 4, 1 / 2):
            for other in (Level.NONE, Level.WIDE):
                yield functools.partial(_mixed, layers, Level.STAGED, share, other, tile)


def _mixed(layers: int, frugal: Level, share: float, other: Level, tile: int, first: int) -> ActivationPlan:
    return ActivationPlan.spread(Level.HOSTED, round(share * first), frugal, first, other, layers, tile)
