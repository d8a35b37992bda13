"""Checkpoints in 8 bits on a CUDA device: read tensor by tensor, with the values of the files."""

from __future__ import annotations

import pytest
import torch

from loratune.base.load import load
from loratune.precision.linear import quantised_layers
from tests.precision.test_fp8_files import (
    TOKENS,
    a_model,
    as_a_whole,
    by_rows,
    logits,
    off,
    products_with_adapter_columns,
    write,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device that multiplies numbers of 8 bits",
    ),
]


@pytest.mark.parametrize("kind", ["rows", "blocks"])
def test_a_checkpoint_in_8_bits_is_never_dense_on_the_device(kind, tmp_path):
    """In bfloat16 it would take twice the bytes. Loading needs memory for part of one weight beside the model."""
    model = a_model(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8)
    write(tmp_path, model, kind)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load(str(tmp_path), "fp8", "cuda")
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert peak < held + (64 << 20)  # dense, 90 MiB more
    linear = sum(layer.in_features * layer.out_features for _, layer in quantised_layers(loaded))
    assert held < 1.15 * linear
    for path, layer in quantised_layers(loaded):
        got, file = layer.frozen.dense().cpu().float(), model.get_submodule(path).weight
        # Rows are exact to bfloat16's rounding of `dense`; blocks are rounded once more, to 3 bits.
        assert off(got, file) < (2**-8 if kind == "rows" else 0.03), path
    with torch.no_grad():
        assert off(loaded(TOKENS.cuda()).logits.cpu(), logits(model)) < 0.2


@pytest.mark.parametrize("quantise", [by_rows, as_a_whole])
def test_products_take_any_scale(quantise):
    """Scales of files are no powers of two and do not fit bfloat16, so kernels take float32 scales."""
    assert max(products_with_adapter_columns(quantise, "cuda", torch.bfloat16)) < 0.035
