"""The structure of the package, derived from its source: see `tests/architecture.py` for the rules.

`ALLOWED` lists the exceptions that stay, each with its reason. `KNOWN` lists violations that are still to be removed.
Both may only name violations that exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.cli import VERBS
from tests import architecture
from tests.architecture import CHECKS, Package, Violation

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "loratune.memory.fit uses torch.cuda.set_per_process_memory_fraction": "set by --memory, restored afterwards",
    "loratune.globals() is changed": "the package keeps a public name that it has imported on first use (PEP 562)",
    "loratune.ops.attention.flash._package is cached": "a module is imported once per process, and so is its failure",
    "loratune.ops.products._library is cached": "the handle of a library that PyTorch has loaded into the process",
    "loratune.hub.find is cached": "the hub is asked once per name; without a network each question takes seconds",
}

KNOWN: set[str] = set()


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT)


LISTED_ELSEWHERE = {"cli": set(VERBS), "lora/variants": ..., "data/formats": ..., "training/objectives": ...}
"""Modules that the page describes as "one file per ...", by package; `...` stands for all of them."""


def test_the_page_names_every_module():
    """docs/architecture.md lists each module at its package."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = page[page.index("## Packages") :].split("```")[1]
    parts = re.split(r"^  (\w+)(/?) ", drawing, flags=re.MULTILINE)[1:]
    named = {name if slash else "": set() for name, slash in zip(parts[::3], parts[1::3], strict=True)}
    for name, slash, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        named[name if slash else ""] |= set(re.findall(r"\w+", text)) | (set() if slash else {name})
    missing = []
    for file in sorted((ROOT / "loratune").rglob("*.py")):
        folder = file.parent.relative_to(ROOT / "loratune").as_posix().removeprefix(".")
        others = LISTED_ELSEWHERE.get(folder, set())
        if file.stem.startswith("__") or file.stem.endswith("kernels") or folder == "box" or others is ...:
            continue
        if file.stem not in named[folder.split("/")[0]] | others:
            missing.append(f"{folder}/{file.stem}")
    assert not missing, f"name in docs/architecture.md: {missing}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_the_rule(check: Callable[[Package], list[Violation]], package: Package) -> None:
    violations = [found for found in check(package) if found.key not in KNOWN | ALLOWED.keys()]
    assert not violations, "\n".join(map(str, violations))


def test_every_exception_is_still_needed(package: Package) -> None:
    found = {violation.key for check in CHECKS for violation in check(package)}
    assert not (KNOWN | ALLOWED.keys()) - found, "remove these from the lists"


FAULTS: dict[Callable[[Package], list[Violation]], dict[str, str]] = {
    architecture.packages_without_a_layer: {"attic/things.py": ""},
    architecture.upward_imports: {"data/pack.py": "def f():\n    from loratune.runs import run", "runs/run.py": ""},
    architecture.import_cycles: {"ops/a.py": "import loratune.ops.b", "ops/b.py": "from loratune.ops import a"},
    architecture.deferred_import_cycles: {
        "ops/a.py": "from loratune.ops.b import x",
        "ops/b.py": "if TYPE_CHECKING:\n    from loratune.ops.a import y",
    },
    architecture.heavy_imports_at_start: {
        "cli/__init__.py": "from loratune import units",
        "units.py": "import torch",
    },
    architecture.process_settings: {"ops/a.py": "import os\nhome = os.environ['HOME']"},
    architecture.prints_and_exits: {"ops/a.py": "def f():\n    print(1)"},
    architecture.mutable_state: {"ops/a.py": "_seen = []\ndef f(x):\n    _seen.append(x)"},
    architecture.repeated_class_names: {"ops/a.py": "class Held: ...", "data/b.py": "class Held: ..."},
    architecture.long_functions: {"ops/a.py": "def f():\n" + "    pass\n" * 70},
    architecture.long_files: {"ops/a.py": "pass\n" * 451},
}


def written(root: Path, files: dict[str, str]) -> Package:
    """A package of only these files."""
    for name, text in ({"__init__.py": ""} | files).items():
        file = root / "loratune" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return Package(root)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_rule_finds_its_fault_and_no_other(check: Callable[[Package], list[Violation]], tmp_path: Path) -> None:
    faulty = written(tmp_path, FAULTS[check])
    # A cycle of plain imports is also a cycle if deferred imports count.
    closing = architecture.deferred_import_cycles if check is architecture.import_cycles else check
    assert {other for other in CHECKS if other(faulty)} == {check, closing}


@pytest.mark.parametrize(
    "code",
    [
        "_open = {}\ndef f(k):\n    _open[k] = 1",
        "_open = {}\ndef f(k):\n    del _open[k]",
        "_count = 0\ndef f():\n    global _count\n    _count += 1",
        "from functools import cache\n@cache\ndef f(): ...",
        "import functools\n@functools.lru_cache(maxsize=4)\ndef f(): ...",
        "from contextvars import ContextVar\n_active = ContextVar('active')",
        "class Kinds:\n    known = []\ndef f(k):\n    Kinds.known.append(k)",
        "def f():\n    f.calls = 1",
        "import loratune.ops.b as b\ndef f():\n    b.flag = True",
    ],
)
def test_every_kind_of_process_state_is_found(code: str, tmp_path: Path) -> None:
    assert architecture.mutable_state(written(tmp_path, {"ops/a.py": code, "ops/b.py": "flag = False"}))


def test_an_import_by_name_counts_except_for_twins(tmp_path: Path) -> None:
    files = {
        "ops/a.py": "def f():\n    return import_module('loratune.ops.b')",
        "ops/b.py": "import loratune.ops.a",
        "ops/c.py": "@with_twin('ops.c_kernels')\ndef f(): ...",
        "ops/c_kernels.py": "import loratune.ops.c",
        "data/d.py": "NAME = 'loratune.ops.b'",
        "tables.py": "NAMES = {'b': 'loratune.ops.b'}",
    }
    package = written(tmp_path, files)
    cycles = architecture.deferred_import_cycles(package)
    assert [cycle.key for cycle in cycles] == ["loratune.ops.a -> loratune.ops.b -> loratune.ops.a"]
    upward = architecture.upward_imports(package)
    assert [found.key for found in upward] == ["loratune.data.d -> loratune.ops.b"]


@pytest.mark.parametrize(
    "code",
    [
        "UNITS = {'b': 1}\nUNITS['kb'] = 1000\ndef f(k):\n    return UNITS[k]",
        "def f():\n    seen = []\n    seen.append(1)",
        "_seen = []\ndef f(_seen):\n    _seen.append(1)",
        "from loratune.ops import b\ndef f():\n    b.add(1)",
    ],
)
def test_constants_and_local_values_are_no_state(code: str, tmp_path: Path) -> None:
    assert not architecture.mutable_state(written(tmp_path, {"ops/a.py": code, "ops/b.py": "def add(x): ..."}))
