"""A bank: several adapters that train at once on one model, each on its own part of every row.

    bank = Bank.attach(model, configs, slots=8)
    bank.place(0, config, seed=1)
    with bank.row([Segment(0, 0, 512), Segment(1, 512, 1024)]):
        ...  # forward and backward of one packed row; gradients arrive in bank.gradient(slot)

`LoraBankLinear` stands in for a linear layer as `LoraLinear` does, with the same Parameters, but holds no adapter of
its own: it knows its lane in the pool (`ops.bank.projection`), where the weights of all slots lie. A slot's weights
are one flat
float32 tensor, with a gradient of the same form; A and B of each layer are views of it. So an optimizer, a clipping
norm, a checkpoint, joining and leaving are each a call on one tensor, and addresses never change, which is what a
recorded graph needs.

A slot has room for a number of parameters, not for a rank: whatever mixture of ranks and layers fits may be placed,
and a small adapter in a large slot costs its own size in products (the update of the slot runs over all its room).

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError, nearest
from loratune.lora import files
from loratune.lora.build import build
from loratune.lora.contract import AdaptedLayer, BankSum, Fusion
from loratune.lora.layers import LoraQuantised
from loratune.lora.linear import LoraLayer, LoraLinear
from loratune.lora.select import Selection, Target, select
from loratune.lora.state import Adapter, Adapters, LayerWeights, find, install, master_dtype, uninstall
from loratune.lora.switch import place_module
from loratune.ops.bank.projection import BankProjection, Lane, Part, Pool, Segment, bank_linear
from loratune.ops.dropout import layer_salt
from loratune.precision.linear import QuantisedLinear, frozen_of

_ALIGNED = 64
"""Elements; every matrix and every slot begins at a multiple, so that a GPU reads whole lines."""
_BLOCK = 64
"""Tokens of the smallest piece of a row that is one slot's, on a GPU."""


class _BankLayer(AdaptedLayer):
    """A layer that stands in for `base` and adds the updates of all slots of a bank."""

    lane: Lane
    pool: Pool
    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child

    @classmethod
    def from_base(cls, base: nn.Module, lane: Lane, pool: Pool) -> Self:
        """A stand-in for `base` with the same Parameters, buffers, hooks and attributes."""
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        layer._parameters = dict(base._parameters)
        layer._base, layer.lane, layer.pool = (base,), lane, pool
        return layer

    def to_base(self) -> nn.Module:
        """The original instance, with whatever Parameters it has by now."""
        base = self._base[0]
        for name in base._parameters:
            base._parameters[name] = self._parameters[name]
        return base.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out); each segment of the row with its own slot's update."""
        bias: Any = self._parameters.get("bias")
        rows = [slice(0, self.lane.d_out)]
        return bank_linear(input, BankProjection(frozen_of(self), bias, self.pool, [self.lane], rows))

    def fusion(self) -> Fusion:
        """The sum of each token's own slot."""
        return BankSum(self.lane, self.pool)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """None: the weights of all slots belong to the pool."""
        return {}

    @property
    def rank(self) -> int:
        """0: ranks belong to slots."""
        return 0


class LoraBankLinear(_BankLayer, nn.Linear):
    """`nn.Linear` plus the low-rank updates of all slots of a bank."""


class LoraBankQuantised(_BankLayer, QuantisedLinear):
    """`QuantisedLinear` plus the low-rank updates of all slots of a bank."""


@dataclass(frozen=True)
class _Place:
    """Where one layer's weights lie in a slot."""

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
        self, model: nn.Module, pool: Pool, layers: dict[str, _BankLayer], places: dict[str, tuple[str, ...]]
    ) -> None:
        self._model, self._layers, self._places = model, layers, places
        self.pool = pool
        self.slots = len(pool.starts) - 1
        self.block = 1 if pool.tables is None else _BLOCK
        """Segments begin at multiples of this many tokens."""
        self._configs: list[LoraConfig | None] = [None] * self.slots
        self._layouts: list[tuple[_Place, ...]] = [()] * self.slots

    @classmethod
    def attach(cls, model: nn.Module, configs: Sequence[LoraConfig], slots: int | Sequence[int]) -> Bank:
        """Puts a bank on a model: stand-ins for every layer that one of `configs` means, and empty slots.

        Args:
            model: the bare base, on its device and in its dtype; it is frozen.
            configs: all that is ever to be placed, or at least the largest.
            slots: how many, each with room for the largest of `configs`; or each one's room in parameters.

        Raises: AdapterError: the model has adapters; a configuration trains more than updates of linear layers.
        """
        if find(model) is not None:
            raise AdapterError("a bank is put on the bare base: detach the model's adapters first")
        selections = [_linear_selection(model, config) for config in configs]
        targets = _union(model, selections)
        if isinstance(slots, int):
            slots = [max(_layout(selection)[1] for selection in selections)] * slots
        starts = [0]
        for room in slots:
            starts.append(starts[-1] + _aligned(room))
        first = frozen_of(targets[0].base)
        max_rank = max(target.r for selection in selections for target in selection.targets)
        if first.device.type == "cuda":
            max_rank = -(-max_rank // 16) * 16
        pool = Pool(starts, len(targets), max_rank, master_dtype(first), first)
        model.requires_grad_(False)
        layers: dict[str, _BankLayer] = {}
        for index, target in enumerate(targets):
            d_in, d_out = target.layer_class.features(target.base)
            kind = LoraBankQuantised if issubclass(target.layer_class, LoraQuantised) else LoraBankLinear
            lane = Lane(index, layer_salt(target.path), d_in, d_out)
            layers[target.path] = kind.from_base(target.base, lane, pool)
            place_module(model, target.places, layers[target.path])
        return cls(model, pool, layers, {target.path: target.places for target in targets})

    @staticmethod
    def size_of(model: nn.Module, config: LoraConfig) -> int:
        """Room in parameters that an adapter needs on a model without stand-ins. Raises as `attach`."""
        return _layout(_linear_selection(model, config))[1]

    def fits(self, slot: int, config: LoraConfig) -> bool:
        """Whether `place` would take it. Raises AdapterError for what no bank takes."""
        return self._why_not(slot, self._selection(config)) is None

    def free(self) -> list[int]:
        """Slots that hold no adapter."""
        return [slot for slot, config in enumerate(self._configs) if config is None]

    def config(self, slot: int) -> LoraConfig | None:
        """A copy of the configuration of the adapter in `slot`."""
        return copy.deepcopy(self._configs[slot])

    @torch.no_grad()
    def place(self, slot: int, config: LoraConfig, seed: int) -> None:
        """A new adapter in a slot, with the initial weights that `lora.inject.attach` gives it, to the bit.

        Raises: AdapterError: it does not fit; the slot is taken.
        """
        if self._configs[slot] is not None:
            raise AdapterError(f"slot {slot} holds an adapter; clear it first")
        with self._at_rest():
            selection = _linear_selection(self._model, config)
            why = self._why_not(slot, selection)
            if why is not None:
                raise AdapterError(why)
            fresh = build(self._model, config, selection, seed)
        layout, _ = _layout(selection)
        self._configs[slot], self._layouts[slot] = copy.deepcopy(config), layout
        self.pool.dropout[slot] = config.lora_dropout
        weights, gradients = self.master(slot), self.gradient(slot)
        for place in layout:
            (A, B), (dA, dB) = _views(weights, place), _views(gradients, place)
            self._layers[place.path].lane.parts[slot] = Part(A, B, dA, dB, place.scaling)
        self.load(slot, {name: parameter.detach() for name, parameter in fresh.parameters().items()})
        self._tell_device(slot)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empties a slot: weights and gradient are zero, and its segments compute the base."""
        self.master(slot).zero_()
        self.gradient(slot).zero_()
        for layer in self._layers.values():
            layer.lane.parts.pop(slot, None)
        self._configs[slot], self._layouts[slot], self.pool.dropout[slot] = None, (), 0.0
        self._tell_device(slot)

    def master(self, slot: int) -> Tensor:
        """The slot's weights, flat: (room,), zero beyond the adapter's own. Its address never changes."""
        return self.pool.slot(self.pool.master, slot)

    def gradient(self, slot: int) -> Tensor:
        """The gradient of `master`, which backwards add to."""
        return self.pool.slot(self.pool.gradient, slot)

    def named(self, slot: int, flat: Tensor | None = None) -> dict[str, Tensor]:
        """Views of `master`, or of a tensor of its form, by the parameters' names in a model with the adapter alone.

        Args:
            flat: (room,), for example a moment of the optimizer.
        Returns: "path.lora_A", (r, d_in), and "path.lora_B", (d_out, r), which is a transposed view.
        """
        flat, named = self.master(slot) if flat is None else flat, {}
        for place in self._layouts[slot]:
            A, B = _views(flat, place)
            named[f"{place.path}.lora_A"], named[f"{place.path}.lora_B"] = A, B.T
        return named

    @torch.no_grad()
    def load(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies an adapter's tensors, by the names of `named`, into the slot.

        Raises: AdapterError: a tensor is missing, unknown or of another shape. The slot is then as it was.
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
        for place in self._layouts[slot]:
            A, B = _views(master, place)
            adapter.layers[place.path] = LayerWeights(
                place.kind, nn.Parameter(A.clone()), nn.Parameter(B.T.contiguous()), place.scaling
            )
        return adapter

    def save(self, slot: int, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapter in `slot` as an ordinary folder in PEFT's format; see `lora.files.save`."""
        adapter = self.adapter(slot)
        with self._at_rest():
            install(self._model, Adapters({"default": adapter}, places=self._places))
            try:
                files.save(self._model, directory, overwrite=overwrite)
            finally:
                uninstall(self._model)

    def lay_row(self, segments: Sequence[Segment]) -> Tensor | None:
        """The tables that `set_row` sends to the device; may be made while another row runs. None on a CPU."""
        return None if self.pool.tables is None else self.pool.tables.lay_row(self.pool, segments)

    def set_row(self, segments: Sequence[Segment], laid: Tensor | None = None) -> None:
        """Says whose the tokens of the next row are; without segments the model computes the base.

        Segments are in order and disjoint, begin at multiples of `block`, and no document crosses their borders. What
        lies between them belongs to nobody. On a GPU this is one copy to where recorded graphs look, and one that
        brings the working copies up to the masters.

        Args:
            laid: what `lay_row` gave for these segments, if it was asked in advance.
        """
        last = 0
        for segment in segments:
            assert last <= segment.start < segment.stop, "segments are in order and disjoint"
            assert segment.start % self.block == 0, f"segments begin at multiples of {self.block} tokens"
            assert 0 <= segment.slot < self.slots
            last = -(-segment.stop // self.block) * self.block
        self.pool.segments = tuple(segments)
        if self.pool.tables is not None:
            self.pool.tables.set_row(self.lay_row(segments) if laid is None else laid)
            self.pool.refresh()

    @contextmanager
    def row(self, segments: Sequence[Segment]) -> Iterator[None]:
        """`set_row` for the forward and backward of one row, and no row afterwards."""
        self.set_row(segments)
        try:
            yield
        finally:
            self.set_row(())

    def detach(self) -> None:
        """Puts the model's own layers back."""
        for path, layer in self._layers.items():
            place_module(self._model, self._places[path], layer.to_base())

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The model's own layers, for as long as the block runs: what selects and builds reads them."""
        self.detach()
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                place_module(self._model, self._places[path], layer)

    def _selection(self, config: LoraConfig) -> Selection:
        with self._at_rest():
            return _linear_selection(self._model, config)

    def _why_not(self, slot: int, selection: Selection) -> str | None:
        """One line, or None if the selection fits into the slot."""
        foreign = [target.path for target in selection.targets if target.path not in self._layers]
        if foreign:
            return f'the bank was attached without "{foreign[0]}"; attach it with every configuration that is to come'
        rank = max(target.r for target in selection.targets)
        if rank > self.pool.max_rank:
            return f"a rank of {rank} is beyond the bank's {self.pool.max_rank}; attach it with the largest to come"
        room, needed = self.pool.starts[slot + 1] - self.pool.starts[slot], _layout(selection)[1]
        if needed > room:
            return f"an adapter of {needed:,} parameters does not fit into slot {slot}, which has room for {room:,}"
        return None

    def _tell_device(self, slot: int) -> None:
        if self.pool.tables is not None:
            self.pool.tables.set_slot(self.pool, slot, [layer.lane for layer in self._layers.values()])


def _linear_selection(model: nn.Module, config: LoraConfig) -> Selection:
    """What `config` means. Raises AdapterError if that is more than low-rank updates of linear layers."""
    if config.bias != "none" or config.modules_to_save:
        what = "modules_to_save" if config.modules_to_save else f'bias = "{config.bias}"'
        raise AdapterError(f"{what}: a bank trains updates of linear layers only; train this adapter by itself")
    selection = select(model, config)
    for target in selection.targets:
        if not issubclass(target.layer_class, LoraLinear | LoraQuantised):
            kind = type(target.base).__name__
            raise AdapterError(f'"{target.path}" is of type {kind}; a bank takes linear layers: train it by itself')
    return selection


def _union(model: nn.Module, selections: Sequence[Selection]) -> list[Target]:
    """The targets of all selections, each path once, in the order of the model's modules."""
    targets = {target.path: target for selection in selections for target in selection.targets}
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(targets.values(), key=lambda target: order[target.path])


def _layout(selection: Selection) -> tuple[tuple[_Place, ...], int]:
    """Where each matrix lies in a slot, and the room that they take together."""
    places, end = [], 0
    for target in selection.targets:
        d_in, d_out = target.layer_class.features(target.base)
        at_B = end + _aligned(target.r * d_in)
        places.append(_Place(target.path, target.layer_class, target.r, d_in, d_out, target.scaling, end, at_B))
        end = at_B + _aligned(target.r * d_out)
    return tuple(places), end


def _views(flat: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
    """A, (r, d_in), and B transposed, (r, d_out)."""
    A = flat[place.at_A : place.at_A + place.r * place.d_in].view(place.r, place.d_in)
    return A, flat[place.at_B : place.at_B + place.r * place.d_out].view(place.r, place.d_out)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
