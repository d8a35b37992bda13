"""Micro-steps become one row: blocks, padding, extra columns, and the owner of each document."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loratune.data.pack import Row, make_row
from loratune.many.step import MicroStep, join_micro_steps, segment_of_documents, trim
from tests.training.helpers import examples


def micro_step(slot: int, count: int, tokens: int = 256) -> MicroStep:
    row = make_row(examples(count, seed=slot), tokens, 0)
    row = trim(replace(row, columns={"score": torch.arange(tokens, dtype=torch.float32)}))
    return MicroStep(slot, row, 1.0, None, 0)


def documents(row: Row) -> list[tuple[int, int]]:
    bounds = row.cu_seqlens.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


@pytest.mark.parametrize("block", [1, 64])
def test_each_document_belongs_to_its_micro_step_and_padding_to_none(block: int) -> None:
    micro_steps = [micro_step(2, 3), micro_step(0, 1), micro_step(1, 4)]
    row, segments = join_micro_steps(micro_steps, block)
    owners = segment_of_documents(row, segments).tolist()
    assert owners[-1] == -1, "the place behind the last document is unused"
    assert [segment.slot for segment in segments] == [2, 0, 1]
    assert all(segment.start % block == 0 for segment in segments)
    for (start, stop), owner in zip(documents(row), owners[:-1], strict=True):
        inside = [nth for nth, segment in enumerate(segments) if segment.start <= start < stop <= segment.stop]
        assert inside == ([] if owner == -1 else [owner])
    assert (-1 in owners[:-1]) == (block > 1)


@pytest.mark.parametrize("block", [1, 64])
def test_tokens_weights_and_columns_stay_with_their_documents(block: int) -> None:
    micro_steps = [micro_step(0, 2), micro_step(1, 3)]
    row, segments = join_micro_steps(micro_steps, block)
    for one, segment in zip(micro_steps, segments, strict=True):
        own = slice(segment.start, segment.stop)
        for name in ("tokens", "position_ids", "targets", "weights"):
            assert torch.equal(getattr(row, name)[own], getattr(one.row, name)), name
        assert torch.equal(row.columns["score"][own], one.row.columns["score"])
    assert float(row.weights.sum()) == sum(float(one.row.weights.sum()) for one in micro_steps)


def test_trimming_removes_the_padding_of_every_field() -> None:
    documents_of_row = examples(3)
    row = make_row(documents_of_row, 256, 0)
    trimmed = trim(replace(row, columns={"score": torch.ones(256)}))
    used = sum(map(len, documents_of_row))
    assert len(trimmed.tokens) == len(trimmed.columns["score"]) == int(trimmed.cu_seqlens[-1]) == used
