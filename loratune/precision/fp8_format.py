"""The precision "fp8": 8-bit weights of `precision.fp8`, multiplied in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from loratune.ops.frozen import FrozenWeight
from loratune.ops.projection import Projection, StackedAdapters
from loratune.ops.state import ForwardState
from loratune.precision import fp8, fp8_files, fp8_projection
from loratune.precision.contract import CheckpointReader, ProductCost, StackedProjection, UnreadWeight, WeightFormat
from loratune.precision.fp8 import Fp8Weight
from loratune.precision.fp8_projection import Fp8Projection
from loratune.precision.tensors import StoredTensor


class Fp8Format(WeightFormat):
    """8-bit floating point: products run in 8 bits on GPUs of compute capability 8.9 and newer."""

    name = "fp8"
    label = "8 bits (FP8)"
    forward_tolerance = 0.3
    """A difference in the last bit rounds some later elements to the other neighbouring value, an eighth away. After
    a few layers the rounding errors of two runs are independent."""
    cost = ProductCost(transpose=2.0)
    holds_transposed = True

    def why_unsupported(self, device: torch.device) -> str | None:
        """Reason and suggestion for GPUs without products in 8 bits."""
        if fp8.supported(device):
            return None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{name} cannot multiply 8-bit numbers, which needs compute capability 8.9; try nf4"

    def quantise(self, weight: Tensor) -> FrozenWeight:
        """One scale for each row; dense if a dimension is no multiple of 16."""
        return fp8.quantise(weight)

    def bytes_held(self, shape: Sequence[int], itemsize: int) -> float:
        """A byte for each element and a float32 scale for each row."""
        return float(shape[0] * shape[1] + 4 * shape[0])

    def join(self, weights: Sequence[FrozenWeight], ranks: int) -> FrozenWeight:
        """One matrix of bytes, with adapter columns if they pay for that many ranks."""
        return Fp8Weight.joined(cast("Sequence[Fp8Weight]", weights), ranks)

    def rows(self, joined: FrozenWeight, rows: slice) -> FrozenWeight | None:
        """A member in the memory of the stack."""
        return cast(Fp8Weight, joined).rows(rows)

    def has_adapter_columns(self, joined: FrozenWeight, ranks: int) -> bool:
        """True if the stack has enough adapter columns for `ranks`, or if so many would not pay."""
        return cast(Fp8Weight, joined).has_adapter_columns(ranks)

    def project(
        self,
        weight: FrozenWeight,
        bias: Tensor | None,
        adapters: StackedAdapters,
        *,
        state: ForwardState | None = None,
        hold_transposed: bool = False,
    ) -> StackedProjection:
        """A projection in 8 bits if the weight has adapter columns and no adapter has dropout."""
        found = cast(Fp8Weight, weight)
        products = found.dtype.itemsize == 2 or found.device.type != "cuda"
        if not adapters.total or found.augmented is None or adapters.dropout or not products:
            return super().project(weight, bias, adapters, state=state)
        copies = self.working_copies(weight, adapters.total)
        projection = Fp8Projection.of(
            found, bias, copies, adapters, state=state or ForwardState(), hold_transposed=hold_transposed
        )
        return StackedProjection(projection, *copies, refreshed=True)

    def refresher(self, projections: Sequence[Projection]) -> Callable[[], None]:
        """A function that updates factors and adapter columns, on a GPU in a few launches for all projections."""
        return fp8_projection.refresher(cast("Sequence[Fp8Projection]", projections))

    def reader(self, quantization_config: Mapping[str, Any]) -> CheckpointReader | None:
        """Reader of the checkpoints that `precision.fp8_files` describes; None for others."""
        scheme = fp8_files.Scheme.of(quantization_config)
        return None if scheme is None else Fp8Reader(scheme)


@dataclass(frozen=True)
class Fp8Reader:
    """Reads checkpoints in 8 bits. Weights stay in 8 bits if `--precision` is fp8 and each row has one scale."""

    scheme: fp8_files.Scheme
    keeps_precision: bool = False

    def entries(
        self, stored: Mapping[str, StoredTensor], dtype: torch.dtype, wanted: bool
    ) -> dict[str, UnreadWeight]:
        """All tensors by name, weight and scale as one entry."""
        return dict(fp8_files.entries(stored, self.scheme, take_over=wanted))
