"""How much memory a run will take at its highest, by cause, how fast it will be, and what to keep so that it fits.

Everything in a run is of one shape, so its memory is arithmetic: weights, adapters, optimizer state and a row's
buffers are there all the time; activations grow layer by layer to the head and shrink on the way back, while the
gradients of the adapters grow. `peak` walks along that line with the ledger of one layer (`fused.ledger`) and takes
the highest sum. It is never to be below what is measured: `_SLACK` covers what the ledger leaves out.

Speed is less exact: the arithmetic of the frozen products at the rate that they reach on the device, attention, and
passes over memory. It is there to rank plans, and to say whether a run takes an hour or a day.

`choose` takes the fastest plan that fits. Plans differ in what they compute twice, so of two that fit the one that
keeps more is the faster; between policies the frontier is filled by giving the first layers the frugal one.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loratune.fused.ledger import Footprint, footprint, rounded
from loratune.fused.policy import TILE, ActivationPlan, Level, tiles
from loratune.memory.devices import DeviceSpec
from loratune.memory.simulate import SimulatedBytes
from loratune.memory.survey import ModelSurvey
from loratune.ops.logprobs import chunk_rows
from loratune.precision.contract import weight_format

_MIB = 1 << 20
CONTEXT = 520 * _MIB
"""CUDA's context, kernels and libraries, outside of PyTorch's allocator."""
_WORKSPACES = 2 * 32 * _MIB
"""cuBLAS: one for the thread of the forward and one for that of the backward. A recording has its own, and those of
eager work are let go of before it (`training.graph`)."""
_SLACK = 0.015
"""Share of the peak that is added for what the ledger does not know."""
_FRAGMENTS = 0.06
"""Share of the activations that the allocator holds and cannot use."""
_LOOSE = 0.08
"""The same where activations are counted and not told by a ledger: kernels may take memory of their own."""
_HOLES = 320 * _MIB
"""What the allocator holds beside that, whatever the size of the run: pages of 20 MiB that are in use in part, on
either side of a recording. While one is made, the allocator cannot give back pages as it does elsewhere."""
Family = Callable[[int], ActivationPlan]
"""Number of frugal layers to a plan."""
_TILES = (TILE, 4096, 2048, 1024)


@dataclass(frozen=True)
class RowSetting:
    """What a run sees at a time, apart from its plan."""

    tokens: int
    """In a row."""
    rows: int = 1
    """In a step, one after the other."""
    optimizer_bytes: float = 8.0
    """State for each trained parameter."""
    even: bool = False
    """All documents of a row are of one length. Otherwise a row is taken to hold one for each 128 tokens."""

    @property
    def documents(self) -> int:
        """As in `fused.ledger.footprint`; a recording is made for a power of two (`training.graph`)."""
        return 0 if self.even else 1 << (max(2, self.tokens // 128) - 1).bit_length()


@dataclass(frozen=True)
class PeakMemory:
    """Memory of the device at its highest, by cause."""

    base: int
    adapters: int
    """Masters in float32 and working copies."""
    gradients: int
    optimizer: int
    kept: int
    """Activations from the forward to the backward, at the highest moment."""
    temporary: int
    """What lives for a moment then: the widest products and their gradients, the head, a row's buffers."""
    slack: int
    """What the allocator holds and nobody uses, and what is not known."""
    context: int

    @property
    def allocated(self) -> int:
        """As `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.slack - self.context + int(_SLACK * (self.total - self.context - self.slack))

    @property
    def total(self) -> int:
        """Of the device, as other programs see it."""
        named = self.base + self.adapters + self.gradients + self.optimizer + self.kept + self.temporary
        return named + self.slack + self.context


def peak(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan) -> PeakMemory:
    """The highest moment of a run on a GPU with fused layers."""
    moments = list(_moments(survey, setting, plan))
    gradients, kept, temporary = max(moments, key=sum)
    if setting.rows > 1:
        gradients = 4 * survey.trainable
    masters = 0 if plan.optimizer_on_host else 4 * survey.trainable
    optimizer = 0 if plan.optimizer_on_host else int(setting.optimizer_bytes * survey.trainable)
    base = survey.base_bytes - (survey.embedding_bytes if plan.embeddings_on_host else 0)
    buffers = rounded(40 * setting.tokens) + 2 * rounded(setting.tokens * survey.rotary_dim * survey.element_bytes)
    temporary += buffers + _WORKSPACES
    if plan.both_ways:
        assert survey.shape is not None
        base += survey.layers * survey.shape.bytes_both_ways
    fixed = base + masters + survey.copies_bytes + optimizer
    slack = _HOLES + int(_SLACK * fixed + (_SLACK + _FRAGMENTS) * (gradients + kept + temporary))
    return PeakMemory(
        base=base,
        adapters=masters + survey.copies_bytes,
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
    """The highest moment where layers run as modules.

    Args:
        activations: of one row, with the gradients of the adapters.
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
    """(gradients, kept, temporary) along one row, wherever the sum may be highest."""
    assert survey.shape is not None
    stream = rounded(setting.tokens * survey.width * survey.element_bytes)
    layers = [_layer(survey, setting, level, plan.tile, plan.both_ways) for level in plan.levels]
    below, leaving = 0, [0, 0]  # of the two layers before, see `ops.host`
    for layer in layers:
        yield 0, below, layer.forward + stream + sum(leaving)
        below += layer.kept
        leaving = [leaving[1], layer.away]
    chunk = chunk_rows(setting.tokens, survey.vocabulary) * survey.vocabulary * survey.element_bytes
    yield 0, below, 4 * stream + sum(leaving) + rounded(chunk)
    yield 0, below, 6 * stream + sum(leaving)
    gradients = 0
    for index, layer in reversed(list(enumerate(layers))):
        below -= layer.kept
        coming = layers[index - 1].away if index else 0
        yield gradients, below + layer.kept, layer.backward - layer.kept + coming
        gradients += 4 * survey.layer_trainable
        yield gradients, below, 2 * stream


@functools.lru_cache(maxsize=256)
def _layer(survey: ModelSurvey, setting: RowSetting, level: Level, tile: int, both_ways: bool = False) -> Footprint:
    assert survey.shape is not None
    return footprint(replace(survey.shape, both_ways=both_ways), setting.tokens, level, tile, setting.documents)


def seconds(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan, device: DeviceSpec) -> float:
    """One optimizer step; 0 where the device's rates are not known. `setting.tokens` are taken as one document."""
    if device.flops == 0 or survey.shape is None:
        return 0.0
    shape, tokens, cost = survey.shape, setting.tokens, weight_format(survey.quantised).cost
    forward = 2.0 * tokens * survey.layer_elements
    attention = 2.0 * tokens * min(tokens, 4096) * shape.query / 2
    passes = tokens * survey.element_bytes * (14 * shape.width + 4 * shape.heads + 8 * shape.mlp)
    unpacking = cost.unpack * survey.layer_elements / device.bytes_per_second
    once = (2 * forward + 3.5 * 2 * attention) / device.flops + passes / device.bytes_per_second + 2 * unpacking
    if not plan.both_ways:
        once += cost.transpose * survey.layer_elements / device.bytes_per_second
    # Each further tile reads (and unpacks) the MLP's weights again: three forward, two recomputed, three backward.
    mlp = 8 * shape.mlp * shape.width * (survey.element_bytes + cost.unpack)
    tiling = (len(tiles(tokens, plan.tile)) - 1) * mlp / device.bytes_per_second
    total = crossing = 0.0
    for level in plan.levels:
        again = _again(survey, level)
        total += once + tokens * again / device.flops + 1.05 * unpacking * again / (2.0 * survey.layer_elements)
        if not level.keeps_gate_up:
            total += tiling
        if level >= Level.FULL:
            total += 2 * attention / device.flops
        crossing += _layer(survey, setting, level, plan.tile, plan.both_ways).away / (
            device.host_bytes_per_second or 1.0
        )
    # Copies hide behind the forward, a third of what a step computes once, as far as they fit there.
    total += max(0.0, crossing - 0.9 * survey.layers * once / 3) + 0.02 * crossing
    head = 4.0 * tokens * survey.width * survey.vocabulary / device.flops
    update = 30 * survey.trainable / device.bytes_per_second
    if plan.optimizer_on_host:
        update = (24 + 4 * setting.rows) * survey.trainable / device.host_bytes_per_second
    if plan.embeddings_on_host:
        head += tokens * survey.width * survey.element_bytes / device.host_bytes_per_second
    return setting.rows * (total + head) + update + 1e-3


def _again(survey: ModelSurvey, level: Level) -> float:
    """Multiplications and additions a token that a layer does once more."""
    shape = survey.shape
    assert shape is not None
    products = 0
    if not level.keeps_gate_up:
        products += 2 * shape.mlp * shape.width
    if not level.keeps_heads:
        products += shape.heads * shape.width
    if not level.keeps_attended:
        products += shape.query * shape.width
    return 2.0 * products


@dataclass(frozen=True)
class PlanChoice:
    """A plan, what it takes and how long."""

    plan: ActivationPlan
    bytes: PeakMemory
    seconds: float
    """Of a step; 0 if unknown."""


def host_bytes(survey: ModelSurvey, setting: RowSetting, plan: ActivationPlan) -> int:
    """What waits in the host's memory, pinned."""
    waiting = sum(_layer(survey, setting, level, plan.tile).away for level in plan.levels)
    embeddings = survey.embedding_bytes if plan.embeddings_on_host else 0
    return waiting + embeddings + (int((4 + setting.optimizer_bytes) * survey.trainable) * plan.optimizer_on_host)


def choose(
    survey: ModelSurvey, setting: RowSetting, device: DeviceSpec, limit: int, host_limit: int | None = None
) -> PlanChoice | None:
    """The fastest plan whose total is within `limit` bytes; None if even the most frugal is not.

    Args:
        host_limit: bytes of the host's memory that may be pinned; None for any number.
    """
    best: PlanChoice | None = None
    ways = (True, False) if weight_format(survey.quantised).holds_transposed else (False,)
    for embeddings, optimizer in ((False, False), (True, False), (True, True)):
        for family, both_ways in itertools.product(_families(survey.layers), ways):

            def plan_of(first: int, family: Family = family, both_ways: bool = both_ways) -> ActivationPlan:
                plan = replace(family(first), both_ways=both_ways)
                return replace(plan, embeddings_on_host=embeddings, optimizer_on_host=optimizer)  # noqa: B023

            def fits(first: int, plan_of: Callable[[int], ActivationPlan] = plan_of) -> bool:
                return peak(survey, setting, plan_of(first)).total <= limit

            # The fewer layers are frugal the faster, and the more memory it takes: the fewest that fit.
            first = bisect_left(range(survey.layers), True, key=fits)
            plan = plan_of(first)
            needed = peak(survey, setting, plan)
            if needed.total > limit:
                continue
            if host_limit is not None and host_bytes(survey, setting, plan) > host_limit:
                continue  # and so it is with more frugal layers, of which more waits on the host
            found = PlanChoice(plan, needed, seconds(survey, setting, plan, device) or _recomputed(survey, plan))
            if best is None or (found.seconds, needed.total) < (best.seconds, best.bytes.total):
                best = found
        if best is not None and not best.plan.levels[0].on_host:
            break
    return best


def largest(
    survey: ModelSurvey, device: DeviceSpec, limit: int, host_limit: int | None = None, step: int = 256
) -> tuple[int, PlanChoice] | None:
    """The longest document, a multiple of `step` tokens, that is estimated to fit into one row, and its plan.

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


def _recomputed(survey: ModelSurvey, plan: ActivationPlan) -> float:
    """A stand-in for time where rates are unknown: only the order matters."""
    return sum(_again(survey, level) + level.on_host for level in plan.levels) * (1 + 1e-3 * TILE / plan.tile)


def _families(layers: int) -> Iterator[Family]:
    """Ways to fill the frontier: a frugal level for the first so many layers, a more generous one for the rest.

    The host's link is idle for half of a step of staged layers, so some of these may send their heads as well.
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
