"""Batched generation equals one prompt at a time and transformers' own greedy search, on very different models."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from loratune.errors import ConfigError, DataError, ModelError
from loratune.infer.engine import Detokenizer, Sampling, generate, sample, stream

VOCAB = 97
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 96}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "qwen3": Qwen3Config(**WIDE, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **WIDE, head_dim=8, sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=96),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=96),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model whose greedy answers vary: wide weights keep it from repeating one token forever."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.35)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (3, 17, 1, 9, 9, 5, 12, 2)]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_equals_single_and_transformers(name: str, prompts: list[list[int]]) -> None:
    """In float64 the gap between the two likeliest tokens is far above rounding, so tokens must be the same."""
    model = build(name)
    stop_ids = frozenset({7, 11, 23, 30, 41, 58})
    batched = generate(model, prompts, max_new_tokens=14, stop_ids=stop_ids, batch_size=5)
    alone = [list(stream(model, prompt, max_new_tokens=14, stop_ids=stop_ids)) for prompt in prompts]
    assert batched == alone
    assert len({len(answer) for answer in batched}) > 1, "the test means little unless sequences leave early"
    for prompt, answer in zip(prompts, batched, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=sorted(stop_ids),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert answer == [token for token in expected if token not in stop_ids]


def test_finished_sequences_leave_the_batch(llama: PreTrainedModel, prompts: list[list[int]]) -> None:
    """The model runs only rows that still need tokens: total decode work is the sum of answer lengths."""
    free = generate(llama, prompts, max_new_tokens=20, stop_ids=())
    stops = {answer[2] for answer in free[:3]}
    rows: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    answers = generate(llama, prompts, max_new_tokens=20, stop_ids=stops, batch_size=8)
    handle.remove()
    # One column for each token after the prefill, and one more in which the stop token shows, unless the
    # budget ended the answer.
    columns = sum(len(a) if len(a) < 20 else 19 for a in answers)
    assert sum(rows[rows.index(8) + 1 :]) == columns


def test_an_answer_does_not_depend_on_its_batch(llama: PreTrainedModel, prompts: list[list[int]]) -> None:
    settings = {"max_new_tokens": 12, "stop_ids": (5,), "temperature": 1.3, "top_p": 0.9, "top_k": 20}
    one = generate(llama, prompts, **settings, seed=4, batch_size=1)
    many = generate(llama, prompts, **settings, seed=4, batch_size=8)
    other = generate(llama, prompts, **settings, seed=5, batch_size=8)
    assert one == many
    assert one != other


def test_the_last_position_of_the_model_ends_an_answer(llama: PreTrainedModel) -> None:
    answers = generate(llama, [[5] * 90, [6] * 4], max_new_tokens=20, stop_ids=())
    assert [len(a) for a in answers] == [6, 20]
    with pytest.raises(DataError, match="96 tokens, but the model's positions end at 96"):
        generate(llama, [[1], [5] * 96], max_new_tokens=1, stop_ids=())


def test_no_prompts_and_empty_prompts(llama: PreTrainedModel) -> None:
    assert generate(llama, [], max_new_tokens=3, stop_ids=()) == []
    with pytest.raises(DataError, match="prompt 2 has no tokens"):
        generate(llama, [[1], []], max_new_tokens=3, stop_ids=())


def test_dropout_is_off_and_training_mode_comes_back(prompts: list[list[int]]) -> None:
    model = build("gpt2", torch.float32)
    quiet = generate(model, prompts, max_new_tokens=8, stop_ids=())
    model.train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert generate(model, prompts, max_new_tokens=8, stop_ids=()) == quiet
    assert {name: module.training for name, module in model.named_modules()} == before


def test_an_abandoned_stream_restores_training_mode(llama: PreTrainedModel) -> None:
    llama.train()
    tokens = stream(llama, [3, 4], max_new_tokens=8, stop_ids=())
    next(tokens)
    tokens.close()
    assert llama.training
    llama.eval()


def test_nothing_of_inference_mode_leaks_into_the_caller(llama: PreTrainedModel) -> None:
    for _ in stream(llama, [3, 4], max_new_tokens=2, stop_ids=()):
        assert not torch.is_inference_mode_enabled()


def test_damaged_models_are_reported() -> None:
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="not numbers"):
            generate(model, [[1, 2]], max_new_tokens=2, stop_ids=(), temperature=temperature)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("batch_size", 0)],
)
def test_settings_out_of_range_are_named(llama: PreTrainedModel, setting: str, value: float) -> None:
    settings = {"max_new_tokens": 2, "stop_ids": (), setting: value}
    with pytest.raises(ConfigError, match=setting):
        generate(llama, [[1]], **settings)


def test_sampling_follows_the_distribution() -> None:
    """Evenly spaced quantiles: shares equal the probabilities to within one quantile."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    places = 4000
    for top_k, top_p, allowed in ((0, 1.0, [0, 1, 2, 3]), (2, 1.0, [1, 2]), (0, 0.9, [1, 2]), (0, 0.5, [1])):
        sampling = Sampling(1, 0.5, top_p, top_k, None)
        drawn = sample(logits.expand(places, -1), sampling, [(i + 0.5) / places for i in range(places)])
        expected = (logits[0, allowed] / 0.5).softmax(0)
        for token, probability in zip(allowed, expected.tolist(), strict=True):
            assert abs(drawn.count(token) / places - probability) <= 2 / places
        assert set(drawn) <= set(allowed)


def byte_tokenizer(merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = merges or []
    vocabulary = {token: i for i, token in enumerate(alphabet + [a + b for a, b in pairs])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece: "▁" opens a word, and decoding drops the space of the first."""
    pieces = ["▁", "▁to", "▁be", "or", "▁not", ",", "!", "é", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "text", ["plain words  and   spaces ", "naïve façade: 完成，再来 😀🎉 — ﬁn", "\n\tdef f():\n\t\treturn 'é'"]
)
def test_streamed_pieces_are_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer([("Ġ", "a"), ("t", "h")])
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_streamed_pieces_keep_spaces_of_sentencepiece() -> None:
    tokenizer = metaspace_tokenizer()
    words = ["▁to", "▁be", ",", "or", "▁not", "▁", "▁to", "é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁be", "!"]
    ids = tokenizer.convert_tokens_to_ids(words)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids) == "to be,or not  toé😀 be!"
    assert pieces[1] == " be"


def test_a_broken_character_is_shown_at_the_end_not_lost() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a😀")["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert pieces == ["a", "", "", ""]
    assert detokenizer.finish() == tokenizer.decode(ids)[1:] != ""


_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"intermediate_size": 96, "num_attention_heads": 4, "pad_token_id": 0}
# Models with a cache of their own, or with none.
UNUSUAL = {
    "recurrent_gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **_TINY | _HEADS | {"num_hidden_layers": 3}, lru_width=64, num_key_value_heads=1, attention_window_size=16
        )
    ),
    "rwkv": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(**_TINY, attention_hidden_size=64)),
    "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=300)),
    "xlm": lambda: tf.XLMWithLMHeadModel(
        tf.XLMConfig(emb_dim=64, n_layers=2, n_heads=4, vocab_size=300, causal=True)
    ),
    "minimax": lambda: tf.MiniMaxForCausalLM(
        tf.MiniMaxConfig(
            **_TINY | _HEADS,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "cpmant": lambda: tf.CpmAntForCausalLM(
        tf.CpmAntConfig(
            vocab_size=300, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=96, num_hidden_layers=2
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**_TINY, state_size=8)),
    "prophetnet": lambda: tf.ProphetNetForCausalLM(
        tf.ProphetNetConfig(
            vocab_size=300,
            hidden_size=64,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            decoder_ffn_dim=96,
            max_position_embeddings=64,
            init_std=0.1,
        )
    ),
    "roberta": lambda: tf.RobertaForCausalLM(tf.RobertaConfig(**_TINY, **_HEADS, is_decoder=True)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_models_without_a_usual_cache_get_the_likeliest_token_of_the_whole_text(name):
    """Each token is the likeliest after all tokens before it, run at once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNUSUAL[name]().eval().requires_grad_(False)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [9, 8, 7, 6]]
    got = generate(model, prompts, max_new_tokens=9, stop_ids=())
    for prompt, answer in zip(prompts, got, strict=True):
        tokens = list(prompt)
        for token in answer:
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            tokens.append(token)
    assert list(stream(model, prompts[0], max_new_tokens=9, stop_ids=())) == got[0]
