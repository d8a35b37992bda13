"""On a CUDA device, a base in 8 bits: kernels against references at real widths, fused against modules, recorded.

A reference runs on the same device, in plain PyTorch; where both do the same arithmetic they agree to the bit.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.memory.fit import fit
from loratune.ops import layer, low_rank, measure
from loratune.ops.measure import PAD_COLUMNS, Measure
from loratune.ops.projection import StackedAdapters
from loratune.precision import fp8, fp8_kernels, fp8_rows
from loratune.precision.fp8_projection import Fp8Projection, refresher
from loratune.precision.linear import quantise_linears
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate
from tests.gpu.test_step_gpu import BF16, ROWS, gradients, off
from tests.training.helpers import config, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device that multiplies 8-bit numbers",
    ),
]
LAYERS = 3
RUNS = 20
"""Number of repetitions: a race shows in few places and not in every run."""


def random(*shape, size=1.0):
    return (torch.randn(*shape, device="cuda") * size).to(BF16)


def differing(a, b):
    """Share of bytes that differ."""
    assert a.shape == b.shape
    return float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean())


@pytest.mark.parametrize("tokens", [515, 2048, 8192])
@pytest.mark.parametrize(
    ("width", "ranks"), [(4096, 16), (4096, 48), (11008, 16), (12288, 48), (22016, 32), (4096, 80)]
)
def test_a_quantised_row_and_its_low_rank_product_in_one_reading(tokens, width, ranks):
    """To the bit except `lo`, where the compiler fuses a subtraction with a product: few bytes and signs of zero."""
    torch.manual_seed(0)
    x, matrix = random(tokens, width), random(width, ranks, size=width**-0.5)
    columns = 2.0 ** torch.randint(-14, -8, (width,), device="cuda").to(BF16)
    for scale in (None, columns):
        over = matrix.float() if scale is None else matrix.float() / scale.float()[:, None]
        bound = over.norm(dim=0).max()
        numbers = torch.stack([torch.full_like(bound, 4.0), 4.0 * fp8_rows.MARGIN * bound])
        asked = Measure(scale)
        found = measure.row_statistics(x, asked)
        padded = torch.nn.functional.pad(x, (0, PAD_COLUMNS))
        measure.statistics_of(padded, width).copy_(found)
        rows, inner = fp8_rows.quantise_augmented(padded, matrix, scale, numbers)
        for _ in range(RUNS):
            again, same = fp8_rows.quantise_augmented(padded, matrix, scale, numbers)
            assert differing(rows.values, again.values) == 0.0
            assert torch.equal(inner, same)
        t = measure.scales(found, numbers[1])
        assert torch.equal(rows.scale, t)
        inverse = t.reciprocal()
        wide = x.float() if scale is None else x.float() * scale.float()
        assert differing(rows.values[:, :width], (wide * inverse).to(fp8_rows.E4M3)) == 0.0
        hi, lo = fp8_rows.split(inner.float() * (inverse * numbers[0]))
        adapter_part, expected = rows.values[:, width:], fp8_rows.side_by_side(hi[:, :0], hi, lo, hi)
        assert float((adapter_part.float() != expected.float()).float().mean()) < 1e-3
        for exact in (slice(0, ranks), slice(2 * ranks, None)):
            assert differing(adapter_part[:, exact], expected[:, exact]) == 0.0
        exact = x.double() @ matrix.double()
        assert off(inner, exact) <= 2 * off(x @ matrix, exact)
        unmeasured, _ = fp8_rows.quantise_augmented(x, matrix, scale, numbers)
        torch.testing.assert_close(unmeasured.scale, t, rtol=1e-6, atol=0)
        assert differing(unmeasured.values[:, :width], rows.values[:, :width]) < 1e-3


def test_passes_leave_what_is_measured_in_what_they_wrote_and_write_what_they_did():
    torch.manual_seed(1)
    tokens, width, mlp, heads = 600, 4096, 11008, 96
    x, y, z, weight = random(tokens, width), random(tokens, width), random(tokens, width), random(width) + 1
    gate_up, d_active = random(tokens, 2 * mlp), random(tokens, mlp)
    parts = [random(tokens, 32, 128) for _ in "qkv"]
    cos, sin, table, before = random(tokens, 128), random(tokens, 128), random(64, 128), random(tokens, heads, 128)

    def factors(count):
        return Measure(2.0 ** torch.randint(-14, -8, (count,), device="cuda").to(BF16))

    plain, spec, split = Measure(), layer.NormSpec(weight, 1e-6), layer.HeadSpec(32, 32, 128, 128)
    normed = layer.HeadSpec(32, 32, 128, 128, norm=layer.NormSpec(table, 1e-6))
    for function, arguments, width_of, asked, at in (
        (layer.norm, (x, spec), width, plain, 0),
        (layer.add_norm, (x, y, spec), width, plain, 1),
        (layer.norm_backward, (y, z, x, spec), width, factors(width), 0),
        (layer.gated, (gate_up, "silu"), mlp, plain, 0),
        (layer.gated_backward, (gate_up, d_active, "silu"), 2 * mlp, factors(2 * mlp), 0),
        (layer.rotate_heads_backward, (*parts, cos, sin, None, split), heads * 128, factors(heads * 128), 0),
        (layer.rotate_heads_backward, (*parts, cos, sin, before, normed), heads * 128, factors(heads * 128), 0),
    ):
        with_measure, without = function(*arguments, PAD_COLUMNS, asked), function(*arguments)
        with_measure, without = (r if isinstance(r, tuple) else (r,) for r in (with_measure, without))
        for index, (a, b) in enumerate(zip(with_measure, without, strict=True)):
            assert torch.equal(a[:, :width_of] if index == at else a, b), function.__name__
        found = measure.statistics_of(with_measure[at], width_of)
        expected = measure.row_statistics(without[at], asked)
        assert torch.equal(found[:, : measure.PIECES].amax(1), expected[:, 0]), function.__name__
        torch.testing.assert_close(found[:, measure.PIECES :].sum(1), expected[:, measure.PIECES], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("d_out", "d_in", "ranks"), [(12288, 4096, 48), (4096, 11008, 16), (22016, 4096, 32)])
def test_a_projection_in_8_bits(d_out, d_in, ranks):
    """Factors and adapter columns equal the reference; the error of both products is that of 8 bits."""
    torch.manual_seed(2)
    held = fp8.Fp8Weight.joined([fp8.Fp8Weight.quantised(random(d_out, d_in, size=0.02))], ranks)
    adapter = random(ranks, d_in, size=d_in**-0.5), random(d_out, ranks, size=0.02)
    member = StackedAdapters([slice(0, d_out)], [slice(0, ranks)], [1.0])
    one, two = (Fp8Projection.of(held, None, adapter, member, hold_transposed=both) for both in (False, True))
    one.refresh()
    adapter_part, numbers = one.augmented[:, d_in:].clone(), one.factors.clone()
    one.augmented[:, d_in:].view(torch.uint8).zero_()
    refresher([one, two])()
    for p in (one, two):
        torch.testing.assert_close(p.factors, numbers, rtol=1e-5, atol=0)
    assert differing(one.augmented[:, d_in:], adapter_part) == 0.0
    assert two.transposed is not None
    transposed = fp8_rows.transposed(held.values, adapter[0], one.factors[2:3])
    assert differing(transposed, two.transposed) == 0.0
    assert differing(transposed[:, :d_out], held.values.T.contiguous()) == 0.0

    x, dy = random(700, d_in), random(700, d_out)
    wide, (lora_A, lora_B) = held.dense().double(), (a.double() for a in adapter)
    exact = wide + lora_B @ lora_A
    y, inner = one.forward(x)
    backward = one.backward(dy)
    dx = backward.d_input()
    assert off(y, x.double() @ exact.T) < 2.0**-4
    assert off(dx, dy.double() @ exact) < 2.0**-4
    assert torch.equal(dx, two.backward(dy).d_input())
    dA, dB = low_rank.gradients(*backward.d_adapters(x, inner))
    assert off(dA, (dy.double() @ lora_B).T @ x.double()) < 1e-2
    assert off(dB, dy.double().T @ (x.double() @ lora_A.T)) < 1e-2


def small(layers=LAYERS):
    """A model in 8 bits, wide enough for adapter columns, with an adapter whose B is not zero."""
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 5003,
        "max_position_embeddings": 4096,
    }
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, head_dim=128)).to(BF16).requires_grad_(False).eval().cuda()
    quantise_linears(model.model.layers, fp8.quantise)
    attach(model, LoraConfig(r=16, lora_alpha=24, target_modules="all-linear"), name="default", seed=0)
    for path, parameter in model.named_parameters():
        if path.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.02)
    return model


def test_fused_layers_are_as_near_to_the_dense_model_as_modules_in_8_bits():
    """Both round the operands of W's products to 8 bits with their own scales; the low-rank part is not rounded."""
    model = small()
    (row,) = ROWS[0]
    forward = prepare(model)
    assert forward.fused is not None
    fast = gradients(model, forward, row)
    plain = gradients(model, PackedForward(model, "per document", forward.head), row)
    wide = small()
    for module in wide.modules():
        if hasattr(module, "frozen"):
            module.frozen = fp8.DenseWeight(module.frozen.dense())
    exact = gradients(wide, PackedForward(wide, "per document", forward.head), row)
    assert off(fast[0], exact[0]) <= 1.5 * off(plain[0], exact[0]) + 1e-3
    for path, gradient in exact[1].items():
        assert off(fast[1][path], gradient) <= 1.5 * off(plain[1][path], gradient) + 1e-3, path


def trained(plan, record, steps=8):
    model = small()
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    forward.plan = plan
    step = GraphStep(forward, parameters, optimizer, 1.0, record=record)
    found = []
    with forward.installed():
        assert forward._copies is not None
        assert len(forward._copies.refreshed) == 4 * LAYERS
        for index in range(steps):
            set_rate(optimizer, 3e-4)
            found.append(step(ROWS[index % len(ROWS)]).loss)
    assert step.why_not is None, step.why_not
    return found, [p.detach().clone() for p in parameters], step


def test_recorded_equals_eager_to_the_bit_for_every_activation_plan(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        expected, adapter, _ = trained(None, record=False)
        for plan in (
            None,
            ActivationPlan.uniform(Level.NONE, LAYERS),
            ActivationPlan((Level.NONE,) * LAYERS, hold_transposed=True),
            ActivationPlan((Level.FULL, Level.SELECTIVE, Level.WIDE), hold_transposed=True),
        ):
            losses, same, step = trained(plan, record=True)
            assert any(graph is not None for graph in step._graphs.values())
            assert losses == expected, str(plan)
            assert all(torch.equal(a, b) for a, b in zip(adapter, same, strict=True)), str(plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(expected)) == len(expected)


@pytest.fixture
def _no_cap():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("_no_cap")
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_the_memory_of_a_step_in_8_bits_is_estimated(tokens):
    model = small()
    found = fit(prepare(model), trainable(model), config(), tokens)
    assert found.expected is not None
    assert found.plan.hold_transposed
    assert found.tried <= found.expected.allocated


def test_unmeasured_rows_of_any_width_are_measured_by_the_kernel():
    for width in (1040, 4096, 22016, 70000):
        x = random(33, width)
        scale = 2.0 ** torch.randint(-14, -8, (width,), device="cuda").to(BF16)
        for columns in (None, scale):
            found = fp8_kernels.measured_rows(x, columns)
            expected = measure.row_statistics(x, Measure(columns))
            assert torch.equal(found[:, : measure.PIECES].amax(1), expected[:, 0])
            torch.testing.assert_close(
                found[:, measure.PIECES :].sum(1), expected[:, measure.PIECES], rtol=1e-5, atol=0
            )
