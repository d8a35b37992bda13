"""Layers whose weight is read instead of the layer being called are found on the model, whatever their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.direct_reads import direct_reads
from loratune.lora.inject import attach, detach
from loratune.lora.layers import is_linear
from tests.conftest import SMALL, build
from tests.lora.helpers import make

_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
_BOXES = {"coordinate_size": 5, "shape_size": 6, "max_2d_position_embeddings": 64}
_BLOOM = {"hidden_size": 64, "n_layer": 1, "n_head": 4, "vocab_size": 300}


def _patched(read: Callable[[nn.Module, Tensor], Tensor]) -> tf.PreTrainedModel:
    """A Llama whose MLPs add something that `read` computes."""
    model = build("llama")
    for layer in model.model.layers:
        kind = type(layer.mlp)

        class Reading(kind):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + read(self, x)

        layer.mlp.__class__ = Reading
    return model


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 4)


READ: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "layoutlmv3": (
        lambda: tf.LayoutLMv3Model(tf.LayoutLMv3Config(**_TEXT, **_BOXES, visual_embed=False)),
        {"encoder.rel_pos_bias", "encoder.rel_pos_x_bias", "encoder.rel_pos_y_bias"},
    ),
    "bloom, slow": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(**_BLOOM, pretraining_tp=2, slow_but_exact=True)),
        {"transformer.h.0.mlp.dense_4h_to_h", "transformer.h.0.self_attention.dense"},
    ),
    "bloom": (lambda: tf.BloomForCausalLM(tf.BloomConfig(**_BLOOM)), set()),
    "mamba": (
        lambda: build("mamba"),
        {f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("conv1d", "dt_proj")},
    ),
    "called and read": (
        lambda: _patched(lambda mlp, x: x @ mlp.gate_proj.weight.mean(0)[:, None]),
        {f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)},
    ),
    "only attributes": (lambda: _patched(lambda mlp, x: 0 * x.to(mlp.up_proj.weight.dtype)), set()),
    "read without effect": (lambda: _patched(lambda mlp, x: 0 * mlp.up_proj.weight.sum()), set()),
    "t5": (lambda: make("t5"), set()),
    "bert": (lambda: make("bert"), set()),
}


@pytest.mark.parametrize("name", READ)
def test_layers_whose_weight_is_read_are_found_and_the_model_is_as_before(name: str) -> None:
    make_model, expected = READ[name]
    model = make_model().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert direct_reads(model) == expected
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", [name for name, (_, found) in READ.items() if found])
def test_all_linear_names_them_and_an_explicit_choice_is_an_error(name: str) -> None:
    make_model, expected = READ[name]
    model = make_model()
    attached = attach(model, LoraConfig(r=1))
    assert not expected & attached.ranks.keys()
    for path in filter(lambda path: is_linear(model.get_submodule(path)), expected):
        assert any(f'"{path}" cannot be adapted' in line and "reads its weight" in line for line in attached.left_out)
    detach(model)
    with pytest.raises(AdapterError, match="reads its weight instead of calling it"):
        attach(model, LoraConfig(r=1, target_modules=[next(iter(expected))]))


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.down_proj"])
def test_the_model_may_change_between_two_adapters(layer: str) -> None:
    """The result is forgotten with the last adapter."""
    model: Any = build("llama")
    for name in ("a", "b", "c"):
        attach(model, LoraConfig(r=1, target_modules=[layer]), name=name)
    detach(model)
    assert not [name for name in vars(model) if name.startswith("loratune")]


def test_a_module_that_is_not_used_is_no_read() -> None:
    model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
    model.tower = _Unused()
    assert any("tower.extra" in path for path in attach(model, LoraConfig(r=2)).ranks)
