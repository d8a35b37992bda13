"""Checkpoints in 8-bit floating point: the weights that each gives, and the refused ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import loratune as lt
from loratune.base.load import load
from loratune.errors import ModelError
from loratune.ops.projection import StackedAdapters
from loratune.precision.contract import weight_format
from loratune.precision.fp8 import E4M3, Fp8Weight
from loratune.precision.fp8_projection import Fp8Projection, refresher
from loratune.precision.linear import quantised_layers
from tests.conftest import SMALL

TOKENS = torch.arange(2, 40)[None]
BLOCK = 128


def a_model(kind=tf.LlamaForCausalLM, config=tf.LlamaConfig, **settings):
    """Wide enough for several blocks, the last of them not whole."""
    shape = SMALL | {"hidden_size": 192, "intermediate_size": 320} | settings
    torch.manual_seed(0)
    return kind(config(**shape)).requires_grad_(False).eval()


def by_blocks(weight):
    """e4m3, and the scale of each block of 128 x 128."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            scale[i, j] = block.abs().max() / 448
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    values = (weight / wide).to(E4M3)
    return values, scale, values.float() * wide


def by_rows(weight):
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight / scale.float()).to(E4M3)
    return values, scale, values.float() * scale.float()


def as_a_whole(weight):
    scale = weight.abs().max()[None] / 448
    values = (weight / scale).to(E4M3)
    return values, scale, values.float() * scale


def compressed(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False} | more
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
KINDS = {
    "blocks": (by_blocks, "_scale_inv", BLOCKS),
    "compressed blocks": (by_blocks, "_scale", compressed("block", block_structure=[BLOCK, BLOCK])),
    "rows": (by_rows, "_scale", compressed("channel")),
    "as a whole": (as_a_whole, "_scale", compressed("tensor")),
}


def write(folder: Path, model, kind: str) -> None:
    """The checkpoint of `model`, whose weights become those that its codes stand for."""
    quantise, suffix, how = KINDS[kind]
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        values, scale, dense = quantise(tensors[name])
        tensors |= {name: values, name + suffix: scale}
        if how is not BLOCKS:
            tensors[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        path = name.removesuffix(".weight")
        if path in dict(model.named_modules()):
            model.get_submodule(path).weight.copy_(dense)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def off(got, exact):
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["rows", "as a whole"])
def test_scales_by_rows_are_taken_over_to_the_bit(kind, tmp_path):
    model = a_model()
    write(tmp_path, model, kind)
    loaded = load(str(tmp_path), "fp8", "cpu")
    layers = dict(quantised_layers(loaded))
    assert len(layers) == 2 * 7
    assert not hasattr(loaded.config, "quantization_config")
    files = load_file(tmp_path / "model.safetensors")
    for path, layer in layers.items():
        assert isinstance(layer.frozen, Fp8Weight)
        assert torch.equal(layer.frozen.values.view(torch.uint8), files[f"{path}.weight"].view(torch.uint8))
        assert torch.equal(layer.frozen.dense(), model.get_submodule(path).weight)


@pytest.mark.parametrize("kind", ["blocks", "compressed blocks"])
def test_blocks_are_quantised_by_rows_and_rounded_once_more(kind, tmp_path):
    """Numbers spread over a binade are off by 2.6 % after a rounding to 3 bits, and two roundings are independent."""
    original, model = a_model(), a_model()
    write(tmp_path, model, kind)
    loaded = load(str(tmp_path), "fp8", "cpu")
    layers = dict(quantised_layers(loaded))
    assert len(layers) == 2 * 7
    for path, layer in layers.items():
        assert isinstance(layer.frozen, Fp8Weight)
        before, file = (each.get_submodule(path).weight for each in (original, model))
        assert off(file, before) == pytest.approx(0.026, rel=0.1)
        assert off(layer.frozen.dense(), file) == pytest.approx(0.026, rel=0.1)
        assert off(layer.frozen.dense(), before) == pytest.approx(0.037, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_model(kind, tmp_path):
    """Forward and backward, but for x and dy in 8 bits, and W once more where it came in blocks: 4 % a product."""
    model = a_model()
    write(tmp_path, model, kind)
    loaded = load(str(tmp_path), "fp8", "cpu")
    for path, layer in quantised_layers(loaded):
        x = torch.randn(50, layer.in_features, requires_grad=True)
        d_out = torch.randn(50, layer.out_features)
        results = []
        for module in (layer, model.get_submodule(path)):
            out = module(x)
            results.append([out, *torch.autograd.grad(out, x, d_out)])
        for got, expected in zip(*results, strict=True):
            assert off(got, expected) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_precision_they_load_dense(kind, tmp_path):
    model = a_model()
    write(tmp_path, model, kind)
    loaded = load(str(tmp_path), "auto", "cpu")
    assert not list(quantised_layers(loaded))
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(model))
    half = load(str(tmp_path), "bfloat16", "cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_4_bits_are_made_of_the_dense_weight(kind, tmp_path):
    model = a_model()
    write(tmp_path / "eight", model, kind)
    model.save_pretrained(tmp_path / "dense")
    got, expected = (load(str(tmp_path / name), "nf4", "cpu") for name in ("eight", "dense"))
    assert torch.equal(logits(got), logits(expected))


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_a_head_in_8_bits_becomes_dense_and_experts_are_quantised_by_rows(kind, tmp_path):
    """transformers merges the files' experts into one tensor, and the head is kept as it is in every precision."""
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 160, "head_dim": 48}
    model = a_model(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, **settings)
    write(tmp_path, model, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {}
    quantise, suffix, _ = KINDS[kind]
    values, scale, dense = quantise(tensors["lm_head.weight"])
    tensors |= {"lm_head.weight": values, "lm_head.weight" + suffix: scale}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    expected["lm_head"] = dense
    loaded = load(str(tmp_path), "fp8", "cpu")
    assert len(list(quantised_layers(loaded))) == 2 * 4
    assert torch.equal(loaded.lm_head.weight, dense)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    wide = tensors[name + suffix].float()
    if kind == "blocks":
        wide = wide.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: tensors[name].shape[0], :160]
    exact = tensors[name].float() * wide
    down = loaded.model.layers[1].mlp.experts.down_proj[2]
    assert torch.equal(down, weight_format("fp8").quantise(exact).dense())
    assert float((down - exact).norm() / exact.norm()) <= 0.03


def test_an_adapter_learns_over_it_as_over_the_dense_model(tmp_path):
    """Scales that are no powers of two, forward and backward through the whole model; x and dy are in 8 bits too."""
    model = a_model()
    write(tmp_path, model, "rows")
    loaded = load(str(tmp_path), "fp8", "cpu")
    lt.attach(loaded, lt.LoraConfig(r=4, target_modules="all-linear"), name="default")
    loss = loaded(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    reference = lt.attach(model, lt.LoraConfig(r=4, target_modules="all-linear"), name="default")
    assert reference is not None
    expected = model(input_ids=TOKENS, labels=TOKENS).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    gradients = {p: t.grad for p, t in model.named_parameters() if p.endswith("lora_B")}
    for path, parameter in loaded.named_parameters():
        if path.endswith("lora_B"):
            assert off(parameter.grad, gradients[path]) < 0.25, path


@pytest.mark.parametrize(
    "how",
    [
        compressed("channel", num_bits=4),
        compressed("channel", type="int"),
        compressed("group"),
        compressed("channel") | {"transform_config": {"config_groups": {"R1": {}}}},
        compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        compressed("channel") | {"config_groups": {}},
    ],
    ids=["4 bits", "integers", "groups", "rotated", "sparse", "empty"],
)
@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_what_is_not_read_is_refused_before_a_weight_is_read(how, precision, tmp_path):
    write(tmp_path, a_model(), "rows")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match='"compressed-tensors", which is not read'):
        load(str(tmp_path), precision, "cpu")


def test_files_that_do_not_fit_their_configuration_are_an_error(tmp_path):
    write(tmp_path, a_model(), "blocks")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    without = {k: v for k, v in tensors.items() if k != name + "_scale_inv"}
    cut = tensors | {name + "_scale_inv": tensors[name + "_scale_inv"][:1].clone()}
    for damaged, match in (
        (without, "up_proj.weight_scale_inv is missing"),
        (cut, "up_proj.weight: scales of shape"),
    ):
        save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=match):
            load(str(tmp_path), "fp8", "cpu")


def products_with_adapter_columns(quantise, device="cpu", dtype=torch.float32):
    """Errors of x (W + B A)ᵀ and dy (W + B A) with the low-rank part inside, for a weight that was taken over."""
    torch.manual_seed(0)
    values, scale, dense = (tensor.to(device) for tensor in quantise(torch.randn(1536, 1024)))
    each = scale.float().reshape(-1, 1).expand(1536, 1).contiguous()
    frozen = Fp8Weight.joined([Fp8Weight(values, each, dtype)], 16)
    assert frozen.augmented is not None
    lora_A, lora_B = torch.randn(16, 1024, device=device) / 32, torch.randn(1536, 16, device=device)
    x, dy = torch.randn(64, 1024, device=device), torch.randn(64, 1536, device=device)
    member = StackedAdapters([slice(0, 1536)], [slice(0, 16)], [1.0])
    adapter = lora_A.to(dtype), lora_B.to(dtype)
    projection = Fp8Projection.of(frozen, None, adapter, member, hold_transposed=False)
    refresher([projection])()
    out, _ = projection.forward(x.to(dtype))
    d_x = projection.backward(dy.to(dtype)).d_input()
    return off(out, x @ (dense + lora_B @ lora_A).T), off(d_x, dy @ (dense + lora_B @ lora_A))


@pytest.mark.parametrize("quantise", [by_rows, as_a_whole])
def test_adapter_columns_work_with_any_scale(quantise):
    """2.6 % for x or dy in 8 bits; the low-rank part has 8 bits of mantissa, and W is exactly the file's."""
    assert max(products_with_adapter_columns(quantise)) < 0.035
