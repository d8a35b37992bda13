"""Linear layers that read the same input, stacked into one projection with their adapters.

A layer declares its adapter (`lora.contract`), and its weight declares its precision (`precision.contract`). This
module uses both: it stacks the weights, orders the adapters, and updates their working copies.

A layer such as `qkv_proj` or `gate_up_proj` holds several projections of the model. It is one member, and its output
has the columns of all of them. The columns of the output follow the order of the members. A dense weight may be
stored transposed, as in transformers' Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from loratune.lora.contract import BankSum, LowRankSum, fusion_of
from loratune.ops.bank.pool import BankPool
from loratune.ops.bank.projection import BankProjection, linked
from loratune.ops.frozen import FrozenWeight
from loratune.ops.projection import Activation, LinkedActivation, PaddedActivation, Projection, StackedAdapters
from loratune.ops.state import ForwardState
from loratune.precision import linear
from loratune.precision.contract import format_of


@dataclass
class Copies:
    """Working copies of the adapters of fused layers, in the compute dtype, and the stacked frozen weights."""

    masters: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    """Factor of each copy: 1 for A, the scaling for B."""
    pool: BankPool | None = None
    """Weights of the bank, if the layers hold one. Its working copies are updated when a row is set."""
    state: ForwardState = field(default_factory=ForwardState)
    """State of the forward that runs the layers."""
    hold_transposed: bool = False
    """True to hold transposed copies of the weights, in precisions that support it."""
    stacked: list[nn.Module] = field(default_factory=list)
    """Layers whose weights are stacked."""
    refreshed: list[Projection] = field(default_factory=list)
    """Projections that derive tensors from the copies."""
    _cast_all: Callable[[], None] | None = None
    _refresh_all: Callable[[], None] | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the masters' values: one launch on a GPU, and the launches of `WeightFormat.refresher`."""
        if not self.masters:
            return
        self._cast()
        if self.refreshed:
            self._refresh_all = self._refresh_all or format_of(self.refreshed[0].frozen).refresher(self.refreshed)
            self._refresh_all()

    def _cast(self) -> None:
        if self._cast_all is None and self.copies[0].is_cuda and self.copies[0].dtype != self.masters[0].dtype:
            from loratune.ops.cast_kernels import CastAll  # imports Triton

            self._cast_all = CastAll(self.masters, self.copies, self.scales)
        if self._cast_all is not None:
            self._cast_all()
            return
        torch._foreach_copy_(self.copies, self.masters)
        torch._foreach_mul_(self.copies, self.scales)

    def end(self) -> None:
        """Frees the copies and gives the stacked Parameters memory of their own."""
        self.masters.clear()
        self.copies.clear()
        self.scales.clear()
        self.refreshed.clear()
        self._cast_all = self._refresh_all = None
        linear.release(self.stacked)
        self.stacked.clear()


def can_stack(module: object) -> bool:
    """True for a linear layer of any precision that can be stacked, whose adapter may be fused."""
    return isinstance(module, nn.Module) and not isinstance(fusion_of(module), str) and linear.can_stack(module)


def of_one_form(layers: Sequence[nn.Module]) -> bool:
    """True if these layers, each of which `can_stack`, may be stacked together."""
    return len({linear.form_of_layer(layer) for layer in layers}) == 1


def dropout_of(module: nn.Module) -> float:
    """Dropout probability of the adapter in use."""
    adapter = adapter_of(module)
    return 0.0 if adapter is None else adapter.dropout


def adapter_of(member: nn.Module) -> LowRankSum | None:
    """The active adapter of a layer that `can_stack`; None if it has none or several."""
    fusion = fusion_of(member)
    return fusion if isinstance(fusion, LowRankSum) else None


def holds_bank(model: nn.Module) -> bool:
    """True if the model's layers belong to a bank."""
    return any(_bank_sum(module) is not None for module in model.modules())


def projection_of(members: Sequence[nn.Module], copies: Copies) -> Projection:
    """Stacks layers that read the same input and registers the working copies of their adapters in `copies`."""
    if any(map(_bank_sum, members)):
        return _bank_projection(members, copies)
    adapters = [adapter_of(member) for member in members]
    weight = _stack(members, copies, sum(adapter.r for adapter in adapters if adapter is not None))
    layout = _layout(members, adapters)
    made = format_of(weight).project(
        weight, _bias(members, weight), layout, state=copies.state, hold_transposed=copies.hold_transposed
    )
    if made.refreshed:
        copies.refreshed.append(made.projection)
    if made.lora_A is None or made.lora_B is None:
        return made.projection
    held = [adapter for adapter in adapters if adapter is not None]
    for adapter, rows, ranks in zip(held, layout.rows, layout.ranks, strict=True):
        copies.masters += [adapter.lora_A, adapter.lora_B]
        copies.copies += [made.lora_A[ranks], made.lora_B[rows, ranks]]
        copies.scales += [1.0, adapter.scaling]
    return made.projection


def mlp_of(
    first: Sequence[nn.Module], activation: Activation, second: Sequence[nn.Module], copies: Copies
) -> tuple[Projection, LinkedActivation, Projection]:
    """Both projections of an MLP and the activation between them."""
    if any(map(_bank_sum, first)) and any(map(_bank_sum, second)):
        behind = _bank_projection(second, copies)
        return linked(_bank_projection(first, copies), activation, behind)
    down = projection_of(second, copies)
    up = projection_of(first, copies)
    return up, PaddedActivation(activation, up, down), down


def masters_of(members: Sequence[nn.Module]) -> list[Tensor]:
    """Tensors that receive the gradients of the members' projection, in the order of its gradients."""
    pools = [found.pool for found in map(_bank_sum, members) if found is not None]
    if pools:
        return [pools[0].entry]
    adapters = [adapter for adapter in map(adapter_of, members) if adapter is not None]
    return [tensor for adapter in adapters for tensor in (adapter.lora_A, adapter.lora_B)]


def _stack(members: Sequence[nn.Module], copies: Copies, ranks: int) -> FrozenWeight:
    copies.stacked += members
    return linear.stack(members, ranks)


def _layout(members: Sequence[nn.Module], adapters: Sequence[LowRankSum | None]) -> StackedAdapters:
    """Rows and ranks of the members that have an adapter."""
    rows: list[slice] = []
    ranks: list[slice] = []
    row = rank = 0
    for member, adapter in zip(members, adapters, strict=True):
        end = row + linear.frozen_of(member).shape[0]
        if adapter is not None:
            rows.append(slice(row, end))
            ranks.append(slice(rank, rank + adapter.r))
            rank += adapter.r
        row = end
    held = [adapter for adapter in adapters if adapter is not None]
    return StackedAdapters(
        rows,
        ranks,
        [adapter.scaling for adapter in held],
        max((adapter.dropout for adapter in held), default=0.0),
        [adapter.salt for adapter in held],
    )


def _bias(members: Sequence[nn.Module], weight: FrozenWeight) -> Tensor | None:
    """(D,), zero for members without a bias; None if no member has one."""
    biases = [cast(Tensor | None, member.bias) for member in members]
    if all(bias is None for bias in biases):
        return None
    parts = []
    for member, bias in zip(members, biases, strict=True):
        count = linear.frozen_of(member).shape[0]
        zeros = torch.zeros(count, dtype=weight.dtype, device=weight.device)
        parts.append(zeros if bias is None else bias.detach())
    return torch.cat(parts)


def _bank_sum(member: nn.Module) -> BankSum | None:
    fusion = fusion_of(member)
    return fusion if isinstance(fusion, BankSum) else None


def _bank_projection(members: Sequence[nn.Module], copies: Copies) -> BankProjection:
    """`projection_of` for layers of a bank, without adapter columns: each token has low-rank columns of its own."""
    weight = _stack(members, copies, 0)
    layers, rows, row = [], [], 0
    for member in members:
        end = row + linear.frozen_of(member).shape[0]
        found = _bank_sum(member)
        if found is not None:
            layers.append(found.layer)
            rows.append(slice(row, end))
            copies.pool = found.pool
        row = end
    assert copies.pool is not None
    return BankProjection(weight, _bias(members, weight), copies.pool, layers, rows, state=copies.state)
