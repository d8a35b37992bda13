"""The joint AdamW update on a CUDA device: against PyTorch's, recorded, with state on the host, and resumed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from loratune.base.forward import prepare
from loratune.config import TrainConfig
from loratune.lora.files import load_adapter
from loratune.lora.inject import detach
from loratune.training import checkpoint
from loratune.training.course import Rows, StepDone
from loratune.training.loop import Loop
from loratune.training.optim import JointAdamW, adamw, masters_on_host, set_rate
from tests.gpu.test_step_gpu import a_row, small
from tests.training.helpers import config, trainable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WHOLE, ODD = [(16, 2048), (4096, 16), (16, 64), (1, 4)], [(16, 2049), (4097, 3), (7,), (1, 1)]


def some(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).cuda() for shape in shapes]


def parameters_of(shapes):
    return [nn.Parameter(value) for value in some(shapes)]


@pytest.mark.parametrize("shapes", [WHOLE, ODD])
@pytest.mark.parametrize("max_norm", [math.inf, 1.0])
def test_equals_pytorchs_fused_adamw(shapes, max_norm):
    """20 steps of 1e-3. Values and moments differ by roundings of float32."""
    ours, theirs = parameters_of(shapes), parameters_of(shapes)
    settings = TrainConfig(learning_rate=1e-3, weight_decay=0.1)
    joint = adamw(ours, settings)
    assert isinstance(joint, JointAdamW)
    plain = torch.optim.AdamW(
        theirs, **{k: joint.defaults[k] for k in ("lr", "betas", "eps", "weight_decay", "fused")}
    )
    for step in range(20):
        for a, b, gradient in zip(ours, theirs, some(shapes, step + 1), strict=True):
            a.grad, b.grad = gradient, gradient.clone()
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        plain.step()
        outcome = torch.zeros(3, device="cuda")
        joint.clipped_step(max_norm, outcome)
        assert outcome.tolist() == pytest.approx([0.0, float(norm), 0.0], rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert float(joint.state[a]["step"]) == float(plain.state[b]["step"]) == 20
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(joint.state[a][moment], plain.state[b][moment], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("shapes", [WHOLE, ODD])
def test_recordings_read_their_own_gradients_and_give_the_bits_of_an_eager_update(shapes, on_host):
    """Two recordings with gradients at different addresses alternate with an eager update. The last is not finite."""
    rates = [1e-3, 3e-3, 2e-3]

    def course(record):
        places = [some(shapes, seed) for seed in (1, 2, 3)]
        values = parameters_of(shapes)
        if on_host:
            masters_on_host(values)
        optimizer = adamw(values, TrainConfig(learning_rate=2e-4, weight_decay=0.1))
        if on_host:
            optimizer.move_moments_to_host()
        outcome = torch.zeros(3, device="cuda")

        def update(place):
            for value, gradient in zip(values, places[place], strict=True):
                value.grad = gradient
            optimizer.clipped_step(1.0, outcome)

        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        update(2)
        if record:
            for place in (0, 1):
                graphs[place] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[place]):
                    update(place)
        outcomes = []
        for turn, place in enumerate((0, 1, 2, 0, 0, 2, 1, 2, 1)):
            set_rate(optimizer, rates[turn % 3])
            for gradient, fresh in zip(places[place], some(shapes, 10 + turn), strict=True):
                gradient.copy_(fresh)
            if turn == 8:
                places[place][1][0, 0] = float("nan")
            graphs[place].replay() if place in graphs else update(place)
            outcomes.append(outcome.tolist()[1:])
        states = [t.clone() for value in values for t in (value.detach(), *optimizer.state[value].values())]
        return outcomes, states

    by_hand, expected = course(False)
    recorded, states = course(True)
    assert [skipped for _, skipped in recorded] == [0.0] * 8 + [1.0]
    assert recorded[:8] == by_hand[:8]
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_a_parameter_without_a_gradient_gets_no_state_and_no_update():
    values = parameters_of(WHOLE)
    optimizer = adamw(values, TrainConfig(learning_rate=2e-4))
    before = values[2].detach().clone()
    for seed in range(2):
        for index, gradient in enumerate(some(WHOLE, seed)):
            values[index].grad = gradient if index != 2 and (index != 1 or seed == 0) else None
        optimizer.step()
    assert torch.equal(values[2], before)
    assert values[2] not in optimizer.state
    assert [float(optimizer.state[values[i]]["step"]) for i in (0, 1, 3)] == [2, 1, 2]


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    """To the bit with deterministic kernels. The uninterrupted run replays steps that the resumed run records anew.

    All rows have one layout: with another, products of other shapes may add in another order.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows = Rows(lambda epoch: [a_row((300, 17, 512, 1, 100), seed) for seed in range(16)], [])
    settings = config(max_steps=16, eval_every_steps=50, save_every_steps=8, learning_rate=3e-4)

    def losses(events):
        return [event.loss for event in events if isinstance(event, StepDone)]

    torch.use_deterministic_algorithms(True)
    try:
        model = small()
        whole = Loop(prepare(model), "default", trainable(model), rows, settings, tmp_path / "whole")
        whole.stop = lambda: whole.progress.step == 8
        first = losses(whole.run())
        saved = checkpoint.newest(tmp_path / "whole")
        straight_model, resumed_model = small(), small()
        straight = Loop(prepare(straight_model), "default", trainable(straight_model), rows, settings, None)
        expected = losses(straight.run())
        detach(resumed_model)
        load_adapter(resumed_model, saved, name="default")
        resumed = Loop(
            prepare(resumed_model), "default", trainable(resumed_model), rows, settings, tmp_path / "resumed"
        )
        resumed.resume(saved)
        later = losses(resumed.run())
    finally:
        torch.use_deterministic_algorithms(False)
    assert first + later == expected
    for a, b in zip(trainable(straight_model).values(), trainable(resumed_model).values(), strict=True):
        assert torch.equal(a, b)
