"""Activations in host memory while they wait for their backward, copied both ways while the neighbours compute.

A layer of 7B computes for about six milliseconds forward and twelve backward on 8,192 tokens; its input, 64 MiB,
crosses PCIe in little more than one. So each copy runs on a stream of its own beside the next layer, and the device
holds two or three inputs where it would hold one for each layer.

    forward    layer i ends -> what it keeps leaves; released when layer i + 2 ends, by when it has left
    backward   layer i begins -> what layer i - 1 keeps sets out for the device

Layers that keep all on the device call `layer_done` and `prefetch_below` as well: with a generous layer
above two that send, both of these would otherwise stay on the device until their backward, beside the widest moment
of the step.

Addresses are fixed (pinned buffers for each layer), and streams fork and join by events, so a CUDA graph can record
it.
`Tensor.record_stream` is not used: inside a recording it would keep every block until the recording ends. A tensor
that another stream reads is held until the main stream has waited for that stream instead.
On a CPU the host is the device, and nothing moves.

What a step touches only once or a few rows of need not be copied at all. Pinned memory has an address on the device
as well, and `mapped` makes a CUDA tensor of it: kernels read and write the host through the link, at a tenth of the
speed of the device's memory or less, which is nothing for a few rows of an embedding table and milliseconds for the
moments of AdamW.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_LEAVING = 2
"""Layers whose tensors are on their way out and still held by the device."""
_ROOMS: set[int] = set()
"""Addresses of mapped memory that is in use."""
_OWN_PAGES = 1 << 20
"""Bytes from which memory surely lies on pages of its own, as registering wants it."""


class HostOffload:
    """Tensors of some layers, by the number of the layer. One forward and its backward at a time."""

    def __init__(self) -> None:
        self._rooms: dict[int, list[Tensor]] = {}
        self._leaving: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self._coming: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def offload(self, layer: int, *tensors: Tensor) -> None:
        """Tensors of `layer` set out for the host; the caller lets go of them."""
        if not tensors[0].is_cuda:
            self._rooms[layer] = [tensor.detach() for tensor in tensors]
            return
        self._coming.clear()
        rooms = self._rooms.get(layer, [])
        if [(room.shape, room.dtype) for room in rooms] != [(tensor.shape, tensor.dtype) for tensor in tensors]:
            rooms = self._rooms[layer] = [pinned(self, tensor.shape, tensor.dtype) for tensor in tensors]
        stream = self._side(0)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for room, tensor in zip(rooms, tensors, strict=True):
                room.copy_(tensor, non_blocking=True)
        self._leaving[layer] = [tensor.detach() for tensor in tensors], stream.record_event()
        self.layer_done(layer)

    def layer_done(self, layer: int) -> None:
        """`layer` ends: what left `_LEAVING` layers before it is released.

        Layers run upward, so what is from above is of a forward that was broken off; its events must not be waited
        for, since the recording that they belonged to may have failed.
        """
        for other in list(self._leaving):
            if other > layer:
                del self._leaving[other]
            elif other <= layer - _LEAVING:
                self._land(other)

    def prefetch_below(self, layer: int) -> None:
        """`layer` begins its backward: what the layer below it keeps sets out."""
        below = layer - 1
        if below in self._rooms and self._streams is not None and below not in self._leaving | self._coming:
            self._coming[below] = self._send(below)

    def fetch(self, layer: int) -> list[Tensor]:
        """The tensors of `layer`, on the device; those of the layer below it set out."""
        if self._streams is None:
            return self._rooms.pop(layer)
        if layer in self._leaving:  # not left yet: the last layers of a forward are the first of its backward
            tensors = self._land(layer)
        else:
            tensors, arrived = self._coming.pop(layer) if layer in self._coming else self._send(layer)
            torch.cuda.current_stream().wait_event(arrived)
        self.prefetch_below(layer)
        return tensors

    def _land(self, layer: int) -> list[Tensor]:
        """Makes the main stream wait for the copy, after which the memory may be used again."""
        tensors, left = self._leaving.pop(layer)
        torch.cuda.current_stream().wait_event(left)
        return tensors

    def _send(self, layer: int) -> tuple[list[Tensor], torch.cuda.Event]:
        rooms, stream = self._rooms[layer], self._side(1)
        tensors = [torch.empty(room.shape, dtype=room.dtype, device="cuda") for room in rooms]
        stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            for tensor, room in zip(tensors, rooms, strict=True):
                tensor.copy_(room, non_blocking=True)
        return tensors, stream.record_event()

    def _side(self, which: int) -> torch.cuda.Stream:
        if self._streams is None:
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        return self._streams[which]


def pinned(owner: object, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory that the device can reach, for as long as `owner` lives.

    PyTorch's own pool of such memory rounds up to powers of two, which is too much for what is gigabytes.
    """
    room = torch.empty(shape, dtype=dtype)
    size, cuda = room.numel() * room.element_size(), torch.cuda.cudart()
    if size < _OWN_PAGES or int(cuda.cudaHostRegister(room.data_ptr(), size, 0)) != 0:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    weakref.finalize(owner, cuda.cudaHostUnregister, room.data_ptr())
    return room


def mapped(tensor: Tensor) -> Tensor:
    """A CUDA tensor with the values of one on the device (contiguous), whose memory is the host's."""
    room = _Mapped(tensor.numel() * tensor.element_size())
    there = torch.as_tensor(room, device=tensor.device).view(tensor.dtype).view(tensor.shape)
    return there.copy_(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """True for what `mapped` returns, though it says that it is on the device."""
    return tensor.is_cuda and tensor.untyped_storage().data_ptr() in _ROOMS


def mapped_zeros(count: int, device: torch.device) -> Tensor:
    """The same with so many zeros in float32."""
    return torch.as_tensor(_Mapped(4 * count), device=device).view(torch.float32).zero_()


class _Mapped:
    """Pinned bytes that show themselves as memory of the device; a tensor made of them keeps this object alive."""

    def __init__(self, size: int) -> None:
        self._room = pinned(self, torch.Size([size]), torch.uint8)
        _ROOMS.add(self._room.data_ptr())
        weakref.finalize(self, _ROOMS.discard, self._room.data_ptr())
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (self._room.data_ptr(), False), "version": 3,
        }  # fmt: skip
