"""One reading of a tensor finds NaN and infinity wherever they are."""

from __future__ import annotations

import pytest
import torch

from loratune.precision.finite import fault_of


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0, 17, 1023])
def test_faults_are_found_and_told_apart(dtype: torch.dtype, at: int) -> None:
    tensor = torch.linspace(-60_000, 60_000, 1024).to(dtype).view(32, 32)
    assert fault_of(tensor) == ""
    for value, fault in ((float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")):
        broken = tensor.clone()
        broken.view(-1)[at] = value
        assert fault_of(broken) == fault
        broken.view(-1)[(at + 1) % 1024] = float("nan")
        assert fault_of(broken) == "NaN"


def test_tensors_that_cannot_hold_a_fault_have_none() -> None:
    assert fault_of(torch.empty(0)) == ""
    assert fault_of(torch.arange(3)) == ""
    assert fault_of(torch.ones(3).to(torch.float8_e4m3fn)) == ""
