"""A linear layer over a `FrozenWeight`, and the functions through which all other code reads a layer's weight.

`QuantisedLinear` replaces an `nn.Linear` or transformers' Conv1D and holds a `FrozenWeight` instead of the Parameter
`weight`. It is no subclass of `nn.Linear`, so code that expects that Parameter does not mistake it for one.
`frozen_of` gives the weight of any layer, dense or not. `stack` joins the weights of layers that read the same input.

Its state_dict holds the tensors of the precision (`WeightFormat.pack`), or a dense `weight` where the precision has
no such tensors or a merged adapter has replaced the codes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.ops.frozen import DenseWeight, FrozenWeight, frozen_linear
from loratune.precision import experts, nf4
from loratune.precision.contract import WeightFormat, format_of
from loratune.precision.dense import FrozenParameter, separate, stack_parameters
from loratune.precision.experts import ExpertForm, HeldExperts, QuantisedExperts


class WeightSlot:
    """The place of a layer's weight, shared with the layer that replaces it, so that no second copy stays alive."""

    def __init__(self, frozen: FrozenWeight) -> None:
        self.frozen = frozen
        self.stack: tuple[FrozenWeight, list[FrozenWeight]] | None = None
        """A stack that begins with this weight, and the weights of its members."""

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightSlot:
        """Copies of a layer share the weight, which is never written to."""
        return WeightSlot(self.frozen)


class QuantisedLinear(nn.Module):
    """x Wᵀ + b with a frozen W of any precision."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    weight_slot: WeightSlot
    transposed_in_files: bool
    """True if the architecture's checkpoints hold a dense weight as (d_in, d_out): it replaces a Conv1D."""

    def __init__(self, frozen: FrozenWeight, bias: nn.Parameter | None, transposed_in_files: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = frozen.shape
        self.weight_slot = WeightSlot(frozen)
        self.transposed_in_files = transposed_in_files
        self.register_parameter("bias", bias)

    @classmethod
    def in_place_of(cls, layer: nn.Module, frozen: FrozenWeight) -> Self:
        """A layer with the bias and mode of `layer`, an `nn.Linear` or Conv1D."""
        replacement = cls(frozen, layer._parameters.get("bias"), isinstance(layer, Conv1D))
        return replacement.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return frozen_linear(input, self.frozen, self.bias)

    @property
    def frozen(self) -> FrozenWeight:
        """The layer's weight."""
        return self.weight_slot.frozen

    @frozen.setter
    def frozen(self, frozen: FrozenWeight) -> None:
        self.weight_slot.frozen = frozen

    @property
    def weight(self) -> Tensor:
        """W, made dense now: right but slow, for code that reads a layer's weight instead of calling the layer."""
        return self.frozen.dense()

    def extra_repr(self) -> str:
        """Text of `nn.Linear`, and the class of the weight."""
        form = type(self.frozen).__name__
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `cuda` and so on: moves the weight and sets its compute dtype; codes keep their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wanted = fn(torch.empty(0, dtype=self.frozen.dtype, device=self.frozen.device))
        if (wanted.device, wanted.dtype) != (self.frozen.device, self.frozen.dtype):
            self.frozen = self.frozen.to(wanted.device, wanted.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = format_of(self.frozen).pack(self.frozen)
        if packed is None:
            dense = self.frozen.dense()
            packed = {"weight": dense.T.contiguous() if self.transposed_in_files else dense}
        for name, tensor in packed.items():
            destination[prefix + name] = tensor


def frozen_of(module: nn.Module) -> FrozenWeight:
    """The weight of a layer as (d_out, d_in): a linear layer, an embedding, a convolution, a packed attention. Of
    experts, their last projection."""
    if isinstance(module, QuantisedLinear):
        return module.frozen
    if isinstance(module, nn.MultiheadAttention):
        return DenseWeight(cast(Tensor, module._parameters["in_proj_weight"]))
    if isinstance(form := experts.form_of(module), ExpertForm):
        return experts.projection(module, form, form.down).frozen
    own = module._parameters.get("weight")
    weight = cast(Tensor, module.weight) if own is None else own
    return DenseWeight(weight.T if isinstance(module, Conv1D) else weight.flatten(1))


def can_stack(layer: nn.Module) -> bool:
    """True if `stack` accepts the layer, together with others of the same precision."""
    if isinstance(layer, QuantisedLinear):
        return format_of(layer.frozen).can_stack(layer.frozen)
    weight = layer._parameters.get("weight")
    return isinstance(layer, nn.Linear | Conv1D) and weight is not None and weight.is_floating_point()


def form_of_layer(layer: nn.Module) -> tuple[str, bool]:
    """Form of a layer: its precision, and whether W is a Parameter. Only layers of one form are stacked together."""
    return frozen_of(layer).precision, not isinstance(layer, QuantisedLinear)


def stack(layers: Sequence[nn.Module], ranks: int = 0) -> FrozenWeight:
    """The weights of layers that read the same input, as one. All are `can_stack`, of one form.

    Afterwards the layers share the memory of the stack, so that nothing is held twice. `release` gives Parameters
    memory of their own again; quantised weights keep the stack, and a second call finds it.

    Args:
        ranks: sum of their adapters' ranks, for precisions that reserve adapter columns.
    """
    if not isinstance(layers[0], QuantisedLinear):
        return stack_parameters([_parameter(layer) for layer in layers], ranks)
    members = cast("Sequence[QuantisedLinear]", layers)
    weights = [member.frozen for member in members]
    form, before = format_of(weights[0]), members[0].weight_slot.stack
    if before is not None and _same(before[1], weights) and form.has_adapter_columns(before[0], ranks):
        return before[0]
    joined = form.join(weights, ranks)
    if joined is weights[0]:
        return joined
    row = 0
    for member in members:
        rows = slice(row, row + member.out_features)
        member.frozen = form.rows(joined, rows) or member.frozen
        row = rows.stop
    members[0].weight_slot.stack = joined, [member.frozen for member in members]
    return joined


def release(layers: Sequence[nn.Module]) -> None:
    """Ends the stack of these layers: Parameters get memory of their own."""
    separate(_parameter(layer).parameter for layer in layers if not isinstance(layer, QuantisedLinear))


def _parameter(layer: nn.Module) -> FrozenParameter:
    return FrozenParameter(cast(nn.Parameter, layer.weight), transposed=isinstance(layer, Conv1D))


def _same(before: Sequence[FrozenWeight], now: Sequence[FrozenWeight]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


def quantise_linears(
    module: nn.Module, form: Callable[[Tensor], FrozenWeight] = nf4.quantise, skip: Collection[nn.Module] = ()
) -> None:
    """Replaces every `nn.Linear` and Conv1D below `module` by a `QuantisedLinear`, and experts by `QuantisedExperts`.

    Args:
        form: makes the frozen weight from a dense one, (d_out, d_in); usually `WeightFormat.quantise`.
        skip: layers to leave unchanged, such as a model's head.
    """
    for path, layer in list(module.named_modules()):
        if type(layer) in (nn.Linear, Conv1D) and not any(layer is kept for kept in skip):
            weight = cast(Tensor, layer.weight).detach()
            frozen = form(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
            module.set_submodule(path, QuantisedLinear.in_place_of(layer, frozen))
        elif isinstance(found := experts.form_of(layer), ExpertForm) and not isinstance(layer, QuantisedExperts):
            replacement = QuantisedExperts.in_place_of(layer)
            for name in found.names:
                stacked = cast(Tensor, layer._parameters[name]).detach().flatten(0, 1)
                replacement.replace_parameter(name, form(stacked), transposed=found.transposed)
            module.set_submodule(path, replacement)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """Every quantised layer with its path."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield path, module


def quantised_experts(model: nn.Module) -> Iterator[tuple[str, HeldExperts]]:
    """Every quantised projection of experts with its path."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedExperts):
            yield from ((f"{path}.{name}", held) for name, held in module.held.items())


def formats_in(model: nn.Module) -> list[WeightFormat]:
    """Precisions of the model's quantised layers, each once, without floating point."""
    weights = [layer.frozen for _, layer in quantised_layers(model)]
    weights += [held.frozen for _, held in quantised_experts(model)]
    found = {frozen.precision: format_of(frozen) for frozen in weights}
    return [form for name, form in sorted(found.items()) if name != "dense"]


def form_in_memory(model: PreTrainedModel) -> str:
    """Description for messages: "bfloat16", or "nf4 beside bfloat16" with quantised layers."""
    dtype = str(model.dtype).removeprefix("torch.")
    forms = [form.name for form in formats_in(model)]
    return f"{' and '.join(forms)} beside {dtype}" if forms else dtype


def mostly_dense(model: PreTrainedModel) -> str | None:
    """One line for a user whose quantised model is mostly dense; else None."""
    total = count_parameters(model)
    quantised = _quantised_parameters(model)
    if not 0 < quantised < total / 2:
        return None
    return (
        f"{quantised / total:.0%} of the base's {total:,} parameters are quantised: linear layers and experts of "
        "transformers' experts interface are, embeddings and other tensors are not"
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model, quantised weights included."""
    quantised = _quantised_parameters(model)
    return quantised + sum(parameter.numel() for parameter in model.parameters())


def _quantised_parameters(model: nn.Module) -> int:
    total = 0
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            total += module.in_features * module.out_features
        elif isinstance(module, QuantisedExperts):
            total += sum(math.prod(held.shape) for held in module.held.values())
    return total


def dense_state_dict(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's state_dict with every quantised layer dense, made in CPU memory tensor by tensor."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for path, layer in quantised_layers(model):
        for name in [name for name in tensors if name.startswith(f"{path}.weight")]:
            del tensors[name]
        dense = layer.frozen.dense().to("cpu", dtype)
        tensors[f"{path}.weight"] = dense.T.contiguous() if layer.transposed_in_files else dense
    return tensors
