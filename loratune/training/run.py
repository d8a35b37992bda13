"""One run from settings to a finished output folder: checks, data, model, adapter, training, and what it leaves.

The order is that of cost: what can be wrong is found out before the next more expensive thing begins. The folder
describes itself: the adapter in PEFT format, `run.toml` to run it again, `metrics.jsonl`, `loss.png`, the model card
and the checkpoints. Later commands need nothing else.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune import __version__, atomic
from loratune.base import load as base
from loratune.base.forward import prepare as prepare_forward
from loratune.config import DataConfig, RunConfig, TrainConfig, to_toml
from loratune.data.examples import Example
from loratune.data.feed import Dataset, EpochRows, prepare, rows_of_epoch
from loratune.data.pack import fullness
from loratune.errors import AdapterError, ConfigError, OutputError, TrainingError
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import Attached, activate, active, attach, config_of, detach, trainable_parameters
from loratune.training import checkpoint, metrics, resume, trackers
from loratune.training.card import CardFacts, DataFacts, render_card
from loratune.training.checkpoint import Progress
from loratune.training.course import MAX_SKIPPED_IN_A_ROW, Evaluated, Reason, Rows, StepDone
from loratune.training.evaluation import pad_id
from loratune.training.loop import Ended, Event, Loop, RunsSlower, peak_memory_bytes

ADAPTER = "default"
"""Name of the adapter that `run` trains; PEFT puts one of this name at the top of its folder."""

_OURS = ("adapter_config.json", "adapter_model.safetensors", "run.toml", "metrics.jsonl", "loss.png", "README.md")


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person should know, one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything is checked and ready; the first step comes next."""

    attached: Attached | None
    """None when a run is resumed."""
    dataset: Dataset
    rows_per_epoch: int
    fullness: float
    """Share of the rows' tokens that are documents, not padding."""
    total_steps: int
    resumed_at: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    reason: Reason
    progress: Progress
    last_loss: float | None
    out: Path | None
    kept_step: int
    """The step whose adapter is in the model and in the folder: the best on held-out data, or the last."""
    tokens_per_second: float
    peak_memory_bytes: int


RunEvent = Event | Note | Prepared | RunResult


def run(
    config: RunConfig, stop: Callable[[], bool] = lambda: False, cache_dir: str | None = None
) -> Iterator[RunEvent]:
    """Trains one adapter as `config` says, into `config.out`; the last event is a `RunResult`.

    Args:
        config: the settings of the run.
        stop: asked after every step; True saves a checkpoint and ends the run.
        cache_dir: folder for rendered data, None for no cache.

    Raises: LoratuneError: something a user can mend; nothing is overwritten or left half-written.
    """
    try:
        yield from _run(config, stop, cache_dir)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory; lower --tokens-per-row (now {config.dataset.tokens_per_row}) and raise "
            "--gradient-accumulation-steps as much, which trains the same tokens a step. What was saved is whole"
        ) from error


def _run(config: RunConfig, stop: Callable[[], bool], cache_dir: str | None) -> Iterator[RunEvent]:
    """`run`, but for a GPU that is too small."""
    out = Path(config.out)
    resume_from: Path | None = None
    if config.resume:
        resume_from, notes = resume.find_checkpoint(config)
        yield from map(Note, notes)
    else:
        _check_output(config, out)
    trackers.require(config.training.log_to)
    tokenizer = base.load_tokenizer(config.model, config.dataset.chat_template)
    model = base.load(config.model, config.precision, config.device)
    if resume_from is None:
        attached = attach(model, config.lora, name=ADAPTER, seed=config.training.seed)
    else:
        attached = None
        load_adapter(model, resume_from, name=ADAPTER)
    activate(model, ADAPTER)
    dataset = _dataset(model, tokenizer, config.data, config.dataset, config.training.seed, cache_dir)
    yield from _train(model, tokenizer, dataset, config, attached, out, resume_from, stop)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Sequence[str],
    training: TrainConfig | None = None,
    *,
    dataset: DataConfig | None = None,
    out: str | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
) -> RunResult:
    """Trains the active adapter of a model that is in memory.

    Args:
        model: a causal language model with exactly one active adapter, see `attach`.
        tokenizer: the model's, with a chat template if the data are conversations.
        data: training files.
        training, dataset: settings; the defaults are those of the command line.
        out: folder that gets everything `loratune train` leaves; None writes nothing.
        on_event: called with every step, evaluation and note.

    Returns: how it ended; the model holds the adapter that was best on held-out data, or the last one.
    Raises: AdapterError: not exactly one adapter is active. DataError, OutputError, TrainingError.
    """
    names = active(model)
    if len(names) != 1:
        raise AdapterError(f"{len(names)} adapters are active; attach() one, or activate() the one to train")
    paths = [data] if isinstance(data, str) else list(data)
    settings = dataset or DataConfig()
    config = RunConfig(
        model=str(model.name_or_path or type(model).__name__),
        data=paths,
        out=out or "(memory)",
        lora=config_of(model, names[0]),
        dataset=settings,
        training=training or TrainConfig(),
    )
    folder = Path(out) if out is not None else None
    if folder is not None:
        atomic.check_new(folder, overwrite=False)
    prepared = _dataset(model, tokenizer, paths, settings, config.training.seed, settings.cache_dir or None)
    result: RunResult | None = None
    for event in _train(model, tokenizer, prepared, config, None, folder, None, lambda: False):
        if isinstance(event, RunResult):
            result = event
        if on_event is not None:
            on_event(event)
    assert result is not None
    return result


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    config: RunConfig,
    attached: Attached | None,
    out: Path | None,
    resume_from: Path | None,
    stop: Callable[[], bool],
) -> Iterator[RunEvent]:
    """Everything after loading: the loop between preparation and what is left behind."""
    (name,) = active(model)
    if attached is not None and attached.left_out:
        yield Note(f"{len(attached.left_out)} layers are not adapted: {attached.left_out[0]}")
    for text in dataset.notes:
        yield Note(text)
    forward = prepare_forward(model)
    for text in forward.notes:
        yield Note(text)
    parameters = trainable_parameters(model)
    rows = _rows(tokenizer, dataset, config)
    lengths = [len(example) for example in dataset.train]
    loop = Loop(forward, name, parameters, rows, config.training, out and out / "checkpoints", stop)
    if resume_from is not None:
        loop.resume(resume_from)
        assert out is not None
        resume.check_data(out, dataset)
        if loop.finished and (out / "README.md").exists():
            raise ConfigError(
                f"{out}: this run is complete ({loop.progress.step} steps); raise --epochs, --max-steps or, if it "
                "stopped early, --early-stopping-patience to go on"
            )
    yield Prepared(
        attached,
        dataset,
        loop.rows_per_epoch,
        fullness(lengths, loop.rows_per_epoch, config.dataset.tokens_per_row),
        loop.total_steps,
        loop.progress.step,
        str(model.device),
        str(model.dtype).removeprefix("torch."),
    )
    recorder = _Recorder(config, out, dataset, None if resume_from is None else loop.progress.step)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    model.eval()
    best: dict[str, torch.Tensor] = {}  # kept in memory where there is no folder with checkpoints
    for event in loop.run():
        recorder.record(event)
        if out is None and isinstance(event, Evaluated) and event.best:
            best = {path: parameter.detach().clone() for path, parameter in parameters.items()}
        yield Note(event.why) if isinstance(event, RunsSlower) else event
    with torch.no_grad():
        for path, values in best.items():
            parameters[path].copy_(values)
    result = _finish(model, name, dataset, config, out, recorder)
    yield result
    if result.reason == "diverged":
        raise TrainingError(
            f"the loss was not finite in {MAX_SKIPPED_IN_A_ROW} steps one after the other, up to step "
            f"{result.progress.step}; the last good adapter is kept. Try a lower --learning-rate"
        )


class _Recorder:
    """Writes metrics.jsonl and the trackers as events pass, and remembers what the summary needs."""

    def __init__(self, config: RunConfig, out: Path | None, dataset: Dataset, resume_step: int | None) -> None:
        self.last_loss: float | None = None
        self.ended: Ended | None = None
        self._tokens, self._seconds = 0.0, 0.0
        self._file: metrics.MetricsFile | None = None
        self._reporters: list[trackers.Reporter] = []
        if out is not None:
            if resume_step is None:
                _clear(out)
                resume.record_data(out, dataset)
            (out / "README.md").unlink(missing_ok=True)  # comes last: a folder that has it is complete
            atomic.write_text(out / "run.toml", to_toml(replace(config, overwrite=False, resume=False)))
            self._file = metrics.MetricsFile(out / "metrics.jsonl", resume_step)
            self.last_loss = next(reversed(metrics.losses_of(self._file.path)), None)
            self._reporters = trackers.open_all(config.training.log_to, out, asdict(config))

    def record(self, event: Event) -> None:
        """Takes note of one event."""
        match event:
            case StepDone():
                self.last_loss = event.loss if not event.skipped else self.last_loss
                self._tokens += event.tokens
                self._seconds += event.tokens / event.tokens_per_second
                self._write(asdict(event), event.step)
            case Evaluated(step=step, eval_loss=eval_loss):
                self._write({"step": step, "eval_loss": eval_loss}, step)
            case Ended():
                self.ended = event
                for reporter in self._reporters:
                    reporter.close()

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process, evaluations and saving left out."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def _write(self, values: dict[str, Any], step: int) -> None:
        if self._file is not None:
            self._file.append(values)
        scalars = {k: float(v) for k, v in values.items() if k != "step"}
        for reporter in self._reporters:
            reporter.log(scalars, step)


def _check_output(config: RunConfig, out: Path) -> None:
    """Raises OutputError if a new run may not be written to `out`."""
    atomic.check_new(out, overwrite=config.overwrite)
    holds_a_run = any((out / name).is_file() for name in ("run.toml", "adapter_config.json"))
    if out.is_dir() and any(out.iterdir()) and not holds_a_run:
        raise OutputError(f"{out}: holds something that is not a run; --overwrite replaces runs only")


def _clear(out: Path) -> None:
    """Removes what an earlier run left in `out`, and nothing else."""
    for name in _OURS:
        (out / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)


def _dataset(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[str],
    settings: DataConfig,
    seed: int,
    cache_dir: str | None,
) -> Dataset:
    return prepare(
        paths,
        tokenizer,
        settings,
        stop_ids=base.stop_ids(model, tokenizer),
        max_tokens=base.max_document_tokens(model.config),
        seed=seed,
        cache_dir=cache_dir,
    )


def _rows(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, config: RunConfig) -> Rows:
    pad = pad_id(tokenizer)
    tokens_per_row, seed = config.dataset.tokens_per_row, config.training.seed

    def of_epoch(epoch: int) -> EpochRows:
        return rows_of_epoch(dataset.train, tokens_per_row, pad, seed=seed, epoch=epoch)

    return Rows(of_epoch, rows_of_epoch(dataset.eval, tokens_per_row, pad, seed=0, epoch=0))


def _finish(
    model: PreTrainedModel, name: str, dataset: Dataset, config: RunConfig, out: Path | None, recorder: _Recorder
) -> RunResult:
    """Puts the best adapter into the model and the folder, and writes the plot and the model card."""
    ended = recorder.ended
    assert ended is not None
    progress = ended.progress
    kept = progress.step if progress.best_step is None else progress.best_step
    result = RunResult(
        reason=ended.reason,
        progress=progress,
        last_loss=recorder.last_loss,
        out=out,
        kept_step=kept,
        tokens_per_second=recorder.tokens_per_second,
        peak_memory_bytes=peak_memory_bytes(model.device),
    )
    if out is None:
        return result
    if kept != progress.step:
        detach(model, name)
        load_adapter(model, checkpoint.at_step(out / "checkpoints", kept), name=name)
        activate(model, name)
    save(model, out, name, overwrite=True)
    metrics.plot(metrics.read(out / "metrics.jsonl"), out / "loss.png", f"{out.name} on {Path(config.model).name}")
    atomic.write_text(out / "README.md", render_card(_card_facts(model, name, dataset, config, result)))
    return result


def _card_facts(
    model: PreTrainedModel, name: str, dataset: Dataset, config: RunConfig, result: RunResult
) -> CardFacts:
    training, progress = config.training, result.progress
    results = {}
    if progress.best_eval_loss is not None:
        results["held-out loss"] = f"{progress.best_eval_loss:.4f} nats per trained token, at step {result.kept_step}"
    if result.last_loss is not None:
        results["training loss, last step"] = f"{result.last_loss:.4f} nats per trained token"
    assert result.out is not None
    parameters = trainable_parameters(model).values()
    held_out = _data_facts(config.dataset.eval_data, dataset.eval, dataset)
    return CardFacts(
        name=result.out.name,
        base_model=config.model,
        lora=config_of(model, name),
        trainable_parameters=sum(p.numel() for p in parameters),
        file_bytes=(result.out / "adapter_model.safetensors").stat().st_size,
        train_data=_data_facts(config.data, dataset.train, dataset),
        eval_data=held_out,
        results=results,
        settings={
            "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}",
            "warm-up": f"{training.warmup_ratio:g} of the steps",
            "tokens per row": f"{config.dataset.tokens_per_row:,}",
            "rows per step": f"{training.gradient_accumulation_steps}",
            "weight decay": f"{training.weight_decay:g}",
            "seed": f"{training.seed}",
        },
        steps=progress.step,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        tokens_per_second=result.tokens_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        device=_device_name(model.device),
        versions={"loratune": __version__} | {package: version(package) for package in ("torch", "transformers")},
    )


def _data_facts(paths: Sequence[str], examples: Sequence[Example], dataset: Dataset) -> tuple[DataFacts, ...]:
    """What the card says of each file: its name without its folder, how many examples came of it, and its hash."""
    counts = Counter(example.source.rpartition(":")[0] for example in examples)
    return tuple(DataFacts(Path(path).name, counts[path], dataset.file_hashes.get(path)) for path in paths)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
