"""Frozen linear layers that read the same input, stacked into one projection with their adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.fused import block
from loratune.lora.contract import BankSum, LowRankSum, fusion_of
from loratune.ops.bank.projection import BankProjection, Pool
from loratune.ops.frozen import Dense, Frozen
from loratune.ops.low_rank import AdapterSlices
from loratune.precision import fp8_projection
from loratune.precision.border import bordered, separate
from loratune.precision.fp8 import Fp8Weight
from loratune.precision.fp8_projection import Fp8Projection
from loratune.precision.linear import QuantisedLinear, stackable, stacked
from loratune.precision.projection import Projection


@dataclass
class Copies:
    """The working copies of every adapter in fused layers."""

    masters: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    """Factor of each copy: 1 for A, the scaling for B."""
    pool: Pool | None = None
    """Of the bank, if the layers hold one; it has working copies of its own, made when a row is set."""
    frozen: list[nn.Parameter] = field(default_factory=list)
    """The weights that lie in one matrix with the copies."""
    both_ways: bool = False
    """Whether weights in 8 bits are kept transposed as well."""
    carried: list[Fp8Projection] = field(default_factory=list)
    """Those that carry the copies in 8 bits, too."""
    _cast_all: Callable[[], None] | None = None
    _carry_all: Callable[[], None] | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the values that the masters have now: one launch on a GPU, and three more for a base in 8 bits."""
        if not self.masters:
            return
        self._cast()
        if self.carried:
            self._carry_all = self._carry_all or fp8_projection.refresher(self.carried)
            self._carry_all()

    def _cast(self) -> None:
        if self._cast_all is None and self.copies[0].is_cuda and self.copies[0].dtype != self.masters[0].dtype:
            from loratune.ops.layer_kernels import CastAll  # imports Triton

            self._cast_all = CastAll(self.masters, self.copies, self.scales)
        if self._cast_all is not None:
            self._cast_all()
            return
        torch._foreach_copy_(self.copies, self.masters)
        torch._foreach_mul_(self.copies, self.scales)

    def end(self) -> None:
        """Lets go of the copies, and gives the frozen weights memory of their own."""
        for held in (self.masters, self.copies, self.scales, self.carried):
            held.clear()
        self._cast_all = self._carry_all = None
        separate(self.frozen)
        self.frozen.clear()


def can_stack(module: object) -> bool:
    """True for a linear layer, in floating point or quantised, whose adapter may be fused."""
    if isinstance(fusion_of(module), str):
        return False
    if isinstance(module, QuantisedLinear):
        return stackable(module.frozen)
    return isinstance(module, nn.Linear) and module.weight.is_floating_point()


def dropout_of(module: nn.Module) -> float:
    """Dropout probability of the adapter in use."""
    fusion = fusion_of(module)
    return fusion.dropout if isinstance(fusion, LowRankSum) else 0.0


def adapter_of(member: nn.Module) -> LowRankSum | None:
    """The adapter in use at a layer that `can_stack`, if it is a single one."""
    fusion = fusion_of(member)
    return fusion if isinstance(fusion, LowRankSum) else None


def projection_of(members: Sequence[nn.Linear], copies: Copies) -> block.AnyProjection:
    """Stacks layers that read the same input; registers the working copies of their adapters in `copies`."""
    if any(map(_bank_sum, members)):
        return _bank_projection(members, copies)
    adapters = [adapter_of(member) for member in members]
    total = sum(adapter.r for adapter in adapters if adapter is not None)
    frozen, matrix = _frozen(members, total, copies)
    like: dict[str, Any] = {"dtype": frozen.dtype, "device": frozen.device}
    bias = _bias(members, frozen)
    if not total:
        return Projection(frozen, bias, None, None, (), (), ())
    d_out, d_in = frozen.shape
    if matrix is None:
        lora_A, lora_B = torch.zeros(total, d_in, **like), torch.zeros(d_out, total, **like)
    else:
        lora_A, lora_B = matrix[d_out : d_out + total, :d_in], matrix[:d_out, d_in : d_in + total]
    rows, ranks, scalings, salts = [], [], [], []
    row = rank = 0
    for member, adapter in zip(members, adapters, strict=True):
        at = slice(row, row + member.out_features)
        row = at.stop
        if adapter is None:
            continue
        columns = slice(rank, rank + adapter.r)
        rank = columns.stop
        rows.append(at)
        ranks.append(columns)
        scalings.append(adapter.scaling)
        salts.append(adapter.salt)
        copies.masters += [adapter.lora_A, adapter.lora_B]
        copies.copies += [lora_A[columns], lora_B[at, columns]]
        copies.scales += [1.0, adapter.scaling]
    dropout = max(map(dropout_of, members))
    rides = isinstance(frozen, Fp8Weight) and frozen.carries and (frozen.dtype.itemsize == 2 or not lora_A.is_cuda)
    if rides and not dropout:
        which = AdapterSlices(rows, ranks, scalings)
        copies.carried.append(
            Fp8Projection.around(cast(Fp8Weight, frozen), bias, (lora_A, lora_B), which, both_ways=copies.both_ways)
        )
        return copies.carried[-1]
    return Projection(
        frozen, bias, lora_A, lora_B, rows, ranks, scalings, bordered=matrix, dropout=dropout, salts=salts
    )


def _frozen(members: Sequence[nn.Linear], ranks: int, copies: Copies) -> tuple[Frozen, Tensor | None]:
    """The weights of all members, side by side, and the matrix with their border, if they are matrices."""
    if isinstance(cast(object, members[0]), QuantisedLinear):  # then all are: `_fusible` saw to it
        return stacked(cast(Sequence[QuantisedLinear], members), ranks), None
    weights = [cast(nn.Parameter, member.weight) for member in members]
    matrix = bordered(weights, ranks)
    copies.frozen += weights
    return Dense(matrix[: sum(w.shape[0] for w in weights), : weights[0].shape[1]]), matrix if ranks else None


def _bias(members: Sequence[nn.Linear], frozen: Frozen) -> Tensor | None:
    if all(member.bias is None for member in members):
        return None
    like: dict[str, Any] = {"dtype": frozen.dtype, "device": frozen.device}
    return torch.cat([torch.zeros(m.out_features, **like) if m.bias is None else m.bias.detach() for m in members])


def _bank_sum(member: nn.Module) -> BankSum | None:
    fusion = fusion_of(member)
    return fusion if isinstance(fusion, BankSum) else None


def holds_bank(model: nn.Module) -> bool:
    """True if rows of this model hold several adapters' documents."""
    return any(_bank_sum(module) is not None for module in model.modules())


def _bank_projection(members: Sequence[nn.Linear], copies: Copies) -> BankProjection:
    """The same for layers of a bank; it has no border, since each token has low-rank columns of its own."""
    frozen, _ = _frozen(members, 0, copies)
    lanes, rows, row = [], [], 0
    for member in members:
        found = _bank_sum(member)
        if found is not None:
            lanes.append(found.lane)
            rows.append(slice(row, row + member.out_features))
            copies.pool = found.pool
        row += member.out_features
    assert copies.pool is not None
    return BankProjection(frozen, _bias(members, frozen), copies.pool, lanes, rows)


def masters_of(members: Sequence[nn.Linear]) -> list[Tensor]:
    """What receives the gradients that the projection of these members returns."""
    pools = [found.pool for found in map(_bank_sum, members) if found is not None]
    if pools:
        return [pools[0].entry]
    adapters = [adapter for adapter in map(adapter_of, members) if adapter is not None]
    return [tensor for adapter in adapters for tensor in (adapter.lora_A, adapter.lora_B)]
