"""Activations in host memory until their backward, and tensors that a GPU reads from host memory.

A layer of a 7B model computes for about six milliseconds forward and twelve backward on 8,192 tokens. Its input, 64
MiB, crosses PCIe in little more than one. So each copy runs on a stream of its own beside the next layer, and the
device holds two or three inputs instead of one for each layer.

    forward    layer i ends -> its saved tensors leave; their device memory is free when layer i + 2 ends
    backward   layer i begins -> the saved tensors of layer i - 1 start to return

Layers that save everything on the device also call `layer_done` and `prefetch_below`. Otherwise the last tensors
offloaded below them would occupy the device until their backward, through the memory peak of the step.

Addresses are fixed (a pinned buffer for each tensor), and streams fork and join by events, so a CUDA graph can record
the copies. `Tensor.record_stream` is not used: in a recording it would keep every block until the recording ends.
Instead, a tensor that another stream reads is held until the main stream has waited for that stream. On a CPU the
host is the device, and nothing moves.

A tensor that a step reads only in part needs no copy at all. Pinned memory has an address on the device too, and
`mapped` makes a CUDA tensor of it. Kernels then access the host through the link, at a tenth of the speed of device
memory or less. A few rows of an embedding table cost no measurable time, the moments of AdamW some milliseconds.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

_LEAVING = 2
"""Layers whose tensors may be on their way to the host and still occupy the device."""
_OWN_PAGES = 1 << 20
"""Size in bytes from which an allocation has memory pages to itself, which registering requires."""
_MEMORY_TYPE, _HOST_MEMORY = 2, 1
"""CU_POINTER_ATTRIBUTE_MEMORY_TYPE and CU_MEMORYTYPE_HOST of the CUDA driver."""


class HostOffload:
    """Offloaded tensors by the number of their layer. For one forward and its backward at a time."""

    def __init__(self) -> None:
        self._buffers: dict[int, list[Tensor]] = {}
        """Host buffers of each layer; on a CPU the tensors themselves."""
        self._leaving: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self._returning: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def offload(self, layer: int, *tensors: Tensor) -> None:
        """Starts the copy of a layer's tensors to the host. The caller must free them."""
        if not tensors[0].is_cuda:
            self._buffers[layer] = [tensor.detach() for tensor in tensors]
            return
        self._returning.clear()
        buffers = self._buffers.get(layer, [])
        if [(buffer.shape, buffer.dtype) for buffer in buffers] != [(t.shape, t.dtype) for t in tensors]:
            buffers = self._buffers[layer] = [pinned(self, tensor.shape, tensor.dtype) for tensor in tensors]
        stream = self._side(0)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        self._leaving[layer] = [tensor.detach() for tensor in tensors], stream.record_event()
        self.layer_done(layer)

    def layer_done(self, layer: int) -> None:
        """Marks the end of a layer's forward, which frees the tensors of the layer `_LEAVING` below it.

        Layers run upward. Tensors of higher layers belong to a forward that was interrupted; their events must not be
        waited for, because the recording that made them may have failed.
        """
        for other in list(self._leaving):
            if other > layer:
                del self._leaving[other]
            elif other <= layer - _LEAVING:
                self._finish_leaving(other)

    def prefetch_below(self, layer: int) -> None:
        """Marks the start of a layer's backward, which starts the return of the tensors of the layer below."""
        below = layer - 1
        if below in self._buffers and self._streams is not None and below not in self._leaving | self._returning:
            self._returning[below] = self._start_return(below)

    def fetch(self, layer: int) -> list[Tensor]:
        """The tensors of a layer on the device. Starts the return of the tensors of the layer below."""
        if self._streams is None:
            return self._buffers.pop(layer)
        if layer in self._leaving:  # still there: the last layers of a forward are the first of its backward
            tensors = self._finish_leaving(layer)
        else:
            started = self._returning.pop(layer) if layer in self._returning else self._start_return(layer)
            tensors, arrived = started
            torch.cuda.current_stream().wait_event(arrived)
        self.prefetch_below(layer)
        return tensors

    def _finish_leaving(self, layer: int) -> list[Tensor]:
        """Makes the main stream wait for the copy, so that the device memory can be used again."""
        tensors, left = self._leaving.pop(layer)
        torch.cuda.current_stream().wait_event(left)
        return tensors

    def _start_return(self, layer: int) -> tuple[list[Tensor], torch.cuda.Event]:
        buffers, stream = self._buffers[layer], self._side(1)
        tensors = [torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda") for buffer in buffers]
        stream.wait_stream(torch.cuda.current_stream())  # earlier users of this memory are done then
        with torch.cuda.stream(stream):
            for tensor, buffer in zip(tensors, buffers, strict=True):
                tensor.copy_(buffer, non_blocking=True)
        return tensors, stream.record_event()

    def _side(self, which: int) -> torch.cuda.Stream:
        """The stream for copies to the host (0) or back to the device (1)."""
        if self._streams is None:
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        return self._streams[which]


def pinned(owner: object, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory that the device can access, uninitialised, for as long as `owner` lives.

    PyTorch's own pool of pinned memory rounds up to powers of two, which is too much for gigabytes.
    """
    buffer = torch.empty(shape, dtype=dtype)
    size, cuda = buffer.numel() * buffer.element_size(), torch.cuda.cudart()
    if size < _OWN_PAGES or int(cuda.cudaHostRegister(buffer.data_ptr(), size, 0)) != 0:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    weakref.finalize(owner, cuda.cudaHostUnregister, buffer.data_ptr())
    return buffer


def mapped(tensor: Tensor) -> Tensor:
    """Copies a contiguous CUDA tensor to host memory that the GPU can address; the result is a CUDA tensor too."""
    memory = _MappedMemory(tensor.numel() * tensor.element_size())
    there = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype).view(tensor.shape)
    return there.copy_(tensor)


def mapped_zeros(count: int, device: torch.device) -> Tensor:
    """(count,) float32 zeros, a CUDA tensor in host memory."""
    return torch.as_tensor(_MappedMemory(4 * count), device=device).view(torch.float32).zero_()


def is_mapped(tensor: Tensor) -> bool:
    """True for a CUDA tensor in host memory, such as a result of `mapped`. Asks the CUDA driver."""
    if not tensor.is_cuda:
        return False
    kind = ctypes.c_uint(0)
    address = ctypes.c_uint64(tensor.untyped_storage().data_ptr())
    status = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(ctypes.byref(kind), _MEMORY_TYPE, address)
    return status == 0 and kind.value == _HOST_MEMORY


class _MappedMemory:
    """Pinned bytes with the interface of device memory. A tensor made from them keeps this object alive."""

    def __init__(self, size: int) -> None:
        self._buffer = pinned(self, torch.Size([size]), torch.uint8)
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (self._buffer.data_ptr(), False), "version": 3,
        }  # fmt: skip
