"""Layers of a model that have the same structure, so that one of them can stand for all in a trial.

Two layers are twins if their trees of modules agree in classes, in the shapes and types of all tensors, and in every
other attribute: numbers, strings, code of hooks, shared objects. Only `layer_idx` of transformers' own classes may
differ, by which a layer finds its cache. An unknown attribute makes layers different, which costs time and no
correctness.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Twins = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Path of a list of layers -> name of the first layer of a structure -> names of all layers of that structure."""
_TREE = ("_parameters", "_buffers", "_modules")


def twin_layers(model: nn.Module) -> Twins:
    """The outermost lists of `model` in which some layers have the same structure."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    outer = [("", model)]
    while outer:
        path, module = outer.pop()
        if isinstance(module, nn.ModuleList):
            groups: dict[Hashable, list[str]] = {}
            for name, child in module._modules.items():
                groups.setdefault(_structure(child), []).append(name)
            if len(groups) < len(module):
                found[path] = {names[0]: tuple(names) for names in groups.values()}
            continue
        outer += [
            (f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()
            if child is not None
        ]
    return found


@contextmanager
def only_first(model: nn.Module, twins: Twins) -> Iterator[None]:
    """Inside, the lists hold only the first layer of each structure, under its own name."""
    lists = {path: model.get_submodule(path) for path in twins}
    before = {path: module._modules for path, module in lists.items()}
    try:
        for path, module in lists.items():
            module._modules = {name: before[path][name] for name in twins[path]}
        yield
    finally:
        for path, module in lists.items():
            module._modules = before[path]


def with_twins(paths: Iterable[str], twins: Twins) -> frozenset[str]:
    """The paths, and those of the same layers in all twins."""
    found = set(paths)
    for path in list(found):
        for root, groups in twins.items():
            if path.startswith(root + "."):
                name, dot, rest = path[len(root) + 1 :].partition(".")
                found |= {f"{root}.{other}{dot}{rest}" for other in groups[name]}
    return frozenset(found)


def _structure(module: nn.Module | None) -> Hashable:
    """Equal for modules that are twins."""
    if module is None:
        return None
    index = "layer_idx" if type(module).__module__.startswith("transformers.") else None
    values = tuple(
        (name, tuple(map(_value, value.values())) if name.endswith("_hooks") else _value(value))
        for name, value in vars(module).items()
        if name not in _TREE and name != index
    )
    tensors = tuple(
        (name, None if tensor is None else (type(tensor), tensor.shape, tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    return type(module), values, tensors, tuple((n, _structure(child)) for n, child in module._modules.items())


def _value(value: object) -> Hashable:
    """Equal for attributes that have the same meaning; for objects, the identity."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(map(_value, value))
    if isinstance(value, dict):
        return type(value), tuple((key, _value(entry)) for key, entry in value.items())
    if isinstance(value, functools.partial):
        return functools.partial, _value(value.func), _value(value.args), _value(value.keywords)
    bound = getattr(value, "__closure__", None) or getattr(value, "__defaults__", None)
    code = None if bound else getattr(value, "__code__", None)
    return code or id(value)
