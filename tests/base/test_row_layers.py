"""Recurrent and convolutional layers in a packed row: the same results and gradients as for each document alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import loratune as lt
from loratune.base import row_layers
from loratune.base.forward import PackedForward, prepare
from loratune.base.row_operators import convolution
from loratune.errors import ModelError
from loratune.many.bank import Bank
from loratune.many.step import BankStep
from loratune.ops.state import ForwardState
from loratune.tables import ROW_OPERATORS

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_expand": 2}
_ATTENTION_LAST = {"layer_types": ["linear_attention", "full_attention"]}

MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**_only("vocab_size", "num_hidden_layers"), state_size=4)),
    "falcon_mamba": lambda: tf.FalconMambaForCausalLM(
        tf.FalconMambaConfig(**_only("vocab_size", "num_hidden_layers"), state_size=4)
    ),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            **_only("vocab_size", "num_hidden_layers"), num_heads=8, head_dim=8, state_size=6, n_groups=2
        )
    ),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(**BASE, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, num_experts=2)
    ),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(**BASE, **_MAMBA2, mamba_d_ssm=64, head_dim=8, ssm_in_multiplier=0.7)
    ),
    "bamba": lambda: tf.BambaForCausalLM(tf.BambaConfig(**BASE, **_MAMBA2, attn_layer_indices=[1])),
    "granite hybrid": lambda: tf.GraniteMoeHybridForCausalLM(
        tf.GraniteMoeHybridConfig(
            **BASE, **_MAMBA2, **_ATTENTION_LAST, num_local_experts=2, num_experts_per_tok=1,
            shared_intermediate_size=16,
        )
    ),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(
            **{name: value for name, value in BASE.items() if name != "num_hidden_layers"},
            layers_block_type=["mamba", "attention", "mlp"], head_dim=8, mamba_num_heads=8, mamba_head_dim=8,
            ssm_state_size=6, n_groups=2,
        )
    ),
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(**BASE, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16)
    ),
    "qwen3_5": lambda: tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**BASE, **_DELTA)),
    "olmo hybrid": lambda: tf.OlmoHybridForCausalLM(tf.OlmoHybridConfig(**BASE, **_DELTA)),
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**BASE, layer_types=["conv", "full_attention"], conv_L_cache=3)),
    "minimax": lambda: tf.MiniMaxForCausalLM(
        tf.MiniMaxConfig(**BASE, **_ATTENTION_LAST, num_local_experts=2, block_size=8)
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(**BASE, lru_width=32, block_types=["recurrent", "attention"])
    ),
}  # fmt: skip

LENGTHS = (5, 1, 150, 2, 40)
"""One document is longer than every chunk and convolution, some are shorter than a convolution."""


def _only(*names: str) -> dict[str, Any]:
    """Settings of models without attention, which have no heads."""
    return {name: BASE[name] for name in ("hidden_size", *names)}


def made(name: str) -> tf.PreTrainedModel:
    """A random frozen model, with weights large enough that its states matter."""
    torch.manual_seed(0)
    model = MODELS[name]().requires_grad_(False).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() > 1 and not path.endswith("A_log"):
                weight.normal_(std=0.5 if "conv" in path else 0.4 * weight.shape[-1] ** -0.5)
    return model


def row_of(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, 120, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attached(name: str) -> tf.PreTrainedModel:
    model = made(name)
    lt.attach(model, lt.LoraConfig(r=2, target_modules="all-linear"))
    for path, weight in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(weight, std=0.05)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_documents_alone_with_gradients_of_the_adapters(name: str) -> None:
    model = attached(name)
    forward = prepare(model)
    assert (forward.path, forward.notes) == ("packed", [])
    assert row_layers.count(model) > 0
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens, positions, bounds = row_of(LENGTHS)
    at = torch.arange(sum(LENGTHS) - 1)
    targets = tokens[1:]
    weights = torch.randn(len(at), generator=torch.Generator().manual_seed(6))

    with forward.installed():
        packed = forward.logprobs(tokens, positions, bounds, at, targets)
        rows = [row_of_document(tokens[a:b]) for a, b in itertools.pairwise(bounds.tolist())]
        alone = torch.cat([forward.hidden_states(*row) for row in rows])
        alone = model.get_output_embeddings()(alone) * (forward.head.scale if forward.head else 1.0)
    if forward.head is not None and forward.head.softcap:
        alone = forward.head.softcap * torch.tanh(alone / forward.head.softcap)
    theirs = torch.cat([model(input_ids=row[0][None]).logits[0] for row in rows])
    found = [gradients_and(packed, trained, weights)]
    found += [gradients_and(logits.log_softmax(-1)[at, targets], trained, weights) for logits in (alone, theirs)]
    # References of transformers round running sums of decays in float32, which costs up to ten times as much.
    for (logprobs, gradient), most in zip(found[1:], (1e-5, 1e-4), strict=True):
        torch.testing.assert_close(found[0][0], logprobs, rtol=most, atol=most)
        assert float((found[0][1] - gradient).norm() / gradient.norm()) < most


def row_of_document(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)


def gradients_and(logprobs: Tensor, trained: list[nn.Parameter], weights: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.autograd.grad(logprobs, trained, weights, allow_unused=True)
    return logprobs.detach(), torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "qwen3_next", "minimax", "lfm2", "recurrent_gemma"])
def test_every_layer_is_put_back_and_parameters_keep_their_paths(name: str) -> None:
    model = made(name)
    before, paths = dict(model.named_modules()), [path for path, _ in model.named_parameters()]
    attributes = {path: {*vars(module)} for path, module in before.items()}
    with PackedForward(model, "packed", None).installed():
        assert [path for path, _ in model.named_parameters()] == paths
        assert dict(model.named_modules()) != before
    assert dict(model.named_modules()) == before
    assert {path: {*vars(module)} for path, module in before.items()} == attributes


def test_two_models_of_one_architecture_do_not_see_each_other() -> None:
    model, other = made("qwen3_5"), made("qwen3_5")
    tokens = torch.randint(120, (1, 30))
    expected = other(input_ids=tokens).logits
    with prepare(model).installed():
        assert torch.equal(other(input_ids=tokens).logits, expected)


def test_a_row_that_leaks_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with documents alone finds an operator that ignores documents, and one with a wrong gradient."""
    monkeypatch.setitem(ROW_OPERATORS, "causal_conv1d_fn", f"{__name__}:leaking")
    forward = prepare(made("mamba"))
    assert not forward.in_one_call
    assert "mixes neighbouring documents" in forward.notes[0]
    monkeypatch.setitem(ROW_OPERATORS, "causal_conv1d_fn", f"{__name__}:half_gradient")
    assert not prepare(made("mamba")).in_one_call


def leaking(state: ForwardState, x: Tensor, weight: Tensor, *arguments: Any, **others: Any) -> Tensor:
    ignorant = ForwardState()
    ignorant.row_positions = torch.arange(x.shape[2])
    return convolution(ignorant, x, weight, *arguments, **others)


def half_gradient(state: ForwardState, x: Tensor, *arguments: Any, **others: Any) -> Tensor:
    return convolution(state, 0.5 * x + 0.5 * x.detach(), *arguments, **others)


def test_layers_whose_forward_was_replaced_are_left_alone() -> None:
    """Offloading by accelerate puts a forward on the module; a copy of the class's forward would skip it."""
    model = made("lfm2")
    assert row_layers.count(model) == 2  # the layer and its convolution
    layer = model.model.layers[0].conv
    layer.forward = lambda *arguments, **others: type(layer).forward(layer, *arguments, **others)
    assert row_layers.count(model) == 1
    assert not prepare(model).in_one_call


def test_adapters_do_not_share_rows_of_a_recurrent_model() -> None:
    model = attached("mamba")
    with pytest.raises(ModelError, match="diverging adapter"):
        BankStep(prepare(model), Bank.__new__(Bank))


def test_a_layer_outside_of_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="not the tokens of a packed row"):
        convolution(ForwardState(), torch.zeros(1, 3, 5), torch.zeros(3, 4))
