"""Quantises a model while it is loaded, tensor by tensor, so that neither host nor device ever holds it dense.

transformers' loader maps the tensors of files to those of a model: it renames, merges experts and ties weights. It
offers each tensor to a quantiser, such as bitsandbytes', which may replace it. Ours replaces the whole layer by a
`QuantisedLinear`; the result is an ordinary model with such layers. Tensors come from `precision.tensors` instead of
mapped files.

All linear layers are quantised except the output head and layers tied to it, as bitsandbytes does by default. Experts
that transformers holds in one tensor are not linear layers and stay dense. If the checkpoint itself is quantised, the
reader of its precision reads the weights (`WeightFormat.reader`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.models.auto.auto_factory import _get_model_class
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loratune.errors import ModelError
from loratune.ops.frozen import FrozenWeight
from loratune.precision import experts
from loratune.precision.contract import CheckpointReader, WeightFormat, quantised_formats
from loratune.precision.experts import ExpertForm, QuantisedExperts
from loratune.precision.linear import QuantisedLinear
from loratune.precision.tensors import Checkpoint, frozen_form

_METHOD = "loratune"
_DEQUANTISED = ("fp8",)


@dataclass(frozen=True)
class CheckpointForm:
    """Form of the weights in a checkpoint."""

    source: WeightFormat | None = None
    """The precision of weights that are quantised in the files; None for dense ones."""
    reader: CheckpointReader | None = None
    """Reader of these weights; None for dense ones."""
    dequantised: bool = False
    """True for forms that transformers makes dense while it reads: FP8 with experts in 4 bits."""


def form_of_files(model: str, config: Any, wanted: WeightFormat | None) -> CheckpointForm:
    """Form of a checkpoint, from its configuration. Changes `config` if transformers has to make the weights dense.

    Args:
        wanted: precision given by the user; None for floating point or "auto".
    Raises: ModelError: there is no reader for this form, or the weights cannot be converted to this precision.
    """
    how = _quantization_config(config)
    method = str(how.get("quant_method") or ("bitsandbytes" if how.get("load_in_4bit") else "dense"))
    if method == "dense":
        return CheckpointForm()
    for source in quantised_formats():
        reader = source.reader(how)
        if reader is None:
            continue
        if reader.keeps_precision and wanted is not None and wanted.name != source.name:
            bits = source.label.partition(" (")[0]
            raise ModelError(f"{model}: its weights are in {bits} already; leave --precision {wanted.name} out")
        return CheckpointForm(source, reader)
    if method not in _DEQUANTISED:
        form = "bitsandbytes' 8 bits" if method == "bitsandbytes" else f'"{method}"'
        raise ModelError(
            f"{model}: its weights are quantised as {form}, which is not read here; bitsandbytes' 4 bits, FP8 and "
            "MXFP4 are. Take the model as it was before, and --precision nf4 to save memory"
        )
    if wanted is not None:
        raise ModelError(
            f"{model}: its weights are quantised as {method} already; without --precision {wanted.name} they are "
            "made dense. For fewer bits take the model as it was before"
        )
    config.quantization_config = how | {"dequantize": True}
    return CheckpointForm(dequantised=True)


def load_quantised(
    folder: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    form: CheckpointForm,
    wanted: WeightFormat | None,
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the causal language model in `folder` with its linear layers quantised.

    Args:
        config: the model's configuration; its `quantization_config` is removed.
        dtype: dtype of all weights that are not quantised, and of all products.
        form: form of the files, from `form_of_files`.
        wanted: precision of linear weights; None leaves dense weights dense.

    Returns: the model, and the names of tensors that are missing from the files or have another shape.
    Memory: on the host one tensor at a time; on the device the quantised model, one dense tensor and some 100 MiB.
    Raises: ModelError: the files cannot be read, or hold something that is not a weight of the model.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored = Checkpoint(Path(folder), device.type == "cuda").tensors
    tensors: dict[str, Any] = dict(stored)
    if form.source is not None and form.reader is not None:
        tensors.clear()
        tensors.update(form.reader.entries(stored, dtype, wanted is not None and wanted.name == form.source.name))
    read = {name for name, entry in tensors.items() if name in stored and entry is not stored[name]}
    packed = read if form.reader is not None and form.reader.keeps_precision else set()
    how = QuantisingConfig(wanted, packed)
    model_class = cast(Any, _get_model_class(config, AutoModelForCausalLM._model_mapping))
    loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        quantization_config=how,
        dtype=dtype,
        device_map=None if device.type == "cpu" else {"": device},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loading
    model.name_or_path = config._name_or_path = folder
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    missing = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report.get("mismatched_keys", ()))
    return model, missing + how.unfit


def _quantization_config(config: Any) -> dict[str, Any]:
    """The `quantization_config` of a model's configuration, empty without one."""
    how = getattr(config, "quantization_config", None) or {}
    return how if isinstance(how, dict) else dict(how.to_dict())


class QuantisingConfig(QuantizationConfigMixin):
    """transformers' kind of quantisation configuration: selects the quantiser below and holds its settings."""

    def __init__(self, wanted: WeightFormat | None, packed: Collection[str]) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # theirs are an enumeration
        self.wanted = wanted
        self.packed = packed
        """Names of weights that are quantised in the files and are loaded unchanged."""
        self.unfit: list[str] = []
        """Names of weights whose shape differs from their layer's."""

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisingConfig:
        """Returns itself: transformers copies configurations, and every copy must report to the original."""
        return self


@register_quantizer(_METHOD)
class _Quantiser(HfQuantizer):
    """Replaces a linear layer by a quantised one when its weight arrives."""

    quantization_config: QuantisingConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        head = model.get_output_embeddings()
        settings = self.quantization_config
        self._chosen = {
            f"{path}.weight"
            for path, layer in model.named_modules()
            if type(layer) in (nn.Linear, Conv1D)
            and layer is not head
            and path not in tied
            and (settings.wanted is not None or f"{path}.weight" in settings.packed)
        }
        for path, module in model.named_modules():
            form = experts.form_of(module)
            if isinstance(form, ExpertForm) and settings.wanted is not None:
                self._chosen |= {f"{path}.{name}" for name in form.names}
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the weights of linear layers, except the head."""
        return param_name in self._chosen

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element, for the memory that transformers reserves."""
        return 0.52 if param_name in self._chosen else float(param.element_size())

    def get_quantize_ops(self) -> _Swap:
        """The operation applied to such a weight."""
        return _Swap(self.quantization_config)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Removes transformers' marks of a quantised model, so that an ordinary model remains."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        """False: `save_quantised` writes such models."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True: adapters on such a model can train."""
        return True


class _Swap(ConversionOps):
    """Takes one weight and returns no tensor: the weight's layer is replaced."""

    def __init__(self, how: QuantisingConfig) -> None:
        self._how = how

    def convert(  # type: ignore[override]  # theirs gets all by name
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Takes arrived weights of one or several layers, by name."""
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if not (self._hold_experts if not name.endswith(".weight") else self._replace)(model, name, weight):
                self._how.unfit.append(name)
                continue
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}

    def _replace(self, model: nn.Module, name: str, weight: Tensor | FrozenWeight) -> bool:
        """Replaces a linear layer; False if the shape does not fit it."""
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        frozen = self._frozen(weight, layer)
        if frozen is None:
            return False
        replacement = QuantisedLinear.in_place_of(layer, frozen)
        replacement._is_hf_initialized = True  # type: ignore[assignment]  # else transformers draws initial values
        model.set_submodule(path, replacement)
        return True

    def _hold_experts(self, model: nn.Module, name: str, weight: Tensor | FrozenWeight) -> bool:
        """Quantises one projection of experts; False if the shape does not fit it. Weights that arrive quantised are
        (E d_out, d_in)."""
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters[own]
        assert parameter is not None
        count, first, second = parameter.shape
        transposed = bool(module.is_transposed)
        if isinstance(weight, Tensor):
            if tuple(weight.shape) != (count, first, second):
                return False
            assert self._how.wanted is not None
            frozen = self._how.wanted.quantise(weight.flatten(0, 1))
        else:
            d_out, d_in = (second, first) if transposed else (first, second)
            if weight.shape != (count * d_out, d_in):
                return False
            frozen, transposed = weight, False
        if not isinstance(module, QuantisedExperts):
            module = QuantisedExperts.in_place_of(module)
            module._is_hf_initialized = True  # type: ignore[assignment]  # else transformers draws initial values
            model.set_submodule(path, module)
        module.replace_parameter(own, frozen, transposed=transposed)
        return True

    def _frozen(self, weight: Tensor | FrozenWeight, layer: nn.Module) -> FrozenWeight | None:
        """The layer's frozen weight; None if the shape does not fit the layer."""
        transposed = isinstance(layer, Conv1D)
        expected = tuple(cast(Tensor, layer.weight).shape)
        if not isinstance(weight, Tensor):  # always (d_out, d_in), also for a Conv1D
            return weight if weight.shape == (expected[::-1] if transposed else expected) else None
        if tuple(weight.shape) != expected:
            return None
        assert self._how.wanted is not None
        codes = None if transposed else frozen_form(weight)
        return codes or self._how.wanted.quantise(weight.T.contiguous() if transposed else weight)
