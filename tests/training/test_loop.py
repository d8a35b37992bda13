"""Whole runs in memory: repeatable, resumable to the bit, and with a defined end in every case."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from loratune.base.forward import fuse, prepare
from loratune.lora.files import load_adapter
from loratune.training import checkpoint
from loratune.training.course import Evaluated, StepDone
from loratune.training.loop import CheckpointSaved, Ended, Loop
from loratune.training.step import evaluate_loss
from tests.conftest import build
from tests.training.helpers import config, examples, model_with_adapter, rows, trainable

TRAIN, HELD_OUT = examples(40), examples(6, seed=9)


def make_loop(settings, folder=None, model=None, held_out=HELD_OUT, tokens_per_row=64, fused=False, **lora):
    model = model or model_with_adapter(lora_dropout=0.1, **lora)
    forward = prepare(model)
    assert not fused or fuse(forward)
    return Loop(forward, "default", trainable(model), rows(TRAIN, held_out, tokens_per_row), settings, folder)


def state_of(loop):
    return {path: p.detach().clone() for path, p in loop.parameters.items()}


def losses_of(events):
    return [e.loss for e in events if isinstance(e, StepDone)]


def test_same_seed_same_run_and_another_seed_another():
    runs = [make_loop(config(seed=seed)) for seed in (3, 3, 4)]
    losses = [losses_of(list(loop.run())) for loop in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    first, second = state_of(runs[0]), state_of(runs[1])
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_it_learns():
    loop = make_loop(config(max_steps=40, learning_rate=2e-2), tokens_per_row=1024, r=16, lora_alpha=32)
    losses = losses_of(list(loop.run()))
    assert sum(losses[-10:]) / 10 < 0.85 * losses[0]


@pytest.mark.parametrize(
    ("killed_at", "optim", "fused"),
    [
        (4, "adamw", False),
        (7, "adamw", False),
        (7, "adamw", True),
        (11, "adamw", False),
        (7, "adamw_8bit", False),
        (7, "adamw_offload", False),
    ],
)
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, killed_at, optim, fused):
    """With dropout. The process dies without warning after some step; the run continues from the last checkpoint."""
    every = {"save_every_steps": 3, "eval_every_steps": 5}
    settings = config(max_steps=14, gradient_accumulation_steps=2, optim=optim, **every)
    whole = make_loop(settings, tmp_path / "whole", fused=fused)
    whole_losses = losses_of(list(whole.run()))

    killed = make_loop(settings, tmp_path / "killed", fused=fused)
    for event in killed.run():
        if isinstance(event, StepDone) and event.step == killed_at:
            break  # the generator is abandoned, as in a crash
    del killed

    newest = checkpoint.newest(tmp_path / "killed")
    model = build("llama")
    load_adapter(model, newest, name="default")
    resumed = make_loop(settings, tmp_path / "killed", model, fused=fused)
    resumed.resume(newest)
    assert 0 < resumed.progress.step <= killed_at
    start = resumed.progress.step
    resumed_losses = losses_of(list(resumed.run()))

    assert resumed_losses == whole_losses[start:]
    expected, got = state_of(whole), state_of(resumed)
    assert all(torch.equal(expected[path], got[path]) for path in expected)
    assert resumed.progress.best_eval_loss == whole.progress.best_eval_loss
    assert resumed.progress.trained_tokens == whole.progress.trained_tokens


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    settings = config(max_steps=20, eval_every_steps=4, save_every_steps=2)
    loop = make_loop(settings, tmp_path)
    list(loop.run())
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == sorted({f"step-{loop.progress.best_step:06d}", "step-000018", "step-000020"})


def test_early_stopping_waits_for_its_patience():
    """With a rate that ruins the adapter the held-out loss rises, and the run ends after `patience` evaluations."""
    settings = config(max_steps=100, eval_every_steps=1, early_stopping_patience=3, learning_rate=3.0)
    events = list(make_loop(settings).run())
    assert events[-1].reason == "early stop"
    evaluations = [e for e in events if isinstance(e, Evaluated)]
    assert [e.best for e in evaluations[-3:]] == [False] * 3
    assert evaluations[-4].best


def test_a_signal_ends_after_the_step_and_saves(tmp_path):
    loop = make_loop(config(max_steps=50), tmp_path)
    loop.stop = lambda: loop.progress.step == 5
    events = list(loop.run())
    assert isinstance(events[-1], Ended)
    assert events[-1].reason == "interrupted"
    assert any(isinstance(e, CheckpointSaved) and e.step == 5 for e in events)
    assert checkpoint.read_progress(checkpoint.newest(tmp_path)).step == 5


def test_three_bad_steps_in_a_row_end_the_run_with_the_last_good_state(tmp_path):
    model = model_with_adapter()
    loop = make_loop(config(max_steps=50, eval_every_steps=50), tmp_path, model, held_out=[])
    events = []
    for event in loop.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == 4:
            good = state_of(loop)
            model.lm_head.weight.data[5, 0] = float("inf")  # from here on every loss is not finite
    assert [e.skipped for e in events if isinstance(e, StepDone)] == [False] * 4 + [True] * 3
    assert events[-1].reason == "diverged"
    assert events[-1].progress.skipped_steps == 3
    saved = build("llama")
    load_adapter(saved, checkpoint.newest(tmp_path), name="default")
    assert all(torch.equal(p, good[path]) for path, p in trainable(saved).items())


def test_one_bad_step_is_skipped_and_counted(tmp_path):
    model = model_with_adapter()
    loop = make_loop(config(max_steps=8, eval_every_steps=50), None, model, held_out=[])
    weight = model.lm_head.weight.data
    finite = weight[5, 0].item()
    events = []
    for event in loop.run():
        events.append(event)
        if isinstance(event, StepDone):
            weight[5, 0] = float("inf") if event.step == 3 else finite
    assert [e.skipped for e in events if isinstance(e, StepDone)] == [False] * 3 + [True] + [False] * 4
    assert events[-1].reason == "done"


@pytest.mark.parametrize("at", [0, 1])
def test_a_held_out_loss_that_is_not_a_number_is_never_the_best(monkeypatch, at):
    """Neither as the first loss of a run nor later."""
    settings = config(max_steps=12, eval_every_steps=3)
    loop, count = make_loop(settings), itertools.count()

    def measured(forward, rows, objective):
        result = evaluate_loss(forward, rows, objective)
        return result._replace(loss=math.nan) if next(count) == at else result

    monkeypatch.setattr("loratune.training.loop.evaluate_loss", measured)
    found = [event for event in loop.run() if isinstance(event, Evaluated)]
    finite = [event for event in found if math.isfinite(event.eval_loss)]
    assert len(found) == 4
    assert len(finite) == 3
    assert not found[at].best
    assert finite[0].best
    assert loop.progress.best_eval_loss == min(event.eval_loss for event in finite)
    assert loop.progress.best_step == next(e.step for e in finite if e.eval_loss == loop.progress.best_eval_loss)


def test_epochs_count_rows_and_the_last_step_may_be_short():
    loop = make_loop(config(max_steps=None, epochs=3, gradient_accumulation_steps=4))
    steps = [e for e in loop.run() if isinstance(e, StepDone)]
    assert len(steps) == loop.total_steps == -(-3 * loop.rows_per_epoch // 4)
    assert steps[-1].epoch == 3.0
    assert steps[-1].trained_tokens == 3 * sum(int((d.weights[1:] != 0).sum()) for d in TRAIN)


def test_dropout_does_not_touch_the_callers_random_state():
    loop = make_loop(config(max_steps=2))
    before = torch.get_rng_state()
    list(loop.run())
    assert torch.equal(before, torch.get_rng_state())


def test_fused_layers_train_like_the_modules():
    """With dropout. In float32, sums in another order diverge slowly."""
    modules, fused = (losses_of(list(make_loop(config(max_steps=6), fused=fused).run())) for fused in (False, True))
    assert fused == pytest.approx(modules, rel=1e-4)
    other = losses_of(list(make_loop(config(max_steps=6), model=model_with_adapter()).run()))
    assert (
        max(abs(a - b) for a, b in zip(modules, other, strict=True)) > 1e-3 * modules[0]
    )  # dropout has a visible effect
