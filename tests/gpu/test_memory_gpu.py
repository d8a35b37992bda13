"""On a CUDA device: what layers keep changes memory and not a bit of the result, recorded or not."""

from __future__ import annotations

import gc

import pytest
import torch

from loratune.base.forward import prepare
from loratune.errors import TrainingError
from loratune.ops.policy import Level, Plan
from loratune.training.fit import fit
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, masters_on_host, moments_on_host, set_rate
from tests.gpu.test_step_gpu import ROWS, small
from tests.training.helpers import config, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS = 4
PLANS = [Plan.uniform(level, LAYERS) for level in Level] + [Plan.mixed(Level.OFFLOAD, 3, Level.NONE, LAYERS)]


def trained(name, plan, record, steps=12, fused=True):
    """Losses, the adapter behind the last step, and the peak of memory above what the model takes."""
    model = small(name)
    parameters = list(trainable(model).values())
    on_host = plan is not None and plan.optimizer_on_host
    if on_host:
        masters_on_host(parameters)
    optimizer = adamw(parameters, config())
    if on_host:
        moments_on_host(optimizer)
    forward = prepare(model)
    forward.plan = plan
    forward.fused = forward.fused if fused else None
    step = GraphStep(forward, parameters, optimizer, 1.0, record=record)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = []
    with forward.installed():
        for index in range(steps):
            set_rate(optimizer, 3e-4 * (1 + index % 3))
            found.append(step(ROWS[index % len(ROWS)]).loss)
    assert step.why_not is None, step.why_not
    peak = torch.cuda.max_memory_allocated() - before
    return found, [p.detach().clone() for p in parameters], peak


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("name", "fused"), [("llama", True), ("qwen3", True), ("llama", False)])
def test_every_policy_learns_the_same_to_the_bit(name, fused):
    """Each plan recorded, against everything kept and launched one by one."""
    expected, adapter, most = trained(name, None, record=False, fused=fused)
    for plan in PLANS:
        for record in (False, True):
            losses, same, peak = trained(name, plan, record, fused=fused)
            assert losses == expected, (str(plan), record)
            assert all(torch.equal(a, b) for a, b in zip(adapter, same, strict=True)), (str(plan), record)
            assert peak <= most + (1 << 20) or record, (str(plan), peak, most)


def test_embeddings_and_optimizer_on_the_host_change_nothing():
    expected, adapter, _ = trained("llama", None, record=True)
    plan = Plan((Level.FULL,) * LAYERS, embeddings_on_host=True, optimizer_on_host=True)
    losses, same, _ = trained("llama", plan, record=True)
    assert losses == pytest.approx(expected, rel=2e-3)  # attention's usual backward adds in no fixed order
    for a, b in zip(adapter, same, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-3)


def test_memory_stays_what_it_is_behind_the_second_step():
    """Rows of six layouts, again and again: what is allocated does not move by a byte."""
    model = small()
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    step = GraphStep(forward, parameters, optimizer, 1.0)
    counts = []
    with forward.installed():
        for index in range(120):
            set_rate(optimizer, 1e-4)
            step(ROWS[index % len(ROWS)])
            counts.append(torch.cuda.memory_allocated())
    assert set(counts[12:]) == {counts[12]}, counts


@pytest.fixture
def _no_cap():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("_no_cap")
def test_a_row_that_does_not_fit_is_an_error_after_one_step_that_says_by_how_much():
    model = small()
    settings = config(memory="700MiB")
    with pytest.raises(TrainingError, match=r"a row of 131072 tokens takes .* are missing. Set "):
        fit(prepare(model), trainable(model), settings, 131072)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("_no_cap")
def test_auto_takes_the_frugal_plan_only_where_it_has_to():
    model = small()
    forward = prepare(model)
    before = {path: p.detach().clone() for path, p in trainable(model).items()}
    generator = torch.cuda.get_rng_state()
    assert fit(forward, trainable(model), config(), 1024).plan.levels == (Level.NONE,) * LAYERS
    tight = fit(forward, trainable(model), config(memory="1100MiB"), 32768)
    assert tight.plan.levels[0] > Level.NONE
    assert tight.expected is not None
    assert tight.tried <= tight.expected.allocated <= tight.limit
    assert torch.equal(generator, torch.cuda.get_rng_state())
    assert all(torch.equal(before[path], p) for path, p in trainable(model).items())
