"""CONTRIBUTING.md: every worked diff applies to the package as it is, and its check runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^## (Add [^\n]+)\n.*?```diff\n(.*?)```.*?```python\n(.*?)```", re.MULTILINE | re.DOTALL)
SECTIONS = {title: (diff, check) for title, diff, check in SECTION.findall((ROOT / "CONTRIBUTING.md").read_text())}


def test_six_things_can_be_added():
    assert [title.rpartition(" ")[2] for title in SECTIONS] == [
        "LoRA",
        "objective",
        "precision",
        "recipe",
        "format",
        "verb",
    ]


@pytest.mark.parametrize("title", SECTIONS)
def test_the_diff_applies_and_its_check_runs(title, tmp_path):
    diff, check = SECTIONS[title]
    shutil.copytree(ROOT / "loratune", tmp_path / "loratune", ignore=shutil.ignore_patterns("__pycache__"))
    applied = subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    added, removed = (re.findall(rf"^[{sign}](?![{sign}]{{2}}).*", diff, re.MULTILINE) for sign in "+-")
    assert len(removed) <= 1, "one new file and one line in a table"
    assert added
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
