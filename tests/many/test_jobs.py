"""Many jobs over one base: each result equals the job alone, while other jobs join, leave or diverge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loratune.base.forward import prepare
from loratune.config import LoraConfig
from loratune.lora.files import load_adapter
from loratune.lora.inject import attach
from loratune.many.bank import Bank
from loratune.many.graph import BankGraph
from loratune.many.jobs import Failed, Job, Jobs, Paused, Started
from loratune.training import checkpoint
from loratune.training.course import Evaluated, StepDone
from loratune.training.loop import Ended, Loop
from tests.conftest import build
from tests.training.helpers import config, examples, rows, trainable

STEPS = 50


def job(name, *, seed=0, tokens=64, lora=None, folder=None, held_out=True, **training):
    """A job with its own data, which follow from `seed`."""
    own = rows(examples(30, seed), examples(5, seed + 100) if held_out else [], tokens, seed)
    lora = LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | (lora or {})))
    settings = config(**({"max_steps": STEPS, "learning_rate": 2e-3, "seed": seed} | training))
    return Job(name, lora, settings, own, folder)


def five():
    """Five jobs that share only the base. Their rates are too low to amplify rounding."""
    other = {"lr_scheduler_type": "linear", "adam_beta2": 0.95}
    return [
        job("a", seed=1, lora={"r": 2}),
        job("b", seed=2, tokens=96, lora={"r": 8, "lora_dropout": 0.2}, learning_rate=5e-3),
        job("c", seed=3, lora={"target_modules": ["q_proj", "down_proj"]}, gradient_accumulation_steps=3),
        job("d", seed=4, tokens=48, lora={"r": 3, "lora_alpha": 2, "use_rslora": True}, **other),
        job("e", seed=5, lora={"r": 16}, weight_decay=0.1, max_grad_norm=0.05, max_steps=30),
    ]


def together(jobs, *, slots=None, tokens=256, model=None, during=None):
    """Trains the jobs in one bank; returns each job's events and the final weights of its slot."""
    model = model or build("llama")
    bank = Bank.attach(model, [job.lora for job in jobs], slots or len(jobs))
    pool = Jobs(prepare(model), bank, tokens)
    events, weights, slots_of = {job.name: [] for job in jobs}, {}, {}
    leave = pool._step.leave

    def keep_weights(slot):
        """Copies the weights of a slot before it is freed."""
        weights[slots_of[slot]] = {path: view.clone() for path, view in bank.named(slot).items()}
        leave(slot)

    pool._step.leave = keep_weights
    for one in jobs:
        pool.add(one)
    for name, event in pool.run():
        events.setdefault(name, []).append(event)
        if isinstance(event, Started):
            slots_of[event.slot] = name
        if during is not None:
            during(pool, bank, name, event, slots_of)
    return events, weights


def alone(one):
    """The same job as `loratune train` runs it."""
    model = build("llama")
    attach(model, one.lora, name="default", seed=one.training.seed)
    loop = Loop(prepare(model), "default", trainable(model), one.rows, one.training, None)
    events = list(loop.run())
    return events, {path: p.detach().clone() for path, p in loop.parameters.items()}


def losses(events):
    return [event.loss for event in events if isinstance(event, StepDone)]


def held_out(events):
    return [event.eval_loss for event in events if isinstance(event, Evaluated)]


def assert_same(got, expected, got_weights, expected_weights):
    """Loss at every step within 1e-5 relative, weights within 1e-4: rounding of float32 sums over 50 steps."""
    assert len(losses(got)) == len(losses(expected))
    assert losses(got) == pytest.approx(losses(expected), rel=1e-5)
    assert held_out(got) == pytest.approx(held_out(expected), rel=1e-5)
    assert got_weights.keys() == expected_weights.keys()
    for path, weight in expected_weights.items():
        assert torch.allclose(got_weights[path], weight, rtol=0, atol=1e-4), path


def test_five_different_jobs_together_equal_each_alone():
    events, weights = together(five())
    for one in five():
        expected, expected_weights = alone(one)
        assert_same(events[one.name], expected, weights[one.name], expected_weights)


def test_neither_order_nor_other_jobs_that_join_or_leave_change_a_job():
    """Two slots for five jobs, in reverse: jobs start in the middle of other jobs, in slots used before."""
    events, weights = together(five()[::-1], slots=2, tokens=128)
    whole_events, whole_weights = together(five())
    for one in five():
        assert_same(events[one.name], whole_events[one.name], weights[one.name], whole_weights[one.name])


def test_a_job_may_be_added_while_others_run():
    late = job("late", seed=9, max_steps=20)

    def add(pool, bank, name, event, slots_of):
        if isinstance(event, StepDone) and name == "a" and event.step == 7:
            pool.add(late)

    events, weights = together([job("a", seed=1, max_steps=20)], during=add)
    assert_same(events["late"], alone(late)[0], weights["late"], alone(late)[1])


def test_a_job_that_goes_to_nan_leaves_the_others_equal_to_the_bit():
    """One run has a job whose weights become NaN at step 5; in the other it is healthy and ends at the same step."""

    def poison(pool, bank, name, event, slots_of):
        if name == "sick" and isinstance(event, StepDone) and event.step == 5:
            bank.master(next(slot for slot, at in slots_of.items() if at == "sick")).fill_(float("nan"))

    def jobs(**sick):
        return [job("a", seed=1, max_steps=20), job("sick", seed=2, **sick), job("b", seed=3, max_steps=20)]

    events, weights = together(jobs(max_steps=30, held_out=False), during=poison)
    healthy_events, healthy_weights = together(jobs(max_steps=8, held_out=False))
    assert events["sick"][-1].reason == "diverged"
    assert [event.skipped for event in events["sick"] if isinstance(event, StepDone)] == [False] * 5 + [True] * 3
    for name in ("a", "b"):
        assert losses(events[name]) == losses(healthy_events[name])
        assert held_out(events[name]) == held_out(healthy_events[name])
        assert all(torch.equal(weights[name][path], healthy_weights[name][path]) for path in weights[name])


def test_a_job_that_cannot_start_or_save_fails_alone(tmp_path):
    odd = job("odd", lora={"target_modules": ["no_such_layer"]})
    blocked = job("blocked", seed=2, max_steps=6, folder=tmp_path / "file" / "checkpoints")
    (tmp_path / "file").write_text("in the way")
    fine = job("fine", seed=1, max_steps=12)
    model = build("llama")
    bank = Bank.attach(model, [fine.lora], 3)
    pool = Jobs(prepare(model), bank, 256)
    for one in (odd, blocked, fine):
        pool.add(one)
    events = list(pool.run())
    last = dict(events)
    assert isinstance(last["odd"], Failed)
    assert "no_such_layer" in last["odd"].why
    assert isinstance(last["blocked"], Failed)
    assert isinstance(last["fine"], Ended)
    assert losses([event for name, event in events if name == "fine"]) == pytest.approx(
        losses(alone(fine)[0]), rel=1e-5
    )


@pytest.mark.parametrize("killed_at", [7, 11])
def test_a_job_resumed_beside_other_jobs_equals_the_uninterrupted_one(tmp_path, killed_at):
    settings = {"seed": 3, "gradient_accumulation_steps": 2, "max_steps": 20, "save_every_steps": 4}
    settings |= {"lora": {"lora_dropout": 0.1, "r": 4, "lora_alpha": 8}, "eval_every_steps": 5}
    one = job("one", folder=tmp_path / "one", **settings)
    whole, whole_weights = together([job("one", **settings), job("x", seed=8, max_steps=9)])

    model = build("llama")
    pool = Jobs(prepare(model), bank := Bank.attach(model, [one.lora], 2), 128)
    pool.add(one)
    for _, event in pool.run():
        if isinstance(event, StepDone) and event.step == killed_at:
            break  # the generator is abandoned, as in a crash
    del pool, bank

    newest = checkpoint.newest(tmp_path / "one")
    resumed, weights = together([job("y", seed=5, max_steps=30), replace(one, resume_from=newest)], tokens=96)
    assert 0 < resumed["one"][0].step <= killed_at
    assert losses(resumed["one"]) == pytest.approx(losses(whole["one"])[resumed["one"][0].step :], rel=1e-5)
    assert all(torch.allclose(weights["one"][p], w, rtol=0, atol=1e-4) for p, w in whole_weights["one"].items())


def test_a_checkpoint_of_a_job_is_one_that_train_resumes(tmp_path):
    """A job's folder equals the folder of a run, so `loratune train --resume` continues from it."""
    settings = {"seed": 3, "max_steps": 16, "eval_every_steps": 4}
    together([job("one", folder=tmp_path, **settings, held_out=False)], during=_stop_at(8))
    newest = checkpoint.newest(tmp_path)
    assert checkpoint.read_progress(newest).step == 8
    one = job("one", **settings, held_out=False)
    model = build("llama")
    load_adapter(model, newest, name="default")
    loop = Loop(prepare(model), "default", trainable(model), one.rows, one.training, None)
    loop.resume(newest)
    assert losses(list(loop.run())) == pytest.approx(losses(alone(one)[0])[8:], rel=1e-5)


def _stop_at(step):
    def stop(pool, bank, name, event, slots_of):
        if isinstance(event, StepDone) and event.step == step:
            pool._stop = lambda: True

    return stop


def test_a_paused_job_continues_from_its_checkpoint(tmp_path):
    one = job("one", seed=1, max_steps=12, eval_every_steps=3, folder=tmp_path)
    events, _ = together([replace(one, pause_at=6)])
    assert isinstance(events["one"][-1], Paused)
    events, weights = together([replace(one, resume_from=checkpoint.newest(tmp_path))])
    expected, expected_weights = alone(one)
    assert losses(events["one"]) == pytest.approx(losses(expected)[6:], rel=1e-5)
    assert all(torch.allclose(weights["one"][p], w, rtol=0, atol=1e-4) for p, w in expected_weights.items())


def test_early_stopping_is_each_jobs_own():
    settings = {"learning_rate": 0.5, "eval_every_steps": 2, "early_stopping_patience": 2, "max_steps": 30}
    events, _ = together([job("wild", seed=1, **settings), job("calm", seed=2, max_steps=30)])
    assert events["wild"][-1].reason == "early stop" == alone(job("wild", seed=1, **settings))[0][-1].reason
    assert len(losses(events["wild"])) == len(losses(alone(job("wild", seed=1, **settings))[0])) < 30
    assert events["calm"][-1].reason == "done"


def test_all_advance_at_the_same_pace_each_at_its_own_batch_size():
    steps = {"small": 0, "large": 0}
    gaps = []

    def watch(pool, bank, name, event, slots_of):
        if isinstance(event, StepDone):
            steps[name] = event.step
            gaps.append(abs(steps["small"] - steps["large"]))

    large = job("large", seed=2, gradient_accumulation_steps=4, max_steps=20, held_out=False)
    events, _ = together([job("small", seed=1, max_steps=20, held_out=False), large], tokens=96, during=watch)
    assert max(gaps) <= 2  # the larger step has four micro-steps, and rows are filled one micro-step at a time
    assert len(losses(events["large"])) == len(losses(events["small"])) == 20


def test_the_step_that_a_gpu_records_trains_the_same_jobs(monkeypatch):
    """The recorded work, launch by launch. Tables on the device give each token's slot and the slots that update.

    Its AdamW adds in another order than PyTorch's, so the tolerance over 50 steps is ten times the eager one.
    """
    plain, plain_weights = together(five())
    prepared, ran = [], []

    class Counting(BankGraph):
        def _prepare(self, parts):
            prepared.append(len(parts))
            return super()._prepare(parts)

        def run(self, parts, rates, upcoming=tuple):
            ran.append(len(parts))
            return super().run(parts, rates, upcoming)

    monkeypatch.setattr("loratune.many.jobs.step_of", lambda *given: Counting(*given, record=False))
    events, weights = together(five(), slots=2)
    assert len(prepared) <= len(ran) + 5, "all rows are predicted except where a job starts"
    for one in five():
        assert losses(events[one.name]) == pytest.approx(losses(plain[one.name]), rel=1e-4)
        for path, weight in plain_weights[one.name].items():
            assert torch.allclose(weights[one.name][path], weight, rtol=0, atol=1e-3)
