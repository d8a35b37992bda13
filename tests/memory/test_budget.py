"""Properties of the estimate's arithmetic that hold for any numbers. Measured peaks: tests/memory/test_ledger."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from loratune.config import LoraConfig
from loratune.fused.policy import ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.lora.inject import attach
from loratune.memory.budget import RowSetting, _layers, _moments, choose, host_bytes, largest, peak, seconds
from loratune.memory.devices import named
from loratune.memory.estimate import EstimateRequest, estimate, model_from_config, survey_of
from loratune.memory.simulate import simulate, without_data
from tests.campaigns.architecture_checks import build as small
from tests.conftest import CAUSAL, build

GIB = 1 << 30
H200 = named("H200")


@pytest.fixture(scope="module")
def seven_billion() -> tf.PreTrainedModel:
    """Llama-2-7B without data."""
    return without_data(
        tf.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000),
        torch.bfloat16,
    )


@pytest.fixture(scope="module")
def surveyed(seven_billion):
    return survey_of(seven_billion, EstimateRequest("auto", LoraConfig(), RowSetting(8192)))


def test_weights_and_optimizer_state_are_counted_to_the_parameter(seven_billion, surveyed):
    parameters = sum(p.numel() for p in seven_billion.parameters())
    assert parameters == 6_738_415_616
    assert surveyed.base_bytes == pytest.approx(2 * parameters, rel=1e-4)  # and rotary frequencies, rounded to 512
    per_layer = 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert surveyed.trainable == 32 * per_layer
    needed = peak(surveyed, RowSetting(8192), ActivationPlan.uniform(Level.NONE, 32))
    assert needed.optimizer == 8 * surveyed.trainable
    quarter = survey_of(seven_billion, EstimateRequest("nf4", LoraConfig(), RowSetting(8192)))
    in_layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert quarter.base_bytes == pytest.approx(2 * (parameters - in_layers) + 4.127 / 8 * in_layers, rel=1e-3)


def test_a_frugal_level_takes_less_memory_and_more_time(surveyed):
    setting = RowSetting(8192, even=True)
    for frugal, generous in ((Level.WIDE, Level.NONE), (Level.SELECTIVE, Level.WIDE), (Level.FULL, Level.SELECTIVE)):
        a, b = (ActivationPlan.uniform(level, 32) for level in (frugal, generous))
        assert peak(surveyed, setting, a).total < peak(surveyed, setting, b).total
        assert seconds(surveyed, setting, a, H200) > seconds(surveyed, setting, b, H200)
    totals = [peak(surveyed, setting, ActivationPlan.mixed(Level.FULL, n, Level.NONE, 32)).total for n in range(33)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("gib", [16, 18, 24, 32, 60])
def test_the_choice_fits_and_is_faster_than_any_uniform_plan_that_fits(surveyed, gib):
    setting = RowSetting(8192)
    choice = choose(surveyed, setting, H200, gib * GIB)
    assert choice is not None
    assert choice.bytes.total <= gib * GIB
    for level in Level:
        plan = ActivationPlan.uniform(level, 32)
        if peak(surveyed, setting, plan).total <= gib * GIB:
            assert choice.seconds <= seconds(surveyed, setting, plan, H200)


def test_weights_in_8_bits_are_kept_hold_transposed_where_they_fit(seven_billion):
    eight = survey_of(seven_billion, EstimateRequest("fp8", LoraConfig(), RowSetting(8192)))
    setting = RowSetting(8192)
    one, two = (ActivationPlan((Level.NONE,) * 32, hold_transposed=both) for both in (False, True))
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert peak(eight, setting, two).base - peak(eight, setting, one).base == pytest.approx(weights, rel=0.05)
    assert seconds(eight, setting, two, H200) < seconds(eight, setting, one, H200)
    whole = peak(eight, setting, two).total
    for limit, hold_transposed in ((whole, True), (whole - 4 * GIB, False)):
        choice = choose(eight, setting, H200, limit)
        assert choice is not None
        assert choice.plan.hold_transposed == hold_transposed
        assert choice.bytes.total <= limit


def test_nothing_is_chosen_where_even_the_weights_do_not_fit(surveyed):
    assert choose(surveyed, RowSetting(8192), H200, 12 * GIB) is None


@pytest.mark.parametrize("generous", [0, 1, 2, 5])
def test_tensors_on_their_way_to_the_host_are_counted(surveyed, generous):
    """Walks the layers as `ops.host` does and adds up the bytes on the device: never above the estimate."""
    setting, layers = RowSetting(8192, even=True), 32
    plan = ActivationPlan.mixed(Level.STAGED, layers - generous, Level.NONE, layers)
    of_each = _layers(surveyed, setting, plan)
    held: dict[int, int] = {}
    highest = kept = 0
    for index, layer in enumerate(of_each):
        highest = max(highest, kept + sum(held.values()) + layer.forward)
        kept += layer.saved
        if plan.levels[index].on_host:
            held[index] = layer.away
        held = {other: size for other, size in held.items() if other > index - 2}
    for index, layer in reversed(list(enumerate(of_each))):
        held.pop(index, None)  # counted in `backward`
        if index and plan.levels[index - 1].on_host:
            held[index - 1] = of_each[index - 1].away
        highest = max(highest, kept + layer.backward - layer.saved + sum(held.values()))
        kept -= layer.saved
    assert highest <= sum(max(_moments(surveyed, setting, plan), key=sum))


def test_a_small_host_takes_fewer_layers(surveyed):
    setting, limit = RowSetting(8192), 18 * GIB
    free = choose(surveyed, setting, H200, limit)
    tight = choose(surveyed, setting, H200, limit, 4 * GIB)
    assert free is not None
    assert tight is not None
    assert host_bytes(surveyed, setting, free.plan) > 4 * GIB >= host_bytes(surveyed, setting, tight.plan)
    assert tight.seconds >= free.seconds
    assert tight.bytes.total <= limit


def test_the_longest_document_fits_and_the_next_does_not(surveyed):
    found = largest(surveyed, H200, 20 * GIB)
    assert found is not None
    tokens, choice = found
    assert tokens % 256 == 0
    assert choice.bytes.total <= 20 * GIB
    assert choose(surveyed, RowSetting(tokens + 256, even=True), H200, 20 * GIB) is None
    assert largest(surveyed, H200, 13 * GIB) is None


def test_a_run_that_does_not_fit_comes_with_changes_that_do(seven_billion):
    request = EstimateRequest("auto", LoraConfig(), RowSetting(8192), "none")
    found = estimate(seven_billion, request, named("24GiB"), 24 * GIB)
    assert not found.fits
    assert "--activations auto" in {change.what for change in found.changes}
    assert all(change.choice.bytes.total <= 24 * GIB for change in found.changes)
    tight = estimate(seven_billion, request, named("12GiB"), 12 * GIB)
    assert all("nf4" in change.what for change in tight.changes)


@pytest.mark.parametrize("kind", ["modernbert-decoder", "llama4_text"])
def test_the_backbone_is_found_where_get_decoder_names_another_part(kind):
    model = small(kind)
    assert decoder_layers(model) is model.model.layers
    attach(model, LoraConfig(r=4), name="default", seed=0)
    kept, recomputed = (
        simulate(model.to("meta"), 64, ActivationPlan.uniform(level, 2), on_gpu=False).saved
        for level in (Level.NONE, Level.FULL)
    )
    assert 0 < recomputed < kept / 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_simulated_row_saves_the_bytes_of_a_real_one(name):
    """The bytes that autograd saves for the backward on a CPU, within 15 percent."""
    config = build(name).config
    copy, real = without_data(config, torch.float32), build(name)
    for model in (copy, real):
        attach(model, LoraConfig(r=4), name="default", seed=0)
    expected = simulate(copy, 256, ActivationPlan.uniform(Level.NONE, 2), on_gpu=False).saved
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, 256, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = real.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.sum()
    assert sum(held.values()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name", ["gemma2", "gptoss"])
def test_soft_caps_and_sinks_take_no_square_of_scores_in_half_precision(name):
    """Their kernel saves tensors that grow with T alone; a square of scores would be 16 times as large."""
    model = without_data(build(name).config, torch.bfloat16)
    attach(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), name="default", seed=0)
    short, long = (
        simulate(model, tokens, ActivationPlan.uniform(Level.NONE, 2), on_gpu=False).saved for tokens in (256, 1024)
    )
    assert long < 4.2 * short


def test_a_folder_with_a_configuration_alone_is_enough(tmp_path):
    CAUSAL["qwen3"]().config.save_pretrained(tmp_path)
    model = model_from_config(str(tmp_path), "auto")
    assert all(p.is_meta for p in model.parameters())
    found = estimate(model, EstimateRequest("auto", LoraConfig(), RowSetting(512), on_gpu=False), named("1GiB"), GIB)
    assert found.fits
