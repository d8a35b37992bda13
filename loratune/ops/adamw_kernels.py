# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twin of `ops.adamw`: three launches for any number of parameters of any sizes.

    square sums    one program for each chunk of each gradient
    settle         one program: sums the chunks in order; norm, finite check, divisor; update count and bias
        corrections
    update         one program for each chunk

A table on the device holds the addresses of all tensors. A second table assigns a chunk of a tensor to each program,
so no program is idle. Parameters and moments stay at their addresses. Gradients are new in every eager step, and in a
CUDA graph they have the addresses of the capture. So gradient addresses are a table of their own. An eager step sends
it when it changes. A graph copies it on every replay, from a pinned row that belongs to the graph.

Traffic: 4 bytes per element for the sums, then 28 for the update; the memory bandwidth is the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.adamw import AdamWSettings, AdamWState

_CHUNK = 4096
_BLOCK = 1024
"""Partial sums, and update counts, that `settle` loads at a time."""
_COLUMNS = 5
"""Columns of the table: addresses of parameter, first moment, second moment and count; number of elements."""
_CAPTURES_AHEAD = 8
"""Pinned rows allocated in advance, because memory cannot be pinned during a capture. One capture uses fewer."""


@triton.jit
def _tensor(address_ptr, ALIGNED: tl.constexpr):
    tensor = tl.load(address_ptr).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # without this hint the compiler loads elements one by one
        tensor = tl.multiple_of(tensor, 16)
    return tensor


@triton.jit
def _place(places_ptr, table_ptr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """Tensor number of this program, indices of its elements, and their mask."""
    program = tl.program_id(0)
    entry, chunk = tl.load(places_ptr + program * 2), tl.load(places_ptr + program * 2 + 1)
    count = tl.load(table_ptr + entry * COLUMNS + 4)
    if ALIGNED:
        count = tl.multiple_of(count, 4)
    at = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    return entry, at, at < count


@triton.jit
def _square_sums(
    places_ptr, table_ptr, gradients_ptr, sums_ptr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    entry, at, inside = _place(places_ptr, table_ptr, ALIGNED, CHUNK, COLUMNS)
    total = 0.0
    if tl.load(gradients_ptr + entry) != 0:
        g = tl.load(_tensor(gradients_ptr + entry, ALIGNED) + at, mask=inside, other=0.0)
        total = tl.sum(g * g)
    tl.store(sums_ptr + tl.program_id(0), total)


@triton.jit
def _power(base, exponent):
    """base ** exponent for integer exponents, in the precision of base."""
    power = tl.full(exponent.shape, 1.0, tl.float64)
    for _ in range(31):
        power = tl.where((exponent & 1) == 1, power * base, power)
        base = base * base
        exponent = exponent >> 1
    return power


@triton.jit
def _settle(
    table_ptr, gradients_ptr, settings_ptr, sums_ptr, outcome_ptr, divisor_ptr, corrections_ptr,
    max_norm, tensors, programs, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        total += tl.load(sums_ptr + first + index, mask=first + index < programs, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total).to(tl.float32))
    finite = (norm < float("inf")) & (tl.abs(tl.load(outcome_ptr)) < float("inf"))  # neither holds for NaN
    tl.store(outcome_ptr + 1, norm)
    tl.store(outcome_ptr + 2, tl.where(finite, 0.0, 1.0))
    tl.store(divisor_ptr, tl.maximum((norm + 1e-6) / max_norm, 1.0))
    beta1, beta2 = tl.load(settings_ptr), tl.load(settings_ptr + 1)  # 1 - beta2 would be off by 1e-5 in float32
    for first in range(0, tensors, BLOCK):
        entry = first + index
        has_gradient = tl.load(gradients_ptr + entry, mask=entry < tensors, other=0) != 0
        step = tl.load(table_ptr + entry * COLUMNS + 3, mask=has_gradient, other=0).to(tl.pointer_type(tl.float32))
        steps = tl.load(step, mask=has_gradient, other=0.0) + tl.where(finite, 1.0, 0.0)
        tl.store(step, steps, mask=has_gradient)
        exponent = steps.to(tl.int32)
        correction1, correction2 = 1 - _power(beta1, exponent), 1 - _power(beta2, exponent)
        tl.store(corrections_ptr + entry * 2, correction1.to(tl.float32), mask=has_gradient)
        tl.store(corrections_ptr + entry * 2 + 1, tl.sqrt(correction2.to(tl.float32)), mask=has_gradient)


@triton.jit
def _update(
    places_ptr, table_ptr, gradients_ptr, settings_ptr, rate_ptr, outcome_ptr, divisor_ptr, corrections_ptr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    entry, at, inside = _place(places_ptr, table_ptr, ALIGNED, CHUNK, COLUMNS)
    if (tl.load(gradients_ptr + entry) != 0) & (tl.load(outcome_ptr + 2) == 0.0):
        beta1, beta2 = tl.load(settings_ptr), tl.load(settings_ptr + 1)
        eps, decay = tl.load(settings_ptr + 2).to(tl.float32), tl.load(settings_ptr + 3).to(tl.float32)
        rate = tl.load(rate_ptr)
        correction1, correction2 = tl.load(corrections_ptr + entry * 2), tl.load(corrections_ptr + entry * 2 + 1)
        entry_ptr = table_ptr + entry * COLUMNS
        p_ptr, m_ptr = _tensor(entry_ptr, ALIGNED) + at, _tensor(entry_ptr + 1, ALIGNED) + at
        v_ptr = _tensor(entry_ptr + 2, ALIGNED) + at
        g = tl.load(_tensor(gradients_ptr + entry, ALIGNED) + at, mask=inside, other=0.0) / tl.load(divisor_ptr)
        m, v = tl.load(m_ptr, mask=inside, other=0.0), tl.load(v_ptr, mask=inside, other=0.0)
        m += (1 - beta1).to(tl.float32) * (g - m)
        v = v * beta2.to(tl.float32) + (1 - beta2).to(tl.float32) * g * g
        p = tl.load(p_ptr, mask=inside, other=0.0) * (1 - rate * decay)
        p -= rate / correction1 * m / (tl.sqrt(v) / correction2 + eps)
        tl.store(p_ptr, p, mask=inside)
        tl.store(m_ptr, m, mask=inside)
        tl.store(v_ptr, v, mask=inside)


class ClippedAdamWLaunches:
    """Clipped AdamW for a fixed set of float32 tensors on one device, whose addresses do not change."""

    def __init__(self, state: AdamWState, settings: AdamWSettings) -> None:
        assert all(t.dtype == torch.float32 and t.is_contiguous() for tensors in state for t in tensors)
        self.addresses = addresses(state)
        counts = [parameter.numel() for parameter in state.parameters]
        places = [(entry, chunk) for entry, count in enumerate(counts) for chunk in range(-(-count // _CHUNK))]
        table = [[*row, count] for row, count in zip(zip(*self.addresses, strict=True), counts, strict=True)]
        self._aligned = not any(at % 16 for row in table for at in row[:3]) and not any(n % 4 for n in counts)
        self._state, self._count, self._programs = state, len(counts), len(places)
        device = self._device = state.parameters[0].device
        self._table = torch.tensor(table, dtype=torch.int64).to(device)
        self._places = torch.tensor(places, dtype=torch.int32).to(device)
        self._settings = torch.tensor(settings, dtype=torch.float64).to(device)
        self._sums, self._corrections = (torch.zeros(n, device=device) for n in (len(places), 2 * len(counts)))
        self._divisor = torch.ones(1, device=device)
        self._gradients = torch.zeros(len(counts), dtype=torch.int64, device=device)
        self._sent: list[int] = [0] * len(counts)
        self._spare: list[Tensor] = []
        self._captured: list[Tensor] = []

    def __call__(self, gradients: Sequence[Tensor | None], rate: Tensor, max_norm: float, outcome: Tensor) -> None:
        """As `ops.adamw.clipped_adamw`. Can be captured in a CUDA graph after one eager call.

        Raises: RuntimeError: captured before the first eager call.
        """
        gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        found = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        capturing = outcome.is_cuda and torch.cuda.is_current_stream_capturing()
        at = self._captured_addresses(found) if capturing else self._addresses_now(found)
        constants: Any = {"CHUNK": _CHUNK, "COLUMNS": _COLUMNS}
        wide = {"ALIGNED": self._aligned and not any(place % 16 for place in found), "num_warps": 8}
        places, table, grid = self._places, self._table, (self._programs,)
        _square_sums[grid](places, table, at, self._sums, **constants, **wide)
        _settle[(1,)](
            table, at, self._settings, self._sums, outcome, self._divisor, self._corrections,
            max_norm, self._count, self._programs, BLOCK=_BLOCK, COLUMNS=_COLUMNS,
        )  # fmt: skip
        _update[grid](
            places, table, at, self._settings, rate, outcome, self._divisor, self._corrections, **constants, **wide
        )

    def _addresses_now(self, found: list[int]) -> Tensor:
        """Addresses of the gradients of an eager step, on the device."""
        if self._device.type == "cuda" and len(self._spare) < _CAPTURES_AHEAD:
            rows = torch.zeros(2 * _CAPTURES_AHEAD, self._count, dtype=torch.int64, pin_memory=True)
            self._spare += rows.unbind()
        if found != self._sent:
            self._gradients.copy_(torch.tensor(found, dtype=torch.int64))
            self._sent = found
        return self._gradients

    def _captured_addresses(self, found: list[int]) -> Tensor:
        """Addresses of the gradients of a capture: a copy from a pinned row, which every replay repeats."""
        if not self._spare:
            raise RuntimeError("run one eager update before capturing updates in a CUDA graph")
        row = self._spare.pop()
        row.copy_(torch.tensor(found, dtype=torch.int64))
        self._captured.append(row)
        return row.to(self._device, non_blocking=True)


def addresses(state: AdamWState) -> list[list[int]]:
    """Addresses of all tensors that an update writes to."""
    return [[tensor.data_ptr() for tensor in tensors] for tensors in state]
