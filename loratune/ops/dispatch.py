"""Chooses between a reference in PyTorch and its Triton twin.

A reference runs anywhere and defines the result. Its twin has the same name and arguments and runs on a GPU in half
precision. No setting chooses: the arguments' device, dtype and shape do. On PyTorch's meta device, where the memory
of a step is counted, only the outputs of the twin are allocated, and none of the reference's temporaries.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

MAX_ROW = 1 << 16
"""Longest row, in elements, that one program of a twin loads."""


def with_kernel(
    usable: Callable[..., bool],
    module: str = "ops.layer_kernels",
    *,
    rowwise: bool = False,
    outputs: Callable[..., object] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a reference that has a Triton twin of the same name in `loratune.<module>`.

    Args:
        usable: whether the twin can take these arguments.
        rowwise: all positional tensors and all outputs have a row for each token, so that the shapes of the outputs
            on the meta device follow from a call without tokens.
        outputs: for functions that are not rowwise, allocates the outputs of the twin on the meta device.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if usable(*args, **kwargs):
                # Imported here because Triton is installed with PyTorch for CUDA only.
                kernels = importlib.import_module(f"loratune.{module}")
                twin: Callable[P, R] = getattr(kernels, reference.__name__)
                return twin(*args, **kwargs)
            if isinstance(args[0], Tensor) and args[0].is_meta:
                if outputs is not None:
                    return cast(R, outputs(*args, **kwargs))
                if rowwise and args[0].shape[0]:
                    return cast(R, _rows_of(reference, args, kwargs))
            return reference(*args, **kwargs)

        return call

    return decorate


def _rows_of(
    reference: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> Tensor | tuple[Tensor, ...]:
    """Outputs of a rowwise function without values; an output that is an argument stays that argument."""
    empty = [a[:0] if isinstance(a, Tensor) else a for a in args]
    found = cast(Tensor | tuple[Tensor, ...], reference(*empty, **kwargs))
    rows = cast(Tensor, args[0]).shape[0]
    full = {id(e): a for e, a in zip(empty, args, strict=True) if isinstance(a, Tensor)}
    for out in (found,) if isinstance(found, Tensor) else found:
        if id(out) not in full:
            full[id(out)] = out.new_empty(rows, *out.shape[1:])
    return full[id(found)] if isinstance(found, Tensor) else tuple(full[id(out)] for out in found)


def half_on_gpu(x: Tensor, *_: object, **__: object) -> bool:
    """Whether x is on a GPU, in half precision, with rows that one program can load."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= MAX_ROW


def wide(x: Tensor) -> Tensor:
    """x in the precision of sums: float64 stays, other dtypes become float32."""
    return x if x.dtype == torch.float64 else x.float()
