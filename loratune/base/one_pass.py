"""Norms and gated activations in one pass each, for decoder layers that are not fused.

transformers writes an RMS norm as eight operators with float32 in between, and autograd saves all of it. While rows
run, replacement modules compute norms and gated MLPs of a known formula (`fused.formulas`) with `ops.passes`, which
saves only the arguments. Modules with another formula are not replaced.

Replacements share the children of the originals, so parameter paths stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from loratune.fused.formulas import LARGE, NormForm, activation_kind, is_hooked, is_same, norm_form, result_of_copy
from loratune.ops import passes
from loratune.ops.layer import ActivationKind, NormSpec


class OnePassNorm(nn.Module):
    """Replaces an RMS norm with a frozen weight."""

    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child
    _spec: NormSpec

    @classmethod
    def from_base(cls, base: nn.Module, form: NormForm) -> OnePassNorm:
        """The replacement of `base`, whose formula is `form`."""
        norm = cls.__new__(cls)
        norm.__dict__.update(base.__dict__)
        weight = base.get_parameter("weight").detach()
        norm._base, norm._spec = (base,), form.spec(weight)
        return norm

    def forward(self, x: Tensor, *more: object, **named: object) -> object:
        """(..., d) -> (..., d). Calls with more arguments, such as a gate, run the original."""
        if more or named or x.dtype != self.weight.dtype:
            return self._base[0](x, *more, **named)
        return passes.norm(x, self._spec)


class OnePassMlp(nn.Module):
    """Replaces down(activation(gate(x)) * up(x)), where gate and up may be one projection."""

    _base: tuple[nn.Module]
    _kind: ActivationKind

    @classmethod
    def from_base(cls, base: nn.Module, kind: ActivationKind) -> OnePassMlp:
        """The replacement of `base`, whose activation is `kind`."""
        mlp = cls.__new__(cls)
        mlp.__dict__.update(base.__dict__)
        mlp._base, mlp._kind = (base,), kind
        return mlp

    def forward(self, x: Tensor, *more: object, **named: object) -> object:
        """(..., d) -> (..., d). Calls with more arguments run the original."""
        if more or named:
            return self._base[0](x, *more, **named)
        if "gate_up_proj" in self._modules:
            gate, up = self._project("gate_up_proj", x).chunk(2, -1)
        else:
            gate, up = self._project("gate_proj", x), self._project("up_proj", x)
        return self._project("down_proj", passes.gated(gate, up, self._kind))

    def _project(self, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, cast(nn.Module, self._modules[name])(x))


_SEPARATE = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
_PACKED = {"gate_up_proj": (32, 8), "down_proj": (8, 16)}
"""Projections of a gated MLP, and (d_out, d_in) of the trial projections."""


@contextmanager
def installed(model: nn.Module) -> Iterator[int]:
    """Replaces every module that has a `replacement`, yields their number, and puts the originals back on exit."""
    with _replaced(model.modules(), replacement) as count:
        yield count


@contextmanager
def last_norm_installed(backbone: nn.Module) -> Iterator[int]:
    """As `installed`, but for the norm after the last decoder layer only."""
    with _replaced([backbone], norm_replacement) as count:
        yield count


@contextmanager
def _replaced(parents: Iterable[nn.Module], find: Callable[[nn.Module], nn.Module | None]) -> Iterator[int]:
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(parents):
            for name, child in list(parent.named_children()):
                other = find(child)
                if other is not None:
                    swapped.append((parent, name, child))
                    parent._modules[name] = other
        yield len(swapped)
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def replacement(module: nn.Module) -> nn.Module | None:
    """The replacement of an RMS norm or a gated MLP with a formula of `ops.passes`, or None."""
    norm = norm_replacement(module)
    if norm is not None or is_hooked(module):
        return norm
    kind = gated_kind(module)
    return None if kind is None else OnePassMlp.from_base(module, kind)


def norm_replacement(module: nn.Module) -> OnePassNorm | None:
    """The replacement of an RMS norm, or None. PyTorch computes a LayerNorm in one pass itself."""
    form = None if is_hooked(module) else norm_form(module)
    return None if form is None or form.kind != "rms" else OnePassNorm.from_base(module, form)


@torch.no_grad()
def gated_kind(module: nn.Module) -> ActivationKind | None:
    """The activation of an MLP that computes down(activation(gate(x)) * up(x)) and nothing else, or None."""
    names = {name for name, child in module._modules.items() if child is not None}
    shapes = next((shapes for shapes in (_SEPARATE, _PACKED) if set(shapes) <= names), None)
    if shapes is None or module._parameters or len(names) != len(shapes) + 1:
        return None
    (name,) = names - set(shapes)
    activation = module._modules[name]
    assert activation is not None
    kind = activation_kind(activation)
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(0)
    layers = {n: torch.nn.utils.skip_init(nn.Linear, *shape[::-1], bias=False) for n, shape in shapes.items()}
    for layer in layers.values():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    children, x = {**layers, name: activation}, torch.randn(3, 8, generator=generator)
    for rows in (x, LARGE * x):
        got, expected = (result_of_copy(m, {}, children, rows) for m in (module, OnePassMlp.from_base(module, kind)))
        if not is_same(got, expected):
            return None
    return kind
