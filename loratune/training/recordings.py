"""CUDA graphs of pieces of work: recorded, replayed and freed, with repairs after a recording that failed.

A recording keeps its memory for as long as it lives, and no other work can use that memory. Work that runs without a
recording would need a row's activations a second time. So all recordings are freed before the first row of a new
layout, and each is recorded again when its layout comes back.

Recording fails if the work waits for the device, or if memory runs out. A recording needs more memory than the same
work without one, because the allocator cannot return unused memory meanwhile. After a failure `torch.cuda.graph`
leaves its stream, its memory pool and the device's random generator in their recording state (PyTorch 2.11). Later
work would then fail or lack that memory, so `Recordings` repairs all three.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

_MAX_RECORDINGS = 4
_CAPTURE = "thread_local"
"""Forbidden calls end a recording only if its own thread makes them: another model may train in another thread."""
_ONE_AT_A_TIME = threading.RLock()
"""Held while a recording is made or freed. Both wait for the whole device, which CUDA forbids during a recording of
any thread."""


class Recordings:
    """Pieces of work on the device by layout: run the first time, recorded the second, then replayed."""

    why_not: str | None = None
    """One line for the user once recording has failed."""
    out_of_memory = False
    """True if recording failed because memory ran out."""

    def __init__(self, record: bool = True) -> None:
        self.graphs: dict[tuple[str, Hashable], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[str, Hashable]] = set()
        self._record = record
        self._pool: Any = None

    def run(self, part: str, layout: Hashable, work: Callable[[], object]) -> None:
        """Runs `work`: directly, while recording it, or by replaying its recording."""
        key = part, layout
        if not self._record or self.why_not is not None:
            work()
        elif key not in self._seen:
            self.free()
            work()
            self._seen.add(key)
        elif key in self.graphs or self.record(part, layout, work):
            self.graphs[key].replay()
        else:
            work()

    def record(self, part: str, layout: Hashable, work: Callable[[], object]) -> bool:
        """Records `work`, which must have run before, without running it. False if that fails; see `why_not`."""
        while len(self.graphs) >= _MAX_RECORDINGS:
            del self.graphs[next(iter(self.graphs))]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, failure = torch.cuda.CUDAGraph(), ""
        before = torch.cuda.current_stream()
        # cuBLAS keeps one workspace per stream for good. A workspace made by other work is useless in a recording,
        # and a workspace made in a recording would outlive it and hold its memory.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with _ONE_AT_A_TIME, torch.cuda.graph(graph, pool=self._pool, capture_error_mode=_CAPTURE):
                work()
        except RuntimeError as error:
            failure, self.out_of_memory = _cause(error)
        if not failure:
            torch._C._cuda_clearCublasWorkspaces()
            self.graphs[part, layout] = graph
            return True
        self.why_not = f"steps run kernel by kernel, not as one CUDA graph: {failure}"
        torch.cuda.set_stream(before)  # `torch.cuda.graph` leaves its own if the recording could not be ended
        self._repair(graph)
        return False

    def free(self) -> None:
        """Frees the memory of all recordings. Known work is recorded again when it comes back."""
        if not self.graphs:
            return
        with _ONE_AT_A_TIME:
            torch.cuda.synchronize()  # they may be running
            self.graphs.clear()
            self._pool = None  # a pool without users must not be used again
            torch.cuda.empty_cache()

    def restart(self) -> None:
        """Frees all recordings and treats all work as new."""
        self.free()
        self._seen.clear()

    def _repair(self, graph: torch.cuda.CUDAGraph) -> None:
        """Frees the memory of a failed recording and restores the device's state."""
        torch._C._cuda_clearCublasWorkspaces()
        self.graphs.clear()
        pool, self._pool = self._pool, None
        graph.reset()
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            pass  # the recording ended normally, and the graph has already released its share of the pool
        else:
            torch._C._cuda_releasePool(device, pool)
            _never_free(graph)
        gc.collect()
        with _ONE_AT_A_TIME:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # The device's generator stays in its recording state until a recording ends well.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=_CAPTURE):
                torch.zeros(1, device="cuda")
            torch.cuda.empty_cache()


def _never_free(graph: torch.cuda.CUDAGraph) -> None:
    """Takes a reference that is never released.

    PyTorch's allocator of pinned memory keeps a pointer to a graph whose recording could not be ended, and calls it
    on every later allocation (`CachingHostAllocator`, PyTorch 2.11). The graph must therefore live as long as the
    process, longer than any object of ours. It holds no device memory after `reset`.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))


def _cause(error: RuntimeError) -> tuple[str, bool]:
    """The reason why a recording failed, in one line, and whether it is memory.

    Ending the recording fails too if the work has failed, and PyTorch raises that error on top of the cause.
    """
    causes: list[BaseException] = [error]
    while (context := causes[-1].__context__) is not None:
        causes.append(context)
    cause = next((cause for cause in causes if isinstance(cause, torch.OutOfMemoryError)), causes[-1])
    return str(cause).strip().splitlines()[0], isinstance(cause, torch.OutOfMemoryError)
