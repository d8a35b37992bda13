"""A new objective takes one file, `toy_objective.py`, and one line in `tables.OBJECTIVES`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratune import tables
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import LoraConfig, TrainConfig, check_values
from loratune.data.examples import Example
from loratune.data.pack import Row, make_row
from loratune.errors import ConfigError
from loratune.lora.files import load_adapter
from loratune.lora.inject import attach, trainable_parameters
from loratune.many.bank import Bank
from loratune.many.graph import BankGraph
from loratune.many.jobs import Failed, Job, Jobs
from loratune.many.step import BankStep
from loratune.training import checkpoint
from loratune.training.course import Evaluated, Rows, StepDone
from loratune.training.graph import GraphStep
from loratune.training.loop import Loop
from loratune.training.optim import adamw
from loratune.training.step import DeviceRow, evaluate_loss, row_loss, train_step
from tests.conftest import build
from tests.extending.toy_objective import pairs
from tests.training.helpers import config, examples, model_with_adapter, trainable

LINE = {"pairs": "tests.extending.toy_objective:pairs"}


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.OBJECTIVES, *next(iter(LINE.items())))


def documents(pair: int) -> tuple[Example, Example]:
    """A chosen and a rejected document, with trained tokens of both."""
    made = examples(40, seed=pair)
    return next(e for e in made if len(e) == 18), next(e for e in made if len(e) == 7)


def row_of(pairs_in_row: list[int], tokens: int = 96) -> Row:
    """Pairs end to end, and padding."""
    parts = [document for pair in pairs_in_row for document in documents(pair)]
    side = torch.zeros(tokens)
    at = 0
    for nth, part in enumerate(parts):
        side[at : at + len(part)] = 1 - 2 * (nth % 2)
        at += len(part)
    return replace(make_row(parts, tokens, 0), columns={"side": side})


def rows(seed: int = 0, tokens: int = 96) -> Rows:
    """Six training rows of one to three pairs and two held-out rows."""
    train = [row_of([100 * seed + 3 * n + m for m in range(1 + n % 3)], tokens) for n in range(6)]
    held_out = [row_of([100 * seed + 50, 100 * seed + 51], tokens), row_of([100 * seed + 52], tokens)]
    return Rows(lambda epoch: train, held_out)


def sum_of(forward: PackedForward, document: Example) -> torch.Tensor:
    """A document's log-probability, computed alone."""
    row = make_row([document], len(document), 0)
    on_device = DeviceRow.send(row, torch.device("cpu"))
    return (on_device.batch.weights * on_device.logprobs(forward)).sum()


def test_the_loss_is_the_formula_on_documents_alone() -> None:
    forward = prepare(model_with_adapter())
    with forward.installed(), torch.no_grad():
        margins = [float(sum_of(forward, a) - sum_of(forward, b)) for a, b in (documents(1), documents(2))]
        got = row_loss(forward, row_of([1, 2]), pairs)
        measured = evaluate_loss(forward, [row_of([1, 2]), row_of([3])], pairs)
    assert float(got) == pytest.approx(sum(math.log1p(math.exp(-pairs.beta * m)) for m in margins), rel=1e-5)
    assert set(measured.metrics) == {"accuracy"}
    assert measured.metrics["accuracy"] * 3 == pytest.approx(round(measured.metrics["accuracy"] * 3))


def test_it_trains_saves_and_is_measured_with_its_metric(tmp_path: Path) -> None:
    model = model_with_adapter(r=16)
    settings = config(objective="pairs", max_steps=60, learning_rate=2e-2, eval_every_steps=15)
    loop = Loop(prepare(model), "default", trainable(model), rows(), settings, tmp_path)
    events = list(loop.run())
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert all(set(event.metrics) == {"accuracy"} for event in events if isinstance(event, Evaluated))
    saved = build("llama")
    load_adapter(saved, checkpoint.newest(tmp_path), name="default")
    assert all(torch.equal(p, loop.parameters[path]) for path, p in trainable(saved).items())


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_the_step_that_a_gpu_records_equals_the_eager_one(micro_steps: int, fused: bool) -> None:
    steps = [[row_of([9 * n + 3 * m + k for k in range(1 + m)]) for m in range(micro_steps)] for n in range(3)]

    def run(graph: bool) -> tuple[list[float], list[torch.Tensor]]:
        model = model_with_adapter("llama", dtype=torch.float64)
        parameters = list(trainable(model).values())
        optimizer, forward = adamw(parameters, config()), prepare(model)
        assert not fused or fuse(forward)
        recorded = GraphStep(forward, parameters, optimizer, 1.0, pairs, record=False)
        with forward.installed():
            losses = [
                recorded(step).loss
                if graph
                else train_step(forward, step, parameters, optimizer, max_grad_norm=1.0, objective=pairs).loss
                for step in steps
            ]
        return losses, [parameter.detach() for parameter in parameters]

    (losses, weights), (expected, expected_weights) = run(True), run(False)
    assert losses == pytest.approx(expected, rel=1e-6)
    for got, want in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def both_jobs() -> list[Job]:
    """Made when the objective is in its table."""
    return [
        Job("a", LoraConfig(r=2, init_lora_weights=False), config(objective="pairs", seed=1), rows(1)),
        Job(
            "b",
            LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
            config(objective="pairs", seed=2, gradient_accumulation_steps=2),
            rows(2),
        ),
    ]


Found = tuple[list[float], list[float], list[float]]


def train(jobs: list[Job], step: type[BankStep | BankGraph]) -> dict[str, Found]:
    """Losses, held-out losses and accuracies of each job."""
    model = build("llama")
    bank = Bank.attach(model, [job.lora for job in jobs], len(jobs))
    forward = prepare(model)
    pool = Jobs(forward, bank, 256, objective=pairs)
    if step is BankGraph:
        pool._step = BankGraph(forward, bank, 256, pairs, record=False)
    for job in jobs:
        pool.add(job)
    found: dict[str, Found] = {job.name: ([], [], []) for job in jobs}
    for name, event in pool.run():
        losses, held_out, accuracy = found[name]
        assert not isinstance(event, Failed), event
        if isinstance(event, StepDone):
            losses.append(event.loss)
        if isinstance(event, Evaluated):
            held_out.append(event.eval_loss)
            accuracy.append(event.metrics["accuracy"])
    return found


@pytest.mark.parametrize("step", [BankStep, BankGraph])
def test_two_jobs_in_a_bank_equal_each_alone(step: type[BankStep | BankGraph]) -> None:
    together = train(both_jobs(), step)
    for job in both_jobs():
        model = build("llama")
        attach(model, job.lora, name="default", seed=job.training.seed)
        loop = Loop(prepare(model), "default", trainable_parameters(model), job.rows, job.training, None)
        events = list(loop.run())
        losses, held_out, accuracy = together[job.name]
        assert losses == pytest.approx([e.loss for e in events if isinstance(e, StepDone)], rel=1e-4)
        assert held_out == pytest.approx([e.eval_loss for e in events if isinstance(e, Evaluated)], rel=1e-4)
        assert accuracy == pytest.approx([e.metrics["accuracy"] for e in events if isinstance(e, Evaluated)])


@pytest.mark.parametrize("step", [BankStep, BankGraph])
def test_a_job_that_diverges_leaves_its_neighbour_equal_to_the_bit(step: type[BankStep | BankGraph]) -> None:
    """Pairs are differences of neighbouring documents, and documents of other jobs are neighbours in a row."""
    sick = replace(both_jobs()[1], training=replace(both_jobs()[1].training, learning_rate=1e30, max_grad_norm=0.0))
    for jobs in ([both_jobs()[0], sick], [sick, both_jobs()[0]]):
        found = train(jobs, step)
        steps = len(found["b"][0])
        assert not math.isfinite(found["b"][0][-1])
        assert 3 <= steps < len(found["a"][0])
        sound = replace(both_jobs()[1], training=replace(both_jobs()[1].training, max_steps=steps))
        assert found["a"] == train([sound if job is sick else job for job in jobs], step)["a"]


def test_a_bank_trains_one_objective() -> None:
    model = build("llama")
    pool = Jobs(prepare(model), Bank.attach(model, [both_jobs()[0].lora], 1), 256)
    pool.add(both_jobs()[0])
    ((name, event),) = pool.run()
    assert name == "a"
    assert isinstance(event, Failed)
    assert "share one objective" in event.why


def test_an_unknown_objective_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="objective = 'pair' is not one of"):
        config(objective="pair")
    with pytest.raises(ConfigError, match="'sft'"):
        check_values(TrainConfig, {"objective": "stf"}, "run.toml")
