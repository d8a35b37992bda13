"""Recurrent and convolutional layers while a packed row runs: the same modules, with documents kept apart.

A layer of transformers calls its scan and its convolution by name. Its replacement shares everything with it, its
Parameters, children, hooks and code, and looks those names up in `tables.ROW_OPERATORS` first. So projections stay
what they are, with adapters or quantised, and nothing outside of the replacement changes. Layers without such names
are found by their structure (`tables.ROW_LAYERS`).

Nothing here is assumed to be right: `base.forward.prepare` compares the rows with documents run alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from loratune.base.row_operators import positions_of
from loratune.fused.formulas import is_hooked
from loratune.ops.recurrence.convolution import causal_convolution
from loratune.ops.recurrence.decayed import decayed_attention
from loratune.ops.state import ForwardState
from loratune.tables import ROW_LAYERS, ROW_OPERATORS, load_entry

Forward = Callable[..., object]
_LENGTHS = (16, 64, 128)
"""Lengths of chunks of `ops.recurrence`: documents must be tried on both sides of each."""


class RowLayer(Protocol):
    """Finds a kind of layer, and the function that runs it on a packed row."""

    def __call__(self, module: nn.Module, state: ForwardState) -> Forward | None:
        """The forward that replaces that of `module`; None if the module is of another kind."""
        ...


@contextmanager
def installed(model: nn.Module, state: ForwardState) -> Iterator[int]:
    """Replaces recurrent and convolutional layers, yields their number, and puts the originals back on exit."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    operators = {name: partial(load_entry(place), state) for name, place in ROW_OPERATORS.items()}
    finders = [cast(RowLayer, load_entry(place)) for place in ROW_LAYERS.values()]
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                other = replacement(child, operators, finders, state)
                if other is not None:
                    swapped.append((parent, name, child))
                    parent._modules[name] = other
        yield len(swapped)
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def count(model: nn.Module) -> int:
    """Number of layers that `installed` replaces."""
    with installed(model, ForwardState()) as number:
        return number


def lengths_of(model: nn.Module) -> tuple[int, ...]:
    """Document lengths at which the replacements of a model start to compute differently; empty without any."""
    return _LENGTHS if count(model) else ()


def replacement(
    module: nn.Module, operators: Mapping[str, Forward], finders: list[RowLayer], state: ForwardState
) -> nn.Module | None:
    """A module that shares everything with `module` and keeps documents apart; None if nothing is to be done.

    Hooks that replace `forward` itself (offloading by accelerate) would be lost, so such layers are left alone.
    """
    if "forward" in vars(module):
        return None
    methods: dict[str, Forward] = {}
    for finder in finders:
        found = finder(module, state)
        if found is not None:
            methods["forward"] = found
            break
    else:
        methods = _renamed_methods(module, operators)
    if not methods:
        return None
    other = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__.update({name: MethodType(function, other) for name, function in methods.items()})
    return other


def _renamed_methods(module: nn.Module, operators: Mapping[str, Forward]) -> dict[str, Forward]:
    """Methods of the module's classes that call an operator, as functions that call ours."""
    found: dict[str, Forward] = {}
    for name in dir(type(module)):
        method = inspect.getattr_static(type(module), name)
        function = inspect.unwrap(method) if callable(method) else None
        if isinstance(function, FunctionType) and function.__module__ == type(module).__module__:
            called = {n: operators[n] for n in function.__code__.co_names if n in operators}
            called = {n: ours for n, ours in called.items() if n in function.__globals__}
            if called:
                found[name] = _with_names(function, called)
    return found


def _with_names(function: FunctionType, names: Mapping[str, Forward]) -> FunctionType:
    """The same code, which finds other functions under the given global names."""
    other = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def short_convolution(module: nn.Module, state: ForwardState) -> Forward | None:
    """A causal depthwise `nn.Conv1d` that is called as a module; the caller drops what lies behind the row."""
    if type(module) is not nn.Conv1d or is_hooked(module):
        return None
    (size,) = module.kernel_size
    depthwise = module.groups == module.in_channels == module.out_channels
    if not depthwise or (module.stride, module.dilation, module.padding) != ((1,), (1,), (size - 1,)):
        return None

    def forward(self: nn.Conv1d, x: Tensor) -> Tensor:
        """(batch, channels, T) -> (batch, channels, T)."""
        return causal_convolution(x, self.weight[:, 0], self.bias, positions_of(state, x.shape[2]))

    return forward


def token_shift(module: nn.Module, state: ForwardState) -> Forward | None:
    """A padding module that gives each token the hidden state before it (RWKV)."""
    if type(module) is not nn.ZeroPad2d or tuple(module.padding) != (0, 0, 1, -1):
        return None

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        """(batch, T, d) -> (batch, T, d), zeros at the first token of each document."""
        shifted = nn.functional.pad(x, (0, 0, 1, -1))
        return shifted * (positions_of(state, x.shape[1]) > 0)[:, None]

    return forward


_LIGHTNING = {"qkv_proj", "output_gate", "norm", "out_proj", "act_fn"}


def lightning_attention(module: nn.Module, state: ForwardState) -> Forward | None:
    """Linear attention with a fixed decay per head and a gate (MiniMax).

    Source: Qin et al. 2024, arXiv:2401.04658.
    """
    if set(module._modules) != _LIGHTNING or "slope_rate" not in module._buffers:
        return None

    def forward(self: nn.Module, hidden_states: Tensor, *arguments: object, **others: object) -> tuple[Tensor, None]:
        """(batch, T, d) -> (batch, T, d), and no state."""
        part = cast(Mapping[str, Callable[[Tensor], Tensor]], self._modules)
        slopes = cast(Tensor, self._buffers["slope_rate"]).flatten()
        qkv = part["act_fn"](part["qkv_proj"](hidden_states))
        q, k, v = qkv.unflatten(-1, (len(slopes), -1)).chunk(3, -1)
        decay = (-slopes).expand(q.shape[:3])
        out = decayed_attention(q, k, v, decay, None, positions_of(state, q.shape[1]))
        out = part["norm"](out.flatten(-2))
        return part["out_proj"](torch.sigmoid(part["output_gate"](hidden_states)) * out), None

    return forward
