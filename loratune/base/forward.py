"""One packed row through any causal language model: from tokens to the log-probabilities of the trained ones.

transformers has hundreds of architectures, and nothing here knows them by name. Instead the roads are tried once,
on a few tokens of the very model that is to be trained, from fast to slow, and the first whose result equals that
of the documents run one at a time is taken:

1. our attention by document, through transformers' attention interface (`ops.attention.documents`);
2. the model's own attention, with the mask that transformers derives from the restarting positions;
3. one document at a time, for models whose layers carry state along the row (state-space and linear attention).

The head is tried likewise: hidden states -> head -> scale and soft cap from the configuration must give the model's
own logits, and then it runs in chunks over trained tokens only; otherwise the model computes the logits itself.
So "packed equals unpacked" is not a promise of this code about an architecture but a measurement on the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.base import one_pass, recompute
from loratune.errors import ModelError
from loratune.fused import layer as fusing
from loratune.fused.policy import ActivationPlan
from loratune.fused.stacking import Copies, holds_bank
from loratune.lora.layer import running_with
from loratune.ops.attention import documents as attention
from loratune.ops.attention import flash
from loratune.ops.attention.capped import DocumentSpans
from loratune.ops.host import HostOffload, is_mapped, mapped
from loratune.ops.logprobs import take_rows, token_logprobs
from loratune.ops.state import ForwardState
from loratune.precision.linear import formats_in

_PROBE_LENGTHS = (7, 12, 4)
_ROADS = ("documents", "positions", "one by one")
# What an architecture raises when it cannot take a road, as opposed to a fault of ours.
_REFUSALS = (NotImplementedError, TypeError, ValueError, RuntimeError, IndexError)


@dataclass(frozen=True)
class Head:
    """What follows the output embeddings, as in `ops.logprobs.token_logprobs`."""

    scale: float
    softcap: float | None


@dataclass
class PackedForward:
    """How rows run through one model. Made by `prepare`; use inside `with forward.installed():`."""

    model: PreTrainedModel
    road: str
    head: Head | None
    notes: list[str] = field(default_factory=list)
    """What a user should know, one line each; empty when everything took the fast road."""
    fused: fusing.Options | None = None
    """What attention layers ask for, if decoder layers run as `fused.layer` has them; None if they do not."""
    one_pass: bool = False
    """Whether norms and gated activations of layers that are not fused run as `base.one_pass` has them."""
    plan: ActivationPlan | None = None
    """What each decoder layer keeps for its backward; None for everything."""
    record: bool = True
    """Whether steps may become CUDA graphs; False where these were found to have no room (`memory.fit`)."""
    state: ForwardState = field(default_factory=ForwardState)
    """Given to adapter layers and fused layers while installed; holds the dropout key of the current row."""
    _copies: Copies | None = None
    _contained: bool = False
    """As in `ops.attention.documents.document_attention`: where adapters share a row."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Switches the model's attention implementation to the packed one, and back on exit."""
        with ExitStack() as stack:
            stack.enter_context(_attention_of(self.model, self.road))
            stack.enter_context(running_with(self.model, self.state))
            self._contained = holds_bank(self.model)
            if self.plan is not None and self.plan.embeddings_on_host:
                _embeddings_to_host(self.model)
            if self.fused is not None and fusing.fusible(self.model):
                self._copies = stack.enter_context(fusing.installed(self.model, self.fused, self.plan, self.state))
            else:
                if self.one_pass:
                    stack.enter_context(one_pass.installed(self.model))
                if self.plan is not None:
                    once = self.road != "one by one"  # else a layer runs several times a row, and has several inputs
                    host = HostOffload() if once else None
                    stack.enter_context(recompute.installed(self.model, self.plan, host, self.state))
            yield
        self._copies = None

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
            predicting: (N,) int64 positions whose next token is asked for; the head runs on these alone. T stands for
                a place to be left blank, whose result means nothing; None for all positions in order.
            targets: (N,) int64, the tokens to score.
            longest: a bound of the documents' lengths; where it is given nothing waits for the device, and
                `cu_seqlens` is on the device and may end in any number of empty documents.

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
        return token_logprobs(hidden, head, targets, scale=self.head.scale, softcap=self.head.softcap)

    def hidden_states(
        self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, longest: int | None = None
    ) -> Tensor:
        """(T, d): the last hidden states of a packed row, after the final norm."""
        backbone = _backbone(self.model)
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
        """Runs one row, (T,) tokens to (T, ...) outputs, on the road that was found."""
        if self.road == "one by one":
            bounds = cu_seqlens.tolist()
            parts = [
                call(input_ids=tokens[None, a:b], use_cache=False)[0] for a, b in itertools.pairwise(bounds) if b > a
            ]
            return torch.cat(parts)
        row = {"input_ids": tokens[None], "position_ids": position_ids[None], "use_cache": False}
        if self.road == "documents":
            if longest is None:
                longest = int(cu_seqlens.diff().max())
                cu_seqlens = cu_seqlens.to(tokens.device, non_blocking=True)
            row |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            row |= {"max_length_q": longest, "max_length_k": longest}
            row |= {"spans": DocumentSpans(cu_seqlens), "contained": self._contained}
        return call(**row).squeeze(0)


def prepare(model: PreTrainedModel) -> PackedForward:
    """Finds and verifies how packed rows run through `model`; costs a few forwards of 23 tokens.

    Raises: ModelError: the model cannot even run documents one at a time, or gives non-finite hidden states.
    """
    attention.register()
    attention.keep_soft_caps(model)
    tokens, position_ids, cu_seqlens = _probe_row(model)
    with torch.no_grad():
        expected = _documents_alone(model, tokens, cu_seqlens)
        if not bool(expected.isfinite().all()):
            raise ModelError("the base model gives non-finite hidden states; its weights are damaged or overflow")
        notes: list[str] = []
        for road in _ROADS:
            forward = PackedForward(model, road, None, notes)
            why = _disagreement(forward, tokens, position_ids, cu_seqlens, expected)
            if why is None:
                break
        if forward.road == "one by one":
            notes.append(f"packed rows run one document at a time, which is slower: {why_not_packed(model)}")
        forward.head = _find_head(model, expected, tokens, cu_seqlens)
        if tokens.is_cuda:
            if not fuse(forward) and expected.dtype.itemsize == 2:
                take_one_pass(forward)
            notes += flash.why_not(tokens.device)
    if forward.head is None:
        notes.append(f"{type(model).__name__} computes its logits in a way of its own: whole rows of logits are held")
    return forward


@torch.no_grad()
def fuse(forward: PackedForward) -> bool:
    """Lets decoder layers run fused, if they are of a kind that can and give the model's own hidden states."""
    if forward.road != "documents" or not fusing.fusible(forward.model):
        return False
    row = _probe_row(forward.model)
    with forward.installed():
        expected = forward.hidden_states(*row)
    forward.fused = fusing.attention_options(forward.model, lambda: forward.hidden_states(*row))
    if _disagreement(forward, *row, expected) is not None:
        forward.fused = None
    return forward.fused is not None


@torch.no_grad()
def take_one_pass(forward: PackedForward) -> bool:
    """Lets norms and gated activations run in one pass each, if the model gives its own hidden states so."""
    if forward.road == "one by one":
        return False
    row = _probe_row(forward.model)
    with forward.installed():
        expected = forward.hidden_states(*row)
    forward.one_pass = True
    forward.one_pass = _disagreement(forward, *row, expected) is None
    return forward.one_pass


def why_not_packed(model: PreTrainedModel) -> str:
    """One line for a person about a model that fails both packed roads."""
    return f"{type(model).__name__} mixes neighbouring documents of a row when they are run together"


def _disagreement(
    forward: PackedForward, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, expected: Tensor
) -> str | None:
    """None if the road reproduces `expected`, else why not."""
    try:
        with forward.installed():
            got = forward.hidden_states(tokens, position_ids, cu_seqlens)
    except _REFUSALS as error:
        if forward.road == _ROADS[-1]:
            raise ModelError(f"{type(forward.model).__name__} cannot run a packed row: {error}") from error
        return str(error)
    off = _relative_error(got, expected)
    return None if off <= _tolerance(expected.dtype, forward.model) else f"relative error {off:.1e}"


def _find_head(model: PreTrainedModel, hidden: Tensor, tokens: Tensor, cu_seqlens: Tensor) -> Head | None:
    """The head whose chunked computation reproduces the model's own logits, or None."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        return None
    end = int(cu_seqlens[1])
    expected = model(input_ids=tokens[None, :end], use_cache=False).logits[0].float()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    for scale in (1.0, getattr(config, "logit_scale", None), 1 / divisor if divisor else None):
        if not isinstance(scale, float | int):
            continue
        logits = module(hidden[:end]).float() * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if _relative_error(logits, expected) <= _tolerance(hidden.dtype, model):
            return Head(float(scale), float(softcap) if softcap else None)
    return None


@contextmanager
def _attention_of(model: PreTrainedModel, road: str) -> Iterator[None]:
    if road != "documents":
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _embeddings_to_host(model: PreTrainedModel) -> None:
    """Moves the table of a GPU's input embeddings to host memory, where the head does not need it.

    It stays there: it works as before, and where it had to go there is no room for it to come back.
    """
    weight = cast(nn.Parameter, model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    shared = isinstance(head, nn.Module) and head.weight is weight
    if weight.is_cuda and not shared and not is_mapped(weight):
        weight.data = mapped(weight.data)
        torch.cuda.empty_cache()


def _backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends at the hidden states."""
    decoder = model.get_decoder()
    inner = getattr(model, model.base_model_prefix, None)
    found = decoder if isinstance(decoder, nn.Module) and decoder is not model else inner
    if not isinstance(found, nn.Module):
        raise ModelError(f"{type(model).__name__} does not say which of its parts gives the hidden states")
    return found


def _documents_alone(model: PreTrainedModel, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    backbone = _backbone(model)
    bounds = cu_seqlens.tolist()
    parts = [
        backbone(input_ids=tokens[None, a:b], use_cache=False).last_hidden_state[0]
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts)


def _probe_row(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """A row of three short documents of arbitrary tokens."""
    table = cast(Tensor, model.get_input_embeddings().weight)
    vocabulary, device = table.shape[0], table.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (sum(_PROBE_LENGTHS),), generator=generator).to(device)
    position_ids = torch.cat([torch.arange(n) for n in _PROBE_LENGTHS]).to(device)
    cu_seqlens = torch.tensor([0, *_PROBE_LENGTHS]).cumsum(0).to(torch.int32)
    return tokens, position_ids, cu_seqlens


def _relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def _tolerance(dtype: torch.dtype, model: PreTrainedModel) -> float:
    """Relative error far above rounding in a deep model, and far below that of one foreign document (order 1)."""
    rounding = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    return max([rounding, *(form.forward_tolerance or 0.0 for form in formats_in(model))])
