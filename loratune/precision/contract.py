"""Contract of a precision: everything the package knows about the form of a frozen weight.

    FrozenWeight   (ops.frozen) one weight: both products, dense values, bytes, transfer
    WeightFormat   one precision: quantising, stacking, projections, checkpoints, devices, cost

Code outside `precision` asks these two and never tests a class or a name. The table is `loratune.tables.PRECISIONS`.

Access to a weight belongs to its `FrozenWeight`. Layers, fused layers and banks call `forward` and `d_input`, and
nobody else reads the tensor. A weight that is sharded over ranks is therefore one more `FrozenWeight`: it holds a
shard, gathers W when `forward` or `d_input` begins, and frees it after the product. Stacks keep that property, since
`join` returns a `FrozenWeight` too.

A new precision is one file, with a weight and a `WeightFormat`, and one line in the table. The base class has a
default for everything except `quantise` and `bytes_held`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from loratune.ops.frozen import FrozenWeight
from loratune.ops.projection import Projection, StackedAdapters
from loratune.ops.state import ForwardState
from loratune.precision.concatenated import Concatenated
from loratune.precision.projection import AugmentedWeight, LowRankProjection
from loratune.precision.tensors import StoredTensor
from loratune.tables import PRECISIONS, load_entry

_DENSE = "loratune.precision.dense:DenseFormat"


@dataclass(frozen=True)
class ProductCost:
    """Memory traffic of a product in addition to its operands, in bytes for each element of the weight."""

    unpack: float = 0.0
    """Traffic of a dense copy, made in the forward and again in the backward."""
    transpose: float = 0.0
    """Traffic of a transposed copy, made in the backward unless one is held."""


@dataclass(frozen=True)
class StackedProjection:
    """A projection and the working copies of its adapters, which the owner fills from the masters."""

    projection: Projection
    lora_A: Tensor | None = None
    """(R, d_in), compute dtype; None without an adapter."""
    lora_B: Tensor | None = None
    """(D, R), compute dtype, scaling multiplied in; zero outside of each member's rows."""
    refreshed: bool = False
    """True if the projection derives tensors from the copies, which `WeightFormat.refresher` updates."""


class UnreadWeight(Protocol):
    """A tensor or a whole weight in a checkpoint, read when transformers' loader asks with `entry[...]`."""

    def __getitem__(self, everything: object) -> Any:
        """A Tensor, a `FrozenWeight`, or an object whose `to(device, dtype)` gives a Tensor."""


class CheckpointReader(Protocol):
    """Reads checkpoints whose weights are quantised already."""

    @property
    def keeps_precision(self) -> bool:
        """True if the weights stay in this precision under any `--precision`; False if others make them dense."""

    def entries(
        self, stored: Mapping[str, StoredTensor], dtype: torch.dtype, wanted: bool
    ) -> dict[str, UnreadWeight]:
        """Tensors of a checkpoint by name, all parts of a quantised weight as one entry.

        Args:
            dtype: compute dtype.
            wanted: the model is loaded in this precision.
        Raises: ModelError: a part is missing.
        """


class WeightFormat:
    """One precision. Methods that take weights are given weights of this precision only."""

    name: ClassVar[str]
    """Value of `--precision`."""
    label: ClassVar[str]
    """Name in messages, such as "4 bits (NF4)"."""
    forward_tolerance: ClassVar[float | None] = None
    """Relative error allowed between two ways to compute one row; None for the error of the compute dtype."""
    cost: ClassVar[ProductCost] = ProductCost()
    holds_transposed: ClassVar[bool] = False
    """True if `project` can hold a transposed copy of W, which makes the backward faster."""

    # One weight

    def quantise(self, weight: Tensor) -> FrozenWeight:
        """The frozen form of a dense weight, (d_out, d_in); a `DenseWeight` if the precision excludes its shape."""
        raise NotImplementedError

    def bytes_held(self, shape: Sequence[int], itemsize: int) -> float:
        """Bytes of a quantised weight of that shape. `itemsize`: bytes of a number in the compute dtype."""
        raise NotImplementedError

    def why_unsupported(self, device: torch.device) -> str | None:
        """Reason why products cannot run on a device, with a suggestion; None if they can."""
        return None

    # Stacked weights

    def can_stack(self, weight: FrozenWeight) -> bool:
        """True if the weight can be joined with others that read the same input."""
        return True

    def join(self, weights: Sequence[FrozenWeight], ranks: int) -> FrozenWeight:
        """One weight with the rows of all, and with adapter columns for `ranks` if the precision reserves them."""
        return Concatenated(tuple(weights)) if len(weights) > 1 else weights[0]

    def rows(self, joined: FrozenWeight, rows: slice) -> FrozenWeight | None:
        """One member of a joined weight, in the same memory; None if the member keeps its own memory."""
        return None

    def has_adapter_columns(self, joined: FrozenWeight, ranks: int) -> bool:
        """True if the weight has at least as many adapter columns as `join` would reserve for `ranks`."""
        return True

    def augment(self, weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor) -> AugmentedWeight | None:
        """The augmented weight [W B; A 0] over the working copies; None if low-rank parts are added separately."""
        return None

    def working_copies(self, weight: FrozenWeight, ranks: int) -> tuple[Tensor, Tensor]:
        """New working copies with value zero: A, (R, d_in), and B, (D, R)."""
        (d_out, d_in), dtype, device = weight.shape, weight.dtype, weight.device
        A = torch.zeros(ranks, d_in, dtype=dtype, device=device)
        return A, torch.zeros(d_out, ranks, dtype=dtype, device=device)

    def project(
        self,
        weight: FrozenWeight,
        bias: Tensor | None,
        adapters: StackedAdapters,
        *,
        state: ForwardState | None = None,
        hold_transposed: bool = False,
    ) -> StackedProjection:
        """The projection of a joined weight with its adapters.

        Args:
            bias: (D,) or None.
            state: state of the forward that runs the projection; None makes one.
            hold_transposed: hold a transposed copy of W as well; ignored unless `holds_transposed`.
        """
        state = state or ForwardState()
        if not adapters.total:
            return StackedProjection(LowRankProjection(weight, bias, state=state))
        lora_A, lora_B = self.working_copies(weight, adapters.total)
        augmented = self.augment(weight, lora_A, lora_B)
        made = LowRankProjection(weight, bias, lora_A, lora_B, adapters, augmented, state=state)
        return StackedProjection(made, lora_A, lora_B)

    def refresher(self, projections: Sequence[Projection]) -> Callable[[], None]:
        """A function that updates everything the projections derive from the working copies."""
        return lambda: None

    # Checkpoints

    def pack(self, weight: FrozenWeight) -> dict[str, Tensor] | None:
        """Entries of a state_dict, by name below the layer's path; None: the weight is saved dense."""
        return None

    def quantization_config(self, weights: Sequence[FrozenWeight], dtype: torch.dtype) -> dict[str, Any] | None:
        """The `quantization_config` of a config.json beside packed weights; None if `pack` gives none."""
        return None

    def reader(self, quantization_config: Mapping[str, Any]) -> CheckpointReader | None:
        """Reader of checkpoints with this `quantization_config`; None if it describes another precision."""
        return None


def weight_format(precision: str) -> WeightFormat:
    """The format of a value of `--precision`. Values that quantise nothing give the format of floating point."""
    found: WeightFormat = load_entry(PRECISIONS.get(precision, _DENSE))()
    return found


def format_of(weight: FrozenWeight) -> WeightFormat:
    """The format of a weight."""
    return weight_format(weight.precision)


def smallest_format() -> WeightFormat:
    """The format with the fewest bytes per weight, for messages about too little memory."""
    return min(quantised_formats(), key=lambda form: form.bytes_held((4096, 4096), 2))


def quantised_formats() -> list[WeightFormat]:
    """All formats of the table except floating point."""
    return [weight_format(name) for name in PRECISIONS]
