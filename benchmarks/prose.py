"""A task that is not learnt to the end: source files of the installed transformers package, as plain text.
The bundled tasks have one right answer, and a model that has learnt them has a loss near zero, where percentages
mean nothing. Program text keeps an entropy of its own, so two ways to train can be compared by their final loss.
The files are the machine's own, in an order derived from their names; every tenth is held out. Other versions of
transformers give other text, so compare only runs of one machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import transformers

FILES, CHARACTERS = 700, 2500


def write(folder: Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `heldout.jsonl` with one "text" per record; returns their paths."""
    package = Path(transformers.__file__).parent
    files = sorted(package.glob("models/*/*.py"), key=lambda f: hashlib.sha256(f.name.encode()).hexdigest())
    files = [file for file in files if file.stat().st_size > 2 * CHARACTERS][:FILES]
    parts: tuple[list[str], list[str]] = ([], [])
    for index, file in enumerate(files):
        text = file.read_text(encoding="utf-8")
        middle = text[len(text) // 2 :][:CHARACTERS]  # the beginning is the same licence everywhere
        parts[index % 10 == 0].append(json.dumps({"text": middle}))
    places = folder / "train.jsonl", folder / "heldout.jsonl"
    for place, lines in zip(places, parts, strict=True):
        place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return places
