"""A bank on a CUDA device: as exact as the modules, slots independent to the bit, one recording for all mixtures."""

from __future__ import annotations

import copy

import pytest
import torch

from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach, detach, trainable_parameters
from loratune.many.bank import Bank
from loratune.many.graph import BankGraph
from loratune.many.step import BankStep, MicroStep, join_micro_steps, trim
from loratune.ops.dropout import dropout_key, keep_mask, row_key
from tests.gpu.test_step_gpu import a_row, assert_as_good, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = [
    LoraConfig(r=16, lora_alpha=24, init_lora_weights=False),
    LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    LoraConfig(r=64, lora_dropout=0.2, target_modules=["o_proj", "up_proj", "v_proj"], init_lora_weights=False),
    LoraConfig(r=8, use_rslora=True, target_modules=["gate_proj", "k_proj"], init_lora_weights=False),
]
LENGTHS = [(300, 17, 100), (64, 64, 64, 64), (400,), (1, 200, 30)]


def base():
    model = small()
    detach(model)
    return model


def parts(slots, step=0):
    rows = {slot: trim(a_row(LENGTHS[slot], seed=10 * step + slot, tokens=512)) for slot in slots}
    return [MicroStep(slot, row, float(row.weights.sum()), dropout_key(slot, step), 0) for slot, row in rows.items()]


def filled(model) -> Bank:
    bank = Bank.attach(model, CONFIGS, 4)
    for slot, config in enumerate(CONFIGS):
        bank.place(slot, config, seed=slot)
    return bank


def losses_and_gradients(bank, forward, order):
    chosen = parts(order)
    row, segments = join_micro_steps(chosen, bank.block)
    bank.pool.gradient.zero_()
    device = bank.pool.device
    with forward.installed(), bank.row(segments):
        everywhere = torch.arange(len(row.tokens), device=device)
        logprobs = forward.logprobs(
            row.tokens.to(device), row.position_ids.to(device), row.cu_seqlens, everywhere, row.targets.to(device)
        )
        weights = row.weights.to(device)
        losses = [-(weights * logprobs)[s.start : s.stop].sum() for s in segments]
        torch.stack(losses).sum().backward()
    return {
        s.slot: (loss.detach(), {n: g.clone() for n, g in bank.named(s.slot, bank.gradient(s.slot)).items()})
        for s, loss in zip(segments, losses, strict=True)
    }


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])
def test_as_exact_as_the_modules_of_each_adapter_alone(fused):
    model = base()
    alone, exact, head = {}, {}, prepare(model).head
    for slot in (0, 1, 3):
        for found, module in ((alone, model), (exact, copy.deepcopy(model).double())):
            attach(module, CONFIGS[slot], seed=slot)
            (part,) = parts([slot])
            row = part.row
            forward = PackedForward(module, "per document", head)
            everywhere = torch.arange(len(row.tokens), device="cuda")
            with forward.installed():
                logprobs = forward.logprobs(
                    row.tokens.cuda(), row.position_ids.cuda(), row.cu_seqlens, everywhere, row.targets.cuda()
                )
                loss = -(row.weights.cuda() * logprobs).sum()
                loss.backward()
            found[slot] = loss.detach(), {n: p.grad.clone() for n, p in trainable_parameters(module).items()}
            detach(module)
    bank = filled(model)
    forward = prepare(model)
    assert forward.fused is not None
    if not fused:
        forward.fused = None
    got = losses_and_gradients(bank, forward, [3, 0, 2, 1])
    for slot, (loss, gradients) in exact.items():
        assert abs(got[slot][0] - loss) <= 2 * abs(alone[slot][0] - loss) + 1e-4 * loss
        for name, gradient in gradients.items():
            assert_as_good(got[slot][1][name], alone[slot][1][name], gradient, (slot, name))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_slot_that_is_not_finite_leaves_the_others_unchanged_to_the_bit(poison):
    model = base()
    bank = filled(model)
    forward = prepare(model)
    torch.use_deterministic_algorithms(True)  # attention's default backward adds in no fixed order
    try:
        sound = losses_and_gradients(bank, forward, [1, 0, 3, 2])
        bank.master(0).fill_(poison)
        sick = losses_and_gradients(bank, forward, [1, 0, 3, 2])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not sick[0][0].isfinite()
    for slot in (1, 2, 3):
        assert torch.equal(sick[slot][0], sound[slot][0])
        assert all(torch.equal(sick[slot][1][name], gradient) for name, gradient in sound[slot][1].items())


def course(step, bank):
    """Rows of changing mixtures. Halfway, a job leaves and another one gets its slot."""
    results = []
    for slot in range(3):
        bank.place(slot, CONFIGS[slot], seed=slot)
        step.join(slot, TrainConfig(learning_rate=2e-4))
    for nth in range(10):
        if nth == 6:
            step.leave(1)
            bank.place(1, CONFIGS[3], seed=7)
            step.join(1, TrainConfig(learning_rate=2e-4, max_grad_norm=0.5))
        slots = [[0, 1, 2], [2, 0], [1, 2], [0, 1]][nth % 4]
        results.append(step.run(parts(slots, nth), dict.fromkeys(slots, 1e-3)))
    return results


def test_one_recording_serves_every_mixture_and_equals_the_eager_step_to_the_bit():
    torch.use_deterministic_algorithms(True)
    try:
        outcomes = []
        for record in (True, False):
            model = base()
            bank = Bank.attach(model, CONFIGS, 3)
            forward = prepare(model)
            step = BankGraph(forward, bank, 1536, record=record)
            with forward.installed():
                outcomes.append((course(step, bank), bank.pool.master.clone()))
            assert step.why_not is None, step.why_not
            recorded = sum(graph is not None for graph in step._recordings.graphs.values())
            assert recorded == (1 if record else 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_the_recorded_step_learns_like_the_plain_step():
    torch.use_deterministic_algorithms(True)
    try:
        outcomes = []
        for kind in (BankGraph, BankStep):
            model = base()
            bank = Bank.attach(model, CONFIGS, 3)
            forward = prepare(model)
            step = kind(forward, bank, 1536) if kind is BankGraph else kind(forward, bank)
            with forward.installed():
                outcomes.append(course(step, bank))
    finally:
        torch.use_deterministic_algorithms(False)
    for got, expected in zip(*outcomes, strict=True):
        for slot, result in expected.items():
            assert got[slot].loss == pytest.approx(result.loss, rel=5e-3)  # bf16, and products of other lengths
            assert got[slot].trained_tokens == result.trained_tokens


def test_dropout_has_the_same_bits_on_both_devices():
    rows = [row_key(dropout_key(3, 4), 1000, device) for device in ("cpu", "cuda")]
    here, there = (keep_mask(row, 99, (100, 300), 0.3, 5) for row in rows)
    assert torch.equal(here, there.cpu())
