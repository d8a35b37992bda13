"""Claims of the README that a machine can check: its Python runs, its commands exist, its links are valid."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import loratune as lt
from loratune.base.load import POCKET
from loratune.box import data_file
from loratune.cli import VERBS
from tests.cli_lab import CHAT, loratune, small_model, write_jsonl

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_the_python_runs_as_it_stands(readme, tmp_path):
    """The code is unchanged, except that the bundled model replaces the placeholder."""
    (code,) = blocks(readme, "python")
    records = data_file("dates", "train").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(records[:40]), encoding="utf-8")
    other = lt.load(POCKET, device="cpu")
    lt.attach(other, lt.LoraConfig(r=4))
    lt.save(other, tmp_path / "out" / "french")
    (tmp_path / "readme.py").write_text(code.replace("path/or/id", POCKET), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sql" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_every_verb_is_there_and_every_link_leads_somewhere(readme):
    text = readme.read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"loratune {verb}" in text or f"make {verb}" in text
    assert set(re.findall(r"^(?:\S*/)?loratune (\w+)", "\n".join(blocks(readme, "sh")), flags=re.MULTILINE)) <= set(
        VERBS
    )
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_both_languages_show_the_same_code():
    english, chinese = READMES
    assert blocks(english, "python")[0].split("#")[0] == blocks(chinese, "python")[0].split("#")[0]
    strip = re.compile(r"\s*#.*|<[^>]*>")
    assert [strip.sub("", b) for b in blocks(english, "sh")] == [strip.sub("", b) for b in blocks(chinese, "sh")]
    for language in ("json", "toml"):
        assert blocks(english, language) == blocks(chinese, language)


def test_the_run_file_trains_on_the_line_of_data(tmp_path, monkeypatch):
    """The files as they stand, with the line repeated, and fewer steps by a flag, which wins over the file."""
    monkeypatch.chdir(tmp_path)
    run_file = blocks(READMES[0], "toml")[0]
    (line,) = blocks(READMES[0], "json")
    Path("run.toml").write_text(run_file, encoding="utf-8")
    Path("train.jsonl").write_text(line * 40, encoding="utf-8")
    trained = loratune("train", "-c", "run.toml", "--max-steps", "2", "--tokens-per-row", "256")
    assert trained.status == 0, trained.err
    settings = tomllib.loads(Path("my-adapter/run.toml").read_text(encoding="utf-8"))
    written = tomllib.loads(run_file)
    written["training"]["max_steps"] = 2
    for table, values in written.items():
        assert (
            settings[table] == values if not isinstance(values, dict) else values.items() <= settings[table].items()
        )
    assert json.loads(line)["messages"][1]["content"] == "2041-08-31"


def commands(readme: Path) -> list[list[str]]:
    """The words of each `loratune` command, without those that name a file inside the repository."""
    lines = "\n".join(blocks(readme, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [found[1:] for found in words if found[:1] == ["loratune"]]


def test_every_command_runs(tmp_path, monkeypatch):
    """In the README's order, on a small random model, with the README's own jobs file; 10 steps of each run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_model(Path("MODEL"), hidden_size=128, intermediate_size=96, num_key_value_heads=4)  # jobs.toml has rank 64
    tuned = LlamaForCausalLM.from_pretrained("MODEL")
    with torch.no_grad():
        for parameter in tuned.model.layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    tuned.save_pretrained("tuned-model")
    write_jsonl(Path("train.jsonl"), CHAT)
    write_jsonl(Path("heldout.jsonl"), CHAT[:4])
    Path("jobs.toml").write_text(blocks(READMES[0], "toml")[1].replace("= 200", "= 10"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("double 3\n"))
    ran = set()
    for verb, *words in commands(READMES[0]):
        if "--memory" in words:  # memory is limited on a GPU only, and a CPU refuses the flag
            at = words.index("--memory")
            refused = loratune(verb, *words)
            assert refused.status == 2
            assert "limits GPU memory, and this run is on cpu" in refused.err
            del words[at : at + 2]
        for name in {"other-adapter", "sql", "french"} & set(words):
            shutil.copytree("my-adapter", name)
        fewer = ["--max-steps", "10"] if verb == "train" else []
        outcome = loratune(verb, *words, *fewer)
        assert outcome.status == 0, f"{verb} {words}: {outcome.err}"
        ran.add(verb)
    assert ran == set(VERBS) - {"demo"}  # `make demo`; see test_demo.py


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda p: p.name)
def test_a_picture_fits_a_screen(picture):
    """950 lines at a width of 1,000 pixels: the page of a browser on a screen of 1,080 lines."""
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture.read_text()).groups())
    assert height * min(1, 1000 / width) <= 950


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    links = set(re.findall(r"\]\(([^)#]+)\)", index.read_text(encoding="utf-8")))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("**/*.md")} - {"README.md"}
    assert {page for page in pages if not page.startswith("lab/")} <= links
    for page in [*(ROOT / "docs").glob("*.md"), *READMES]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
