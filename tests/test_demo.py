"""The demo's figures and printed claims are true. These tests run all of it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import loratune as lt
from loratune.box import TASKS
from loratune.demo import demo
from loratune.errors import OutputError


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """The demo's folder, output and figures."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=80)
    demo(str(out), console)
    return out, console.file.getvalue(), json.loads((out / "demo.json").read_text())


@pytest.mark.slow
def test_the_figures_it_was_built_for(journey):
    _, _, figures = journey
    scores = figures["exact_match"]
    for task in TASKS:
        other = next(t for t in TASKS if t != task)
        assert scores["base"][task] <= 0.05
        assert scores[task][task] >= 0.90
        assert scores[task][other] <= 0.10
    assert figures["switched_back_identical"] is True
    assert figures["merged_largest_logit_difference"] <= 1e-4


@pytest.mark.slow
def test_what_it_says_is_what_it_measured(journey):
    _, printed, figures = journey
    for found in figures["exact_match"].values():
        for share in found.values():
            assert f"{share:.1%}" in printed
    assert "DIFFERENT" not in printed
    assert f"{figures['merged_largest_logit_difference']:.1e}" in printed
    for verb in ("preview", "train", "chat"):
        assert f"loratune {verb}" in printed


@pytest.mark.slow
def test_what_it_leaves_can_be_used(journey):
    out, _, _ = journey
    for task in TASKS:
        assert (out / task / "loss.png").read_bytes().startswith(b"\x89PNG")
    merged = lt.load(str(out / "dates-merged"), device="cpu")
    assert merged.config.model_type == "llama"


def test_it_overwrites_nothing(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"):
        demo(str(tmp_path), Console(file=io.StringIO()))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
