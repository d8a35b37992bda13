"""Runs one packed row through any causal language model: from tokens to log-probabilities of chosen targets.

transformers has hundreds of architectures, and none is known here by name. `prepare` runs a few tokens through the
model that will be trained, on each execution path, fastest first. It takes the first path whose result equals that
of the documents run one at a time:

    packed          our attention by document, through transformers' attention interface (`ops.attention.documents`)
    position mask   the model's own attention, with the mask that transformers derives from restarting positions
    document mask   the model's own attention, with our mask (`base.masks`)
    padded batches  documents of similar length as batches, padded on the right (`base.batches`)
    per document    one document at a time

On the first three a row is one call, and positions reach the model by a rule that is found too (`base.positions`).

Models may compute differently behind a certain length: a window, or frequencies of a long context. So a path must
also reproduce a row with a document longer than every such length in the configuration (`base.lengths`).

The head is found likewise. If hidden states, output embeddings, scale and soft cap give the model's own logits, the
head runs in chunks over trained tokens only. Otherwise the model computes its logits itself.

On a GPU decoder layers may run fused (`fused.layer`). They too are measured: with random adapters in use, hidden
states and gradients must equal those of the modules. So "packed equals unpacked" and "fused equals modules" are
measurements on the model, not promises about an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.base import batches, masks, one_pass, recompute, row_layers
from loratune.base.causal import backbone_of, check_causal, check_logits
from loratune.base.head import HeadTail, find_head
from loratune.base.lengths import long_row, restart_rotary
from loratune.base.offload import embeddings_to_host
from loratune.base.paths import IN_ONE_CALL, IN_PARTS, PATHS, ExecutionPath, attention_of, experts_of
from loratune.base.positions import PositionRule, RunningRow, position_rules
from loratune.base.probe import (
    REFUSALS,
    ProbeRow,
    documents_alone,
    embedding_gradients,
    probe_result,
    probe_row,
    random_adapters,
    reads_across,
    reads_ahead,
    relative_error,
    same_gradients,
    token_errors,
    tolerance,
)
from loratune.errors import ModelError
from loratune.fused import layer as fused_layers
from loratune.fused.fit import RecipeFit, recipe_fits
from loratune.fused.policy import ActivationPlan
from loratune.fused.stacking import Copies, holds_bank
from loratune.lora.evaluation_mode import in_evaluation
from loratune.lora.layer import running_with
from loratune.ops.attention import documents as attention
from loratune.ops.attention.capped import DocumentSpans
from loratune.ops.attention.documents import AttentionOptions
from loratune.ops.dropout import row_key
from loratune.ops.host import HostOffload
from loratune.ops.logprobs import take_rows, token_logprobs
from loratune.ops.state import ForwardState

_ROUNDING_GROWTH = 8.0
"""Largest allowed ratio of the rounding error of a long document to that of a short one."""


@dataclass
class PackedForward:
    """Runs packed rows through one model, on the paths that `prepare` chose, inside `with forward.installed():`."""

    model: PreTrainedModel
    path: ExecutionPath
    head: HeadTail | None
    """Tail of a head that runs in chunks; None if the model computes its logits itself."""
    notes: list[str] = field(default_factory=list)
    """One line for the user about each choice that is slower than usual."""
    fused: RecipeFit | None = None
    """Recipe by which decoder layers run fused; None if they run as modules."""
    one_pass: bool = False
    """True if norms and gated activations of layers that are not fused run as in `base.one_pass`."""
    plan: ActivationPlan | None = None
    """Activations that each decoder layer saves for its backward; None saves all."""
    record: bool = True
    """True if steps may be recorded as CUDA graphs. `memory.fit` sets False if there is too little memory for
    them."""
    positions: PositionRule = field(default_factory=PositionRule)
    """How positions reach the model where a row is one call."""
    least_share: float | None = None
    """As in `base.batches`; None takes that of the path."""
    state: ForwardState = field(default_factory=ForwardState)
    """State that belongs to this forward, given to adapter layers and fused layers while installed."""
    _copies: Copies | None = None
    _contained: bool = False
    """True if adapters share a row; see `contained` in `ops.attention.documents.document_attention`."""
    _row: RunningRow = field(default_factory=RunningRow)
    _collected: dict[nn.Module, AttentionOptions] | None = None
    """Receives the options of attention layers during `attention_options`."""

    @property
    def in_one_call(self) -> bool:
        """True if a row is one call of the model, whose shapes do not depend on the documents' lengths."""
        return self.path in IN_ONE_CALL

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces attention, and decoder layers or parts of them, and puts the originals back on exit."""
        with ExitStack() as stack:
            stack.enter_context(attention_of(self.model, self.path))
            stack.enter_context(experts_of(self.model, self.path))
            stack.enter_context(self.positions.installed(self.model, self._row))
            if self.in_one_call:
                stack.enter_context(row_layers.installed(self.model, self.state))
            stack.enter_context(running_with(self.model, self.state))
            self._contained = holds_bank(self.model)
            if self.plan is not None and self.plan.embeddings_on_host:
                embeddings_to_host(self.model)
            if self.fused is not None and self.fused.why_not(self.model) is None:
                self._copies = stack.enter_context(
                    fused_layers.installed(self.model, self.fused, self.plan, self.state)
                )
                stack.enter_context(one_pass.last_norm_installed(backbone_of(self.model)))
            else:
                if self.one_pass:
                    stack.enter_context(one_pass.installed(self.model))
                if self.plan is not None:
                    # Cut into parts, a layer runs several times per row, but it has only one host buffer.
                    host = HostOffload() if self.in_one_call else None
                    stack.enter_context(recompute.installed(self.model, self.plan, host, self.state))
            yield
        self._copies = None

    def attention_options(self) -> dict[nn.Module, AttentionOptions]:
        """Options that each attention layer passes to the attention function, collected during a short row.

        Reading attributes would not suffice: a window, for example, is an attribute of the layer in one architecture,
        and of the configuration in another.
        """
        collected = self._collected = {}
        try:
            with torch.no_grad(), self.installed():
                self.hidden_states(*probe_row(self.model))
        finally:
            self._collected = None
        return collected

    def logprobs(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predicting: Tensor | None,
        targets: Tensor,
        *,
        longest: int | None = None,
    ) -> Tensor:
        """log p(target) at the given positions of one packed row.

        Args:
            tokens, position_ids: (T,) int64 on the model's device; positions restart at 0 in each document.
            cu_seqlens: (documents + 1,) int32 on the CPU, starts of the documents and, last, T.
            predicting: (N,) int64, positions whose next token is scored; the head runs on these alone. T marks an
                unused place, whose result is undefined. None: all positions in order.
            targets: (N,) int64, the tokens to score.
            longest: a bound of the documents' lengths. If given, nothing waits for the device; `cu_seqlens` is then
                on the device and may end in any number of empty documents.

        Returns: (N,) float32.
        """
        if self.head is None:
            assert predicting is not None
            logits = self._full_logits(tokens, position_ids, cu_seqlens, predicting).float()
            return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        hidden = self.hidden_states(tokens, position_ids, cu_seqlens, longest)
        if predicting is not None:
            hidden = hidden[predicting] if longest is None else take_rows(hidden, predicting)
        head = self.model.get_output_embeddings()
        mm = self.state.products.mm
        return token_logprobs(hidden, head, targets, scale=self.head.scale, softcap=self.head.softcap, mm=mm)

    def hidden_states(
        self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, longest: int | None = None
    ) -> Tensor:
        """(T, d): the last hidden states of a packed row, after the final norm."""
        backbone = backbone_of(self.model)
        if self._copies is not None:
            self._copies.refresh()
        return self._run(lambda **k: backbone(**k).last_hidden_state, tokens, position_ids, cu_seqlens, longest)

    def _full_logits(self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, at: Tensor) -> Tensor:
        return self._run(lambda **k: self.model(**k).logits, tokens, position_ids, cu_seqlens)[at]

    def _run(
        self,
        call: Callable[..., Tensor],
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        longest: int | None = None,
    ) -> Tensor:
        """Runs one row, (T,) tokens to (T, ...) outputs, on the chosen path."""
        if not self.in_one_call:
            share = IN_PARTS[self.path] if self.least_share is None else self.least_share
            return batches.run(lambda ids: self._part(call, ids), tokens, cu_seqlens.tolist(), share)
        if longest is None:
            longest = int(cu_seqlens.diff().max())
            cu_seqlens = cu_seqlens.to(tokens.device, non_blocking=True)
        row = {"input_ids": tokens[None], "use_cache": False} | self.positions.arguments(position_ids)
        self._row.position_ids, self._row.longest = position_ids, longest
        self.state.row_positions = position_ids
        if self.path == "document mask":
            with masks.running(self.model, masks.row_of(position_ids, cu_seqlens)):
                return call(**row).squeeze(0)
        if self.path == "packed":
            row |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            row |= {"max_length_q": longest, "max_length_k": longest}
            row |= {"spans": DocumentSpans(cu_seqlens, self.state.flash), "contained": self._contained}
            if self._collected is not None:
                row["collected"] = self._collected
        return call(**row).squeeze(0)

    def _part(self, call: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """Runs documents, (documents, length) tokens to (documents, length, ...) outputs."""
        restart_rotary(self.model)
        return call(input_ids=ids, use_cache=False)


def prepare(model: PreTrainedModel, longest: int | None = None) -> PackedForward:
    """Finds how packed rows run through `model`, by a few forwards of 23 tokens, and of a long row if it has windows.

    Args:
        longest: tokens in a row, and so of the longest document. By default `lengths.UNKNOWN_ROW`.

    Raises: ModelError: the model is not a causal language model, cannot run even one document at a time, sees later
        tokens, or gives non-finite hidden states.
    """
    check_causal(model)
    attention.register()
    masks.register()
    attention.keep_soft_caps(model)
    row = probe_row(model)
    with torch.no_grad(), in_evaluation(model):
        check_logits(model, row)
        expected = documents_alone(backbone_of(model), row)
        if not bool(expected.isfinite().all()):
            raise ModelError("the base model gives non-finite hidden states; its weights are damaged or overflow")
        try:
            ahead = reads_ahead(model, backbone_of(model), row)
        except REFUSALS as error:
            raise ModelError(f"{type(model).__name__} gives no gradients in evaluation mode: {error}") from error
        if ahead:
            raise ModelError(
                f"{type(model).__name__} sees later tokens, so a loss of the next token means nothing; use a causal "
                "model, or set its configuration to one (is_decoder, causal)"
            )
        head = find_head(model, expected, row)
        forward = _find_path(model, expected, longest, head)
        slow = {"per document": "one document at a time", "padded batches": "as padded batches of documents"}
        if forward.path in slow:
            reason = f"{type(model).__name__} mixes neighbouring documents of a row when they are run together"
            forward.notes.append(f"packed rows run {slow[forward.path]}, which is slower: {reason}")
    if row.tokens.is_cuda:
        if not fuse(forward) and expected.dtype.itemsize == 2:
            take_one_pass(forward)
        forward.notes += forward.state.flash.why_not(row.tokens.device)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        forward.notes.append(
            "the auxiliary loss of the router (output_router_logits) is left out; the router is frozen"
        )
    if forward.head is None:
        forward.notes.append(
            f"{type(model).__name__} computes its logits in a way of its own: whole rows of logits are held"
        )
    return forward


def fuse(forward: PackedForward) -> bool:
    """Makes decoder layers run fused if a recipe fits and reproduces hidden states and gradients of the modules.

    The adapters have random values in the comparison, because with their initial B of zero they have no effect.
    Values, gradients and random generators are restored. Returns True if the layers run fused.
    """
    model = forward.model
    forward.fused = None
    if forward.path != "packed":
        return False
    fits = [fit for fit in recipe_fits(model) if fit.why_not(model) is None]
    if not fits:
        return False
    row = probe_row(model)

    def run() -> Tensor:
        with forward.installed():
            return forward.hidden_states(*row)

    key = row_key(0, device=row.tokens.device)  # dropout in training mode is the same in all runs
    with random_adapters(model) as trained, forward.state.dropout(key):
        expected = probe_result(run, trained)
        options = forward.attention_options()
        reasons = []
        for fit in fits:
            if not fit.attention_layers(model) <= options.keys():
                reasons.append("the model computes attention in a way of its own")
                continue
            fit.attention = options
            forward.fused = fit
            try:
                reason = probe_result(run, trained).disagreement(expected, model)
            except REFUSALS as error:
                reason = str(error).partition("\n")[0]
            if reason is None:
                return True
            reasons.append(reason)
            forward.fused = None
    forward.notes.append(
        f"decoder layers run as modules, which is slower, because fused layers failed a check: {reasons[0]}"
    )
    return False


@torch.no_grad()
def take_one_pass(forward: PackedForward) -> bool:
    """Runs norms and gated activations in one pass each, if hidden states stay the same."""
    if not forward.in_one_call:
        return False
    row = probe_row(forward.model)
    with forward.installed():
        expected = forward.hidden_states(*row)
    forward.one_pass = True
    forward.one_pass = _agrees(forward, expected)
    return forward.one_pass


def _find_path(model: PreTrainedModel, expected: Tensor, longest: int | None, head: HeadTail | None) -> PackedForward:
    """The first path and rule that reproduce `expected` and a long row. Raises: ModelError: no path runs."""
    lengths = long_row(model, longest, row_layers.lengths_of(model))
    alone: Tensor | None = None
    for forward in _candidates(model, expected):
        forward.head = head
        if not _agrees(forward, expected) or _mixes(forward) or (head is None and not _logits_agree(forward)):
            continue
        share, forward.least_share = forward.least_share, None
        if lengths is None:
            return forward
        row = probe_row(model, lengths.documents)
        try:
            alone = documents_alone(backbone_of(model), row) if alone is None else alone
        except REFUSALS as error:
            length = max(lengths.documents)
            forward.notes.append(f"a document of {length:,} tokens could not be compared with itself alone: {error}")
            return forward
        forward.least_share = share
        if _agrees_behind(forward, expected, row, alone, lengths.parts):
            forward.least_share = None
            return forward
    try:
        forward = PackedForward(model, PATHS[-1], head)
        with forward.installed():
            forward.hidden_states(*probe_row(model))
    except REFUSALS as error:
        raise ModelError(f"{type(model).__name__} cannot run a packed row: {error}") from error
    return forward


def _candidates(model: PreTrainedModel, expected: Tensor) -> Iterator[PackedForward]:
    """Forwards to try, fastest first. Rules of positions are looked for only if the plain one fails everywhere."""
    plain, counting = PositionRule(), PositionRule(counting=True)
    yield PackedForward(model, "packed", None)
    yield PackedForward(model, "position mask", None)
    yield PackedForward(model, "document mask", None, positions=counting)
    rules = position_rules(model, backbone_of(model), probe_row(model), expected)
    for path in IN_ONE_CALL:
        for rule in rules:
            if rule != plain or path == "document mask":
                yield PackedForward(model, path, None, positions=rule)
    yield PackedForward(model, "padded batches", None, least_share=0.0)  # the most padding, to see whether it leaks


def _agrees_behind(
    forward: PackedForward, short: Tensor, row: ProbeRow, expected: Tensor, parts: Sequence[slice]
) -> bool:
    """True if every part of a long row equals `expected` up to rounding.

    A window removes only a small share of the keys, so a fixed limit could miss it. The limit follows from the
    rounding error of the short row, whose hidden states should be `short`.
    """
    try:
        with forward.installed():
            noise = token_errors(forward.hidden_states(*probe_row(forward.model)), short).median()
            errors = token_errors(forward.hidden_states(*row), expected)
        if forward.in_one_call and row_layers.count(forward.model) and not _gradients_agree(forward, row):
            return False  # these layers have a backward of ours
    except REFUSALS:
        return False
    floor = 3e-5 if expected.dtype in (torch.float32, torch.float64) else 0.02
    most = min(max(floor, _ROUNDING_GROWTH * float(noise)), tolerance(expected.dtype, forward.model))
    return all(float(errors[part].median()) <= most for part in parts)


def _gradients_agree(forward: PackedForward, row: ProbeRow) -> bool:
    expected = embedding_gradients(forward.model, partial(documents_alone, backbone_of(forward.model), row))
    with forward.installed():
        got = embedding_gradients(forward.model, lambda: forward.hidden_states(*row))
    return same_gradients(got, expected, forward.model)


def _mixes(forward: PackedForward) -> bool:
    """True if documents of a row depend on one another."""
    if not forward.in_one_call:
        return False
    row = probe_row(forward.model)
    with forward.installed():
        return reads_across(forward.model, lambda: forward.hidden_states(*row), row)


def _logits_agree(forward: PackedForward) -> bool:
    """True if the model's own logits of a row equal those of the documents alone. Hidden states do not show it: some
    models arrange their logits in a way that depends on the batch."""
    row = probe_row(forward.model)
    found = []
    for other in (forward, PackedForward(forward.model, PATHS[-1], None)):
        try:
            with other.installed():
                found.append(other._full_logits(*row, torch.arange(len(row.tokens)).to(row.tokens.device)))
        except REFUSALS:
            return False
    return relative_error(*found) <= tolerance(found[1].dtype, forward.model)


def _agrees(forward: PackedForward, expected: Tensor) -> bool:
    """True if the forward runs and its hidden states equal `expected` up to rounding."""
    try:
        with forward.installed():
            got = forward.hidden_states(*probe_row(forward.model))
    except REFUSALS:
        return False
    return relative_error(got, expected) <= tolerance(expected.dtype, forward.model)
