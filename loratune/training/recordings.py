"""CUDA graphs of pieces of work: made, replayed, let go of, and what is to be mended where making one fails.

A recording keeps the memory that it ran in for as long as it lives, apart from that of other work. So rows that run
without one would need the activations of a row once more beside it, and before a new layout's first row recordings
are let go of and made again when their turn comes. A layout that has run before goes straight to its recording.

Recording fails where work waits for the device, or where memory runs out, which happens sooner than elsewhere: while
one is made, the allocator cannot give back what it holds and does not use. `torch.cuda.graph` then leaves its stream,
its pool of memory and the device's random generator as they were in the middle (PyTorch 2.11); later work would fail
or find the memory gone. `Recordings` puts these right.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch

_MAX_RECORDINGS = 4
_BROKEN: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording could not be ended: PyTorch's pool of pinned memory goes on asking them about streams."""


class Recordings:
    """Pieces of work on the device, by what they are bound to: run as they are, then recorded, then replayed."""

    why_not: str | None = None
    """One line for the user once recording has failed."""
    out_of_memory = False
    """Recording has failed for want of memory."""

    def __init__(self, record: bool = True) -> None:
        self.graphs: dict[tuple[str, Hashable], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[str, Hashable]] = set()
        self._record = record
        self._pool: Any = None

    def run(self, part: str, layout: Hashable, work: Callable[[], object]) -> None:
        """Runs `work`: as it is the first time, recording it the second, replaying from then on."""
        key = part, layout
        if not self._record or self.why_not is not None:
            work()
        elif key not in self._seen:
            self.forget()
            work()
            self._seen.add(key)
        elif key in self.graphs or self.record(part, layout, work):
            self.graphs[key].replay()
        else:
            work()

    def record(self, part: str, layout: Hashable, work: Callable[[], object]) -> bool:
        """Records `work`, which has run before, and runs nothing; False if that fails, and `why_not` says why."""
        while len(self.graphs) >= _MAX_RECORDINGS:
            del self.graphs[next(iter(self.graphs))]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, failure = torch.cuda.CUDAGraph(), ""
        before = torch.cuda.current_stream()
        # Workspaces of cuBLAS belong to a stream for good. Those of other work would be of no use meanwhile, and one
        # made in a recording would outlive it and hold its memory.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        except RuntimeError as error:
            failure, self.out_of_memory = _why(error)
        if not failure:
            torch._C._cuda_clearCublasWorkspaces()
            self.graphs[part, layout] = graph
            return True
        self.why_not = f"steps run kernel by kernel, not as one CUDA graph: {failure}"
        torch.cuda.set_stream(before)  # `torch.cuda.graph` leaves its own where the recording could not be ended
        self._clear_up(graph)
        return False

    def forget(self) -> None:
        """Gives the memory of all recordings back; work that has run before is recorded again when it comes."""
        if self.graphs:
            torch.cuda.synchronize()  # they may be running
            self.graphs.clear()
            self._pool = None  # one that nobody uses any more must not be taken up again
            torch.cuda.empty_cache()

    def restart(self) -> None:
        """The same, and all work is new."""
        self.forget()
        self._seen.clear()

    def _clear_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a recording that failed: its memory is given back, and later work finds the device as it was."""
        torch._C._cuda_clearCublasWorkspaces()
        self.graphs.clear()
        pool, self._pool = self._pool, None
        graph.reset()
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            pass  # the recording was ended in good order, and the graph has given its share of the pool back itself
        else:
            torch._C._cuda_releasePool(device, pool)
            _BROKEN.append(graph)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # The device's generator still takes itself to be recorded, until a recording ends well.
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
        torch.cuda.empty_cache()


def _why(error: RuntimeError) -> tuple[str, bool]:
    """One line on what a recording failed of, and whether it was memory.

    What ends a recording fails as well if the work has failed, and stands before the cause.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__context__) is not None:
        causes.append(cause)
    cause = next((cause for cause in causes if isinstance(cause, torch.OutOfMemoryError)), causes[-1])
    return str(cause).strip().splitlines()[0], isinstance(cause, torch.OutOfMemoryError)
