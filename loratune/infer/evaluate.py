"""Evaluation of a model's answers: exact match of generated answers, and the loss as perplexity.

Exact match is strict on purpose. Reference and answer must agree in every character except white space: a run counts
as one space, and white space at the ends does not count. There is no case folding, no removal of punctuation and no
"contains", because two numbers are comparable only under a rule that needs no guess. Every answer is stored, so that
a person can read the wrong ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.errors import DataError
from loratune.infer.engine import BATCH_SIZE, generate


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, the model's answer and the reference."""

    prompt: str
    reference: str
    answer: str
    ok: bool


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """All answers of one model to a set of prompts."""

    answers: tuple[Answer, ...]
    seconds: float
    new_tokens: int

    @property
    def correct(self) -> int:
        """Number of answers that equal their reference."""
        return sum(answer.ok for answer in self.answers)

    @property
    def share(self) -> float:
        """Share of correct answers, 0 to 1."""
        return self.correct / len(self.answers)

    @property
    def wrong(self) -> tuple[Answer, ...]:
        """Answers that differ from their reference, in order."""
        return tuple(answer for answer in self.answers if not answer.ok)


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean negative log-likelihood over trained tokens, as `training.step.evaluate_loss` returns it."""

    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens of the same loss; infinite above 709 nats."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model (a base, or an adapter on it) on one data set. A value is None if it was not measured."""

    name: str
    loss: Loss | None
    exact: ExactMatch | None

    def as_json(self, *, answers: bool = False) -> dict[str, Any]:
        """Plain values for a JSON file; with `answers`, every answer too."""
        values: dict[str, Any] = {"name": self.name}
        if self.loss is not None:
            # JSON has no infinity; the loss gives the same information.
            perplexity = self.loss.perplexity if math.isfinite(self.loss.perplexity) else None
            values |= {"loss": self.loss.nats_per_token, "perplexity": perplexity, "tokens": self.loss.tokens}
        if self.exact is not None:
            values |= {
                "exact_match": self.exact.share,
                "correct": self.exact.correct,
                "prompts": len(self.exact.answers),
                "new_tokens": self.exact.new_tokens,
                "seconds": round(self.exact.seconds, 3),
            }
            if answers:
                values["answers"] = [asdict(answer) for answer in self.exact.answers]
        return values


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    *,
    stop_ids: Collection[int],
    shown: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> ExactMatch:
    """Answers every prompt greedily, with the active adapter, and compares the answer with its reference.

    Args:
        prompts: token ids, each up to the beginning of the answer (`data.render.prompt_ids`).
        references: the correct answers, as text.
        shown: the prompts for display; by default decoded, with their template.
        max_new_tokens: by default twice the tokens of the longest reference and eight more. A longer answer cannot
            be right, and a right one may use more tokens than its reference.

    Raises: DataError: there are no prompts, or another number of references than of prompts; and as `generate`.
    """
    if not prompts or len(prompts) != len(references):
        raise DataError(f"exact match needs a reference for each prompt; got {len(prompts)} and {len(references)}")
    if max_new_tokens is None:
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
        max_new_tokens = 2 * max(lengths) + 8
    started = time.perf_counter()
    tokens = generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, batch_size=batch_size)
    seconds = time.perf_counter() - started
    answers = tuple(
        Answer(text, reference, answer, normalised(answer) == normalised(reference))
        for text, reference, answer in zip(
            shown or _texts(tokenizer, prompts), references, _texts(tokenizer, tokens), strict=True
        )
    )
    return ExactMatch(answers, seconds, sum(map(len, tokens)))


def normalised(text: str) -> str:
    """The text with its ends stripped and every run of white space as one space; otherwise unchanged."""
    return " ".join(text.split())


def _texts(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> list[str]:
    return [
        str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in sequences
    ]
