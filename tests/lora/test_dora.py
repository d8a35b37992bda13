"""DoRA on every kind of layer and precision: equal to the formula on dense weights, and to PEFT through files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.base.forward import fuse, prepare
from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.files import load_adapter, read_config, save
from loratune.lora.inject import activate, attach, merge, trainable_parameters, unmerge
from loratune.lora.layer import LoraLayer
from loratune.precision.contract import weight_format
from loratune.precision.linear import QuantisedLinear
from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl
from tests.lora.helpers import fill, make, run

R, ALPHA = 3, 5


def _conv1d(d_in: int, d_out: int) -> Conv1D:
    layer = Conv1D(d_out, d_in)
    layer.bias.data.normal_()
    return layer


_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (2, 5, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (5, 8)),
    "conv1d of gpt2": (lambda: _conv1d(8, 6), (2, 5, 8)),
    "embedding": (lambda: nn.Embedding(11, 6), (2, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d of one sample": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4)),
}


class _One(nn.Module):
    """One layer, as a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _model(name: str, dtype: torch.dtype = torch.float64) -> _One:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _One(_LAYERS[name][0]()).to(dtype).requires_grad_(False).eval()


def _x(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = _LAYERS[name][1]
    if name == "embedding":
        return torch.randint(0, 11, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], "use_dora": True} | settings)


def _attached(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> _One:
    model = _model(name, dtype)
    attach(model, _config(**settings))
    fill(trainable_parameters(model).values(), std=0.3)
    return model


def _expected(name: str, model: _One) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the formula, with the whole sum formed and its norm held constant."""
    bare, layer = _model(name).layer, model.layer
    leaves = {key: tensor.detach().double().requires_grad_() for key, tensor in layer.adapter_tensors().items()}
    weight = bare.weight.T if layer.transposed else bare.weight.flatten(1)
    total = weight + ALPHA / R * (leaves["lora_B"] @ leaves["lora_A"])
    total = (leaves["lora_magnitude_vector"] / total.norm(dim=1).detach())[:, None] * total
    shaped = (total.T if layer.transposed else total).reshape(bare.weight.shape)
    out = torch.func.functional_call(bare, {"weight": shaped}, (_x(name),))
    out.square().sum().backward()
    return out.detach(), {key: leaf.grad for key, leaf in leaves.items()}


@pytest.mark.parametrize("name", _LAYERS)
def test_output_gradients_and_merge_are_those_of_the_formula(name: str) -> None:
    model, x = _attached(name), _x(name)
    out = model(x)
    expected, gradients = _expected(name, model)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    out.square().sum().backward()
    for key, tensor in model.layer.adapter_tensors().items():
        torch.testing.assert_close(tensor.grad, gradients[key], rtol=1e-9, atol=1e-9, msg=key)
    before = model.layer.own_weight.clone()
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    unmerge(model)
    assert torch.equal(model.layer.own_weight, before)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_gradients_of_input_and_bias(name: str) -> None:
    model, x = _attached(name, bias="lora_only"), _x(name).requires_grad_()
    model(x).square().sum().backward()
    layer, given = model.layer, x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    weight = layer.own_weight + layer.delta()
    values = {"weight": weight, "bias": bias}
    torch.func.functional_call(_model(name).layer, values, (given,)).square().sum().backward()
    torch.testing.assert_close(x.grad, given.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", _LAYERS)
def test_a_new_adapter_leaves_the_output_as_it_is(name: str, dtype: torch.dtype) -> None:
    model = _model(name, dtype)
    expected = model(_x(name, dtype))
    attach(model, _config())
    close = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(model(_x(name, dtype)), expected, **close)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_first_magnitude_is_the_length_of_the_rows(init: bool | str) -> None:
    model = _model("linear")
    expected_scaling = 7 / 2**0.5
    attach(model, _config(init_lora_weights=init, use_rslora=True, rank_pattern={"layer": 2}, lora_alpha=7))
    layer = model.layer
    total = layer.own_weight + expected_scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), total.norm(dim=1).detach())


@pytest.mark.parametrize("precision", ["bfloat16", "nf4", "fp8"])
def test_half_and_quantised_weights(precision: str) -> None:
    generator = torch.Generator().manual_seed(2)
    base = nn.Linear(128, 64).requires_grad_(False)
    base.weight.copy_(torch.randn(base.weight.shape, generator=generator) / 11)
    base = base.to(torch.bfloat16)
    if precision != "bfloat16":
        base = QuantisedLinear.in_place_of(base, weight_format(precision).quantise(base.weight))
    model, x = _One(base), torch.randn(9, 128, generator=generator).to(torch.bfloat16)
    bare = model(x)
    attach(model, _config())
    torch.testing.assert_close(model(x), bare, rtol=2**-7, atol=2**-9)
    fill(trainable_parameters(model).values(), std=0.03)
    layer = model.layer
    dense = base.weight.double()
    total = dense + ALPHA / R * (layer.lora_B @ layer.lora_A).double()
    scale = layer.lora_magnitude_vector.double() / total.norm(dim=1)
    expected = (x.double() @ total.T) * scale + layer.bias.double()
    error = (model(x).double() - expected).norm() / expected.norm()
    assert error < (0.06 if precision == "fp8" else 0.006), float(error)
    out = model(x)
    out.float().square().sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in layer.adapter_tensors().values())
    torch.testing.assert_close(layer.delta().double(), scale[:, None] * total - dense, rtol=1e-3, atol=1e-5)
    merge(model)
    assert (model(x).double() - expected).norm() / expected.norm() < (0.06 if precision == "fp8" else 0.006)
    unmerge(model)
    assert torch.equal(model(x), out)


def test_the_magnitude_is_not_rounded_to_the_steps_of_bfloat16() -> None:
    model = _One(nn.Linear(64, 32, bias=False).to(torch.bfloat16).requires_grad_(False))
    attach(model, _config())
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    bare = model(x).double()
    with torch.no_grad():
        model.layer.lora_magnitude_vector.mul_(1.0115)  # between two values of bfloat16, 1.0078 and 1.0156
    change = ((model(x).detach().double() - bare) * bare).sum() / bare.square().sum()
    assert 0.0100 < change < 0.0140


_MODELS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "wte"],
    "gemma": ["embed_tokens", "o_proj"],
}


@pytest.mark.parametrize("name", _MODELS)
def test_files_are_exchanged_with_peft(name: str, tmp_path: Path) -> None:
    model = make(name)
    bare = run(model)
    attach(model, _config(target_modules=_MODELS[name]))
    torch.testing.assert_close(run(model), bare, rtol=1e-5, atol=1e-5)
    fill(trainable_parameters(model).values(), std=0.02)
    expected = run(model)
    assert not torch.allclose(expected, bare, atol=1e-3)
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours")
    torch.testing.assert_close(run(theirs), expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    other = make(name)
    load_adapter(other, tmp_path / "theirs")
    torch.testing.assert_close(run(other), expected, rtol=1e-5, atol=1e-5)
    assert read_config(tmp_path / "theirs").use_dora


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "linear"])
def test_files_of_single_layers_are_exchanged_with_peft(name: str, tmp_path: Path) -> None:
    model, x = _attached(name, torch.float32), _x(name, torch.float32)
    expected = model(x)
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(_model(name, torch.float32), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    other = _model(name, torch.float32)
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(other(x), expected)


def test_training_follows_peft(tmp_path: Path) -> None:
    model: PreTrainedModel = make("llama")
    attach(model, _config(target_modules=["q_proj", "up_proj"]))
    fill([p for n, p in trainable_parameters(model).items() if n.endswith(("lora_A", "lora_B"))], std=0.05)
    save(model, tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "start", is_trainable=True)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(4))
    losses = []
    for net in (model, theirs):
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        for _ in range(8):
            loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    torch.testing.assert_close(losses[:8], losses[8:], rtol=1e-5, atol=1e-5)
    assert losses[7] < losses[0]


def test_plain_and_dora_adapters_share_a_model_and_fused_layers_refuse_it() -> None:
    model = make("llama")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"]), name="plain")
    attach(model, _config(target_modules=["q_proj"]), name="dora")
    fill(trainable_parameters(model).values())
    assert not fuse(prepare(model))
    expected = run(model)
    activate(model, "plain")
    assert fuse(prepare(model))
    activate(model, "dora")
    assert torch.equal(run(model), expected)
    with pytest.raises(AdapterError, match=r"uses Dora, which is not a low-rank sum"):
        activate(model, ["plain", "dora"])


def test_layers_that_cannot_have_it_are_refused() -> None:
    attention = _One(nn.MultiheadAttention(8, 2)).requires_grad_(False)
    with pytest.raises(AdapterError, match="DoRA is not for MultiheadAttention"):
        attach(attention, _config())
    grouped = _One(nn.Conv1d(4, 4, 3, groups=2)).requires_grad_(False)
    with pytest.raises(AdapterError, match="DoRA scales the rows of the updated weight, but A sees"):
        attach(grouped, _config(r=2))


def test_one_graph_under_compile() -> None:
    model = _attached("linear", torch.float32)
    x = _x("linear", torch.float32)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert isinstance(model.layer, LoraLayer)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_model(tmp_path / "base")
    write_jsonl(tmp_path / "chat.jsonl", CHAT)
    words = ["base", "chat.jsonl", "--use-dora", *SHORT, "--max-steps", "2", "--out", "run"]
    trained = loratune("train", *words)
    assert trained.status == 0, trained.err
    assert read_config("run").use_dora
    peft.PeftConfig.from_pretrained("run")
    merged = loratune("merge", "run", "--out", "merged")
    assert merged.status == 0, merged.err
