"""Damaged run folders, and processes that are killed between two changes of the disk.

    python -m tests.campaigns.damaged_folders [--damages 150] [--kills 100] [--first 0]

A seed of the first part damages a copy of a finished run: bits, lengths, missing files, files of another run, wrong
step numbers, copies, leftovers, a changed base. Right is that the run resumes to the bits of an undamaged run from
the same checkpoint, that the adapter has its loss, or one error; and that --overwrite trains the first run again.

A seed of the second part ends a process just before its n-th change of the disk: while it trains, while it replaces a
run, or while it resumes. Right is that the run then resumes, or says that there is no checkpoint; that --overwrite
works; that both end in the bits of a run without a kill; and that no temporary file stays.

The script prints counts and faults, and exits with 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from loratune.cli import main
from loratune.training import checkpoint
from tests.campaigns.workers import SECONDS, Campaign, Found, Wrong, judged
from tests.cli_lab import CHAT, SHORT, Outcome, small_model, write_jsonl

STEPS, MORE = "4", "6"
TRAIN = ["train", "base", "chat.jsonl", "--out", "run", "--device", "cpu", "--max-steps", STEPS]
TRAIN += ["--eval-every-steps", "1", *SHORT]
RESUME = ["train", "--resume", "--out", "run", "--max-steps", MORE]
EVAL = ["eval", "run", "chat.jsonl", "--no-generate", "--json"]
ADAPTER = "adapter_model.safetensors"
_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})


@functools.cache
def template() -> Path:
    """A folder with a base, data, a finished run, and another run on the same base.

    It was made at the place of its copies, so that recorded paths are those of a copy.
    """
    here = Path(tempfile.mkdtemp(prefix="damaged-")) / "here"
    torch.set_num_threads(1)
    small_model(here / "base")
    write_jsonl(here / "chat.jsonl", CHAT)
    expect_success(command(TRAIN, here))
    (here / "run").rename(here / "first")
    expect_success(command([*TRAIN, "--seed", "9"], here))
    (here / "run").rename(here / "other")
    (here / "first").rename(here / "run")
    return here.rename(here.with_name("template"))


@functools.cache
def trained() -> bytes:
    """The adapter of the undamaged run."""
    return (template() / "run" / ADAPTER).read_bytes()


@functools.cache
def loss() -> float:
    """Its loss on the training data."""
    with copied() as here:
        return _loss(command(EVAL, here))


@functools.cache
def resumed(step: int) -> bytes:
    """The adapter of an undamaged run that was resumed from its checkpoint of `step`."""
    with copied() as here:
        for other, path in checkpoint.all_in(here / "run/checkpoints").items():
            if other > step:
                shutil.rmtree(path)
        expect_success(command(RESUME, here))
        return (here / "run" / ADAPTER).read_bytes()


class copied:
    """A copy of the template, removed at the end. Only one exists at a time."""

    def __enter__(self) -> Path:
        self._here = template().with_name("here")
        shutil.copytree(template(), self._here)
        return self._here

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._here)


def command(words: list[str], here: Path, kill_at: int | None = None, count: Path | None = None) -> Outcome:
    """Runs `loratune WORDS` in `here`, in a forked process that has all imports.

    Args:
        kill_at: number of the change of the disk before which the process is killed.
        count: file for the number of changes.

    Returns: the outcome; its status is negative for a signal.
    """
    texts = [Path(tempfile.mkstemp(prefix="damaged-")[1]) for _ in range(2)]
    process = os.fork()
    if process == 0:
        _child(words, here, texts, kill_at, count)
    deadline = time.monotonic() + 6 * SECONDS  # several processes share a core
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise Wrong(f"hangs: {' '.join(words)}")
        time.sleep(0.01)
    out, err = (text.read_text(errors="replace") for text in texts)
    for text in texts:
        text.unlink()
    outcome = Outcome(os.waitstatus_to_exitcode(ended[1]), out, err)
    if "Traceback" in out + err or outcome.status not in (0, 2, -signal.SIGKILL):
        raise Wrong(f"{' '.join(words)}: status {outcome.status}: {(out + err)[-600:]}")
    return outcome


def _child(words: list[str], here: Path, texts: list[Path], kill_at: int | None, count: Path | None) -> None:
    status = 1
    try:
        os.chdir(here)
        os.environ |= {"COLUMNS": "400", "XDG_CACHE_HOME": str(here / ".cache")}
        for descriptor, text in zip((1, 2), texts, strict=True):
            os.dup2(os.open(text, os.O_WRONLY), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        changes = _watch(str(here), kill_at)
        status = main(words)
        if count is not None:
            count.write_text(str(changes[0]))
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 (the parent reports it)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _watch(below: str, kill_at: int | None) -> list[int]:
    """Counts changes of the disk below a folder, in the returned list, and kills this process before one of them."""
    changes = [0]

    def see(event: str, given: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in _CHANGES) or "/.cache" in str(given[0]):
            return
        if not os.path.abspath(str(given[0])).startswith(below):
            return
        changes[0] += 1
        if changes[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)
    return changes


def expect_success(outcome: Outcome) -> None:
    """Raises Wrong if a command that must work did not."""
    if outcome.status != 0:
        raise Wrong(f"status {outcome.status}: {(outcome.err or outcome.out)[-400:]}")


def _loss(outcome: Outcome) -> float:
    expect_success(outcome)
    return float(json.loads(outcome.out)["results"][0]["loss"])


def _file(run: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted(run.rglob("*")) if path.is_file()])


def _flip(run: Path, rng: random.Random) -> None:
    file = _file(run, rng)
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _cut(run: Path, rng: random.Random) -> None:
    file = _file(run, rng)
    file.write_bytes(file.read_bytes()[: rng.choice((0, 1, 8, file.stat().st_size // 2))])


def _lose(run: Path, rng: random.Random) -> None:
    _file(run, rng).unlink()


def _lose_folder(run: Path, rng: random.Random) -> None:
    shutil.rmtree(rng.choice([*checkpoint.all_in(run / "checkpoints").values(), run / "checkpoints"]))


def _of_other(run: Path, rng: random.Random) -> None:
    file = _file(run, rng)
    other = run.parent / "other" / file.relative_to(run)
    if other.is_file():
        shutil.copy(other, file)


def _checkpoint_of_other(run: Path, rng: random.Random) -> None:
    step, path = rng.choice(sorted(checkpoint.all_in(run.parent / "other/checkpoints").items()))
    target = checkpoint.at_step(run / "checkpoints", rng.choice((step, step + 1)))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(path, target)


def _wrong_number(run: Path, rng: random.Random) -> None:
    _, path = rng.choice(sorted(checkpoint.all_in(run / "checkpoints").items()))
    target = checkpoint.at_step(path.parent, rng.choice((1, 5, 99)))
    if not target.exists():
        path.rename(target)


def _becomes_folder(run: Path, rng: random.Random) -> None:
    file = _file(run, rng)
    file.unlink()
    file.mkdir()


def _copy(run: Path, rng: random.Random) -> None:
    _, path = rng.choice(sorted(checkpoint.all_in(run / "checkpoints").items()))
    shutil.copytree(path, path.with_name(path.name + rng.choice(("-backup", ".old", "0", " (1)"))))


def _leftover(run: Path, rng: random.Random) -> None:
    name = rng.choice((".step-000005.00000000-1.x", ".run.toml.partial", "step-", "step-00000x", ".lock"))
    (run / rng.choice((".", "checkpoints")) / name).write_text("1")


def _bad_line(run: Path, rng: random.Random) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines.insert(rng.randrange(len(lines)), rng.choice((b"{", b"\xff\xfe", b"[1]", b'{"step": "x"}', b"NaN", b"")))
    file.write_bytes(b"\n".join(lines))


def _changed_base(run: Path, rng: random.Random) -> None:
    file = run.parent / "base/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-rng.randrange(2, 4000) * 2] ^= 1
    file.write_bytes(content)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _flip, _cut, _lose, _lose_folder, _of_other, _checkpoint_of_other, _wrong_number, _becomes_folder, _copy,
    _leftover, _bad_line, _changed_base,
)  # fmt: skip


def check_damage(seed: int) -> str:
    """Damages a run and uses it; see the top of this file. Returns the outcome of the resume."""
    loss()  # which needs the place of the copy
    rng, damage = random.Random(f"damage {seed}"), DAMAGES[seed % len(DAMAGES)]
    with copied() as here:
        damage(here / "run", rng)
        name = damage.__name__.strip("_")
        evaluated = command(EVAL, here)
        if evaluated.status == 0 and damage is _changed_base:
            raise Wrong("eval accepts a changed base")
        if evaluated.status == 0 and _loss(evaluated) != loss():
            raise Wrong(f"{name}: eval says {_loss(evaluated)}, not {loss()}")
        again = command(RESUME, here)
        if again.status == 0:
            if damage is _changed_base:
                raise Wrong("resume accepts a changed base")
            adapter = (here / "run" / ADAPTER).read_bytes()
        _check_overwrite(here, same_base=damage is not _changed_base)
    if again.status != 0:
        return "refused"
    _check_resumed(adapter, again, name)
    return "resumed"


def _check_resumed(adapter: bytes, outcome: Outcome, name: str) -> None:
    """Compares with the undamaged run from the checkpoint that the notes name, or from the last one."""
    fallback = re.search(r"the run continues from step (\d+)", " ".join(outcome.out.split()))
    known = sorted(checkpoint.all_in(template() / "run/checkpoints"))
    steps = [int(fallback[1])] if fallback else known if name in ("lose_folder", "wrong_number") else [known[-1]]
    if adapter not in [resumed(step) for step in steps]:
        raise Wrong(f"{name}: resumes to another adapter: {outcome.out[-300:]}")


def _check_overwrite(here: Path, *, same_base: bool = True) -> None:
    expect_success(command([*TRAIN, "--overwrite"], here))
    if same_base and (here / "run" / ADAPTER).read_bytes() != trained():
        raise Wrong("--overwrite trains another adapter")
    left = [str(path) for path in (here / "run").rglob(".*") if ".00000000-1." not in path.name]
    if left and left != [str(here / "run/.run.toml.partial")]:
        raise Wrong(f"temporary files stay: {left}")


SCENES = {"trains": (False, TRAIN), "replaces": (True, [*TRAIN, "--overwrite"]), "resumes": (True, RESUME)}


@functools.cache
def changes_of(scene: str) -> int:
    """Number of changes of the disk of a whole command."""
    starts_with_run, words = SCENES[scene]
    with copied() as here:
        if not starts_with_run:
            shutil.rmtree(here / "run")
        count = here / "count"
        expect_success(command(words, here, count=count))
        return int(count.read_text())


def check_kill(seed: int) -> str:
    """Kills a command and goes on; see the top of this file."""
    scene = sorted(SCENES)[seed % len(SCENES)]
    starts_with_run, words = SCENES[scene]
    rng = random.Random(f"kill {seed}")
    for reference in (loss, lambda: changes_of(scene), lambda: scene == "resumes" and resumed(int(STEPS))):
        reference()  # needs the place of the copy
    with copied() as here:
        if not starts_with_run:
            shutil.rmtree(here / "run")
        killed = command(words, here, kill_at=rng.randint(1, changes_of(scene)))
        if killed.status != -signal.SIGKILL:
            raise Wrong(f"{scene}: was not killed: status {killed.status}")
        if (here / "run" / ADAPTER).exists():
            evaluated = command(EVAL, here)
            if scene != "resumes" and evaluated.status == 0 and _loss(evaluated) != loss():
                raise Wrong(f"{scene}: a half-written adapter is accepted")
        again = command(RESUME if scene == "resumes" else ["train", "--resume", "--out", "run"], here)
        if again.status == 0:
            expected = resumed(int(STEPS)) if scene == "resumes" else trained()
            if (here / "run" / ADAPTER).read_bytes() != expected:
                raise Wrong(f"{scene}: resumes to another adapter")
        elif (here / "run").is_dir() and not re.search("run is complete|--overwrite", again.err):
            raise Wrong(f"{scene}: {again.err}")
        _check_overwrite(here)
    return f"resumed ({scene})" if again.status == 0 else f"refused ({scene})"


def run(
    check: Callable[[int], str], seeds: Iterable[int], tell: Callable[[str], None] = lambda line: None
) -> Campaign:
    """Runs `check` on every seed."""
    campaign = Campaign()
    for seed in seeds:
        outcome, seconds, detail = judged(check, seed)
        campaign.outcomes[outcome] += 1
        campaign.slowest = max(campaign.slowest, seconds)
        if outcome in ("traceback", "wrong", "slow"):
            campaign.faults.append(Found(seed, outcome, detail))
            tell(f"{check.__name__} {seed}: {outcome}: {detail}")
    return campaign


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--damages", type=int, default=150)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    faults = 0
    for check, number in ((check_damage, given.damages), (check_kill, given.kills)):
        campaign = run(check, range(given.first, given.first + number), lambda line: print(line, flush=True))
        print(check.__name__, campaign, flush=True)
        faults += len(campaign.faults)
    shutil.rmtree(template().parent)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(_main())
