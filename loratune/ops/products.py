"""Products of two matrices by the fastest kernel that cuBLASLt has for them, found by trying.

cuBLAS takes a kernel by rule, from the sizes alone, and on an H200 it is up to 10 % slower than the best of the eight
that cuBLASLt names for the same product (benchmarks/NOTES.md, 26 November); which one is best no rule of ours would
know either. A training step asks for the same dozen products thousands of times, so each is tried where it first
occurs within `choosing`, on its own operands and into its own result: ten to a hundred milliseconds.

What is tried needs no workspace, so it takes next to no memory and does not cut its sums into pieces: on the GPUs
seen so far all such kernels give the same bits, whichever of them was a little faster on the day. Where PyTorch's own
choice is as fast it stays, and where that gives other bits, since it has cut its sums, if it is nearly as fast. On a
CPU, under `torch.use_deterministic_algorithms`, and for whatever was never tried, these are PyTorch's products.

cuBLASLt is called through its C interface (docs.nvidia.com/cuda/cublas), in the library that PyTorch has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = 64
"""Rows, columns and terms from which a product is worth it."""
_CANDIDATES = 16
"""Kernels asked for; cuBLASLt of CUDA 13.0 names eight at most."""
_SAMPLE = 8
"""Rows by which results are compared."""
_FASTER, _FASTER_IN_OTHER_BITS = 0.99, 0.95
"""Part of the time of PyTorch's choice that another one may take at most to be taken."""
_ROUNDS, _BEST, _ROUND_MS, _MOST_RUNS = 2, 3, 0.3, 20
"""Candidates run by turns, so many rounds of about so long, and the best three times as many beside PyTorch's."""
_AHEAD = 400_000
"""Clocks that the device waits first, so that the host's launches are not what is measured."""

_COMPUTE_32F, _R_32F = 68, 0
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_TRANS_A, _TRANS_B = 3, 4
_MAX_WORKSPACE, _MIN_ALIGNMENTS, _ALIGNMENT = 1, (5, 6, 7, 8), 16


class Stored(NamedTuple):
    """A matrix as the Fortran order of BLAS sees it: what lies in memory, and whether that is to be transposed."""

    transposed: bool
    rows: int
    columns: int
    leading: int


class _Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class _Kernel:
    """One of cuBLASLt's, for one kind of product."""

    library: ctypes.CDLL
    product: c_void_p
    layouts: Sequence[c_void_p]
    """Of the left operand, the right one, and the result."""
    found: _Result
    """Its first field is what cuBLASLt wants to see again."""

    def __call__(self, a: Tensor, b: Tensor, out: Tensor) -> bool:
        """Fills `out`; False if it cannot."""
        left, right, result = self.layouts
        status: int = self.library.cublasLtMatmul(
            torch.cuda.current_blas_handle(), self.product, byref(_ONE), b.data_ptr(), left, a.data_ptr(), right,
            byref(_ZERO), out.data_ptr(), result, out.data_ptr(), result, byref(self.found), None, 0,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return status == 0


_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
_chosen: dict[tuple[object, ...], _Kernel | None] = {}
"""For each kind of product that was tried; None where PyTorch's choice stays."""
_is_choosing = False


@contextlib.contextmanager
def choosing() -> Iterator[None]:
    """Within, products that have not been tried yet are."""
    global _is_choosing
    before, _is_choosing = _is_choosing, True
    try:
        yield
    finally:
        _is_choosing = before


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, (N, K) (K, M) -> (N, M), as `torch.mm`; called where no gradient is recorded."""
    if a.is_cuda and (_chosen or _is_choosing) and not torch.are_deterministic_algorithms_enabled():
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (a, b, out) if t is not None)
        kernel = _kernel(key, a, b, out)
        if kernel is not None:
            result = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
            if kernel(a, b, result):
                return result
            _chosen[key] = None
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def _kernel(key: tuple[object, ...], a: Tensor, b: Tensor, out: Tensor | None) -> _Kernel | None:
    """What was chosen for such a product, or is now; None for PyTorch's."""
    matrices = [matrix for matrix in (a, b, out) if matrix is not None]
    if any(matrix.data_ptr() % _ALIGNMENT for matrix in matrices) or a.device.index != torch.cuda.current_device():
        return None
    if key not in _chosen and _is_choosing and not torch.cuda.is_current_stream_capturing():
        _chosen[key] = _fastest(a, b, a.new_empty(a.shape[0], b.shape[1]) if out is None else out)
    return _chosen.get(key)


def stored(matrix: Tensor) -> Stored | None:
    """How BLAS sees it; None if neither its rows nor its columns are contiguous.

    In Fortran's order the rows of PyTorch's matrices are columns, so a matrix is its own transpose there, and a b is
    asked for as bᵀ aᵀ.
    """
    rows, columns = matrix.shape
    down, across = matrix.stride()
    if across == 1 and down >= columns:
        return Stored(False, columns, rows, down)
    if down == 1 and across >= rows:
        return Stored(True, rows, columns, across)
    return None


def _fastest(a: Tensor, b: Tensor, out: Tensor) -> _Kernel | None:
    """Tried on these operands; `out` holds one result or another afterwards."""
    candidates = _candidates(a, b, out)
    if not candidates:
        return None
    usual = functools.partial(torch.mm, a, b, out=out)
    usual()
    sample = out[:: max(1, len(out) // _SAMPLE)]  # if sums were cut, many elements show it
    expected = sample.clone()
    able, limits = list[_Kernel](), list[float]()
    for kernel in candidates:
        if kernel(a, b, out):
            able.append(kernel)
            limits.append(_FASTER if torch.equal(sample, expected) else _FASTER_IN_OTHER_BITS)
    works: list[Callable[[], object]] = [functools.partial(kernel, a, b, out) for kernel in able]
    runs = max(1, min(_MOST_RUNS, int(_ROUND_MS / max(1e-3, _milliseconds(usual, 1)))))
    times = _by_turns(works, runs, _ROUNDS)
    best = sorted(range(len(able)), key=times.__getitem__)[:_BEST]
    own, *times = _by_turns([usual, *(works[nth] for nth in best)], runs, 3 * _ROUNDS)
    allowed = [(time, nth) for time, nth in zip(times, best, strict=True) if time < own * limits[nth]]
    return able[min(allowed)[1]] if allowed else None


def _by_turns(works: Sequence[Callable[[], object]], runs: int, rounds: int) -> list[float]:
    """Milliseconds of each, the median of so many rounds of so many runs."""
    times = [[_milliseconds(work, runs) for work in works] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def _milliseconds(work: Callable[[], object], runs: int) -> float:
    """Of one of so many runs, on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    start.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / runs


def _candidates(a: Tensor, b: Tensor, out: Tensor) -> list[_Kernel]:
    """What cuBLASLt names for a b without a workspace, its own favourite first."""
    left, right, result = stored(b), stored(a), stored(out)
    library = _library()
    same = a.dtype == b.dtype == out.dtype and a.dtype in _TYPES
    if library is None or not same or min(*a.shape, b.shape[1]) < _SMALLEST:
        return []
    if left is None or right is None or result is None or result.transposed:
        return []
    product, preference = c_void_p(), c_void_p()
    status = [library.cublasLtMatmulDescCreate(byref(product), _COMPUTE_32F, _R_32F)]
    for attribute, matrix in ((_TRANS_A, left), (_TRANS_B, right)):
        value = c_int32(matrix.transposed)
        status.append(library.cublasLtMatmulDescSetAttribute(product, attribute, byref(value), ctypes.sizeof(value)))
    layouts = [c_void_p() for _ in range(3)]
    for layout, matrix in zip(layouts, (left, right, result), strict=True):
        sizes = c_uint64(matrix.rows), c_uint64(matrix.columns), c_int64(matrix.leading)
        status.append(library.cublasLtMatrixLayoutCreate(byref(layout), _TYPES[a.dtype], *sizes))
    status.append(library.cublasLtMatmulPreferenceCreate(byref(preference)))
    limits = [(_MAX_WORKSPACE, c_uint64(0)), *((side, c_int32(_ALIGNMENT)) for side in _MIN_ALIGNMENTS)]
    for attribute, limit in limits:
        size = ctypes.sizeof(limit)
        status.append(library.cublasLtMatmulPreferenceSetAttribute(preference, attribute, byref(limit), size))
    if any(status):
        return []
    found, count = (_Result * _CANDIDATES)(), c_int()
    failed = library.cublasLtMatmulAlgoGetHeuristic(
        torch.cuda.current_blas_handle(), product, *layouts, layouts[2], preference, _CANDIDATES, found, byref(count)
    )
    library.cublasLtMatmulPreferenceDestroy(preference)
    if failed:
        return []
    return [_Kernel(library, product, layouts, found[nth]) for nth in range(count.value) if found[nth].state == 0]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """cuBLASLt as PyTorch has loaded it; None where that is not to be had."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None
    pointer = c_void_p
    library.cublasLtMatmul.argtypes = [*[pointer] * 14, c_size_t, pointer]
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = [*[pointer] * 7, c_int, pointer, pointer]
    library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, c_int, pointer, c_size_t]
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = [pointer, c_int, pointer, c_size_t]
    library.cublasLtMatmulPreferenceDestroy.argtypes = [pointer]
    return library
