"""Every kind of layer beside `nn.Linear`, on a whole model: equal to dense weights in float64, and to PEFT's.

The oracle is the bare model with W + scaling · B A written into its weights. PEFT's own attention is compared in
training mode, because `nn.TransformerEncoderLayer` ignores PEFT's adapter in its fast path.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from loratune.adapters.combine import resize
from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import activate, attach, detach, merge, trainable_parameters, unmerge
from loratune.lora.state import require
from tests.lora.helpers import fill


class _Layers(nn.Module):
    """Convolutions and attention; grouped convolutions are optional, because they cannot be merged."""

    def __init__(self, *, grouped: bool = False) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 4, (3, 2), padding="same", bias=False)
        self.three = nn.Conv3d(1, 3, 2, padding=1)
        self.groups = nn.Conv2d(4, 4, 3, padding=1, groups=2) if grouped else nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        volume = self.three(x[:, :1, None]).mean((1, 2))[:, :8, :8]
        rows = self.groups(self.two(x)).mean(1) + volume
        rows = self.block(rows + self.attention(rows, rows, rows, need_weights=False)[0])
        return torch.cat([rows.flatten(1), self.one(x[:, :, 0]).flatten(1)], 1)


_NAMES = ["one", "two", "three", "attention", "self_attn"]
_SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": _NAMES, "rank_pattern": {"two": 2}}


def _model(dtype: torch.dtype = torch.float64, *, grouped: bool = False) -> _Layers:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Layers(grouped=grouped).to(dtype).requires_grad_(False).eval()


def _x(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def _adapted(model: nn.Module, **settings: Any) -> dict[str, nn.Parameter]:
    attach(model, LoraConfig(**_SETTINGS | settings))
    parameters = trainable_parameters(model)
    fill(parameters.values())
    return parameters


def _oracle(model: nn.Module, x: Tensor) -> Tensor:
    """Output of a new model with dense weights, computed from A and B by matrix products alone."""
    weights = {}
    for path, layer in require(model).adapters["default"].layers.items():
        name = f"{path}.in_proj_weight" if path.endswith(("attention", "self_attn")) else f"{path}.weight"
        factor = 2 if path.endswith("out_proj") else 1  # as PEFT computes
        weight = dict(model.named_parameters())[name]
        delta = factor * 6 / layer.r * layer.lora_B @ layer.lora_A
        weights[name] = weight + delta.view(weight.shape)
    return torch.func.functional_call(_model(), weights, (x,))


@pytest.mark.parametrize("training", [False, True])
def test_output_and_gradients_equal_dense_weights(training: bool) -> None:
    model, x = _model().train(training), _x().requires_grad_()
    base = model(x)
    parameters = _adapted(model)
    assert len(parameters) == 2 * 7  # three convolutions, two attentions of two projections
    ours, expected = model(x), _oracle(model, x)
    assert float((ours - base).detach().abs().max()) > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    wanted = (x, *parameters.values())
    gradients = [torch.autograd.grad(out.square().sum(), wanted) for out in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # the fast paths of PyTorch's attention read the weights elsewhere
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_switch_and_detach(dtype: torch.dtype) -> None:
    model, x = _model(dtype), _x(dtype)
    before = copy.deepcopy(model.state_dict())
    base = model(x)
    _adapted(model)
    adapted = model(x)
    merge(model)
    within = 1e-10 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(x), adapted, rtol=within, atol=within)
    unmerge(model)
    assert torch.equal(model(x), adapted)
    activate(model, None)
    assert torch.equal(model(x), base)
    detach(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in _model().modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sum_of_two_adapters_is_the_sum_of_their_updates() -> None:
    model, x = _model(), _x()
    _adapted(model)
    attach(model, LoraConfig(**_SETTINGS, init_lora_weights=False), name="second", seed=1)
    single = {}
    for name in ("default", "second"):
        merge(model, name)
        single[name] = copy.deepcopy({k: v for k, v in model.state_dict().items() if "lora_" not in k})
        unmerge(model)
    base = _model().state_dict()
    both = {k: base[k] + 0.5 * (single["default"][k] - base[k]) + 2 * (single["second"][k] - base[k]) for k in base}
    activate(model, {"default": 0.5, "second": 2.0})
    torch.testing.assert_close(model(x), torch.func.functional_call(_model(), both, (x,)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_files_go_to_peft_and_come_back(grouped: bool, tmp_path: Path) -> None:
    names = [*_NAMES, "groups"] if grouped else _NAMES
    model, x = _model(torch.float32, grouped=grouped), _x(torch.float32)
    _adapted(model, target_modules=names, use_rslora=True, alpha_pattern={"self_attn": 3})
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(_model(torch.float32, grouped=grouped), tmp_path / "ours").train()
    torch.testing.assert_close(theirs(x), model.train()(x), rtol=1e-5, atol=1e-5)
    fill((p for name, p in theirs.named_parameters() if "lora_" in name), seed=8)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs", name="theirs")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_combined_and_resized_files_keep_the_shapes_of_convolutions(tmp_path: Path) -> None:
    model, x = _model(torch.float32), _x(torch.float32)
    _adapted(model)
    save(model, tmp_path / "a")
    adapted = model(x)
    resize(tmp_path / "a", tmp_path / "c", 4)
    load_adapter(model, tmp_path / "c", name="resized")
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)


def test_convolution_with_groups_computes_adds_and_refuses_to_merge() -> None:
    model, x = _model(grouped=True), _x()
    _adapted(model, target_modules=["groups"], rank_pattern={})
    layer = model.groups
    assert layer.lora_B.shape == (4, 2)
    hidden = nn.functional.conv2d(x, layer.lora_A.view(4, 4, 3, 3), padding=1)
    low_rank = torch.cat(
        [layer.lora_B[:2] @ hidden[:, :2].flatten(2), layer.lora_B[2:] @ hidden[:, 2:].flatten(2)], 1
    )
    torch.testing.assert_close(layer(x), layer.to_base()(x) + 1.5 * low_rank.view(2, 4, 8, 8), rtol=1e-9, atol=1e-9)
    with pytest.raises(AdapterError, match="group"):
        merge(model)
    with pytest.raises(AdapterError, match="2 groups do not divide rank 3"):
        attach(model, LoraConfig(r=3, target_modules=["groups"]), name="odd")
    outputs = {"default": layer(x)}
    attach(model, LoraConfig(r=2, target_modules=["groups"], init_lora_weights=False), name="second")
    outputs["second"] = model.groups(x)
    base = layer.to_base()(x)
    activate(model, {"default": 0.5, "second": -2.0})
    expected = base + 0.5 * (outputs["default"] - base) - 2 * (outputs["second"] - base)
    torch.testing.assert_close(model.groups(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{"padding_mode": "circular", "padding": 1}, {"dilation": 2, "padding": 2}])
def test_dilated_and_circular_convolutions_equal_their_merged_selves(settings: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 5, 3, **settings)).double(), _x()
    _adapted(model, target_modules=["0"], rank_pattern={})
    adapted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)


class _OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


class _OwnAttention(nn.MultiheadAttention):
    def forward(self, query: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(query, query, query)[0]


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (_OwnConv(2, 2, 1), "forward of its own"),
        (nn.ConvTranspose2d(2, 2, 1), "it is a ConvTranspose2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)), "parametri[sz]ed|forward of its own"),
        (_OwnAttention(4, 1), "forward of its own"),
        (nn.MultiheadAttention(4, 1, kdim=2), "separate weights"),
    ],
)
def test_layers_that_compute_something_else_are_refused(layer: nn.Module, why: str) -> None:
    with pytest.raises(AdapterError, match=why):
        attach(nn.ModuleDict({"layer": layer}), LoraConfig(r=1, target_modules=["layer"]))


def test_parts_of_an_attention_are_selected_together_and_have_no_dropout() -> None:
    model = _model()
    with pytest.raises(AdapterError, match="target the MultiheadAttention"):
        attach(model, LoraConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(AdapterError, match="lora_dropout"):
        attach(model, LoraConfig(r=2, target_modules=["attention"], lora_dropout=0.1))
    report = attach(model, LoraConfig(r=2, target_modules=["attention", "attention.out_proj"]))
    assert report.ranks == {"attention": 2, "attention.out_proj": 2}
    with pytest.raises(AdapterError, match="target the MultiheadAttention"):
        attach(model, LoraConfig(r=2, target_modules=["attention.out_proj"]), name="second")


def test_dropout_of_a_convolution_is_unbiased() -> None:
    model = nn.Sequential(nn.Conv1d(8, 6, 3)).double()
    _adapted(model, target_modules=["0"], rank_pattern={}, lora_dropout=0.5)
    x = torch.randn(1, 8, 12, dtype=torch.float64).expand(4000, 8, 12)
    with torch.no_grad():
        expected, base = model.eval()(x[:1]), model[0].base_forward(x[:1])
        dropped = model.train()(x)
    spread = (dropped - base).std(0) / 4000**0.5
    assert float(spread.min()) > 0
    assert bool(((dropped.mean(0) - expected[0]).abs() < 6 * spread).all())


def test_vision_model_of_transformers_trains_its_patch_convolution() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = tf.ViTModel(tf.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    attach(model, LoraConfig(r=2, target_modules=["projection"]))
    parameters = trainable_parameters(model)
    fill(parameters.values())
    pixels = torch.randn(2, 3, 16, 16)
    adapted = model(pixel_values=pixels).last_hidden_state
    gradients = torch.autograd.grad(adapted.square().sum(), parameters.values())
    assert all(bool(gradient.any()) for gradient in gradients)
    merge(model)
    torch.testing.assert_close(model(pixel_values=pixels).last_hidden_state, adapted, rtol=1e-4, atol=1e-4)
