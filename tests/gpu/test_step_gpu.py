"""Steps on a CUDA device: every fused path against float64, packed = unpacked, recorded = eager.

Tolerance throughout: a fast path may be at most twice as far from float64 as the plain modules in the same precision.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import transformers as tf

from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import LoraConfig
from loratune.data.examples import Example
from loratune.data.pack import make_row
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.ops import layer, low_rank
from loratune.ops.attention.documents import document_attention
from loratune.ops.dropout import dropout_key, row_key
from loratune.ops.logprobs import token_logprobs
from loratune.training.course import Evaluated, Rows, StepDone
from loratune.training.graph import GraphStep
from loratune.training.loop import Loop, RunsSlower
from loratune.training.optim import adamw, set_rate
from loratune.training.step import train_step
from tests.training.helpers import config, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = torch.bfloat16
TOKENS = 1024


def off(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def assert_as_good(fast, plain, exact, what):
    """`fast` is at most twice as far from `exact` as `plain`; 1e-4 counts as zero."""
    assert off(fast, exact) <= 2 * off(plain, exact) + 1e-4, (what, off(fast, exact), off(plain, exact))


def small(name="llama", dim=64, dropout=0.0, **settings):
    """A model wide enough for the GPU's kernels, in bfloat16, with an adapter whose B is not zero."""
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 5003,
        "max_position_embeddings": 4096,
    } | settings
    kind = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**shape, head_dim=dim)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**shape, head_dim=dim)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**shape, head_dim=dim, sliding_window=100)),
        # `eager`, because transformers 5.17 otherwise ignores the soft cap: another model.
        "gemma2": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(
                **shape,
                head_dim=dim,
                sliding_window=100,
                attn_logit_softcapping=0.5,
                attn_implementation="eager",
            )
        ),
        # Every token goes to both experts; otherwise roundings would route some tokens.
        "gptoss": lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(**shape, head_dim=dim, sliding_window=100, num_local_experts=2, num_experts_per_tok=2)
        ),
    }
    torch.manual_seed(0)
    model = kind[name]().to(BF16).requires_grad_(False).eval().cuda()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "gptoss" else "all-linear"
    lora = LoraConfig(r=16, lora_alpha=24, lora_dropout=dropout, target_modules=targets)
    attach(model, lora, name="default", seed=0)
    for path, parameter in model.named_parameters():
        if path.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.02)
        elif path.endswith("sinks"):
            parameter.data.normal_(3.0, 2.0)
    return model


def training(model):
    """Turns on dropout as a run does (`training.loop`)."""
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")


def a_row(lengths, seed=0, tokens=TOKENS, prompt=0.3):
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for index, length in enumerate(lengths):
        token_ids = torch.randint(5003, (length,), generator=generator, dtype=torch.int32)
        weights = (torch.arange(length) >= int(prompt * length)).float()
        documents.append(Example(token_ids.numpy(), weights.numpy(), f"random:{index}"))
    return make_row(documents, tokens, 0)


def gradients(model, forward, row):
    device = model.device
    trained = row.weights.nonzero().squeeze(1)
    with forward.installed():
        logprobs = forward.logprobs(
            row.tokens.to(device),
            row.position_ids.to(device),
            row.cu_seqlens,
            trained.to(device),
            row.targets[trained].to(device),
        )
        (-(row.weights[trained].to(device) * logprobs).sum() / 100).backward()
    found = {path: p.grad.clone() for path, p in trainable(model).items()}
    for p in model.parameters():
        p.grad = None
    return logprobs.detach(), found


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("lengths", [(300, 17, 512, 1, 100), (256,) * 4, (1024,)])
def test_fused_layers_are_as_exact_as_the_modules(name, lengths):
    model = small(name)
    row = a_row(lengths)
    forward = prepare(model)
    assert forward.fused is not None
    fast = gradients(model, forward, row)
    plain = gradients(model, PackedForward(model, "per document", forward.head), row)
    wide = copy.deepcopy(model).double()
    exact = gradients(wide, PackedForward(wide, "per document", forward.head), row)
    assert_as_good(fast[0], plain[0], exact[0], "log-probabilities")
    for path, gradient in exact[1].items():
        assert_as_good(fast[1][path], plain[1][path], gradient, path)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "plan", [None, ActivationPlan((Level.FULL,) * 4, tile=300), ActivationPlan((Level.OFFLOAD,) * 4)], ids=str
)
def test_fused_layers_with_dropout_are_as_exact_as_the_modules(name, plan):
    """With one key all have the same masks, in float64 too."""
    model = small(name, dropout=0.3)
    row = a_row((300, 17, 512, 1, 100))
    forward = prepare(model)
    assert forward.fused is not None
    forward.plan = plan
    wide = copy.deepcopy(model).double()
    training(model)
    training(wide)
    with forward.state.dropout(row_key(dropout_key(0, 3), 4096, "cuda")):
        fast = gradients(model, forward, row)
        plain = gradients(model, PackedForward(model, "packed", forward.head, state=forward.state), row)
        exact = gradients(wide, PackedForward(wide, "packed", forward.head, state=forward.state), row)
    assert_as_good(fast[0], plain[0], exact[0], "log-probabilities")
    for path, gradient in exact[1].items():
        assert_as_good(fast[1][path], plain[1][path], gradient, path)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(8, 8, 64), (8, 2, 128), (4, 1, 256)])
@pytest.mark.parametrize("lengths", [(300, 17, 512, 1, 194), (256,) * 4, (1024,)])
def test_attention(lengths, heads, window):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = torch.cat([bounds, bounds[-1:].expand(3)]).cuda()  # empty documents, as in a recording
    torch.manual_seed(1)
    q = torch.randn(1, heads[0], TOKENS, heads[2], device="cuda", dtype=BF16)
    k, v = (torch.randn(1, heads[1], TOKENS, heads[2], device="cuda", dtype=BF16) for _ in "kv")
    d_out = torch.randn(1, TOKENS, heads[0], heads[2], device="cuda", dtype=BF16)

    def run(dtype, cu_seqlens, longest):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, _ = document_attention(
            torch.nn.Module(), *inputs, None, sliding_window=window, cu_seq_lens_q=cu_seqlens, max_length_q=longest
        )
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(dtype))]

    exact, plain = run(torch.float64, bounds, None), run(BF16, bounds, None)
    for cu_seqlens, longest in ((bounds.cuda(), max(lengths)), (padded, 1024)):
        for fast, slow, true in zip(run(BF16, cu_seqlens, longest), plain, exact, strict=True):
            assert_as_good(fast, slow, true, (lengths, heads, window))


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 5.0)])
def test_head_and_loss(scale, softcap):
    torch.manual_seed(2)
    head = torch.nn.Linear(512, 32003, bias=False, device="cuda", dtype=BF16).requires_grad_(False)
    head.weight.data.mul_(20)
    hidden, targets = torch.randn(700, 512, device="cuda", dtype=BF16), torch.randint(32003, (700,), device="cuda")

    def run(h, module, function):
        h = h.clone().requires_grad_()
        out = function(h, module)
        return [out.detach(), torch.autograd.grad((out.double() * torch.arange(700, device="cuda")).sum(), h)[0]]

    def by_hand(h, module):
        logits = module(h).to(torch.float64 if h.dtype == torch.float64 else torch.float32) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    exact, plain = run(hidden.double(), copy.deepcopy(head).double(), by_hand), run(hidden, head, by_hand)
    fast = run(hidden, head, lambda h, m: token_logprobs(h, m, targets, scale=scale, softcap=softcap))
    for a, b, c in zip(fast, plain, exact, strict=True):
        assert_as_good(a, b, c, (scale, softcap))


def doubled(value):
    """An argument of a pass in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, layer.NormSpec):
        return replace(value, weight=value.weight.double())
    if isinstance(value, layer.HeadSpec) and value.norm is not None:
        return replace(value, norm=doubled(value.norm))
    return value


def test_elementwise_passes():
    torch.manual_seed(3)
    x, y, z = (torch.randn(777, 1024, device="cuda", dtype=BF16) for _ in range(3))
    weight = torch.rand(1024, device="cuda", dtype=BF16) + 0.5
    x_heads = x.view(777, 16, 64)
    cos, sin = (torch.rand(777, 64, device="cuda", dtype=BF16) for _ in range(2))
    spec = layer.NormSpec(weight, 1e-6)
    heads = layer.HeadSpec(8, 4, 64, 64)
    normed = replace(heads, norm=layer.NormSpec(weight.view(16, 64)[:12], 1e-6))
    split = y.view(777, 16, 64).split([8, 4, 4], 1)
    for function, arguments in (
        (layer.norm, (x, spec)),
        (layer.norm, (x, spec, 64)),
        (layer.add_norm, (x, y, spec, 64)),
        (layer.norm_backward, (y, z, x, spec, 64)),
        (layer.gated, (x, "silu", 64)),
        (layer.gated_backward, (x, y[:, :512].contiguous(), "silu", 64)),
        (layer.rotate_heads, (x_heads, cos, sin, heads)),
        (layer.rotate_heads, (x_heads, cos, sin, normed)),
        (layer.rotate_heads_backward, (*split, cos, sin, None, heads, 64)),
        (layer.rotate_heads_backward, (*split, cos, sin, x_heads, normed)),
    ):
        reference = function.__wrapped__
        exact = reference(*map(doubled, arguments))
        slow = reference(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
        fast = function(*arguments)  # last, because it may work in place
        for got, plain, true in zip(*(r if isinstance(r, tuple) else (r,) for r in (fast, slow, exact)), strict=True):
            meant = true != 0  # padding columns of the kernel are undefined; the reference's are zero
            assert_as_good(got[meant], plain[meant], true[meant], function.__name__)


@pytest.mark.parametrize(("tokens", "d_in", "d_outs"), [(512, 1024, (1024, 256, 256)), (3000, 1088, (4000,))])
def test_low_rank_products(tokens, d_in, d_outs):
    """Against float64, and with the same bits every time."""
    torch.manual_seed(4)
    d_out, ranks, pad = sum(d_outs), 16 * len(d_outs), 64
    matrix = torch.randn(d_out + pad, d_in + pad, device="cuda", dtype=BF16) / 32
    matrix[d_out + ranks :] = matrix[:, d_in + ranks :] = 0.0
    x, dy = (torch.randn(tokens, width + pad, device="cuda", dtype=BF16) for width in (d_in, d_out))
    ends = torch.tensor([0, *d_outs]).cumsum(0).tolist()
    members = low_rank.AdapterSlices(
        [slice(a, b) for a, b in itertools.pairwise(ends)],
        [slice(16 * i, 16 * i + 16) for i in range(len(d_outs))],
        [1.0, 2.0, 0.5][: len(d_outs)],
    )
    lora_A, lora_B = matrix[d_out : d_out + ranks, :d_in].T, matrix[:d_out, d_in : d_in + ranks]
    inner = x[:, d_in : d_in + ranks]
    row = row_key(dropout_key(5, 6), 70, "cuda")
    drops = low_rank.AdapterDropout(row, 0.3, [-7, 99, 1 << 30][: len(d_outs)], members.ranks, 192)
    for function, arguments in (
        (low_rank.down_project, (x[:, :d_in], lora_A)),
        (low_rank.down_project, (dy[:, :d_out], lora_B)),
        (low_rank.gradients, (x[:, :d_in], dy[:, d_out : d_out + ranks], dy[:, :d_out], inner, members)),
        (low_rank.down_project, (x[:, :d_in], lora_A, None, True, None, drops)),
        (low_rank.up_project, (inner, lora_A.T, drops)),
        (low_rank.gradients, (x[:, :d_in], dy[:, d_out : d_out + ranks], dy[:, :d_out], inner, members, drops)),
    ):
        reference = function.__wrapped__
        exact = reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
        results = [function(*arguments), reference(*arguments), exact, function(*arguments)]
        for fast, slow, true, again in zip(*([r] if torch.is_tensor(r) else r for r in results), strict=True):
            assert_as_good(fast, slow, true, function.__name__)
            assert torch.equal(fast, again), function.__name__


ROWS = [
    [a_row(lengths, seed)]
    for seed, lengths in enumerate(
        [(300, 17, 512, 1, 100), (40,) * 20, (700, 300), (512, 512), (90,) * 9, (1000,)] * 3
    )
]


def losses(model, record, rows_of_steps, plain=False, rate=3e-4, fused=True):
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    if not fused:
        forward.fused = None
    training(model)
    step = GraphStep(forward, parameters, optimizer, 1.0, record=record)
    results = []
    with forward.installed():
        for index, rows in enumerate(rows_of_steps):
            set_rate(optimizer, rate * (1 + index % 3))
            key = dropout_key(config().seed, index)
            results.append(
                train_step(forward, rows, parameters, optimizer, max_grad_norm=1.0, key=key)
                if plain
                else step(rows, key=key)
            )
    assert step.why_not is None, step.why_not
    return results, [p.detach().clone() for p in parameters], step


@pytest.mark.parametrize(
    ("name", "dropout", "fused"),
    [
        ("llama", 0.0, True),
        ("qwen3", 0.0, True),
        ("mistral", 0.0, True),
        ("llama", 0.1, True),
        ("qwen3", 0.1, True),
        ("llama", 0.1, False),
    ],
)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_recorded_step_equals_the_eager_one_to_the_bit(name, dropout, fused, micro_steps, monkeypatch):
    """With deterministic kernels, and different boundaries, rates and numbers of trained tokens in one recording."""
    rows = [[row for (row,) in ROWS[i : i + micro_steps]] for i in range(0, 18, micro_steps)] * (
        1 if micro_steps == 1 else 2
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # attention's default backward adds in no fixed order
    try:
        eager, adapter, _ = losses(small(name, dropout=dropout), False, rows, fused=fused)
        recorded, same, step = losses(small(name, dropout=dropout), True, rows, fused=fused)
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(graph is not None for graph in step._graphs.values())
    assert [r.loss for r in recorded] == [r.loss for r in eager]
    assert all(torch.equal(a, b) for a, b in zip(adapter, same, strict=True))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])
def test_each_replay_drops_anew(fused):
    """The first step of a kind is eager, the second recorded, the others replayed; the key alone decides the mask."""
    model = small(dropout=0.3)
    parameters = list(trainable(model).values())
    optimizer, forward = adamw(parameters, config()), prepare(model)
    assert forward.fused is not None
    forward.fused = forward.fused if fused else None
    training(model)
    set_rate(optimizer, 0.0)
    step, row = GraphStep(forward, parameters, optimizer, 1.0), ROWS[0][0]
    with forward.installed():
        for rows in ([row], [row, row]):
            found = [step(rows, key=key).loss for key in (1, 2, 3, 1, 2, 3)]
            assert len(set(found)) == 3
            assert found[:3] == found[3:]
        alone = step([row], key=1).loss
        assert step([row, row], key=1).loss != pytest.approx(alone, rel=1e-6)  # the second row has another mask
    assert any(graph is not None for graph in step._graphs.values())
    assert step.why_not is None


def test_the_recorded_step_learns_like_train_step():
    """On the same rows, the losses equal those of `train_step` on modules within the noise of bfloat16."""
    recorded, _, _ = losses(small(), True, ROWS)
    plain, _, _ = losses(small(), False, ROWS, plain=True)
    for a, b in zip(recorded, plain, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)
        assert a.trained_tokens == b.trained_tokens


def test_a_skipped_step_in_a_recording_changes_nothing():
    model = small()
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    step = GraphStep(forward, parameters, optimizer, 1.0)
    row = ROWS[0]
    with forward.installed():
        assert not any(step(row).skipped for _ in range(4))
        before = [p.detach().clone() for p in parameters]
        bad = a_row((300, 17, 512, 1, 100))
        bad.weights[5] = float("inf")
        assert step([bad]).skipped
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        assert not step(row).skipped
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_a_model_that_waits_for_the_device_runs_without_a_recording():
    """Heads of 12 have no kernel, so attention runs document by document and reads the boundaries on the host."""
    model = small("gemma2", dim=12)
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    step = GraphStep(forward, parameters, optimizer, 1.0)
    with forward.installed():
        first = [step(ROWS[0]) for _ in range(2)]
        assert step.why_not is not None
        after = train_step(forward, ROWS[0], parameters, optimizer, max_grad_norm=1.0)
    assert after.loss < first[0].loss
    assert fuse(forward) is True


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_run_records_its_steps(dropout):
    """The loop of `loratune train`, with held-out rows between the steps."""
    model = small(dropout=dropout)
    rows = Rows(lambda epoch: [row for (row,) in ROWS], [a_row((200, 300), 99)])
    settings = config(max_steps=18, eval_every_steps=6, learning_rate=3e-4)
    loop = Loop(prepare(model), "default", trainable(model), rows, settings, None)
    assert loop.forward.fused is not None
    events = list(loop.run())
    assert not [e for e in events if isinstance(e, RunsSlower)]
    assert any(graph is not None for graph in loop._graph._graphs.values())
    held_out = [e.eval_loss for e in events if isinstance(e, Evaluated)]
    plain, _, _ = losses(small(dropout=dropout), False, ROWS[:1], plain=True)
    assert next(e for e in events if isinstance(e, StepDone)).loss == pytest.approx(plain[0].loss, rel=2e-3)
    assert len(held_out) == 3
    assert held_out[-1] == pytest.approx(held_out[0], rel=0.1)
