"""Paths of modules in a model, and the names by which configurations and files select them.

A module may be found at several paths. A name is a path, or its end after a dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModulePaths:
    """One module and every path at which it is found; files name the first."""

    module: nn.Module
    paths: tuple[str, ...]


def find_modules(model: nn.Module) -> list[ModulePaths]:
    """Every module below the root with all its paths, in the order of `named_modules`."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            modules[id(module)] = module
            paths.setdefault(id(module), []).append(path)
    return [ModulePaths(module, tuple(paths[key])) for key, module in modules.items()]


def shortest_names(paths: Sequence[str], others: Iterable[str]) -> list[str]:
    """The names with the fewest dots that, matched as exact path or `.suffix`, mean `paths` and none of `others`.

    Files hold these instead of "all-linear": `["q_proj", "v_proj", ...]`, which every reader understands.
    """
    wanted, unwanted = set(paths), set(others) - set(paths)
    suffixes_of_others = {suffix for path in unwanted for suffix in suffixes(path)}
    names = {next((s for s in suffixes(p) if s not in suffixes_of_others), p) for p in wanted}
    return sorted(names)


def suffixes(path: str) -> list[str]:
    """A path and its ends after a dot, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def named(entry: str, path: str) -> bool:
    """True if an entry is the path, or its end after a dot."""
    return path == entry or path.endswith("." + entry)


def inside(groups: Iterable[Sequence[str]]) -> Callable[[Sequence[str]], bool]:
    """A test of paths: true if one of them is at or below one of the groups' paths."""
    roots = [path for group in groups for path in group]

    def test(paths: Sequence[str]) -> bool:
        return any(p == root or p.startswith(root + ".") for p in paths for root in roots)

    return test
