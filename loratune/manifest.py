"""`manifest.json`: the run and step of a folder's files, and the SHA-256 of each, so that damage is found.

A checkpoint lists all its files. The folder of a finished run lists its adapter. A manifest is written last and
removed before a file changes, so a process that is killed leaves a folder without one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from loratune import atomic, foreign

FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The content of the file."""

    run: str
    """Id of the run; empty if it began before there were ids."""
    step: int
    """Optimizer steps before these files were written."""
    files: Mapping[str, str]
    """File name -> SHA-256 (hex)."""

    def fault_in(self, folder: Path, names: Iterable[str]) -> str | None:
        """The first of the named files in `folder` that is not listed, missing or changed; None if all agree."""
        for name in names:
            try:
                if Path(name).name != name or _hash_of(folder / name) != self.files.get(name):
                    return f"{name} is damaged"
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
        return None


def write(folder: Path, run: str, step: int, names: Iterable[str]) -> None:
    """Writes the manifest of the named files. Raises OutputError."""
    hashes = {name: _hash_of(folder / name) for name in sorted(names)}
    atomic.write_text(folder / FILE, atomic.to_json(asdict(Manifest(run, step, hashes))))


def read(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None if there is none. Raises ValueError: it is damaged."""
    try:
        found = json.loads(foreign.regular(folder / FILE).read_bytes())
        manifest = Manifest(found["run"], found["step"], dict(found["files"]))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError from error
    if not (isinstance(manifest.run, str) and type(manifest.step) is int):
        raise ValueError
    return manifest


def _hash_of(file: Path) -> str:
    with foreign.regular(file).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
