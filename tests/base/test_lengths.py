"""Rows with documents behind every window, chunk and context length, and models that see later tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import loratune as lt
from loratune.base.forward import prepare
from loratune.base.lengths import long_row
from loratune.errors import ModelError
from loratune.lora.evaluation_mode import in_evaluation
from tests.campaigns.architecture_checks import build
from tests.conftest import SMALL

_SMALL: dict[str, Any] = SMALL | {"initializer_range": 0.2}
_ONE_HEAD_SIZE = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "factor": 16.0,
    "original_max_position_embeddings": 32,
}


def _dynamic(positions: int) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return _SMALL | {"max_position_embeddings": positions, "rope_parameters": rope}


# Windows, chunks and context lengths, each with the execution path that respects it.
LIMITED: dict[str, tuple[str, Callable[[], tf.PreTrainedModel]]] = {
    "mistral": ("packed", lambda: tf.MistralForCausalLM(tf.MistralConfig(**_SMALL, sliding_window=20))),
    "phimoe": (
        "position mask",
        lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(**_SMALL, num_local_experts=4, sliding_window=16)),
    ),
    "qwen2_moe": (
        "position mask",
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(
                **_SMALL,
                **_EXPERTS,
                shared_expert_intermediate_size=32,
                use_sliding_window=True,
                sliding_window=24,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
    ),
    "llama4 chunks": (
        "position mask",
        lambda: tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(
                **_SMALL, head_dim=16, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=16
            )
        ),
    ),
    "phi3 longrope": (
        "per document",
        lambda: tf.Phi3ForCausalLM(
            tf.Phi3Config(**_SMALL, original_max_position_embeddings=32, rope_parameters=_LONGROPE)
        ),
    ),
    "llama dynamic": ("per document", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_dynamic(24)))),
    "qwen3 dynamic": ("per document", lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_dynamic(40), head_dim=16))),
    "modernbert-decoder": (
        "packed",
        lambda: tf.ModernBertDecoderForCausalLM(
            tf.ModernBertDecoderConfig(**_ONE_HEAD_SIZE, local_attention=32, cls_token_id=1, sep_token_id=2)
        ),
    ),
}


def _model(make: Callable[[], tf.PreTrainedModel]) -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().requires_grad_(False).eval()


def _alone(name: str, document: Tensor) -> Tensor:
    """log p of a document's own tokens, by a model that has seen nothing else."""
    logits = _model(LIMITED[name][1])(input_ids=document[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)[:-1].gather(1, document[1:, None])[:, 0]


@pytest.mark.parametrize("name", LIMITED)
def test_a_long_document_and_short_ones_beside_it_equal_each_alone(name):
    lengths = (9, 66, 20, 45, 30)
    documents = [torch.randint(3, 300, (n,)) for n in lengths]
    path, make = LIMITED[name]
    forward = prepare(_model(make))
    # Llama 4 of transformers 5.17 takes the position mask's documents for another chunk.
    assert forward.path == path or (name == "llama4 chunks" and forward.path == "document mask")
    row = torch.cat(documents)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ends = set(cu_seqlens[1:].tolist())
    at = torch.tensor([i for i in range(len(row)) if i + 1 not in ends])
    with torch.no_grad(), forward.installed():
        for _ in range(2):  # the second time, long documents came before
            got = forward.logprobs(row, position_ids, cu_seqlens, at, row[at + 1])
    torch.testing.assert_close(got, torch.cat([_alone(name, d) for d in documents]), rtol=1e-4, atol=1e-4)


def test_lengths_beyond_the_rows_are_not_probed():
    model = _model(LIMITED["phi3 longrope"][1])
    assert prepare(model, longest=32).path == "packed"  # no document can be long enough to change the frequencies
    assert prepare(model, longest=64).path == "per document"


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, None),
        ({"sliding_window": 4}, None),
        ({"sliding_window": 40}, 80),
        ({"attention_chunk_size": 48}, 96),
        ({"index_topk": 32}, 64),
        ({"an_unknown_reach": 64}, 128),
        ({"layer_windows": [16, 32]}, None),
        ({"local_windows": [16, 32]}, 64),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 50, "factor": 2.0}}, 100),
        ({"sliding_window": 4096}, None),
        ({"sliding_window": 200}, 256),
    ],
)
def test_the_longest_probed_document_is_behind_every_length_of_the_configuration(settings, longest):
    row = long_row(tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **settings)), None)
    assert (None if row is None else max(row.documents)) == longest


def _bert(kind: str, **settings: Any) -> tf.PreTrainedModel:
    config = getattr(tf, f"{kind}Config")(**_ONE_HEAD_SIZE, **settings)
    return getattr(tf, "BertLMHeadModel" if kind == "Bert" else f"{kind}ForCausalLM")(config)


AHEAD: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: _bert("Bert"),
    "roberta": lambda: _bert("Roberta"),
    "electra": lambda: _bert("Electra"),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SMALL, head_dim=16, use_bidirectional_attention=True)),
    "xlm": lambda: tf.XLMWithLMHeadModel(tf.XLMConfig(emb_dim=64, n_layers=2, n_heads=4, vocab_size=300)),
    "xlnet": lambda: tf.XLNetLMHeadModel(tf.XLNetConfig(d_model=64, n_layer=2, n_head=4, d_inner=96, vocab_size=300)),
    "masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**_ONE_HEAD_SIZE)),
}
HEADLESS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**_ONE_HEAD_SIZE)),
    "classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_ONE_HEAD_SIZE)),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**SMALL)),
}


@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_later_tokens_are_refused(name, dtype):
    with pytest.raises(ModelError, match="sees later tokens"):
        prepare(_model(AHEAD[name]).to(dtype))


def test_a_model_that_puts_a_prompt_before_its_tokens_and_sees_later_ones_is_refused():
    """CPM-Ant's embeddings have more lines than tokens, so values are compared instead of gradients."""
    with pytest.raises(ModelError, match="sees later tokens"):
        prepare(build("cpmant"))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_the_same_models_as_decoders_are_accepted(kind):
    assert prepare(_model(lambda: _bert(kind, is_decoder=True))).path


@pytest.mark.parametrize("name", HEADLESS)
def test_models_without_a_language_model_head_are_refused(name):
    with pytest.raises(ModelError, match="no language-model head"):
        prepare(_model(HEADLESS[name]))


def test_training_an_encoder_and_decoder_is_refused():
    config = tf.T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=4096)
    model = tf.T5ForConditionalGeneration(config)
    tokenizer = lt.load_tokenizer("loratune/pocket")
    lt.attach(model, lt.LoraConfig(r=2))
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        lt.train(model, tokenizer, str(lt.box.data_file("dates", "heldout")))


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = LIMITED["mistral"][1]()
    lt.attach(model, lt.LoraConfig(r=2))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is on the meta device"):
        prepare(model)


def test_dropout_in_training_mode_is_not_compared(llama):
    """A model that the caller left in training mode is prepared as in evaluation mode, and left as it was."""
    llama.config.attention_dropout = 0.5
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert prepare(llama.train()).path == "packed"
    assert all(module.training for module in llama.modules())
    with in_evaluation(llama):
        assert not any(module.training for module in llama.modules())
