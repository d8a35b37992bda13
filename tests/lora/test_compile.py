"""`torch.compile` takes an adapted model as one graph, and switching adapters compiles nothing anew."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch._dynamo.testing import CompileCounterWithBackend

from loratune.config import LoraConfig
from loratune.lora.inject import activate, attach
from loratune.lora.state import require

IDS = torch.arange(5, 17)[None]


@pytest.fixture
def model() -> tf.LlamaForCausalLM:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    made = tf.LlamaForCausalLM(config).requires_grad_(False).eval()
    for seed, name in enumerate("abc"):
        attach(made, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), name=name, seed=seed)
    return made


def logits(model: torch.nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def test_one_graph_serves_all_adapters(model: tf.LlamaForCausalLM) -> None:
    """Bare base and adapters of one shape: two graphs, however often they take turns."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    for name in ("a", "b", "c", "a", None, "b", None, "c"):
        activate(model, name)
        found, expected = logits(compiled), logits(model)
        assert torch.equal(found, expected)
        seen.append((name, found))
        assert counter.frame_count == (1 if len(seen) <= 4 else 2)
    assert (
        len({round(float(found.detach().double().sum()), 6) for _, found in seen}) == 4
    )  # 3 adapters and the base differ


def test_gradients_come_through_one_graph(model: tf.LlamaForCausalLM) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in ("a", "b"):
        activate(model, name)
        parameters = require(model).get(name).parameters()
        gradients = []
        for module in (compiled, model):
            logits(module).square().sum().backward()
            gradients.append([parameter.grad for parameter in parameters.values()])
            for parameter in parameters.values():
                parameter.grad = None
        for found, expected in zip(*gradients, strict=True):
            assert found is not None
            torch.testing.assert_close(found, expected)  # the same operations; only sums may be ordered differently
    assert counter.frame_count == 1
