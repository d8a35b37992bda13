"""The step that a GPU records, run launch by launch on a CPU, equals the eager step of a bank."""

from __future__ import annotations

import pytest
import torch

from loratune.base.forward import fuse, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import make_row
from loratune.many.bank import Bank
from loratune.many.graph import BankGraph
from loratune.many.step import BankStep, MicroStep, trim
from loratune.ops.dropout import dropout_key
from tests.conftest import build
from tests.training.helpers import examples

LORA = [
    LoraConfig(r=4, lora_alpha=8),
    LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    LoraConfig(r=8, lora_dropout=0.2, target_modules=["up_proj"]),
]
TRAINING = [
    TrainConfig(learning_rate=2e-4, max_grad_norm=0.1, weight_decay=0.1),
    TrainConfig(learning_rate=2e-4, adam_beta1=0.8, adam_beta2=0.95, max_grad_norm=0.0),
    TrainConfig(learning_rate=2e-4, adam_epsilon=1e-6),
]
TOKENS = 512


def part(slot: int, step: int, nth: int = 0, of: int = 1) -> MicroStep:
    rows = [trim(make_row(examples(3, seed=100 * slot + 10 * step + n), 144, 0)) for n in range(of)]
    normaliser = sum(float(row.weights.sum()) for row in rows)
    return MicroStep(slot, rows[nth], normaliser, dropout_key(slot, step), 144 * nth)


# Rows of different jobs, steps of one and two micro-steps, a pausing job. Slot -> rate marks the steps that end.
COURSE = [
    ([part(0, 0), part(1, 0, 0, 2)], {0: 1e-3}),
    ([part(1, 0, 1, 2), part(0, 1), part(2, 0)], {0: 1e-3, 1: 5e-3, 2: 2e-3}),
    ([part(2, 1)], {2: 2e-3}),
    ([part(2, 2), part(1, 1, 0, 2), part(1, 1, 1, 2)], {2: 1e-3, 1: 5e-3}),
]


def run(kind, poison: int | None = None):
    model = build("llama")
    bank = Bank.attach(model, LORA, 3)
    forward = prepare(model)
    assert fuse(forward)
    step = BankStep(forward, bank) if kind is BankStep else BankGraph(forward, bank, TOKENS, record=False)
    for slot in range(3):
        bank.place(slot, LORA[slot], seed=slot)
        step.join(slot, TRAINING[slot])
    if poison is not None:
        bank.master(poison).fill_(float("nan"))
    results = []
    with forward.installed():
        for parts, rates in COURSE:
            results.append(step.run(parts, rates))
        held_out = step.evaluate([part(0, 9)])
    return bank, step, results, held_out


def test_losses_norms_weights_and_moments_equal_the_eager_step():
    bank, step, results, held_out = run(BankGraph)
    plain_bank, plain, expected, plain_held_out = run(BankStep)
    for got, want in zip(results, expected, strict=True):
        assert got.keys() == want.keys()
        for slot, result in want.items():
            assert got[slot].loss == pytest.approx(result.loss, rel=1e-5)
            assert got[slot].grad_norm == pytest.approx(result.grad_norm, rel=1e-4)
            assert got[slot].trained_tokens == result.trained_tokens
            assert got[slot].skipped == result.skipped
    assert held_out.loss == pytest.approx(plain_held_out.loss, rel=1e-5)
    for slot in range(3):
        # Adam's first step divides a gradient by itself, so the rounding of a tiny gradient is visible.
        torch.testing.assert_close(bank.master(slot), plain_bank.master(slot), rtol=1e-3, atol=2e-5)
        moments = step.moments(slot)
        assert moments.keys() == plain.moments(slot).keys()
        for name, want in plain.moments(slot).items():
            torch.testing.assert_close(moments[name], want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        assert not bank.gradient(slot).any()


def test_a_row_prepared_ahead_changes_nothing_whether_it_comes_or_not():
    _, _, expected, _ = run(BankGraph)
    prepared = []

    def predicted(nth):
        following = COURSE[nth + 1][0] if nth + 1 < len(COURSE) else []
        return following[1:] if nth == 0 else following  # the second row differs from the prediction

    model = build("llama")
    bank = Bank.attach(model, LORA, 3)
    forward = prepare(model)
    assert fuse(forward)
    step = BankGraph(forward, bank, TOKENS, record=False)
    prepare_row = step._prepare
    step._prepare = lambda parts: prepared.append(parts) or prepare_row(parts)
    for slot in range(3):
        bank.place(slot, LORA[slot], seed=slot)
        step.join(slot, TRAINING[slot])
    with forward.installed():
        got = [step.run(p, rates, lambda nth=nth: predicted(nth)) for nth, (p, rates) in enumerate(COURSE)]
    assert got == expected
    assert len(prepared) == len(COURSE) + 1, "one prediction was wrong, the others must not be prepared twice"


def test_a_slot_that_is_not_finite_is_skipped_and_the_others_keep_their_bits():
    sound, _, expected, _ = run(BankGraph)
    sick, step, results, _ = run(BankGraph, poison=1)
    for got, want in zip(results, expected, strict=True):
        assert all(got[slot] == result for slot, result in want.items() if slot != 1)
        assert all(got[slot].skipped for slot in want if slot == 1)
    assert torch.equal(sick.master(0), sound.master(0))
    assert torch.equal(sick.master(2), sound.master(2))
    assert step.moments(1) == {}
    assert not sick.gradient(1).any(), "a gradient left by a skipped step would spoil the next one"


def test_moments_go_out_and_come_back():
    bank, step, _, _ = run(BankGraph)
    kept = {name: view.clone() for name, view in step.moments(1).items()}
    step.join(1, TRAINING[1])
    assert step.moments(1) == {}
    step.restore(1, kept, 2)
    assert all(torch.equal(view, kept[name]) for name, view in step.moments(1).items())
    assert not bank.pool.slot(step._moments[0], 0).equal(bank.pool.slot(step._moments[0], 1))
