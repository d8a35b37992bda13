"""The hub is asked once. Earlier downloads load without a network, and missing ones are an error within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
import sys
from loratune.hub import NotOnHub, find
try:
    print(find(sys.argv[1], sys.argv[2]))
except NotOnHub as error:
    print("NotOnHub:", error)
"""


def ask(name: str, kind: str, home: Path) -> str:
    """The output of a process whose hub address has no server."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home)}
    words = [sys.executable, "-c", ASK, name, kind]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr == ""  # no message about retries
    return done.stdout.strip()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_without_a_network(kind: str, tmp_path: Path) -> None:
    commit = "a" * 40
    cached = tmp_path / "hub" / f"{kind}s--some--thing"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert ask("some/thing", kind, tmp_path) == str(cached / "snapshots" / commit)
    missing = ask("some/other", kind, tmp_path)
    assert missing.startswith("NotOnHub: it was not downloaded before, and the hub cannot be reached")


def test_a_name_that_no_hub_could_have(tmp_path: Path) -> None:
    assert ask("-/..", "model", tmp_path) == "NotOnHub: there is no such model, or it is private"
