"""Keyed dropout: the share of kept elements, and masks that depend on key, layer, token and feature only."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.dropout import dropout_key, keep_mask, layer_salt, row_key
from tests.ops.twins import compare, needs_triton

SHAPE = (400, 256)

COMPARE = """
import torch
from loratune.ops import dropout_kernels
from loratune.ops.dropout import keep_mask, row_key

for key, position, salt, shape, probability, first in (
    (0, 0, 0, (1, 1), 0.5, 0), (3 << 61 | 5, 1000, -77, (37, 300), 0.05, 64), (1 << 31, 7, 1 << 30, (16, 256), 0.9, 3)
):
    row = row_key(key, position)
    asked = row, salt, shape, probability, first
    assert torch.equal(dropout_kernels.keep_mask(*asked), keep_mask(*asked))
"""


def mask(seed=0, step=0, path="layers.0.q_proj", position=0, shape=SHAPE, probability=0.5):
    return keep_mask(row_key(dropout_key(seed, step), position), layer_salt(path), shape, probability)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_keeps_the_right_share(probability):
    kept = mask(probability=probability).float()
    # Five standard deviations of a mean of n independent decisions; for rows and columns as well.
    spread = 5 * (probability * (1 - probability)) ** 0.5
    assert abs(kept.mean() - (1 - probability)) < spread / kept.numel() ** 0.5
    assert (kept.mean(0) - (1 - probability)).abs().max() < spread / SHAPE[0] ** 0.5
    assert (kept.mean(1) - (1 - probability)).abs().max() < spread / SHAPE[1] ** 0.5


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"path": "layers.0.k_proj"}, {"position": 1}])
def test_each_part_of_the_key_changes_half_of_the_mask(other):
    differing = (mask() != mask(**other)).float().mean()
    assert abs(differing - 0.5) < 5 * 0.5 / (SHAPE[0] * SHAPE[1]) ** 0.5


def test_a_token_has_the_same_mask_at_every_place():
    whole = mask(position=1000)
    assert torch.equal(whole[37:90], mask(position=1037, shape=(53, SHAPE[1])))
    row = row_key(dropout_key(0, 0), 1000)
    assert torch.equal(whole[37:90], keep_mask(row, layer_salt("layers.0.q_proj"), (53, SHAPE[1]), 0.5, first=37))
    assert torch.equal(whole, mask(position=1000))


def test_the_same_numbers_in_every_version():
    """A resumed run must drop the same elements as the first one, so these numbers never change."""
    assert dropout_key(0, 0) == 0xA706DD2F4D197E6F
    assert dropout_key(1, 7) == 0x7716DA39CBA275B2
    assert mask(shape=(2, 16)).int().tolist() == [
        [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1],
        [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
    ]


@needs_triton
def test_the_kernel_gives_the_same_bits():
    compare(COMPARE)
