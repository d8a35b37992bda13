"""On a CUDA device: what layers keep changes memory and not a bit of the result, recorded or not."""

from __future__ import annotations

import gc

import pytest
import torch

from loratune.base.forward import prepare
from loratune.ops.policy import Level, Plan
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate
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
    optimizer = adamw(parameters, config())
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
