"""What each verb of the command line takes: one dataclass a verb, its docstrings the help texts.

The settings themselves are those of `config`; here they only learn which of them stand without a flag. Settings of a
section lose their section's name on the command line: `--r 8`, not `--lora.r 8`.
"""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from loratune.config import (
    Activations,
    CombineMethod,
    DataConfig,
    DataFormat,
    DensePrecision,
    LoraConfig,
    MajoritySign,
    Precision,
    RunConfig,
    TrainConfig,
    TrainOn,
    check_values,
    read_toml,
)
from loratune.errors import ConfigError, nearest

T = TypeVar("T")
ModelName = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
DataNames = Annotated[
    Positional[list[str]], tyro.conf.arg(metavar="DATA [DATA ...]", help_behavior_hint="(required)")
]
AdapterFolder = Annotated[Positional[str], tyro.conf.arg(metavar="ADAPTER")]
AdapterFolders = Annotated[
    Positional[list[str]], tyro.conf.arg(metavar="ADAPTER [ADAPTER ...]", help_behavior_hint="(required)")
]
JobsFile = Annotated[Positional[str], tyro.conf.arg(metavar="JOBS.toml")]
Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]


@dataclass(kw_only=True)
class Train(RunConfig):
    """Train one adapter. Settings come from -c FILE (TOML), then from flags; --print-config shows them all."""

    model: ModelName
    data: DataNames
    out: Folder
    lora: OmitArgPrefixes[LoraConfig] = field(default_factory=LoraConfig)
    dataset: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    training: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


@dataclass(kw_only=True)
class Sweep:
    """Train many adapters at once over one base, compare them, and keep each as a run of its own.

    The jobs file has the settings of train: above, what all jobs share; under [grid], lists of what varies;
    under [[job]] tables, what single jobs have of their own; under [halving], at = [0.25, 0.5] and keep = 0.5:

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
    """Number format of the base, as in train; by default what the jobs file says."""
    device: str | None = None
    """Torch device; by default what the jobs file says, else the GPU if there is one."""
    overwrite: bool = False
    """Replace an existing sweep."""
    resume: bool = False
    """Go on with the sweep in the output folder; MODEL and JOBS may then be left out."""

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise ConfigError(f"at_once is {self.at_once}; it is at least 1")


@dataclass(kw_only=True)
class Preview:
    """Show what the model will really see: rendered tokens with the trained ones coloured, lengths, rows."""

    model: ModelName
    """Base model: a local folder, a hub id, or "loratune/pocket"."""
    data: DataNames
    """Training files."""
    examples: int = 3
    """Examples to show in full."""
    seed: int = 0
    """Seed of the held-out split and of packing, as in train."""
    dataset: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _require_data(self.data)


@dataclass(kw_only=True)
class Eval:
    """Measure an adapter on held-out data: loss, perplexity, and exact match of the answers it generates."""

    adapter: AdapterFolder
    """Folder of an adapter, or a base model to measure as it is."""
    data: DataNames
    """Held-out files."""
    model: str | None = None
    """Base model, if it is not where the adapter says."""
    max_new_tokens: int = 256
    """Longest answer to generate."""
    limit: int | None = None
    """Only the first so many records."""
    generate: bool = True
    """Generate answers and compare them; without, only the loss is measured."""
    json: bool = False
    """Print one JSON object instead of a table."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    device: str | None = None
    """Torch device; by default the GPU if there is one."""
    tokens_per_row: int = 2048
    """Tokens in one packed row while the loss is measured."""
    truncate: bool = False
    """Cut what is longer than a row while the loss is measured, as in train."""
    format: DataFormat = "auto"
    """Record layout, as in train."""
    train_on: TrainOn = "assistant"
    """Which tokens the loss sees, as in train."""

    def __post_init__(self) -> None:
        _require_data(self.data)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; it is at least 1")
        DataConfig(tokens_per_row=self.tokens_per_row)  # says what is wrong with it


@dataclass(kw_only=True)
class Chat:
    """Talk to a model with one or several adapters; /help lists what else can be typed."""

    adapters: AdapterFolders
    """Folders of adapters over one base, or a base model alone."""
    model: str | None = None
    """Base model, if it is not where the adapters say."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more varied."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    max_new_tokens: int = 512
    """Longest answer."""
    seed: int | None = None
    """Makes sampled answers repeatable."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    device: str | None = None
    """Torch device; by default the GPU if there is one."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("no adapter or base model given; name at least one folder")


@dataclass(kw_only=True)
class Merge:
    """Write a checkpoint with the adapter merged into the weights, and prove it equal before saying done."""

    adapter: AdapterFolder
    """Folder of the adapter."""
    out: Folder
    """Folder for the merged checkpoint."""
    model: str | None = None
    """Base model, if it is not where the adapter says."""
    data: list[str] = field(default_factory=list)
    """Files whose prompts the comparison runs on; by default those of the run, if they are still there."""
    precision: DensePrecision = "auto"
    """Number format of the merged weights; auto is that of the base's files."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(kw_only=True)
class Quantise:
    """Write a model with its linear layers in 4 bits (NF4, as bitsandbytes does), with its tokenizer."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Base model: a local folder or a hub id."""
    out: Folder
    """Folder for the 4-bit checkpoint."""
    device: str | None = None
    """Torch device to quantise on; by default the GPU if there is one."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(kw_only=True)
class Combine:
    """Make one adapter of several: a weighted sum, exact or cut to a rank, or TIES, DARE, pruning. Needs no base."""

    adapters: AdapterFolders
    """Folders of adapters of one base, ours or PEFT's."""
    out: Folder
    """Folder for the new adapter."""
    weights: list[float] = field(default_factory=list)
    """One for each adapter; by default 1 each."""
    method: CombineMethod = "cat"
    """cat: the exact sum, ranks add up. svd: the nearest of a rank to it. The others are PEFT's, on A and B by
    themselves or, with _svd, on the whole updates."""
    rank: int | None = None
    """Rank of the result of svd and ..._svd; by default the largest of the adapters."""
    density: float | None = None
    """Share of the values that ties, dare and magnitude_prune keep; by default 0.5."""
    majority_sign: MajoritySign = "total"
    """How ties elects a sign: by the sum of the values or by their number."""
    seed: int = 0
    """Of the random draws of dare."""
    model: str | None = None
    """Base model of all, if the adapters record different names of it."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(kw_only=True)
class Resize:
    """Write an adapter with another rank: the nearest of that rank to it, and what that leaves out."""

    adapter: AdapterFolder
    """Folder of the adapter, ours or PEFT's."""
    out: Folder
    """Folder for the new adapter."""
    rank: int
    """Rank of the new adapter."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(kw_only=True)
class Extract:
    """Make an adapter of the difference of two checkpoints, with the error that each rank leaves."""

    tuned: Annotated[Positional[str], tyro.conf.arg(metavar="TUNED")]
    """The fine-tuned model: a local folder or a hub id."""
    base: str
    """The model that it was fine-tuned from."""
    out: Folder
    """Folder for the new adapter."""
    rank: int = 32
    """Rank of the new adapter."""
    target_modules: str | list[str] = "all-linear"
    """Layers to extract, as in train."""
    device: str | None = None
    """Torch device to compute on; by default the GPU if there is one."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(kw_only=True)
class Estimate:
    """Say what a run would need before anything is downloaded: bytes by cause, speed, and what would make it fit."""

    model: ModelName
    """Base model: a local folder (config.json is enough), a hub id, or "loratune/pocket"."""
    gpu: str | None = None
    """A memory size such as 24GiB, or a device such as "RTX 4090"; by default the one here, else the CPU."""
    precision: Precision = "auto"
    """Number format of the base, as in train."""
    activations: Activations = "auto"
    """What layers keep for the backward, as in train."""
    memory: str | None = None
    """The most memory that the run may take; by default all of the device."""
    tokens_per_row: int = 2048
    """Tokens in one packed row, as in train."""
    gradient_accumulation_steps: int = 1
    """Rows in one optimizer step, as in train."""
    data: list[str] = field(default_factory=list)
    """Training files, to say how long one pass over them takes; needs the model's tokenizer."""
    json: bool = False
    """Print one JSON object instead of a table."""
    lora: OmitArgPrefixes[LoraConfig] = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        TrainConfig(memory=self.memory, gradient_accumulation_steps=self.gradient_accumulation_steps)
        DataConfig(tokens_per_row=self.tokens_per_row)  # each says what is wrong with its values


@dataclass(kw_only=True)
class Inspect:
    """Say what an adapter is, what it was trained on, and with which settings."""

    adapter: AdapterFolder
    """Folder of the adapter, ours or PEFT's."""


@dataclass(kw_only=True)
class Demo:
    """The whole journey on the model in the box: train two adapters, switch, merge, prove. No network, no GPU."""

    out: str | None = None
    """Folder to keep the adapters, the plots and demo.json in; by default they are deleted at the end."""
    overwrite: bool = False
    """Replace an existing folder."""


def parse(kind: type[T], words: list[str], verb: str, default: T | None = None) -> T:
    """Builds a verb's arguments. Exits with 2, naming the nearest known option, if the words do not fit.

    Raises: ConfigError: a value is out of range.
    """
    parsed: T = tyro.cli(kind, args=words, prog=f"loratune {verb}", default=default)  # type: ignore[assignment]
    return parsed


def parse_train(words: list[str]) -> RunConfig:
    """The settings of `train`: defaults, then the TOML file of -c, then flags.

    With --resume and no file, `run.toml` of the output folder is the file, so that `--resume --out DIR` says it all.
    """
    words, file = _take_option(words, "-c", "--config")
    if file is None and "--resume" in words:
        _, out = _take_option(words, "--out")
        file = _run_file(out) if out else None
    default = None
    if file is not None:
        values = check_values(RunConfig, read_toml(file), file)
        required: dict[str, Any] = dict.fromkeys(("model", "data", "out"), tyro.MISSING)
        default = Train(**(required | values))
    config = as_plain(RunConfig, parse(Train, words, "train", default))
    lora = config.lora
    modules = {"target_modules": names(lora.target_modules), "exclude_modules": names(lora.exclude_modules)}
    return replace(config, lora=replace(lora, **modules))  # type: ignore[arg-type]


def names(modules: str | list[str] | None) -> str | list[str] | None:
    """A single word of the command line is a name, as each of several is, unless it looks like an expression."""
    return [modules] if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules) else modules


def parse_sweep(words: list[str]) -> Sweep:
    """The settings of `sweep`; with --resume alone, model and jobs are those of the sweep in the output folder."""
    _, out = _take_option(words, "--out")
    alone = "--resume" in words and out is not None and words[0].startswith("-")
    return parse(Sweep, words, "sweep", _begun(out) if alone and out else None)


def _begun(out: str) -> Sweep:
    """What the sweep in `out` was begun with. Raises ConfigError: there is none."""
    from loratune.sweep.folder import JOBS_FILE, STATE_FILE, read_state

    folder = Path(out)
    if not (folder / STATE_FILE).is_file():
        near = [file.parent.name for file in folder.parent.glob(f"*/{STATE_FILE}")]
        raise ConfigError(f"{out}: no sweep to resume: there is no {STATE_FILE}.{nearest(folder.name, near)}")
    state = read_state(folder)
    begun = Sweep(model=state.model, jobs=str(folder / JOBS_FILE), out=out, device=state.device, resume=True)
    return replace(begun, precision=typing.cast(Precision, state.precision))


def _run_file(out: str) -> str:
    """Raises ConfigError: there is no run in `out`."""
    file = Path(out) / "run.toml"
    if not file.is_file():
        near = [run.parent.name for run in file.parent.parent.glob("*/run.toml")]
        raise ConfigError(f"{out}: no run to resume: there is no run.toml.{nearest(file.parent.name, near)}")
    return str(file)


def as_plain(kind: type[T], value: Any) -> T:
    """The fields that `kind` declares, out of an instance of a subclass."""
    return kind(**{f.name: getattr(value, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def _require_data(data: list[str]) -> None:
    if not data:
        raise ConfigError("no data files given")


def _take_option(words: list[str], *names: str) -> tuple[list[str], str | None]:
    """Removes `NAME VALUE` or `NAME=VALUE` from the words."""
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            if equals:
                return words[:at] + words[at + 1 :], value
            if at + 1 == len(words):
                raise ConfigError(f"{name} needs a value")
            return words[:at] + words[at + 2 :], words[at + 1]
    return words, None
