"""Records to examples: the tokens of a document, and the loss weight of predicting each token.

For an assistant's answer, the prompt is the chat template's text for the messages before it, with the header of an
answer (`add_generation_prompt`), as in inference. The answer is the text that the template then adds for it. It is
trained up to and including the token that stops generation. Templates often print more after that token, such as a
newline; the model never generates it, so it has weight 0.

A conversation with several answers is one example if every prompt is, token by token, a prefix of the whole
conversation. Some templates rewrite earlier turns: Qwen3's drops the reasoning of earlier answers once a new question
follows. Then every answer becomes an example of its own.

Rejected alternatives: finding the trained part by marks in the template, by `return_assistant_tokens_mask`, or by a
search for the answer's text. The first two need templates written for them. The last is wrong as soon as a template
trims or an answer repeats the question. All three fail silently.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loratune.config import TrainOn
from loratune.data.pieces import Cut, Ids, Pieces, common, joined
from loratune.data.record import Record
from loratune.data.template import (
    ChatTemplate,
    decode,
    encode,
    end_token,
    plain_prefix,
    special_tokens,
)
from loratune.data.turns import Turn, last_turn, turns_of
from loratune.errors import DataError

_ANCHORS = ("", "\n", "a", ".", ":", "0")


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One document of tokens, ready for packing."""

    token_ids: NDArray[np.int32]
    """(length,)"""
    weights: NDArray[np.float32]
    """(length,): weights[i] is the loss weight of *predicting* token i; weights[0] is 0."""
    source: str
    """file:line of its record."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RenderJob:
    """All inputs of rendering except the records. Sent to worker processes."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    train_on: TrainOn
    stop_ids: frozenset[int]
    special_ids: frozenset[int]
    plain_prefix: list[int]
    """Special tokens that the tokenizer puts before plain text, such as BOS."""
    max_tokens: int | None
    truncate: bool
    date: datetime
    """The time that chat templates print."""


@dataclass(slots=True)
class Batch:
    """The result of rendering some records."""

    examples: list[Example] = field(default_factory=list)
    examples_per_record: list[int] = field(default_factory=list)  # for the records without an error
    faults: list[DataError] = field(default_factory=list)
    too_long: list[tuple[int, str]] = field(default_factory=list)  # (tokens, source) of examples over the limit
    counts: Counter[str] = field(default_factory=Counter)  # how often each reason for a note occurred

    def add(self, other: Batch) -> None:
        """Appends the result of the records that follow."""
        self.examples += other.examples
        self.examples_per_record += other.examples_per_record
        self.faults += other.faults
        self.too_long += other.too_long
        self.counts += other.counts


@dataclass(frozen=True, slots=True)
class CutTurn:
    """A turn with its texts in pieces, see `pieces`."""

    turn: Turn
    prompt: list[str]
    full: list[str]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tokens of a turn: those of the prompt, as in inference, and those of the answer."""

    prompt: int
    """Tokens of the prompt."""
    answer: list[int]
    pieces: list[str] | None
    """Pieces whose tokens are prompt and answer, or None."""
    apart: list[int]
    """Prompt and answer if no pieces have their tokens."""

    def tokens(self, ids: Ids) -> list[int]:
        """Prompt and answer."""
        return self.apart if self.pieces is None else joined(ids, self.pieces)


@dataclass(slots=True)
class Plan:
    """Some records as texts, cut into pieces, between rendering and tokenisation."""

    batch: Batch
    turns: list[tuple[Record, list[CutTurn]]] = field(default_factory=list)

    def pieces(self) -> Iterator[str]:
        """All texts to tokenise."""
        for _, turns in self.turns:
            for cut in turns:
                yield from cut.prompt
                yield from cut.full


def plan_batch(records: Sequence[Record], job: RenderJob, chat: ChatTemplate, pieces: Pieces) -> Plan:
    """Renders some records to text. Collects errors instead of raising them.

    Args:
        chat: the compiled template of the job.
        pieces: cuts texts for the tokenizer of the job.
    """
    plan, rendered = Plan(Batch()), list[tuple[Record, list[Turn]]]()
    for record in records:
        try:
            rendered.append((record, turns_of(record, job.train_on, chat, plan.batch.counts)))
        except DataError as fault:
            plan.batch.faults.append(fault)
    pieces.compare([turn.full for _, turns in rendered for turn in turns])
    plan.turns = [(record, _cut(turns, pieces)) for record, turns in rendered]
    return plan


def _cut(turns: Sequence[Turn], pieces: Pieces) -> list[CutTurn]:
    """Each text begins with the one before it, unless the template rewrites earlier turns."""
    found: list[CutTurn] = []
    known: Cut = ("", [""])
    for turn in turns:
        prompt = pieces.cut(turn.prompt, known)
        full = pieces.cut(turn.full, (turn.prompt, prompt))
        known = (turn.full, full)
        found.append(CutTurn(turn, prompt, full))
    return found


def finish_batch(plan: Plan, ids: Ids, job: RenderJob) -> Batch:
    """Makes the examples of a plan. Collects errors instead of raising them.

    Args:
        ids: the tokens of all pieces of the plan.
    """
    batch = plan.batch
    for record, turns in plan.turns:
        try:
            examples = _examples(record, turns, ids, job, batch.counts)
            for example in examples:
                _fit(example, job, batch)
            batch.examples_per_record.append(len(examples))
        except DataError as fault:
            batch.faults.append(fault)
    return batch


def prompt_ids(record: Record, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None = None) -> list[int]:
    """The tokens of the prompt from which the model generates the record's last answer.

    Args:
        chat: the template and its date; by default the tokenizer's own template, today.
    Raises:
        DataError: the record is raw text, which has no prompt, or the template rejects the conversation.
        ModelError: the record is a conversation, and there is no chat template.
    """
    turn = last_turn(record, tokenizer, chat)
    ids = encode(tokenizer, [turn.prompt])[turn.prompt]
    if record.messages is not None:
        return ids
    prefix = plain_prefix(tokenizer)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def reference(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    chat: ChatTemplate | None = None,
) -> str:
    """The record's last answer as the model should generate it: rendered text without special tokens.

    Raises: as `prompt_ids`; also DataError if the answer has no stop token.
    """
    turn = last_turn(record, tokenizer, chat)
    if record.messages is None:
        return record.completion or ""
    ids = encode(tokenizer, [turn.prompt, turn.full])
    answer = _split(CutTurn(turn, [turn.prompt], [turn.full]), ids, tokenizer).answer
    stop = _stop_index(turn, answer, tokenizer, stop_ids, special_tokens(tokenizer))
    return decode(tokenizer, answer[:stop], specials=False)


def _examples(record: Record, turns: list[CutTurn], ids: Ids, job: RenderJob, counts: Counter[str]) -> list[Example]:
    if record.messages is None:
        return [_plain_example(record, turns[0], ids, job, counts)]
    if job.train_on == "all":
        whole = joined(ids, turns[0].full)
        return [_example(record.source, whole, [(1, len(whole))])]
    parts = [_split(cut, ids, job.tokenizer) for cut in turns]
    ends = [
        _stop_index(cut.turn, part.answer, job.tokenizer, job.stop_ids, job.special_ids) + 1
        for cut, part in zip(turns, parts, strict=True)
    ]
    for part, end in zip(parts, ends, strict=True):
        _count_unknown_stop(part.answer[end - 1], job, counts)
    spans = [(part.prompt, part.prompt + end) for part, end in zip(parts, ends, strict=True)]
    last = parts[-1]
    if all(_begin_alike(part, last, end, ids) for part, (_, end) in zip(parts[:-1], spans[:-1], strict=True)):
        return [_example(record.source, last.tokens(ids), spans)]
    counts["one per answer"] += 1
    return [_example(record.source, part.tokens(ids), [span]) for part, span in zip(parts, spans, strict=True)]


def _begin_alike(part: _Parts, whole: _Parts, end: int, ids: Ids) -> bool:
    """True if the first `end` tokens of two turns are equal."""
    if part.pieces is None or whole.pieces is None:
        return part.tokens(ids)[:end] == whole.tokens(ids)[:end]
    same = common(part.pieces, whole.pieces)
    left = end - sum(len(ids[piece]) for piece in part.pieces[:same])
    return left <= 0 or joined(ids, part.pieces[same:])[:left] == joined(ids, whole.pieces[same:])[:left]


def _plain_example(record: Record, cut: CutTurn, ids: Ids, job: RenderJob, counts: Counter[str]) -> Example:
    """Text without a template: the tokenizer's prefix (BOS), the text, EOS. A prompt is not trained."""
    parts = _split(cut, ids, job.tokenizer)
    start, whole = parts.prompt, parts.tokens(ids)
    if whole[: len(job.plain_prefix)] != job.plain_prefix:  # otherwise the text has its own BOS
        start, whole = start + len(job.plain_prefix), job.plain_prefix + whole
    if record.text is not None or job.train_on == "all":
        start = 1
    end = end_token(job.tokenizer)
    if whole[-1] != end and whole[-1] not in job.stop_ids:  # otherwise the text has its own end
        whole = [*whole, end]
    if record.text is None:
        _count_unknown_stop(whole[-1], job, counts)
    return _example(record.source, whole, [(start, len(whole))])


def _split(cut: CutTurn, ids: Ids, tokenizer: PreTrainedTokenizerBase) -> _Parts:
    """Divides a turn into prompt and answer. The prompt's tokens are those of inference."""
    same = common(cut.prompt, cut.full)
    before = sum(len(ids[piece]) for piece in cut.full[:same])
    head, rest = joined(ids, cut.prompt[same:]), joined(ids, cut.full[same:])
    if rest[: len(head)] == head:
        return _Parts(before + len(head), rest[len(head) :], cut.full, [])
    turn, prompt, full = cut.turn, joined(ids, cut.prompt), joined(ids, cut.full)
    # One token would span both parts, which inference cannot produce. So the answer is tokenised apart, and some
    # tokenizers put a space before a text: then behind an anchor, whose tokens are removed.
    answer, whole = turn.full[len(turn.prompt) :], decode(tokenizer, full)
    for anchor in _ANCHORS:
        found = encode(tokenizer, [anchor, anchor + answer])
        head, both = found[anchor], found[anchor + answer]
        if both[: len(head)] == head and decode(tokenizer, prompt + both[len(head) :]) == whole:
            return _Parts(len(prompt), both[len(head) :], None, prompt + both[len(head) :])
    raise DataError(
        f"{turn.place}: no tokens continue the prompt's end {turn.prompt[-20:]!r} with {answer[:20]!r}, because this "
        "tokenizer joins both; begin the completion with a space instead of ending the prompt with one"
    )


def _stop_index(
    turn: Turn,
    answer: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    special_ids: frozenset[int],
) -> int:
    """Index in `answer` of the token that ends it: the first stop token, else a special token at its end.

    Raises: DataError: there is none, or text follows it, which the model could never generate.
    """
    stop = min((answer.index(token) for token in stop_ids if token in answer), default=None)
    if stop is not None:
        behind = answer[stop + 1 :]
        if behind and (rest := decode(tokenizer, behind, specials=False).strip()):
            name = decode(tokenizer, [answer[stop]])
            raise DataError(
                f'{turn.place}: the answer continues after the stop token "{name}" with {rest[:40]!r}, which the '
                "model could never generate; remove the token from the text"
            )
        return stop
    last = max((at for at, token in enumerate(answer) if token in special_ids), default=None)
    if last is None or decode(tokenizer, answer[last + 1 :], specials=False).strip():
        known = ", ".join(f'"{decode(tokenizer, [token])}"' for token in sorted(stop_ids)) or "none"
        raise DataError(
            f"{turn.place}: the chat template ends the answer ({turn.full[-30:]!r}) without a stop token (the model "
            f"stops at {known}), so the model would never learn to stop; name another template with "
            "--chat-template FILE"
        )
    return last


def _count_unknown_stop(token: int, job: RenderJob, counts: Counter[str]) -> None:
    if token not in job.stop_ids:
        counts[f"unknown stop {decode(job.tokenizer, [token])}"] += 1


def _example(source: str, ids: list[int], spans: list[tuple[int, int]]) -> Example:
    weights = np.zeros(len(ids), dtype=np.float32)
    for start, end in spans:
        weights[max(start, 1) : end] = 1  # token 0 has no predecessor that could predict it
    return Example(np.frombuffer(array("i", ids), dtype=np.int32), weights, source)  # half the time of np.array


def _fit(example: Example, job: RenderJob, batch: Batch) -> None:
    """Adds the example to the batch. An example that is too long is cut (truncate) or reported."""
    if job.max_tokens is not None and len(example) > job.max_tokens:
        if not job.truncate:
            batch.too_long.append((len(example), example.source))
            return
        batch.counts["cut"] += 1
        batch.counts["cut in a trained part"] += bool(example.weights[job.max_tokens :].any())
        cut = slice(job.max_tokens)
        example = Example(example.token_ids[cut].copy(), example.weights[cut].copy(), example.source)
    if not example.weights.any():
        after = f" after cutting it to {job.max_tokens:,} tokens" if job.truncate else ""
        raise DataError(f"{example.source}: no token is left to train on{after}; remove this record")
    batch.examples.append(example)
