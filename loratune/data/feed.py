"""Files to a data set, and a data set to the rows of an epoch, which the training loop reads.

Rendered examples are cached on disk under the hash of all their inputs, so a second run on the same data starts at
once and no run sees stale tokens. A row is built on access. It depends only on epoch and index, so a resumed run
needs no other state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from transformers import PreTrainedTokenizerBase

from loratune.config import DataConfig
from loratune.data import cache
from loratune.data.examples import Example
from loratune.data.files import content_hash
from loratune.data.pack import Row, best_fit, fullness, make_row
from loratune.data.prompting import PromptForm, forms_of
from loratune.data.record import Record
from loratune.data.records import read
from loratune.data.render import render, with_date
from loratune.data.template import prints_date, read_template
from loratune.errors import ConfigError, DataError, ModelError, OutputError

CUT_TO = 2048
"""Tokens to which `truncate` cuts documents if no row size is set."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rendered training and held-out examples, with notes and the hashes of their files."""

    train: list[Example]
    eval: list[Example]
    """Held-out examples; empty if nothing is held out."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user about reading and rendering, without repetitions."""
    file_hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 (hex) of each data file's bytes, for the model card."""
    forms: tuple[PromptForm, ...] = ()
    """Forms of the training records."""


class EpochRows(Sequence[Row]):
    """The packed rows of one epoch. A row is built on access."""

    def __init__(self, examples: Sequence[Example], tokens_per_row: int, pad_id: int, seed: int) -> None:
        lengths = [len(example) for example in examples]
        self.packing = best_fit(lengths, tokens_per_row, seed)
        """Indices of the examples in each row."""
        self.fullness = fullness(lengths, len(self.packing), tokens_per_row)
        """Share of the tokens that belong to documents; the rest is padding."""
        self.tokens_per_row = tokens_per_row
        self._examples, self._pad_id = examples, pad_id

    def __len__(self) -> int:
        return len(self.packing)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        chosen = [self._examples[at] for at in self.packing[index]]
        return make_row(chosen, self.tokens_per_row, self._pad_id)


def rows_of_epoch(
    examples: Sequence[Example], tokens_per_row: int, pad_id: int, *, seed: int, epoch: int
) -> EpochRows:
    """The rows of an epoch. Packing and order depend on (seed, epoch) only.

    Args:
        examples: each of at most tokens_per_row tokens.
        pad_id: token id of the padding.
        epoch: counts from 0.
    """
    return EpochRows(examples, tokens_per_row, pad_id, random.Random(f"{seed}/{epoch}").getrandbits(63))


def prepare(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    stop_ids: frozenset[int],
    max_tokens: int | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> Dataset:
    """Reads, checks, splits and renders the data, or loads it from the cache.

    Args:
        paths: training files or hub data set ids.
        stop_ids: tokens at which generation stops.
        max_tokens: the model's context length, None for no limit. An example must fit into it and into a row.
        vocabulary: rows of the model's embedding, None if unknown. Every token must have one.
        seed: selects the held-out records.
        cache_dir: folder for rendered data; None: no cache. The caller resolves `config.cache_dir`.
    Raises: DataError, ModelError, ConfigError: see `read_records` and `render`. OutputError: the cache folder that
        `config.cache_dir` names cannot be written. For any other folder, that is a note.
    """
    _check(config)
    template = read_template(config.chat_template) if config.chat_template else None
    config = with_date(config, tokenizer)
    limit = longest_allowed(config, max_tokens)
    hashes = {path: content_hash(path) for path in [*paths, *config.eval_data]}
    key = cache.key_of(hashes, list(paths), tokenizer, config, limit, stop_ids, seed)
    if cache_dir is not None and (found := cache.load(cache_dir, key)) is not None:
        examples, held_examples, remarks, forms = found
        check_ids(tokenizer, vocabulary, [*examples, *held_examples])
        return Dataset(examples, held_examples, remarks, hashes, forms)
    reading = read(paths, config.format)
    notes = list(reading.notes)
    if config.eval_data:
        held_out = read(config.eval_data, config.format)
        notes += [note for note in held_out.notes if note not in notes]
        train, held = reading.records, held_out.records
    else:
        train, held = split(reading.records, config.eval_fraction, seed)
    notes += _duplicates(train, held)
    if config.template_date is not None and not prints_date(tokenizer, template):
        notes.append("The chat template prints no date, so template_date has no effect.")
    rendered = render([*train, *held], tokenizer, config, max_tokens=limit, stop_ids=stop_ids)
    check_ids(tokenizer, vocabulary, rendered.examples)
    n_train = sum(rendered.examples_per_record[: len(train)])
    dataset = Dataset(
        rendered.examples[:n_train], rendered.examples[n_train:], notes + rendered.notes, hashes, forms_of(train)
    )
    if cache_dir is not None:
        try:
            cache.store(cache_dir, key, dataset.train, dataset.eval, dataset.notes, dataset.forms)
        except OutputError as error:
            if config.cache_dir is not None:  # the user named this folder
                raise
            dataset.notes.append(str(error))
    return dataset


def split(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Returns (training, held-out) records, both in their original order. A positive share holds out at least one.

    Raises: DataError: there are too few records to hold one out.
    """
    if fraction == 0:
        return list(records), []
    if len(records) < 2:
        raise DataError(
            f"{records[0].source}: with a single record nothing can be held out; set --eval-fraction 0, or name "
            "held-out files with --eval-data"
        )
    n_held = min(max(1, round(len(records) * fraction)), len(records) - 1)
    held = set(random.Random(seed).sample(range(len(records)), n_held))
    train = [record for index, record in enumerate(records) if index not in held]
    return train, [records[index] for index in sorted(held)]


def longest_allowed(config: DataConfig, context: int | None) -> int | None:
    """Tokens of the longest allowed document: a row or the model's context. None if neither is known."""
    row = config.tokens_per_row
    if row is None and config.truncate:
        row = CUT_TO
    return min((limit for limit in (row, context or None) if limit is not None), default=None)


def check_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, examples: Sequence[Example]) -> None:
    """Raises ModelError if an example holds a token that the model's embedding of `vocabulary` rows lacks."""
    if vocabulary is None:
        return
    for example in examples:
        if (largest := int(example.token_ids.max(initial=0))) >= vocabulary:
            name = tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f'{example.source}: the token "{name}" has id {largest}, but the vocabulary of the model has '
                f"{vocabulary} tokens; use the model's own tokenizer and chat template, or enlarge the model with "
                "resize_token_embeddings and save it"
            )


def _check(config: DataConfig) -> None:
    if not 0 <= config.eval_fraction < 1:
        raise ConfigError(f"eval_fraction is {config.eval_fraction}; it must be at least 0 and less than 1")
    if config.tokens_per_row is not None and config.tokens_per_row < 2:
        raise ConfigError(f"tokens_per_row is {config.tokens_per_row}; it must be at least 2")


def _duplicates(train: Sequence[Record], held: Sequence[Record]) -> list[str]:
    seen = {_content(record) for record in train}
    twice = [record.source for record in held if _content(record) in seen]
    if not twice:
        return []
    return [
        f"{len(twice):,} of {len(held):,} held-out records are also in the training data (the first is {twice[0]}), "
        "so held-out figures look better than they are."
    ]


def _content(record: Record) -> bytes:
    whole = (record.messages, record.tools, record.prompt, record.completion, record.text)
    return hashlib.sha256(repr(whole).encode("utf-8", "surrogatepass")).digest()
