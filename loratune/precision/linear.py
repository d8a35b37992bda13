"""A linear layer whose weight is not a matrix of floating-point numbers, and the one way to ask any layer for its W.

`QuantisedLinear` stands where an `nn.Linear` stood (or transformers' Conv1D) and holds a `Frozen` in place of the
Parameter `weight`. It is no `nn.Linear`, so that code which would reach for that Parameter, and be wrong, does not
take it for one. What a layer multiplies with is asked for by `frozen_of`, dense or not.

Its state_dict is that of bitsandbytes' 4-bit layer (`precision.nf4_files`), or a plain `weight` once something
dense, such as a merged adapter, has taken the place of the codes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.ops.frozen import Dense, Frozen, frozen_linear
from loratune.precision import nf4, nf4_files
from loratune.precision.fp8 import Fp8Weight
from loratune.precision.nf4 import Nf4Weight


class Held:
    """Where a weight is held: one place for a layer and what stands in for it, so that no second copy lives on."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen
        self.stack: tuple[Nf4Weight | Fp8Weight, list[Frozen]] | None = None
        """All rows of a stack that this weight is the first of, and the weights that it consists of."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        """Weights are never written to, so a copy of a layer shares them."""
        return Held(self.frozen)


class QuantisedLinear(nn.Module):
    """x Wᵀ + b with a frozen W in whichever form `frozen` is."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    held: Held
    transposed_in_files: bool
    """True if checkpoints of the architecture hold a dense weight as (d_in, d_out): in the place of a Conv1D."""

    def __init__(self, frozen: Frozen, bias: nn.Parameter | None, transposed_in_files: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = frozen.shape
        self.held = Held(frozen)
        self.transposed_in_files = transposed_in_files
        self.register_parameter("bias", bias)

    @classmethod
    def in_place_of(cls, layer: nn.Module, frozen: Frozen) -> Self:
        """A layer with the bias and the mode of `layer`, an `nn.Linear` or Conv1D."""
        stand_in = cls(frozen, layer._parameters.get("bias"), isinstance(layer, Conv1D))
        return stand_in.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return frozen_linear(input, self.frozen, self.bias)

    @property
    def frozen(self) -> Frozen:
        """What the layer multiplies with."""
        return self.held.frozen

    @frozen.setter
    def frozen(self, frozen: Frozen) -> None:
        self.held.frozen = frozen

    @property
    def weight(self) -> Tensor:
        """W, made dense now: right, but slow, for code that reads a layer's weight instead of calling the layer."""
        return self.frozen.dense()

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and the form of the weight."""
        form = type(self.frozen).__name__
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the weight along with `to`, `cuda` and so on: its device, and the dtype of products, but no code."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wanted = fn(torch.empty(0, dtype=self.frozen.dtype, device=self.frozen.device))
        if (wanted.device, wanted.dtype) != (self.frozen.device, self.frozen.dtype):
            self.frozen = moved(self.frozen, wanted.device, wanted.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.frozen, Nf4Weight):
            for name, tensor in nf4_files.pack(self.frozen).items():
                destination[prefix + name] = tensor
        else:
            dense = self.frozen.dense()
            destination[prefix + "weight"] = dense.T.contiguous() if self.transposed_in_files else dense


def moved(frozen: Frozen, device: torch.device, dtype: torch.dtype) -> Frozen:
    """The same weight on a device and for products in a dtype."""
    if isinstance(frozen, Dense):
        return Dense(frozen.weight.to(device, dtype))
    to = cast(Callable[..., Frozen], frozen.to)  # type: ignore[attr-defined]
    return to(device=device, dtype=dtype)


def frozen_of(module: nn.Module) -> Frozen:
    """What a linear layer, a Conv1D or an embedding multiplies with, as (d_out, d_in)."""
    if isinstance(module, QuantisedLinear):
        return module.frozen
    weight = cast(Tensor, module.weight)
    return Dense(weight.T if isinstance(module, Conv1D) else weight)


def stackable(frozen: Frozen) -> bool:
    """Whether `stacked` can lay a weight beside others."""
    if isinstance(frozen, Fp8Weight):
        return True
    return isinstance(frozen, Nf4Weight) and frozen.shape[0] * frozen.shape[1] % frozen.block == 0


def stacked(members: Sequence[QuantisedLinear], ranks: int = 0) -> Frozen:
    """The weights of layers that read the same input as one; they are all `stackable`, and of one kind.

    Afterwards the members share its memory, so that nothing is held twice. `ranks`: those of their adapters, for
    which weights in 8 bits leave room.
    """
    weights = [member.frozen for member in members]
    before = members[0].held.stack
    same = before is not None and len(before[1]) == len(weights) and all(map(operator.is_, before[1], weights))
    if before is not None and same and (isinstance(before[0], Nf4Weight) or before[0].has_room(ranks)):
        return before[0]
    together: Nf4Weight | Fp8Weight
    if isinstance(weights[0], Fp8Weight):
        together = Fp8Weight.stacked(cast("list[Fp8Weight]", weights), ranks)
    elif len(weights) == 1:
        return weights[0]
    else:
        together = nf4.stack(cast("list[Nf4Weight]", weights))
    row = 0
    for member in members:
        member.frozen = together.rows(slice(row, row + member.out_features))
        row += member.out_features
    members[0].held.stack = together, [member.frozen for member in members]
    return together


def quantise_linears(
    module: nn.Module, form: Callable[[Tensor], Frozen] = nf4.quantise, skip: Collection[nn.Module] = ()
) -> None:
    """Replaces every `nn.Linear` and Conv1D below `module` by a `QuantisedLinear`, one after the other.

    Args:
        form: makes the frozen weight from a dense one, (d_out, d_in).
        skip: layers that stay as they are, such as a model's head.
    """
    for path, layer in list(module.named_modules()):
        if type(layer) in (nn.Linear, Conv1D) and not any(layer is kept for kept in skip):
            weight = cast(Tensor, layer.weight).detach()
            frozen = form(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
            module.set_submodule(path, QuantisedLinear.in_place_of(layer, frozen))


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """Every quantised layer with its path."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield path, module


def form_in_memory(model: PreTrainedModel) -> str:
    """In words for a person: "bfloat16", or "nf4 beside bfloat16" with quantised layers."""
    dtype = str(model.dtype).removeprefix("torch.")
    forms = {type(layer.frozen).__name__.removesuffix("Weight").lower() for _, layer in quantised_layers(model)}
    return f"{' and '.join(sorted(forms - {'dense'}))} beside {dtype}" if forms - {"dense"} else dtype


def mostly_dense(model: PreTrainedModel) -> str | None:
    """One line for a user whose quantised model is dense for the most part, else None."""
    total = count_parameters(model)
    quantised = sum(layer.in_features * layer.out_features for _, layer in quantised_layers(model))
    if not 0 < quantised < total / 2:
        return None
    return (
        f"{quantised / total:.0%} of the base's {total:,} parameters are quantised: linear layers are, embeddings "
        "and experts that are held in one tensor are not"
    )


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model's weights, those in 4 bits as well."""
    quantised = sum(layer.in_features * layer.out_features for _, layer in quantised_layers(model))
    return quantised + sum(parameter.numel() for parameter in model.parameters())


def dense_state_dict(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's state_dict as if no layer were quantised; made tensor by tensor, in CPU memory where made anew."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for path, layer in quantised_layers(model):
        for name in [name for name in tensors if name.startswith(f"{path}.weight")]:
            del tensors[name]
        dense = layer.frozen.dense().to("cpu", dtype)
        tensors[f"{path}.weight"] = dense.T.contiguous() if layer.transposed_in_files else dense
    return tensors
