"""4-bit weights on a GPU: the kernel's bits, products in pieces, the recorded step, and loading to the device."""

from __future__ import annotations

import pytest
import torch

from loratune.base.forward import prepare
from loratune.base.load import POCKET, load
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import make_row
from loratune.lora.inject import attach
from loratune.precision import nf4, pieces
from loratune.precision.linear import quantise_linears, quantised_layers
from loratune.training.graph import GraphStep
from loratune.training.optim import optimizer_of, set_rate
from tests.conftest import build
from tests.training.helpers import examples, trainable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_the_kernel_gives_the_bits_of_the_reference(dtype, nested):
    weight = nf4.quantise((torch.randn(1000, 1088, device="cuda") * 0.02).to(dtype), nested=nested)
    expected = nf4.dequantise(weight)
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight.rectangle(slice(13, 700), slice(64, 640)), expected[13:700, 64:640])
    assert torch.equal(weight.to("cpu").dense(), expected.cpu())


@pytest.mark.parametrize("bias", [False, True])
def test_products_in_pieces_equal_whole_products(monkeypatch, bias):
    """A piece is rows of the output or columns of the gradient, so no sum is split. Only the tiling differs."""
    weight = nf4.quantise((torch.randn(1024, 2048, device="cuda") * 0.02).bfloat16())
    x, dy = (torch.randn(300, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 1024))
    b = torch.randn(1024, device="cuda", dtype=torch.bfloat16) if bias else None
    below, beside = (torch.randn(300, n, device="cuda", dtype=torch.bfloat16) for n in (1024, 2048))

    def products():
        onto = weight.forward(x, b, below.clone()), weight.d_input(dy, beside.clone())
        return weight.forward(x, b), weight.d_input(dy), *onto

    whole = products()
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 1 << 18)
    for got, expected in zip(products(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


def test_the_augmented_weight_equals_a_product_and_a_sum(monkeypatch):
    """To bfloat16's rounding: the augmented product rounds once, a product and a sum round twice."""
    weight = nf4.quantise((torch.randn(1024, 2048, device="cuda") * 0.02).bfloat16())
    half = {"device": "cuda", "dtype": torch.bfloat16}
    lora_A, lora_B = torch.randn(48, 2048, **half) * 0.02, torch.randn(1024, 48, **half) * 0.02
    x, dy = torch.randn(300, 2048, **half), torch.randn(300, 1024, **half)
    inner, d_inner = x @ lora_A.T, dy @ lora_B
    augmented = nf4.AugmentedNf4(weight, lora_A, lora_B)
    for elements in (1 << 30, 1 << 18):
        monkeypatch.setattr(pieces, "PIECE_ELEMENTS", elements)
        y = augmented.forward(torch.cat([x, inner], 1), None)
        dx = augmented.d_input(torch.cat([dy, d_inner], 1))
        for got, expected in (
            (y, x.double() @ weight.dense().double().T + inner.double() @ lora_B.double().T),
            (dx, dy.double() @ weight.dense().double() + d_inner.double() @ lora_A.double()),
        ):
            assert float((got.double() - expected).norm() / expected.norm()) < 2**-8


def steps(
    name: str, quantised: bool, record: bool, optim: str = "adamw", dropout: float = 0.0
) -> tuple[list[float], dict]:
    model = build(name)
    if quantised:
        quantise_linears(model, skip=[model.get_output_embeddings()])
    model = model.to("cuda", torch.bfloat16)
    attach(model, LoraConfig(r=4, lora_dropout=dropout), name="default", seed=0)
    forward = prepare(model)
    assert forward.fused is not None
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")
    parameters = list(trainable(model).values())
    optimizer = optimizer_of(parameters, TrainConfig(learning_rate=1e-2, optim=optim))
    step = GraphStep(forward, parameters, optimizer, 1.0, record=record)
    losses = []
    with forward.installed():
        for index in range(8):
            set_rate(optimizer, 1e-2)
            losses.append(step([make_row(examples(5, seed=index % 3), 256, 0)], key=index).loss)
    assert step.why_not is None
    return losses, {path: p.detach().clone() for path, p in trainable(model).items()}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(("optim", "dropout"), [("adamw", 0.0), ("adamw", 0.1), ("adamw_8bit", 0.0)])
def test_a_recorded_step_in_4_bits_equals_the_eager_step(name, optim, dropout):
    """The dense pieces of a weight are in the recording's own memory, and every replay fills them again."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (recorded, a), (eager, b) = (steps(name, True, record, optim, dropout) for record in (True, False))
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorded == eager
    assert all(torch.equal(a[path], b[path]) for path in a)
    assert recorded[-1] < recorded[0]


def test_loading_never_holds_the_dense_model():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(POCKET, "nf4", "cuda")
    held = torch.cuda.memory_allocated() - before
    layers = [layer for _, layer in quantised_layers(model)]
    dense = sum(layer.in_features * layer.out_features for layer in layers) * 2
    others = sum(p.numel() * p.element_size() for p in model.parameters())
    codes = sum(layer.frozen.nbytes for layer in layers)
    assert codes < 0.26 * dense
    assert held < (codes + others) * 1.1 + (1 << 20)
    assert {layer.frozen.dtype for layer in layers} == {torch.bfloat16}
    cpu = load(POCKET, "nf4", "cpu")
    for (path, layer), (_, other) in zip(quantised_layers(model), quantised_layers(cpu), strict=True):
        assert torch.equal(layer.frozen.codes.cpu(), other.frozen.codes), path
