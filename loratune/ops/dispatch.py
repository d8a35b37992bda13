"""Chooses between a reference in PyTorch and its Triton twin.

A reference runs anywhere and defines the result. Its twin has the same name and arguments and runs on a GPU in half
precision. No setting chooses: the arguments' device, dtype and shape do.

PyTorch's meta device, where tensors have shapes and no data, behaves like a GPU here. The memory of a step is counted
on it (`ops.meter`), so a function with a twin allocates the outputs of the twin, and none of the temporaries that
the reference has and the twin keeps in registers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from loratune.ops.meter import outputs_only

P = ParamSpec("P")
R = TypeVar("R")

MAX_ROW = 1 << 16
"""Longest row, in elements, that one program of a twin loads."""


def with_kernel(usable: Callable[..., bool], module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a reference that has a Triton twin of the same name in `loratune.<module>`.

    The twin must allocate its outputs and nothing else of their size, and overwrite an argument where the reference
    does.

    Args:
        usable: whether the twin can take these arguments; on the meta device, whether it could on a GPU (`on_gpu`).
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not usable(*args, **kwargs):
                return reference(*args, **kwargs)
            if _first_tensor(args).is_meta:
                return outputs_only(reference, args, kwargs)
            # Imported here because Triton is installed with PyTorch for CUDA only.
            kernels = importlib.import_module(f"loratune.{module}")
            twin: Callable[P, R] = getattr(kernels, reference.__name__)
            return twin(*args, **kwargs)

        return call

    return decorate


def _first_tensor(args: object) -> Tensor:
    """The first argument, or the first tensor of a sequence of operands."""
    while not isinstance(args, Tensor):
        assert isinstance(args, Sequence)
        args = args[0]
    return args


def on_gpu(x: Tensor) -> bool:
    """True on a GPU, and on the meta device."""
    return x.is_cuda or x.is_meta


def half_on_gpu(x: Tensor, *_: object, **__: object) -> bool:
    """True if x is on a GPU, in half precision, with rows that one program can load."""
    return on_gpu(x) and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= MAX_ROW


def at_least_float32(x: Tensor) -> Tensor:
    """x in the precision of sums: float64 stays, other dtypes become float32."""
    return x if x.dtype == torch.float64 else x.float()


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy if its elements are not adjacent within a row."""
    return x if x.stride(-1) == 1 else x.contiguous()
