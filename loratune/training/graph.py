"""One optimizer step as a CUDA graph: the host sends a row and launches once, instead of thousands of times.

A step of a small model is bound by kernel launches. Replaying a recording removes them. Every row has the same number
of tokens, so one recording fits all rows. The numbers that differ between rows are read from buffers at fixed
addresses: tokens, positions, document boundaries, trained positions with their targets, weights and columns, the
normaliser, the rate, and the dropout key. With that key each replay draws the dropout of the eager step.

    layout   number of documents, longest document, scored positions. A recording fixes these upper bounds. They grow
             in coarse steps and never shrink, so a run records two or three times and then replays.
    whole    a step of one row is one graph: forward, loss, backward, clipping and update.
    several  a step of several rows replays one graph per row, which adds to the gradients, and one for the update.
    ahead    the host prepares the rows of the next step while the device runs this one.
    skip     a non-finite loss or gradient must change nothing. The host launches the update before it knows, so the
             update checks on the device (`training.step.ClippedOptimizer`).

The first row of a layout runs without a recording, which warms up everything that compiles or allocates. The second
row is recorded. If recording fails, because the model waits for the device or memory runs out, `why_not` gives the
reason and the caller continues with `training.step.train_step`, which runs the same definitions.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.data.pack import Row
from loratune.ops.dropout import row_key
from loratune.training.objectives.objective import Objective, TokenBatch
from loratune.training.objectives.sft import sft
from loratune.training.recordings import Recordings
from loratune.training.step import (
    DeviceRow,
    StepOptimizer,
    StepResult,
    accumulate,
    documents_of,
    finish_step,
    new_outcome,
    total_of,
    trained_tokens,
)

_SHARES = 8
"""Scored positions are rounded up to a multiple of 1/8 of the row."""


class RowLayout(NamedTuple):
    """Upper bounds that a recording fixes."""

    documents: int
    longest: int
    """Tokens of the longest document. If documents * longest = T, all documents have this length."""
    scored: int
    """Positions passed to the head. Rows with fewer trained positions are padded."""


def layout_for(row: Row, layouts: dict[bool, RowLayout]) -> RowLayout:
    """The layout for a row, grown from the last layout of its kind.

    Args:
        layouts: True for documents of one length, False for others -> last layout of that kind; updated.
    """
    tokens = len(row.tokens)
    documents, longest = len(row.cu_seqlens) - 1, int(row.cu_seqlens.diff().max())
    share = -(-tokens // _SHARES)
    scored = min(tokens, -(-trained_tokens(row) // share) * share)
    even = documents * longest == tokens
    last = layouts.get(even)
    if even:
        layout = RowLayout(documents, longest, max(scored, last.scored if last else 0))
    else:
        documents, longest = min(tokens, _power_of_two(documents)), min(tokens, _power_of_two(longest))
        needed = RowLayout(documents, longest, scored)
        layout = RowLayout(*map(max, needed, last)) if last else needed
    layouts[even] = layout
    return layout


class RowBuffers:
    """The numbers of one row in one buffer on the device, filled by one copy from pinned host memory."""

    def __init__(self, tokens: int, device: torch.device, columns: Sequence[str] = ()) -> None:
        fields = {
            "tokens": (torch.int64, tokens),
            "position_ids": (torch.int64, tokens),
            "predicting": (torch.int64, tokens),
            "targets": (torch.int64, tokens),
            "weights": (torch.float32, tokens),
            "document": (torch.int32, tokens),
            "cu_seqlens": (torch.int32, tokens + 1),
            "normaliser": (torch.float32, 1),
            "dropout": (torch.int32, 3),  # `ops.dropout.row_key`
            **{f"column {name}": (torch.float32, tokens) for name in columns},
        }
        size = sum(dtype.itemsize * count for dtype, count in fields.values())
        self.tokens, self._fields, self._size = tokens, fields, size
        self._columns = tuple(columns)
        self._hosts: list[Tensor] = []
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device = self._views(self._device, fields)

    @staticmethod
    def _views(buffer: Tensor, fields: dict[str, tuple[torch.dtype, int]]) -> dict[str, Tensor]:
        views, at = {}, 0
        for name, (dtype, count) in fields.items():
            end = at + dtype.itemsize * count
            views[name] = buffer[at:end].view(dtype)
            at = end
        return views

    def row(self, layout: RowLayout) -> DeviceRow:
        """The row in the device's buffer, as views that a recording may read."""
        values, scored = self.device, layout.scored
        columns: Mapping[str, Tensor] = {name: values[f"column {name}"][:scored] for name in self._columns}
        return DeviceRow(
            values["tokens"],
            values["position_ids"],
            values["cu_seqlens"][: layout.documents + 1],
            None if scored == self.tokens else values["predicting"][:scored],
            values["targets"][:scored],
            TokenBatch(values["weights"][:scored], values["document"][:scored], layout.documents, columns),
            layout.longest,
        )

    def prepare(self, row: Row, layout: RowLayout, normaliser: float, buffer: int) -> None:
        """Writes a row into host buffer number `buffer`, padded to `layout`."""
        while buffer >= len(self._hosts):
            self._hosts.append(torch.zeros(self._size, dtype=torch.uint8, pin_memory=self._device.is_cuda))
        host, tokens = self._views(self._hosts[buffer], self._fields), self.tokens
        host["tokens"].copy_(row.tokens)
        host["position_ids"].copy_(row.position_ids)
        host["cu_seqlens"].fill_(tokens)
        host["cu_seqlens"][: len(row.cu_seqlens)] = row.cu_seqlens
        host["normaliser"].fill_(normaliser)
        scored = {"targets": row.targets, "weights": row.weights, "document": documents_of(row)}
        scored |= {f"column {name}": row.columns[name] for name in self._columns}
        if layout.scored == tokens:  # all positions in order, without a gather
            for name, values in scored.items():
                host[name].copy_(values)
            return
        trained = row.weights.nonzero().squeeze(1)
        unused = {"predicting": tokens, "document": layout.documents}
        for name, values in {"predicting": torch.arange(tokens), **scored}.items():
            host[name].fill_(unused.get(name, 0))
            host[name][: len(trained)] = values[trained]

    def send(self, buffer: int, dropout: Tensor | None = None) -> None:
        """Copies host buffer number `buffer` to the device; returns before the copy is done.

        Args:
            dropout: `ops.dropout.row_key` of the row.
        """
        if dropout is not None:
            self._views(self._hosts[buffer], self._fields)["dropout"].copy_(dropout)
        self._device.copy_(self._hosts[buffer], non_blocking=True)


class PreparedStep(NamedTuple):
    """The rows of a step, written to host buffers."""

    rows: Sequence[Row]
    layouts: Sequence[RowLayout]
    buffers: Sequence[int]
    trained: int
    """Trained tokens of all rows."""


class GraphStep:
    """Optimizer steps on one device, recorded and replayed, with the arguments of `train_step`."""

    def __init__(
        self,
        forward: PackedForward,
        parameters: Sequence[nn.Parameter],
        optimizer: StepOptimizer,
        max_grad_norm: float,
        objective: Objective = sft,
        *,
        record: bool = True,
    ) -> None:
        self._forward, self._parameters, self._optimizer = forward, parameters, optimizer
        self._max_grad_norm, self._objective = max_grad_norm, objective
        self._recordings = Recordings(record)
        self._buffers: RowBuffers | None = None
        self._outcome = new_outcome(forward.model.device)
        self._layouts: dict[bool, RowLayout] = {}
        self._ahead: PreparedStep | None = None
        self._odd = 0
        self._gradients: list[Tensor | None] | None = None

    @property
    def why_not(self) -> str | None:
        """One line for the user once recording has failed. The instance must then not be called again."""
        return self._recordings.why_not

    @property
    def _graphs(self) -> dict[tuple[str, Hashable], torch.cuda.CUDAGraph]:
        return self._recordings.graphs

    def free_memory(self) -> None:
        """Frees the memory of the recordings for other work. They are recorded again when needed."""
        self._recordings.free()

    def rehearse(self, row: Row, accumulate: bool) -> bool:
        """Runs a row forward and backward and records it as a step would; updates nothing.

        Args:
            accumulate: gradients are added to the gradients of other rows, as in a step of several rows.
        Returns: False if memory does not suffice for the recording; True in all other cases, other failures included.
        Raises: torch.OutOfMemoryError: memory does not suffice for the row even without a recording.
        """
        prepared = self._prepare([row])
        layout = prepared.layouts[0]
        assert self._buffers is not None
        self._buffers.send(prepared.buffers[0])

        def work() -> None:
            if not accumulate:
                self._free_gradients()
            self._add_row(layout)

        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulate else None
        self._recordings.run("row", layout, work)
        if not accumulate:
            self._free_gradients()
        self._recordings.record("row", layout, work)
        self._free_gradients()
        self._recordings.restart()
        return not self._recordings.out_of_memory

    @classmethod
    def for_device(
        cls,
        forward: PackedForward,
        parameters: Sequence[nn.Parameter],
        optimizer: StepOptimizer,
        max_grad_norm: float,
        objective: Objective = sft,
    ) -> Self | None:
        """A `GraphStep`, or None if steps cannot be recorded.

        They cannot without a GPU, without memory for graphs, and for a model that runs one document at a time.
        """
        on_gpu = forward.model.device.type == "cuda" and all(parameter.is_cuda for parameter in parameters)
        if not on_gpu or not forward.record or not forward.in_one_call or forward.head is None:
            return None
        return cls(forward, parameters, optimizer, max_grad_norm, objective)

    def __call__(self, rows: Sequence[Row], upcoming: Sequence[Row] = (), *, key: int | None = None) -> StepResult:
        """One update from `rows`; must run inside `forward.installed()`.

        Args:
            upcoming: the rows of the next step, if known; they are prepared while the device works.
            key: dropout key of the step, from `ops.dropout.dropout_key`; None draws one from torch's generator.
        """
        key = int(torch.randint(1 << 62, ())) if key is None else key
        ahead, self._ahead = self._ahead, None
        same = ahead is not None and len(rows) == len(ahead.rows) and all(map(operator.is_, rows, ahead.rows))
        prepared = ahead if ahead is not None and same else self._prepare(rows)
        assert self._buffers is not None
        with self._forward.state.products.choosing():
            if len(rows) == 1:
                self._buffers.send(prepared.buffers[0], row_key(key))
                layout = prepared.layouts[0]
                self._recordings.run("whole", layout, lambda: self._whole(layout))
                self._free_gradients()
            else:
                self._several(prepared, self._buffers, key)
        if upcoming and len(upcoming[0].tokens) == len(rows[0].tokens):
            self._ahead = self._prepare(upcoming)
        return StepResult.read(self._outcome, prepared.trained)

    def _whole(self, layout: RowLayout) -> None:
        self._outcome.zero_()
        self._free_gradients()
        self._add_row(layout)
        self._finish()

    def _free_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _several(self, prepared: PreparedStep, buffers: RowBuffers, key: int) -> None:
        """Runs a step of several rows. The rows' graphs add to gradients at fixed addresses; the update reads
        them."""
        self._outcome.zero_()
        for index, parameter in enumerate(self._parameters):
            parameter.grad = None if self._gradients is None else self._gradients[index]
        if self._gradients is not None:
            torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])
        for nth, (layout, buffer) in enumerate(zip(prepared.layouts, prepared.buffers, strict=True)):
            buffers.send(buffer, row_key(key, nth * buffers.tokens))
            if self._gradients is None:
                self._add_row(layout)
                self._gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
                for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                    parameter.grad = gradient
            else:
                self._recordings.run("row", layout, lambda layout=layout: self._add_row(layout))  # type: ignore[misc]
        self._recordings.run("update", RowLayout(0, 0, 0), self._finish)
        self._free_gradients()

    def _prepare(self, rows: Sequence[Row]) -> PreparedStep:
        """Writes rows to host buffers. Steps alternate between two sets, because the last copy may still run."""
        if self._buffers is None or self._buffers.tokens != len(rows[0].tokens):
            self._buffers = RowBuffers(len(rows[0].tokens), self._outcome.device, self._objective.columns)
            self._recordings.restart()
            self._layouts.clear()
        self._odd = 1 - self._odd
        normaliser = sum(map(self._objective.normaliser, rows))
        layouts = [layout_for(row, self._layouts) for row in rows]
        buffers = [2 * nth + self._odd for nth in range(len(rows))]
        for row, layout, buffer in zip(rows, layouts, buffers, strict=True):
            self._buffers.prepare(row, layout, normaliser, buffer)
        return PreparedStep(rows, layouts, buffers, sum(map(trained_tokens, rows)))

    def _add_row(self, layout: RowLayout) -> None:
        """Runs forward and backward of the row in the device's buffers."""
        assert self._buffers is not None
        values = self._buffers.device
        normaliser = values["normaliser"][0]
        with self._forward.state.dropout(values["dropout"]):
            row = self._buffers.row(layout)
            self._outcome[0] += accumulate(
                self._forward, row, self._objective, lambda terms: total_of(terms) / normaliser
            )

    def _finish(self) -> None:
        finish_step(self._optimizer, self._max_grad_norm, self._outcome)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
