"""Quantises a model while it is loaded, tensor by tensor, so that neither host nor device ever holds it dense.

transformers knows how the tensors of a file become those of a model: names that changed, experts that are merged,
weights that are tied. Its loader takes a quantiser that is asked, for each tensor as it comes, what to put in its
place; bitsandbytes' is one of them. Here is ours: the layer is swapped for a `QuantisedLinear` when its weight
arrives, and afterwards the model is an ordinary one with such layers in it. The tensors come from `precision.tensors`
instead of mapped files.

Quantised are all linear layers but the output head and what is tied to it, as bitsandbytes does by default. Experts
that transformers holds in one tensor are no linear layers and stay dense. A folder that bitsandbytes has quantised
already is read the same way: its codes arrive in place of a dense weight. Of one in 8-bit floating point the dense
weight arrives, and with it the codes where they can be taken over (`precision.fp8_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

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
from loratune.ops.frozen import Frozen
from loratune.precision import fp8, fp8_files, nf4, nf4_files
from loratune.precision.linear import QuantisedLinear
from loratune.precision.nf4 import Nf4Weight
from loratune.precision.tensors import Checkpoint, Stored

_METHOD = "loratune"
_DEQUANTISED = ("fp8", "mxfp4")

Form = Callable[[Tensor], Frozen]
"""Makes a frozen weight of a dense one, (d_out, d_in)."""


FORMS: dict[str, Form] = {"nf4": nf4.quantise, "fp8": fp8.quantise}
"""What a linear layer's weight becomes, by the name that a precision has."""


def form_of_files(model: str, config: Any, precision: str) -> Literal["dense", "4-bit", "8-bit", "dequantised"]:
    """How the weights of a checkpoint are written, by its configuration, which is changed so that they are read well.

    "4-bit" is what bitsandbytes writes, "8-bit" what `precision.fp8_files` reads. "dequantised" are MXFP4, and FP8
    with experts in 4 bits, which transformers makes dense as it reads.

    Raises: ModelError: they are quantised in a way that is not read, or cannot be had in this precision.
    """
    how = _how(config)
    method = str(how.get("quant_method") or ("bitsandbytes" if how.get("load_in_4bit") else "dense"))
    if method == "dense":
        return "dense"
    if method == "bitsandbytes" and not how.get("load_in_8bit"):
        if precision in FORMS and precision != "nf4":
            raise ModelError(f"{model}: its weights are in 4 bits already; leave --precision {precision} out")
        return "4-bit"
    if fp8_files.Scheme.of(how) is not None:
        return "8-bit"
    if method not in _DEQUANTISED:
        what = "bitsandbytes' 8 bits" if method == "bitsandbytes" else f'"{method}"'
        raise ModelError(
            f"{model}: its weights are quantised as {what}, which is not read here; bitsandbytes' 4 bits, FP8 and "
            "MXFP4 are. Take the model as it was before, and --precision nf4 to save memory"
        )
    if precision in FORMS:
        raise ModelError(
            f"{model}: its weights are quantised as {method} already; without --precision {precision} they are made "
            "dense. For fewer bits take the model as it was before"
        )
    config.quantization_config = how | {"dequantize": True}
    return "dequantised"


def load_quantised(
    folder: str, config: Any, dtype: torch.dtype, device: torch.device, form: Form | None
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the causal language model in `folder` with its linear layers quantised.

    Args:
        config: the model's configuration; what it says about quantisation is ignored.
        dtype: of everything that is not quantised, and of all products.
        form: what a dense linear weight becomes; None: it stays dense. Weights that bitsandbytes has quantised are
            taken as they are, and so are weights in 8 bits with a scale for each row, if that is the form.

    Returns: the model, and the names of tensors that its files lack or have in another shape.
    Memory: on the host one tensor at a time; on the device the quantised model, one dense tensor and some 100 MiB.
    Raises: ModelError: the files cannot be read, or hold something that is not a weight of the model.
    """
    scheme = fp8_files.Scheme.of(_how(config))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tensors = tensors_of(Path(folder), dtype, pinned=device.type == "cuda")
    if scheme is not None:
        tensors = fp8_files.entries(tensors, scheme, take_over=form is fp8.quantise)
    how = Quantising(form, {name for name, tensor in tensors.items() if isinstance(tensor, _Packed)})
    kind = cast(Any, _get_model_class(config, AutoModelForCausalLM._model_mapping))
    loading = kind.from_pretrained(
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


def _how(config: Any) -> dict[str, Any]:
    """What a model's configuration says about quantisation."""
    how = getattr(config, "quantization_config", None) or {}
    return how if isinstance(how, dict) else dict(how.to_dict())


def tensors_of(folder: Path, dtype: torch.dtype, pinned: bool) -> dict[str, Any]:
    """The tensors of a checkpoint, unread, by name; one entry for all parts of a 4-bit weight."""
    stored = Checkpoint(folder, pinned).tensors
    parts: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        if nf4_files.is_part(name):
            path = name[: name.index(".weight.")]
            parts.setdefault(path, {})[name.removeprefix(path + ".")] = tensor
    entries: dict[str, Any] = {}
    for name, tensor in stored.items():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path in parts:
            entries[name] = _Packed(path, parts[path] | {"weight": tensor}, dtype)
        elif not nf4_files.is_part(name):
            entries[name] = tensor
    return entries


@dataclass(frozen=True)
class _Packed:
    """A 4-bit weight in its file, in place of a tensor in transformers' loader."""

    path: str
    parts: dict[str, Stored]
    dtype: torch.dtype

    def __getitem__(self, everything: object) -> Nf4Weight:
        return nf4_files.unpack({name: part.read() for name, part in self.parts.items()}, self.dtype, self.path)


class Quantising(QuantizationConfigMixin):
    """What transformers calls a quantisation configuration: it chooses the quantiser below and hands it `form`."""

    def __init__(self, form: Form | None, packed: Collection[str]) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # theirs are an enumeration
        self.form = form
        self.packed = packed
        """Names of weights that are in 4 bits in the files."""
        self.unfit: list[str] = []
        """Names of weights whose shape is not that of their layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantising:
        """Configurations are copied on the way; all copies report to the one that was handed in."""
        return self


@register_quantizer(_METHOD)
class _Quantiser(HfQuantizer):
    """Swaps a linear layer for a quantised one when its weight arrives."""

    quantization_config: Quantising

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        kept = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        head = model.get_output_embeddings()
        self._chosen = {
            f"{path}.weight"
            for path, layer in model.named_modules()
            if type(layer) in (nn.Linear, Conv1D)
            and layer is not head
            and path not in kept
            and (self.quantization_config.form is not None or f"{path}.weight" in self.quantization_config.packed)
        }
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the weights of linear layers, the head's excepted."""
        return param_name in self._chosen

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element, for the memory that transformers sets aside."""
        return 0.52 if param_name in self._chosen else float(param.element_size())

    def get_quantize_ops(self) -> _Swap:
        """What is done with such a weight."""
        return _Swap(self.quantization_config)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leaves an ordinary model behind, about which nothing says that transformers has quantised it."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        """`save_quantised` writes such models."""
        return False

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True


class _Swap(ConversionOps):
    """One weight in, no tensor out: its layer is replaced."""

    def __init__(self, how: Quantising) -> None:
        self._how = how

    def convert(  # type: ignore[override]  # theirs gets all by name
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Takes what has arrived for one or several layers, by name."""
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.removesuffix(".weight")
            layer = model.get_submodule(path)
            transposed = isinstance(layer, Conv1D)
            expected = tuple(cast(Tensor, layer.weight).shape)
            if isinstance(weight, Nf4Weight):  # always (d_out, d_in), as bitsandbytes writes it
                frozen: Frozen = weight
                expected = expected[::-1] if transposed else expected
            elif tuple(weight.shape) == expected:
                assert self._how.form is not None
                codes = None if transposed else fp8_files.codes_of(weight)
                frozen = codes or self._how.form(weight.T.contiguous() if transposed else weight)
            if tuple(weight.shape) != expected:
                self._how.unfit.append(name)
                continue
            stand_in = QuantisedLinear.in_place_of(layer, frozen)
            stand_in._is_hf_initialized = True  # type: ignore[assignment]  # transformers would draw initial values
            model.set_submodule(path, stand_in)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}
