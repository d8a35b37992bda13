"""One pass for a norm, and for a gated activation, in layers of any architecture that are not fused as a whole.

transformers writes an RMS norm as eight operators with float32 in between, all of it kept for the backward, and has
dozens of classes for it that differ in little: whether 1 is added to the weight, and where it is rounded. So none is
known here by name. What a module computes is asked of a copy of it with parameters of our own, and if that is one of
the forms of `ops.passes`, a stand-in runs these while rows do. A module that does more, or anything else, stays.

Stand-ins share the children of what they stand in for, so parameter paths stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.ops import passes

_EPS = ("variance_epsilon", "eps", "epsilon")
_EXACT = 1e-5
"""Relative error of float32 that counts as the same formula."""
_LARGE = 1e4
"""Factor of numbers that a module is asked with as well: some clamp."""
# What modules raise that cannot be run on a few numbers of ours.
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Form:
    """Which RMS norm a module is."""

    eps: float
    plus_one: bool
    """1 is added to the weight."""
    rounded: bool
    """What is multiplied by the weight has been rounded to the input's dtype before."""

    def weight(self, weight: Tensor) -> Tensor:
        """As `ops.passes.rms_norm` wants it."""
        weight = weight.detach()
        return weight if self.rounded else weight.float() + self.plus_one


class Norm(nn.Module):
    """Stands in for a norm with a frozen weight."""

    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child
    _form: Form
    _weight: Tensor

    @classmethod
    def from_base(cls, base: nn.Module, form: Form) -> Norm:
        """The stand-in for `base`, whose form this is."""
        norm = cls.__new__(cls)
        norm.__dict__.update(base.__dict__)
        weight = base._parameters["weight"]
        assert weight is not None
        norm._base, norm._form, norm._weight = (base,), form, form.weight(weight)
        return norm

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """(..., d) -> (..., d); asked for more, such as a gate, it is the module that answers."""
        if more or named or x.dtype != self.weight.dtype:
            return self._base[0](x, *more, **named)
        return passes.rms_norm(x, self._weight, self._form.eps)


class GatedMlp(nn.Module):
    """Stands in for down(activation(gate(x)) * up(x)), where gate and up may be one projection."""

    _base: tuple[nn.Module]
    _kind: passes.Kind

    @classmethod
    def from_base(cls, base: nn.Module, kind: passes.Kind) -> GatedMlp:
        """The stand-in for `base`, which has that activation."""
        mlp = cls.__new__(cls)
        mlp.__dict__.update(base.__dict__)
        mlp._base, mlp._kind = (base,), kind
        return mlp

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """(..., d) -> (..., d), as `Norm`."""
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
_TOGETHER = {"gate_up_proj": (32, 8), "down_proj": (8, 16)}
"""Projections of a gated MLP, and (d_out, d_in) of those that it is asked with."""


@contextmanager
def installed(model: nn.Module) -> Iterator[int]:
    """Puts the stand-ins where they are of use, gives their number, and puts the modules back on exit."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                other = stand_in(child)
                if other is not None:
                    swapped.append((parent, name, child))
                    parent._modules[name] = other
        yield len(swapped)
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def stand_in(module: nn.Module) -> nn.Module | None:
    """For a norm or a gated MLP that is one of the forms of `ops.passes` and nothing else, or None."""
    if _hooked(module):
        return None
    form = norm_form(module)
    if form is not None:
        return Norm.from_base(module, form)
    kind = gated_kind(module)
    return None if kind is None else GatedMlp.from_base(module, kind)


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, hooks))


@torch.no_grad()
def norm_form(module: nn.Module) -> Form | None:
    """The form of an RMS norm with a frozen weight and nothing else, or None."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.requires_grad or len(module._parameters) > 1:
        return None
    if module._modules or module._buffers:
        return None
    eps = next((float(module.__dict__[n]) for n in _EPS if isinstance(module.__dict__.get(n), float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    trial, x = (torch.randn(n, len(weight), generator=generator) for n in (1, 3))
    trial, x = trial[0], x * eps**0.5  # so small that eps counts
    form = next((form for one in (False, True) if _is_norm(module, form := Form(eps, one, False), trial, x)), None)
    if form is None:
        return None
    half, x = trial.bfloat16(), x.bfloat16()
    got = _asked(module, {"weight": half}, {}, x)
    if got is None or got.dtype != x.dtype:
        return None
    forms = [form] if form.plus_one else [form, replace(form, rounded=True)]
    return min(forms, key=lambda form: _off(got, passes.norm(x, form.weight(half), eps)))


def _is_norm(module: nn.Module, form: Form, weight: Tensor, x: Tensor) -> bool:
    for rows in (x, _LARGE * x):
        got = _asked(module, {"weight": weight}, {}, rows)
        if got is None or _off(got, passes.norm(rows, form.weight(weight), form.eps)) > _EXACT:
            return False
    return True


@torch.no_grad()
def gated_kind(module: nn.Module) -> passes.Kind | None:
    """The activation of an MLP that computes down(activation(gate(x)) * up(x)) and nothing else, or None."""
    names = {name for name, child in module._modules.items() if child is not None}
    shapes = next((shapes for shapes in (_SEPARATE, _TOGETHER) if set(shapes) <= names), None)
    if shapes is None or module._parameters or len(names) != len(shapes) + 1:
        return None
    (name,) = names - set(shapes)
    activation = module._modules[name]
    assert activation is not None
    if _hooked(activation):
        return None
    at = torch.linspace(-6, 6, 97)
    at = torch.cat([at, *(sign * at[-1:] * 10**k for k in range(1, 5) for sign in (-1, 1))])
    found = _asked(activation, {}, {}, at)
    kinds = (
        kind for kind in passes.KINDS if found is not None and torch.allclose(found, passes.activation(at, kind))
    )
    kind = next(kinds, None)
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(0)
    layers = {n: torch.nn.utils.skip_init(nn.Linear, *shape[::-1], bias=False) for n, shape in shapes.items()}
    for layer in layers.values():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    children, x = {**layers, name: activation}, torch.randn(3, 8, generator=generator)
    for rows in (x, _LARGE * x):
        got, expected = (_asked(m, {}, children, rows) for m in (module, GatedMlp.from_base(module, kind)))
        if got is None or expected is None or _off(got, expected) > _EXACT:
            return None
    return kind


def _asked(
    module: nn.Module, parameters: dict[str, Tensor], children: dict[str, nn.Module], x: Tensor
) -> Tensor | None:
    """What a copy of the module with these parameters and children makes of x; None if it refuses."""
    trial = copy.copy(module)
    trial.__dict__["_parameters"] = {n: nn.Parameter(t, requires_grad=False) for n, t in parameters.items()}
    trial.__dict__["_modules"] = children
    try:
        out = trial(x)
    except _REFUSALS:
        return None
    return out if isinstance(out, Tensor) and out.shape == x.shape else None


def _off(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())
