"""Whether a run fits, found out before its data are rendered: a plan is chosen, and one step of full size tried.

Every row has the same shape, so a row of arbitrary tokens needs what every row will need. The dry step runs forward
and backward with the optimizer's state put in as ballast, and changes nothing: neither the adapter nor the state of
a random generator. If the device is too small, that is an error after seconds, with what is missing and what to set,
and not one after hours. Where layers are not fused their memory is not arithmetic (`training.budget`), and `auto`
tries the policies themselves, from fast to frugal.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.base.recompute import decoder_layers
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.errors import TrainingError
from loratune.ops.policy import TILE, Level, Plan
from loratune.training import budget, devices
from loratune.training.budget import Bytes, Setting
from loratune.training.devices import Device
from loratune.training.objectives import sft
from loratune.training.optim import STATE_BYTES, masters_on_host
from loratune.training.step import _row_objective
from loratune.training.survey import Survey, ranks_of, survey
from loratune.units import bytes_of, size

LEVELS = {level.name.lower(): level for level in (Level.NONE, Level.SELECTIVE, Level.FULL, Level.OFFLOAD)}
_CLOSER = (1.0, 0.95, 0.9)
"""Shares of the limit to plan for, one after the other, should a dry step not fit after all."""


@dataclass(frozen=True)
class Fit:
    """What layers keep, and what that takes."""

    plan: Plan
    expected: Bytes | None
    """By arithmetic, where layers run fused on a GPU."""
    limit: int
    """Bytes that the run may take on the device; 0 on a CPU."""
    tried: int
    """Most that was allocated during the dry step; 0 on a CPU, which has none."""


def fit(forward: PackedForward, parameters: Mapping[str, nn.Parameter], config: TrainConfig, tokens: int) -> Fit:
    """Chooses what layers keep, tries it, and leaves `forward.plan` at it.

    Args:
        parameters: what trains.
        tokens: of a row.

    Raises: TrainingError: the device is too small for every policy that the settings allow.
    """
    layers = len(decoder_layers(forward.model))
    device = forward.model.device
    if device.type != "cuda":
        forward.plan = Plan.uniform(LEVELS.get(config.activations, Level.NONE), layers)
        return Fit(forward.plan, None, 0, 0)
    limit = _limit(config, device)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    setting = Setting(tokens, config.gradient_accumulation_steps, STATE_BYTES[config.optim])
    what = _survey(forward, trainable)
    for plan in _plans(what, setting, config, device, limit, layers):
        forward.plan = plan
        if plan.optimizer_on_host:
            masters_on_host(parameters.values())
        ballast = 0 if plan.optimizer_on_host else int(setting.optimizer_bytes * trainable)
        tried = _dry_step(forward, parameters, tokens, ballast)
        if tried is not None:
            expected = None if what.shape is None else budget.peak(what, setting, plan)
            return Fit(plan, expected, limit, tried)
    raise TrainingError(too_small(what, setting, config, devices.present(device), limit))


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


def _survey(forward: PackedForward, trainable: int) -> Survey:
    model = forward.model
    ranks = ranks_of(model)
    found = survey(model, ranks, trainable, "auto", model.dtype, on_gpu=forward.fused is not None, dropout=0.0)
    return found


def _plans(
    what: Survey, setting: Setting, config: TrainConfig, device: torch.device, limit: int, layers: int
) -> Iterator[Plan]:
    """What to try, the fastest first."""
    if config.activations != "auto":
        level = LEVELS[config.activations]
        yield from (Plan.uniform(level, layers, tile) for tile in ((TILE, 1024) if level else (TILE,)))
    elif what.shape is None:
        yield from (Plan.uniform(level, layers) for level in LEVELS.values())
    else:
        at_hand = devices.present(device)
        for share in _CLOSER:
            choice = budget.choose(what, setting, at_hand, int(share * limit))
            if choice is not None:
                yield choice.plan
        yield Plan((Level.OFFLOAD,) * layers, 1024, embeddings_on_host=True, optimizer_on_host=True)


def _dry_step(
    forward: PackedForward, parameters: Mapping[str, nn.Parameter], tokens: int, ballast_bytes: int
) -> int | None:
    """Runs one row forward and backward; most bytes allocated, or None if there were not enough."""
    device = forward.model.device
    _clear(parameters)
    torch.cuda.reset_peak_memory_stats(device)
    ballast: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices=[device]), _dropping(forward.model), forward.installed():
            ballast.append(torch.empty(ballast_bytes, dtype=torch.uint8, device=device))
            row = _any_row(tokens)
            loss = _row_objective(forward, row, sft)
            loss.backward()
            del loss
            return torch.cuda.max_memory_allocated(device)
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
    """Dropout of the adapter as in training, since its masks take memory too."""
    modules = [m for m in model.modules() if getattr(m, "lora_dropout", 0.0) > 0.0 and not m.training]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def _any_row(tokens: int) -> Row:
    """Two documents, most of whose tokens are trained: what takes the most memory of all rows of this length."""
    first = max(1, tokens // 3)
    weights = torch.ones(tokens)
    weights[: tokens // 16] = 0.0
    weights[-1] = 0.0
    positions = torch.cat([torch.arange(first), torch.arange(tokens - first)])
    ids = torch.zeros(tokens, dtype=torch.int64)
    borders = torch.tensor([0, first, tokens], dtype=torch.int32)
    return Row(tokens=ids, position_ids=positions, cu_seqlens=borders, targets=ids, weights=weights)


def too_small(what: Survey, setting: Setting, config: TrainConfig, device: Device, limit: int) -> str:
    """The message for a run that does not fit into `limit` bytes: by how much, and what to set."""
    shorter = f"--tokens-per-row {max(2, setting.tokens // 2)} --gradient-accumulation-steps {2 * setting.rows}"
    if what.shape is None:
        return f"out of GPU memory: {size(limit)} are free and a row of {setting.tokens} does not fit; try {shorter}"
    plan = Plan((Level.OFFLOAD,) * what.layers, 1024, embeddings_on_host=True, optimizer_on_host=True)
    if config.activations != "auto":
        plan = Plan.uniform(LEVELS[config.activations], what.layers)
    needed = budget.peak(what, setting, plan).total
    fixes = [] if config.activations in ("auto", "offload") else ["--activations auto"]
    for factor in (2, 4, 8):
        tokens = setting.tokens // factor
        less = Setting(tokens, setting.rows * factor, setting.optimizer_bytes)
        if tokens and budget.choose(what, less, device, limit) is not None:
            fixes.append(f"--tokens-per-row {tokens} --gradient-accumulation-steps {less.rows}")
            break
    if not what.quantised:
        fixes.append("--precision nf4")
    if not fixes:
        fixes.append("a larger device, or a smaller model")
    return (
        f"out of GPU memory: a row of {setting.tokens} tokens takes {size(needed)}, of which {size(what.base_bytes)} "
        f"are the base model, and {size(limit)} may be taken: {size(max(0, needed - limit))} are missing. "
        f"Set {' or '.join(fixes)}"
    )
