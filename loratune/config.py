"""Every setting of loratune, defined once, with the same name in Python, in TOML and on the command line.

`LoraConfig` has the field names of PEFT's `adapter_config.json`, so nothing is translated when an adapter is saved.
The other groups use the names of transformers' `TrainingArguments` where one exists. Units are part of the name where
needed. This module imports no torch, because `loratune --help` reads it.
"""

from __future__ import annotations

import math
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from loratune import foreign, other_names
from loratune.errors import ConfigError
from loratune.setting_types import check_types, fits, misfit, require
from loratune.short_repr import ShortRepr, is_required
from loratune.tables import FORMATS, OBJECTIVES, PRECISIONS, VARIANTS, chosen_variants, load_entry
from loratune.units import bytes_of, is_date

if TYPE_CHECKING:
    DataFormat = str
else:
    DataFormat = Literal["auto", *FORMATS]

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[*OBJECTIVES]

TrainOn = Literal["assistant", "last", "all"]
DensePrecision = Literal["auto", "float32", "bfloat16", "float16"]
if TYPE_CHECKING:
    Precision = str
else:
    Precision = Literal["auto", "float32", "bfloat16", "float16", *PRECISIONS]
Schedule = Literal["cosine", "linear", "constant"]
Optim = Literal["adamw", "adamw_8bit", "adamw_offload"]
Bias = Literal["none", "all", "lora_only"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Activations = Literal["auto", "none", "selective", "full", "offload"]
CombineMethod = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]


@dataclass(kw_only=True, repr=False)
class LoraConfig(ShortRepr):
    """The adapted layers and the shape of their adapters. Field names as in PEFT's adapter_config.json."""

    r: int = 16
    """Rank of the update: A is (r, d_in), B is (d_out, r)."""
    lora_alpha: float = 32
    """Scaling numerator: the update is (lora_alpha / r) B A, or (lora_alpha / sqrt(r)) B A with use_rslora."""
    lora_dropout: float = 0.0
    """Probability of zeroing an element of the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Names (exact, or the end of a path after a dot), a regular expression matched in full, or "all-linear".
    all-linear: every linear layer but the output head and layers narrower than the rank."""
    target_parameters: str | list[str] | None = None
    """Expert weights held in one Parameter, such as "experts.gate_up_proj" (exact, or the end of a path after a dot);
    each expert gets a pair of its own. "all-experts": every such Parameter that can be adapted. By default none."""
    exclude_modules: str | list[str] | None = None
    """Names or one regular expression of modules to leave out, matched like target_modules."""
    use_rslora: bool = False
    """Rank-stabilised scaling, lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    use_dora: bool = False
    """DoRA: also learn the length of each row of the weight (arXiv:2402.09353). Layers run as modules, not fused."""
    bias: Bias = "none"
    """Bias vectors to train: none, all of the model, or only those of the adapted layers."""
    modules_to_save: list[str] | None = None
    """Modules to train in full and save with the adapter, for example a new classification head."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """True: A Kaiming-uniform, B zero. "gaussian": A normal with std 1/r, B zero.
    "orthogonal": both random, in orthogonal halves of an even rank, so that B A is zero.
    False: both random, so the update is not zero at the start (for tests)."""
    layers_to_transform: list[int] | None = None
    """Indices of the layers to adapt; by default all."""
    layers_pattern: list[str] | None = None
    """Name of the module list that layers_to_transform counts, if it is not the usual one."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression (anchored as the end of a module's path) -> rank, for layers whose rank is not r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression (anchored as the end of a module's path) -> lora_alpha, for layers with another one."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, rank in {
            "r": self.r,
            **{f'rank_pattern["{k}"]': v for k, v in self.rank_pattern.items()},
        }.items():
            require(rank >= 1, f"{name} is {rank}; a rank is at least 1")
        require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}; it lies in 0 <= p < 1")
        for name, alpha in {
            "lora_alpha": self.lora_alpha,
            **{f'alpha_pattern["{k}"]': v for k, v in self.alpha_pattern.items()},
        }.items():
            require(0 < alpha < math.inf, f"{name} is {alpha}; it must be positive and finite")
        named = bool(self.target_modules) or bool(self.target_parameters)
        require(named, 'target_modules is empty; give module names or "all-linear"')


@dataclass(kw_only=True, repr=False)
class DataConfig(ShortRepr):
    """Settings of the data: from records to rows of tokens."""

    format: DataFormat = "auto"
    """Record format; "auto" recognises it from the fields of each file's first record."""
    train_on: TrainOn = "assistant"
    """Tokens that count in the loss: every answer of the assistant, only the last one, or all tokens."""
    tokens_per_row: int | None = None
    """Tokens in one packed row; every micro-step processes exactly this many.
    By default from the data: see gradient_accumulation_steps."""
    truncate: bool = False
    """Cut documents that are longer than a row or the model's context; otherwise they are an error."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out files; by default eval_fraction of the training records is held out."""
    eval_fraction: float = 0.05
    """Share of the training records to hold out if eval_data is empty; 0 holds out nothing."""
    chat_template: str | None = None
    """File with a Jinja chat template, for a tokenizer with no template or a wrong one."""
    template_date: str | None = None
    """Date that chat templates print, such as 2026-11-28; by default the day on which the run begins."""
    num_proc: int | None = None
    """Cores that render and tokenise; by default all for large data, otherwise two. Two cores need one process."""
    cache_dir: str | None = None
    """Folder for rendered data; by default under the user's cache folder. "" turns caching off."""

    def __post_init__(self) -> None:
        check_types(self)
        tokens = self.tokens_per_row
        require(tokens is None or tokens >= 2, f"tokens_per_row is {tokens}; a row holds at least 2 tokens")
        require(0 <= self.eval_fraction < 1, f"eval_fraction is {self.eval_fraction}; it lies in 0 <= share < 1")
        if self.template_date is not None:
            require(is_date(self.template_date), f'template_date is "{self.template_date}"; write YYYY-MM-DD')
        require(self.num_proc is None or self.num_proc >= 1, f"num_proc is {self.num_proc}; it is at least 1")

    @property
    def row_tokens(self) -> int:
        """Tokens in one packed row. An unset value must have been chosen (`training.choices`)."""
        assert self.tokens_per_row is not None
        return self.tokens_per_row


@dataclass(kw_only=True, repr=False)
class TrainConfig(ShortRepr):
    """The optimisation: AdamW on the adapter, warm-up and schedule, evaluation, checkpoints."""

    objective: ObjectiveName = "sft"
    """Loss to minimise: sft, the negative log-likelihood of the trained tokens."""
    learning_rate: float | Literal["auto"] | None = None
    """Peak learning rate; by default from the width of the model.
    "auto" tries several on the first part of the data and uses the best."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: the rate of B is this many times that of A (arXiv:2402.12354). The paper uses 2 to 16."""
    lr_scheduler_type: Schedule = "cosine"
    """Shape after the warm-up; cosine and linear end at zero."""
    warmup_ratio: float = 0.03
    """Share of all optimizer steps over which the rate rises linearly from zero."""
    epochs: int | None = None
    """Passes over the training data; by default as many as give a few hundred steps, at most 10."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    gradient_accumulation_steps: int | None = None
    """Rows (micro-steps) in one optimizer step; by default, 8 to 32 documents make a step."""
    optim: Optim = "adamw"
    """Format of AdamW's moments: float32 (adamw), or blocks of 8-bit values (adamw_8bit).
    adamw_offload: float32 in host memory, which saves GPU memory and takes longer."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay rate of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    eval_every_steps: int | None = None
    """Optimizer steps between evaluations on the held-out part; by default ten times in a run."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better held-out loss."""
    save_every_steps: int | None = None
    """Optimizer steps between checkpoints; by default at every evaluation."""
    activations: Activations = "auto"
    """Activations to recompute in the backward: none, selective, or full (a layer saves only its input).
    offload: full, with the inputs in host memory. Each uses less memory and more time than the one before.
    auto: the fastest that fits."""
    memory: str | None = None
    """The most GPU memory that the run may use, such as 24GiB; by default all free memory. Not for a CPU."""
    seed: int = 0
    """Seed of A's initial values, the order of the data, the held-out split and dropout."""
    log_to: list[Tracker] = field(default_factory=list)
    """Trackers to report to, besides metrics.jsonl."""

    def __post_init__(self) -> None:
        check_types(self)
        rate = self.learning_rate
        numeric = rate is None or rate == "auto" or 0 < rate < math.inf
        require(numeric, f"learning_rate is {rate}; it must be positive and finite")
        require(0 <= self.warmup_ratio <= 1, f"warmup_ratio is {self.warmup_ratio}; it lies in 0 <= share <= 1")
        for name in ("adam_beta1", "adam_beta2"):
            beta = getattr(self, name)
            require(0 <= beta < 1, f"{name} is {beta}; it lies in 0 <= beta < 1")
            require(1 - beta >= 2**-24, f"{name} is {beta}, which is 1 in float32; it is at most 1 - 6e-8")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} is {value}; it is at least 0, and finite")
        ratio = self.loraplus_lr_ratio
        require(0 < ratio < math.inf, f"loraplus_lr_ratio is {ratio}; it must be positive and finite")
        offload = ratio != 1 and self.optim == "adamw_offload"
        require(not offload, 'loraplus_lr_ratio needs optim "adamw" or "adamw_8bit"; adamw_offload has one rate')
        epsilon = self.adam_epsilon
        bounds = "it must be positive and finite in float32: 1.2e-38 <= epsilon < 3.4e38"
        require(2**-126 <= epsilon < 2**128, f"adam_epsilon is {epsilon}; {bounds}")
        if self.memory is not None:
            try:
                bytes_of(self.memory)
            except ValueError as error:
                raise ConfigError(f"memory: {error}") from None
        counts = ("epochs", "max_steps", "gradient_accumulation_steps", "eval_every_steps")
        for name in (*counts, "early_stopping_patience", "save_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; it is at least 1")

    @property
    def rate(self) -> float:
        """The peak learning rate as a number. "auto" or no value must have been resolved (`training.choices`)."""
        assert self.learning_rate is not None
        assert self.learning_rate != "auto"
        return self.learning_rate

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step; 1 if nothing was set or chosen."""
        return self.gradient_accumulation_steps or 1

    @property
    def passes(self) -> int:
        """Passes over the training data; 1 if nothing was set or chosen."""
        return self.epochs or 1


@dataclass(kw_only=True, repr=False)
class RunConfig(ShortRepr):
    """All settings of one training run, as stored in `run.toml` of an output folder."""

    model: str
    """Base model: a local folder, a hub id, or "loratune/pocket", the bundled model."""
    data: list[str]
    """Training files (JSON, JSONL, Parquet, CSV, text) or a hub data set id."""
    out: str
    """Folder for the adapter and all files of the run."""
    precision: Precision = "auto"
    """Number format of the frozen base; nf4 has 4 bits, fp8 has 8.
    auto: the format of its files on a GPU, float32 on a CPU."""
    device: str | None = None
    """Torch device such as cpu, cuda or cuda:1; by default the GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that belongs to the model. It can do anything on this machine."""
    overwrite: bool = False
    """Replace an existing output folder."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    dataset: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, section in (("lora", LoraConfig), ("dataset", DataConfig), ("training", TrainConfig)):
            given = getattr(self, name)
            require(isinstance(given, section), f"{name} is a {type(given).__name__}; write {section.__name__}(...)")
        require(bool(self.model), "no model given")
        require(bool(self.data), "no training data given")
        require(bool(self.out), "no output folder given; pass --out DIR")


T = TypeVar("T")


def from_dict(kind: type[T], values: Mapping[str, Any], where: str, root: type[Any] | None = None) -> T:
    """Builds a configuration from nested plain values, for example those of a TOML file.

    Args:
        kind: the dataclass to build; fields that `values` lacks take their defaults.
        values: field name -> value, sections as mappings.
        where: the source of the values for errors, for example the file.
        root: the dataclass of the whole file if `kind` is a section; for hints.

    Raises: ConfigError: a name is unknown, a value has the wrong type or is out of range, or one is missing.
    """
    checked = check_values(kind, values, where, root)
    missing = [f.name for f in fields(kind) if is_required(f) and f.name not in checked]  # type: ignore[arg-type]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing")
    try:
        return kind(**checked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_values(
    kind: type[Any], values: Mapping[str, Any], where: str, root: type[Any] | None = None
) -> dict[str, Any]:
    """The keyword arguments for `kind` from `values`, with sections as dataclasses; see `from_dict`."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            hint = _elsewhere(root or kind, name) or other_names.hint(name, _all_names(root or kind) or known)
            raise ConfigError(f'{where}: unknown setting "{name}".{hint}')
        expected = hints[name]
        if is_dataclass(expected) and isinstance(value, Mapping):
            section = _section(typing.cast(type[Any], expected), value)
            built[name] = from_dict(section, value, f"{where} [{name}]", root or kind)
        elif is_dataclass(expected) and not is_dataclass(value):
            raise ConfigError(
                f"{where}: {name} = {reprlib.repr(value)} is a value, but {name} is a section: [{name}]"
            )
        elif fits(value, expected):
            built[name] = value
        else:
            raise ConfigError(f"{where}: {misfit(name, value, expected)}")
    return built


def _section(expected: type[Any], values: Mapping[str, Any]) -> type[Any]:
    """Class of a section. The section of `LoraConfig` has the fields of the variant that its values choose."""
    chosen = chosen_variants(values) if expected is LoraConfig else []
    settings: type[Any] = load_entry(VARIANTS[chosen[0]]).settings if chosen else expected
    return settings


def read_toml(path: str) -> dict[str, Any]:
    """The content of a TOML file.

    Raises: ConfigError: it cannot be read or parsed; the message has the line.
    """
    return foreign.parse_toml(foreign.read_text(Path(path), ConfigError), path, ConfigError)


def to_toml(config: object) -> str:
    """The complete configuration as TOML, without settings that are None, because TOML has no null."""
    import tomli_w

    assert is_dataclass(config)
    assert not isinstance(config, type)
    return tomli_w.dumps(_without_none(asdict(config)))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _without_none(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v
        for k, v in values.items()
        if v is not None
    }


def _elsewhere(root: type[Any], name: str) -> str:
    """A hint if the setting belongs to a section of `root` or above all sections; "" otherwise."""
    if name in {f.name for f in fields(root)}:
        return " It belongs above the first section."
    for section, hint in typing.get_type_hints(root).items():
        if is_dataclass(hint) and name in {f.name for f in fields(hint)}:
            return f" It belongs under [{section}]."
    return ""


def _all_names(root: type[Any]) -> list[str]:
    """Names of all settings of `root` and its sections."""
    names = [f.name for f in fields(root)]
    for hint in typing.get_type_hints(root).values():
        if is_dataclass(hint):
            names += [f.name for f in fields(hint)]
    return names
