"""Loading: the model, and problems of a folder that are found before its weights are read."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import loratune as lt
from loratune.base.load import POCKET, load, load_tokenizer, max_document_tokens, resolve, stop_ids
from loratune.box import MODEL_DIR
from loratune.errors import DataError, ModelError
from tests.campaigns.architecture_checks import build


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model to damage."""
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def test_a_folder_and_the_name_in_the_box_are_the_same_model(folder):
    a, b = load(str(folder), device="cpu"), load(POCKET, device="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(p.requires_grad for p in a.parameters())
    assert not a.training
    assert {p.dtype for p in a.parameters()} == {torch.float32}  # bf16 files, but a CPU computes in float32


def test_precision_is_as_asked(folder):
    assert load(str(folder), "bfloat16", "cpu").dtype == torch.bfloat16
    assert load(str(folder), "float32", "cpu").dtype == torch.float32


def test_stop_ids_come_from_config_tokenizer_and_template():
    tokenizer = load_tokenizer(POCKET)
    by_name = stop_ids(POCKET, tokenizer)
    assert by_name == stop_ids(load(POCKET, device="cpu"), tokenizer)
    assert tokenizer.eos_token_id in by_name
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    end = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert by_name & set(end[-2:])


def test_the_template_of_a_file_replaces_the_tokenizers(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = load_tokenizer(POCKET, str(file))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


def test_context_length():
    assert max_document_tokens(load(POCKET, device="cpu").config) == 1024


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9999]), "cannot be"),
        (lambda f: _drop(f, "model.layers.3.mlp.up_proj.weight"), "model.layers.3.mlp.up_proj.weight"),
        (lambda f: _configure(f, model_type="no-such-architecture"), "configuration"),
        (lambda f: _configure(f, model_type="vit", architectures=["ViTModel"]), "not a causal language model"),
        (lambda f: _configure(f, intermediate_size=1280), "wrong shape|cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(str(folder), device="cpu")


def test_a_missing_tensor_is_never_a_random_layer(folder):
    _drop(folder, "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ModelError, match="missing"):
        load(str(folder), device="cpu")


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("value", ["x", [], {}])
def test_the_longest_input_of_a_tokenizer_is_a_number(folder, value):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": value}))
    with pytest.raises(ModelError, match="model_max_length"):
        load_tokenizer(str(folder))


def test_a_misspelt_folder_names_its_neighbour(folder):
    with pytest.raises(ModelError, match='"model"'):
        resolve(str(folder.parent / "modell"))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (tf.XLNetConfig(), None),
        (tf.LlamaConfig(max_position_embeddings=77), 77),
        (tf.BloomConfig(), None),
        (tf.RobertaConfig(), 510),  # of 512 lines, which the published RoBERTa has 514 of
        (tf.RobertaConfig(max_position_embeddings=514), 512),
        (tf.RobertaConfig(max_position_embeddings=514, pad_token_id=7), 506),
        (tf.OPTConfig(), 2048),
        (tf.WhisperConfig(), 448),
        (tf.MptConfig(), 2048),
    ],
)
def test_the_longest_document_is_the_number_of_free_positions(config, limit):
    assert max_document_tokens(config) == limit


@pytest.mark.parametrize(
    "kind",
    [
        "roberta",
        "camembert",
        "data2vec-text",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "prophetnet",
        "bart",
        "biogpt",
        "mbart",
        "mvp",
        "opt",
        "plbart",
        "trocr",
        "gpt2",
        "marian",
        "pegasus",
        "whisper",
        "mpt",
        "openai-gpt",
        "roc_bert",
    ],
)
def test_a_model_runs_the_longest_document_and_none_longer(kind):
    model = build(kind)
    limit = max_document_tokens(model.config)
    assert limit == max_document_tokens(model)
    tokens = torch.randint(3, model.config.vocab_size, (1, limit + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(input_ids=tokens[:, :limit], use_cache=False).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError), match=r"index|size"):
            model(input_ids=tokens, use_cache=False)


def test_a_document_behind_the_last_position_is_refused_with_its_line(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "word " * count}) + "\n" for count in (5, 900)))
    model = build("roberta")
    lt.attach(model, lt.LoraConfig(r=2))
    with pytest.raises(DataError, match=r"data\.jsonl:2: .*255"):
        lt.train(model, load_tokenizer(POCKET), str(data))


@pytest.mark.parametrize(
    "kind", ["musicgen", "musicgen_melody", "encoder-decoder", "rag", "gemma4_assistant", "t5gemma"]
)
def test_a_folder_that_holds_no_causal_language_model_is_one_clear_line(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError) as refusal:
        load(str(folder), device="cpu")
    assert str(refusal.value).startswith(f"{folder}: ")
    assert "\n" not in str(refusal.value)
    assert re.search("not a causal language model|hidden_size_per_layer_input must be 0", str(refusal.value))


def test_a_missing_package_is_named_with_its_remedy(folder, monkeypatch):
    """Gemma 3n needs timm for its images."""
    monkeypatch.setattr("transformers.utils.import_utils.is_timm_available", lambda: False)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3n"}))
    with pytest.raises(ModelError, match=f"^{folder}: .*requires the timm library.*`pip install timm`"):
        load(str(folder), device="cpu")


def test_an_adapter_is_not_a_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(ModelError, match="some/base"):
        resolve(str(tmp_path))


def _drop(folder, key):
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
