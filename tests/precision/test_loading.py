"""Models that are quantised while they are read: values, memory, and refused files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from loratune.base.load import POCKET, load
from loratune.box import MODEL_DIR
from loratune.errors import ModelError
from loratune.precision.linear import quantise_linears, quantised_layers
from loratune.precision.tensors import Checkpoint
from tests.conftest import CAUSAL, build

TOKENS = torch.arange(2, 30)[None]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model to damage."""
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", CAUSAL)
def test_loading_in_4_bits_is_loading_and_then_quantising(name, tmp_path):
    """Whatever names and shapes the files of an architecture have: to the bit, and in an ordinary model."""
    build(name).save_pretrained(tmp_path)
    model = load(str(tmp_path), "nf4", "cpu")
    expected = build(name)
    quantise_linears(expected, skip=[expected.get_output_embeddings()])
    assert torch.equal(logits(model), logits(expected))
    assert len(list(quantised_layers(model))) == len(list(quantised_layers(expected))) > 0
    assert not hasattr(model.config, "quantization_config")
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not model.training


def test_shards_are_read_like_one_file(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(Checkpoint(tmp_path / "many").files) > 2
    one, many = (load(str(tmp_path / name), "nf4", "cpu") for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))


def test_tensors_are_read_to_the_bit_and_one_at_a_time(tmp_path):
    """No mapping of a file is left in the process, so pages that were read do not count as its memory."""
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7),
        "c": torch.randn(2, 3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "large": torch.randn(3 << 20),  # more than one part
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = Checkpoint(tmp_path).tensors
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name][...], tensor)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_the_dtype_is_that_of_everything_else(folder):
    model = load(str(folder), "nf4", "cpu")
    assert model.dtype == torch.float32  # bfloat16 files, but a CPU computes in float32
    assert {layer.frozen.dtype for _, layer in quantised_layers(model)} == {torch.float32}


def test_a_name_is_what_adapters_record():
    assert load(POCKET, "nf4", "cpu").name_or_path == load(POCKET, "auto", "cpu").name_or_path


def test_a_tensor_that_is_missing_or_of_another_shape_is_an_error(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    for damaged in (tensors | {name: tensors[name][:-1].clone()}, {k: v for k, v in tensors.items() if k != name}):
        save_file(damaged, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            load(str(folder), "nf4", "cpu")


def test_a_file_that_ends_early_is_an_error(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is the download complete"):
        load(str(folder), "nf4", "cpu")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, '"gptq", which is not read'),
        ({"quant_method": "awq", "bits": 4}, '"awq", which is not read'),
        ({"quant_method": "compressed-tensors"}, '"compressed-tensors", which is not read'),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits, which is not read"),
    ],
)
def test_other_quantised_files_are_refused_before_a_weight_is_read(folder, how, match):
    change_config(folder, quantization_config=how)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=match):
        load(str(folder), device="cpu")


@pytest.fixture
def mxfp4(tmp_path):
    """A folder with experts in 4-bit floating point with a power of two for every 32, as gpt-oss has them, and the
    same model dense."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    expected = build("gptoss")
    expected.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, d_in, d_out = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, d_out, d_in // 32, 16), generator=generator).byte()
        scales = torch.randint(118, 123, (experts, d_out, d_in // 32), generator=generator).byte()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        dense = (pairs * torch.exp2(scales.float() - 127)[..., None]).reshape(experts, d_out, d_in)
        expected.get_parameter(name).copy_(dense.transpose(1, 2))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return str(tmp_path), expected


def test_mxfp4_files_become_dense(mxfp4):
    folder, expected = mxfp4
    model = load(folder, "bfloat16", "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(load(folder, device="cpu")), logits(expected))


def test_mxfp4_experts_stay_in_4_bits_under_nf4_without_rounding(mxfp4):
    folder, expected = mxfp4
    model = load(folder, "nf4", "cpu")
    for ours, theirs in zip(model.model.layers, expected.model.layers, strict=True):
        held = ours.mlp.experts.held
        assert held.keys() == {"gate_up_proj", "down_proj"}
        for name, weight in held.items():
            elements = math.prod(weight.shape)
            assert 0.53 * elements < weight.frozen.nbytes < 0.58 * elements
            dense = theirs.mlp.experts.get_parameter(name)
            assert torch.equal(getattr(ours.mlp.experts, name), dense)
        x, index = torch.randn(5, expected.config.hidden_size), torch.tensor([[0, 1]] * 5)
        factors = torch.rand(5, 2)
        torch.testing.assert_close(ours.mlp.experts(x, index, factors), theirs.mlp.experts(x, index, factors))


def test_mxfp4_blocks_without_scales_are_an_error(mxfp4):
    folder, _ = mxfp4
    file = Path(folder, "model.safetensors")
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("_scales"))
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{gone}, which is missing"):
        load(folder, device="cpu")


def test_what_is_asked_of_the_files_does_not_reach_the_configuration_on_disk(folder):
    before = (folder / "config.json").read_text()
    load(str(folder), "nf4", "cpu")
    assert (folder / "config.json").read_text() == before
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
