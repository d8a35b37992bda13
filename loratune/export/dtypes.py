"""The dtypes of a base's files, so that a checkpoint made from it is no larger and no less exact.

A model on a CPU is float32 in memory even if its files are not, and a configuration need not name a dtype. So the
headers of the files decide: the dtype of most bytes, and the dtype of each tensor that differs, such as a router in
float32 in a bfloat16 model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.base.load import load_config, local_folder, resolve
from loratune.base.model_config import runs_own_code
from loratune.errors import ModelError
from loratune.precision.finite import check_finite, fault_of
from loratune.precision.tensors import Checkpoint, StoredTensor

_DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FileDtypes:
    """Dtypes of the dense tensors of a checkpoint."""

    main: torch.dtype
    """Dtype of most bytes."""
    others: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Name of a parameter or buffer -> dtype, where it is not the main one."""

    def of(self, name: str) -> torch.dtype:
        """Dtype of one tensor; the main one if the files have no tensor of this name."""
        return self.others.get(name, self.main)


def dtypes_of_files(model: PreTrainedModel) -> FileDtypes:
    """The dtypes of the files that `model` was loaded from; the dtype in memory if it comes from no files.

    Raises: ModelError: the files no longer exist, or are damaged.
    """
    if not model.name_or_path:
        return FileDtypes(model.dtype)
    config = load_config(model.name_or_path, trust_remote_code=runs_own_code(model))
    stored = Checkpoint(Path(local_folder(resolve(model.name_or_path)))).tensors
    held: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        if tensor.dtype in _DENSE:
            held[tensor.dtype] += tensor.nbytes
    recorded = getattr(config, "dtype", None)
    main = held.most_common(1)[0][0] if held else model.dtype
    if getattr(config, "quantization_config", None) is not None and isinstance(recorded, torch.dtype):
        main = recorded  # most bytes are quantised, and their scales may be more than the rest
    return FileDtypes(main, _others(model, stored, main))


def _others(model: PreTrainedModel, stored: Mapping[str, StoredTensor], main: torch.dtype) -> dict[str, torch.dtype]:
    """Names of the model's tensors whose dtype in the files is not `main`. Files may leave out the base's prefix."""
    prefix, found = f"{model.base_model_prefix}.", {}
    for name in model.state_dict():
        names = (name, name.removeprefix(prefix), prefix + name)
        tensor = next((stored[each] for each in names if each in stored), None)
        if tensor is not None and tensor.dtype in _DENSE and tensor.dtype != main:
            found[name] = tensor.dtype
    return found


def check_written(model: PreTrainedModel, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ModelError if a tensor of a checkpoint holds NaN or infinity; buffers may hold infinity, as masks do."""
    masks = {name for name, buffer in model.named_buffers() if fault_of(buffer) == "infinity"}
    check_finite({name: tensor for name, tensor in tensors.items() if name not in masks}, where, ModelError)


def record_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Puts `dtype` into config.json, where transformers writes the dtype of the model in memory."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
