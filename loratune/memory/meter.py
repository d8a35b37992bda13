"""Counts the bytes of tensors without data while operators run on them.

PyTorch can run every operator on its "meta" device, where tensors have a shape and no data. A dispatch mode sees each
operator. It adds the bytes of a storage when the storage appears and subtracts them when it dies, as an allocator
does. So the memory of a step can be read off the code of that step, without a GPU and without an estimate written by
hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUND = 512
"""PyTorch's allocator hands out multiples of so many bytes."""


def rounded(size: float) -> int:
    """Bytes that PyTorch allocates for `size` bytes."""
    return -(-int(size) // ROUND) * ROUND


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of storages on the meta device that appear while it is active, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes of counted storages that are alive."""
        self.peak = 0
        """Most bytes alive at once since the start, or since it was set to `live`."""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator and counts the storages that it made."""
        out = function(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and not _among(storage, args, kwargs):
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = rounded(storage.nbytes())
        self._known.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, id(storage), size)

    def _free(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.live -= size


def _among(storage: torch.UntypedStorage, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """True if an operator's output is a view of an argument that was made before the meter was active."""
    return any(isinstance(t, Tensor) and t.untyped_storage() is storage for t in tree_leaves((args, kwargs)))
