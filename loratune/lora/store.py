"""Hundreds of adapters in host memory behind a few places on the device.

A 7B model's adapter of rank 16 is 80 MB in bfloat16. The first dozens fit beside the model; the next hundreds rest in
host memory, and a `Store` brings in the ones that are asked for:

- An adapter is one run of bytes on the host, page-locked where there is a GPU, and a slot is as many bytes on the
  device, allocated once. So a swap-in is one copy, at the speed of the bus, and allocates nothing.
- Copies run on a stream of their own beside the model's work. `prefetch` starts one ahead of need; `activate` makes
  the device wait for what has not arrived, and never the caller.
- The slot of the adapter that was used longest ago is given away first; those in use or pinned stay.
- Only the tensors' `data` changes hands, between the slot and the host, so everything that takes an adapter by name
  (`activate`, weighted sums, `save`, `merge`, `chat`) works as for any other.

Weights are kept in the dtype that their layer computes in, to which `lora_linear` would round them at each use: half
the bytes and the same outputs to the bit. They cannot be trained so; load an adapter without a store for that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loratune.errors import AdapterError, ConfigError
from loratune.lora.files import read_adapter
from loratune.lora.inject import check_name, join
from loratune.lora.layers import LoraEmbedding
from loratune.lora.select import Selection
from loratune.lora.state import Adapter, Adapters, find, require
from loratune.ops.host import pinned
from loratune.precision.linear import frozen_of

_ALIGNMENT = 256
"""Bytes at which each tensor begins in a slot, as PyTorch's own allocations do."""

_Layout = tuple[tuple[int, torch.Size, torch.dtype], ...]
"""Offset in bytes, shape and dtype of each tensor."""


@dataclass(eq=False)
class _Slot:
    """A place for one adapter on the device."""

    room: Tensor
    """(bytes,) uint8"""
    views: dict[_Layout, list[Tensor]]
    arrived: torch.cuda.Event | None = None
    """The copy that filled it is done."""
    left: torch.cuda.Event | None = None
    """The work that used what it held is done."""

    def view(self, layout: _Layout) -> list[Tensor]:
        """The tensors of an adapter here, made once for each layout: most adapters of a model share one."""
        if layout not in self.views:
            self.views[layout] = _views(self.room, layout)
        return self.views[layout]


@dataclass(eq=False)
class _Entry:
    """One adapter at rest."""

    host: Tensor
    """(bytes,) uint8"""
    layout: _Layout
    parameters: list[nn.Parameter]
    resting: list[Tensor]
    """Views of `host`, one for each Parameter."""
    slot: _Slot | None = None
    """Where the Parameters point to; None is `host`. A slot only once the work that follows waits for its bytes."""

    def point(self, slot: _Slot | None) -> None:
        """Points the Parameters to the bytes in `slot`, or to those on the host."""
        if slot is self.slot:
            return
        views = self.resting if slot is None else slot.view(self.layout)
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view
        self.slot = slot


class Store:
    """Adapters of one model in host memory, at most `slots` of them on the device at a time.

    Use from one thread. Raises ConfigError: slots below 1. AdapterError: the model has a store already.
    """

    def __init__(self, model: nn.Module, slots: int = 4) -> None:
        if slots < 1:
            raise ConfigError(f"slots is {slots}; at least one adapter must fit on the device")
        self._model = model
        self._slots: list[_Slot] = []
        self._count = slots
        self._entries: dict[str, _Entry] = {}
        self._resident: OrderedDict[str, _Slot] = OrderedDict()
        self._pinned: set[str] = set()
        self._used: set[str] = set()
        self._copies: torch.cuda.Stream | None = None
        state = find(model)
        if state is not None and state.store is not None:
            raise AdapterError("this model has a store of adapters already")

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters on the device, the one used longest ago first."""
        return tuple(self._resident)

    @property
    def slot_bytes(self) -> int:
        """Size of one slot: the largest adapter's."""
        return max((entry.host.numel() for entry in self._entries.values()), default=0)

    def load(self, directory: str | Path, name: str) -> None:
        """Reads the adapter in `directory` into host memory under `name`; what the model computes stays the same.

        Raises: AdapterError: as `load_adapter`; the adapter has modules or biases trained in full.
        """
        state = find(self._model) or Adapters()
        state.require_unmerged("load an adapter")
        check_name(name)
        if name in state.adapters:
            raise AdapterError(f'an adapter "{name}" is already attached; replace it, or choose another name')
        if state.base_modules or state.base_biases:
            raise AdapterError(
                "an adapter with modules or biases of its own is in use; activate another before loading more"
            )
        selection, adapter = read_adapter(self._model, directory, name, torch.device("cpu"))
        self.prepare(name, selection, adapter)()
        join(self._model, state, name, selection, adapter)
        state.store = self

    def prepare(self, name: str, selection: Selection, adapter: Adapter) -> Callable[[], None]:
        """Moves a new adapter's tensors into host memory of the store.

        Returns: what puts them in the place of the ones kept under `name`, if any, which takes no time.
        Raises: AdapterError: the adapter has modules or biases trained in full; the layers are on several devices.
        """
        if adapter.modules or adapter.biases:
            raise AdapterError(
                f'adapter "{name}" has modules_to_save or biases, which a store does not hold; use load_adapter'
            )
        devices = {frozen_of(target.base).device for target in selection.targets}
        if len(devices) > 1:
            raise AdapterError(f"a store needs all adapted layers on one device, not on {sorted(map(str, devices))}")
        (device,) = devices
        entry = _packed(adapter, selection, device)

        def put() -> None:
            self.forget(name)
            self._entries[name] = entry
            self._make_slots(device)

        return put

    def prefetch(self, *names: str) -> None:
        """Starts copying these adapters to the device, beside whatever runs there; does not wait.

        Raises: AdapterError: one is unknown; there are not enough slots for them and for those in use or pinned.
        """
        for name in names:
            self._entry(name)
        for name in names:
            self._bring(name, keep=names)

    def pin(self, name: str) -> None:
        """Brings an adapter to the device and keeps it there. Raises AdapterError."""
        self.prefetch(name)
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets an adapter go when its slot is needed."""
        self._pinned.discard(name)

    def bring(self, names: Collection[str]) -> None:
        """Has the named adapters on the device for the work issued from now on; the others may go.

        Raises: AdapterError: there are not enough slots for them and for those that are pinned.
        """
        kept = [name for name in names if name in self._entries]
        for name in self._used.difference(kept):
            if name in self._resident:
                self._resident[name].left = _now(self._resident[name].room)
        self._used.intersection_update(kept)
        for name in kept:
            slot = self._bring(name, keep=kept)
            if slot.arrived is not None:
                torch.cuda.current_stream(slot.room.device).wait_event(slot.arrived)
            self._entries[name].point(slot)
        self._used.update(kept)

    def forget(self, name: str) -> None:
        """Gives up an adapter's slot and its memory on the host; its tensors live on where they are."""
        if name in self._entries:
            slot = self._evict(name) if name in self._resident else None
            if slot is not None and slot.arrived is not None:
                slot.arrived.synchronize()  # the host memory may be freed now
            del self._entries[name]
            self._pinned.discard(name)
            self._used.discard(name)

    def _bring(self, name: str, keep: Collection[str]) -> _Slot:
        slot = self._resident.get(name)
        if slot is None:
            slot = self._free(name, keep)
            self._copy(self._entry(name), slot)
            self._resident[name] = slot
        self._resident.move_to_end(name)
        return slot

    def _free(self, name: str, keep: Collection[str]) -> _Slot:
        """A slot that is empty, or that of the adapter used longest ago."""
        taken = {id(slot) for slot in self._resident.values()}
        empty = next((slot for slot in self._slots if id(slot) not in taken), None)
        if empty is not None:
            return empty
        staying = self._pinned | self._used | set(keep)
        oldest = next((other for other in self._resident if other not in staying), None)
        if oldest is None:
            raise AdapterError(
                f'no slot for adapter "{name}": all {self._count} hold adapters that are in use, pinned or asked for '
                f"together ({', '.join(self._resident)}); unpin one or make the store with more slots"
            )
        return self._evict(oldest)

    def _evict(self, name: str) -> _Slot:
        slot = self._resident.pop(name)
        if name in self._used:
            slot.left = _now(slot.room)
        self._entries[name].point(None)
        return slot

    def _copy(self, entry: _Entry, slot: _Slot) -> None:
        """Starts one copy of all bytes."""
        device = slot.room.device
        if device.type == "cuda":
            self._copies = self._copies or torch.cuda.Stream(device)
            if slot.left is not None:
                self._copies.wait_event(slot.left)
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            slot.room[: entry.host.numel()].copy_(entry.host, non_blocking=True)
            slot.arrived = _now(slot.room)

    def _make_slots(self, device: torch.device) -> None:
        """Makes the slots, anew if an adapter came that is larger than they are."""
        if self._slots and self._slots[0].room.numel() >= self.slot_bytes:
            return
        before = list(self._resident)
        for name in before:
            self._evict(name)
        if self._copies is not None:
            self._copies.synchronize()
        self._slots.clear()  # before the new ones are made, so that the device never holds both
        for _ in range(self._count):
            room = torch.empty(self.slot_bytes, dtype=torch.uint8, device=device)
            self._slots.append(_Slot(room, {}, left=_now(room)))
        self.bring(self._used.copy())
        for name in before:
            self._bring(name, keep=before)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            require(self._model).get(name)  # says which names there are
            raise AdapterError(f'adapter "{name}" is not in the store: it was attached or loaded without it')
        return self._entries[name]


def _packed(adapter: Adapter, selection: Selection, device: torch.device) -> _Entry:
    """Lays an adapter's tensors end to end in host memory and points its Parameters there."""
    parameters: list[nn.Parameter] = []
    layout: list[tuple[int, torch.Size, torch.dtype]] = []
    end = 0
    for target in selection.targets:
        weights = adapter.layers[target.path]
        # An embedding scales the looked-up rows before they are rounded; rounding first would not be the same.
        kept = issubclass(target.layer_class, LoraEmbedding)
        for parameter in (weights.lora_A, weights.lora_B):
            dtype = parameter.dtype if kept else frozen_of(target.base).dtype
            layout.append((end, parameter.shape, dtype))
            parameters.append(parameter)
            size = parameter.numel() * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
    entry = _Entry(torch.empty(0), tuple(layout), parameters, [])
    shape = torch.Size([end])
    entry.host = pinned(entry, shape, torch.uint8) if device.type == "cuda" else torch.empty(shape, dtype=torch.uint8)
    entry.resting = _views(entry.host, entry.layout)
    for parameter, view in zip(parameters, entry.resting, strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.requires_grad_(False)
    adapter.stored = True
    return entry


def _views(room: Tensor, layout: _Layout) -> list[Tensor]:
    """The tensors of a layout in a run of bytes."""
    return [
        room[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for offset, shape, dtype in layout
    ]


def _now(room: Tensor) -> torch.cuda.Event | None:
    """A mark behind the work issued so far on the current stream; None on a CPU, where it is done."""
    return torch.cuda.current_stream(room.device).record_event() if room.is_cuda else None
