"""Sweeps: jobs equal to single runs, a ranking that interruptions do not change, and folders for every verb."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratune.errors import ConfigError
from loratune.many.jobs import Failed
from loratune.runs import metrics
from loratune.sweep.folder import Standing, ranked, read_state
from loratune.sweep.plan import read_plan
from loratune.sweep.run import Ready, RungDone, SweepResult, sweep
from loratune.training.loop import Ended
from tests.cli_lab import CHAT, finish, loratune, small_model, start, write_jsonl

SHARED = 'data = ["chat.jsonl"]\ntokens_per_row = 64\ncache_dir = ""\neval_fraction = 0.2\nmax_steps = 12\n'
SHARED += "eval_every_steps = 2\nlora_dropout = 0.0\n"
GRID = SHARED + "[grid]\nlearning_rate = [1e-3, 3e-3, 1e-2, 3e-2]\nr = [2, 5]\n"
HALVING = GRID + "[halving]\nat = [0.2, 0.6]\n"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with a model, data, and one uninterrupted sweep with halving, `whole`."""
    folder = tmp_path_factory.mktemp("sweep")
    small_model(folder / "base")
    write_jsonl(folder / "chat.jsonl", CHAT)
    (folder / "grid.toml").write_text(GRID)
    (folder / "halving.toml").write_text(HALVING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "140")
        done = loratune("sweep", "base", "halving.toml", "--out", "whole")
        assert done.status == 0, done.err
        yield folder
    torch.set_num_threads(threads)


def events_of(jobs, out, **settings):
    plan = read_plan(jobs, model="base", out=out)
    return sweep(plan, Path(jobs).read_text(), out, **settings)


def table(out):
    """The displayed ranking, without times."""
    return [line for line in (Path(out) / "README.md").read_text().splitlines() if line.startswith("|")]


def test_the_folder_of_a_job_equals_the_folder_of_a_run(here):
    """Same files, same settings, same losses, same weights as `loratune train` alone."""
    assert loratune("sweep", "base", "grid.toml", "--out", "grid", "--at-once", "3").status == 0
    job = Path("grid/rate0.01-r5")
    words = ["--tokens-per-row", "64", "--cache-dir", "", "--eval-fraction", "0.2", "--max-steps", "12", "--r", "5"]
    words += ["--eval-every-steps", "2", "--learning-rate", "0.01"]
    assert loratune("train", "base", "chat.jsonl", "--out", "alone", *words).status == 0
    assert {p.name for p in job.iterdir()} == {p.name for p in Path("alone").iterdir()}
    ours, theirs = (Path(f, "run.toml").read_text().splitlines() for f in (job, "alone"))
    assert [line for line in ours if not line.startswith("out")] == [x for x in theirs if not x.startswith("out")]
    ours, theirs = (metrics.read(Path(f) / "metrics.jsonl") for f in (job, "alone"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for key in {"loss", "eval_loss"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    ours, theirs = (load_file(Path(f) / "adapter_model.safetensors") for f in (job, "alone"))
    assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-4) for key in theirs)
    assert Path("grid/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_ranking_is_by_held_out_loss_and_complete(here):
    results = json.loads(Path("whole/results.json").read_text())
    assert len(results) == 8
    assert {r["state"] for r in results} == {"done", "dropped"}
    losses = [r["eval_loss"] for r in results]
    assert losses == sorted(losses)
    for result in results:
        lines = metrics.read(Path("whole", result["name"], "metrics.jsonl"))
        assert result["eval_loss"] == min(m["eval_loss"] for m in lines if "eval_loss" in m)
    assert len(table("whole")) == 2 + 8


def test_halving_keeps_the_better_half_at_each_rung(here):
    meetings = read_state(Path("whole")).meetings
    assert [len(m["losses"]) for m in meetings] == [8, 4]
    for meeting in meetings:
        by_loss = sorted(meeting["losses"], key=meeting["losses"].get)
        assert meeting["kept"] == by_loss[: len(by_loss) // 2]
    steps = {r["name"]: r["step"] for r in json.loads(Path("whole/results.json").read_text())}
    # A fifth of 12 steps is 2.4 and three fifths 7.2: the next evaluations are at 4 and at 8.
    assert sorted(steps.values()) == [4] * 4 + [8] * 2 + [12] * 2


@pytest.mark.parametrize("at_once", [1, 3])
def test_how_many_run_at_once_does_not_change_the_table(here, at_once, tmp_path):
    assert loratune("sweep", "base", "halving.toml", "--out", str(tmp_path), "--at-once", str(at_once)).status == 0
    assert [r.split("|")[3:] for r in table(tmp_path)] == [r.split("|")[3:] for r in table("whole")]


def test_killed_at_any_moment_and_resumed_ends_in_the_same_table(here, tmp_path):
    """The generator is abandoned four times over one sweep, as in a crash."""
    rng, out, killed = random.Random(0), str(tmp_path / "whole"), 0
    for attempt in range(20):
        events = events_of("halving.toml", out, resumed=attempt > 0)
        limit, result = rng.randrange(5, 60), None
        for count, event in enumerate(events):
            result = event
            if count == limit and attempt < 4:
                killed += 1
                break
        del events
        if isinstance(result, SweepResult):
            break
    assert killed >= 3
    assert table(out) == table("whole")


def test_killed_by_the_system_and_resumed_from_the_folder_alone(here, tmp_path):
    out = tmp_path / "whole"
    process = start("sweep", "base", "halving.toml", "--out", str(out), "--at-once", "2", cwd=here)
    _wait_for(lambda: len(list(out.glob("*/checkpoints/step-*"))) >= 3, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    done = loratune("sweep", "--resume", "--out", str(out))
    assert done.status == 0, done.err
    assert [r.split("|")[3:] for r in table(out)] == [r.split("|")[3:] for r in table("whole")]


def test_a_stopped_sweep_saves_every_job_and_continues(here, tmp_path):
    """The effect of SIGINT and SIGTERM, see `cli`: the row ends and every running job saves its last step."""
    out, steps = str(tmp_path / "whole"), {}
    plan = read_plan("halving.toml", model="base", out=out)
    events = sweep(plan, HALVING, out, stop=lambda: max(steps.values(), default=0) >= 3)
    for event in events:
        if isinstance(event, tuple):
            steps[event[0]] = getattr(event[1], "step", steps.get(event[0], 0))
            last = event
    assert isinstance(event, SweepResult)
    assert not event.complete
    assert last[1].reason == "interrupted"
    assert not Path(out, "README.md").exists()
    for name, step in steps.items():
        assert (Path(out) / name / "checkpoints" / f"step-{step:06d}").is_dir()
    done = loratune("sweep", "--resume", "--out", out)
    assert done.status == 0, done.err
    assert table(out) == table("whole")


def _wait_for(condition, process):
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_complete_sweep_is_an_error_and_continues_with_added_jobs(here, tmp_path):
    out = str(tmp_path / "grows")
    text = SHARED + '[[job]]\nname = "a"\n'
    (here / "a.toml").write_text(text)
    assert loratune("sweep", "base", "a.toml", "--out", out).status == 0
    again = loratune("sweep", "--resume", "--out", out)
    assert again.status == 2
    assert "this sweep is complete" in again.err
    adapter = Path(out, "a", "adapter_model.safetensors").stat().st_mtime_ns
    (here / "ab.toml").write_text(text + '[[job]]\nname = "b"\nr = 3\n')
    assert loratune("sweep", "base", "ab.toml", "--out", out, "--resume").status == 0
    assert len(table(out)) == 2 + 2
    assert Path(out, "a", "adapter_model.safetensors").stat().st_mtime_ns == adapter


def test_a_job_that_diverges_or_fails_is_ranked_last_and_leaves_the_others_unchanged(here, tmp_path):
    text = (
        SHARED + '[[job]]\nname = "wild"\nlearning_rate = 1e38\n[[job]]\nname = "tame"\n[[job]]\nname = "blocked"\n'
    )
    (here / "wild.toml").write_text(text)
    events = []
    for event in events_of("wild.toml", str(tmp_path / "out")):
        events.append(event)
        if isinstance(event, Ready):  # a file blocks the folder of one job
            (tmp_path / "out" / "blocked").write_text("")
    result = events[-1]
    assert result.standings[0].name == "tame"
    assert {s.name: s.state.split(":")[0] for s in result.standings} == {
        "tame": "done",
        "wild": "diverged",
        "blocked": "failed",
    }
    last = dict(event for event in events if isinstance(event, tuple))
    assert isinstance(last["blocked"], Failed)
    assert isinstance(last["tame"], Ended)
    assert (tmp_path / "out" / "README.md").exists()


def test_the_winners_folder_works_with_every_other_verb(here):
    best = "whole/" + json.loads(Path("whole/results.json").read_text())[0]["name"]
    assert loratune("inspect", best).status == 0
    measured = loratune("eval", best, "chat.jsonl", "--json", "--max-new-tokens", "4", "--tokens-per-row", "64")
    assert measured.status == 0, measured.err
    assert loratune("merge", best, "--out", "merged").status == 0
    more = loratune("train", "--resume", "--out", best, "--max-steps", "14")
    assert more.status == 0, more.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "grid.toml", "--out", "whole"], "whole: exists already"),
        (["base", "grid.toml", "--out", "base", "--overwrite"], "contains files that are not a sweep"),
        (["base", "nowhere.toml", "--out", "x"], "nowhere.toml: cannot be read"),
        (["bsae", "grid.toml", "--out", "x"], "bsae"),
        (["base", "grid.toml", "--out", "x", "--at-once", "0"], "at_once is 0"),
        (["--resume", "--out", "whol"], 'there is no sweep.json. Did you mean "whole"?'),
        (["base", "grid.toml", "--out", "base", "--resume"], "there is no sweep to resume"),
        (["base", "grid.toml", "--out", "whole", "--resume", "--precision", "bfloat16"], "precision is 'auto'"),
        (["base", "typo.toml", "--out", "x"], 'typo.toml:9: unknown setting "rnk"'),
        (["base", "lost.toml", "--out", "x"], "lost.jsonl"),
        (["base", "layer.toml", "--out", "x"], "no_such_layer"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(here, words, message):
    (here / "typo.toml").write_text(SHARED + "[grid]\nrnk = [1]\n")
    (here / "lost.toml").write_text(SHARED.replace("chat.jsonl", "lost.jsonl"))
    (here / "layer.toml").write_text(SHARED + 'target_modules = ["no_such_layer"]\n')
    outcome = loratune("sweep", *words)
    assert outcome.status == 2
    assert message in " ".join(outcome.err.split())
    assert not Path("x").exists()


def test_broken_jobs_rank_last_and_unmeasured_jobs_behind_measured_ones():
    def standing(name, eval_loss, loss, state="done"):
        return Standing(
            name=name, settings={}, state=state, step=1, total_steps=1, loss=loss, eval_loss=eval_loss, best_step=None
        )

    order = ranked(
        [
            standing("broken", 0.1, 0.1, "failed: disk full"),
            standing("unmeasured", None, 0.2),
            standing("nan", float("nan"), 0.2),
            standing("second", 0.4, 0.1),
            standing("first", 0.3, 0.9),
        ]
    )
    assert [s.name for s in order] == ["first", "second", "nan", "unmeasured", "broken"]


def test_a_changed_setting_of_a_job_cannot_be_resumed(here, tmp_path):
    (here / "one.toml").write_text(SHARED + '[[job]]\nname = "one"\n')
    events = events_of("one.toml", str(tmp_path))
    for count, _ in enumerate(events):
        if count == 20:
            break
    del events
    (here / "one.toml").write_text(SHARED + '[[job]]\nname = "one"\nseed = 7\n')
    with pytest.raises(ConfigError, match=r"training\.seed is 0 in this run and 7 now"):
        list(events_of("one.toml", str(tmp_path), resumed=True))


def test_rungs_are_reported_as_they_happen(here):
    met = [e for e in events_of("halving.toml", "met", overwrite=True) if isinstance(e, RungDone)]
    assert [(m.share, len(m.kept), len(m.dropped)) for m in met] == [(0.2, 4, 4), (0.6, 2, 2)]
    assert not set(met[1].kept) - set(met[0].kept)
