"""Seconds from process start to the end of the first step, phase by phase, for a 7B model on disk.

    python -m benchmarks.first_step [OUT.jsonl] [--shape l7b] [--bytecode] [--cold] [--without NAME ...] [--imports]

Writes a checkpoint of random weights (safetensors shards and a tokenizer) to the temporary directory once. Then
it runs `loratune train` in a process of its own with rows of 4 x 2048 tokens. Phases follow one another, so they
add up to the end of the first step. Recording is part of the last two.

- Warm: the files are in the page cache, as after a download. `--cold` adds rows without the weights and Python's
  packages in it.
- `compiled` is the share of modules with bytecode on disk. At 0 (PYTHONDONTWRITEBYTECODE, or read-only packages)
  every start compiles 3,000 modules, about eight seconds. `--bytecode` gives the processes a folder for bytecode;
  the first row fills it, and later rows show the second start of an ordinary machine.
- `--without` adds rows without one of the measures that speed up the start: read_ahead, not_found (packages
  hidden from transformers), gc (no garbage collection during imports).
- `--imports` adds import time per package; measuring it doubles the import time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

TOKENS_PER_ROW = 8192
WITHOUT = ("read_ahead", "not_found", "gc")
_IMPORTS = """
from loratune.cli import process
with process.library_imports():
    from loratune.screen import progress
    from loratune.runs.run import run
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM
"""


class Phases:
    """Seconds of consecutive phases, counted from the start of the process by its parent."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = started

    def end(self, name: str) -> None:
        """Ends the phase `name`; only the first call with a name counts."""
        now = time.time()
        self.seconds.setdefault(name, round(now - self._last, 2))
        self._last = now

    def ends_with(self, owner: Any, function: str, name: str) -> None:
        """Ends the phase `name` when `owner.function` has returned and the device is idle."""
        plain = getattr(owner, function)

        def timed(*arguments: Any, **named: Any) -> Any:
            result = plain(*arguments, **named)
            _synchronize()
            self.end(name)
            return result

        setattr(owner, function, timed)


class _Torch:
    """Import hook that records when torch has been imported."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Loader of torch that ends its phase."""
        if name != "torch":
            return None
        self._phases.end("before torch")
        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        self._phases.ends_with(spec.loader, "exec_module", "torch")
        return spec


def _synchronize() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(folder: str, data: str, without: str, settings: list[str], started: float) -> dict[str, object]:
    """Runs in the child process; `started` is its start time in seconds since the epoch."""
    phases = Phases(started)
    phases.end("python")
    sys.meta_path.insert(0, _Torch(phases))
    process: Any = importlib.import_module("loratune.cli.process")
    from loratune.cli import main as loratune

    plain, recordings = process.library_imports, [0.0]
    if without == "read_ahead":
        ahead: Any = importlib.import_module("loratune.ahead")
        ahead.read_ahead = lambda _: None
    if without == "not_found":
        process.NOT_FOR_TEXT = ()
    if without == "gc":
        process.gc = type("Always", (), dict.fromkeys(("disable", "enable", "freeze"), staticmethod(lambda: None)))

    @contextlib.contextmanager
    def libraries() -> Iterator[None]:
        with plain():
            yield
        phases.end("other imports")
        running: Any = importlib.import_module("loratune.runs.run")
        kind: Any = importlib.import_module("loratune.training.recordings").Recordings

        for function, name in (("load_tokenizer", "tokenizer"), ("load", "weights")):
            phases.ends_with(running.base, function, name)
        for function, name in (
            ("activate", "adapter"), ("prepare_forward", "layers fused and compared"), ("fit", "dry step"),
            ("dataset_of", "data"),
        ):  # fmt: skip
            phases.ends_with(running, function, name)
        phases.ends_with(running.Loop, "_step", "first step")
        record = kind.record

        def timed(*arguments: Any) -> bool:
            start = time.perf_counter()
            done: bool = record(*arguments)
            _synchronize()
            if "first step" not in phases.seconds:
                recordings[0] += time.perf_counter() - start
            return done

        kind.record = timed

    process.library_imports = libraries
    with tempfile.TemporaryDirectory() as out:
        words = ["train", folder, data, "--out", f"{out}/run", "--tokens-per-row", str(TOKENS_PER_ROW), "--r", "16"]
        status = loratune([*words, "--max-steps", "1", "--cache-dir", "", *settings])
    if status:
        raise SystemExit(status)
    import torch

    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    cached = [str(spec.cached) for spec in specs if spec is not None and spec.cached]
    compiled = sum(os.path.exists(file) and os.path.getmtime(file) < started for file in cached) / len(cached)
    seconds = phases.seconds
    card = torch.cuda.is_available()
    return {
        "first_step_s": round(sum(seconds.values()), 2), "phases": seconds, "recording_s": round(recordings[0], 2),
        "modules": len(sys.modules), "compiled": round(compiled, 2),
        "without": without, "tokens": TOKENS_PER_ROW, "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if card else "CPU",
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if card else 0,
    }  # fmt: skip


def imports() -> dict[str, object]:
    """Import milliseconds and number of modules per package, from `-X importtime`."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", _IMPORTS], capture_output=True, text=True)
    took: collections.Counter[str] = collections.Counter()
    modules: collections.Counter[str] = collections.Counter()
    for microseconds, package in re.findall(r"import time: +(\d+) \| +\d+ \| +(\w+)", done.stderr):
        took[package] += int(microseconds)
        modules[package] += 1
    most = {package: [round(us / 1e3), modules[package]] for package, us in took.most_common(16)}
    return {"imports_s": round(took.total() / 1e6, 2), "ms_and_modules": most, "modules": modules.total()}


def write_data(path: Path) -> None:
    """Documents of 2,000 bytes; the byte tokenizer makes one token per byte."""
    lines = [json.dumps({"text": f"{index:05} " + "the quick brown fox " * 99}) for index in range(64)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def drop_from_cache(*folders: Path) -> None:
    """Drops these folders from the page cache, except pages that a process has mapped."""
    os.sync()
    for file in (file for folder in folders for file in folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _packages() -> Path:
    """Folder of torch, found without importing it (an import would map its files)."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    return Path(str(spec.origin)).parent.parent


def _folder(shape: str) -> Path:
    """Folder of the model: `shape` if it is a folder, else one made by another process (here torch stays out)."""
    if Path(shape).is_dir():
        return Path(shape)
    made = [sys.executable, "-c", f"from benchmarks.peers import folder_of; print(folder_of({shape!r}))"]
    return Path(subprocess.run(made, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--shape", default="l7b", help="of benchmarks.shapes, or a folder")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--bytecode", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], choices=WITHOUT)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = ["--precision", given.precision]
    if given.child:
        folder, data, without, started = given.child
        print(json.dumps(measure(folder, data, without, settings, float(started))))
        return

    def say(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    model, temporary = _folder(given.shape), Path(tempfile.gettempdir())
    write_data(temporary / "first_step.jsonl")
    if given.bytecode:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(temporary / "bytecode")
    command = [sys.executable, "-m", "benchmarks.first_step", "--precision", given.precision, "--child", str(model)]

    def child(without: str) -> dict[str, object] | None:
        words = [*command, str(temporary / "first_step.jsonl"), without, str(time.time())]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-3000:], flush=True)
            return None
        found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    about = {"shape": given.shape, "precision": given.precision}
    for number, (cold, without) in enumerate(
        [(False, "")]  # later rounds reuse its files
        + [(False, without) for _ in range(given.rounds) for without in ["", *given.without]]
        + [(True, without) for _ in range(given.rounds * given.cold) for without in ["", *given.without]]
    ):
        if cold:
            drop_from_cache(model, _packages(), temporary / "bytecode")
        if (row := child(without)) is not None:
            say(row | about | {"cold": cold, "round": number})
    if given.imports:
        say(imports())


if __name__ == "__main__":
    main()
