"""Examples to rows: several documents end to end in exactly `capacity` tokens, so every step has one shape.

Best-fit decreasing packs the longest documents first, each into the fullest row with enough space. It needs at most
11/9 of the minimum number of rows (Johnson 1974). Rows are more than 99 % full if documents are much shorter than a
row. Concatenating and cutting would fill rows completely, but cut documents cost quality (Ding et al. 2024,
arXiv:2404.10830). Here a document stays whole.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loratune.data.examples import Example


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row of T tokens, on the CPU. Padding at the end is a document of its own with weight 0."""

    tokens: Tensor
    """(T,) int64"""
    position_ids: Tensor
    """(T,) int64, from 0 in each document; 0 in the padding"""
    targets: Tensor
    """(T,) int64: the next token of the same document where its weight is not 0, else 0"""
    weights: Tensor
    """(T,) float32: loss weight of predicting targets[t] at position t"""
    cu_seqlens: Tensor
    """(documents + 1,) int32: start of each document, then T"""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (T,) float32: additional numbers for each token, which an objective reads."""


def best_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Packs documents into rows by best-fit decreasing.

    Args:
        lengths: tokens of each document, from 1 to capacity.
        capacity: tokens in a row.
        seed: shuffles documents of equal length, the documents in a row, and the rows.
    Returns: for each row the indices of its documents. Equal arguments give equal rows.
    Time: O(n log n) for n documents.
    """
    assert all(0 < length <= capacity for length in lengths)
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda index: -lengths[index])  # stable: equal lengths stay shuffled
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # the keys of rows_by_space, sorted
    for index in order:
        at = bisect_left(spaces, lengths[index])
        if at == len(spaces):
            space = capacity
            row: list[int] = []
            rows.append(row)
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        row.append(index)
        left = space - lengths[index]
        if left and left not in rows_by_space:
            rows_by_space[left] = []
            insort(spaces, left)
        if left:
            rows_by_space[left].append(row)
    for row in rows:
        rng.shuffle(row)
    rng.shuffle(rows)
    return rows


def fullness(lengths: Sequence[int], n_rows: int, capacity: int) -> float:
    """Share of the rows' tokens that belong to documents, from 0 to 1."""
    return sum(lengths) / (n_rows * capacity) if n_rows else 0.0


def make_row(examples: Sequence[Example], capacity: int, pad_id: int) -> Row:
    """Joins documents to one row and pads it.

    Args:
        examples: documents with at most `capacity` tokens in total.
        capacity: T, tokens in the row.
        pad_id: any valid token id. No document attends to padding, and its weight is 0.
    """
    lengths = [len(example) for example in examples]
    used = sum(lengths)
    assert 0 < used <= capacity
    bounds = np.cumsum([0, *lengths, *([capacity - used] if used < capacity else [])])
    tokens = np.full(capacity, pad_id, dtype=np.int64)
    targets = np.zeros(capacity, dtype=np.int64)
    weights = np.zeros(capacity, dtype=np.float32)
    position_ids = np.arange(capacity) - np.repeat(bounds[:-1], np.diff(bounds))
    position_ids[used:] = 0  # padding may be longer than the model's context
    for example, start, length in zip(examples, bounds.tolist(), lengths, strict=False):
        tokens[start : start + length] = example.token_ids
        weights[start : start + length - 1] = example.weights[1:]  # the last token has no target
        targets[start : start + length - 1] = example.token_ids[1:]
    targets[weights == 0] = 0
    return Row(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
    )
