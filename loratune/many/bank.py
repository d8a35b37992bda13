"""A bank: several adapters that train at once on one model, each on its own part of every row.

    bank = Bank.attach(model, configs, slots=8)
    bank.place(0, config, seed=1)
    with bank.row([Segment(0, 0, 512), Segment(1, 512, 1024)]):
        ...  # forward and backward of one packed row; gradients arrive in bank.gradient(slot)

A `BankedLinear` replaces a linear layer as `LoraLinear` does, with the same Parameters, but holds no adapter of its
own. It knows its index in the pool (`ops.bank.projection`), which has the weights of all slots. A slot's weights are
one flat float32 tensor, with a gradient of the same shape; A and B of each layer are views of it. So updating,
clipping, saving, joining and leaving are each a call on one tensor. Addresses never change, which a recorded CUDA
graph needs.

The capacity of a slot is a number of parameters, not a rank: any mixture of ranks and layers that fits may be placed.
A small adapter in a large slot costs its own size in products, while the slot's update covers the whole capacity.

Only adapters that are plain low-rank sums of linear layers can join a bank (`lora.contract`).

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratune.config import LoraConfig
from loratune.errors import AdapterError, nearest
from loratune.lora import files
from loratune.lora.build import build
from loratune.lora.contract import AdaptedLayer, BankSum, Fusion
from loratune.lora.layer import LoraLayer
from loratune.lora.layers import LoraConv1D, LoraQuantised
from loratune.lora.linear import LoraLinear
from loratune.lora.select import Selection, select
from loratune.lora.state import Adapter, Adapters, LayerWeights, find, install, master_dtype, uninstall
from loratune.lora.switch import set_module
from loratune.lora.target import Target
from loratune.lora.variants import variant_of
from loratune.ops.bank.pool import BankLayer, BankPool, Segment, SlotWeights
from loratune.ops.bank.projection import BankProjection, bank_linear
from loratune.ops.dropout import layer_salt
from loratune.precision.linear import QuantisedLinear, frozen_of

_ALIGNED = 64
"""Every matrix and every slot begins at a multiple of this many elements, so that a GPU reads whole cache lines."""
_BLOCK = 64
"""On a GPU, segments begin at multiples of this many tokens."""


class BankedLayer(AdaptedLayer):
    """A layer that computes its base and adds the updates of all slots of a bank."""

    bank_layer: BankLayer
    pool: BankPool

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out); each segment of the row with its own slot's update."""
        bias = cast("Tensor | None", self._parameters.get("bias"))
        rows = [slice(0, self.bank_layer.d_out)]
        return bank_linear(input, BankProjection(frozen_of(self), bias, self.pool, [self.bank_layer], rows))

    def fusion(self) -> Fusion:
        """The low-rank sum of each token's own slot."""
        return BankSum(self.bank_layer, self.pool)


class BankedLinear(BankedLayer, nn.Linear):
    """`nn.Linear` plus the low-rank updates of all slots of a bank."""


class BankedQuantised(BankedLayer, QuantisedLinear):
    """`QuantisedLinear` plus the low-rank updates of all slots of a bank."""


class BankedConv1D(BankedLayer, Conv1D):
    """transformers' Conv1D plus the low-rank updates of all slots of a bank."""


_BANKED: Final[dict[type[LoraLayer], type[BankedLayer]]] = {
    LoraLinear: BankedLinear,
    LoraQuantised: BankedQuantised,
    LoraConv1D: BankedConv1D,
}
"""Kind of adapted layer -> its counterpart in a bank."""


@dataclass(frozen=True)
class _SlotMatrices:
    """Position of one layer's A and B in a slot."""

    path: str
    kind: type[LoraLayer]
    r: int
    d_in: int
    d_out: int
    scaling: float
    at_A: int
    at_B: int


class Bank:
    """Slots for adapters on one model. Made by `attach`."""

    def __init__(
        self, model: nn.Module, pool: BankPool, layers: dict[str, BankedLayer], paths: dict[str, tuple[str, ...]]
    ) -> None:
        self._model, self._layers, self._paths = model, layers, paths
        self.pool = pool
        self.slots = len(pool.starts) - 1
        self.block = 1 if pool.tables is None else _BLOCK
        """Segments begin at multiples of this many tokens."""
        self._configs: list[LoraConfig | None] = [None] * self.slots
        self._layouts: list[tuple[_SlotMatrices, ...]] = [()] * self.slots

    @classmethod
    def attach(cls, model: nn.Module, configs: Sequence[LoraConfig], slots: int | Sequence[int]) -> Bank:
        """Puts a bank on a model: replaces every layer that one of `configs` selects, and makes empty slots.

        Args:
            model: the bare base, on its device and in its dtype; it is frozen.
            configs: all configurations that will ever be placed, or at least the largest.
            slots: number of slots, each with the capacity for the largest of `configs`; or the capacity of each slot
                in parameters.

        Raises: AdapterError: the model has adapters; a configuration trains more than low-rank sums of linear layers.
        """
        if find(model) is not None:
            raise AdapterError("a bank is put on the bare base: detach the model's adapters first")
        selections = [_linear_selection(model, config) for config in configs]
        targets = _union(model, selections)
        if isinstance(slots, int):
            slots = [max(_layout(selection)[1] for selection in selections)] * slots
        starts = [0]
        for capacity in slots:
            starts.append(starts[-1] + _aligned(capacity))
        first = frozen_of(targets[0].base)
        max_rank = max(target.r for selection in selections for target in selection.targets)
        if first.device.type == "cuda":
            max_rank = -(-max_rank // 16) * 16
        pool = BankPool(starts, len(targets), max_rank, master_dtype(first), first)
        model.requires_grad_(False)
        layers: dict[str, BankedLayer] = {}
        for index, target in enumerate(targets):
            layer = layers[target.path] = _BANKED[target.kind].from_base(target.base)
            layer.bank_layer, layer.pool = BankLayer(index, layer_salt(target.path), *target.features), pool
            set_module(model, target.paths, layer)
        return cls(model, pool, layers, {target.path: target.paths for target in targets})

    @staticmethod
    def size_of(model: nn.Module, config: LoraConfig) -> int:
        """Capacity in parameters that an adapter needs on a model without a bank. Raises as `attach`."""
        return _layout(_linear_selection(model, config))[1]

    def fits(self, slot: int, config: LoraConfig) -> bool:
        """True if `place` would take the adapter. Raises AdapterError if no bank can."""
        return self._refusal(slot, self._selection(config)) is None

    def free(self) -> list[int]:
        """Slots that hold no adapter."""
        return [slot for slot, config in enumerate(self._configs) if config is None]

    def config(self, slot: int) -> LoraConfig | None:
        """A copy of the configuration of the adapter in `slot`."""
        return copy.deepcopy(self._configs[slot])

    @torch.no_grad()
    def place(self, slot: int, config: LoraConfig, seed: int) -> None:
        """Puts a new adapter into a slot. Its initial weights equal those from `lora.inject.attach` to the bit.

        Raises: AdapterError: it does not fit; the slot is taken.
        """
        if self._configs[slot] is not None:
            raise AdapterError(f"slot {slot} holds an adapter; clear it first")
        with self._base_in_use():
            selection = _linear_selection(self._model, config)
            refusal = self._refusal(slot, selection)
            if refusal is not None:
                raise AdapterError(refusal)
            fresh = build(self._model, config, selection, seed)
        layout, _ = _layout(selection)
        self._configs[slot], self._layouts[slot] = copy.deepcopy(config), layout
        self.pool.dropout[slot] = config.lora_dropout
        weights, gradients = self.master(slot), self.gradient(slot)
        for at in layout:
            (A, B), (dA, dB) = _views(weights, at), _views(gradients, at)
            self._layers[at.path].bank_layer.parts[slot] = SlotWeights(A, B, dA, dB, at.scaling)
        self.load(slot, {name: parameter.detach() for name, parameter in fresh.parameters().items()})
        self._update_tables(slot)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empties a slot: weights and gradient are zero, and its segments compute the base."""
        self.master(slot).zero_()
        self.gradient(slot).zero_()
        for layer in self._layers.values():
            layer.bank_layer.parts.pop(slot, None)
        self._configs[slot], self._layouts[slot], self.pool.dropout[slot] = None, (), 0.0
        self._update_tables(slot)

    def master(self, slot: int) -> Tensor:
        """The slot's weights, (capacity,), zero after the end of the adapter. The address never changes."""
        return self.pool.slot(self.pool.master, slot)

    def gradient(self, slot: int) -> Tensor:
        """The gradient of `master`; backward passes add to it."""
        return self.pool.slot(self.pool.gradient, slot)

    def named(self, slot: int, flat: Tensor | None = None) -> dict[str, Tensor]:
        """Views of `master`, or of a tensor of its shape, by the parameters' names in a model with the adapter alone.

        Args:
            flat: (capacity,), for example a moment of the optimizer.
        Returns: "path.lora_A", (r, d_in), and "path.lora_B", (d_out, r), which is a transposed view.
        """
        flat, named = self.master(slot) if flat is None else flat, {}
        for at in self._layouts[slot]:
            A, B = _views(flat, at)
            named[f"{at.path}.lora_A"], named[f"{at.path}.lora_B"] = A, B.T
        return named

    @torch.no_grad()
    def load(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies an adapter's tensors, by the names of `named`, into the slot.

        Raises: AdapterError: a tensor is missing, unknown or of another shape. The slot is then unchanged.
        """
        named = self.named(slot)
        for name in tensors.keys() - named.keys():
            raise AdapterError(f'slot {slot} has no tensor "{name}".{nearest(name, named)}')
        for name, view in named.items():
            if name not in tensors:
                raise AdapterError(f'the tensor "{name}" of slot {slot} is missing')
            if tensors[name].shape != view.shape:
                raise AdapterError(f'"{name}" is {tuple(tensors[name].shape)}; slot {slot} needs {tuple(view.shape)}')
        for name, view in named.items():
            view.copy_(tensors[name])

    @torch.no_grad()
    def adapter(self, slot: int) -> Adapter:
        """A copy of the adapter in `slot`, on the CPU. Raises AdapterError: the slot is empty."""
        config = self._configs[slot]
        if config is None:
            raise AdapterError(f"slot {slot} holds no adapter")
        adapter, master = Adapter(copy.deepcopy(config)), self.master(slot).to("cpu", copy=True)
        variant = variant_of(config)
        for at in self._layouts[slot]:
            A, B = _views(master, at)
            tensors = {"lora_A": nn.Parameter(A.clone()), "lora_B": nn.Parameter(B.T.contiguous())}
            adapter.layers[at.path] = LayerWeights(at.kind, variant, tensors, at.scaling)
        return adapter

    def save(self, slot: int, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapter in `slot` as an ordinary folder in PEFT's format; see `lora.files.save`."""
        adapter = self.adapter(slot)
        with self._base_in_use():
            install(self._model, Adapters({"default": adapter}, paths=self._paths))
            try:
                files.save(self._model, directory, overwrite=overwrite)
            finally:
                uninstall(self._model)

    def prepare_row(self, segments: Sequence[Segment]) -> Tensor | None:
        """The tables that `set_row` sends to the device. May be made while another row runs. None on a CPU."""
        return None if self.pool.tables is None else self.pool.tables.prepare_row(self.pool, segments)

    def set_row(self, segments: Sequence[Segment], prepared: Tensor | None = None) -> None:
        """Sets the slots that the tokens of the next row belong to; without segments the model computes the base.

        Segments are in order and disjoint, begin at multiples of `block`, and no document crosses their boundaries.
        Tokens between them belong to no slot. On a GPU this is one copy to the memory that recorded graphs read, and
        one that updates the working copies from the masters.

        Args:
            prepared: the result of `prepare_row` for these segments, if it was called in advance.
        """
        last = 0
        for segment in segments:
            assert last <= segment.start < segment.stop, "segments are in order and disjoint"
            assert segment.start % self.block == 0, f"segments begin at multiples of {self.block} tokens"
            assert 0 <= segment.slot < self.slots
            last = -(-segment.stop // self.block) * self.block
        self.pool.segments = tuple(segments)
        if self.pool.tables is not None:
            self.pool.tables.set_row(self.prepare_row(segments) if prepared is None else prepared)
            self.pool.refresh()

    @contextmanager
    def row(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Context for the forward and backward of one row: `set_row`, and no segments afterwards."""
        self.set_row(segments)
        try:
            yield
        finally:
            self.set_row(())

    def detach(self) -> None:
        """Puts the model's own layers back."""
        for path, layer in self._layers.items():
            set_module(self._model, self._paths[path], layer.to_base())

    @contextmanager
    def _base_in_use(self) -> Iterator[None]:
        """Context in which the model has its own layers, for code that selects layers and builds adapters."""
        self.detach()
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                set_module(self._model, self._paths[path], layer)

    def _selection(self, config: LoraConfig) -> Selection:
        with self._base_in_use():
            return _linear_selection(self._model, config)

    def _refusal(self, slot: int, selection: Selection) -> str | None:
        """The reason why the selection does not fit into the slot, or None."""
        foreign = [target.path for target in selection.targets if target.path not in self._layers]
        if foreign:
            return f'the bank was attached without "{foreign[0]}"; attach it with every configuration that will come'
        rank = max(target.r for target in selection.targets)
        if rank > self.pool.max_rank:
            return f"a rank of {rank} is above the bank's {self.pool.max_rank}; attach it with the largest to come"
        capacity, needed = self.pool.starts[slot + 1] - self.pool.starts[slot], _layout(selection)[1]
        if needed > capacity:
            return f"an adapter of {needed:,} parameters does not fit into slot {slot}, which holds {capacity:,}"
        return None

    def _update_tables(self, slot: int) -> None:
        if self.pool.tables is not None:
            self.pool.tables.set_slot(self.pool, slot, [layer.bank_layer for layer in self._layers.values()])


def _linear_selection(model: nn.Module, config: LoraConfig) -> Selection:
    """The layers that `config` selects. Raises AdapterError if it trains more than low-rank sums of linear layers."""
    if config.bias != "none" or config.modules_to_save:
        field = "modules_to_save" if config.modules_to_save else f'bias = "{config.bias}"'
        raise AdapterError(f"{field}: a bank trains updates of linear layers only; train this adapter by itself")
    selection = select(model, config)
    for target in selection.targets:
        if target.kind not in _BANKED:
            kind = type(target.base).__name__
            raise AdapterError(f'"{target.path}" is of type {kind}; a bank takes linear layers: train it by itself')
        if not target.is_low_rank_sum:
            variant = type(target.variant).__name__
            raise AdapterError(
                f"{variant} is not a low-rank sum, and a bank takes only such sums: train it by itself"
            )
    return selection


def _union(model: nn.Module, selections: Sequence[Selection]) -> list[Target]:
    """The targets of all selections, each path once, in the order of the model's modules."""
    targets = {target.path: target for selection in selections for target in selection.targets}
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(targets.values(), key=lambda target: order[target.path])


def _layout(selection: Selection) -> tuple[tuple[_SlotMatrices, ...], int]:
    """Position of each layer's matrices in a slot, and the capacity that all need together."""
    layout, end = [], 0
    for target in selection.targets:
        d_in, d_out = target.features
        at_B = end + _aligned(target.r * d_in)
        layout.append(_SlotMatrices(target.path, target.kind, target.r, d_in, d_out, target.scaling, end, at_B))
        end = at_B + _aligned(target.r * d_out)
    return tuple(layout), end


def _views(flat: Tensor, at: _SlotMatrices) -> tuple[Tensor, Tensor]:
    """A, (r, d_in), and B transposed, (r, d_out)."""
    A = flat[at.at_A : at.at_A + at.r * at.d_in].view(at.r, at.d_in)
    return A, flat[at.at_B : at.at_B + at.r * at.d_out].view(at.r, at.d_out)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
