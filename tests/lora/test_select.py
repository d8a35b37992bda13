"""A configuration selects the layers that a user and PEFT expect; an entry that selects nothing is an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import attach
from loratune.lora.paths import shortest_names
from loratune.lora.select import select
from tests.conftest import SMALL
from tests.lora.helpers import make, make_mlp, run


def _paths(model: nn.Module, **settings: Any) -> list[str]:
    return [target.path for target in select(model, LoraConfig(**{"r": 2, **settings})).targets]


def _ranks(model: nn.Module, **settings: Any) -> dict[str, tuple[int, float]]:
    return {t.path: (t.r, t.scaling) for t in select(model, LoraConfig(**{"r": 2, **settings})).targets}


def test_names_match_whole_components_at_the_end_of_a_path() -> None:
    model = make("llama")
    assert _paths(model, target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert _paths(model, target_modules=["model.layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(AdapterError, match='"proj" matches no module'):
        _paths(model, target_modules=["proj"])


def test_a_string_is_a_regular_expression_for_the_whole_path() -> None:
    model = make("llama")
    assert _paths(model, target_modules=r".*\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(AdapterError, match=r"fits no module .* in full.* Layers here: .*q_proj"):
        _paths(model, target_modules=r"q_proj")
    with pytest.raises(AdapterError, match="not a regular expression"):
        _paths(model, target_modules=r"(q_proj")


@pytest.mark.parametrize(("name", "head"), [("llama", "lm_head"), ("gpt2", "lm_head"), ("t5", "lm_head")])
def test_all_linear_is_every_linear_layer_but_the_head(name: str, head: str) -> None:
    model = make(name)
    paths = _paths(model, target_modules="all-linear")
    kinds = {type(model.get_submodule(path)).__name__ for path in paths}
    assert kinds == ({"Conv1D"} if name == "gpt2" else {"Linear"})
    every = {p for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert every - set(paths) == {head}


def test_all_linear_leaves_out_the_head_of_a_classifier() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    assert not any("score" in path for path in _paths(model, target_modules="all-linear"))
    assert not any(path.startswith("classifier") for path in _paths(make("bert"), target_modules="all-linear"))


def test_all_linear_takes_every_linear_of_a_users_own_module() -> None:
    assert _paths(make_mlp(), target_modules="all-linear") == ["mlp.0", "mlp.2", "weight", "shared", "classifier"]


def test_all_linear_lists_layers_where_an_adapter_would_be_ignored() -> None:
    selection = select(make("mamba"), LoraConfig(r=2))
    assert {t.path.rpartition(".")[2] for t in selection.targets} == {"in_proj"}
    assert len(selection.left_out) == 6
    assert "MambaMixer reads its weight" in selection.left_out[0]
    with pytest.raises(AdapterError, match=r"reads its weight.*exclude_modules"):
        select(make("mamba"), LoraConfig(r=2, target_modules=["out_proj"]))


def test_a_module_at_two_places_is_one_target_by_either_name() -> None:
    (target,) = select(make_mlp(), LoraConfig(r=2, target_modules=["again"])).targets
    assert target.paths == ("shared", "again")
    assert len(select(make_mlp(), LoraConfig(r=2, target_modules=["again", "shared"])).targets) == 1


def test_exclusion_and_layer_numbers() -> None:
    model = make("llama")
    assert _paths(model, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert _paths(model, target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == [
        "model.layers.1.self_attn.q_proj"
    ]
    for pattern in (None, ["layers"]):
        chosen = _paths(model, target_modules="all-linear", layers_to_transform=[1], layers_pattern=pattern)
        assert len(chosen) == 7
        assert all(".1." in path for path in chosen)


def test_patterns_are_anchored_at_the_end_and_the_first_wins() -> None:
    ranks = _ranks(
        make("llama"),
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 4, "q_proj": 8},
        alpha_pattern={"[ov]_proj": 6},
    )
    assert ranks["model.layers.0.self_attn.q_proj"] == (8, 1.0)
    assert ranks["model.layers.1.self_attn.q_proj"] == (4, 2.0)
    assert ranks["model.layers.0.self_attn.o_proj"] == (2, 3.0)


def test_rank_stabilised_scaling_is_alpha_by_the_root_of_r() -> None:
    ranks = _ranks(make("llama"), r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])
    assert set(ranks.values()) == {(4, 4.0)}


def test_modules_to_save_takes_norm_and_not_input_layernorm() -> None:
    """PEFT's fault: any path that ends in "norm" is taken."""
    selection = select(make("llama"), LoraConfig(r=2, modules_to_save=["norm"]))
    assert [place.paths for place in selection.saved] == [("model.norm",)]


def test_layers_inside_modules_to_save_are_not_adapted() -> None:
    paths = _paths(make_mlp(), target_modules="all-linear", modules_to_save=["mlp"])
    assert paths == ["weight", "shared", "classifier"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj"]}, 'target_modules "q_porj" matches no module.*Did you mean "q_proj"'),
        ({"target_modules": ["q_proj", "xyz"]}, '"xyz" matches no module.*Layers here: embed_tokens, q_proj'),
        ({"exclude_modules": ["lm_haed"]}, 'exclude_modules "lm_haed".*Did you mean "lm_head"'),
        ({"modules_to_save": ["lm_hed"]}, 'modules_to_save "lm_hed".*"lm_head"'),
        ({"modules_to_save": ["rotary_emb"]}, "no parameters"),
        ({"target_modules": ["self_attn"]}, "is a LlamaAttention.*name the layers inside"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves no layer"),
        ({"rank_pattern": {"k_porj": 3}}, 'rank_pattern "k_porj".*"k_proj"'),
        ({"alpha_pattern": {"lm_head": 3}}, 'alpha_pattern "lm_head" fits none.*Adapted are: q_proj'),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform 7 does not exist.*layers 0 to 1"),
        ({"layers_to_transform": [0], "layers_pattern": ["h"]}, r"no numbered layers under \['h'\]"),
        ({"r": 65}, 'rank 65 is larger than "model.layers.0.self_attn.q_proj", which is 64 -> 64'),
    ],
)
def test_an_entry_that_matches_nothing_or_does_not_fit_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        select(make("llama"), LoraConfig(**{"r": 2, **settings}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("rank_pattern", {"q_proj": -1}),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("bias", "some"),
        ("init_lora_weights", "pissa"),
        ("target_modules", []),
        ("layers_pattern", ["layers"]),
    ],
)
def test_values_out_of_range_are_an_error_even_if_they_were_set_later(field: str, value: object) -> None:
    config = LoraConfig()
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=field):
        select(make_mlp(), config)


def test_layer_numbers_do_not_go_with_a_regular_expression() -> None:
    with pytest.raises(ConfigError, match="layers_to_transform does not go with a regular expression"):
        select(make_mlp(), LoraConfig(target_modules=".*q_proj", layers_to_transform=[0]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.filterwarnings("ignore")
def test_all_linear_means_the_same_as_in_peft(name: str) -> None:
    task = "SEQ_CLS" if name == "bert" else None
    theirs = peft.get_peft_model(make(name), peft.LoraConfig(target_modules="all-linear", task_type=task))
    expected = [p.removeprefix("base_model.model.") for p, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert _paths(make(name), target_modules="all-linear") == expected


def test_shortest_names_mean_exactly_the_paths() -> None:
    every = ["a.0.q", "a.0.k", "a.1.q", "b.q", "b.k", "head"]
    assert shortest_names(["a.0.k", "b.k"], every) == ["k"]
    assert shortest_names(["a.0.q", "a.1.q"], every) == ["0.q", "1.q"]
    assert shortest_names(["a.0.q", "a.1.q", "b.q", "head"], every) == ["head", "q"]


def test_selecting_changes_nothing() -> None:
    model = make("llama")
    before = {path: (id(module), dict(vars(module))) for path, module in model.named_modules()}
    state = torch.get_rng_state()
    select(model, LoraConfig(r=2))
    assert before == {path: (id(module), dict(vars(module))) for path, module in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())


def _mixture(kind: str) -> nn.Module:
    settings = {**SMALL, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    settings |= {"num_experts": 4, "num_experts_per_tok": 2}
    if kind == "qwen2":
        return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**settings))
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**settings, **linear, head_dim=16))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3next"])
def test_all_linear_skips_layers_narrower_than_the_rank_in_one_line(kind: str) -> None:
    model = _mixture(kind)
    attached = attach(model, LoraConfig(r=2))
    assert not any("shared_expert_gate" in path for path in attached.ranks)
    assert any("shared_expert.up_proj" in path for path in attached.ranks)
    narrow = [line for line in str(attached).splitlines() if "narrower than the rank" in line]
    assert len(narrow) == 1
    assert "2 layers narrower than the rank (shared_expert_gate)" in narrow[0]
    assert "64 -> 1" in narrow[0]


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["shared_expert_gate"]}, {"rank_pattern": {"shared_expert_gate": 2}}]
)
def test_a_narrow_layer_that_is_named_is_adapted_with_a_note(settings: dict[str, Any], tmp_path: Path) -> None:
    """As in PEFT, where a rank above the smaller side is legal."""
    model = _mixture("qwen2")
    loaded, base = copy.deepcopy(model), copy.deepcopy(model)
    attached = attach(model, LoraConfig(r=2, init_lora_weights=False, **{"rank_pattern": {}, **settings}))
    assert sum(path.endswith("shared_expert_gate") for path in attached.ranks) == 2
    assert 'rank 2 is above the smaller side of "model.layers.0.mlp.shared_expert_gate", 64 -> 1 (and 1 more)' in str(
        attached
    )
    expected = run(model)
    save(model, tmp_path / "adapter")
    assert load_adapter(loaded, tmp_path / "adapter").notes == attached.notes[:1]  # others are about all-linear
    torch.testing.assert_close(run(loaded), expected, rtol=0, atol=0)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(run(theirs), expected, rtol=1e-5, atol=1e-5)


def test_a_narrow_layer_with_a_rank_of_its_own_is_adapted() -> None:
    model = _mixture("qwen2")
    attached = attach(model, LoraConfig(r=2, rank_pattern={"shared_expert_gate": 1}))
    assert sum("shared_expert_gate" in path for path in attached.ranks) == 2
    assert not attached.left_out
