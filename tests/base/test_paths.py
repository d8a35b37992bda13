"""Kinds of models that need more than restarting positions: on which path they run, and that it is exact.

Expected values are those of each document alone in the model, log-probabilities and gradients of the adapters.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import transformers as tf

import loratune as lt
from loratune.base import batches, masks
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.base.positions import counting_mask, first_position
from loratune.base.probe import documents_alone, probe_row, reads_across
from loratune.errors import ModelError
from loratune.infer.engine import stream
from loratune.lora.inject import trainable_parameters
from tests.campaigns.architecture_checks import adapted, build

LENGTHS = (3, 40, 1, 17, 9)

# Model type -> path, first position, and whether tables of positions are replaced.
KINDS = {
    "roberta": ("packed", 1, False),
    "xlm-roberta-xl": ("packed", 1, False),
    "bart": ("packed", 0, True),
    "marian": ("packed", 0, True),
    "bloom": ("document mask", 0, False),
    "mpt": ("document mask", 0, False),
    "falcon": ("document mask", 0, False),
    "xglm": ("document mask", 0, False),
    "afmoe": ("packed", 0, False),
    "openai-gpt": ("padded batches", 0, False),
}


def _row() -> tuple[torch.Tensor, ...]:
    tokens = torch.randint(20, 300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    predicting = torch.tensor([t for t in range(len(tokens)) if t + 1 not in cu_seqlens.tolist()])
    return tokens, position_ids, cu_seqlens, predicting, tokens[predicting + 1]


def _alone(model: tf.PreTrainedModel, row: tuple[torch.Tensor, ...]) -> torch.Tensor:
    tokens, _, bounds, predicting, targets = row
    parts = [model(input_ids=tokens[None, a:b]).logits[0] for a, b in itertools.pairwise(bounds.tolist())]
    return torch.cat(parts)[predicting].float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _gradients(logprobs: torch.Tensor, model: tf.PreTrainedModel) -> torch.Tensor:
    weights = torch.linspace(-1, 1, len(logprobs))
    trained = list(trainable_parameters(model).values())
    # Cross-attention of a decoder without an encoder never runs.
    found = torch.autograd.grad(logprobs @ weights, trained, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_their_documents_alone(kind: str) -> None:
    model = adapted(kind)
    forward = prepare(model)
    assert (forward.path, forward.positions.offset, bool(forward.positions.tables)) == KINDS[kind]
    assert bool(forward.notes) >= (not forward.in_one_call)
    row = _row()
    expected = _alone(model, row)
    before = list(model.modules())
    with forward.installed():
        got = forward.logprobs(*row)
        torch.testing.assert_close(_gradients(got, model), _gradients(expected, model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_alibi_of_falcon_in_a_row() -> None:
    """Its formula depends on the name of the attention, so that path gives other values and is not taken."""
    config = tf.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, alibi=True)
    model = tf.FalconForCausalLM(config).eval().requires_grad_(False)
    forward, row = prepare(model), _row()
    assert forward.path == "padded batches"
    with torch.no_grad(), forward.installed():
        torch.testing.assert_close(forward.logprobs(*row), _alone(model, row), rtol=1e-5, atol=1e-5)


def test_a_row_with_a_device_bound_gives_the_same_result() -> None:
    """With `longest`, as on a GPU, tables give that many places, and boundaries may end in empty documents."""
    for kind in ("bart", "bloom", "roberta"):
        model, row = build(kind), _row()
        forward = prepare(model)
        tokens, position_ids, bounds, predicting, targets = row
        padded = torch.cat([bounds, bounds[-1:], bounds[-1:]])
        with torch.no_grad(), forward.installed():
            got = forward.logprobs(tokens, position_ids, padded, predicting, targets, longest=50)
        torch.testing.assert_close(got, _alone(model, row), rtol=1e-5, atol=1e-5)


def test_configurations_are_as_before() -> None:
    model = build("bloom")
    before = (model.config.to_dict(), model.config._attn_implementation, set(vars(model.config)))
    forward, row = prepare(model), _row()
    with torch.no_grad(), forward.installed():
        assert model.config._attn_implementation == masks.IMPLEMENTATION
        forward.logprobs(*row)
    assert (model.config.to_dict(), model.config._attn_implementation, set(vars(model.config))) == before


def test_the_running_sum_of_a_counting_mask_restarts_in_each_document() -> None:
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])
    mask = counting_mask(position_ids)
    assert torch.equal(mask.cumsum(0) - 1, position_ids)
    assert torch.equal((mask.cumsum(0) - 1) * mask, position_ids)


def test_alibi_of_a_long_row_in_half_precision() -> None:
    """Biases count from each document, so they are not rounded like those of place 1,000 of the row."""
    torch.manual_seed(0)
    model = tf.BloomForCausalLM(tf.BloomConfig(hidden_size=64, n_head=4, n_layer=2, vocab_size=300))
    model = model.eval().requires_grad_(False).bfloat16()
    forward = prepare(model)
    assert (forward.path, forward.positions.counting) == ("document mask", True)
    last, lengths = torch.randint(300, (30,)), torch.tensor([0, 1500, 1530], dtype=torch.int32)
    tokens = torch.cat([torch.randint(300, (1500,)), last])
    position_ids = torch.cat([torch.arange(1500), torch.arange(30)])
    with torch.no_grad(), forward.installed():
        got = forward.hidden_states(tokens, position_ids, lengths)[1500:].float()
    with torch.no_grad():
        expected = model.transformer(input_ids=last[None]).last_hidden_state[0].float()
    assert (got - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("lengths", "share", "expected"),
    [
        ((3, 40, 1, 17, 0, 25), 0.5, [[1, 5], [3], [0], [2]]),
        ((5, 5, 5), 1.0, [[0, 1, 2]]),
        ((3, 4), 1.0, [[1], [0]]),
        ((1, 100), 0.0, [[1, 0]]),
        ((), 0.5, []),
    ],
)
def test_documents_of_similar_length_share_a_batch(
    lengths: tuple[int, ...], share: float, expected: list[list[int]]
) -> None:
    assert batches.batches(lengths, share) == expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_batches_come_back_in_the_order_of_the_row(share: float) -> None:
    tokens = torch.arange(70)
    calls: list[tuple[int, ...]] = []

    def call(ids: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(ids.shape))
        return torch.stack([ids, ids.cumsum(1)], -1)  # causal

    got = batches.run(call, tokens, [0, 3, 43, 44, 44, 61, 70], share)
    expected = torch.cat([d.cumsum(0) for d in tokens.split([3, 40, 1, 17, 9])])
    assert torch.equal(got, torch.stack([tokens, expected], 1))
    assert sum(rows * longest for rows, longest in calls) <= (2 * 70 if share else 5 * 40)


def test_a_batch_that_changes_its_members_is_refused() -> None:
    """Documents of a model whose values depend on the length of the batch run alone."""
    model = tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(n_embd=64, n_layer=1, n_head=4, vocab_size=300)).eval()
    plain = model.transformer.forward
    model.transformer.forward = lambda input_ids, **given: _scaled(plain(input_ids, **given), input_ids.shape[1])
    model.transformer.forward.__signature__ = inspect.signature(plain)
    assert prepare(model).path == "per document"


def _scaled(outputs: tf.modeling_outputs.BaseModelOutput, length: int) -> tf.modeling_outputs.BaseModelOutput:
    outputs.last_hidden_state = outputs.last_hidden_state * (1 + length)
    return outputs


@pytest.mark.parametrize(("kind", "cap"), [("recurrent_gemma", 30.0), ("xlstm", 30.0), ("gemma2", 30.0)])
def test_soft_caps_of_the_head_are_found_under_any_name(kind: str, cap: float) -> None:
    head = prepare(build(kind)).head
    assert head is not None
    assert head.softcap == cap


@pytest.mark.parametrize(
    ("kind", "first"), [("roberta", 1), ("camembert", 1), ("llama", 0), ("gpt2", 0), ("bart", 0)]
)
def test_the_position_of_the_first_token(kind: str, first: int) -> None:
    with torch.no_grad():
        assert first_position(build(kind)) == first


def test_positions_begin_behind_the_padding_index() -> None:
    config = tf.RobertaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=300,
        is_decoder=True,
    )
    assert config.pad_token_id == 1
    model = tf.RobertaForCausalLM(config).eval()
    assert prepare(model).positions.offset == 2


def test_roberta_answers_with_the_positions_it_was_trained_with() -> None:
    model, tokens = adapted("roberta"), [9, 8, 7, 60, 5, 44]
    for token in stream(model, tokens, max_new_tokens=8, stop_ids=()):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        assert logits[token] >= logits.max() - 1e-4
        tokens.append(token)
    assert len(tokens) == 14


def test_layers_with_attention_of_their_own_are_not_fused() -> None:
    """A recipe may fit a layer whose attention never asks for the attention function."""
    model = build("gpt_neox_japanese")
    lt.attach(model, lt.LoraConfig(r=2))
    forward = prepare(model)
    assert not fuse(forward)
    assert forward.fused is None


def test_a_mask_without_a_row_is_refused() -> None:
    model = build("bloom")
    with pytest.raises(NotImplementedError, match="one packed row"), masks.installed(model):
        masks.register()
        model(input_ids=torch.arange(9)[None])


def test_a_model_without_gradients_in_evaluation_mode_is_refused() -> None:
    with pytest.raises(
        ModelError, match="ReformerModelWithLMHead gives no gradients in evaluation mode: If you want"
    ):
        prepare(build("reformer"))


def test_a_batch_that_changes_the_logits_is_refused() -> None:
    """ProphetNet's hidden states are right in a batch, and its logits are those of another document."""
    forward = prepare(build("prophetnet"))
    assert (forward.path, forward.head) == ("per document", None)


def test_a_leak_is_seen_in_half_precision() -> None:
    """In a small random model the effect of a foreign document is below the rounding of bfloat16."""
    torch.manual_seed(0)
    model = tf.BloomForCausalLM(tf.BloomConfig(hidden_size=64, n_head=4, n_layer=2, vocab_size=300))
    model = model.eval().requires_grad_(False).bfloat16()
    row = probe_row(model)
    leaking = PackedForward(model, "position mask", None)
    assert reads_across(model, lambda: leaking.hidden_states(*row), row)
    assert not reads_across(model, lambda: documents_alone(model.transformer, row), row)
