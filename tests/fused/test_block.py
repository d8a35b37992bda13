"""Saved activations change the memory of a fused layer and nothing else: loss and gradients have the same bits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from loratune.base.forward import PackedForward, fuse, prepare
from loratune.data.pack import make_row
from loratune.fused.policy import ActivationPlan, Level
from loratune.ops.attention.recorded import RecordedAttention
from loratune.ops.dropout import dropout_key, row_key
from loratune.training.step import row_loss
from tests.training.helpers import examples, model_with_adapter, trainable

TOKENS = 256


def loss_and_gradients(model, forward, plan):
    forward.plan = plan
    row = make_row(examples(7), TOKENS, 0)
    with forward.installed():
        loss = row_loss(forward, row)
        held = held_bytes(loss)
        loss.backward()
    found = {path: p.grad for path, p in trainable(model).items()}
    for p in model.parameters():
        p.grad = None
    return loss.detach(), found, held


def held_bytes(loss):
    """Bytes of the storages that the fused layers of the graph hold, each counted once."""
    seen, storages, nodes = set(), {}, [loss.grad_fn]

    def count(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, tuple | list):
            for item in value:
                count(item)
        elif hasattr(value, "__dict__"):
            for item in vars(value).values():
                count(item)

    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [above for above, _ in node.next_functions]
        if activations := getattr(node, "activations", None):
            count(activations)
    return sum(storages.values())


@pytest.fixture(params=[("llama", 0.0), ("llama", 0.3), ("qwen3", 0.0), ("mistral", 0.3)], ids=str)
def fused(request) -> Iterator[tuple[torch.nn.Module, PackedForward]]:
    """With dropout under a key, so that recomputed activations need the same masks."""
    name, dropout = request.param
    model = model_with_adapter(name, lora_dropout=dropout)
    forward = prepare(model)
    assert fuse(forward)
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")
    with forward.state.dropout(row_key(dropout_key(0, 1), 7)):
        yield model, forward


def test_every_policy_gives_the_same_bits_and_holds_less(fused):
    model, forward = fused
    everything = loss_and_gradients(model, forward, None)
    last = everything[2]
    for level in (Level.WIDE, Level.SELECTIVE, Level.FULL):
        loss, gradients, held = loss_and_gradients(model, forward, ActivationPlan.uniform(level, 2))
        assert torch.equal(loss, everything[0])
        assert all(torch.equal(gradients[path], everything[1][path]) for path in everything[1]), level
        assert held < last, level
        last = held


MIXED = [
    (Level.OFFLOAD, Level.OFFLOAD),
    (Level.STAGED, Level.STAGED),
    (Level.STAGED, Level.FULL),
    (Level.FULL, Level.NONE),
]


@pytest.mark.parametrize("plan", [ActivationPlan(levels) for levels in MIXED], ids=str)
def test_a_plan_may_differ_from_layer_to_layer(fused, plan):
    model, forward = fused
    everything = loss_and_gradients(model, forward, None)
    loss, gradients, _ = loss_and_gradients(model, forward, plan)
    assert torch.equal(loss, everything[0])
    assert all(torch.equal(gradients[path], everything[1][path]) for path in everything[1])


@pytest.mark.parametrize("level", [Level.WIDE, Level.FULL])
def test_tiles_of_the_mlp_change_only_the_order_of_sums(fused, level):
    """Each row is computed as before. Gradients of A and B are sums over tokens, so they round differently."""
    model, forward = fused
    everything = loss_and_gradients(model, forward, None)
    for tile in (64, 100):
        loss, gradients, _ = loss_and_gradients(model, forward, ActivationPlan.uniform(level, 2, tile))
        torch.testing.assert_close(loss, everything[0], rtol=1e-5, atol=0)
        for path, gradient in everything[1].items():
            torch.testing.assert_close(gradients[path], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()))


def test_heads_are_freed_where_attention_saves_views_of_them():
    """With as many key as query heads attention saves views, not copies. The selective level saves none of them."""
    model = model_with_adapter("llama")
    config = model.config
    from transformers import LlamaForCausalLM

    from loratune.config import LoraConfig
    from loratune.lora.inject import attach

    config.num_key_value_heads = config.num_attention_heads
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    attach(model, LoraConfig(r=4), name="default", seed=0)
    forward = prepare(model)
    assert fuse(forward)
    wide = loss_and_gradients(model, forward, ActivationPlan.uniform(Level.WIDE, 2))
    selective = loss_and_gradients(model, forward, ActivationPlan.uniform(Level.SELECTIVE, 2))
    heads = 2 * TOKENS * 3 * config.hidden_size * 4
    assert wide[2] - selective[2] >= heads
    assert all(torch.equal(wide[1][path], selective[1][path]) for path in wide[1])


class _Keeping(torch.autograd.Function):
    """Saves its output for its backward, like an attention kernel."""

    @staticmethod
    def forward(ctx, query, key, value, token):
        out = query * 2.0
        ctx.save_for_backward(out)
        ctx.token = token
        return out

    @staticmethod
    def backward(ctx, d_out):
        (out,) = ctx.saved_tensors
        return d_out * out, None, None, None


def _keeping(token):
    """An attention whose graph refers to `token`."""
    return lambda q, k, v: _Keeping.apply(q, k, v, token).flatten(1)


def test_dropped_attention_is_freed():
    """Its graph holds its own output. A cycle there would leave a row in memory for each recomputed layer."""

    class Token:
        pass

    token = Token()
    gone = weakref.ref(token)
    attended = RecordedAttention(_keeping(token), torch.randn(5, 6, 4), lambda heads: heads.split(2, 1))
    assert attended.out.shape == (5, 8)
    attended.free_heads()
    del token, attended
    gc.collect()
    assert gone() is None
