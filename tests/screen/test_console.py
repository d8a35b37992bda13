"""Names and texts from files are shown as they are: no markup, no emoji, no escape sequence reaches the terminal."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loratune.screen.console import PlainConsole
from loratune.units import command, path_word
from tests.cli_lab import CHAT, SHORT, loratune, small_model, write_jsonl

HOSTILE = "\x1b]52;c;Zm9v[bold]x[/INST] :smile: \x9b2J \u202ex \udcff"


def shown(*things: object, terminal: bool = True) -> str:
    console = PlainConsole(
        file=io.StringIO(), force_terminal=terminal, width=200, color_system="truecolor" if terminal else None
    )
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def table(text: str) -> Table:
    made = Table()
    made.add_column(text)
    made.add_row(text)
    return made


@pytest.mark.parametrize("wrap", [str, Text, Panel, table, lambda text: Panel("x", title=Text(text))])
def test_hostile_text_is_shown_and_not_obeyed(wrap) -> None:
    out = shown(wrap(HOSTILE), terminal=False)
    assert "␛]52;c;Zm9v[bold]x[/INST] :smile: �2J �x �" in out
    assert not {"\x1b", "\x9b", "\u202e"} & set(out)
    out.encode()


def test_the_consoles_own_codes_still_work() -> None:
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor")
    console.print("red", style="red")
    with Live(Text(HOSTILE), console=console, refresh_per_second=1):
        pass
    out = console.file.getvalue()
    assert "\x1b[31mred\x1b[0m" in out
    assert "\x1b[?25l" in out  # Live hides the cursor
    assert "\x1b]52" not in out


@pytest.mark.parametrize("name", ["my run", "[bold]run", "a'b", "$(reboot)", "-x", "é", "a;b"])
def test_a_suggested_command_is_the_same_words_in_a_shell(name: str) -> None:
    line = command("loratune", "chat", path_word(name))
    assert shlex.split(line)[:2] == ["loratune", "chat"]
    assert Path(shlex.split(line)[2]) == Path(name)
    assert not shlex.split(line)[2].startswith("-")


def test_a_run_in_a_folder_with_any_name_suggests_commands_that_work(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_model(tmp_path / "base [/INST] model")
    write_jsonl(tmp_path / "[bold] chat.jsonl", [{"prompt": "[/INST] \x1b[31m", "completion": "[bold]"}] * 9)
    out = "[bold] it's $HOME"
    words = ["base [/INST] model", "[bold] chat.jsonl", "--out", out, "--max-steps", "2", "--device", "cpu", *SHORT]
    done = loratune("train", *words)
    assert done.status == 0, done.err
    assert f"loratune chat {shlex.quote(out)}" in done.out.replace("\n", " ")
    card = Path(out, "README.md").read_text()
    assert f"loratune chat {shlex.quote(out)}" in card
    for verb in (["preview", "base [/INST] model", "[bold] chat.jsonl", "--cache-dir", ""], ["inspect", out]):
        outcome = loratune(*verb)
        assert outcome.status == 0, outcome.err
        assert "\x1b" not in outcome.out
        assert "[bold]" in outcome.out
    assert "[bold] missing" in loratune("inspect", "[bold] missing").err


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", CHAT * 40)
    words = ["preview", "loratune/pocket", str(data), "--cache-dir", "", "--examples", "900"]
    line = f"{command(sys.executable, '-m', 'loratune', *words)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=os.environ, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_a_tensor_with_a_hostile_name_is_named_visibly(tmp_path) -> None:
    model = small_model(tmp_path / "base")
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"\x1b[2J[bold]": "../x"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "part.safetensors").write_bytes(b"")
    error = loratune("chat", str(model)).err
    assert "␛[2J[bold]" in error
    assert "\x1b" not in error
