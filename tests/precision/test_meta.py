"""On the meta device a quantised weight allocates the bytes that it allocates on a GPU, without any data."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.meter import StorageMeter, rounded
from loratune.ops.projection import StackedAdapters
from loratune.precision.contract import weight_format
from loratune.precision.fp8_rows import adapter_columns
from loratune.precision.pieces import piece_elements

D_OUT, D_IN, RANKS, TOKENS = 14336, 4096, 16, 512


def projection(precision: str):
    """Of one weight without data."""
    form = weight_format(precision)
    weight = form.quantise(torch.empty(D_OUT, D_IN, dtype=torch.bfloat16, device="meta"))
    assert weight.nbytes == pytest.approx(form.bytes_held((D_OUT, D_IN), 2), rel=1e-3)
    layout = StackedAdapters([slice(0, D_OUT)], [slice(0, RANKS)], [1.0])
    return form.project(form.join([weight], RANKS), None, layout).projection


def peak_of(run) -> int:
    with StorageMeter() as meter:
        run()
    return meter.peak


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_a_product_takes_the_bytes_of_its_operands_alone(precision: str) -> None:
    p = projection(precision)
    x = torch.empty(TOKENS, D_IN + p.pad_columns, dtype=torch.bfloat16, device="meta")
    dy = torch.empty(TOKENS, D_OUT + p.pad_columns, dtype=torch.bfloat16, device="meta")
    low_rank = rounded(2 * TOKENS * RANKS)
    columns, scale = adapter_columns(RANKS), rounded(4 * TOKENS)
    if precision == "nf4":
        forward = 2 * piece_elements(D_OUT, D_IN, p.pad_columns, TOKENS)
        backward = 2 * piece_elements(D_IN, D_OUT, p.pad_columns, TOKENS)
    else:
        forward = rounded(TOKENS * (D_IN + columns)) + scale
        backward = rounded(TOKENS * (D_OUT + columns)) + scale + rounded(D_IN * (D_OUT + columns))
    y, dx = rounded(2 * TOKENS * D_OUT), rounded(2 * TOKENS * D_IN)
    assert peak_of(lambda: p.forward(x)) == pytest.approx(forward + low_rank + y, rel=2e-3)
    kept = [p.backward(dy)]
    assert peak_of(lambda: kept.append(kept[0].d_input())) == pytest.approx(
        backward + dx + (low_rank if precision == "fp8" else 0), rel=2e-3
    )
