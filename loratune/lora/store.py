"""Hundreds of adapters in host memory behind a few slots on the device.

A 7B model's adapter of rank 16 is 80 MB in bfloat16. Dozens fit on the device beside the model. Hundreds more stay in
host memory, and a `Store` copies the requested adapters to the device:

- An adapter is one run of bytes on the host, page-locked where there is a GPU. A slot is as many bytes on the device,
  allocated once. So a swap-in is one copy, at the speed of the bus, and allocates nothing.
- Copies run on their own stream beside the model's work. `prefetch` starts a copy in advance. If a copy has not
  arrived, `activate` makes the device wait, not the caller.
- The slot of the least recently used adapter is reused first; adapters in use or pinned keep theirs.
- Only the tensors' `data` changes, between the slot and the host. So everything that takes an adapter by name
  (`activate`, weighted sums, `save`, `merge`, `chat`) works as for any other adapter.

Weights are stored in the dtype that their layer computes in, to which `lora_linear` would round them at each use:
half the bytes and the same outputs to the bit. In this form they cannot be trained; for training, load the adapter
without a store.
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
from loratune.lora.select import Selection
from loratune.lora.state import Adapter, Adapters, find, require
from loratune.ops.host import pinned
from loratune.precision.linear import frozen_of

_ALIGNMENT = 256
"""Bytes; each tensor in a slot begins at a multiple, as PyTorch's own allocations do."""

_ByteLayout = tuple[tuple[int, torch.Size, torch.dtype], ...]
"""Offset in bytes, shape and dtype of each tensor."""


@dataclass(eq=False)
class _StoreSlot:
    """Memory for one adapter on the device."""

    buffer: Tensor
    """(bytes,) uint8"""
    views: dict[_ByteLayout, list[Tensor]]
    arrived: torch.cuda.Event | None = None
    """Recorded after the copy that filled the slot."""
    left: torch.cuda.Event | None = None
    """Recorded after the last work that used the content."""

    def view(self, layout: _ByteLayout) -> list[Tensor]:
        """The tensors of an adapter here, made once for each layout: most adapters of a model share one."""
        if layout not in self.views:
            self.views[layout] = _views(self.buffer, layout)
        return self.views[layout]


@dataclass(eq=False)
class _StoredAdapter:
    """One adapter in host memory."""

    host: Tensor
    """(bytes,) uint8"""
    layout: _ByteLayout
    parameters: list[nn.Parameter]
    host_views: list[Tensor]
    """Views of `host`, one for each Parameter."""
    slot: _StoreSlot | None = None
    """The slot that the Parameters point to, None for `host`. Set only once later work waits for the slot's bytes."""

    def point(self, slot: _StoreSlot | None) -> None:
        """Points the Parameters to the bytes in `slot`, or to the bytes on the host."""
        if slot is self.slot:
            return
        views = self.host_views if slot is None else slot.view(self.layout)
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
        self._slots: list[_StoreSlot] = []
        self._count = slots
        self._entries: dict[str, _StoredAdapter] = {}
        self._resident: OrderedDict[str, _StoreSlot] = OrderedDict()
        self._pinned: set[str] = set()
        self._used: set[str] = set()
        self._copies: torch.cuda.Stream | None = None
        state = find(model)
        if state is not None and state.store is not None:
            raise AdapterError("this model has a store of adapters already")

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters on the device, the least recently used first."""
        return tuple(self._resident)

    @property
    def slot_bytes(self) -> int:
        """Size of one slot: the size of the largest adapter."""
        return max((entry.host.numel() for entry in self._entries.values()), default=0)

    def load(self, directory: str | Path, name: str) -> None:
        """Reads the adapter in `directory` into host memory under `name`. The model computes the same as before.

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
        """Copies a new adapter's tensors into host memory of the store.

        Returns: a function that replaces the adapter now stored under `name`, if any, by the new one. It copies
            nothing.
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
            self.release(name)
            self._entries[name] = entry
            self._make_slots(device)

        return put

    def prefetch(self, *names: str) -> None:
        """Starts copying these adapters to the device, beside the work that runs there; does not wait.

        Raises: AdapterError: one is unknown; there are not enough slots for them and for adapters in use or pinned.
        """
        for name in names:
            self._entry(name)
        for name in names:
            self._bring(name, keep=names)

    def pin(self, name: str) -> None:
        """Copies an adapter to the device and keeps it there. Raises AdapterError."""
        self.prefetch(name)
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Allows the adapter's slot to be reused."""
        self._pinned.discard(name)

    def bring(self, names: Collection[str]) -> None:
        """Makes the named adapters available on the device for the work issued from now on; others may be evicted.

        Raises: AdapterError: there are not enough slots for them and for pinned adapters.
        """
        wanted = [name for name in names if name in self._entries]
        for name in self._used.difference(wanted):
            if name in self._resident:
                self._resident[name].left = _now(self._resident[name].buffer)
        self._used.intersection_update(wanted)
        for name in wanted:
            slot = self._bring(name, keep=wanted)
            if slot.arrived is not None:
                torch.cuda.current_stream(slot.buffer.device).wait_event(slot.arrived)
            self._entries[name].point(slot)
        self._used.update(wanted)

    def release(self, name: str) -> None:
        """Frees an adapter's slot and its memory on the host. Tensors that are still referred to stay valid."""
        if name in self._entries:
            slot = self._evict(name) if name in self._resident else None
            if slot is not None and slot.arrived is not None:
                slot.arrived.synchronize()  # the host memory may be freed now
            del self._entries[name]
            self._pinned.discard(name)
            self._used.discard(name)

    def _bring(self, name: str, keep: Collection[str]) -> _StoreSlot:
        slot = self._resident.get(name)
        if slot is None:
            slot = self._free(name, keep)
            self._copy(self._entry(name), slot)
            self._resident[name] = slot
        self._resident.move_to_end(name)
        return slot

    def _free(self, name: str, keep: Collection[str]) -> _StoreSlot:
        """An empty slot, or the slot of the least recently used adapter."""
        taken = {id(slot) for slot in self._resident.values()}
        empty = next((slot for slot in self._slots if id(slot) not in taken), None)
        if empty is not None:
            return empty
        staying = self._pinned | self._used | set(keep)
        oldest = next((other for other in self._resident if other not in staying), None)
        if oldest is None:
            raise AdapterError(
                f'no slot for adapter "{name}": all {self._count} hold adapters that are in use, pinned or requested '
                f"together ({', '.join(self._resident)}); unpin one or make the store with more slots"
            )
        return self._evict(oldest)

    def _evict(self, name: str) -> _StoreSlot:
        slot = self._resident.pop(name)
        if name in self._used:
            slot.left = _now(slot.buffer)
        self._entries[name].point(None)
        return slot

    def _copy(self, entry: _StoredAdapter, slot: _StoreSlot) -> None:
        """Starts one copy of all bytes."""
        device = slot.buffer.device
        if device.type == "cuda":
            self._copies = self._copies or torch.cuda.Stream(device)
            if slot.left is not None:
                self._copies.wait_event(slot.left)
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            slot.buffer[: entry.host.numel()].copy_(entry.host, non_blocking=True)
            slot.arrived = _now(slot.buffer)

    def _make_slots(self, device: torch.device) -> None:
        """Allocates the slots. Replaces them by larger ones if the largest adapter does not fit."""
        if self._slots and self._slots[0].buffer.numel() >= self.slot_bytes:
            return
        before = list(self._resident)
        for name in before:
            self._evict(name)
        if self._copies is not None:
            self._copies.synchronize()
        self._slots.clear()  # before the new ones are made, so that the device never holds both
        for _ in range(self._count):
            buffer = torch.empty(self.slot_bytes, dtype=torch.uint8, device=device)
            self._slots.append(_StoreSlot(buffer, {}, left=_now(buffer)))
        self.bring(self._used.copy())
        for name in before:
            self._bring(name, keep=before)

    def _entry(self, name: str) -> _StoredAdapter:
        if name not in self._entries:
            require(self._model).get(name)  # an unknown name raises here, with near names
            raise AdapterError(f'adapter "{name}" is not in the store: it was attached or loaded without it')
        return self._entries[name]


def _packed(adapter: Adapter, selection: Selection, device: torch.device) -> _StoredAdapter:
    """Copies an adapter's tensors into one run of host memory and points its Parameters there."""
    parameters: list[nn.Parameter] = []
    layout: list[tuple[int, torch.Size, torch.dtype]] = []
    end = 0
    for target in selection.targets:
        weights = adapter.layers[target.path]
        dtype = weights.inference_dtype(frozen_of(target.base))
        for parameter in weights.tensors.values():
            layout.append((end, parameter.shape, dtype))
            parameters.append(parameter)
            size = parameter.numel() * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
    entry = _StoredAdapter(torch.empty(0), tuple(layout), parameters, [])
    shape = torch.Size([end])
    entry.host = pinned(entry, shape, torch.uint8) if device.type == "cuda" else torch.empty(shape, dtype=torch.uint8)
    entry.host_views = _views(entry.host, entry.layout)
    for parameter, view in zip(parameters, entry.host_views, strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.requires_grad_(False)
    adapter.stored = True
    return entry


def _views(buffer: Tensor, layout: _ByteLayout) -> list[Tensor]:
    """The tensors of a layout in a run of bytes."""
    return [
        buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for offset, shape, dtype in layout
    ]


def _now(tensor: Tensor) -> torch.cuda.Event | None:
    """An event after the work issued so far on the current stream; None on a CPU, where that work is done."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
