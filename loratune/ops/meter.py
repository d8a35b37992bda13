"""Counts the bytes of tensors without data while operators run on them.

PyTorch can run every operator on its "meta" device, where tensors have a shape and no data. A dispatch mode sees each
operator. It adds the bytes of a storage when the storage appears and subtracts them when it dies, as an allocator
does. So the memory of a step can be read off the code of that step, without a GPU and without an estimate written by
hand.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

R = TypeVar("R")
ROUND = 512
"""Bytes of which every allocation of PyTorch is a multiple."""


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
        self.outputs: dict[object, object] = {}
        """Outputs of functions by their arguments, see `outputs_only`."""
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


def outputs_only(function: Callable[..., R], args: Sequence[object], kwargs: Mapping[str, object]) -> R:
    """The result of a function on the meta device, as a kernel allocates it: outputs and no temporaries.

    An active meter remembers the result by the shapes of the arguments, since a layer calls the same functions for
    each tile and level, and PyTorch's operators are slow on that device.

    Returns: meta tensors like the function's outputs. An output in the memory of an argument stays there.
    """
    meter = _get_current_dispatch_mode()
    if not isinstance(meter, StorageMeter):
        return function(*args, **kwargs)
    given: list[Tensor] = []
    key = (function, _described(args, given), _described(kwargs, given))
    if key not in meter.outputs:
        with _disable_current_modes(), torch.no_grad():
            found = function(*args, **kwargs)
        meter.outputs[key] = _recorded(found, given, {})
    return cast(R, _allocated(meter.outputs[key], given, {}))


def _described(value: object, given: list[Tensor]) -> object:
    """Key of an argument: equal keys give outputs of equal shapes. Its tensors are appended to `given`."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_described(each, given) for each in value)
    if isinstance(value, Mapping):
        return tuple((name, _described(each, given)) for name, each in value.items())
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    return (type(value), _described(vars(value), given)) if dataclasses.is_dataclass(value) else value


class _Recorded:
    """An output: a new tensor, or a view of argument number `source`."""

    def __init__(self, tensor: Tensor, given: Sequence[Tensor]) -> None:
        self.shape, self.dtype, self.stride = tensor.shape, tensor.dtype, tensor.stride()
        storage = tensor.untyped_storage()
        self.source = next((n for n, other in enumerate(given) if other.untyped_storage() is storage), None)
        self.offset = 0 if self.source is None else tensor.storage_offset() - given[self.source].storage_offset()

    def allocate(self, given: Sequence[Tensor]) -> Tensor:
        if self.source is None:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        whole = given[self.source]
        if (whole.shape, whole.stride(), 0) == (self.shape, self.stride, self.offset):
            return whole
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


def _recorded(found: object, given: Sequence[Tensor], known: dict[int, _Recorded]) -> object:
    """The structure of a result with a `_Recorded` for each tensor; a tensor that occurs twice has one."""
    if isinstance(found, Tensor):
        return known.setdefault(id(found), _Recorded(found, given))
    if isinstance(found, list | tuple):
        return [type(found), *(_recorded(each, given, known) for each in found)]
    return type(found), {name: _recorded(value, given, known) for name, value in vars(found).items()}


def _allocated(recorded: object, given: Sequence[Tensor], made: dict[int, Tensor]) -> object:
    """A result with the structure of `recorded`: new meta tensors, and views of arguments."""
    if isinstance(recorded, _Recorded):
        if id(recorded) not in made:
            made[id(recorded)] = recorded.allocate(given)
        return made[id(recorded)]
    if isinstance(recorded, list):
        kind, *parts = recorded
        values = [_allocated(part, given, made) for part in parts]
        return kind(*values) if issubclass(kind, tuple) and kind is not tuple else kind(values)
    kind, fields = cast(tuple[type, dict[str, object]], recorded)
    return kind(**{name: _allocated(value, given, made) for name, value in fields.items()})


def _among(storage: torch.UntypedStorage, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """True if an operator's output is a view of an argument that was made before the meter was active."""
    return any(isinstance(t, Tensor) and t.untyped_storage() is storage for t in tree_leaves((args, kwargs)))
