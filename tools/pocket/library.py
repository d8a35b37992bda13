"""Plain text that every machine with Python has: docstrings, sources and licence of the standard library.

It gives the tokenizer and the model real English and real code beside the generated tasks. Lines that hold an ISO
date or the start of a JSON object are dropped, because the demo's adapters must learn to write them.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Patterns that must not occur in the pretraining stream; corpus.py also checks every shard for them.
ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
JSON_OBJECT = re.compile(r"""\{\s*"\w+"\s*:""")

MAX_CHARACTERS = 2600  # stays under 1,024 tokens
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "__pycache__",
    "turtledemo",
}


def is_clean(text: str) -> bool:
    """Whether the text shows neither of the two skills that are held out from pretraining."""
    return not (ISO_DATE.search(text) or JSON_OBJECT.search(text))


def cleaned(text: str) -> str:
    """The text without the lines that show a held-out skill."""
    kept = "\n".join(line.rstrip() for line in text.splitlines() if is_clean(line))
    return kept if is_clean(kept) else ""  # an object opened on one line and keyed on the next


def source_files() -> list[Path]:
    """The standard library's Python files, sorted, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def chunks(text: str) -> Iterator[str]:
    """Cut a long text at line ends into pieces of at most `MAX_CHARACTERS`."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines():
        if len(line) > 400:  # tables of numbers and the like
            continue
        if size + len(line) + 1 > MAX_CHARACTERS and piece:
            yield "\n".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line) + 1
    if size > 40:
        yield "\n".join(piece)


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module and of all its classes and functions, signature first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                name = getattr(node, "name", "")
                yield f"{name}: {text}" if name else text


def documents(seed: int = 0) -> list[str]:
    """All library texts in seeded order; docstrings come twice, since they are mostly prose."""
    found: list[str] = []
    for path in source_files():
        try:
            source = path.read_text(encoding="utf-8")
            docs = [piece for text in docstrings(source) for piece in chunks(cleaned(text))]
        except (SyntaxError, UnicodeDecodeError):  # a few files are there to be broken
            continue
        found += docs * 2
        if "encodings" not in path.parts:
            found += chunks(cleaned(source))
    found = [text for text in found if is_clean(text)]
    random.Random(seed).shuffle(found)
    return found
