"""One run from settings to a finished output folder: checks, model, adapter, data, training, results.

Cheap checks come first, so an error appears before any more expensive work. `runs.folder` writes the output folder.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune import atomic, lock
from loratune.base import identity
from loratune.base import load as base
from loratune.base.forward import PackedForward
from loratune.base.forward import prepare as prepare_forward
from loratune.base.identity import BaseIdentity, RunIdentity
from loratune.config import DataConfig, RunConfig, TrainConfig, from_dict, read_toml
from loratune.data.feed import Dataset, EpochRows, prepare, rows_of_epoch
from loratune.data.memory import TableOfRecords, as_sources
from loratune.data.pack import fullness
from loratune.data.render import with_date
from loratune.errors import AdapterError, ConfigError, ModelError, TrainingError, expect
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import Attached, activate, active, attach, config_of, detach, trainable_parameters
from loratune.many.rate import RateChoice, RateTrial, choose_rate
from loratune.memory.fit import FittedPlan, check_limit, fit, memory_cap
from loratune.precision.linear import form_in_memory, mostly_dense
from loratune.runs import folder, resume, trackers
from loratune.runs.evaluation import pad_id
from loratune.runs.folder import Recorder, RunResult
from loratune.runs.resume import ResumedRun
from loratune.training import checkpoint, choices
from loratune.training.choices import SettingChoice
from loratune.training.course import MAX_SKIPPED_IN_A_ROW, Evaluated, Rows
from loratune.training.loop import Event, Loop, RunsSlower

ADAPTER = "default"
"""Name of the trained adapter. PEFT stores an adapter of this name at the top of its folder."""


Data = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]] | TableOfRecords
"""Files, hub ids, or records in memory."""


@dataclass(frozen=True, slots=True)
class Note:
    """Information for the user, one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """All checks have passed; the first step follows."""

    attached: Attached | None
    """Report of `attach`; None when a run is resumed."""
    dataset: Dataset
    rows_per_epoch: int
    fullness: float
    """Share of the rows' tokens that are documents, not padding."""
    total_steps: int
    resumed_at: int
    device: str
    dtype: str
    fit: FittedPlan
    """Saved activations, and their memory."""
    choices: tuple[SettingChoice, ...] = ()
    """Settings that were chosen because the user has not set them."""


RunEvent = Event | Note | Prepared | RateTrial | RateChoice | RunResult


def run(
    config: RunConfig, stop: Callable[[], bool] = lambda: False, cache_dir: str | None = None
) -> Iterator[RunEvent]:
    """Trains one adapter into `config.out`; the last event is a `RunResult`.

    Args:
        config: the settings of the run.
        stop: called after every step; True saves a checkpoint and ends the run.
        cache_dir: folder for rendered data, None for no cache.

    Raises: LoratuneError: an error that the user can fix; no file is overwritten or left incomplete.
    """
    try:
        yield from _run(config, stop, cache_dir)
    except torch.OutOfMemoryError as error:
        row = config.dataset.tokens_per_row
        now = f"(now {row})" if row is not None else "(chosen from the data)"
        raise TrainingError(
            f"out of GPU memory; lower --tokens-per-row {now} and raise --gradient-accumulation-steps as much, "
            "which trains the same tokens per step. Saved checkpoints are complete"
        ) from error


def _run(config: RunConfig, stop: Callable[[], bool], cache_dir: str | None) -> Iterator[RunEvent]:
    """`run` without the translation of out-of-memory errors, and under the lock of the folder."""
    out = Path(config.out)
    if not (config.resume or out.is_dir()):
        folder.check_output(config, out)
    with lock.hold(out) if out.is_dir() or not config.resume else nullcontext():
        atomic.remove_leftovers(out)
        atomic.remove_leftovers(out / "checkpoints")
        if config.resume:
            yield from _resumed_run(config, stop, cache_dir)
        else:
            folder.check_output(config, out)  # under the lock, as another process may have finished a run here
            yield from _locked_run(config, stop, cache_dir, None)


def _resumed_run(config: RunConfig, stop: Callable[[], bool], cache_dir: str | None) -> Iterator[RunEvent]:
    """Finds the run and its newest intact checkpoint, and continues."""
    found = resume.find_run(_with_known_choices(config))
    yield from map(Note, found.notes)
    yield from _locked_run(found.config, stop, cache_dir, found)


def _locked_run(
    config: RunConfig, stop: Callable[[], bool], cache_dir: str | None, resumed: ResumedRun | None
) -> Iterator[RunEvent]:
    """Loads and prepares everything, then trains."""
    out, resume_from = Path(config.out), None if resumed is None else resumed.checkpoint
    trackers.require(config.training.log_to)
    check_limit(config.training, base.device_of(config.device))
    tokenizer = base.load_tokenizer(
        config.model, config.dataset.chat_template, trust_remote_code=config.trust_remote_code
    )
    if resumed is not None:
        resume.check_base(out, resumed.identity, identity.describe(config.model))
    config = replace(config, dataset=with_date(config.dataset, tokenizer))
    model = base.load(config.model, config.precision, config.device, trust_remote_code=config.trust_remote_code)
    described = identity.describe(config.model)
    if resumed is not None:
        resume.check_base(out, resumed.identity, described)  # a hub id has files only now
    by_trials = config.training.learning_rate == "auto"  # trials need the base without an adapter
    attached = None if by_trials else _adapter(model, config, resume_from)
    dataset = dataset_of(model, tokenizer, config.data, config.dataset, config.training.seed, cache_dir)
    config, chosen = completed(config, dataset, model.config)
    choice: RateChoice | None = None
    if by_trials:
        choice = yield from _choose_rate(model, tokenizer, config, dataset)
        config = replace(config, training=replace(config.training, learning_rate=choice.rate))
        attached = _adapter(model, config, resume_from)
    forward, fitted = _fitted(model, config)
    before = None if resumed is None else resumed.identity
    known = identity.of_run(described, tokenizer, dataset.file_hashes, before)
    yield from _train(
        forward, fitted, tokenizer, dataset, config, attached, out, resume_from, stop, choice, chosen, known
    )


def _adapter(model: PreTrainedModel, config: RunConfig, resume_from: Path | None) -> Attached | None:
    """Attaches a new adapter, or loads the one of a checkpoint (and returns None), and makes it active."""
    attached: Attached | None = None
    if resume_from is None:
        attached = attach(model, config.lora, name=ADAPTER, seed=config.training.seed)
    else:
        load_adapter(model, resume_from, name=ADAPTER)
    activate(model, ADAPTER)
    return attached


def _choose_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, dataset: Dataset
) -> Generator[RunEvent, None, RateChoice]:
    rows = rows_of(tokenizer, dataset, config)
    for event in choose_rate(model, config.lora, config.training, rows, config.dataset.row_tokens):
        yield event
    assert isinstance(event, RateChoice)
    return event


def _with_known_choices(config: RunConfig) -> RunConfig:
    """Resumes a run with the settings that were chosen for it at its start."""
    file = Path(config.out) / "run.toml"
    if not file.is_file():
        return config
    known = from_dict(RunConfig, read_toml(str(file)), str(file))
    training, dataset = config.training, config.dataset
    rate, rows = training.learning_rate, training.gradient_accumulation_steps
    training = replace(
        training,
        learning_rate=known.training.learning_rate if rate in (None, "auto") else rate,
        epochs=training.epochs or known.training.epochs,
        gradient_accumulation_steps=rows or known.training.gradient_accumulation_steps,
    )
    dataset = replace(
        dataset,
        tokens_per_row=dataset.tokens_per_row or known.dataset.tokens_per_row,
        template_date=dataset.template_date or known.dataset.template_date,
    )
    return replace(config, training=training, dataset=dataset)


def completed(config: RunConfig, dataset: Dataset, model_config: Any) -> tuple[RunConfig, tuple[SettingChoice, ...]]:
    """The settings with a value for each that was unset, and the choices; see `training.choices`."""
    train, held_out = ([len(example) for example in part] for part in (dataset.train, dataset.eval))
    chosen = choices.choose(config.dataset, config.training, train, held_out, choices.width_of(model_config))
    return replace(config, dataset=chosen.data, training=chosen.training), chosen.choices


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    training: TrainConfig | None = None,
    *,
    dataset: DataConfig | None = None,
    eval_data: Data | None = None,
    out: str | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
) -> RunResult:
    """Trains the active adapter of a model in memory.

    Args:
        model: a causal language model with exactly one active adapter, see `attach`.
        tokenizer: tokenizer of the model, with a chat template if the data are conversations.
        data: training files, a list of dicts, or a `datasets.Dataset`.
        training, dataset: settings, with the defaults of the command line.
        eval_data: held-out data; by default those of `dataset`, which holds out a part of the training records.
        out: folder for the files of `loratune train`; None writes none.
        on_event: called with every event, such as a step or an evaluation.

    Returns: the summary; the model then has the best adapter on held-out data, or the last one.
    Raises: AdapterError: not exactly one adapter is active. ArgumentError: an argument has the wrong type. DataError,
        OutputError, TrainingError.
    """
    _check_types(model, tokenizer, training, dataset)
    if training is not None and training.learning_rate == "auto":
        raise ConfigError('learning_rate "auto" needs a base without adapters: name a number here')
    names = active(model)
    if len(names) != 1:
        raise AdapterError(f"{len(names)} adapters are active; attach() one, or activate() the one to train")
    paths = as_sources(data, "data")
    settings = with_date(dataset or DataConfig(), tokenizer)
    if eval_data is not None:
        settings = replace(settings, eval_data=as_sources(eval_data, "eval_data"))
    config = RunConfig(
        model=str(model.name_or_path or type(model).__name__),
        data=paths,
        out=out or "(memory)",
        lora=config_of(model, names[0]),
        dataset=settings,
        training=training or TrainConfig(),
    )
    where = Path(out) if out is not None else None
    result: RunResult | None = None
    with nullcontext() if where is None or where.is_file() else lock.hold(where):
        if where is not None:
            atomic.check_new(where, overwrite=False)
        prepared = dataset_of(model, tokenizer, paths, settings, config.training.seed, settings.cache_dir or None)
        config, chosen = completed(config, prepared, model.config)
        forward, fitted = _fitted(model, config)
        known = identity.of_run(_described(model), tokenizer, prepared.file_hashes)
        for event in _train(
            forward, fitted, tokenizer, prepared, config, None, where, None, lambda: False, None, chosen, known
        ):
            if isinstance(event, RunResult):
                result = event
            if on_event is not None:
                on_event(event)
    assert result is not None
    return result


def _check_types(model: object, tokenizer: object, training: object, dataset: object) -> None:
    """Raises ArgumentError if an argument of `train` has the wrong type."""
    call = "train(model, tokenizer, data, training)"
    expect(model, PreTrainedModel, "model", call, "load() loads one.")
    expect(tokenizer, PreTrainedTokenizerBase, "tokenizer", call, "load_tokenizer() loads one.")
    for name, value, kind in (("training", training, TrainConfig), ("dataset", dataset, DataConfig)):
        if value is not None:
            expect(value, kind, name, call, f"Write {name}={kind.__name__}(...)")


def _described(model: PreTrainedModel) -> BaseIdentity:
    """The identity of a model in memory, which need not come from files."""
    name = str(model.name_or_path or type(model).__name__)
    try:
        return identity.describe(name)
    except ModelError:
        return BaseIdentity(name, None, None, None)


def _fitted(model: PreTrainedModel, config: RunConfig) -> tuple[PackedForward, FittedPlan]:
    """Prepares the forward and runs one row of full size, to choose the activations to save."""
    forward = prepare_forward(model, config.dataset.row_tokens)
    return forward, fit(forward, trainable_parameters(model), config.training, config.dataset.row_tokens)


def _train(
    forward: PackedForward,
    fitted: FittedPlan,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    config: RunConfig,
    attached: Attached | None,
    out: Path | None,
    resume_from: Path | None,
    stop: Callable[[], bool],
    choice: RateChoice | None,
    choices_made: tuple[SettingChoice, ...],
    known: RunIdentity,
) -> Iterator[RunEvent]:
    """The part of a run after loading: prepares, trains and writes the results."""
    model = forward.model
    (name,) = active(model)
    yield from map(Note, _notes(forward, dataset, attached))
    yield from map(Note, base.stop_note(model, tokenizer, dataset.forms))
    parameters = trainable_parameters(model)
    rows = rows_of(tokenizer, dataset, config)
    lengths = [len(example) for example in dataset.train]
    loop = Loop(forward, name, parameters, rows, config.training, out and out / "checkpoints", stop, known.run)
    if resume_from is not None:
        loop.resume(resume_from)
        assert out is not None
        resume.check_data(out, dataset)
        resume.check_unfinished(out, loop.progress.step, finished=loop.finished)
    full = fullness(lengths, loop.rows_per_epoch, config.dataset.row_tokens)
    yield from map(Note, choices.remarks(full, loop.total_steps, config.dataset.row_tokens, max(lengths)))
    yield Prepared(
        attached,
        dataset,
        loop.rows_per_epoch,
        full,
        loop.total_steps,
        loop.progress.step,
        str(model.device),
        form_in_memory(model),
        fitted,
        choices_made,
    )
    recorder = Recorder(
        config,
        out,
        dataset,
        None if resume_from is None else loop.progress.step,
        lambda folder: identity.write(folder, known, tokenizer),
    )
    if choice is not None and out is not None:
        folder.record_rates(out, choice)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    model.eval()
    best: dict[str, torch.Tensor] = {}  # in memory, for runs without a folder
    with memory_cap(config.training, model.device):
        for event in loop.run():
            recorder.record(event)
            if out is None and isinstance(event, Evaluated) and event.best:
                best = {path: parameter.detach().clone() for path, parameter in parameters.items()}
            yield Note(event.why) if isinstance(event, RunsSlower) else event
    with torch.no_grad():
        for path, values in best.items():
            parameters[path].copy_(values)
    result, notes = _finish(model, name, dataset, config, out, recorder, known.run)
    yield from map(Note, notes)
    yield result
    if result.reason == "diverged":
        assert recorder.ended is not None
        raise TrainingError(_why_diverged(result, finite=recorder.ended.finite))


def _why_diverged(result: RunResult, *, finite: bool) -> str:
    skipped = f"the loss was not finite in {MAX_SKIPPED_IN_A_ROW} consecutive steps, up to step"
    why = skipped if finite else "the adapter had infinite or NaN values at step"
    return (
        f"{why} {result.progress.step}; the last good adapter, of step {result.kept_step}, is saved. Try a lower "
        "--learning-rate"
    )


def _notes(forward: PackedForward, dataset: Dataset, attached: Attached | None) -> Iterator[str]:
    """Remarks about the adapter, the base, the data and the forward."""
    if attached is not None:
        if attached.left_out:
            yield f"not adapted, first of {len(attached.left_out)} reasons: {attached.left_out[0]}"
        yield from attached.notes
    if (share := mostly_dense(forward.model)) is not None:
        yield share
    yield from dataset.notes
    yield from forward.notes


def dataset_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[str],
    settings: DataConfig,
    seed: int,
    cache_dir: str | None,
) -> Dataset:
    """Reads and renders the files of a run for its model and tokenizer."""
    return prepare(
        paths,
        tokenizer,
        settings,
        stop_ids=base.stop_ids(model, tokenizer),
        max_tokens=base.max_document_tokens(model),
        vocabulary=base.vocabulary(model),
        seed=seed,
        cache_dir=cache_dir,
    )


def rows_of(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, config: RunConfig) -> Rows:
    """The packed rows of a run."""
    pad = pad_id(tokenizer)
    tokens_per_row, seed = config.dataset.row_tokens, config.training.seed

    def of_epoch(epoch: int) -> EpochRows:
        return rows_of_epoch(dataset.train, tokens_per_row, pad, seed=seed, epoch=epoch)

    return Rows(of_epoch, rows_of_epoch(dataset.eval, tokens_per_row, pad, seed=0, epoch=0))


def _finish(
    model: PreTrainedModel,
    name: str,
    dataset: Dataset,
    config: RunConfig,
    out: Path | None,
    recorder: Recorder,
    run_id: str,
) -> tuple[RunResult, list[str]]:
    """Loads the best adapter into the model, saves it, and writes the plot and the model card. Also returns notes."""
    if out is None:
        return recorder.result(model.device), []
    notes = recorder.forget_lost_best(run_id)
    result = recorder.result(model.device)
    assert recorder.ended is not None
    if result.kept_step != result.progress.step or not recorder.ended.finite:
        detach(model, name)
        load_adapter(model, checkpoint.at_step(out / "checkpoints", result.kept_step), name=name)
        activate(model, name)
    save(model, out, name, overwrite=True)
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    folder.describe(config, dataset, result, config_of(model, name), parameters, model.device, run_id)
    return result, notes
