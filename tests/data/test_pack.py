"""Rows are full, hold whole documents, are deterministic, and shift targets inside documents only."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from loratune.data.examples import Example
from loratune.data.pack import best_fit, fullness, make_row

CAPACITY = 2048


def lognormal_lengths(count: int) -> list[int]:
    rng = random.Random(0)
    return [min(CAPACITY, 1 + int(rng.lognormvariate(5.5, 1))) for _ in range(count)]


def example(*ids: int, trained_from: int = 1) -> Example:
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[max(trained_from, 1) :] = 1
    return Example(np.array(ids, dtype=np.int32), weights, "f:1")


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_in_exactly_one_row_and_no_row_overflows(seed: int) -> None:
    lengths = lognormal_lengths(500)
    rows = best_fit(lengths, CAPACITY, seed)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= CAPACITY for row in rows)


def test_no_two_rows_could_be_merged() -> None:
    """Best fit opens a row only if no other has enough space, so the two emptiest rows never fit into one."""
    lengths = lognormal_lengths(2000)
    used = sorted(sum(lengths[index] for index in row) for row in best_fit(lengths, CAPACITY, 0))
    assert used[0] + used[1] > CAPACITY


def test_short_documents_fill_rows() -> None:
    lengths = lognormal_lengths(20_000)
    rows = best_fit(lengths, CAPACITY, 0)
    fewest = -(-sum(lengths) // CAPACITY)
    assert len(rows) <= 1.01 * fewest + 1
    assert fullness(lengths, len(rows), CAPACITY) == pytest.approx(sum(lengths) / (len(rows) * CAPACITY))
    assert fullness([], 0, CAPACITY) == 0


def test_the_seed_decides_alone() -> None:
    lengths = lognormal_lengths(300)
    assert best_fit(lengths, CAPACITY, 1) == best_fit(lengths, CAPACITY, 1)
    assert best_fit(lengths, CAPACITY, 1) != best_fit(lengths, CAPACITY, 2)


def test_a_hundred_thousand_documents_take_seconds() -> None:
    lengths = lognormal_lengths(100_000)
    start = time.process_time()
    best_fit(lengths, CAPACITY, 0)
    assert time.process_time() - start < 10  # about 0.3 s; quadratic packing would take minutes


def test_a_row_by_hand() -> None:
    row = make_row([example(5, 6, 7, trained_from=2), example(8, 9)], capacity=8, pad_id=3)
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 3, 3, 3]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row.targets.tolist() == [0, 7, 0, 9, 0, 0, 0, 0]
    assert row.weights.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert row.cu_seqlens.tolist() == [0, 3, 5, 8]
    kinds = (row.tokens, row.position_ids, row.targets, row.weights, row.cu_seqlens)
    assert [str(tensor.dtype) for tensor in kinds] == ["torch.int64"] * 3 + ["torch.float32", "torch.int32"]


def test_a_full_row_has_no_padding_document() -> None:
    row = make_row([example(5, 6), example(7, 8)], capacity=4, pad_id=0)
    assert row.cu_seqlens.tolist() == [0, 2, 4]


def test_a_row_keeps_all_weight_and_predicts_only_tokens_of_the_same_document() -> None:
    rng = np.random.default_rng(0)
    documents = [example(*rng.integers(1, 99, size=length)) for length in (1, 2, 17, 40, 3)]
    row = make_row(documents, capacity=80, pad_id=0)
    assert row.weights.sum() == sum(document.weights.sum() for document in documents)
    for position in np.flatnonzero(row.weights.numpy()):
        assert row.targets[position] == row.tokens[position + 1]
        assert row.position_ids[position + 1] == row.position_ids[position] + 1
