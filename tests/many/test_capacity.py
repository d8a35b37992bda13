"""How many jobs at once, and how long a row: what fits, and never less than one job needs."""

from __future__ import annotations

import pytest
import torch

from loratune.config import LoraConfig
from loratune.many import capacity
from loratune.many.bank import Bank
from tests.conftest import build

CPU = torch.device("cpu")


def test_a_row_holds_what_all_jobs_bring_up_to_what_keeps_the_device_busy():
    assert capacity.row_tokens(CPU, [256, 256]) == 512
    assert capacity.row_tokens(CPU, [256] * 16) == 2048
    assert capacity.row_tokens(CPU, [256, 8192]) == 8192
    assert capacity.row_tokens(torch.device("cuda"), [512] * 16) == 4096


def test_slots_take_no_more_than_what_is_free(monkeypatch):
    """What a bank really allocates for that many slots, moments included, fits; for one more it might not."""
    model = build("llama")
    size = Bank.size_of(model, LoraConfig(r=16))
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 10_000_000)
    slots = capacity.slots_that_fit(model, [size] * 50, 64)
    assert 1 < slots < 50
    bank = Bank.attach(model, [LoraConfig(r=16)], slots)
    held = 2 * (bank.pool.master.nbytes + bank.pool.gradient.nbytes)
    assert 0.5 * 10_000_000 < held <= 10_000_000


@pytest.mark.parametrize("free", [0, -1, 1000])
def test_there_is_always_room_to_try_one(monkeypatch, free):
    monkeypatch.setattr(capacity, "free_bytes", lambda _: free)
    assert capacity.slots_that_fit(build("llama"), [10**6] * 3, 2048) == 1


def test_free_memory_is_that_of_this_machine():
    assert 2**20 < capacity.free_bytes(CPU) < 2**50
