"""Two models train at once in two threads on two streams of one GPU, and each gets the bits that it gets alone."""

from __future__ import annotations

import threading

import pytest
import torch

from loratune.base.forward import PackedForward, prepare
from loratune.config import TrainConfig
from loratune.ops.buffers import KernelBuffers
from loratune.ops.dropout import dropout_key
from loratune.ops.low_rank import down_project
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw
from loratune.training.step import train_step
from tests.gpu.test_step_gpu import a_row, small, training
from tests.training.helpers import trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEEDS = (0, 1)
LENGTHS = [[700, 284, 40], [100, 900, 24]]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """FlashAttention's backward adds in no fixed order otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward_of(name: str) -> PackedForward:
    model = small(name, dropout=0.2)
    forward = prepare(model)
    training(model)
    return forward


def trained(forward, seed, recorded, barrier=None) -> list[torch.Tensor]:
    """Losses of six steps, and the adapter afterwards, on a stream of its own."""
    parameters = list(trainable(forward.model).values())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream), forward.installed():
        optimizer = adamw(parameters, TrainConfig(learning_rate=1e-3))
        step = GraphStep(forward, parameters, optimizer, 1.0)
        losses = []
        for number in range(6):
            rows = [a_row(LENGTHS[seed], seed=10 * seed + number)]
            if barrier is not None:
                barrier.wait(120)
            key = dropout_key(seed, number)
            if recorded:
                result = step(rows, key=key)
            else:
                result = train_step(forward, rows, parameters, optimizer, max_grad_norm=1.0, key=key)
            losses.append(torch.tensor(result.loss))
        assert step.why_not is None
        stream.synchronize()
        return losses + [parameter.detach().cpu() for parameter in parameters]


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_two_models_on_two_streams_get_the_bits_of_each_alone(recorded):
    names = ("llama", "qwen3")
    alone = [trained(forward_of(name), seed, recorded) for name, seed in zip(names, SEEDS, strict=True)]
    barrier, together = threading.Barrier(2), [list[torch.Tensor](), list[torch.Tensor]()]
    forwards = [forward_of(name) for name in names]
    torch.cuda.synchronize()

    def run(nth):
        together[nth].extend(trained(forwards[nth], SEEDS[nth], recorded, barrier))

    threads = [threading.Thread(target=run, args=(nth,)) for nth in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other)
        assert all(map(torch.equal, one, other))


def test_split_reductions_on_two_streams_do_not_share_counters():
    """Two streams run split reductions at once. With shared counters, each could end the sum of the other."""
    torch.manual_seed(0)
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
    factors = [torch.randn(4096, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    buffers, streams = [KernelBuffers(), KernelBuffers()], [torch.cuda.Stream(), torch.cuda.Stream()]
    expected = [down_project(x, factor, buffers=own) for factor, own in zip(factors, buffers, strict=True)]
    found = [list[torch.Tensor](), list[torch.Tensor]()]
    torch.cuda.synchronize()
    for _ in range(200):
        for nth, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[nth].append(down_project(x, factors[nth], buffers=buffers[nth]))
    torch.cuda.synchronize()
    for right, results in zip(expected, found, strict=True):
        assert all(torch.equal(result, right) for result in results)
    assert not any(own.counters(x.device).any() for own in buffers)
