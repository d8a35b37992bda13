"""The modules that a `LoraConfig` selects in a model: layers to adapt with their ranks, and modules to train in full.

The matching rules are PEFT's, so that a configuration means the same there. A list entry is a module's whole path or
its end after a dot. A string is a regular expression matched in full. The keys of `rank_pattern` and `alpha_pattern`
are regular expressions anchored at the end of a path, and the first match wins. Three things differ on purpose:

- An entry that matches nothing is an error that lists near names, instead of being ignored.
- An entry of `modules_to_save` is matched like any other, so "norm" does not take `input_layernorm` as well.
- "all-linear" skips layers that cannot be adapted or are narrower than the rank, and reports them. Elsewhere a rank
  above a layer's smaller side is accepted with a note.

Nothing here changes the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from loratune.config import LoraConfig, from_dict
from loratune.errors import AdapterError, ConfigError, nearest
from loratune.lora import expert_targets
from loratune.lora.direct_reads import direct_reads
from loratune.lora.expressions import PathExpression, fits_end
from loratune.lora.layer import LoraLayer, LoraVariant
from loratune.lora.layers import Unadaptable, is_adaptable, is_linear, kind_of
from loratune.lora.paths import ModulePaths, find_modules, inside, named, suffixes
from loratune.lora.target import Target
from loratune.lora.variants import variant_of

ALL_LINEAR = "all-linear"
_HEAD_NAMES = ("score", "classifier")  # of transformers' classification models
_MAX_LISTED = 12
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Selection:
    """The modules that a configuration selects in one model, in the order of the model's modules."""

    targets: tuple[Target, ...]
    saved: tuple[ModulePaths, ...]
    """Modules of modules_to_save."""
    left_out: tuple[str, ...] = ()
    """Reasons why "all-linear" left linear layers out. Layers narrower than the rank share one line."""
    notes: tuple[str, ...] = ()
    """Settings that are legal and of no use."""


class _TooNarrow(AdapterError):
    """The rank is larger than the smaller side of a layer."""


def select(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Selection:
    """Finds the modules that `config` selects in `model`.

    Args:
        strict: an entry that matches nothing is an error, and "all-linear" skips narrow layers. Reading a file is not
            strict, because its tensors are compared with the selection afterwards.

    Raises:
        ConfigError: a value is out of range.
        AdapterError: nothing is matched, or a matched layer cannot be adapted.
    """
    check_settings(config)
    modules = find_modules(model)
    saved = _saved(model, modules, config.modules_to_save or [], strict)
    is_inside = inside([entry.paths for entry in saved])
    variant, read = variant_of(config), direct_reads(model)
    routers = expert_targets.routers(modules) if config.target_modules == ALL_LINEAR else set()
    targets: list[Target] = []
    unadaptable: list[str] = []
    narrow: list[tuple[str, _TooNarrow]] = []
    taken: set[str] = set()
    for entry, path in _chosen(model, modules, config, strict):
        if is_inside(entry.paths) or entry.paths[0] in taken | routers:
            continue
        try:
            if entry.paths[0] in read:
                raise Unadaptable(_read_directly(model, path))
            skip = strict and config.target_modules == ALL_LINEAR and not _matches_a_key(config.rank_pattern, path)
            found = _with_parts(entry, path, _kind_of(model, entry), variant, config, skip)
            if strict and config.lora_dropout and not all(target.kind.has_dropout for target in found):
                raise Unadaptable(f'"{path}" cannot have lora_dropout: it never shows the input of a projection')
            targets += found
            taken |= {target.path for target in found}
        except Unadaptable as error:
            if config.target_modules != ALL_LINEAR:
                raise AdapterError(f"{error}; leave it out with exclude_modules") from error
            unadaptable.append(str(error))
        except _TooNarrow as error:
            narrow.append((path, error))
    chosen = _experts(model, modules, config, variant, is_inside, strict)
    targets = _in_order(modules, [*targets, *chosen.targets])
    left_out = unadaptable + _narrow_line(narrow) + expert_targets.routers_line(routers) + list(chosen.left_out)
    if not targets:
        why = f": {narrow[0][1] if narrow and not unadaptable else left_out[0]}" if left_out else ""
        raise AdapterError(f"{_target_words(config)} leaves no layer of {type(model).__name__} to adapt{why}")
    if strict:
        _check_patterns(config, targets)
    return Selection(
        tuple(targets),
        tuple(saved),
        tuple(left_out),
        (*_wide_line(targets), *_two_paths(model, targets), *chosen.notes),
    )


def _experts(
    model: nn.Module,
    modules: list[ModulePaths],
    config: LoraConfig,
    variant: LoraVariant,
    is_inside: Callable[[Sequence[str]], bool],
    strict: bool,
) -> expert_targets.ExpertChoice:
    """The experts that target_parameters selects. PEFT does not apply exclude_modules to them, so files do not."""
    fits = _matcher("exclude_modules", config.exclude_modules if strict else None, model, modules, False)
    allowed = [entry for entry in modules if not is_inside(entry.paths) and not any(map(fits, entry.paths))]
    return expert_targets.choose(allowed, config, variant, strict=strict)


def _in_order(modules: list[ModulePaths], targets: list[Target]) -> list[Target]:
    """The targets in the order of the model's modules."""
    order = {entry.paths[0]: index for index, entry in enumerate(modules)}
    return sorted(targets, key=lambda target: order[target.path])


def _read_directly(model: nn.Module, path: str) -> str:
    parent = type(model.get_submodule(path.rpartition(".")[0])).__name__
    return (
        f'"{path}" cannot be adapted: {parent} reads its weight instead of calling it, so that an adapter would be '
        "ignored"
    )


def _narrow_line(narrow: Sequence[tuple[str, _TooNarrow]]) -> list[str]:
    """One line for all layers that are narrower than the rank."""
    if not narrow:
        return []
    leaves = ", ".join({path.rpartition(".")[2]: None for path, _ in narrow})
    return [f"{len(narrow)} layers narrower than the rank ({leaves}); the first: {narrow[0][1]}"]


def _wide_line(targets: Sequence[Target]) -> list[str]:
    """One line for all layers whose rank is above their smaller side."""
    wide = [target for target in targets if target.r > min(target.features)]
    if not wide:
        return []
    first, (d_in, d_out) = wide[0], wide[0].features
    more = f" (and {len(wide) - 1} more)" if len(wide) > 1 else ""
    return [
        f'rank {first.r} is above the smaller side of "{first.path}", {d_in} -> {d_out}{more}; ranks above '
        f"{min(d_in, d_out)} there cost memory and add nothing"
    ]


def _two_paths(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """One line for all layers that PEFT adapts at one of their places only."""
    found = []
    for target in targets:
        parts = [path.rpartition(".") for path in target.paths if len(target.paths) > 1]
        if len({(id(model.get_submodule(parent)), leaf) for parent, _, leaf in parts}) > 1:
            found.append(target)
    if not found:
        return []
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    first, second, *_ = found[0].paths
    return [f'"{first}" is also "{second}"{more}; adapted at both here, while PEFT adapts the first only']


def check_settings(config: LoraConfig) -> None:
    """Raises ConfigError for a value that is wrong for every model."""
    from_dict(type(config), vars(config), "LoraConfig")  # types and ranges, also of values that were set later
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("layers_pattern without layers_to_transform selects nothing; set both or neither")
    is_expression = isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR
    if config.layers_to_transform is not None and is_expression:
        raise ConfigError(
            "layers_to_transform does not go with a regular expression in target_modules; "
            "put the layer numbers into the expression"
        )


def names_path(entries: str | list[str], path: str) -> bool:
    """True if target_modules `entries` selects a layer by `path`; "all-linear" may."""
    if isinstance(entries, str):
        return entries == ALL_LINEAR or PathExpression("target_modules", entries).fits(path)
    return any(named(entry, path) for entry in entries)


def _chosen(
    model: nn.Module, modules: list[ModulePaths], config: LoraConfig, strict: bool
) -> list[tuple[ModulePaths, str]]:
    """Modules that target_modules selects and the other settings do not exclude, each with the path that matched."""
    wanted = config.target_modules
    excluded = _matcher("exclude_modules", config.exclude_modules, model, modules, strict)
    if wanted == ALL_LINEAR:
        head = output_heads(model)
        found = [
            (entry, entry.paths[0])
            for entry in modules
            if is_linear(entry.module) and not any(entry.module is h for h in head)
        ]
    else:
        matches = _matcher("target_modules", wanted, model, modules, strict)
        found = [(m, path) for m in modules if (path := next(filter(matches, m.paths), None)) is not None]
    if config.layers_to_transform is not None:
        found = [(m, path) for m, path in found if _in_layers(path, config)]
        if strict:
            _check_layers(model, modules, config)
    return [(m, path) for m, path in found if not any(map(excluded, m.paths))]


def _matcher(
    field: str, entries: str | list[str] | None, model: nn.Module, modules: list[ModulePaths], strict: bool
) -> Callable[[str], bool]:
    """Turns target_modules or exclude_modules into a test of a path; raises if an entry matches no module."""
    if not entries:
        return lambda path: False
    every = [path for entry in modules for path in entry.paths]
    if isinstance(entries, str):
        expression = PathExpression(field, entries)
        if strict and not any(expression.fits(path) for path in every):
            raise AdapterError(
                f'{field} "{entries}" is a regular expression that fits no module of {type(model).__name__} in full.'
                f"{_layers_here(modules)}"
            )
        return expression.fits
    if strict:
        check_entries(field, entries, model, modules)
    return lambda path: any(named(entry, path) for entry in entries)


def check_entries(field: str, entries: Iterable[str], model: nn.Module, modules: list[ModulePaths]) -> None:
    """Raises AdapterError for the first entry that is neither a path in the model nor the end of one."""
    names = {suffix for module in modules for path in module.paths for suffix in suffixes(path)}
    for entry in entries:
        if entry not in names:
            near = nearest(entry, names) or _layers_here(modules)
            raise AdapterError(f'{field} "{entry}" matches no module of {type(model).__name__}.{near}')


def _layers_here(modules: list[ModulePaths]) -> str:
    """A hint: the last components of the paths of layers that can be adapted."""
    leaves = {entry.paths[0].rpartition(".")[2]: None for entry in modules if is_adaptable(entry.module)}
    listed = ", ".join(list(leaves)[:_MAX_LISTED])
    return f" Layers here: {listed}{', …' if len(leaves) > _MAX_LISTED else ''}." if leaves else ""


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The head of a transformers model, which "all-linear" leaves out: token head, or else classification head."""
    get_head = getattr(model, "get_output_embeddings", None)
    if not callable(get_head):
        return []
    head = get_head()
    if head is not None:
        return [head]
    named = (getattr(model, name, None) for name in _HEAD_NAMES)
    return [m for top in named if isinstance(top, nn.Module) for m in top.modules()]


def _layer_index(path: str, layers_pattern: Sequence[str] | None) -> int | None:
    """The first number in the path, or the number after one of the names in `layers_pattern`."""
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in layers_pattern or ()] or [r"(?:^|.*?\.)[^.]*\.(\d+)\."]
    found = (PathExpression("layers_pattern", expression).number_in(path) for expression in expressions)
    return next((number for number in found if number is not None), None)


def _in_layers(path: str, config: LoraConfig) -> bool:
    if isinstance(config.target_modules, list) and path in config.target_modules:
        return True
    return _layer_index(path, config.layers_pattern) in (config.layers_to_transform or [])


def _check_layers(model: nn.Module, modules: list[ModulePaths], config: LoraConfig) -> None:
    here = {_layer_index(path, config.layers_pattern) for entry in modules for path in entry.paths} - {None}
    missing = [i for i in config.layers_to_transform or [] if i not in here]
    if missing:
        known = sorted(i for i in here if i is not None)
        counted = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
        under = f" under {config.layers_pattern}" if config.layers_pattern else ""
        raise AdapterError(
            f"layers_to_transform {missing[0]} does not exist: {type(model).__name__} has {counted}{under}"
        )


def _kind_of(model: nn.Module, entry: ModulePaths) -> type[LoraLayer]:
    """The kind of layer that can replace the module at all its paths. Raises Unadaptable."""
    parents = [model.get_submodule(path.rpartition(".")[0]) for path in entry.paths]
    kinds = [kind_of(path, entry.module, parent) for path, parent in zip(entry.paths, parents, strict=True)]
    return kinds[0]


def _target(
    entry: ModulePaths, path: str, kind: type[LoraLayer], variant: LoraVariant, config: LoraConfig, skip: bool
) -> Target:
    """The layer that was matched by `path`, one of its paths, with its rank and scaling.

    Raises: Unadaptable: the variant is not for this kind of layer. _TooNarrow: the rank is too large, if `skip`.
    """
    refusal = variant.refusal(kind, entry.module)
    if refusal is not None:
        raise Unadaptable(f'"{path}" cannot be adapted: {refusal}')
    r = _by_pattern("rank_pattern", config.rank_pattern, path, config.r)
    alpha = _by_pattern("alpha_pattern", config.alpha_pattern, path, config.lora_alpha)
    d_in, d_out = kind.features(entry.module)
    unfit = kind.refusal(entry.module, r) or kind.init_refusal(config.init_lora_weights, r)
    if unfit is not None:
        raise Unadaptable(f'"{path}" cannot be adapted: {unfit}')
    if skip and r > min(d_in, d_out):
        leaf = path.rpartition(".")[2]
        raise _TooNarrow(
            f'rank {r} is larger than "{path}", which is {d_in} -> {d_out}: set rank_pattern {{"{leaf}": '
            f'{min(d_in, d_out)}}} or exclude_modules ["{leaf}"]'
        )
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return Target(entry.paths[0], entry.paths, entry.module, kind, variant, r, scaling * kind.scaling_factor)


def _with_parts(
    entry: ModulePaths, path: str, kind: type[LoraLayer], variant: LoraVariant, config: LoraConfig, skip: bool
) -> list[Target]:
    """The layer that was matched by `path` and the children that are adapted with it, all of one rank."""
    found = [_target(entry, path, kind, variant, config, skip)]
    for name, part in kind.parts.items():
        child = ModulePaths(entry.module.get_submodule(name), tuple(f"{place}.{name}" for place in entry.paths))
        found.append(_target(child, path, part, variant, config, skip))
    return found


def _matches_a_key(patterns: Iterable[str], path: str) -> bool:
    return any(fits_end("rank_pattern", key, path) for key in patterns)


def _by_pattern(field: str, patterns: dict[str, _Number], path: str, default: _Number) -> _Number:
    for key, value in patterns.items():
        if fits_end(field, key, path):
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
            if not any(fits_end(field, key, path) for target in targets for path in target.pattern_paths):
                paths = [path for target in targets for path in target.pattern_paths]
                names = {suffix for path in paths for suffix in suffixes(path)}
                leaves = ", ".join(list({path.rpartition(".")[2]: None for path in paths})[:_MAX_LISTED])
                near = nearest(key, names) or f" Adapted are: {leaves}."
                raise AdapterError(f'{field} "{key}" fits none of the adapted layers.{near}')


def _saved(model: nn.Module, modules: list[ModulePaths], entries: list[str], strict: bool) -> list[ModulePaths]:
    """The outermost modules that modules_to_save names."""
    if strict:
        check_entries("modules_to_save", entries, model, modules)
    matched = [m for m in modules if any(named(entry, path) for path in m.paths for entry in entries)]
    outermost = [
        m for m in matched if not any(inside([o.paths])(m.paths) for o in matched if o.module is not m.module)
    ]
    for saved in outermost:
        if next(saved.module.parameters(), None) is None:
            raise AdapterError(f'modules_to_save: "{saved.paths[0]}" has no parameters to train')
    return outermost


def _target_words(config: LoraConfig) -> str:
    parts = [f"target_modules {config.target_modules!r}"]
    for field in ("exclude_modules", "modules_to_save", "layers_to_transform"):
        if getattr(config, field):
            parts.append(f"{field} {getattr(config, field)!r}")
    return " with ".join(parts)
