"""Evaluation on held-out records: loss over the tokens that would train, and exact match of generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.base.forward import prepare
from loratune.base.load import max_document_tokens, vocabulary
from loratune.config import DataConfig, RunConfig
from loratune.data.feed import check_ids, longest_allowed, rows_of_epoch
from loratune.data.record import Record
from loratune.data.records import read_records
from loratune.data.render import prompt_ids, reference, render, template_date
from loratune.data.template import ChatTemplate
from loratune.errors import DataError
from loratune.infer.evaluate import Evaluation, ExactMatch, Loss, exact_match
from loratune.training.step import evaluate_loss

_ROW = 2048


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    name: str,
    stop_ids: frozenset[int],
    settings: DataConfig,
    generate: bool = True,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """Evaluates the model with its active adapter.

    Args:
        records: held-out records, see `data.records.read_records`.
        name: name of the model in the result.
        generate: False skips exact match, which needs records with a question and an answer.
        max_new_tokens: longest answer; by default somewhat more than the longest reference.
    """
    chat = chat_of(tokenizer, settings)
    exact = answers(model, tokenizer, records, stop_ids, max_new_tokens, chat) if generate else None
    return Evaluation(name, loss(model, tokenizer, records, stop_ids, settings), exact)


def loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    stop_ids: frozenset[int],
    settings: DataConfig,
) -> Loss:
    """Mean negative log-likelihood over the trained tokens of all records.

    Rows have `settings.tokens_per_row` tokens. If it is unset, they have 2,048, or as many as the longest record.
    """
    limit = longest_allowed(settings, max_document_tokens(model))
    examples = render(records, tokenizer, settings, max_tokens=limit, stop_ids=stop_ids).examples
    check_ids(tokenizer, vocabulary(model), examples)
    tokens_per_row = settings.tokens_per_row or max(_ROW, *map(len, examples))
    rows = rows_of_epoch(examples, tokens_per_row, pad_id(tokenizer), seed=0, epoch=0)
    forward = prepare(model, tokens_per_row)
    with forward.installed():
        measured = evaluate_loss(forward, rows)
        return Loss(measured.loss, measured.trained_tokens)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    stop_ids: frozenset[int],
    max_new_tokens: int | None = None,
    chat: ChatTemplate | None = None,
) -> ExactMatch:
    """Exact match of generated answers to the last assistant turn (or completion) of each record.

    Args:
        chat: the template and its date; by default the tokenizer's own template, today.
    Raises: DataError: a record is raw text and contains no question.
    """
    chat = chat or ChatTemplate(tokenizer)
    raw = next((record.source for record in records if record.text is not None), None)
    if raw is not None:
        raise DataError(f"{raw}: raw text has no question to answer; measure only the loss with --no-generate")
    return exact_match(
        model,
        tokenizer,
        [prompt_ids(record, tokenizer, chat) for record in records],
        [reference(record, tokenizer, stop_ids, chat) for record in records],
        stop_ids=stop_ids,
        shown=[_question(record) for record in records],
        max_new_tokens=max_new_tokens,
    )


def chat_of(tokenizer: PreTrainedTokenizerBase, settings: DataConfig) -> ChatTemplate:
    """The tokenizer's chat template with the date of a run."""
    return ChatTemplate(tokenizer, date=template_date(settings))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token of rows. No document attends to it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def _question(record: Record) -> str:
    """The question of a record, for display."""
    if record.messages is None:
        return record.prompt or ""
    asked = [m for m in record.messages if m["role"] == "user"]
    return str(asked[-1].get("content", "")) if asked else ""


def real_prompts(
    tokenizer: PreTrainedTokenizerBase, run: RunConfig | None, data: Sequence[str], count: int = 12
) -> list[list[int]]:
    """Prompts for comparing two models, from the given files, else from the run's held-out or training files.

    Args:
        run: settings of the run that trained the adapter; its files may be missing.
        data: files to use instead.
        count: largest number of prompts; they are spread over the records.

    Raises: DataError: no file with prompts exists.
    """
    recorded = (run.dataset.eval_data or run.data) if run else []
    paths = list(data) or [path for path in recorded if Path(path).exists()]
    if not paths:
        why = f"the run's data, {recorded[0]}, is missing" if recorded else "the adapter records no data"
        raise DataError(f"no prompts to compare on: {why}; name a file with --data")
    records = read_records(paths, run.dataset.format if run and not data else "auto")
    chat = chat_of(tokenizer, run.dataset if run else DataConfig())
    chosen = records[:: max(1, len(records) // count)][:count]
    return [
        tokenizer(record.text)["input_ids"] if record.text is not None else prompt_ids(record, tokenizer, chat)
        for record in chosen
    ]
