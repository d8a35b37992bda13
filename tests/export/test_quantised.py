"""4-bit checkpoints on disk: bitsandbytes' format, read back to the bit, used like the original model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratune as lt
from loratune.base.load import POCKET, load, load_tokenizer
from loratune.cli import main
from loratune.errors import AdapterError, ModelError
from loratune.export.merge import merge_checkpoint
from loratune.export.quantised import save_quantised
from loratune.lora.inject import attach
from loratune.precision.linear import quantised_layers
from tests.conftest import CAUSAL, build
from tests.export.test_merge import PROMPTS, forget_dtype, logits, tokenizer  # noqa: F401

# Names and settings of a layer as bitsandbytes 0.50.2 writes them through transformers 5.23 (save_pretrained of a
# model that was loaded with load_in_4bit, bnb_4bit_quant_type "nf4" and bnb_4bit_use_double_quant).
SUFFIXES = {
    "weight": torch.uint8,
    "weight.absmax": torch.uint8,
    "weight.nested_absmax": torch.float32,
    "weight.nested_quant_map": torch.float32,
    "weight.quant_map": torch.float32,
    "weight.quant_state.bitsandbytes__nf4": torch.uint8,
}
STATE = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]


def test_the_files_are_those_of_bitsandbytes(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    save_quantised(load(str(tmp_path / "dense"), "nf4", "cpu"), tmp_path / "out")
    prefix = "model.layers.0.mlp.up_proj."
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert {name: tensor.dtype for name, tensor in found.items()} == SUFFIXES
    assert found["weight"].shape == (96 * 64 // 2, 1)
    state = json.loads(bytes(found["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert list(state) == STATE
    assert (state["blocksize"], state["nested_blocksize"], state["shape"]) == (64, 256, [96, 64])
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert how["quant_method"] == "bitsandbytes"
    assert how["load_in_4bit"] is True
    assert how["bnb_4bit_quant_type"] == "nf4"
    assert how["bnb_4bit_use_double_quant"] is True


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "model.norm"])
def test_values_that_are_not_finite_are_named_and_not_written(where, value, tmp_path):
    """Also in a quantised layer, whose codes cannot hold them."""
    made = build("llama")
    made.get_submodule(where).weight.data.view(-1)[5] = value
    made.save_pretrained(tmp_path / "dense")
    model = load(str(tmp_path / "dense"), "nf4", "cpu")
    with pytest.raises(ModelError, match=rf"out: {where}\.weight\S* holds (NaN|infinity), so it is not written"):
        save_quantised(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_written_checkpoint_is_read_back_the_same(name, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    model = load(str(tmp_path / "dense"), "nf4", "cpu")
    done = save_quantised(model, tmp_path / "out")
    assert done.layers == len(list(quantised_layers(model)))
    loaded = load(str(tmp_path / "out"), device="cpu")
    if name == "gptoss":  # products of experts that lie transposed sum in another order, over the same weights
        experts = [made.model.layers[1].mlp.experts for made in (loaded, model)]
        assert torch.equal(*(held.gate_up_proj for held in experts))
        assert torch.equal(*(held.down_proj for held in experts))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    else:
        assert torch.equal(logits(loaded), logits(model))
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("recorded", [True, False])
def test_tensors_that_stay_dense_keep_the_dtype_of_the_files(tmp_path, recorded):
    """On a CPU the model is float32 in memory. A tensor in float32 among bfloat16 files stays float32."""
    base = build("llama", dtype=torch.bfloat16)
    base.model.norm.weight.data = base.model.norm.weight.data.float()
    base.save_pretrained(tmp_path / "dense")
    if not recorded:
        forget_dtype(tmp_path / "dense")
    model = load(str(tmp_path / "dense"), "nf4", "cpu")
    saved = save_quantised(model, tmp_path / "out")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "out"))
    dense = [name for name in after if name in before and after[name].dtype != torch.uint8]
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(dense)
    for name in dense:
        assert torch.equal(after[name], before[name]), name
        assert after[name].dtype == before[name].dtype, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    state = after["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"]
    assert json.loads(bytes(state.tolist()))["dtype"] == "bfloat16"
    assert saved.file_bytes < (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert torch.equal(logits(load(str(tmp_path / "out"), device="cpu")), logits(model))


def test_models_that_cannot_be_saved_are_refused(tmp_path):
    with pytest.raises(ModelError, match='precision="nf4"'):
        save_quantised(build("llama"), tmp_path / "out")
    model = load(POCKET, "nf4", "cpu")
    attach(model, lt.LoraConfig(r=2), name="a")
    with pytest.raises(AdapterError, match="detach"):
        save_quantised(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_a_folder_that_works_like_the_model(tmp_path, capsys):
    assert main(["quantise", POCKET, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "42 layers in 4 bits" in capsys.readouterr().out
    model = load(str(tmp_path / "out"), device="cpu")
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == load_tokenizer(POCKET).get_vocab()
    assert torch.equal(logits(model), logits(load(POCKET, "nf4", "cpu")))


@pytest.mark.parametrize(("name", "target"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_a_merged_checkpoint_is_dense_and_equals_the_trained_model(name, target, tokenizer, tmp_path):  # noqa: F811
    build(name).save_pretrained(tmp_path / "dense")
    model = load(str(tmp_path / "dense"), "nf4", "cpu")
    attach(model, lt.LoraConfig(r=4, init_lora_weights=False, target_modules=[target]))
    expected = logits(model)
    merged = merge_checkpoint(model, tokenizer, "default", tmp_path / "out", prompts=PROMPTS)
    assert "quantised layers" in str(merged)
    loaded = load(str(tmp_path / "out"), device="cpu")
    assert not list(quantised_layers(loaded))
    assert float((logits(loaded) - expected).abs().max()) <= 1e-4  # logits of order one, in float32
    assert torch.equal(logits(model), expected)
    assert "quantization_config" not in json.loads(Path(tmp_path / "out" / "config.json").read_text())
