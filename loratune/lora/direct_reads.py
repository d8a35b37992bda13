"""Layers whose weight is read by another module instead of the layer being called.

An adapter at such a layer is ignored in every forward, and a merge then changes the output. No list of names is
complete, so the model is run once on a few tokens. Outside of its own call each layer shows an alias of its weight
that records each use of its values. A layer that was used so and never called counts as read. One that was also
called counts if the output changes with other values in the alias. A layer that is not used at all in this run (an
image tower, an expert without tokens) counts as fine. Gradients would not show reads inside `no_grad` (LayoutLMv3).

Decoder layers of one structure run the same code, so only the first of each structure runs, if the model can run so
(`lora.twins`). Otherwise all run.

Models that cannot be run here (no transformers model, no weights, other inputs) are left to the names in
`lora.layers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.lora.evaluation_mode import in_evaluation
from loratune.lora.layers import is_adaptable, is_linear
from loratune.lora.twins import only_first, twin_layers, with_twins

ADAPTERS = "loratune_adapters"
"""Attribute of the root module that holds its adapters (`lora.state.Adapters`)."""
_ATTRIBUTE = "loratune_direct_reads"
_TOKENS = 8
# Errors of models that need other inputs than those made here.
_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)


def direct_reads(model: nn.Module) -> frozenset[str]:
    """Paths, the first of each module, of layers of `model` whose weight is read outside of their call.

    The bare base must be in use. The result is kept on a model with adapters until `forget`.
    """
    known = vars(model).get(_ATTRIBUTE)
    if isinstance(known, frozenset):
        return known
    found: frozenset[str] = frozenset()
    if isinstance(model, PreTrainedModel) and not any(p.is_meta for p in model.parameters()):
        for inputs in _inputs(model):
            measured = _without_twins(model, inputs)
            if measured is not None:
                found = measured
                break
    if ADAPTERS in vars(model):
        setattr(model, _ATTRIBUTE, found)
    return found


def _without_twins(model: PreTrainedModel, inputs: Mapping[str, Any]) -> frozenset[str] | None:
    """The paths found with one layer of each structure, or else with all layers; None if the model refuses both."""
    twins = twin_layers(model)
    for groups in [twins, {}] if twins else [{}]:
        try:
            with only_first(model, groups):
                found = _measured(model, inputs)
        except torch.OutOfMemoryError:
            continue
        except _REFUSALS:
            continue
        return with_twins(found, groups)
    return None


def forget(model: nn.Module) -> None:
    """Removes the result from the model."""
    vars(model).pop(_ATTRIBUTE, None)


def _measured(model: PreTrainedModel, inputs: Mapping[str, Any]) -> frozenset[str]:
    layers = {path: module for path, module in model.named_modules() if _is_candidate(module)}
    with torch.no_grad(), in_evaluation(model):
        before, touched, called = _outputs(model, inputs, layers, changed=())
        # A table that is looked up and also read (a head that shares it) does compute with its adapter.
        suspects = [path for path in touched if is_linear(layers[path]) and path in called]
        groups: dict[tuple[type, str], list[str]] = {}
        for path in suspects:
            parent, _, leaf = path.rpartition(".")
            groups.setdefault((type(model.get_submodule(parent)), leaf), []).append(path)
        read = [paths for paths in groups.values() if _differs(before, _outputs(model, inputs, layers, paths)[0])]
    return frozenset(path for paths in read for path in paths) | {path for path in touched if path not in called}


def _is_candidate(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return is_adaptable(module) and type(weight) is nn.Parameter and weight.is_floating_point()


def _outputs(
    model: PreTrainedModel, inputs: Mapping[str, Any], layers: Mapping[str, nn.Module], changed: Collection[str]
) -> tuple[list[Tensor], list[str], set[str]]:
    """Outputs; paths of the layers whose weight was read outside of their call; and of those that were called.

    Args:
        changed: layers that show another weight outside of their call.
    """
    with ExitStack() as stack:
        watches = {path: stack.enter_context(_watched(module, path in changed)) for path, module in layers.items()}
        outputs = list(_floats(model(**inputs)))
    touched = [path for path, watch in watches.items() if watch.alias.touched]
    return outputs, touched, {path for path, watch in watches.items() if watch.called}


def _differs(before: list[Tensor], after: list[Tensor]) -> bool:
    """True if an output changed by more than rounding."""
    for x, y in zip(before, after, strict=True):
        most = 1e-6 if x.dtype in (torch.float32, torch.float64) else 1e-3
        if bool((x.double() - y.double()).norm() > most * x.double().norm()):
            return True
    return False


@dataclass
class _Watch:
    alias: _Alias
    called: bool = False


class _Alias(Tensor):
    """A weight, without a copy, that records whether its values are used."""

    touched: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        """Runs `func` on plain tensors. Attributes such as dtype and shape are not values."""
        if func.__name__ not in _NO_VALUES:
            for argument in (*args, *(kwargs or {}).values()):
                if isinstance(argument, _Alias):
                    argument.touched = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_NO_VALUES = frozenset({"__get__", "size", "dim", "numel", "stride", "is_floating_point", "data_ptr"})


@contextmanager
def _watched(layer: nn.Module, changed: bool) -> Iterator[_Watch]:
    """Inside, `layer.weight` is an alias except during the layer's own call; of another weight if `changed`."""
    weight = layer._parameters["weight"]
    assert weight is not None
    shown = weight.detach().flip(0) * 2 + 1 if changed else weight.detach()
    watch = _Watch(shown.as_subclass(_Alias))
    watch.alias.touched = False

    def begin(module: nn.Module, args: object) -> None:
        watch.called = True
        module._parameters["weight"] = weight

    def end(module: nn.Module, args: object, output: object) -> None:
        module._parameters["weight"] = cast(nn.Parameter, watch.alias)

    hooks = layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)
    layer._parameters["weight"] = cast(nn.Parameter, watch.alias)
    try:
        yield watch
    finally:
        layer._parameters["weight"] = weight
        for hook in hooks:
            hook.remove()


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try, one after the other: tokens, tokens and an image, an image."""
    accepted = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    config = model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    tokens = (torch.arange(_TOKENS, device=device)[None] + 5) % (vocabulary or _TOKENS)
    text = {name: tokens for name in ("input_ids", "decoder_input_ids") if name in accepted}
    if not config.is_encoder_decoder:
        text.pop("decoder_input_ids", None)
    vision = getattr(config, "vision_config", config)
    sizes = getattr(vision, "image_size", None)
    image: dict[str, Any] = {}
    if "pixel_values" in accepted and sizes:
        height, width = sizes if isinstance(sizes, list | tuple) else (sizes, sizes)
        shape = 1, getattr(vision, "num_channels", 3), height, width
        image = {"pixel_values": torch.zeros(shape, device=device, dtype=model.dtype)}
    off: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    tries: list[dict[str, Any]] = [text, text | image, image]
    yield from (inputs | off for inputs in tries if inputs)


def _floats(value: object) -> Iterator[Tensor]:
    """Every tensor of floating-point numbers in a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _floats(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _floats(entry)
