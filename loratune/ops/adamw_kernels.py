# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twin of `ops.adamw`: all parameters in three launches, whatever their number and sizes.

    square sums    of each chunk of each gradient
    settle         adds them up in their order; norm, check, divisor; counts the update, and corrects for it
    update         each chunk

Where tensors lie is a table on the device, and which chunk of which tensor a program takes is another, so that no
program is idle. Parameters and moments stay where they are; gradients are new in every step launched by hand, and in
a recording they are at the addresses that they had when it was recorded. So the gradients' addresses are a table of
their own: sent when they have changed, or as part of the recording, from pinned memory that each recording keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.adamw import Held, Settings

_CHUNK = 4096
_BLOCK = 1024
"""Sums, and tensors, that the settling program takes at once."""
_COLUMNS = 5
"""Of the table: addresses of parameter, first and second moment and count, and the number of elements."""
_RECORDINGS_AHEAD = 8
"""Pinned rows kept ready: memory cannot be pinned while a graph is recorded. More than are recorded in one go."""


@triton.jit
def _tensor(address_ptr, ALIGNED: tl.constexpr):
    tensor = tl.load(address_ptr).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # without this the compiler must take numbers one by one
        tensor = tl.multiple_of(tensor, 16)
    return tensor


@triton.jit
def _place(places_ptr, table_ptr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """The tensor of this program, the elements of it, and which of them there are."""
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
    """base ** exponent for whole exponents, in the precision of base."""
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
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        total += tl.load(sums_ptr + first + lane, mask=first + lane < programs, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total).to(tl.float32))
    finite = (norm < float("inf")) & (tl.abs(tl.load(outcome_ptr)) < float("inf"))  # neither holds for NaN
    tl.store(outcome_ptr + 1, norm)
    tl.store(outcome_ptr + 2, tl.where(finite, 0.0, 1.0))
    tl.store(divisor_ptr, tl.maximum((norm + 1e-6) / max_norm, 1.0))
    beta1, beta2 = tl.load(settings_ptr), tl.load(settings_ptr + 1)  # 1 - beta2 would be off by 1e-5 in float32
    for first in range(0, tensors, BLOCK):
        entry = first + lane
        reached = tl.load(gradients_ptr + entry, mask=entry < tensors, other=0) != 0
        step = tl.load(table_ptr + entry * COLUMNS + 3, mask=reached, other=0).to(tl.pointer_type(tl.float32))
        steps = tl.load(step, mask=reached, other=0.0) + tl.where(finite, 1.0, 0.0)
        tl.store(step, steps, mask=reached)
        exponent = steps.to(tl.int32)
        correction1, correction2 = 1 - _power(beta1, exponent), 1 - _power(beta2, exponent)
        tl.store(corrections_ptr + entry * 2, correction1.to(tl.float32), mask=reached)
        tl.store(corrections_ptr + entry * 2 + 1, tl.sqrt(correction2.to(tl.float32)), mask=reached)


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


class Updates:
    """Updates of the same float32 tensors on one device, which stay where they are."""

    def __init__(self, held: Held, settings: Settings) -> None:
        assert all(t.dtype == torch.float32 and t.is_contiguous() for tensors in held for t in tensors)
        self.addresses = addresses(held)
        counts = [parameter.numel() for parameter in held.parameters]
        places = [(entry, chunk) for entry, count in enumerate(counts) for chunk in range(-(-count // _CHUNK))]
        table = [[*row, count] for row, count in zip(zip(*self.addresses, strict=True), counts, strict=True)]
        self._aligned = not any(at % 16 for row in table for at in row[:3]) and not any(n % 4 for n in counts)
        self._held, self._count, self._programs = held, len(counts), len(places)
        device = self._device = held.parameters[0].device
        self._table = torch.tensor(table, dtype=torch.int64).to(device)
        self._places = torch.tensor(places, dtype=torch.int32).to(device)
        self._settings = torch.tensor(settings, dtype=torch.float64).to(device)
        self._sums, self._corrections = (torch.zeros(n, device=device) for n in (len(places), 2 * len(counts)))
        self._divisor = torch.ones(1, device=device)
        self._gradients = torch.zeros(len(counts), dtype=torch.int64, device=device)
        self._sent: list[int] = [0] * len(counts)
        self._spare: list[Tensor] = []
        self._recorded: list[Tensor] = []

    def __call__(self, gradients: Sequence[Tensor | None], rate: Tensor, max_norm: float, outcome: Tensor) -> None:
        """As `ops.adamw.clipped_adamw`. May be recorded in a CUDA graph once it has been called outside of one."""
        gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        found = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        recording = outcome.is_cuda and torch.cuda.is_current_stream_capturing()
        at = self._of_recording(found) if recording else self._of_now(found)
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

    def _of_now(self, found: list[int]) -> Tensor:
        if self._device.type == "cuda" and len(self._spare) < _RECORDINGS_AHEAD:
            rows = torch.zeros(2 * _RECORDINGS_AHEAD, self._count, dtype=torch.int64, pin_memory=True)
            self._spare += rows.unbind()
        if found != self._sent:
            self._gradients.copy_(torch.tensor(found, dtype=torch.int64))
            self._sent = found
        return self._gradients

    def _of_recording(self, found: list[int]) -> Tensor:
        """A copy that is part of the recording, which reads its row again whenever it is replayed."""
        if not self._spare:
            raise RuntimeError("an update must be made once outside of a recording before it is recorded")
        row = self._spare.pop()
        row.copy_(torch.tensor(found, dtype=torch.int64))
        self._recorded.append(row)
        return row.to(self._device, non_blocking=True)


def addresses(held: Held) -> list[list[int]]:
    """Of everything that an update writes to."""
    return [[tensor.data_ptr() for tensor in tensors] for tensors in held]
