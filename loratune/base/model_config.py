"""A model's configuration: read, checked, and turned into a model without data.

config.json may come from anyone. transformers trusts it: it runs code that the file names, loads kernels that the
file names, and builds as many layers as the file demands. So the file is checked first:

- Code in the model's folder, or in another repository, runs only with `trust_remote_code`. transformers is always
  given this setting, because without one it asks on the terminal.
- Attention or expert kernels of a hub repository are code as well.
- Counts of layers and experts have limits, and the model must not be larger than the files of its weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loratune import foreign
from loratune.errors import ModelError
from loratune.precision.tensors import StoredTensor
from loratune.units import size

CONFIG_FILE = "config.json"

LIBRARY_FAULTS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    ImportError, MemoryError, HFValidationError, StrictDataclassError,
)  # fmt: skip
"""Errors that transformers raises when a file holds a value that it did not expect. It checks few values itself."""

_LIMITS = (
    (re.compile(r"layers?(_num)?$|blocks$|^depth$"), 2048, "layers"),
    (re.compile(r"experts?$"), 4096, "experts"),
    (re.compile(r"position|token|theta|base|window|length|context|ctx|max|seed|factor|scal"), 1 << 53, "it"),
    (re.compile(""), 1 << 24, "it"),
)
"""Name of a field, its largest value, and a word for it. The first name that fits counts."""

_IMPLEMENTATION = re.compile(r"_implementation(_internal)?$|kernel")


def read_config(model: str, source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers configuration in a folder, or of a hub id.

    Args:
        model: the user's name for it, for errors.
        source: the folder, or a hub id that can be reached.

    Raises: ModelError: it is damaged or absurd, or needs code of its own and `trust_remote_code` is off.
    """
    try:
        file = Path(source) / CONFIG_FILE if Path(source).is_dir() else Path(hf_hub_download(source, CONFIG_FILE))
        _check_values(file, foreign.read_json(file, ModelError), trust_remote_code)
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LIBRARY_FAULTS as error:
        raise refused(model, "no usable model configuration", error) from error
    if not trust_remote_code:
        _check_kernels(model, config)
    _check_one_text(model, config)
    return config


def without_data(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A frozen model of this configuration on the meta device.

    Raises: ModelError: no model can be made of it.
    """
    name = str(getattr(config, "name_or_path", "") or config.model_type)
    try:
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
    except LIBRARY_FAULTS as error:
        raise refused(name, "no causal language model can be made of this configuration", error) from error
    made.requires_grad_(False)
    made.eval()
    return made


def layer_configs(config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
    """The configuration of each layer where layers differ, else the one of all layers.

    transformers raises an error if a field that differs between layers is read from the whole.
    """
    return config.per_layer_config if config.is_heterogeneous else [config]


def check_against_files(
    model: str, config: PreTrainedConfig, tensors: Mapping[str, StoredTensor], *, trust_remote_code: bool = False
) -> None:
    """Raises ModelError if the configuration and the tensors of the files cannot belong to one model.

    transformers would allocate and draw the missing values before it reports them. No format has below 4 bits per
    weight, so the model has at most two weights per byte.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(tensors):
        raise ModelError(
            f"{model}: {CONFIG_FILE} describes {layers:,} layers, but its weights are {len(tensors)} tensors"
        )
    stored = sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
    made = without_data(config, torch.float32, trust_remote_code=trust_remote_code)
    weights = sum(parameter.numel() for parameter in made.parameters())
    if weights > 2 * stored:
        largest = max(made.named_parameters(), key=lambda entry: entry[1].numel())
        raise ModelError(
            f"{model}: {CONFIG_FILE} describes {weights:,} weights, but its weights take only {size(stored)}; "
            f"the largest tensor is {largest[0]} {tuple(largest[1].shape)}. They do not belong together"
        )


def check_layers(name: str, model: PreTrainedModel, tensors: Iterable[str]) -> None:
    """Raises ModelError if the files hold further layers of the kind that the model has.

    transformers leaves out tensors that it does not expect. With a smaller num_hidden_layers, the model would lose
    its last layers silently. Layers that predict several tokens at once have more tensors and do not count.
    """
    lists: dict[str, dict[int, set[str]]] = {}
    for tensor in tensors:
        found = re.fullmatch(r"(.+?)\.(\d{1,6})\.(.+)", tensor)
        if found:
            lists.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
    modules = dict(model.named_modules())
    for path, layers in lists.items():
        module = modules.get(path)
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        known = set().union(*(kinds for index, kinds in layers.items() if index < len(module)))
        further = [index for index, kinds in layers.items() if index >= len(module) and kinds <= known]
        if further:
            raise ModelError(
                f"{name}: {CONFIG_FILE} describes {len(module)} layers at {path}, but the files hold "
                f"{max(layers) + 1}; the model would lose its last layers"
            )


def runs_own_code(model: PreTrainedModel) -> bool:
    """True if the model's class came with the model, so that its code is trusted already."""
    return type(model).__module__.startswith("transformers_modules.")


def needs_code(model: str) -> ModelError:
    """The refusal of a model that brings its own code."""
    return ModelError(
        f"{model}: this model needs Python code of its own, which can do anything on this machine. "
        "If you trust its author: --trust-remote-code"
    )


def in_one_line(error: BaseException) -> str:
    """An error's first line, and the second behind a colon, with its kind if the text alone says little."""
    text = str(error.args[0]) if error.args else str(error)
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    plain = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if plain else f"{type(error).__name__} {line}".strip()


def refused(model: str, fault: str, error: BaseException) -> ModelError:
    """The error for a fault that transformers found in the files of a model."""
    if isinstance(error, ModelError):
        return error
    if "trust_remote_code" in str(error):
        return needs_code(model)
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # its first line names a validator, and the cause the value
    return ModelError(f"{model}: {fault}: {in_one_line(error)}")


def _check_values(file: Path, values: dict[str, Any], trust_remote_code: bool) -> None:
    for path, name, value in _entries(values, ""):
        if isinstance(value, int) and not isinstance(value, bool):
            most, word = next((most, word) for pattern, most, word in _LIMITS if pattern.search(name))
            if abs(value) > most:
                raise ModelError(f"{file}: {path} = {str(value)[:24]}: {word} can be {most:,} at most here")
        elif isinstance(value, str) and not trust_remote_code and _IMPLEMENTATION.search(name) and "/" in value:
            raise _named_kernel(str(file), path, value)


def _check_one_text(model: str, config: PreTrainedConfig) -> None:
    """Raises ModelError if the configuration holds several text models, so that none of them is meant."""
    try:
        config.get_text_config()
    except ValueError as error:
        raise ModelError(
            f"{model}: {config.model_type} has several text models (an encoder and a decoder), and is not a causal "
            "language model"
        ) from error


def _check_kernels(model: str, config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _check_kernels(model, value)
        elif isinstance(value, str) and _IMPLEMENTATION.search(name) and "/" in value:
            raise _named_kernel(model, name.removeprefix("_").removesuffix("_internal"), value)


def _named_kernel(where: str, name: str, value: str) -> ModelError:
    return ModelError(
        f'{where}: {name} = "{value}" is code from a hub repository, which can do anything on this machine. '
        "Remove the setting, or if you trust its author: --trust-remote-code"
    )


def _entries(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Every plain value inside nested objects and lists: its path, the name of the nearest field, and itself."""
    if isinstance(value, dict):
        for name, inner in value.items():
            for below, nearest, plain in _entries(inner, f"{path}.{name}" if path else name):
                yield below, nearest or name, plain
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for below, nearest, plain in _entries(inner, f"{path}[{index}]"):
                yield below, nearest, plain
    else:
        yield path, "", value
