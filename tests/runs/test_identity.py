"""Runs whose base, tokenizer, template, data, checkpoints or folder are not the same any more."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune import lock, manifest
from loratune.base.identity import describe
from loratune.config import TrainConfig
from loratune.errors import OutputError
from loratune.training import checkpoint
from loratune.training.course import Course, Rows
from loratune.training.step import StepResult
from tests.cli_lab import CHAT, SHORT, Outcome, finish, loratune, small_model, start, write_jsonl

TRAIN = ["--max-steps", "6", "--eval-every-steps", "2", "--device", "cpu", *SHORT]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, and a run that was made with relative names and a template of its own."""
    here = tmp_path_factory.mktemp("identity")
    small_model(here / "base")
    write_jsonl(here / "chat.jsonl", CHAT)
    (here / "chat.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        made = loratune("train", "base", "chat.jsonl", "--out", "run", "--chat-template", "chat.jinja", *TRAIN)
    assert made.status == 0, made.err
    return here


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as if the run had been made in it, and the working folder."""
    place = tmp_path / "place"
    shutil.copytree(trained, place)
    for name in ("identity.json", "adapter_config.json"):
        file = place / "run" / name
        file.write_text(file.read_text().replace(str(trained), str(place)))
    found = manifest.read(place / "run")
    assert found is not None
    manifest.write(place / "run", found.run, found.step, found.files)
    monkeypatch.chdir(place)
    return place


def loss_of(adapter: str, *words: str) -> float:
    outcome = loratune("eval", adapter, str(Path(adapter).parent / "chat.jsonl"), "--no-generate", "--json", *words)
    assert outcome.status == 0, outcome.err
    return float(json.loads(outcome.out)["results"][0]["loss"])


def refused(outcome: Outcome, *says: str) -> None:
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    assert all(said in outcome.err for said in says), outcome.err


def flip_bit(file: Path, at: int = -9) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_another_folder_with_a_base_and_template_of_the_same_names(here: Path, tmp_path, monkeypatch) -> None:
    """The adapter uses its own base, template and data, in every working folder."""
    expected = loss_of(str(here / "run"))
    elsewhere = tmp_path / "elsewhere"
    small_model(elsewhere / "base", num_hidden_layers=2, rope_theta=500.0)
    write_jsonl(elsewhere / "chat.jsonl", CHAT[:3])
    (elsewhere / "chat.jinja").write_text(TEMPLATE.replace("[", "<"))
    monkeypatch.chdir(elsewhere)
    assert loss_of(str(here / "run")) == expected
    merged = loratune("merge", str(here / "run"), "--out", "merged")
    assert merged.status == 0, merged.err
    assert load_file("merged/model.safetensors").keys() == load_file(here / "base/model.safetensors").keys()
    assert (elsewhere / "merged/chat_template.jinja").read_text() == TEMPLATE


def test_a_base_that_was_moved_is_found_by_its_fingerprint_only(here: Path, tmp_path, monkeypatch) -> None:
    expected = loss_of("run")
    elsewhere = tmp_path / "elsewhere"
    small_model(elsewhere / "base", rope_theta=500.0)
    (here / "base").rename(tmp_path / "moved")
    monkeypatch.chdir(elsewhere)
    refused(loratune("chat", str(here / "run")), "is not the base of the training", "--model")
    shutil.rmtree(elsewhere / "base")
    refused(loratune("chat", str(here / "run")), "is not here", "--model")
    (tmp_path / "moved").rename(elsewhere / "base")
    assert loss_of(str(here / "run")) == expected


def test_data_that_are_gone_are_named_by_path_and_flag(here: Path, tmp_path, monkeypatch) -> None:
    (here / "chat.jsonl").rename(here / "moved.jsonl")
    monkeypatch.chdir(tmp_path)
    refused(loratune("merge", str(here / "run"), "--out", "m"), f"{here}/chat.jsonl", "--data")
    assert loratune("merge", str(here / "run"), "--out", "m", "--data", str(here / "moved.jsonl")).status == 0
    refused(loratune("train", "--resume", "--out", str(here / "run"), "--max-steps", "8"), f"{here}/chat.jsonl")


def test_a_base_that_the_user_names_is_used_with_a_note(here: Path) -> None:
    small_model(here / "near", rope_theta=500.0)
    outcome = loratune("eval", "run", "chat.jsonl", "--model", "near", "--no-generate")
    assert outcome.status == 0
    assert "near is not the base of the training" in " ".join(outcome.err.split())


def test_resume_in_another_folder_equals_resume_in_its_own(here: Path, tmp_path, monkeypatch) -> None:
    shutil.copytree(here / "run", here / "twin")
    longer = ["--max-steps", "8"]
    assert loratune("train", "--resume", "--out", "run", *longer).status == 0
    elsewhere = tmp_path / "elsewhere"
    small_model(elsewhere / "base", rope_theta=500.0)
    monkeypatch.chdir(elsewhere)
    resumed = loratune("train", "--resume", "--out", str(here / "twin"), *longer)
    assert resumed.status == 0, resumed.err
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        if name == "metrics.jsonl":
            first, second = (
                [json.loads(line).get("loss") for line in (here / run / name).open()] for run in ("run", "twin")
            )
            assert first == second
        else:
            assert (here / "run" / name).read_bytes() == (here / "twin" / name).read_bytes()


def test_a_changed_tokenizer_is_refused(here: Path) -> None:
    flip = json.loads((here / "base/tokenizer.json").read_text())
    flip["model"]["vocab"] = dict(sorted(flip["model"]["vocab"].items()))
    (here / "base/tokenizer.json").write_text(json.dumps(flip))
    refused(loratune("chat", "run"), "the tokenizer of", "has changed")


def newest(run: Path) -> Path:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return found


DAMAGE = {
    "a flipped bit in the adapter": lambda run: flip_bit(newest(run) / "adapter_model.safetensors"),
    "a flipped bit in the moments": lambda run: flip_bit(newest(run) / "optimizer.safetensors"),
    "another step number": lambda run: shutil.copytree(newest(run), run / "checkpoints/step-000009"),
    "a step number in the progress": lambda run: (newest(run) / "progress.json").write_text('{"step": 5}'),
    "a missing file": lambda run: (newest(run) / "adapter_config.json").unlink(),
    "a damaged manifest": lambda run: (newest(run) / "manifest.json").write_text("[1"),
    "another run's tensors": lambda run: save_file(
        {k: t + 1 for k, t in load_file(newest(run) / "adapter_model.safetensors").items()},
        newest(run) / "adapter_model.safetensors",
        {"format": "pt"},
    ),
    "another run's checkpoint": lambda run: (newest(run) / "manifest.json").write_text(
        (newest(run) / "manifest.json").read_text().replace('"run": "', '"run": "0')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_left_out_with_a_message(here: Path, damage: str) -> None:
    """The run continues from the checkpoint before, and ends like a run that was never damaged."""
    shutil.copytree(here / "run", here / "whole")
    DAMAGE[damage](here / "run")
    resumed = loratune("train", "--resume", "--out", "run", "--max-steps", "8")
    assert resumed.status == 0, resumed.err
    start_at = 6 if damage == "another step number" else 4
    assert f"the run continues from step {start_at}" in " ".join(resumed.out.split())
    if start_at == 6:  # from step 4 the longer schedule differs in steps 5 and 6
        assert loratune("train", "--resume", "--out", "whole", "--max-steps", "8").status == 0
        same = [(here / run / "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
        assert same[0] == same[1]


FINISHED = ["adapter_model.safetensors", "adapter_config.json", "prompting.json"]


@pytest.mark.parametrize("name", FINISHED)
def test_a_changed_adapter_is_noticed_when_it_is_opened(here: Path, name: str) -> None:
    file = here / "run" / name
    file.write_bytes(file.read_bytes().replace(b'"lora_alpha": 32', b'"lora_alpha": 33') + b" ")
    if name.endswith("safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
        flip_bit(file)
    resize = ["resize", "run", "--rank", "1", "--out", "small"]
    for words in (["merge", "run", "--out", "merged"], ["eval", "run", "chat.jsonl"], resize, ["chat", "run"]):
        refused(loratune(*words), f"{name} is damaged since the run was saved", "manifest.json")
    (here / "run/manifest.json").unlink()
    assert loratune("merge", "run", "--out", "merged").status == 0


def test_a_run_from_before_there_were_manifests_resumes_with_a_note(here: Path) -> None:
    """It continues to the same bits, and has an identity from then on."""
    shutil.copytree(here / "run", here / "whole")
    assert loratune("train", "--resume", "--out", "whole", "--max-steps", "8").status == 0
    run = here / "run"
    for file in [*run.rglob("manifest.json"), run / "identity.json", run / "chat_template.jinja"]:
        file.unlink()
    (newest(run) / "progress.json").write_text('{"step": 4')  # its files are still checked
    shutil.copytree(run, here / "damaged")
    shutil.copy(here / "whole/checkpoints/step-000006/progress.json", newest(run))
    resumed = loratune("train", "--resume", "--out", "damaged", "--max-steps", "8")
    assert resumed.status == 0, resumed.err
    assert "continues from step 4" in " ".join(resumed.out.split())
    resumed = loratune("train", "--resume", "--out", "run", "--max-steps", "8")
    assert resumed.status == 0, resumed.err
    assert "began without identity.json" in " ".join(resumed.out.split())
    same = [(here / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert same[0] == same[1]
    small_model(here / "base", rope_theta=500.0)
    refused(loratune("train", "--resume", "--out", "run", "--max-steps", "9"), "has changed since the training")


def test_a_checkpoint_without_its_runs_identity_is_refused(here: Path) -> None:
    (here / "run/identity.json").unlink()
    refused(loratune("train", "--resume", "--out", "run", "--max-steps", "8"), "no identity.json", "--overwrite")


def test_the_default_cache_need_not_be_writable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("")
    words = ["train", "base", "chat.jsonl", "--r", "2", "--tokens-per-row", "64", "--max-steps", "1"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "file"))
    outcome = loratune(*words, "--out", "first")
    assert outcome.status == 0, outcome.err
    assert "data cache cannot be written" in " ".join(outcome.out.split())
    refused(loratune(*words, "--out", "second", "--cache-dir", "file/cache"), "file/cache", "cannot be written")


def test_steps_skipped_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    """Two bad steps before a stop and one behind it end the run, as three in a row do."""
    settings = TrainConfig(max_steps=6, gradient_accumulation_steps=1, learning_rate=1e-3)
    rows = Rows(lambda epoch: [[]] * 6, [])
    course = Course(rows, settings)
    bad = StepResult(float("nan"), float("nan"), 1, skipped=True)
    course.stepped(bad, 1, 1.0, 0)
    course.stepped(bad, 1, 1.0, 0)
    (tmp_path / "progress.json").write_text(json.dumps(dataclasses.asdict(course.progress)))
    course = Course(rows, settings, checkpoint.read_progress(tmp_path))
    assert not course.diverged
    course.stepped(bad, 1, 1.0, 0)
    assert course.diverged


@pytest.mark.parametrize(
    "words", [["--adam-epsilon", "1e-300"], ["--adam-epsilon", "1e-40"], ["--adam-beta2", "0.99999999"]]
)
def test_settings_that_are_zero_in_float32_are_refused(here: Path, words: list[str]) -> None:
    refused(loratune("train", "base", "chat.jsonl", "--out", "out", *TRAIN, *words), "float32")
    assert not (here / "out").exists()


def test_copies_and_leftovers_do_not_disturb(here: Path) -> None:
    run = here / "run"
    shutil.copytree(newest(run), run / "checkpoints/step-000006-backup")
    (run / "checkpoints/step-old").mkdir()
    dead = f".step-000007.{checkpoint.atomic.temporary_prefix('x').split('.')[2].split('-')[0]}-99999999.abc"
    (run / "checkpoints" / dead).mkdir()
    resumed = loratune("train", "--resume", "--out", "run", "--max-steps", "7")
    assert resumed.status == 0, resumed.err
    assert (run / "checkpoints/step-000006-backup/progress.json").is_file()
    assert not (run / "checkpoints" / dead).exists()
    assert not list(run.rglob(".*"))


def test_a_lost_best_checkpoint_is_noticed_at_once(here: Path) -> None:
    run = here / "run"
    last = newest(run)
    progress = json.loads((last / "progress.json").read_text())
    if progress["best_step"] == progress["step"]:  # make the one before the best, as after a worse evaluation
        progress["best_step"] = 4
        (last / "progress.json").write_text(json.dumps(progress))
        found = manifest.read(last)
        assert found is not None
        manifest.write(last, found.run, found.step, found.files)
    flip_bit(checkpoint.at_step(run / "checkpoints", progress["best_step"]) / "adapter_model.safetensors")
    resumed = loratune("train", "--resume", "--out", "run", "--max-steps", "8")
    assert resumed.status == 0, resumed.err
    assert "this best adapter" in " ".join(resumed.out.split())
    assert "is lost" in " ".join(resumed.out.split())


def test_two_processes_cannot_write_into_one_folder(here: Path) -> None:
    words = ["train", "base", "chat.jsonl", "--out", "both", *TRAIN, "--max-steps", "400"]
    first = start(*words, cwd=here)
    while not (here / "both/.lock").exists() and first.poll() is None:
        time.sleep(0.05)
    second = loratune(*words)
    third = loratune(*words, "--overwrite")
    first.terminate()
    finish(first)
    for outcome in (second, third):
        refused(outcome, f"error: both: another process (process {first.pid} on", "writing here")


def test_the_lock_of_a_dead_process_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("process 1 on another host\n")
    with lock.hold(tmp_path / "run"):
        with (
            pytest.raises(OutputError, match=f"process {os.getpid()} on .* is writing here"),
            lock.hold(tmp_path / "run"),
        ):
            pass
        assert (tmp_path / "run/.lock").exists()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_lock_leaves_no_empty_folders(tmp_path: Path) -> None:
    with lock.hold(tmp_path / "a/b/c"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "left", [["identity.json"], ["identity.json", "checkpoints/data.json"], ["metrics.jsonl"], ["run.toml"]]
)
def test_a_folder_of_a_run_that_was_killed_early_can_be_overwritten(here: Path, left: list[str]) -> None:
    killed = here / "killed"
    for name in left:
        (killed / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / "run" / name, killed / name)
    words = ["train", "base", "chat.jsonl", "--out", "killed", *TRAIN]
    refused(loratune(*words), "--overwrite")
    refused(loratune("train", "--resume", "--out", "killed"), "killed", "--overwrite")
    assert loratune(*words, "--overwrite").status == 0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda t: t, True),
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"] + 1e-3}, False),
        (lambda t: {k: v.bfloat16() for k, v in t.items()}, False),
        (lambda t: {k: v for k, v in t.items() if "norm" not in k}, False),
    ],
)
def test_the_fingerprint_of_weights(here: Path, change, same: bool) -> None:
    before = describe("base").weights
    tensors = change(load_file("base/model.safetensors"))
    names = sorted(tensors)
    (here / "base/model.safetensors").unlink()
    for part, keys in enumerate((names[::2], names[1::2])):  # other files, the same tensors
        save_file({k: tensors[k] for k in keys}, here / f"base/model-{part}.safetensors", {"format": "pt"})
    assert (describe("base").weights == before) is same


def test_the_fingerprint_of_large_weights_reads_blocks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.base.identity._READ_WHOLE", 0)
    before = describe("base").weights
    tensors = load_file("base/model.safetensors")
    large = max(tensors, key=lambda key: tensors[key].numel())
    tensors[large] = tensors[large] + torch.finfo(torch.float32).eps
    save_file(tensors, here / "base/model.safetensors", {"format": "pt"})
    assert describe("base").weights != before
