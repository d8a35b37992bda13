"""Matrix products with the fastest cuBLASLt kernel, found by trial.

cuBLAS selects a kernel by rule from the sizes alone. On an H200 its selection is up to 10 % slower than the best of
the eight kernels that cuBLASLt offers for the same product (docs/lab, 26 November), and no simple rule of
ours would select better. A training step computes the same dozen products thousands of times. So each kind of product
is tried once, at its first call inside `ProductKernels.choosing`, on its own operands: ten to a hundred milliseconds.

Only kernels without a workspace are tried. They take almost no memory and do not split reductions, and on the GPUs
seen so far all of them give the same bits, whichever wins the trial. PyTorch's own selection stays unless a kernel is
faster by 1 %, or by 5 % if the bits differ because PyTorch's kernel splits the reduction.

PyTorch's products are used on a CPU, under `torch.use_deterministic_algorithms`, and for kinds that were not tried.
The choices belong to one forward (`ops.state`), so a trial for one model never runs inside the step of another.

cuBLASLt is called through its C interface (docs.nvidia.com/cuda/cublas), in the library that PyTorch has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_SMALLEST = 64
"""Smallest number of rows, columns and terms for which kernels are tried."""
_CANDIDATES = 16
"""Kernels requested from cuBLASLt; CUDA 13.0 offers at most eight."""
_SAMPLE = 8
"""Rows whose results are compared bit by bit."""
_FASTER, _FASTER_IN_OTHER_BITS = 0.99, 0.95
"""Largest time of a chosen kernel as a fraction of PyTorch's, for equal bits and for different bits."""
_ROUNDS, _BEST, _ROUND_MS, _MOST_RUNS = 2, 3, 0.3, 20
"""All candidates run `_ROUNDS` rounds of about `_ROUND_MS`, at most `_MOST_RUNS` products each. The `_BEST` of them
then run three times as many rounds, alternating with PyTorch's kernel."""
_AHEAD = 400_000
"""Clock cycles that the device waits before a measurement, so that launch overhead on the host is not measured."""

_COMPUTE_32F, _R_32F = 68, 0
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_TRANS_A, _TRANS_B = 3, 4
_MAX_WORKSPACE, _MIN_ALIGNMENTS, _ALIGNMENT = 1, (5, 6, 7, 8), 16


class MatrixProduct(Protocol):
    """A function with the signature of `mm`."""

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a b, (N, K) (K, M) -> (N, M)."""


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.mm`, the product outside of a forward with chosen kernels."""
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


class BlasLayout(NamedTuple):
    """A row-major matrix as column-major BLAS reads it: the matrix in memory, and whether BLAS transposes it."""

    transposed: bool
    rows: int
    columns: int
    leading: int


class _HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


class _Descriptors:
    """cuBLASLt's description of one kind of product, destroyed with the last kernel that uses it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.product = c_void_p()
        self.layouts = [c_void_p() for _ in range(3)]
        """Layouts of the left operand, the right operand and the result."""
        weakref.finalize(self, _destroy, library, self.product, self.layouts)


def _destroy(library: ctypes.CDLL, product: c_void_p, layouts: Sequence[c_void_p]) -> None:
    if product:
        library.cublasLtMatmulDescDestroy(product)
    for layout in filter(None, layouts):
        library.cublasLtMatrixLayoutDestroy(layout)


@dataclass(frozen=True)
class _BlasKernel:
    """A cuBLASLt kernel for one kind of product."""

    library: ctypes.CDLL
    descriptors: _Descriptors
    found: _HeuristicResult
    """Result of cuBLASLt's heuristic; its first field, the algorithm, is passed back to run the kernel."""

    def __call__(self, a: Tensor, b: Tensor, out: Tensor) -> bool:
        """Fills `out`; False if the kernel refuses the operands."""
        left, right, result = self.descriptors.layouts
        status: int = self.library.cublasLtMatmul(
            torch.cuda.current_blas_handle(), self.descriptors.product, byref(_ONE), b.data_ptr(), left, a.data_ptr(),
            right, byref(_ZERO), out.data_ptr(), result, out.data_ptr(), result, byref(self.found), None, 0,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return status == 0


_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class ProductKernels:
    """Kernels chosen for the products of one forward. Used by one thread at a time."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[object, ...], _BlasKernel | None] = {}
        """Kind of product (shapes, strides, dtypes, devices) -> its kernel; None is PyTorch's own."""
        self._is_choosing = False

    @contextlib.contextmanager
    def choosing(self) -> Iterator[None]:
        """Context in which new kinds of products are tried at their first call."""
        before, self._is_choosing = self._is_choosing, True
        try:
            yield
        finally:
            self._is_choosing = before

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a b, (N, K) (K, M) -> (N, M), like `torch.mm`. Records no gradient."""
        known = a.is_cuda and (self._is_choosing or len(self._chosen) > 0)
        if known and not torch.are_deterministic_algorithms_enabled():
            key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (a, b, out) if t is not None)
            kernel = self._kernel(key, a, b, out)
            if kernel is not None:
                result = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
                if kernel(a, b, result):
                    return result
                self._chosen[key] = None
        return mm(a, b, out)

    def _kernel(self, key: tuple[object, ...], a: Tensor, b: Tensor, out: Tensor | None) -> _BlasKernel | None:
        """The kernel chosen for this kind of product, tried now if it is new; None for PyTorch's."""
        matrices = [matrix for matrix in (a, b, out) if matrix is not None]
        if (
            any(matrix.data_ptr() % _ALIGNMENT for matrix in matrices)
            or a.device.index != torch.cuda.current_device()
        ):
            return None
        if key not in self._chosen and self._is_choosing and not torch.cuda.is_current_stream_capturing():
            self._chosen[key] = _fastest(a, b, a.new_empty(a.shape[0], b.shape[1]) if out is None else out)
        return self._chosen.get(key)


def blas_layout(matrix: Tensor) -> BlasLayout | None:
    """Layout of a matrix for BLAS; None if neither its rows nor its columns are contiguous.

    BLAS is column-major: it reads the rows of a PyTorch matrix as columns, so it sees the transpose. A product a b is
    therefore requested as bᵀ aᵀ.
    """
    rows, columns = matrix.shape
    down, across = matrix.stride()
    if across == 1 and down >= columns:
        return BlasLayout(False, columns, rows, down)
    if down == 1 and across >= rows:
        return BlasLayout(True, rows, columns, across)
    return None


def _fastest(a: Tensor, b: Tensor, out: Tensor) -> _BlasKernel | None:
    """Tries all kernels on these operands. `out` holds one of the results afterwards."""
    candidates = _candidates(a, b, out)
    if not candidates:
        return None
    usual = functools.partial(torch.mm, a, b, out=out)
    usual()
    sample = out[:: max(1, len(out) // _SAMPLE)]  # a split reduction changes many elements
    expected = sample.clone()
    able, limits = list[_BlasKernel](), list[float]()
    for kernel in candidates:
        if kernel(a, b, out):
            able.append(kernel)
            limits.append(_FASTER if torch.equal(sample, expected) else _FASTER_IN_OTHER_BITS)
    works: list[Callable[[], object]] = [functools.partial(kernel, a, b, out) for kernel in able]
    runs = max(1, min(_MOST_RUNS, int(_ROUND_MS / max(1e-3, _milliseconds(usual, 1)))))
    times = _interleaved(works, runs, _ROUNDS)
    best = sorted(range(len(able)), key=times.__getitem__)[:_BEST]
    own, *times = _interleaved([usual, *(works[nth] for nth in best)], runs, 3 * _ROUNDS)
    allowed = [(time, nth) for time, nth in zip(times, best, strict=True) if time < own * limits[nth]]
    return able[min(allowed)[1]] if allowed else None


def _interleaved(works: Sequence[Callable[[], object]], runs: int, rounds: int) -> list[float]:
    """Median milliseconds of each work over `rounds` interleaved rounds of `runs` runs."""
    times = [[_milliseconds(work, runs) for work in works] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def _milliseconds(work: Callable[[], object], runs: int) -> float:
    """Mean milliseconds of one run on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    start.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / runs


def _candidates(a: Tensor, b: Tensor, out: Tensor) -> list[_BlasKernel]:
    """cuBLASLt's kernels for a b that need no workspace, in its order of preference."""
    left, right, result = blas_layout(b), blas_layout(a), blas_layout(out)
    library = _library()
    same = a.dtype == b.dtype == out.dtype and a.dtype in _TYPES
    if library is None or not same or min(*a.shape, b.shape[1]) < _SMALLEST:
        return []
    if left is None or right is None or result is None or result.transposed:
        return []
    preference, descriptors = c_void_p(), _Descriptors(library)
    product, layouts = descriptors.product, descriptors.layouts
    status = [library.cublasLtMatmulDescCreate(byref(product), _COMPUTE_32F, _R_32F)]
    for attribute, matrix in ((_TRANS_A, left), (_TRANS_B, right)):
        value = c_int32(matrix.transposed)
        status.append(library.cublasLtMatmulDescSetAttribute(product, attribute, byref(value), ctypes.sizeof(value)))
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
    found, count = (_HeuristicResult * _CANDIDATES)(), c_int()
    failed = library.cublasLtMatmulAlgoGetHeuristic(
        torch.cuda.current_blas_handle(), product, *layouts, layouts[2], preference, _CANDIDATES, found, byref(count)
    )
    library.cublasLtMatmulPreferenceDestroy(preference)
    if failed:
        return []
    return [_BlasKernel(library, descriptors, found[nth]) for nth in range(count.value) if found[nth].state == 0]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The cuBLASLt that PyTorch has loaded; None if it cannot be opened."""
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
    for kind in ("MatmulPreference", "MatmulDesc", "MatrixLayout"):
        getattr(library, f"cublasLt{kind}Destroy").argtypes = [pointer]
    return library
