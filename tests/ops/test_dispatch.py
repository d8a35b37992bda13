"""The meta device allocates what a twin would, so memory can be counted without a GPU."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.dispatch import half_on_gpu, with_kernel
from loratune.ops.meter import StorageMeter, rounded


@with_kernel(half_on_gpu, "ops.norm_kernels")
def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs, one of them the argument overwritten, and float32 temporaries."""
    unit = x.float() / x.float().norm()
    return x.copy_(unit), unit[:, :1].to(x.dtype, copy=True)


@pytest.mark.parametrize(("dtype", "temporaries"), [(torch.bfloat16, 0), (torch.float32, 1)])
def test_only_outputs_are_counted_where_there_is_a_twin(dtype, temporaries):
    x = torch.empty(1000, 64, dtype=dtype, device="meta")
    with StorageMeter() as meter:
        same, first = reference(x)
    assert same is x
    assert first.shape == (1000, 1)
    assert meter.live == rounded(1000 * dtype.itemsize)
    assert (meter.peak > meter.live) == bool(temporaries)


def test_a_storage_is_counted_while_it_lives_and_views_are_not():
    weight = torch.empty(100, 100, device="meta")
    with StorageMeter() as meter:
        a = weight.T[:10]
        assert meter.live == 0
        b = a @ weight
        c = b[:5]
        assert meter.live == 4096
        del b
        assert meter.live == 4096
        del c
        assert meter.live == 0
        assert meter.peak == 4096
