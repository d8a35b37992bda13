"""Activations of layers that run as modules: a few layers run without data, and the others follow by kind.

Layers of one kind take the same memory, so the whole model is one run with a layer of each kind, plus the increments
of further layers. A model of a hundred layers then takes no longer than one of three. A model that cannot run without
data, because an operation reads values, gets an estimate from the widths of its linear layers.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.config import LoraConfig
from loratune.fused.policy import ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.lora.inject import attach
from loratune.memory.simulate import SimulatedBytes, simulate, without_data

_CANNOT_RUN = (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""Errors of models whose forward needs data, a cache or further inputs."""
_SCAN = re.compile(r"mamba|linearattention|lightning|recurrent|deltanet|ssm|rwkv|scan|mixer", re.IGNORECASE)
"""Names of modules that walk over the tokens of a row."""
_STEPS = re.compile(r"(?<!2)mambamixer$|rwkv|recurrentblock", re.IGNORECASE)
"""Names of modules that take a step for each token; other scans take a step for each chunk of 64 tokens."""
_SHORT, _SHORT_STEPS = 64, 8
"""Tokens of the shorter row of a model that walks over tokens, by chunks and by single tokens."""
_SCRATCH = 3
"""Tensors of the widest layer's size that live at once in a model that cannot run."""


class ModuleRows:
    """Activation memory of a model's rows; each run is made once."""

    def __init__(self, model: PreTrainedModel, lora: LoraConfig, *, on_gpu: bool) -> None:
        self._model = without_data(copy.deepcopy(model.config), model.dtype)
        attach(self._model, lora, name="estimate", seed=0)
        self._on_gpu = on_gpu
        self._layers = list(decoder_layers(self._model))
        self._kinds = [_kind(layer) for layer in self._layers]
        scans = {n for layer in self._layers for m in layer.modules() if _SCAN.search(n := type(m).__name__)}
        steps = any(map(_STEPS.search, scans))
        self._short = 0 if not scans else _SHORT_STEPS if steps else _SHORT
        self._runs: dict[tuple[int, Level, tuple[int, ...]], SimulatedBytes] = {}
        self.why_rough: str | None = None
        """The reason why activations are estimated from widths; None if the model runs without data."""

    def __call__(self, tokens: int, level: Level) -> SimulatedBytes:
        """Bytes of one row of `tokens` tokens, every layer at `level`."""
        if self.why_rough is None:
            try:
                return self._by_tokens(tokens, level) if self._short else self._by_kind(tokens, level)
            except _CANNOT_RUN as error:
                self.why_rough = f"{type(error).__name__}: {error}".splitlines()[0]
        return self._by_width(tokens, level)

    def _by_tokens(self, tokens: int, level: Level) -> SimulatedBytes:
        """A line through two short rows: a scan takes one step after the other, each as much memory."""
        short = self._short
        if tokens <= 2 * short:
            return self._by_kind(tokens, level)
        one, two = self._by_kind(short, level), self._by_kind(2 * short, level)
        more = tokens / short - 1
        saved, peak = (int(a + more * (b - a)) for a, b in ((one.saved, two.saved), (one.peak, two.peak)))
        return SimulatedBytes(saved, max(peak, saved))

    def _by_kind(self, tokens: int, level: Level) -> SimulatedBytes:
        counts = Counter(self._kinds)
        first = {kind: self._kinds.index(kind) for kind in counts}
        if len(self._layers) <= len(counts) + 1:
            return self._run(tokens, level, range(len(self._layers)))
        base = self._run(tokens, level, sorted(first.values()))
        saved, above = base.saved, base.peak - base.saved
        further = {kind: count - 1 for kind, count in counts.items() if count > 1}
        if level in (Level.FULL, Level.OFFLOAD):  # a layer of any kind saves its input alone
            further = {counts.most_common(1)[0][0]: sum(further.values())}
        for kind, count in further.items():
            second = self._kinds.index(kind, first[kind] + 1)
            more = self._run(tokens, level, sorted([*first.values(), second]))
            saved += count * (more.saved - base.saved)
            above = max(above, more.peak - more.saved)  # gradients of all layers are counted by the budget
        return SimulatedBytes(saved, saved + above)

    def _run(self, tokens: int, level: Level, chosen: Sequence[int]) -> SimulatedBytes:
        key = (tokens, level, tuple(chosen))
        if key not in self._runs:
            with self._only(chosen):
                plan = ActivationPlan.uniform(level, len(chosen))
                self._runs[key] = simulate(self._model, tokens, plan, on_gpu=self._on_gpu)
        return self._runs[key]

    @contextmanager
    def _only(self, chosen: Sequence[int]) -> Iterator[None]:
        """The model with these of its layers, and a configuration that has as many."""
        layers, whole = decoder_layers(self._model), len(self._layers)
        if len(chosen) == whole:
            yield
            return
        configs = {id(c): c for m in self._model.modules() if (c := getattr(m, "config", None)) is not None}
        text = self._model.config.get_text_config()
        configs[id(text)] = text
        before = {key: dict(vars(config)) for key, config in configs.items()}
        numbered = [(m, i) for m in layers.modules() if isinstance(i := getattr(m, "layer_idx", None), int)]
        places = {old: new for new, old in enumerate(chosen)}
        for config in configs.values():
            for name, value in vars(config).items():
                if isinstance(value, list) and len(value) == whole:
                    vars(config)[name] = [value[index] for index in chosen]
                elif name in ("num_hidden_layers", "n_layer", "num_layers") and value == whole:
                    vars(config)[name] = len(chosen)
        for module, index in numbered:
            vars(module)["layer_idx"] = places.get(index, index)
        layers._modules = {str(place): self._layers[index] for place, index in enumerate(chosen)}
        try:
            yield
        finally:
            layers._modules = {str(index): layer for index, layer in enumerate(self._layers)}
            for module, index in numbered:
                vars(module)["layer_idx"] = index
            for key, config in configs.items():
                vars(config).clear()
                vars(config).update(before[key])

    def _by_width(self, tokens: int, level: Level) -> SimulatedBytes:
        """Inputs and outputs of every linear layer, of which the frugal levels save one per layer."""
        columns = [sum(map(_columns, layer.modules())) for layer in self._layers or [self._model]]
        element = tokens * self._model.dtype.itemsize
        widest = element * max(columns)
        if level is Level.NONE:
            return SimulatedBytes(element * sum(columns), element * sum(columns) + _SCRATCH * widest)
        stream = element * cast(Tensor, self._model.get_input_embeddings().weight).shape[-1] * len(columns)
        return SimulatedBytes(stream, stream + (1 + _SCRATCH) * widest)


def _kind(layer: nn.Module) -> object:
    """Equal for layers of the same modules and shapes."""
    return tuple(
        (path, type(module).__name__, tuple((n, p.shape) for n, p in module.named_parameters(recurse=False)))
        for path, module in layer.named_modules()
    )


def _columns(module: nn.Module) -> int:
    """Inputs and outputs of a module with a weight matrix; of experts in one tensor, of one expert."""
    shapes = [
        p.shape for _, p in module.named_parameters(recurse=False) if p.dim() in (2, 3) and p.is_floating_point()
    ]
    return sum(shape[-2] + shape[-1] for shape in shapes)
