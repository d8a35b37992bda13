"""The data of a sweep's jobs: read, rendered and packed once for all jobs that share them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from loratune.base import load as base
from loratune.config import RunConfig
from loratune.data import feed
from loratune.data.feed import Dataset
from loratune.data.render import with_date
from loratune.errors import LoratuneError
from loratune.runs.run import completed, rows_of
from loratune.sweep.plan import PlannedJob
from loratune.training.course import Course, Rows


@dataclass(frozen=True)
class JobData:
    """Data and course of a job, and its complete settings."""

    config: RunConfig
    dataset: Dataset
    rows: Rows
    course: Course
    tokenizer: PreTrainedTokenizerBase


def read_data(jobs: Sequence[PlannedJob], day: str, cache_dir: str | None) -> tuple[dict[str, JobData], list[str]]:
    """Reads and packs every job's data, once for all jobs that share them; also returns notes."""
    first = jobs[0].config
    tokenizers: dict[str | None, PreTrainedTokenizerBase] = {}
    datasets, packed = dict[str, Dataset](), dict[str, Rows]()
    found, notes, chosen = dict[str, JobData](), list[str](), dict[str, list[str]]()
    model_config = base.load_config(first.model, trust_remote_code=first.trust_remote_code)
    for job in jobs:
        config, template = job.config, job.config.dataset.chat_template
        try:
            if template not in tokenizers:
                tokenizers[template] = base.load_tokenizer(
                    config.model, template, trust_remote_code=config.trust_remote_code
                )
            config = replace(config, dataset=with_date(config.dataset, tokenizers[template], day))
            key = repr((config.data, config.dataset, config.training.seed))
            if key not in datasets:
                datasets[key] = _read(config, tokenizers[template], model_config, cache_dir)
            dataset = datasets[key]
            config, choices = completed(config, dataset, model_config)
        except LoratuneError as error:
            raise type(error)(f'job "{job.name}": {error}') from error
        if (row_key := f"{key} {config.dataset.tokens_per_row}") not in packed:
            packed[row_key] = _rows(tokenizers[template], dataset, config)
        remarks = dataset.notes + _stop_note(config, tokenizers[template], dataset)
        notes += [note for note in remarks if note not in notes]
        for each in choices:
            chosen.setdefault(str(each), []).append(job.name)
        rows = packed[row_key]
        found[job.name] = JobData(config, dataset, rows, Course(rows, config.training), tokenizers[template])
    notes += [text if len(names) == len(jobs) else f"{', '.join(names)}: {text}" for text, names in chosen.items()]
    split = {(tuple(j.config.data), j.config.training.seed) for j in jobs if not j.config.dataset.eval_data}
    if len(split) > len({data for data, _ in split}):
        notes.append(
            "jobs with different seeds hold out different records, so their held-out losses differ by more than the "
            "adapters do; name the same held-out files for all with eval_data"
        )
    return found, notes


def _read(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, cache_dir: str | None) -> Dataset:
    return feed.prepare(
        config.data,
        tokenizer,
        config.dataset,
        stop_ids=base.stop_ids(config.model, tokenizer, trust_remote_code=config.trust_remote_code),
        max_tokens=base.max_document_tokens(model_config),
        vocabulary=base.configured_vocabulary(model_config),
        seed=config.training.seed,
        cache_dir=cache_dir,
    )


def _stop_note(config: RunConfig, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> list[str]:
    return base.stop_note(config.model, tokenizer, dataset.forms, trust_remote_code=config.trust_remote_code)


def _rows(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, config: RunConfig) -> Rows:
    rows = rows_of(tokenizer, dataset, config)
    return Rows(functools.lru_cache(maxsize=2)(rows.of_epoch), rows.held_out)
