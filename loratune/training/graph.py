"""One optimizer step as a CUDA graph: the host hands over a row and launches once, instead of thousands of times.

A step of a small model is bound by launches, not by arithmetic: a Llama of 1B parameters takes 80 ms a step of 512
tokens launched one by one and a tenth of that replayed. Since every row has the same number of tokens, one recording
fits all rows. What still differs between rows are numbers, and these are read from buffers at fixed addresses:
tokens, positions, borders, which positions are trained, their targets and weights, the normaliser, the rate, and the
key of dropout, so that each replay drops anew and a run that is recorded drops what one that is not would have.

    layout   documents, longest, trained: upper bounds that are part of the recording. They grow in coarse steps and
             never shrink, so a run records two or three times at its start and then replays.
    whole    a step of one row: forward, loss, backward, clipping and update are one graph.
    parts    a step of several rows: one graph per row that adds to the gradients, and one for the update.
    ahead    the host lays out the rows of the next step while the device works on this one.
    skip     a loss or gradient that is not finite must change nothing. The host does not know before the update
             is launched, so the update itself asks (`ops.adamw`; PyTorch's fused kernel takes `found_inf`).

The first row of a layout runs without recording (which also warms up whatever compiles or allocates), the second is
recorded. If recording fails, because a model waits for the device somewhere or memory runs out, `why_not` says so and
the caller goes on with `training.step.train_step`, which computes the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.data.pack import Row
from loratune.ops.dropout import row_key
from loratune.ops.products import choosing
from loratune.training.objectives.sft import Objective, sft
from loratune.training.optim import JointAdamW
from loratune.training.recordings import Recordings
from loratune.training.step import StepResult

_SHARES = 8
"""Trained positions are rounded up to a multiple of 1/8 of the row."""


class RowLayout(NamedTuple):
    """What a recording is bound to."""

    documents: int
    longest: int
    """Tokens; documents * longest = T says that all documents are of that length."""
    trained: int
    """Positions that reach the head; those of a row that are fewer are filled up with blanks."""


def layout_for(row: Row, layouts: dict[bool, RowLayout]) -> RowLayout:
    """The layout that a row runs under, grown from the one that the last of its kind (even or not) had."""
    tokens = len(row.tokens)
    documents, longest = len(row.cu_seqlens) - 1, int(row.cu_seqlens.diff().max())
    share = -(-tokens // _SHARES)
    trained = min(tokens, -(-int((row.weights != 0).sum()) // share) * share)
    even = documents * longest == tokens
    last = layouts.get(even)
    if even:
        layout = RowLayout(documents, longest, max(trained, last.trained if last else 0))
    else:
        needed = RowLayout(_power_of_two(documents), min(tokens, _power_of_two(longest)), trained)
        layout = RowLayout(*map(max, needed, last)) if last else needed
    layouts[even] = layout
    return layout


class RowBuffers:
    """The numbers of one row in one buffer on the device, filled by one copy from pinned memory."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        fields = {
            "tokens": (torch.int64, tokens),
            "position_ids": (torch.int64, tokens),
            "predicting": (torch.int64, tokens),
            "targets": (torch.int64, tokens),
            "weights": (torch.float32, tokens),
            "borders": (torch.int32, tokens + 1),
            "normaliser": (torch.float32, 1),
            "dropout": (torch.int32, 3),  # `ops.dropout.row_key`
        }
        size = sum(dtype.itemsize * count for dtype, count in fields.values())
        self._fields, self._size = fields, size
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

    def fill(self, row: Row, layout: RowLayout, normaliser: float, nth: int) -> None:
        """Lays a row out as `layout` wants it and sends it to the device; returns before it has arrived.

        The nth row of a step has a host buffer of its own: an earlier one may not have left yet.
        """
        self.lay(row, layout, normaliser, nth)
        self.send(nth)

    def send(self, buffer: int, dropout: Tensor | None = None) -> None:
        """What lies in that host buffer goes to the device; returns before it has arrived.

        Args:
            dropout: the `row_key` that goes with it.
        """
        if dropout is not None:
            self._views(self._hosts[buffer], self._fields)["dropout"].copy_(dropout)
        self._device.copy_(self._hosts[buffer], non_blocking=True)

    def lay(self, row: Row, layout: RowLayout, normaliser: float, buffer: int) -> None:
        """Lays a row out as `layout` wants it in a host buffer, the first, second, ..."""
        while buffer >= len(self._hosts):
            pinned = self._device.is_cuda
            self._hosts.append(torch.zeros(self._size, dtype=torch.uint8, pin_memory=pinned))
        host, tokens = self._views(self._hosts[buffer], self._fields), len(row.tokens)
        host["tokens"].copy_(row.tokens)
        host["position_ids"].copy_(row.position_ids)
        host["borders"].fill_(tokens)
        host["borders"][: len(row.cu_seqlens)] = row.cu_seqlens
        trained = row.weights.nonzero().squeeze(1)
        if layout.trained == tokens:  # all positions in their order, no gathering
            host["targets"].copy_(row.targets)
            host["weights"].copy_(row.weights)
        else:
            host["predicting"].fill_(tokens)
            host["predicting"][: len(trained)] = trained
            for name, values in (("targets", row.targets), ("weights", row.weights)):
                host[name].zero_()
                host[name][: len(trained)] = values[trained]
        host["normaliser"].fill_(normaliser)


class PreparedStep(NamedTuple):
    """The rows of a step, laid out on the host."""

    rows: Sequence[Row]
    layouts: Sequence[RowLayout]
    buffers: Sequence[int]
    trained: int
    """Tokens of all rows."""


class GraphStep:
    """Optimizer steps on one device, recorded and replayed; called as `train_step` is."""

    def __init__(
        self,
        forward: PackedForward,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        objective: Objective = sft,
        *,
        record: bool = True,
    ) -> None:
        self._forward, self._parameters, self._optimizer = forward, parameters, optimizer
        self._max_grad_norm, self._objective = max_grad_norm or math.inf, objective
        self._recordings = Recordings(record)
        self._inputs: RowBuffers | None = None
        self._outcome = torch.zeros(3, device=forward.model.device)  # loss, gradient norm, skipped
        self._layouts: dict[bool, RowLayout] = {}
        self._ahead: PreparedStep | None = None
        self._turn = 0

    @property
    def why_not(self) -> str | None:
        """One line for the user once recording has failed; the instance must then not be called again."""
        return self._recordings.why_not

    @property
    def _graphs(self) -> dict[tuple[str, Hashable], torch.cuda.CUDAGraph]:
        return self._recordings.graphs

    def give_back(self) -> None:
        """Lets go of the memory that recordings hold, for work of another kind; they are made again."""
        self._recordings.forget()

    def rehearse(self, row: Row, accumulate: bool) -> bool:
        """Runs a row forward and backward and makes the recording that a step will make of it; updates nothing.

        Args:
            accumulate: gradients are added to those of other rows, as in a step of several.
        Returns: False if there is no room for the recording. One that fails for another reason is none of memory's.
        Raises: torch.OutOfMemoryError: there is no room for the row as it is.
        """
        laid = self._lay([row])
        layout = laid.layouts[0]
        assert self._inputs is not None
        self._inputs.send(laid.buffers[0])

        def work() -> None:
            if not accumulate:
                self._forget_gradients()
            self._add_row(layout)

        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulate else None
        self._recordings.run("row", layout, work)
        if not accumulate:
            self._forget_gradients()
        self._recordings.record("row", layout, work)
        self._forget_gradients()
        self._recordings.restart()
        return not self._recordings.out_of_memory

    @classmethod
    def for_device(
        cls,
        forward: PackedForward,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
    ) -> Self | None:
        """None where there are no CUDA graphs or no room for them, or a model is walked document by document."""
        on_gpu = forward.model.device.type == "cuda" and all(parameter.is_cuda for parameter in parameters)
        if not on_gpu or not forward.record or forward.road == "one by one" or forward.head is None:
            return None
        return cls(forward, parameters, optimizer, max_grad_norm)

    @choosing()
    def __call__(self, rows: Sequence[Row], upcoming: Sequence[Row] = (), *, key: int | None = None) -> StepResult:
        """One update from `rows`; must run inside `forward.installed()`.

        Args:
            upcoming: the rows of the next step, if they are known; they are laid out while the device works.
            key: of the step's dropout, `ops.dropout.dropout_key`; None takes one from torch's generator.
        """
        key = int(torch.randint(1 << 62, ())) if key is None else key
        ahead, self._ahead = self._ahead, None
        same = ahead is not None and len(rows) == len(ahead.rows) and all(map(operator.is_, rows, ahead.rows))
        laid = ahead if ahead is not None and same else self._lay(rows)
        assert self._inputs is not None
        if len(rows) == 1:
            self._inputs.send(laid.buffers[0], row_key(key))
            layout = laid.layouts[0]
            self._recordings.run("whole", layout, lambda: self._whole(layout))
            self._forget_gradients()
        else:
            self._several(laid, self._inputs, key)
        if upcoming and len(upcoming[0].tokens) == len(rows[0].tokens):
            self._ahead = self._lay(upcoming)
        loss, grad_norm, skipped = self._outcome.tolist()
        return StepResult(loss, grad_norm, laid.trained, bool(skipped))

    def _whole(self, layout: RowLayout) -> None:
        self._outcome.zero_()
        self._forget_gradients()
        self._add_row(layout)
        self._update()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    _gradients: list[Tensor | None] | None = None

    def _several(self, laid: PreparedStep, inputs: RowBuffers, key: int) -> None:
        """Gradients live at fixed addresses, where the graphs of the rows add and that of the update reads."""
        self._outcome.zero_()
        for index, parameter in enumerate(self._parameters):
            parameter.grad = None if self._gradients is None else self._gradients[index]
        if self._gradients is not None:
            torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])
        for nth, (layout, buffer) in enumerate(zip(laid.layouts, laid.buffers, strict=True)):
            inputs.send(buffer, row_key(key, nth * len(laid.rows[0].tokens)))
            if self._gradients is None:
                self._add_row(layout)
                self._gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
                for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                    parameter.grad = gradient
            else:
                self._recordings.run("row", layout, lambda layout=layout: self._add_row(layout))  # type: ignore[misc]
        self._recordings.run("update", RowLayout(0, 0, 0), self._update)
        self._forget_gradients()

    def _lay(self, rows: Sequence[Row]) -> PreparedStep:
        """Lays rows out in host buffers, those of the step before last, which have left by now."""
        if self._inputs is None or len(self._inputs.device["tokens"]) != len(rows[0].tokens):
            self._inputs = RowBuffers(len(rows[0].tokens), self._outcome.device)
            self._recordings.restart()
            self._layouts.clear()
        self._turn = 1 - self._turn
        normaliser = sum(float(row.weights.sum()) for row in rows)
        layouts = [layout_for(row, self._layouts) for row in rows]
        buffers = [2 * nth + self._turn for nth in range(len(rows))]
        for row, layout, buffer in zip(rows, layouts, buffers, strict=True):
            self._inputs.lay(row, layout, normaliser, buffer)
        return PreparedStep(rows, layouts, buffers, sum(int((row.weights != 0).sum()) for row in rows))

    def _add_row(self, layout: RowLayout) -> None:
        """Forward and backward of the row in the buffers; adds its loss to the outcome."""
        assert self._inputs is not None
        values = self._inputs.device
        with self._forward.state.dropout(values["dropout"]):
            logprobs = logprobs_in(self._forward, values, layout)
            loss = self._objective(logprobs, values["weights"][: layout.trained]) / values["normaliser"][0]
            loss.backward()
        self._outcome[0] += loss.detach()

    def _update(self) -> None:
        """Clips by global norm and updates, unless loss or norm is not finite."""
        if isinstance(self._optimizer, JointAdamW):
            self._optimizer.clipped_step(self._max_grad_norm, self._outcome)
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = norm.isfinite() & self._outcome[0].isfinite()
        skipped = (~finite).float()
        # The fused kernel divides the gradients by `grad_scale`, so clipping costs no pass of its own.
        self._optimizer.grad_scale = ((norm + 1e-6) / self._max_grad_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf  # type: ignore[attr-defined]
        self._outcome[1], self._outcome[2] = norm, skipped


def logprobs_in(forward: PackedForward, values: dict[str, Tensor], layout: RowLayout) -> Tensor:
    """(layout.trained,) log-probabilities of the row that lies in the buffers of an `RowBuffers`."""
    everywhere = layout.trained == len(values["tokens"])
    return forward.logprobs(
        values["tokens"],
        values["position_ids"],
        values["borders"][: layout.documents + 1],
        None if everywhere else values["predicting"][: layout.trained],
        values["targets"][: layout.trained],
        longest=layout.longest,
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
