"""A 4-bit checkpoint on disk, in the format of bitsandbytes: a quarter of the bytes, and nothing to quantise later.

transformers loads such a folder if bitsandbytes is installed; `loratune` loads it without. The tokenizer and the
generation settings are written too, so that the folder can be used like the original model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune import atomic
from loratune.errors import AdapterError, ModelError, OutputError
from loratune.export.dtypes import FileDtypes, check_written, dtypes_of_files, record_dtype
from loratune.export.generation import generation_set_aside, record_generation
from loratune.lora.state import find
from loratune.precision.linear import count_parameters, formats_in, quantised_layers
from loratune.units import size


@dataclass(frozen=True, slots=True)
class Quantised:
    """Report of `save_quantised`; `print` it."""

    path: Path
    file_bytes: int
    layers: int
    parameters: int

    def __str__(self) -> str:
        per = self.file_bytes * 8 / self.parameters
        return f"{self.path}: {self.layers} layers in 4 bits, {size(self.file_bytes)}, {per:.2f} bits a parameter"


def save_quantised(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> Quantised:
    """Writes a model that was loaded with precision "nf4" as bitsandbytes' 4-bit checkpoint.

    Args:
        model: the model, without adapters; these are saved separately.
        out: folder for the checkpoint.
        tokenizer: written to the same folder if given, and its stop tokens into generation_config.json.

    Tensors that are not quantised have the dtype of the base's files, also if the model is float32 on a CPU.

    Memory: the quantised model once more, on the host.
    Raises: ModelError: nothing in the model is in 4 bits, or a tensor holds NaN or infinity. AdapterError: it has
        adapters. OutputError: `out` exists, or cannot hold the files.
    """
    folder = Path(out)
    layers = [layer for _, layer in quantised_layers(model)]
    dtypes = dtypes_of_files(model)
    settings = _quantization_config(model, dtypes.main)
    if settings is None:
        raise ModelError(f'{model.name_or_path}: nothing in this model is in 4 bits; load it with precision="nf4"')
    if find(model) is not None:
        raise AdapterError("the model has adapters; detach them, and save each separately")
    with atomic.new_directory(folder, overwrite=overwrite) as temporary:
        model.config.quantization_config = settings
        try:
            tensors = _state_dict(model, dtypes)
            check_written(model, tensors, str(folder))
            with generation_set_aside(model):
                model.save_pretrained(temporary, state_dict=tensors)
            record_dtype(temporary, dtypes.main)
        except SafetensorError as error:  # raised by its Rust code for a full disk
            raise OutputError(f"{folder}: the weights cannot be written: {error}") from error
        finally:
            del model.config.quantization_config
        record_generation(temporary, model, tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        file_bytes = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    return Quantised(folder, file_bytes, len(layers), count_parameters(model))


def _state_dict(model: PreTrainedModel, dtypes: FileDtypes) -> dict[str, Tensor]:
    """The model's tensors in CPU memory: quantised ones as they are, dense ones no wider than in the base's files."""
    layers = dict(quantised_layers(model))
    before = {layer: layer.frozen for layer in layers.values()}
    for layer, frozen in before.items():  # the files record the dtype of products
        layer.frozen = frozen.to(frozen.device, dtypes.main)
    try:
        tensors: dict[str, Tensor] = model.state_dict()
    finally:
        for layer, frozen in before.items():
            layer.frozen = frozen
    cast: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}  # tied tensors stay tied
    for name, tensor in tensors.items():
        path, _, _ = name.partition(".weight")
        wanted = dtypes.of(name) if tensor.is_floating_point() and path not in layers else tensor.dtype
        dtype = wanted if wanted.itemsize < tensor.dtype.itemsize else tensor.dtype
        key = (tensor.data_ptr(), tensor.shape, dtype)
        tensors[name] = cast.setdefault(key, tensor.to("cpu", dtype))
    return tensors


def _quantization_config(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any] | None:
    """The `quantization_config` of the model's precision; None if it has no files of its own."""
    for form in formats_in(model):
        weights = [layer.frozen for _, layer in quantised_layers(model) if layer.frozen.precision == form.name]
        settings = form.quantization_config(weights, dtype)
        if settings is not None:
            return settings
    return None
