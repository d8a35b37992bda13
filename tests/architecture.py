"""Facts about the package, derived from its source with `ast`: imports, process state, names and lengths.

`test_architecture.py` asserts that every check below returns nothing. To check another tree, for example an old one:

    python -m tests.architecture /path/to/tree

Each check takes a `Package` and returns violations. A violation's key has no line number, so a list of known ones
stays valid while lines move.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

NAME = "loratune"
MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 450

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "other_names",
        "setting_types",
        "short_repr",
        "units",
        "version",
        "tables",
        "foreign",
        "config",
        "atomic",
        "lock",
        "manifest",
        "ahead",
        "hub",
        "box",
    ),
    ("data",),
    ("ops",),
    ("precision",),
    ("lora",),
    ("fused",),
    ("base",),
    ("training",),
    ("memory",),
    ("many",),
    ("infer",),
    ("adapters",),
    ("export",),
    ("runs",),
    ("sweep",),
    ("screen",),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)
"""Packages and top-level modules from the lowest to the highest. A module imports from its own layer or lower ones.

`data` is low because records and rows do not depend on models. `precision` is below `lora`, since an adapter layer
asks the frozen weight for its products. `training` is below `memory`, which verifies a plan by a real training step,
and below `many`, which applies the same step to a bank. `many` asks `memory` for the free bytes. `demo` is above
`screen`, which shows its progress.
"""

TABLES = (NAME, f"{NAME}.tables", f"{NAME}.cli.dispatch")
"""Modules that name higher modules for others to import. Strings elsewhere that name a module count as imports."""

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pyarrow", "numpy", "safetensors", "huggingface_hub")
"""Libraries that help and argument errors must not wait for."""

MUTATORS = frozenset(
    [
        "append",
        "extend",
        "insert",
        "remove",
        "pop",
        "popitem",
        "clear",
        "add",
        "discard",
        "update",
        "setdefault",
        "sort",
        "reverse",
        "appendleft",
    ]
)
CACHES = ("cache", "lru_cache")
STATEFUL = ("ContextVar", "local", "WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "count", "Event", "Queue")
PROCESS_SETTERS = (
    "set_per_process_memory_fraction",
    "set_default_dtype",
    "set_default_device",
    "set_num_threads",
    "use_deterministic_algorithms",
    "set_float32_matmul_precision",
)


class Violation(NamedTuple):
    """One place that breaks a rule."""

    key: str
    """Stable name, such as "loratune.lora.bank -> loratune.base.forward"."""
    place: str
    """File and line."""

    def __str__(self) -> str:
        return f"{self.place}: {self.key}"


class Import(NamedTuple):
    """One import of a module of the package or of a library."""

    target: str
    line: int
    deferred: bool
    """Inside a function, under TYPE_CHECKING or by name, so not executed when the module is imported."""
    is_twin: bool = False
    """A reference names the module of its Triton twins, to import it on first use."""


@dataclass(frozen=True)
class Source:
    """A module and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    def at(self, node: ast.AST | int) -> str:
        """The place of a node for messages."""
        return f"{self.path}:{node if isinstance(node, int) else getattr(node, 'lineno', 1)}"


class Package:
    """All modules of the package under `root`."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Source] = {}
        for path in sorted((root / NAME).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            self.modules[name] = Source(name, path.relative_to(root), ast.parse(text), len(text.splitlines()))

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """Module -> its imports; those of the package resolved to module names."""
        return {name: list(self._imports(source)) for name, source in self.modules.items()}

    def inner_imports(self, name: str) -> Iterator[Import]:
        """The imports of a module that stay within the package. The root, which only re-exports, does not count."""
        return (found for found in self.imports[name] if found.target in self.modules and found.target != NAME)

    def _imports(self, source: Source) -> Iterator[Import]:
        for node, deferred in _with_context(source.tree, deferred=False):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, deferred)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{source.at(node)}: a relative import; the package uses absolute ones"
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    yield Import(inside if inside in self.modules else str(node.module), node.lineno, deferred)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and source.name not in TABLES:
                for target in self._named(node.value):
                    yield Import(target, node.lineno, deferred=True, is_twin=target.endswith("kernels"))

    def _named(self, text: str) -> list[str]:
        """The module that a string names for `importlib`, with or without the package's name."""
        return [name for name in (text, f"{NAME}.{text}") if "." in text and name in self.modules]


def _with_context(node: ast.AST, *, deferred: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        later = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        later = later or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield child, later
        yield from _with_context(child, deferred=later)


# Imports


def layer_of(module: str) -> int | None:
    """Index in `LAYERS` of a module; None if no layer lists its package."""
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else "__init__"
    return next((index for index, names in enumerate(LAYERS) if top in names), None)


def packages_without_a_layer(package: Package) -> list[Violation]:
    """Top-level packages and modules that `LAYERS` does not list."""
    listed = {name for names in LAYERS for name in names}
    tops = {name.split(".")[1] for name in package.modules if "." in name}
    return [Violation(f"{NAME}.{top} is in no layer", NAME) for top in sorted(tops - listed)]


def upward_imports(package: Package) -> list[Violation]:
    """Imports from a higher layer, deferred ones included."""
    found = []
    for name, source in package.modules.items():
        own = layer_of(name)
        for item in package.imports[name]:
            other = layer_of(item.target) if item.target in package.modules else None
            if own is not None and other is not None and other > own:
                found.append(Violation(f"{name} -> {item.target}", source.at(item.line)))
    return found


def import_cycles(package: Package) -> list[Violation]:
    """Cycles of imports between modules that run when the modules are imported."""
    return _cycles(package, deferred=False)


def deferred_import_cycles(package: Package) -> list[Violation]:
    """Cycles between modules that imports inside functions, for type checking or by name close.

    A reference names its Triton twin by a string, and the twin may import the reference's types, so these two are not
    a cycle.
    """
    return _cycles(package, deferred=True)


def _cycles(package: Package, *, deferred: bool) -> list[Violation]:
    graph = {
        name: {
            item.target
            for item in package.inner_imports(name)
            if (deferred or not item.deferred) and not item.is_twin and item.target != name
        }
        for name in package.modules
        if name != NAME
    }
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycle = list(reversed(error.args[1]))[:-1]
            start = cycle.index(min(cycle))
            cycle = cycle[start:] + cycle[:start]
            found.append(Violation(" -> ".join([*cycle, cycle[0]]), str(package.modules[cycle[0]].path)))
            graph[cycle[-1]].discard(cycle[0])
        else:
            return found


def heavy_imports_at_start(package: Package) -> list[Violation]:
    """Heavy libraries that `import loratune` or the command line's overview would import."""
    found, seen, waiting = [], set[str](), [NAME, f"{NAME}.cli", f"{NAME}.__main__"]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in package.modules:
            continue
        seen.add(name)
        waiting += [name.rpartition(".")[0]] if "." in name else []
        for item in package.imports[name]:
            if not item.deferred:
                waiting.append(item.target)
                if item.target.split(".")[0] in HEAVY:
                    found.append(Violation(f"{name} -> {item.target}", package.modules[name].at(item.line)))
    return found


# Process state


def process_settings(package: Package) -> list[Violation]:
    """Uses of the environment, of warning filters and of other settings of the process, outside `cli`."""
    found = []
    for source in _outside_cli(package):
        for node in ast.walk(source.tree):
            used = _dotted(node)
            is_setter = isinstance(node, ast.Call) and _dotted(node.func).rpartition(".")[2] in PROCESS_SETTERS
            if used in ("os.environ", "os.getenv", "os.putenv", "warnings.filterwarnings", "warnings.simplefilter"):
                found.append(Violation(f"{source.name} uses {used}", source.at(node)))
            elif is_setter and isinstance(node, ast.Call):
                found.append(Violation(f"{source.name} uses {_dotted(node.func)}", source.at(node)))
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
                found += [Violation(f"{source.name} uses os.{name}", source.at(node)) for name in names]
    return found


def prints_and_exits(package: Package) -> list[Violation]:
    """Calls of print and of exit functions outside `cli`."""
    found = []
    for source in _outside_cli(package):
        for node in ast.walk(source.tree):
            called = _dotted(node.func) if isinstance(node, ast.Call) else ""
            if called in ("print", "exit", "quit", "sys.exit", "os._exit"):
                found.append(Violation(f"{source.name} calls {called}", source.at(node)))
    return found


def mutable_state(package: Package) -> list[Violation]:
    """State of the process: module-level names that functions change, and caches of functions.

    A dict, list or set that is only read counts as a constant. Changes while the module is imported are allowed.
    """
    found = []
    for source in package.modules.values():
        names = _module_names(source.tree)
        modules = _imported_modules(source.tree, package)
        for node in ast.iter_child_nodes(source.tree):
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(value, ast.Call) and _dotted(value.func).split(".")[-1] in STATEFUL:
                found.append(Violation(f"{source.name} creates a {_dotted(value.func)}", source.at(node)))
        for function in _functions(source.tree):
            found += [
                Violation(f"{source.name}.{function.name} is cached", source.at(function))
                for decorator in function.decorator_list
                if _dotted(decorator.func if isinstance(decorator, ast.Call) else decorator).split(".")[-1] in CACHES
            ]
            local = _local_names(function)
            for node in ast.walk(function):
                for changed in _changed(node):
                    root = changed.split(".")[0]
                    is_call_of_module = isinstance(node, ast.Call) and changed in modules
                    is_state = root in names - local and not is_call_of_module and changed != "os.environ"
                    if root == "globals()" or is_state:
                        found.append(Violation(f"{source.name}.{changed} is changed", source.at(node)))
    return sorted(set(found))


def _changed(node: ast.AST) -> list[str]:
    """The dotted names whose content a node changes: by assignment to an item or attribute, a mutator, `global`."""
    if isinstance(node, ast.Global):
        return node.names
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return [name] if (name := _dotted(node.func.value)) else []
    else:
        return []
    inner = [target.value for target in targets if isinstance(target, ast.Subscript | ast.Attribute)]
    return [name for value in inner if (name := _dotted(value))]


def _module_names(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level: variables, functions, classes and imports."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def _imported_modules(tree: ast.Module, package: Package) -> set[str]:
    """Names under which a module has imported whole modules of the package."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" in package.modules
    }


def _local_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names bound inside a function, parameters included, except those declared global."""
    bound = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
    bound |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return bound - {name for n in ast.walk(function) if isinstance(n, ast.Global) for name in n.names}


# Names and lengths


def repeated_class_names(package: Package) -> list[Violation]:
    """Class names that the package defines more than once."""
    places: dict[str, list[str]] = {}
    for source in package.modules.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(source.at(node))
    return [Violation(f"class {name}", ", ".join(at)) for name, at in sorted(places.items()) if len(at) > 1]


def long_functions(package: Package) -> list[Violation]:
    """Functions of more than 70 lines."""
    return [
        Violation(f"{source.name}.{function.name} is too long", f"{source.at(function)}: {lines} lines")
        for source in package.modules.values()
        for function in _functions(source.tree)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]


def long_files(package: Package) -> list[Violation]:
    """Files of more than 450 lines."""
    return [
        Violation(f"{source.name} is too long", f"{source.path}: {source.lines} lines")
        for source in package.modules.values()
        if source.lines > MAX_FILE_LINES
    ]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _outside_cli(package: Package) -> Iterator[Source]:
    outside = f"{NAME}.cli"
    entry = f"{NAME}.__main__"
    return (s for name, s in package.modules.items() if not (name + ".").startswith(outside + ".") and name != entry)


def _dotted(node: ast.AST) -> str:
    """The source of a name, attribute chain or `globals()`; "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    if isinstance(node, ast.Call) and _dotted(node.func) == "globals":
        return "globals()"
    return ""


CHECKS: tuple[Callable[[Package], list[Violation]], ...] = (
    packages_without_a_layer,
    upward_imports,
    import_cycles,
    deferred_import_cycles,
    heavy_imports_at_start,
    process_settings,
    prints_and_exits,
    mutable_state,
    repeated_class_names,
    long_functions,
    long_files,
)


if __name__ == "__main__":
    checked = Package(Path(sys.argv[1]))
    for check in CHECKS:
        violations = check(checked)
        print(f"{check.__name__}: {len(violations)}")
        for violation in violations:
            print(f"    {violation}")
