"""Tokens from prompts: batched (`generate`) and one at a time (`stream`), for any transformers causal model.

Both run one loop: prefill a batch of prompts, sample, decode, sample, ... It replaces `model.generate` for three
reasons. A finished sequence leaves the batch at once, so no padding is computed for it. Sampling draws from one
random stream per prompt, so an answer does not depend on the other prompts of its batch. And a step is four short
functions that can be read, timed and, with many adapters, given a slot per row.

Prompts of different length are padded on the left, so that the last column holds the newest token of every sequence.
With masked padding, and positions counted from each prompt's own start, a prompt gets the same answer as alone. In
some architectures it does not: padding enters a recurrent state, or a mask overflows. So this is measured on the
model. If it fails, all prompts of a batch have one length.

Legend for the suffixes: B sequences in the batch, T columns so far, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.base.lengths import restart_rotary
from loratune.base.load import max_document_tokens
from loratune.base.positions import first_position
from loratune.errors import ConfigError, DataError, ModelError
from loratune.infer.cache_trial import cache_agrees, cache_limits, is_plain, tolerance
from loratune.infer.decoding import NO_LIMITS, CacheLimits, Decoding, again, step

BATCH_SIZE = 32
"""Default number of sequences decoded together. Twice as many are a tenth faster on two CPU cores and need twice the
memory for keys and values: on an 8-billion-parameter Llama 128 KiB for every token of every sequence."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of sampling.

    Raises: ConfigError: a value is out of range.
    """

    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_p: float
    """Nucleus: the smallest set of tokens whose probabilities reach this (arXiv:1904.09751); 1 keeps all."""
    top_k: int
    """Only this many likeliest tokens; 0 keeps all."""
    seed: int | None
    """The same seed gives the same answers at any batch size; None draws a new seed each time."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or a positive number")


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[list[int]]:
    """Answers to many prompts, in the order given.

    Args:
        prompts: token ids, each prompt with at least one.
        stop_ids: tokens that end an answer; `base.load.stop_ids` finds them.
        batch_size: sequences decoded together; lower it if memory runs out.
        max_new_tokens, temperature, top_p, top_k, seed: see `Sampling`.

    Returns: the new token ids of each answer, without the stop token. An answer ends at a stop token, after
        max_new_tokens, or at the last position that the model has.
    Raises:
        ConfigError: a sampling value is out of range.
        DataError: a prompt is empty or leaves the model no position to answer in.
        ModelError: the model's logits are not numbers.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    budgets = _budgets(model, prompts, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    with _evaluating(model):
        limits = _limits(model, prompts, budgets)
        for batch in _batches(model, prompts, batch_size, limits):
            for index, token in _tokens(model, prompts, batch, budgets, stop_ids, sampling, limits):
                answers[index].append(token)
    return answers


def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Iterator[int]:
    """One answer, token by token; the same tokens as `generate` gives for the first prompt of its list.

    Raises: as `generate`, when the first token is requested.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    budgets = _budgets(model, [prompt], max_new_tokens)
    with _evaluating(model):
        limits = _limits(model, [prompt], budgets)
        for _, token in _tokens(model, [prompt], [0], budgets, stop_ids, sampling, limits):
            yield token


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: CacheLimits = NO_LIMITS
) -> tuple[Decoding, Tensor]:
    """Runs prompts through the model at once.

    Args:
        limits: lengths behind which the cache is not used, from `cache_trial.cache_limits`.

    Returns: the state of the batch, and the logits (B, V) of each prompt's next token.
    """
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask_BT[row, longest - len(prompt) :] = 1
    padded = any(len(prompt) < longest for prompt in prompts)
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min_(0).to(device)
    tokens_BT = tokens_BT.to(device)
    mask = mask_BT.to(device) if padded else None
    state = Decoding(None, mask, position_BT[:, -1] + 1, tokens_BT, first_position(model), limits=limits)
    restart_rotary(model)
    logits_BV = step(model, state, tokens_BT, position_BT)
    if state.cached and not is_plain(model, state.cache) and not cache_agrees(model, state.first):
        state.cached = False
        logits_BV = again(model, state)
    return state, logits_BV


@torch.inference_mode()
def decode(model: PreTrainedModel, state: Decoding, token_B: Tensor) -> Tensor:
    """Appends one token to every sequence; returns the logits (B, V) of the next."""
    position_B1 = state.position_B[:, None]
    if state.mask_BT is not None:
        state.mask_BT = torch.cat([state.mask_BT, state.mask_BT.new_ones(len(token_B), 1)], 1)
    state.position_B = state.position_B + 1
    state.columns_BT = torch.cat([state.columns_BT, token_B[:, None]], 1)
    return step(model, state, token_B[:, None], position_B1)


@torch.inference_mode()
def keep(state: Decoding, rows: Sequence[int]) -> None:
    """Keeps the sequences at `rows` in the batch and its cache, and drops the others."""
    index = torch.tensor(rows, device=state.position_B.device)
    state.columns_BT = state.columns_BT[index]
    if state.cached:
        state.cache.reorder_cache(index)
    state.position_B = state.position_B[index]
    if state.mask_BT is not None:
        state.mask_BT = state.mask_BT[index]


@torch.inference_mode()
def sample(logits_BV: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """One token for each sequence.

    Args:
        logits_BV: (B, V), any float dtype.
        uniforms: one number in [0, 1) for each sequence, a quantile of the cumulated distribution; ignored when
            the temperature is 0.

    Raises: ModelError: logits are not numbers.
    """
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        _check_numbers(logits_BV.gather(1, best_B1))
        greedy: list[int] = best_B1[:, 0].tolist()
        return greedy
    kept = min(sampling.top_k or logits_BV.shape[1], logits_BV.shape[1])
    scaled, ids = (logits_BV.float() / sampling.temperature).topk(kept)
    _check_numbers(scaled[:, :1])
    probabilities = scaled.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    cumulated = probabilities.masked_fill(before >= sampling.top_p, 0.0).cumsum(-1)
    place_B1 = torch.tensor(uniforms, device=cumulated.device)[:, None] * cumulated[:, -1:]
    chosen_B1 = (cumulated <= place_B1).sum(-1, keepdim=True).clamp_max_(kept - 1)
    result: list[int] = ids.gather(1, chosen_B1)[:, 0].tolist()
    return result


class Detokenizer:
    """Turns a stream of token ids into pieces of text that can be printed at once.

    A token may be half a character, and some tokenizers drop the space before the first token that they decode. So
    each new token is decoded together with the tokens of the previous piece. Text that ends in an incomplete
    character (shown as U+FFFD) waits for the next token. All pieces together are `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens of the last piece, already printed
        self._pending: list[int] = []  # tokens since then

    def add(self, token: int) -> str:
        """The text that `token` completes: often a word, sometimes nothing."""
        self._pending.append(token)
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._release(text)

    def finish(self) -> str:
        """The text that still waits, after the last token."""
        return self._release(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _release(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batch: Sequence[int],
    budgets: Sequence[int],
    stop_ids: Collection[int],
    sampling: Sampling,
    limits: CacheLimits,
) -> Iterator[tuple[int, int]]:
    """The loop: yields (prompt's index, token) for every token of the prompts in `batch`, as they are drawn."""
    dice = {i: random.Random(None if sampling.seed is None else f"{sampling.seed}:{i}") for i in batch}
    drawn = dict.fromkeys(batch, 0)
    live = list(batch)
    state, logits_BV = prefill(model, [prompts[i] for i in live], limits)
    while True:
        tokens = sample(logits_BV, sampling, [dice[i].random() for i in live])
        going: list[int] = []
        for row, (index, token) in enumerate(zip(live, tokens, strict=True)):
            if token in stop_ids:
                continue
            yield index, token
            drawn[index] += 1
            if drawn[index] < budgets[index]:
                going.append(row)
        if not going:
            return
        if len(going) < len(live):
            live = [live[row] for row in going]
            keep(state, going)
        token_B = torch.tensor([tokens[row] for row in going], device=state.position_B.device)
        logits_BV = decode(model, state, token_B)


@torch.inference_mode()
def _limits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> CacheLimits:
    reach = max((len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True)), default=0)
    return cache_limits(model, reach)


def _batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_size: int, limits: CacheLimits
) -> Iterator[list[int]]:
    """Indices of prompts that run together, longest first, so that too little memory shows in the first batch."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mixed = batch_size > 1 and len({len(prompt) for prompt in prompts}) > 1
    # Behind a limit a step depends on the length of the whole row of columns, padding included.
    one_length = mixed and (bool(limits) or not _pads_cleanly(model))
    batch: list[int] = []
    for index in order:
        differs = bool(batch) and one_length and len(prompts[index]) != len(prompts[batch[0]])
        if len(batch) == batch_size or differs:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pads_cleanly(model: PreTrainedModel) -> bool:
    """True if left padding does not change this model's logits; measured on a few tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    longer, shorter = [i % vocabulary for i in range(2, 11)], [i % vocabulary for i in range(5, 9)]
    state, first = prefill(model, [longer, shorter])
    state_alone, first_alone = prefill(model, [shorter])
    then = decode(model, state, torch.ones_like(state.position_B))
    then_alone = decode(model, state_alone, torch.ones_like(state_alone.position_B))
    got = torch.stack([first[1], then[1]]).double()
    expected = torch.stack([first_alone[0], then_alone[0]]).double()
    return bool((got - expected).norm() <= tolerance(model) * expected.norm())


def _budgets(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Maximum number of tokens in each prompt's answer."""
    limit = max_document_tokens(model)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} has no tokens; there is nothing to answer")
        if limit is not None and len(prompt) >= limit:
            raise DataError(f"prompt {number} has {len(prompt)} tokens, but the model's positions end at {limit}")
    free = [max_new_tokens if limit is None else limit - len(prompt) for prompt in prompts]
    return [min(max_new_tokens, positions) for positions in free]


def _check_numbers(logits: Tensor) -> None:
    if bool(logits.isnan().any()):
        raise ModelError("the model's logits are not numbers (NaN); the base or the adapter is damaged or overflows")


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Context in which all modules are in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
