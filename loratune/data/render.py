"""Renders all records to examples, in order, on several cores if there are many.

Jinja templates run in Python and hold its global lock; tokenizers release it. So each process renders one batch of
records while a thread tokenises another, which keeps two cores busy, and more cores need more processes. They are
spawned, not forked, because a fork of a process with CUDA or tokenizer threads may hang. Small data is rendered in
this process, because each worker imports transformers, which takes seconds. Errors name file:line and are raised
before training starts. Remarks about the result are collected as notes, each once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import get_args

from transformers import PreTrainedTokenizerBase

from loratune.config import DataConfig, TrainOn
from loratune.data.examples import Batch, Example, Plan, RenderJob, finish_batch, plan_batch, prompt_ids, reference
from loratune.data.pieces import Ids, Pieces
from loratune.data.record import Record, quoted
from loratune.data.records import raise_all
from loratune.data.template import (
    ChatTemplate,
    end_token,
    plain_prefix,
    prints_date,
    read_template,
    require_template,
    special_tokens,
)
from loratune.errors import ConfigError, DataError

__all__ = ["Example", "Rendered", "prompt_ids", "reference", "render"]

RECORDS_PER_BATCH = 256
RECORDS_PER_TASK = 4096
"""Records that a process renders at a time. After Ctrl-C, each process finishes its own."""
RECORDS_WORTH_PROCESSES = 20_000


@dataclass(frozen=True, slots=True)
class Rendered:
    """Examples in the order of their records, with notes for the user."""

    examples: list[Example]
    examples_per_record: list[int]
    """1, or the number of answers if each became an example of its own."""
    notes: list[str]


def render(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    max_tokens: int | None,
    stop_ids: frozenset[int],
) -> Rendered:
    """Renders records to examples.

    Args:
        tokenizer: the model's own, with its chat template (unless config.chat_template names another).
        max_tokens: longest allowed example; longer ones are errors, or cut with config.truncate. None: no limit.
        stop_ids: tokens at which generation stops, from the model's generation settings and tokenizer.
    Raises:
        DataError: a template rejects a conversation, an answer has no stop token, a document is too long, or
            nothing would be trained. The message has file:line of the first errors and counts the others.
        ModelError: there is no chat template for conversations, or no EOS token for plain text.
        ConfigError: train_on is unknown, or the worker processes ended.
    """
    if config.train_on not in get_args(TrainOn):
        raise ConfigError(f'train_on is "{config.train_on}"; it must be one of {", ".join(get_args(TrainOn))}')
    chat_template = read_template(config.chat_template) if config.chat_template else None
    if any(record.messages is not None for record in records):
        require_template(tokenizer, chat_template)
    if any(record.messages is None for record in records):
        end_token(tokenizer)  # raises ModelError if there is none
    job = RenderJob(
        tokenizer=tokenizer,
        chat_template=chat_template,
        train_on=config.train_on,
        stop_ids=stop_ids,
        special_ids=special_tokens(tokenizer),
        plain_prefix=plain_prefix(tokenizer),
        max_tokens=max_tokens,
        truncate=config.truncate,
        date=template_date(config),
    )
    whole = Batch()
    for batch in _batches(records, job, _processes(len(records), config.num_proc, tokenizer)):
        whole.add(batch)
    raise_all(whole.faults)
    _refuse_too_long(whole.too_long, len(records), max_tokens)
    return Rendered(whole.examples, whole.examples_per_record, _notes(whole.counts, len(records), max_tokens))


def template_date(config: DataConfig) -> datetime:
    """The time that chat templates print: the day of `config.template_date`, or today, at midnight."""
    day = config.template_date
    return datetime.fromisoformat(day) if day else datetime.combine(datetime.now().date(), datetime.min.time())


def with_date(config: DataConfig, tokenizer: PreTrainedTokenizerBase, day: str | None = None) -> DataConfig:
    """The settings with a date if the chat template prints one, so that a run prints the same date on every day.

    Args:
        tokenizer: with the chat template of the run, unless `config.chat_template` names a file.
        day: in the form YYYY-MM-DD, by default today.
    """
    template = read_template(config.chat_template) if config.chat_template else None
    if config.template_date is not None or not prints_date(tokenizer, template):
        return config
    return replace(config, template_date=day or template_date(config).date().isoformat())


def _batches(records: Sequence[Record], job: RenderJob, processes: int) -> Iterator[Batch]:
    """The results in order, one per process."""
    if processes == 1:
        yield _render_part(records, job)
        return
    size = min(-(-len(records) // processes), RECORDS_PER_TASK)
    parts = [records[at : at + size] for at in range(0, len(records), size)]
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(parts)), spawn, initializer=_leave_interrupts_to_parent) as pool:
            yield from pool.map(partial(_render_part, job=job), parts)
    except BrokenProcessPool as error:
        raise ConfigError(
            "the processes that render data ended unexpectedly; in a script of your own, put the call under "
            'if __name__ == "__main__":, or set num_proc to 1'
        ) from error


def _leave_interrupts_to_parent() -> None:
    """Lets the parent alone react to Ctrl-C, which reaches every process of a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render_part(records: Sequence[Record], job: RenderJob) -> Batch:
    """Renders records in this process. One batch is tokenised in a thread while the next is rendered to text."""
    whole, chat, pieces = Batch(), ChatTemplate(job.tokenizer, job.chat_template, job.date), Pieces(job.tokenizer)
    waiting: deque[tuple[Plan, Future[Ids]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for at in range(0, len(records), RECORDS_PER_BATCH):
            plan = plan_batch(records[at : at + RECORDS_PER_BATCH], job, chat, pieces)
            waiting.append((plan, thread.submit(pieces.encode, list(plan.pieces()))))
            if len(waiting) > 1:
                _finish_first(waiting, job, whole)
        while waiting:
            _finish_first(waiting, job, whole)
    return whole


def _finish_first(waiting: deque[tuple[Plan, Future[Ids]]], job: RenderJob, whole: Batch) -> None:
    plan, ids = waiting.popleft()
    whole.add(finish_batch(plan, ids.result(), job))


def _processes(n_records: int, num_proc: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of processes for `num_proc` cores. A process keeps two busy: one renders, the other tokenises."""
    if num_proc is not None and num_proc < 1:
        raise ConfigError(f"num_proc is {num_proc}; it must be at least 1")
    if num_proc is None and n_records < RECORDS_WORTH_PROCESSES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores_each = 2 if tokenizer.is_fast else 1  # a tokenizer in Python holds the global lock
    return min(max(1, (num_proc or cores) // cores_each), max(1, n_records))


def _refuse_too_long(too_long: list[tuple[int, str]], n_records: int, max_tokens: int | None) -> None:
    if not too_long:
        return
    longest = sorted(too_long, key=lambda item: -item[0])
    tokens, source = longest[0]
    others = ", ".join(f"{source} ({tokens:,})" for tokens, source in longest[1:4])
    raise DataError(
        f"{source}: {tokens:,} tokens, but at most {max_tokens:,} fit; {len(too_long):,} of {n_records:,} records "
        f"are too long{f', next: {others}' if others else ''}. Cut them with --truncate, or raise "
        f"--tokens-per-row to {tokens} if the model's context allows it"
    )


def _notes(counts: Counter[str], n_records: int, max_tokens: int | None) -> list[str]:
    notes = []
    if split := counts["one per answer"]:
        notes.append(
            f"The chat template shows earlier turns differently once the conversation goes on; {split:,} of "
            f"{n_records:,} conversations became one example per answer, each as the model sees it in inference."
        )
    if trailing := counts["trailing messages"]:
        notes.append(
            f"{trailing:,} of {n_records:,} conversations end with a message that is not an answer; that message is "
            "not used."
        )
    if ignored := counts["weight ignored"]:
        notes.append(
            f'train_on "all" trains every token, so "weight" has no effect (conversations that set it: {ignored:,}).'
        )
    if twice := counts["arguments twice"]:
        notes.append(
            "Tool arguments are JSON in a string, and the chat template prints that string in quotes (messages: "
            f"{twice:,}), as in inference with such messages; write an object to train on an object."
        )
    if cut := counts["cut"]:
        notes.append(
            f"{cut:,} of {n_records:,} documents were cut to {max_tokens:,} tokens, "
            f"{counts['cut in a trained part']:,} of them in a trained part, which then has no stop token."
        )
    for key, count in counts.items():
        if key.startswith("unknown stop "):
            notes.append(
                f'Answers end with "{key.removeprefix("unknown stop ")}", which is not among the tokens that the '
                "model stops at: set eos_token_id in its generation_config.json."
            )
        if key.startswith("unshown "):
            notes.append(
                f"The chat template does not print the field {quoted([key.removeprefix('unshown ')])} of messages "
                f"(messages: {count:,}), so it is not trained."
            )
        if key.startswith("left out "):
            notes.append(
                f'The chat template leaves out or rewrites text of the role "{key.removeprefix("left out ")}" '
                f"(messages: {count:,}); `loratune preview` shows the rendered text."
            )
    return notes
