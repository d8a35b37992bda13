"""A bank trains each adapter as if it were alone: the same weights, losses and gradients with any others."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch

from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import LoraConfig
from loratune.data.pack import Row, make_row
from loratune.errors import AdapterError
from loratune.lora.files import adapter_tensors, load_adapter
from loratune.lora.inject import attach, detach, trainable_parameters
from loratune.many.bank import Bank
from loratune.ops.attention import documents as attention
from loratune.ops.attention.documents import document_attention
from loratune.ops.bank.pool import Segment
from loratune.ops.dropout import dropout_key, row_key
from loratune.training.step import row_loss
from tests.conftest import build
from tests.precision.test_linear import quantised
from tests.training.helpers import examples

# Different ranks, alphas, targets and scalings; B is not zero, so that every gradient flows.
CONFIGS = [
    LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    LoraConfig(r=1, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    LoraConfig(r=12, use_rslora=True, target_modules=["o_proj", "up_proj", "v_proj"], init_lora_weights=False),
    LoraConfig(r=6, lora_dropout=0.3, rank_pattern={"q_proj": 2}, init_lora_weights=False),
]
# The same on transformers' Conv1D, whose weight is (d_in, d_out).
GPT2_CONFIGS = [
    LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    LoraConfig(r=1, lora_alpha=3, target_modules=["c_attn"], init_lora_weights=False),
    LoraConfig(r=12, use_rslora=True, target_modules=["c_fc", "mlp.c_proj"], init_lora_weights=False),
    LoraConfig(r=6, lora_dropout=0.3, rank_pattern={"c_attn": 2}, init_lora_weights=False),
]


def rows(tokens: int = 144) -> list[Row]:
    """One row of documents for each of `CONFIGS`."""
    return [make_row(examples(3, seed=seed), tokens, 0) for seed in range(len(CONFIGS))]


def end_to_end(parts: list[Row]) -> Row:
    """Several rows as one."""
    starts = [sum(len(part.tokens) for part in parts[:index]) for index in range(len(parts))]
    bounds = [part.cu_seqlens[1:] + start for part, start in zip(parts, starts, strict=True)]
    fields = {n: torch.cat([getattr(p, n) for p in parts]) for n in ("tokens", "position_ids", "targets", "weights")}
    return Row(**fields, cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *bounds]).int())


def filled(model, slots=4, configs=CONFIGS) -> Bank:
    bank = Bank.attach(model, configs, slots)
    for slot in range(min(slots, len(configs))):
        bank.place(slot, configs[slot], seed=slot)
    return bank


def run(bank: Bank, forward: PackedForward, order: list[int], parts: list[Row]) -> dict[int, tuple]:
    """Slot -> its loss and gradients, in a row that holds the documents of the slots in `order`."""
    row, segments, at = end_to_end([parts[slot] for slot in order]), [], 0
    for slot in order:
        stop = at + len(parts[slot].tokens)
        segments.append(Segment(slot, at, stop, dropout_key(slot, 5), position=3))
        at = stop
    bank.pool.gradient.zero_()
    with forward.installed(), bank.row(segments):
        everywhere = torch.arange(len(row.tokens))
        logprobs = forward.logprobs(row.tokens, row.position_ids, row.cu_seqlens, everywhere, row.targets)
        losses = {s.slot: -(row.weights * logprobs)[s.start : s.stop].sum() for s in segments}
        torch.stack(list(losses.values())).sum().backward()
    return {
        slot: (loss.detach(), {name: g.clone() for name, g in bank.named(slot, bank.gradient(slot)).items()})
        for slot, loss in losses.items()
    }


@pytest.mark.parametrize(("name", "configs"), [("llama", CONFIGS), ("gpt2", GPT2_CONFIGS)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_each_slot_computes_the_same_as_its_adapter_alone(fused, name, configs):
    """In float64, so that rounding hides no mistake; the modules' norms are in float32, 6e-8 each."""
    model, parts = build(name, dtype=torch.float64), rows()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's own
            module.p = 0.0
    expected = {}
    for slot, config in enumerate(configs):
        attach(model, config, seed=slot)
        forward = prepare(model)
        model.train()
        with forward.installed(), forward.state.dropout(row_key(dropout_key(slot, 5), 3)):
            loss = row_loss(forward, parts[slot])
            loss.backward()
        model.eval()
        gradients = {name: p.grad for name, p in trainable_parameters(model).items()}
        expected[slot] = loss.detach(), gradients
        detach(model)
    bank = filled(model, configs=configs)
    forward = prepare(model)
    assert not fused or fuse(forward)
    got = run(bank, forward, [2, 0, 3, 1], parts)
    for slot, (loss, gradients) in expected.items():
        torch.testing.assert_close(got[slot][0], loss, rtol=1e-7, atol=0)
        assert got[slot][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(got[slot][1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_other_adapters_in_the_row_change_nothing(fused):
    """With dropout: it is keyed by the adapter's own tokens."""
    model, parts = build("llama", dtype=torch.float64), rows()
    bank = filled(model)
    forward = prepare(model)
    assert not fused or fuse(forward)
    together = run(bank, forward, [0, 1, 2, 3], parts)
    for order in ([3, 1], [3], [2, 3, 0]):
        other = run(bank, forward, order, parts)
        for slot in order:
            torch.testing.assert_close(other[slot][0], together[slot][0], rtol=1e-7, atol=0)
            for name, gradient in together[slot][1].items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(other[slot][1][name], gradient, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_slot_that_is_not_finite_leaves_the_others_as_they_are_to_the_bit(fused, poison):
    model, parts = build("llama"), rows()
    bank = filled(model)
    forward = prepare(model)
    assert not fused or fuse(forward)
    order = [1, 0, 3, 2]
    sound = run(bank, forward, order, parts)
    bank.master(0).fill_(poison)
    sick = run(bank, forward, order, parts)
    assert not sick[0][0].isfinite()
    assert not any(gradient.isfinite().all() for gradient in sick[0][1].values())
    for slot in (1, 2, 3):
        assert torch.equal(sick[slot][0], sound[slot][0])
        assert all(torch.equal(sick[slot][1][name], gradient) for name, gradient in sound[slot][1].items())


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("base", [build, quantised])
def test_attention_contains_values_that_are_not_finite(monkeypatch, base, fused, banked):
    """FlashAttention 4 does not; `tests/gpu/test_bank_gpu.py` shows it where that is installed."""
    model, parts, asked = base("llama"), rows(), set()
    bank = filled(model) if banked else None
    forward = prepare(model)
    assert not fused or fuse(forward)

    def listening(*tensors, contained, **options):
        asked.add(contained)
        return document_attention(*tensors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "document_attention", listening)
        attention.register()
        with torch.no_grad(), forward.installed(), bank.row([Segment(3, 0, 144, 7)]) if bank else nullcontext():
            row_loss(forward, parts[3])
    attention.register()
    assert asked == {banked}


def test_dropout_is_that_of_its_key_and_stays_away_without_one():
    model, parts = build("llama"), rows()
    bank, forward = filled(model), prepare(model)

    def loss(key):
        with torch.no_grad(), forward.installed(), bank.row([Segment(3, 0, 144, key)]):
            return row_loss(forward, parts[3])

    assert torch.equal(loss(7), loss(7))
    assert not torch.equal(loss(7), loss(8))
    undropped = loss(None)
    bank.pool.dropout[3] = 0.0
    assert torch.equal(undropped, loss(7))


def test_initial_weights_are_those_of_attach_and_the_folder_is_peft_s(tmp_path):
    model = build("llama")
    bank = filled(model)
    for slot, config in enumerate(CONFIGS):
        bank.save(slot, tmp_path / str(slot))
        alone = build("llama")
        attach(alone, config, seed=slot)
        expected = {name: p.detach() for name, p in trainable_parameters(alone).items()}
        got = bank.named(slot)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        read = build("llama")
        load_adapter(read, tmp_path / str(slot))
        saved = adapter_tensors(read)
        assert all(torch.equal(saved[key], tensor) for key, tensor in adapter_tensors(alone).items())


def test_slots_empty_and_gaps_compute_the_base():
    model, parts = build("llama"), rows()
    with torch.no_grad(), (forward := prepare(model)).installed():
        base = forward.hidden_states(parts[0].tokens, parts[0].position_ids, parts[0].cu_seqlens)
    bank = filled(model)
    bank.clear(1)
    row = parts[0]
    first = int(row.cu_seqlens[1])
    with torch.no_grad(), (forward := prepare(model)).installed():
        for segments in ([], [Segment(1, 0, 144)], [Segment(0, first, 96)]):
            with bank.row(segments):
                got = forward.hidden_states(row.tokens, row.position_ids, row.cu_seqlens)
            same = len(row.tokens) if not segments or segments[0].slot == 1 else first
            assert torch.equal(got[:same], base[:same])
            assert same == len(row.tokens) or not torch.equal(got, base)


def test_a_slot_is_one_tensor_that_can_be_copied_cleared_and_filled_again():
    model = build("llama")
    bank = filled(model, slots=2)
    address, kept = bank.master(1).data_ptr(), {name: t.clone() for name, t in bank.named(1).items()}
    bank.gradient(1).fill_(1.0)
    bank.clear(1)
    assert not bank.master(1).any()
    assert not bank.gradient(1).any()
    assert bank.free() == [1]
    assert bank.named(1) == {}
    bank.place(1, CONFIGS[0], seed=9)
    bank.clear(1)
    bank.place(1, CONFIGS[1], seed=9)
    bank.load(1, kept)
    assert all(torch.equal(t, kept[name]) for name, t in bank.named(1).items())
    assert bank.master(1).data_ptr() == address
    total = sum(float(t.square().sum()) for t in kept.values())
    assert float(bank.master(1).square().sum()) == pytest.approx(total, rel=1e-5)  # zero beyond the adapter's own


def live() -> int:
    """Bytes of all tensors, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_eight_adapters_hold_the_base_once(fused):
    """In addition there are masters, gradients and working copies, and less than a quarter of the base."""
    model, config, row = build("llama"), LoraConfig(r=1), make_row(examples(3), 144, 0)
    base, before = sum(p.numel() * p.element_size() for p in model.parameters()), live()
    bank = Bank.attach(model, [config], 8)
    for slot in range(8):
        bank.place(slot, config, seed=slot)
    forward = prepare(model)
    assert not fused or fuse(forward)
    with forward.installed(), bank.row([Segment(slot, 18 * slot, 18 * slot + 18) for slot in range(8)]):
        forward.hidden_states(row.tokens, row.position_ids, row.cu_seqlens).sum().backward()
        assert bank.gradient(0).any()
        own = 3 * 8 * bank.master(0).numel() * bank.master(0).element_size()
        assert live() - before < own + base / 4


def test_detach_gives_the_very_layers_back():
    model = build("llama")
    before = dict(model.named_modules())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    bank = filled(model)
    assert model.state_dict().keys() == state.keys()
    bank.detach()
    assert dict(model.named_modules()) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_refusals_name_the_remedy():
    model = build("llama")
    for config in (LoraConfig(bias="all"), LoraConfig(modules_to_save=["lm_head"])):
        with pytest.raises(AdapterError, match="by itself"):
            Bank.attach(model, [config], 2)
    with pytest.raises(AdapterError, match="is of type Embedding"):
        Bank.attach(model, [LoraConfig(target_modules=["embed_tokens"])], 2)
    small = LoraConfig(r=4, target_modules=["q_proj"])
    bank = Bank.attach(model, [small], 2)
    bank.place(0, small, 0)
    for config, why in (
        (LoraConfig(r=8, target_modules=["q_proj"]), "rank of 8"),
        (LoraConfig(r=2, target_modules=["k_proj"]), r"without .*k_proj"),
    ):
        assert not bank.fits(1, config)
        with pytest.raises(AdapterError, match=why):
            bank.place(1, config, 0)
    assert bank.fits(1, small)
    with pytest.raises(AdapterError, match="holds an adapter"):
        bank.place(0, small, 0)
    tensors = dict(bank.named(0))
    name = next(iter(tensors))
    with pytest.raises(AdapterError, match="missing"):
        bank.load(0, {k: t for k, t in tensors.items() if k != name})
    with pytest.raises(AdapterError, match="Did you mean"):
        bank.load(0, tensors | {name + "A": tensors[name]})
    with pytest.raises(AdapterError, match="needs"):
        bank.load(0, tensors | {name: tensors[name][:1]})
    with pytest.raises(AdapterError, match="no adapter"):
        bank.save(1, "nowhere")
    bank.detach()
    wide = Bank.attach(model, [LoraConfig(r=4)], [Bank.size_of(model, small), Bank.size_of(model, LoraConfig(r=4))])
    with pytest.raises(AdapterError, match="which holds"):
        wide.place(0, LoraConfig(r=4), 0)
    wide.place(1, LoraConfig(r=4), 0)
    wide.detach()
    attach(model, small)
    with pytest.raises(AdapterError, match="detach"):
        Bank.attach(model, [small], 1)


def test_a_small_update_arrives_as_it_does_for_an_adapter_alone():
    """In bfloat16; see `precision.projection`. Added to y after rounding, 0.2 of it would arrive."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(1024, 256, bias=False).bfloat16()
    layer.weight.data = 0.02 * torch.randn(256, 1024, generator=generator).bfloat16()
    model = torch.nn.ModuleDict({"a": layer})
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["a"])
    bank = Bank.attach(model, [config], 2)
    x, exact = torch.randn(512, 1024, generator=generator).bfloat16(), []
    for slot in (0, 1):
        bank.place(slot, config, seed=slot)
        weights = bank.named(slot)
        weights["a.lora_B"].copy_(1e-4 * torch.randn(256, 16, generator=generator).sign())
        mine = x[256 * slot : 256 * (slot + 1)].double()
        exact.append(mine @ weights["a.lora_A"].double().T @ weights["a.lora_B"].double().T)
    with torch.no_grad(), bank.row([Segment(0, 0, 256), Segment(1, 256, 512)]):
        change = model["a"](x).double() - x.double() @ layer.weight.double().T
    both = torch.cat(exact)
    assert abs(float((change * both).sum() / both.square().sum()) - 1) < 0.06
