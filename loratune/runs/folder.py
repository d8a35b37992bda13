"""The output folder of a run: its files, the order in which they appear, and its model card.

    adapter_config.json, adapter_model.safetensors    the best adapter, in PEFT format
    run.toml                                          every setting, to run it again
    metrics.jsonl, loss.png                           the curves
    rates.json                                        the trials of `--learning-rate auto`
    prompting.json                                    the form of the training data, for chat and eval
    README.md                                         the model card; written last, so it marks a complete folder
    identity.json, chat_template.jinja                id of the run; its base, tokenizer, template and data
    manifest.json                                     hashes of the adapter's files
    checkpoints/                                      the last two and the best, and hashes of the data

Later commands need only this folder. A single run and a job of a sweep write the same files. `identity.json` is
written first and removed last, so that a folder is known as a run's whenever a process is killed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loratune import atomic, foreign, manifest
from loratune.base import identity
from loratune.config import LoraConfig, RunConfig, to_toml
from loratune.data import prompting
from loratune.data.examples import Example
from loratune.data.feed import Dataset
from loratune.data.prompting import PromptForm
from loratune.errors import OutputError, TrainingError
from loratune.many.rate import RateChoice
from loratune.runs import metrics, resume, trackers
from loratune.runs.card import CardFacts, DataFacts, render_card
from loratune.training import checkpoint
from loratune.training.checkpoint import Progress
from loratune.training.course import Evaluated, Reason, StepDone
from loratune.training.loop import Ended, Event, peak_memory_bytes
from loratune.version import __version__

RATES_FILE = "rates.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_OURS = (*_ADAPTER, "README.md", "loss.png", RATES_FILE, "metrics.jsonl", "checkpoints", "tensorboard")
_OTHERS = (identity.TEMPLATE_FILE, prompting.FILE, manifest.FILE)
_MARKS = ("run.toml", identity.IDENTITY_FILE)


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """Summary of a finished run."""

    reason: Reason
    progress: Progress
    last_loss: float | None
    out: Path | None
    kept_step: int
    """Step of the adapter in the model and the folder: the best on held-out data, or the last."""
    tokens_per_second: float
    peak_memory_bytes: int
    forms: tuple[PromptForm, ...] = ()
    """Forms of the training data."""
    eval_data: tuple[str, ...] = ()
    """Held-out files that the user named."""

    def __repr__(self) -> str:
        losses = {"training loss": self.last_loss, "held-out loss": self.progress.best_eval_loss}
        known = "".join(f", {name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        where = f", adapter in {self.out}" if self.out is not None else ""
        return f"<RunResult {self.reason}: {self.progress.step:,} steps{known}{where}>"


class Recorder:
    """Writes events to metrics.jsonl and the trackers, and collects the numbers of the summary."""

    def __init__(
        self,
        config: RunConfig,
        out: Path | None,
        dataset: Dataset,
        resume_step: int | None,
        begin: Callable[[Path], None],
    ) -> None:
        """Starts the files of a run.

        Args:
            resume_step: step from which the run in `out` continues; None for a new run.
            begin: writes the identity of a run that has none.
        """
        self._out, self._forms, self._eval_data = out, dataset.forms, tuple(config.dataset.eval_data)
        self.last_loss: float | None = None
        self.ended: Ended | None = None
        self._tokens, self._seconds = 0.0, 0.0
        self._file: metrics.MetricsFile | None = None
        self._reporters: list[trackers.Reporter] = []
        if out is not None:
            if resume_step is None:
                clear(out)
                begin(out)
                resume.record_data(out, dataset)
            elif not (out / identity.IDENTITY_FILE).exists():  # a run from before there were identities
                begin(out)
            for name in ("README.md", manifest.FILE):  # written last: they mark a complete folder
                atomic.remove(out / name)
            prompting.write(out, dataset.forms)
            atomic.write_text(out / "run.toml", to_toml(replace(config, overwrite=False, resume=False)))
            self._file = metrics.MetricsFile(out / "metrics.jsonl", resume_step)
            self.last_loss = next(reversed(metrics.losses_of(self._file.path)), None)
            self._reporters = trackers.open_all(config.training.log_to, out, asdict(config))

    def record(self, event: Event) -> None:
        """Records one event."""
        match event:
            case StepDone():
                self.last_loss = event.loss if not event.skipped else self.last_loss
                self._tokens += event.tokens
                self._seconds += event.tokens / event.tokens_per_second
                self._write(asdict(event), event.step)
            case Evaluated(step=step, eval_loss=eval_loss, metrics=measured):
                self._write({"step": step, "eval_loss": eval_loss, **measured}, step)
            case Ended():
                self.ended = event
                for reporter in self._reporters:
                    reporter.close()

    @property
    def unusable(self) -> bool:
        """True if the run has ended with an adapter that is not finite, and no earlier one is saved."""
        return self._kept_step is None

    @property
    def _kept_step(self) -> int | None:
        """Step of the best adapter on held-out data, else of the last finite one, else None."""
        assert self.ended is not None
        progress = self.ended.progress
        last = progress.step if self.ended.finite else self.ended.saved_step
        return last if progress.best_step is None else progress.best_step

    def forget_lost_best(self, run_id: str) -> list[str]:
        """Keeps the last adapter if the checkpoint of the best one is damaged. Returns a note, or nothing."""
        assert self.ended is not None
        assert self._out is not None
        progress = self.ended.progress
        here = checkpoint.at_step(self._out / "checkpoints", progress.step)
        lost = checkpoint.lost_best(here, progress, run_id)
        if lost is None:
            return []
        without = replace(progress, best_step=None, best_eval_loss=None)
        self.ended = replace(self.ended, progress=without)
        return [
            f"{lost}; this best adapter (held-out loss {progress.best_eval_loss:.4f}) is lost, the last one is kept"
        ]

    @property
    def tokens_per_second(self) -> float:
        """Speed of all steps of this process, without evaluations and saving."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def result(self, device: torch.device) -> RunResult:
        """Summary of the run, which ran on `device`."""
        assert self.ended is not None
        progress = self.ended.progress
        kept = self._kept_step
        if kept is None:
            raise TrainingError(
                f"the adapter had infinite or NaN values at step {progress.step}, before the first checkpoint, so "
                "nothing is saved; try a lower --learning-rate"
            )
        return RunResult(
            reason=self.ended.reason,
            progress=progress,
            last_loss=self.last_loss,
            out=self._out,
            kept_step=kept,
            tokens_per_second=self.tokens_per_second,
            peak_memory_bytes=peak_memory_bytes(device),
            forms=self._forms,
            eval_data=self._eval_data,
        )

    def _write(self, values: dict[str, Any], step: int) -> None:
        if self._file is not None:
            self._file.append(values)
        scalars = {k: float(v) for k, v in values.items() if k != "step"}
        for reporter in self._reporters:
            reporter.log(scalars, step)


def check_output(config: RunConfig, out: Path) -> None:
    """Raises OutputError if `out` cannot take a new run."""
    atomic.check_new(out, overwrite=config.overwrite)
    if out.is_dir() and atomic.holds_files(out) and not holds_run(out):
        raise OutputError(f"{out}: contains files that are not a run; --overwrite replaces runs only")


def holds_run(out: Path) -> bool:
    """True if `out` holds files of a run, also if it is damaged or its process was killed."""
    marks = (*_MARKS, *_ADAPTER, "metrics.jsonl", "checkpoints/data.json")
    return any(os.path.lexists(out / name) for name in marks) or bool(checkpoint.all_in(out / "checkpoints"))


def clear(out: Path) -> None:
    """Removes the files of an earlier run from `out`, and no others. Raises OutputError: one cannot be removed."""
    for name in (*_OURS, *_OTHERS, *_MARKS):
        atomic.remove(out / name)
    atomic.remove_leftovers(out)


def describe(
    config: RunConfig,
    dataset: Dataset,
    result: RunResult,
    lora: LoraConfig,
    parameters: int,
    device: torch.device,
    run_id: str,
) -> None:
    """Writes manifest, plot and then the model card into `result.out`, which already contains the adapter.

    Args:
        lora: configuration of the adapter.
        parameters: number of trained parameters.
        device: device of the run.
    """
    out = result.out
    assert out is not None
    manifest.write(out, run_id, result.kept_step, (*_ADAPTER, prompting.FILE))
    metrics.plot(metrics.read(out / "metrics.jsonl"), out / "loss.png", f"{out.name} on {Path(config.model).name}")
    facts = _card_facts(config, dataset, result, lora, parameters, device)
    atomic.write_text(out / "README.md", render_card(facts))


def _card_facts(
    config: RunConfig, dataset: Dataset, result: RunResult, lora: LoraConfig, parameters: int, device: torch.device
) -> CardFacts:
    training, progress = config.training, result.progress
    results = {}
    if progress.best_eval_loss is not None:
        results["held-out loss"] = f"{progress.best_eval_loss:.4f} nats per trained token, at step {result.kept_step}"
    if result.last_loss is not None:
        results["training loss, last step"] = f"{result.last_loss:.4f} nats per trained token"
    assert result.out is not None
    held_out = _data_facts(config.dataset.eval_data, dataset.eval, dataset)
    return CardFacts(
        name=result.out.name,
        base_model=config.model,
        without_template=prompting.without_template(dataset.forms),
        precision=config.precision,
        lora=lora,
        trainable_parameters=parameters,
        file_bytes=(result.out / "adapter_model.safetensors").stat().st_size,
        train_data=_data_facts(config.data, dataset.train, dataset),
        eval_data=held_out,
        results=results,
        settings={
            "learning rate": f"{training.rate:g}, {training.lr_scheduler_type}{_why_this_rate(result.out)}",
            "warm-up": f"{training.warmup_ratio:g} of the steps",
            "tokens per row": f"{config.dataset.row_tokens:,}",
            "rows per step": f"{training.rows_per_step}",
            "weight decay": f"{training.weight_decay:g}",
            "seed": f"{training.seed}",
        },
        steps=progress.step,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        tokens_per_second=result.tokens_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        device=_device_name(device),
        versions={"loratune": __version__} | {package: version(package) for package in ("torch", "transformers")},
    )


def _data_facts(paths: Sequence[str], examples: Sequence[Example], dataset: Dataset) -> tuple[DataFacts, ...]:
    """For each file: its name without the folder, its number of examples, and its hash."""
    counts = Counter(example.source.rpartition(":")[0] for example in examples)
    return tuple(DataFacts(Path(path).name, counts[path], dataset.file_hashes.get(path)) for path in paths)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def record_rates(out: Path, choice: RateChoice) -> None:
    """Stores the trials of the learning rate, for the card."""
    atomic.write_text(out / RATES_FILE, atomic.to_json({"why": choice.why, **asdict(choice)}))


def _why_this_rate(out: Path) -> str:
    """The card's addition to a learning rate that was chosen by trials."""
    try:
        found = json.loads(foreign.regular(out / RATES_FILE).read_bytes())
        losses = {
            float(rate): "diverged" if loss is None else f"{loss:.4g}" for rate, loss in found["losses"].items()
        }
        tried = ", ".join(f"{rate:g}: {loss}" for rate, loss in losses.items())
        measured = "held-out" if found["held_out"] else "training"
        return f"; {found['why']} ({measured} loss of the base {found['base_loss']:.4g}, then {tried})"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "; chosen by trials, whose record is damaged"
