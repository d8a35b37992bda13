"""Pieces of quantised weights: each row or column once, and no piece above the bound of dense elements."""

from __future__ import annotations

import pytest

from loratune.precision.pieces import PIECE_ELEMENTS, PIECE_STEP, piece_elements, pieces

SIZES = [(22016, 4096), (4096, 22016), (4096, 11008), (100, 7), (57344, 8192)]


@pytest.mark.parametrize("tokens", [1, 2048, 8192])
@pytest.mark.parametrize(("length", "other"), SIZES)
def test_pieces_cover_everything_once(length, other, tokens):
    parts = pieces(length, other, tokens)
    assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, length)
    most = max(PIECE_ELEMENTS, tokens * max(length, other))
    assert all((p.stop - p.start) * other <= most + PIECE_STEP * other for p in parts)
    assert piece_elements(length, other, 48, tokens) == max(p.stop - p.start for p in parts) * (other + 48)


def test_a_weight_no_larger_than_its_operands_stays_whole():
    for length, other in SIZES:
        assert len(pieces(length, other, min(length, other))) == 1
    assert len(pieces(22016, 4096, 1)) == 3
    assert len(pieces(22016, 4096, 2048)) == 2
