"""Which modules of a model a `LoraConfig` means: the layers to adapt, their ranks, and the modules to train in full.

The matching rules are PEFT's, so that a configuration means the same there: a list entry is a module's whole path
or its end after a dot, a string is a regular expression matched in full, and the keys of `rank_pattern` and
`alpha_pattern` are regular expressions anchored at the end of a path, the first that fits winning. Two things
differ on purpose. An entry that matches nothing is an error that lists near names instead of being ignored, and an
entry of `modules_to_save` is matched like any other, so that "norm" does not take `input_layernorm` as well.

Nothing here changes the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.config import LoraConfig, from_dict
from loratune.errors import AdapterError, ConfigError, nearest
from loratune.lora.layers import Unadaptable, layer_class
from loratune.lora.linear import LoraLayer
from loratune.precision.linear import QuantisedLinear

ALL_LINEAR = "all-linear"
_HEAD_NAMES = ("score", "classifier")  # of transformers' classification models
_MAX_LISTED = 12
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Place:
    """One module and every path at which it stands; the first is the one that files name."""

    module: nn.Module
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A layer to adapt."""

    path: str
    places: tuple[str, ...]
    base: nn.Module
    layer_class: type[LoraLayer]
    r: int
    scaling: float


@dataclass(frozen=True)
class Selection:
    """What a configuration selects in one model, in the order of the model's modules."""

    targets: tuple[Target, ...]
    saved: tuple[Place, ...]
    """Modules of modules_to_save."""
    left_out: tuple[str, ...] = ()
    """Why each layer that "all-linear" would mean, but that cannot be adapted, is not among the targets."""


def select(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Selection:
    """Finds what `config` means in `model`.

    Args:
        strict: an entry that matches nothing, or a rank larger than the layer's smaller side, is an error. Reading
            a file of PEFT's is not strict: what the file holds is compared with the selection afterwards.

    Raises:
        ConfigError: a value is out of range.
        AdapterError: nothing, or something that cannot be adapted, is matched.
    """
    check_settings(config)
    places = find_places(model)
    saved = _saved(model, places, config.modules_to_save or [], strict)
    inside = _inside([place.paths for place in saved])
    chosen = _chosen(model, places, config, strict)
    targets, left_out = [], []
    for place, path in chosen:
        if inside(place.paths):
            continue
        try:
            targets.append(_target(place, path, _class_for(model, place), config, strict))
        except Unadaptable as error:
            if config.target_modules != ALL_LINEAR:
                raise AdapterError(f"{error}; leave it out with exclude_modules") from error
            left_out.append(str(error))
    if not targets:
        why = f": {left_out[0]}" if left_out else ""
        raise AdapterError(f"{_target_words(config)} leaves no layer of {type(model).__name__} to adapt{why}")
    if strict:
        _check_patterns(config, targets)
    return Selection(tuple(targets), tuple(saved), tuple(left_out))


def check_settings(config: LoraConfig) -> None:
    """Raises ConfigError for a value that no model could make sense of."""
    from_dict(LoraConfig, vars(config), "LoraConfig")  # types and ranges, also of values set since it was made
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("layers_pattern without layers_to_transform selects nothing; set both or neither")
    is_expression = isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR
    if config.layers_to_transform is not None and is_expression:
        raise ConfigError(
            "layers_to_transform does not go with a regular expression in target_modules; "
            "put the layer numbers into the expression"
        )


def find_places(model: nn.Module) -> list[Place]:
    """Every module below the root with all its paths, in the order of `named_modules`."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            modules[id(module)] = module
            paths.setdefault(id(module), []).append(path)
    return [Place(module, tuple(paths[key])) for key, module in modules.items()]


def shortest_names(paths: Sequence[str], others: Iterable[str]) -> list[str]:
    """The fewest-dotted names that, matched as exact path or `.suffix`, mean `paths` and none of `others`.

    This is how "all-linear" is written to a file: `["q_proj", "v_proj", ...]`, which every reader understands.
    """
    wanted, unwanted = set(paths), set(others) - set(paths)
    suffixes_of_others = {suffix for path in unwanted for suffix in _suffixes(path)}
    names = {next((s for s in _suffixes(p) if s not in suffixes_of_others), p) for p in wanted}
    return sorted(names)


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _named(entry: str, path: str) -> bool:
    return path == entry or path.endswith("." + entry)


def _inside(groups: Iterable[Sequence[str]]) -> Callable[[Sequence[str]], bool]:
    """A test whether any of some paths lies at or below one of the groups' paths."""
    roots = [path for group in groups for path in group]

    def test(paths: Sequence[str]) -> bool:
        return any(p == root or p.startswith(root + ".") for p in paths for root in roots)

    return test


def _chosen(model: nn.Module, places: list[Place], config: LoraConfig, strict: bool) -> list[tuple[Place, str]]:
    """The places that target_modules, layers_to_transform and exclude_modules leave, each with the path matched."""
    wanted = config.target_modules
    excluded = _matcher("exclude_modules", config.exclude_modules, model, places, strict)
    if wanted == ALL_LINEAR:
        head = output_heads(model)
        found = [
            (place, place.paths[0])
            for place in places
            if isinstance(place.module, nn.Linear | Conv1D | QuantisedLinear)
            and not any(place.module is h for h in head)
        ]
    else:
        matches = _matcher("target_modules", wanted, model, places, strict)
        found = [(p, path) for p in places if (path := next(filter(matches, p.paths), None)) is not None]
    if config.layers_to_transform is not None:
        found = [(p, path) for p, path in found if _in_layers(path, config)]
        if strict:
            _check_layers(model, places, config)
    return [(p, path) for p, path in found if not any(map(excluded, p.paths))]


def _matcher(
    field: str, entries: str | list[str] | None, model: nn.Module, places: list[Place], strict: bool
) -> Callable[[str], bool]:
    """Turns target_modules or exclude_modules into a test of a path; raises if an entry matches no module."""
    if not entries:
        return lambda path: False
    every = [path for place in places for path in place.paths]
    if isinstance(entries, str):
        expression = _compiled(field, entries)
        if strict and not any(expression.fullmatch(path) for path in every):
            raise AdapterError(
                f'{field} "{entries}" is a regular expression that fits no module of {type(model).__name__} in full.'
                f"{_layers_here(places)}"
            )
        return lambda path: expression.fullmatch(path) is not None
    if strict:
        check_entries(field, entries, model, places)
    return lambda path: any(_named(entry, path) for entry in entries)


def check_entries(field: str, entries: Iterable[str], model: nn.Module, places: list[Place]) -> None:
    """Raises AdapterError for the first entry that is neither a path in the model nor the end of one."""
    names = {suffix for place in places for path in place.paths for suffix in _suffixes(path)}
    for entry in entries:
        if entry not in names:
            near = nearest(entry, names) or _layers_here(places)
            raise AdapterError(f'{field} "{entry}" matches no module of {type(model).__name__}.{near}')


def _layers_here(places: list[Place]) -> str:
    """Names a person could have meant: the last components of the paths of layers that can be adapted."""
    leaves = {
        place.paths[0].rpartition(".")[2]: None
        for place in places
        if isinstance(place.module, nn.Linear | Conv1D | QuantisedLinear | nn.Embedding)
    }
    listed = ", ".join(list(leaves)[:_MAX_LISTED])
    return f" Layers here: {listed}{', …' if len(leaves) > _MAX_LISTED else ''}." if leaves else ""


def _compiled(field: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise AdapterError(f'{field} "{expression}" is not a regular expression: {error}') from error


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The head of a transformers model, which "all-linear" leaves out: of tokens, or else of classes."""
    get_head = getattr(model, "get_output_embeddings", None)
    if not callable(get_head):
        return []
    head = get_head()
    if head is not None:
        return [head]
    named = (getattr(model, name, None) for name in _HEAD_NAMES)
    return [m for top in named if isinstance(top, nn.Module) for m in top.modules()]


def _layer_index(path: str, layers_pattern: Sequence[str] | None) -> int | None:
    """The number after the module list's name: the first number in the path, or that after one of the names."""
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in layers_pattern or ()] or [r"(?:^|.*?\.)[^.]*\.(\d+)\."]
    found = next((m for e in expressions if (m := _compiled("layers_pattern", e).match(path))), None)
    return None if found is None else int(found[1])


def _in_layers(path: str, config: LoraConfig) -> bool:
    if isinstance(config.target_modules, list) and path in config.target_modules:
        return True
    return _layer_index(path, config.layers_pattern) in (config.layers_to_transform or [])


def _check_layers(model: nn.Module, places: list[Place], config: LoraConfig) -> None:
    here = {_layer_index(path, config.layers_pattern) for place in places for path in place.paths} - {None}
    missing = [i for i in config.layers_to_transform or [] if i not in here]
    if missing:
        known = sorted(i for i in here if i is not None)
        counted = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
        under = f" under {config.layers_pattern}" if config.layers_pattern else ""
        raise AdapterError(
            f"layers_to_transform {missing[0]} does not exist: {type(model).__name__} has {counted}{under}"
        )


def _class_for(model: nn.Module, place: Place) -> type[LoraLayer]:
    """The class that can stand in for the layer, wherever it stands. Raises Unadaptable."""
    parents = [model.get_submodule(path.rpartition(".")[0]) for path in place.paths]
    kinds = [layer_class(path, place.module, parent) for path, parent in zip(place.paths, parents, strict=True)]
    return kinds[0]


def _target(place: Place, path: str, kind: type[LoraLayer], config: LoraConfig, strict: bool) -> Target:
    """The layer that was matched by `path`, one of its places, with its rank, checked, and scaling."""
    r = _by_pattern("rank_pattern", config.rank_pattern, path, config.r)
    alpha = _by_pattern("alpha_pattern", config.alpha_pattern, path, config.lora_alpha)
    d_in, d_out = kind.features(place.module)
    if strict and r > min(d_in, d_out):
        leaf = path.rpartition(".")[2]
        raise AdapterError(
            f'rank {r} is larger than "{path}", which is {d_in} -> {d_out}: set rank_pattern {{"{leaf}": '
            f'{min(d_in, d_out)}}} or exclude_modules ["{leaf}"]'
        )
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return Target(place.paths[0], place.paths, place.module, kind, r, scaling)


def _by_pattern(field: str, patterns: dict[str, _Number], path: str, default: _Number) -> _Number:
    for key, value in patterns.items():
        if _compiled(field, rf"(.*\.)?({key})$").match(path):
            return value
    return default


def _check_patterns(config: LoraConfig, targets: list[Target]) -> None:
    """Raises AdapterError for a key of rank_pattern or alpha_pattern that fits no adapted layer."""
    fields: dict[str, Iterable[str]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for field, keys in fields.items():
        for key in keys:
            expression = _compiled(field, rf"(.*\.)?({key})$")
            if not any(expression.match(path) for target in targets for path in target.places):
                names = {suffix for target in targets for suffix in _suffixes(target.path)}
                leaves = ", ".join(list({t.path.rpartition(".")[2]: None for t in targets})[:_MAX_LISTED])
                near = nearest(key, names) or f" Adapted are: {leaves}."
                raise AdapterError(f'{field} "{key}" fits none of the adapted layers.{near}')


def _saved(model: nn.Module, places: list[Place], entries: list[str], strict: bool) -> list[Place]:
    """The outermost modules that modules_to_save names."""
    if strict:
        check_entries("modules_to_save", entries, model, places)
    named = [p for p in places if any(_named(entry, path) for path in p.paths for entry in entries)]
    outermost = [p for p in named if not any(_inside([q.paths])(p.paths) for q in named if q.module is not p.module)]
    for place in outermost:
        if next(place.module.parameters(), None) is None:
            raise AdapterError(f'modules_to_save: "{place.paths[0]}" has no parameters to train')
    return outermost


def _target_words(config: LoraConfig) -> str:
    parts = [f"target_modules {config.target_modules!r}"]
    for field in ("exclude_modules", "modules_to_save", "layers_to_transform"):
        if getattr(config, field):
            parts.append(f"{field} {getattr(config, field)!r}")
    return " with ".join(parts)
