"""Attaching, switching, merging and detaching change no bit of the base, and errors leave the model unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.inject import (
    activate,
    active,
    adapter_names,
    attach,
    config_of,
    detach,
    merge,
    merged,
    trainable_parameters,
    unmerge,
)
from loratune.lora.layer import LoraLayer
from loratune.precision.linear import quantise_linears
from tests.campaigns.architecture_checks import build as small
from tests.conftest import build
from tests.lora.helpers import fill, make, make_mlp, run

CONFIG = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False)
RICH = {"bias": "all", "modules_to_save": ["classifier"], "target_modules": ["mlp.0", "shared"]}


def _x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def _rich(model: nn.Module, name: str, seed: int) -> Tensor:
    """Attaches an adapter with trained biases and a trained classifier; returns the model's output."""
    attach(model, LoraConfig(r=2, **RICH), name=name)
    fill(trainable_parameters(model).values(), seed)
    return model(_x())


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be restored: instances, parameters by identity, values, flags."""
    return {
        "modules": {path: id(module) for path, module in model.named_modules(remove_duplicate=False)},
        "parameters": {path: id(p) for path, p in model.named_parameters(remove_duplicate=False)},
        "values": {path: p.detach().clone() for path, p in model.named_parameters()},
        "flags": {path: p.requires_grad for path, p in model.named_parameters()},
        "attributes": set(vars(model)),
    }


def _assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = _snapshot(model)
    values, values_after = before.pop("values"), after.pop("values")
    assert after == before
    assert all(torch.equal(values[path], values_after[path]) for path in values)


def test_a_new_adapter_changes_nothing_until_it_is_trained() -> None:
    model = make("llama")
    base = run(model)
    attach(model, LoraConfig(r=4))
    torch.testing.assert_close(run(model), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_detach_gives_back_the_very_model(name: str) -> None:
    model = make(name)
    base, before = run(model), _snapshot(model)
    attach(model, CONFIG)
    assert not torch.equal(run(model), base)
    detach(model)
    _assert_unchanged(model, before)
    assert torch.equal(run(model), base)
    assert adapter_names(model) == ()


def test_detach_gives_back_the_flags_of_an_unfrozen_model() -> None:
    model = make_mlp()
    before = _snapshot(model)
    _rich(model, "a", 1)
    assert sum(p.requires_grad for p in model.parameters()) == len(trainable_parameters(model))
    detach(model)
    _assert_unchanged(model, before)


def test_switching_back_and_forth_is_bit_identical() -> None:
    model = make_mlp()
    base = model(_x())
    first, second = _rich(model, "first", 1), _rich(model, "second", 2)
    attach(model, CONFIG, name="plain")
    third = model(_x())
    expected = {"first": first, "second": second, "plain": third, None: base}
    for which in ("first", None, "second", "first", "plain", None, "second", "plain", "first"):
        activate(model, which)
        assert torch.equal(model(_x()), expected[which]), which
        assert active(model) == (() if which is None else (which,))
    assert adapter_names(model) == ("first", "second", "plain")


def test_a_layer_may_be_adapted_by_one_adapter_and_trained_in_full_by_another() -> None:
    model = make_mlp()
    base = model(_x())
    expected = {}
    configs = {
        "adapts": LoraConfig(r=2, target_modules=["mlp.0", "classifier"]),
        "replaces": LoraConfig(r=2, target_modules=["weight"], modules_to_save=["mlp", "classifier"]),
        "adapts more": LoraConfig(r=2, target_modules=["mlp.0", "mlp.2"]),
    }
    for name, config in configs.items():
        attach(model, config, name=name)
        fill(trainable_parameters(model).values())
        expected[name] = model(_x())
    for name in ("adapts", "replaces", "adapts more", "replaces", "adapts"):
        activate(model, name)
        assert torch.equal(model(_x()), expected[name]), name
    activate(model, "replaces")
    assert not any(isinstance(module, LoraLayer) for module in model.mlp.modules())
    detach(model, "adapts more")
    assert torch.equal(model(_x()), expected["replaces"])
    detach(model, "replaces")
    assert torch.equal(model(_x()), base)
    detach(model)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_only_the_active_adapter_is_found_in_the_model_and_trains() -> None:
    model = make("llama")
    keys = set(model.state_dict())
    attach(model, CONFIG, name="mlp")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"]), name="weight")
    extra = set(model.state_dict()) - keys
    assert extra == {f"model.layers.{i}.self_attn.q_proj.lora_{m}" for i in (0, 1) for m in "AB"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == extra == set(trainable_parameters(model))
    activate(model, None)
    assert set(model.state_dict()) == keys
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "weight", "lora_A", "default", "a.b", "模型", "classifier"])
def test_any_name_works_even_that_of_a_module(name: str) -> None:
    model = make_mlp()
    expected = _rich(model, name, 1)
    _rich(model, "other", 2)
    activate(model, name)
    assert torch.equal(model(_x()), expected)
    assert not any(name in part.split(".") for part in trainable_parameters(model) if name in ("a.b", "模型"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b"])
def test_names_that_could_leave_a_folder_are_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot be called"):
        attach(make_mlp(), CONFIG, name=name)


def test_several_at_once_are_the_weighted_sum_of_their_updates() -> None:
    """PEFT's fault: its svd and rank-stabilised combinations come out too large by a factor."""
    model = make_mlp()
    deltas = {}
    for seed, name in enumerate("ab"):
        config = LoraConfig(r=2 + seed, lora_alpha=16, use_rslora=name == "b", init_lora_weights=False)
        attach(model, config, name=name, seed=seed)
        deltas[name] = _deltas(model)
    activate(model, ["a", "b"])
    for path, delta in _deltas(model).items():
        torch.testing.assert_close(delta, deltas["a"][path] + deltas["b"][path])
    activate(model, {"a": 0.25, "b": -2.0})
    for path, delta in _deltas(model).items():
        torch.testing.assert_close(delta, 0.25 * deltas["a"][path] - 2.0 * deltas["b"][path])
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(AdapterError, match="exactly one adapter must be active"):
        trainable_parameters(model)
    activate(model, "b")
    assert all(torch.equal(delta, deltas["b"][path]) for path, delta in _deltas(model).items())


def _deltas(model: nn.Module) -> dict[str, Tensor]:
    return {path: layer.delta() for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def test_initial_values_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    models = [make("llama") for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        attach(model, LoraConfig(r=4), seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    first, same, other = (trainable_parameters(model) for model in models)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("lora_A"))


def test_initial_values_have_the_distribution_of_the_paper() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Embedding(300, 200))
    attach(model, LoraConfig(r=64, target_modules=["0", "1"]))
    linear, table = model[0], model[1]
    bound = 1 / 400**0.5  # Kaiming-uniform with a = sqrt 5
    assert float(linear.lora_A.detach().abs().max()) <= bound
    # The standard deviation of U(-b, b) is b / sqrt 3; with 25,600 values its estimate is within 1 %.
    assert float(linear.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not linear.lora_B.any()
    assert not table.lora_A.any()
    assert float(table.lora_B.detach().std()) == pytest.approx(1.0, rel=0.03)
    detach(model)
    attach(model, LoraConfig(r=64, target_modules=["0"], init_lora_weights="gaussian"))
    assert float(model[0].lora_A.detach().std()) == pytest.approx(1 / 64, rel=0.02)


@pytest.mark.parametrize("outer", ["meta", "cpu"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}, {"bias": "all"}])
def test_adapters_are_made_where_their_layers_are(outer: str, variant: dict[str, Any]) -> None:
    """Under another default device as well, with the same values."""
    plain, model, config = make_mlp(), make_mlp(), LoraConfig(r=4, target_modules=["mlp.0", "shared"], **variant)
    attach(plain, config, seed=5)
    with torch.device(outer):
        attach(model, config, seed=5)
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, expected[name])
    assert torch.equal(model(_x()), plain(_x()))


def test_experts_are_adapted_under_another_default_device() -> None:
    """The trial of their formula runs where they are."""
    plain, model = small("qwen3_moe"), small("qwen3_moe")
    config = LoraConfig(r=3, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    attach(plain, config, seed=5)
    with torch.device("meta"):
        attach(model, config, seed=5)
    assert any("experts" in name for name in trainable_parameters(plain))
    expected = trainable_parameters(plain)
    assert all(torch.equal(value, expected[name]) for name, value in trainable_parameters(model).items())


def test_the_report_counts_what_trains() -> None:
    model = make_mlp()
    base = sum(p.numel() for p in model.parameters())
    report = attach(model, LoraConfig(r=2, **RICH))
    adapter = 2 * (8 + 16) + 2 * (8 + 8) + (8 * 3 + 3) + (16 + 8 + 8)
    assert report.trainable_parameters == adapter == sum(p.numel() for p in trainable_parameters(model).values())
    assert report.total_parameters == base + adapter
    assert report.ranks == {"mlp.0": 2, "shared": 2}
    assert "classifier" in str(report)
    assert f"{adapter:,}" in str(report)


def test_a_module_at_two_places_is_swapped_at_both() -> None:
    model = make_mlp()
    attach(model, LoraConfig(r=2, target_modules=["shared"], init_lora_weights=False))
    assert model.shared is model.again
    assert isinstance(model.again, LoraLayer)
    assert len(trainable_parameters(model)) == 2
    detach(model)
    assert model.shared is model.again
    assert type(model.shared) is nn.Linear


def test_two_adapters_may_call_a_shared_module_by_different_names() -> None:
    model = make_mlp()
    base = model(_x())
    for name in ("shared", "again"):
        attach(model, LoraConfig(r=2, target_modules=[name], init_lora_weights=False), name=name)
    assert set(trainable_parameters(model)) == {"shared.lora_A", "shared.lora_B"}
    activate(model, None)
    assert torch.equal(model(_x()), base)
    detach(model)
    assert type(model.shared) is nn.Linear


def test_a_merge_that_runs_out_of_memory_half_way_is_undone() -> None:
    model = make_mlp()
    attach(model, CONFIG)
    out = model(_x())

    def fail(*, reversible: bool) -> None:
        raise MemoryError

    model.classifier.merge = fail
    with pytest.raises(MemoryError):
        merge(model)
    assert merged(model) is None
    assert torch.equal(model(_x()), out)


def test_two_models_and_a_deep_copy_never_see_each_other() -> None:
    model = make_mlp()
    expected = _rich(model, "a", 1)
    clone, other = copy.deepcopy(model), make_mlp()
    attach(clone, CONFIG, name="b")
    detach(clone, "a")
    assert adapter_names(other) == ()
    assert torch.equal(model(_x()), expected)
    detach(clone)
    assert torch.equal(clone(_x()), other(_x()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masters_are_float32_unless_the_base_is_float64(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    attach(model, CONFIG)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in trainable_parameters(model).values()} == {expected}
    run(model)


def test_inactive_tensors_follow_a_model_that_moves_meanwhile() -> None:
    model = make_mlp()
    first = _rich(model, "first", 1)
    _rich(model, "second", 2)
    model.double()  # only the dtype changes here; a device would change the same way
    for which in ("first", None, "second", "first"):
        activate(model, which)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(_x().double()).float(), first)
    detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_gradients_stop_at_the_first_adapter() -> None:
    model = make("llama")
    attach(model, LoraConfig(r=2, target_modules=["layers.1.mlp.down_proj"]))
    out = model(input_ids=torch.ones(1, 4, dtype=torch.int64), output_hidden_states=True)
    assert [hidden.requires_grad for hidden in out.hidden_states] == [False, False, True]


# Tied weights


def test_modules_to_save_that_are_tied_to_each_other_stay_tied() -> None:
    """PEFT's fault: two Parameters share storage, so that AdamW steps twice."""
    model = _tied()
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    named = trainable_parameters(model)
    assert len({p.data_ptr() for p in named.values()}) == len(named)
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("entry", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_half_of_a_tie_in_modules_to_save_trains_alone_and_is_said(entry: str, other: str) -> None:
    model = _tied()
    before = _snapshot(model)
    (note,) = attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[entry])).notes
    assert f"is tied to {other} in the base" in note
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    detach(model)
    _assert_unchanged(model, before)


def test_merging_into_a_tied_weight_is_an_error() -> None:
    model = _tied()
    attach(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    expected = run(model)
    with pytest.raises(AdapterError, match=r'"model.embed_tokens.weight": it is tied to "lm_head.weight"'):
        merge(model)
    assert torch.equal(run(model), expected)


def _tied() -> nn.Module:
    return make("gemma3")


# Merging


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gemma"])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(name: str) -> None:
    model = make(name)
    base, weights = run(model), {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, CONFIG)
    adapted = run(model)
    merge(model)
    assert merged(model) == "default"
    # One rounding of each weight (relative 6e-8) against one of each product: 1e-5 of the largest value is ample.
    scale = float(adapted.abs().max())
    assert float((run(model) - adapted).abs().max()) <= 1e-5 * scale < 0.1 * float((adapted - base).abs().max())
    unmerge(model)
    assert merged(model) is None
    assert torch.equal(run(model), adapted)
    detach(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_unmerge_restores_the_bits_of_a_bf16_model() -> None:
    """PEFT's fault: merging and unmerging in bf16 changes three quarters of the weights."""
    model = build("llama", dtype=torch.bfloat16)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, CONFIG)
    activate(model, None)
    merge(model)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert len(changed) == 14
    unmerge(model)
    assert active(model) == ()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_an_irreversible_merge_leaves_a_plain_model_with_the_adapter_in_it() -> None:
    model = make_mlp()
    expected = _rich(model, "a", 1)
    attach(model, CONFIG, name="b")
    with pytest.raises(AdapterError, match='leave "b" without its base'):
        merge(model, "a", reversible=False)
    detach(model, "b")
    merge(model, "a", reversible=False)
    torch.testing.assert_close(model(_x()), expected)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert set(model.state_dict()) == set(make_mlp().state_dict())
    assert vars(model).keys() == vars(make_mlp()).keys()


def test_merge_takes_modules_and_biases_along() -> None:
    model = make_mlp()
    base, expected = model(_x()), _rich(model, "a", 1)
    activate(model, None)
    merge(model, "a")
    torch.testing.assert_close(model(_x()), expected)
    unmerge(model)
    assert torch.equal(model(_x()), base)


@pytest.mark.parametrize(
    "action",
    [
        lambda m: activate(m, None),
        lambda m: activate(m, "default"),
        lambda m: attach(m, CONFIG, name="new"),
        detach,
        merge,
        trainable_parameters,
    ],
)
def test_other_actions_while_merged_are_an_error(action: Callable[[nn.Module], object]) -> None:
    model = make_mlp()
    attach(model, CONFIG)
    merge(model)
    out = model(_x())
    with pytest.raises(AdapterError, match='adapter "default" is merged; call unmerge first'):
        action(model)
    assert torch.equal(model(_x()), out)


def test_non_finite_adapters_are_not_merged() -> None:
    model = make_mlp()
    attach(model, CONFIG)
    with torch.no_grad():
        model.classifier.lora_B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match='non-finite values at "classifier"'):
        merge(model)
    assert merged(model) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["module", "bias"])
def test_tensors_in_full_that_are_not_finite_are_not_merged(what: str, value: float) -> None:
    model = make_mlp()
    full = {"modules_to_save": ["classifier"]} if what == "module" else {"bias": "all"}
    attach(model, LoraConfig(r=2, target_modules=["0"], **full))
    name, tensor = next((n, t) for n, t in trainable_parameters(model).items() if "lora" not in n)
    with torch.no_grad():
        tensor.view(-1)[0] = value
    named = "NaN" if value != value else "infinity"
    with pytest.raises(AdapterError, match=f'"default" holds {named} at "{name}"'):
        merge(model)
    assert merged(model) is None


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("reversible", [False, True])
def test_sums_that_overflow_are_refused_and_leave_the_model_as_it_was(reversible: bool, quantised: bool) -> None:
    """All values are finite, but the second layer's sum exceeds 65,504 in float16."""
    model = make_mlp().half()
    if quantised:
        quantise_linears(model)
    attach(model, LoraConfig(r=2, target_modules=["0", "classifier"]))
    with torch.no_grad():
        for tensor in trainable_parameters(model).values():
            tensor.fill_(0.1)
        model.classifier.lora_B[0, 0] = 1e7
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"classifier\.weight and its update holds infinity .*float16 is 65,504"):
        merge(model, reversible=reversible)
    assert merged(model) is None
    assert active(model) == ("default",)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Errors


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: attach(m, CONFIG, name="a"), 'an adapter "a" is already attached'),
        (lambda m: attach(m, LoraConfig(r=2, target_modules=["nothing"]), name="b"), "matches no module"),
        (lambda m: attach(m, LoraConfig(r=9), name="b"), "rank 9 is larger"),
        (lambda m: activate(m, "x"), 'no adapter "x"; attached: "sql", "a"'),
        (lambda m: activate(m, "sq"), 'Did you mean "sql"'),
        (lambda m: activate(m, {"a": 0.5}), "cannot be weighted by 0.5: use weight 1"),
        (lambda m: activate(m, ["sql", "sql"]), "named twice"),
        (lambda m: detach(m, "b"), 'no adapter "b"'),
        (lambda m: merge(m, "b"), 'no adapter "b"'),
        (unmerge, "no adapter is merged"),
    ],
)
def test_errors_leave_the_model_as_it_was(action: Callable[[nn.Module], object], message: str) -> None:
    model = make_mlp()
    attach(model, LoraConfig(r=2, target_modules=["weight"]), name="sql")
    out = _rich(model, "a", 1)
    before = _snapshot(model)
    with pytest.raises(AdapterError, match=message):
        action(model)
    _assert_unchanged(model, before)
    assert active(model) == ("a",)
    assert torch.equal(model(_x()), out)


def test_a_model_without_adapters_says_so() -> None:
    for action in (detach, merge, unmerge, trainable_parameters):
        with pytest.raises(AdapterError, match="has no adapters"):
            action(make_mlp())
    assert merged(make_mlp()) is None


def test_bias_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(AdapterError, match="has no bias to train"):
        attach(make("llama"), LoraConfig(r=2, bias="all"))


def test_config_of_equals_the_given_config_and_is_a_copy() -> None:
    model = make_mlp()
    config = LoraConfig(r=2, target_modules=["mlp.0"])
    attach(model, config)
    config.target_modules.append("other")
    assert config_of(model, "default").target_modules == ["mlp.0"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inactive_tensors_follow_to_the_gpu_and_back() -> None:
    model = make_mlp()
    first, second = _rich(model, "first", 1), _rich(model, "second", 2)
    model.cuda()
    for which, expected in (("first", first), ("second", second), ("first", first)):
        activate(model, which)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        torch.testing.assert_close(model(_x().cuda()).cpu(), expected)
    merge(model, "second")
    torch.testing.assert_close(model(_x().cuda()).cpu(), second)
    unmerge(model)
    model.cpu()
    detach(model, "first")
    activate(model, "second")
    assert torch.equal(model(_x()), second)
    detach(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
