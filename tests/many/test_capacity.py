"""Number of jobs at once and tokens of a shared row: within the free memory, and enough for one job."""

from __future__ import annotations

import pytest
import torch

from loratune.config import LoraConfig
from loratune.many import capacity
from loratune.many.bank import Bank
from tests.conftest import build

CPU = torch.device("cpu")


def test_a_row_has_the_tokens_of_all_jobs_up_to_the_saturation_of_the_device():
    assert capacity.row_tokens(CPU, [256, 256]) == 512
    assert capacity.row_tokens(CPU, [256] * 16) == 2048
    assert capacity.row_tokens(CPU, [256, 8192]) == 8192
    assert capacity.row_tokens(torch.device("cuda"), [512] * 16) == 4096


def test_slots_fit_into_free_memory(monkeypatch):
    """A bank with that many slots, moments included, fits into the free memory and uses at least half of it."""
    model = build("llama")
    size = Bank.size_of(model, LoraConfig(r=16))
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 10_000_000)
    slots = capacity.slots_that_fit(model, [size] * 50, 64)
    assert 1 < slots < 50
    bank = Bank.attach(model, [LoraConfig(r=16)], slots)
    held = 2 * (bank.pool.master.nbytes + bank.pool.gradient.nbytes)
    assert 0.5 * 10_000_000 < held <= 10_000_000


@pytest.mark.parametrize("free", [0, -1, 1000])
def test_there_is_always_one_slot(monkeypatch, free):
    monkeypatch.setattr(capacity, "free_bytes", lambda _: free)
    assert capacity.slots_that_fit(build("llama"), [10**6] * 3, 2048) == 1


def test_free_memory_is_plausible():
    assert 2**20 < capacity.free_bytes(CPU) < 2**50
