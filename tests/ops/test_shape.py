"""Outputs of autograd nodes may be changed in place, as those of torch's own modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loratune.ops import passes
from loratune.ops.frozen import DenseWeight, frozen_linear
from loratune.ops.lora import lora_linear
from loratune.ops.shape import own_shape

_W, _A, _B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "frozen": lambda x: frozen_linear(x, DenseWeight(_W)),
    "adapted": lambda x: lora_linear(x, _W, None, _A, _B, 0.5),
    "adapted, quantised": lambda x: lora_linear(x, DenseWeight(_W), None, _A, _B, 0.5),
    "gated": lambda x: passes.gated(x, x * 0.5, "silu"),
}


@pytest.mark.parametrize("name", NODES)
def test_the_output_may_be_changed_in_place(name: str) -> None:
    x = torch.randn(2, 3, 6, requires_grad=True)
    out = NODES[name](x)
    out *= 3
    (got,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad((3 * NODES[name](x)).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_own_shape_copies_nothing() -> None:
    x = torch.randn(6, 4)
    assert own_shape(x, (2, 3, 4)).data_ptr() == x.data_ptr()
    assert own_shape(x.T, (4, 6)).stride() == (1, 4)
