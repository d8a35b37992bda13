"""`loratune train`: one adapter. Settings are defaults, then the TOML file of -c, then flags."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from tyro.conf import OmitArgPrefixes

from loratune import ahead
from loratune.cli import process
from loratune.cli.common import DataNames, Folder, ModelName, as_plain, module_names, parse, take_option
from loratune.cli.options import options_of, translate
from loratune.cli.printed import commented_toml
from loratune.config import DataConfig, LoraConfig, RunConfig, TrainConfig, check_values, read_toml
from loratune.errors import ConfigError, nearest


@dataclass(kw_only=True)
class TrainArguments(RunConfig):
    """Train one adapter. A flag overrides the file of -c, and the file overrides the defaults."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "out",
        "learning_rate",
        "epochs",
        "max_steps",
        "r",
        "lora_alpha",
        "target_modules",
        "target_parameters",
        "precision",
        "memory",
        "tokens_per_row",
        "gradient_accumulation_steps",
        "eval_data",
        "resume",
        "overwrite",
        "config",
        "print_config",
    )
    """Settings that --help shows; --help-all shows all."""

    model: ModelName
    data: DataNames
    out: Folder
    lora: OmitArgPrefixes[LoraConfig] = field(default_factory=LoraConfig)
    dataset: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    training: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["-c"])] = None
    """TOML file with settings, such as the run.toml of another run."""
    print_config: bool = False
    """Print all settings as a TOML file, and do not train. Settings without a value are comments."""


def run(words: list[str]) -> int:
    """Trains an adapter and shows its progress, or prints the settings. Returns the exit status."""
    given = parse_arguments(words)
    config = as_run_config(given)
    process.grow_cuda_segments()
    if given.print_config:
        print(commented_toml(config), end="")
        return 0
    ahead.read_ahead(config.model)
    with process.library_imports():
        from loratune.runs.run import run as train
        from loratune.screen import progress

    console = process.console()
    with process.stop_on_signals(console) as stop:
        events = train(config, stop, process.cache_dir(config.dataset.cache_dir))
        result = progress.watch(events, console)
        progress.summary(result, console)
    return process.INTERRUPTED if result.reason == "interrupted" else 0


def parse_config(words: list[str]) -> RunConfig:
    """The settings of a run from the words after `train`. Raises ConfigError as `parse_arguments`."""
    return as_run_config(parse_arguments(words))


def parse_arguments(words: list[str]) -> TrainArguments:
    """The arguments from the words after `train`.

    With --resume and no -c, the file is `run.toml` of the output folder, so `--resume --out DIR` is enough.
    Raises: ConfigError: a setting is unknown or out of range, or there is no run to resume.
    """
    words = translate(words, options_of(TrainArguments), "train")
    words, file = take_option(words, "-c", "--config")
    if file is None and "--resume" in words:
        _, out = take_option(words, "--out")
        file = _run_file(out) if out else None
    default = None
    if file is not None:
        values = check_values(RunConfig, read_toml(file), file)
        required: dict[str, Any] = dict.fromkeys(("model", "data", "out"), tyro.MISSING)
        default = TrainArguments(**(required | values))
    return parse(TrainArguments, words, "train", default)


def as_run_config(given: TrainArguments) -> RunConfig:
    """The settings of the run, without the arguments that only the command line has."""
    config = as_plain(RunConfig, given)
    lora = config.lora
    modules = {
        "target_modules": module_names(lora.target_modules),
        "target_parameters": module_names(lora.target_parameters),
        "exclude_modules": module_names(lora.exclude_modules),
    }
    return replace(config, lora=replace(lora, **modules))  # type: ignore[arg-type]


def _run_file(out: str) -> str:
    file = Path(out) / "run.toml"
    if not file.is_file():
        near = nearest(file.parent.name, [run.parent.name for run in file.parent.parent.glob("*/run.toml")])
        again = "" if near or not file.parent.is_dir() else " Start the run again with --overwrite"
        raise ConfigError(f"{out}: no run to resume: there is no run.toml.{near}{again}")
    return str(file)
