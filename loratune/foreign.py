"""Names of files, and small JSON and TOML files, that may come from anyone: configurations, indexes, run settings.

A reader here returns plain values or raises one error of the caller's class. It never waits on a pipe, never reads
a file without an end, and never exceeds Python's recursion limit.
"""

from __future__ import annotations

import errno
import json
import stat
import tomllib
from pathlib import Path
from typing import Any

from loratune.errors import LoratuneError

MOST_BYTES = 64 << 20
"""Largest file that is read. The weight index of a model with 100,000 tensors has 10 MB."""

MOST_DEPTH = 64
"""Most brackets inside each other; transformers' own configurations have six."""


def is_text(text: str) -> bool:
    """False for text that neither UTF-8 files nor names can hold: with half a surrogate pair, or a zero byte.

    Python represents bytes of names that are not UTF-8 as halves of surrogate pairs.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def check_name(name: str, kind: type[LoratuneError]) -> None:
    """Raises `kind`: a file or folder has a name that no JSON, TOML or tokenizer file can hold; see `is_text`."""
    if not is_text(name):
        shown = name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
        raise kind(f"{shown}: this name is not UTF-8 text; rename the file or folder")


def regular(path: Path) -> Path:
    """`path`, if it is a file. Raises OSError: it is missing, a link to nowhere, a folder, a pipe or a device."""
    if path.is_symlink() and not path.exists():
        raise OSError(errno.EINVAL, "is a link to a missing file", str(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path


def read_bytes(path: Path, kind: type[LoratuneError], most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises: `kind`: it is no regular file, has over `most` bytes, or cannot be read."""
    try:
        size = regular(path).stat().st_size
        content = path.read_bytes() if size <= most else b""
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise kind(f"{path!r}: cannot be the name of a file: {error}") from error
    if size > most:
        raise kind(f"{path}: has {size:,} bytes; such a file has at most {most:,}")
    return content


def read_text(path: Path, kind: type[LoratuneError]) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises: `kind`: as `read_bytes`; the content is not UTF-8.
    """
    content = read_bytes(path, kind)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise kind(f"{path}:{line}: byte 0x{byte:02x} is not valid UTF-8; save the file as UTF-8") from error


def read_json(path: Path, kind: type[LoratuneError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: `kind`: as `read_text`; the text is not JSON, not an object, nested too deeply, or gives one name two
        different values.
    """
    return parse_json(read_text(path, kind), str(path), kind)


def parse_json(text: str, where: str, kind: type[LoratuneError]) -> dict[str, Any]:
    """The JSON object in a text; `where` names its place in errors. Raises: `kind`: as `read_json`."""
    try:
        content = json.loads(text, object_pairs_hook=_unambiguous, parse_constant=_constant)
    except RecursionError as error:
        raise kind(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise kind(f"{where}: is not JSON: {error}") from error
    if not _depth_is_within(content, MOST_DEPTH):
        raise kind(f"{where}: is nested too deeply: more than {MOST_DEPTH} brackets inside each other")
    if not isinstance(content, dict):
        raise kind(f"{where}: holds a {type(content).__name__}; an object is expected")
    return content


def parse_toml(text: str, where: str, kind: type[LoratuneError]) -> dict[str, Any]:
    """The tables of a TOML text. Raises: `kind`: it is not TOML, or nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise kind(f"{where}: is nested too deeply") from error
    except ValueError as error:  # also a number of more than 4,300 digits
        raise kind(f"{where}: not valid TOML: {error}") from error


def _depth_is_within(value: object, most: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most > 0 and all(_depth_is_within(item, most - 1) for item in inner if isinstance(item, dict | list))


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for name, value in pairs:
            if made[name] != value:
                raise ValueError(f'"{name}" is given twice, with different values')
    return made


def _constant(name: str) -> float:
    """Accepts infinity, which occurs in real configurations (Mamba 2). Raises ValueError for NaN, which does not."""
    if name == "NaN":
        raise ValueError("NaN is not a value of JSON")
    return float(name)
