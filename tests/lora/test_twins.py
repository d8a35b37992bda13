"""Layers of one structure are found, and anything that may change what a layer computes makes it different."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import linear

from loratune.lora.direct_reads import direct_reads
from loratune.lora.twins import only_first, twin_layers, with_twins
from tests.conftest import SMALL


def _llama() -> tf.PreTrainedModel:
    sizes = SMALL | {"num_hidden_layers": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).requires_grad_(False).eval()


class _Reading(nn.Linear):
    """Stands for a class of the user's own."""


def _read_gate(self: nn.Module, x: Tensor) -> Tensor:
    gate = linear(x, self.gate_proj.weight)
    return self.down_proj(self.act_fn(gate) * self.up_proj(x))


def _class_that_reads(layer: nn.Module) -> None:
    kind = type(layer.mlp)
    layer.mlp.__class__ = type("Reading", (kind,), {"forward": _read_gate})


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "class": _class_that_reads,
    "class of a child": lambda layer: setattr(layer.mlp.up_proj, "__class__", _Reading),
    "forward of the instance": lambda layer: setattr(layer.mlp, "forward", MethodType(_read_gate, layer.mlp)),
    "hook": lambda layer: layer.mlp.register_forward_hook(lambda module, args, output: output * 2),
    "number": lambda layer: setattr(layer.self_attn, "scaling", 3.0),
    "nested value": lambda layer: setattr(layer.mlp, "extra", {"reads": [1, 2]}),
    "object": lambda layer: setattr(layer.mlp, "extra", object()),
    "bias": lambda layer: setattr(layer.mlp.up_proj, "bias", nn.Parameter(torch.zeros(96))),
    "dtype": lambda layer: layer.mlp.to(torch.float64),
    "child": lambda layer: setattr(layer.mlp, "extra", nn.Linear(2, 2)),
    "buffer": lambda layer: layer.mlp.register_buffer("extra", torch.zeros(2)),
    "mode": lambda layer: layer.mlp.train(),
}


def test_layers_of_a_model_are_twins_whatever_their_numbers() -> None:
    """Layers of Llama differ in `layer_idx` alone; Gemma 3's sliding and full layers differ in more."""
    assert twin_layers(_llama()) == {"model.layers": {"0": ("0", "1", "2", "3")}}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Gemma3TextConfig(**SMALL | {"num_hidden_layers": 3}, head_dim=16, layer_types=kinds)
    assert twin_layers(tf.Gemma3ForCausalLM(config)) == {"model.layers": {"0": ("0", "2"), "1": ("1",)}}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_no_twin(change: str) -> None:
    """Any difference that may change the computation keeps the layer out of the group."""
    model = _llama()
    CHANGES[change](model.model.layers[2])
    assert twin_layers(model) == {"model.layers": {"0": ("0", "1", "3"), "2": ("2",)}}


def test_layers_of_a_users_class_are_told_apart_by_their_number() -> None:
    """A class outside of transformers may compute by `layer_idx`."""
    model = _llama()
    for layer in model.model.layers:
        layer.__class__ = type("Layer", (type(layer),), {"__module__": "mine"})
    assert twin_layers(model) == {}


@pytest.mark.parametrize("reading", [[0, 1, 2, 3], [2], [1, 3]])
def test_reads_are_found_in_all_twins_and_only_there(reading: list[int]) -> None:
    """The layers that read a weight are named, though one of them ran."""
    model = _llama()
    kind = type("Reading", (type(model.model.layers[0].mlp),), {"forward": _read_gate})
    for index in reading:
        model.model.layers[index].mlp.__class__ = kind
    assert direct_reads(model) == {f"model.layers.{index}.mlp.gate_proj" for index in reading}


def test_a_model_that_needs_all_its_layers_runs_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that counts its layers refuses the shortened list, and the reads are found all the same."""
    model = _llama()
    run = type(model.model).forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        self.layers[self.config.num_hidden_layers - 1]
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", forward)
    kind = type("Reading", (type(model.model.layers[0].mlp),), {"forward": _read_gate})
    model.model.layers[1].mlp.__class__ = kind
    assert direct_reads(model) == {"model.layers.1.mlp.gate_proj"}


def test_the_lists_are_whole_again_afterwards() -> None:
    """Also after an error; inside, one layer of each structure is left under its own name."""
    model = _llama()
    before = list(model.model.layers)
    with pytest.raises(KeyError, match="stop"), only_first(model, twin_layers(model)):
        assert list(dict(model.model.layers.named_children())) == ["0"]
        raise KeyError("stop")
    assert list(model.model.layers) == before
    assert with_twins({"model.layers.0.mlp", "lm_head"}, {"model.layers": {"0": ("0", "2")}}) == {
        "model.layers.0.mlp",
        "model.layers.2.mlp",
        "lm_head",
    }
