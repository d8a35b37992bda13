"""`loratune sweep`: many adapters at once over one base, compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from loratune import ahead
from loratune.cli import process
from loratune.cli.common import Folder, ModelName, parse, take_option
from loratune.cli.options import options_of, translate
from loratune.config import Precision
from loratune.errors import ConfigError, nearest

JobsFile = Annotated[Positional[str], tyro.conf.arg(metavar="JOBS.toml")]


@dataclass(kw_only=True)
class SweepArguments:
    """Train many adapters at once over one base, compare them, and save each as a run of its own.

    The jobs file holds the settings of train. Above the tables: settings that all jobs share. Under [grid]: lists
    whose combinations are the jobs. Under [[job]]: settings of single jobs. Under [halving]: at = [0.25, 0.5] and
    keep = 0.5.

        data = ["train.jsonl"]
        max_steps = 200
        [grid]
        learning_rate = [1e-4, 3e-4, 1e-3]
        r = [8, 64]
    """

    model: ModelName
    """Base model: a local folder, a hub id, or "loratune/pocket"."""
    jobs: JobsFile
    """TOML file with the jobs."""
    out: Folder
    """Folder for the ranking and one folder per job."""
    at_once: int | None = None
    """Jobs that train at the same time; by default as many as fit into the free memory."""
    precision: Precision | None = None
    """Number format of the base, as in train; by default the one in the jobs file."""
    device: str | None = None
    """Torch device; by default the one in the jobs file, else the GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    overwrite: bool = False
    """Replace an existing sweep."""
    resume: bool = False
    """Continue the sweep in the output folder; MODEL and JOBS may then be left out."""

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise ConfigError(f"at_once is {self.at_once}; it is at least 1")


def run(words: list[str]) -> int:
    """Trains all jobs and shows the ranking. Returns the exit status."""
    given = parse_arguments(words)
    from loratune.sweep.plan import read_plan

    plan = read_plan(
        given.jobs,
        model=given.model,
        out=given.out,
        precision=given.precision,
        device=given.device,
        trust_remote_code=given.trust_remote_code,
    )
    ahead.read_ahead(given.model)
    with process.library_imports():
        from loratune.screen import sweep as screen
        from loratune.sweep.run import sweep

    console = process.console()
    with process.stop_on_signals(console) as stop:
        events = sweep(
            plan,
            Path(given.jobs).read_text(encoding="utf-8"),
            given.out,
            at_once=given.at_once,
            overwrite=given.overwrite,
            resumed=given.resume,
            stop=stop,
            cache_dir=process.cache_dir(plan.jobs[0].config.dataset.cache_dir),
        )
        result = screen.watch(events, console)
        screen.summary(result, console)
    return 0 if result.complete else process.INTERRUPTED


def parse_arguments(words: list[str]) -> SweepArguments:
    """The arguments of `sweep`. With --resume, model and jobs default to those of the sweep in the output folder.

    Raises: ConfigError: a value is out of range, or there is no sweep to resume.
    """
    words = translate(words, options_of(SweepArguments), "sweep")
    _, out = take_option(words, "--out")
    only_options = "--resume" in words and out is not None and words[0].startswith("-")
    return parse(SweepArguments, words, "sweep", _resumed(out) if only_options and out else None)


def _resumed(out: str) -> SweepArguments:
    """The arguments that continue the sweep in `out`."""
    from loratune.sweep.folder import JOBS_FILE, STATE_FILE, read_state

    folder = Path(out)
    if not (folder / STATE_FILE).is_file():
        near = [file.parent.name for file in folder.parent.glob(f"*/{STATE_FILE}")]
        raise ConfigError(f"{out}: no sweep to resume: there is no {STATE_FILE}.{nearest(folder.name, near)}")
    state = read_state(folder)
    jobs, precision = str(folder / JOBS_FILE), state.precision
    return SweepArguments(
        model=state.model, jobs=jobs, out=out, precision=precision, device=state.device, resume=True
    )
