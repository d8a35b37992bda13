"""A conversation with small random models: who answers, which tokens they see, and how it ends."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from loratune.config import LoraConfig
from loratune.infer.engine import Sampling, generate
from loratune.lora.inject import activate, active, attach
from loratune.screen.chat import Chat, chat, completions
from loratune.screen.text import visible
from tests.conftest import build
from tests.data.toy_tokenizers import CHATML, GEMMA, toy_tokenizer

SHORT = Sampling(max_new_tokens=6, temperature=0.0, top_p=1.0, top_k=0, seed=None)


def make_model(tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...] = ("dates", "orders")) -> PreTrainedModel:
    """A random model with adapters so large that each gives another answer."""
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    for seed, name in enumerate(names):
        attach(model, LoraConfig(r=4, init_lora_weights=False), name=name, seed=seed)
    return model


class Talk:
    """A chat that writes to a string."""

    def __init__(self, template: str | None = CHATML, names: tuple[str, ...] = ("dates", "orders")) -> None:
        self.tokenizer = toy_tokenizer(template)
        self.model = make_model(self.tokenizer, names)
        self.file = io.StringIO()
        console = Console(file=self.file, width=80)
        self.chat = Chat(self.model, self.tokenizer, stop_ids=(), console=console, sampling=SHORT)

    def say(self, line: str) -> str:
        """The output for one line."""
        start = len(self.file.getvalue())
        assert self.chat.say(line)
        return self.file.getvalue()[start:]

    def expected(self, name: str | None, prompt: str) -> str:
        """The label, and the text that `generate` gives for this prompt with this adapter."""
        before = list(active(self.model))
        activate(self.model, name)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = generate(self.model, [ids], max_new_tokens=6, stop_ids=())[0]
        activate(self.model, before)
        return f"{name or 'base':<6}  {self.tokenizer.decode(answer, skip_special_tokens=True)}"


@pytest.fixture
def talk() -> Talk:
    return Talk()


def turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_the_answer_is_the_models_own(talk: Talk) -> None:
    """The model gets exactly the rendered template, and the screen shows exactly its answer."""
    shown = visible_lines(talk.say("hello"))
    assert shown == visible_lines(talk.expected("dates", turn("hello")) + NOTE)
    first = talk.chat.turns[1]["content"]
    history = f"<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{first}<|im_end|>\n"
    assert visible_lines(talk.say("more")) == visible_lines(talk.expected("dates", history + turn("more")) + NOTE)


NOTE = "\ncut at 6 tokens; /set max_new_tokens 12 allows more"


def visible_lines(text: str) -> str:
    """The text on the screen without line breaks."""
    return "".join(visible(text).split())


def test_switching_back_gives_the_same_answer_to_the_bit(talk: Talk) -> None:
    first = talk.say("hello")
    assert "orders answers now" in talk.say("/adapter orders")
    talk.say("/reset")
    other = talk.say("hello")
    talk.say("/adapter none")
    talk.say("/reset")
    base = talk.say("hello")
    talk.say("/adapter dates")
    talk.say("/reset")
    assert talk.say("hello") == first
    assert len({first, other, base}) == 3
    assert base.startswith("base ")


def test_compare_asks_all_and_changes_nothing(talk: Talk) -> None:
    talk.say("hello")
    turns = list(talk.chat.turns)
    for command in ("/compare", "/compare hello"):
        talk.chat.turns = list(turns) if command == "/compare" else []
        shown = visible_lines(talk.say(command))
        wanted = [talk.expected(name, turn("hello")) + NOTE for name in (None, "dates", "orders")]
        assert shown == visible_lines("".join(wanted))
    talk.chat.turns = turns
    assert list(active(talk.model)) == ["dates"]
    assert talk.chat.active == "dates"


def test_a_system_message_is_seen_and_begins_anew(talk: Talk) -> None:
    talk.say("hello")
    talk.say("/system be brief")
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n" + turn("hello")
    assert visible_lines(talk.say("hello")) == visible_lines(talk.expected("dates", prompt) + NOTE)
    assert len(talk.chat.turns) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/adaptor dates", 'unknown command /adaptor. Did you mean "/adapter"?'),
        ("/adapter order", 'Did you mean "orders"?'),
        ("/compare", "nothing to compare yet"),
        ("/set temprature 1", 'Did you mean "temperature"?'),
        ("/set temperature hot", 'needs a number, not "hot"'),
        ("/set top_p 2", "at most 1"),
        ("hello " * 300, "/reset starts a new one"),
    ],
)
def test_mistakes_are_explained_and_change_nothing(talk: Talk, line: str, words: str) -> None:
    assert words in " ".join(talk.say(line).split())
    assert talk.chat.sampling == SHORT
    assert talk.chat.turns == []
    assert list(active(talk.model)) == ["dates"]


def test_settings_take_effect(talk: Talk) -> None:
    greedy = talk.say("hello")
    for line in ("/reset", "/set temperature 3", "/set seed 1", "/set max_new_tokens=20"):
        talk.say(line)
    first = talk.say("hello")
    talk.say("/reset")
    assert talk.say("hello") == first != greedy
    assert len(talk.tokenizer(str(talk.chat.turns[1]["content"]))["input_ids"]) > 6
    assert "max_new_tokens 20" in talk.say("/set")


def test_a_template_that_refuses_is_quoted_and_the_turn_forgotten() -> None:
    talk = Talk(GEMMA)
    talk.say("/system be brief")
    assert "System role not supported" in " ".join(talk.say("hello").split())
    assert talk.chat.turns == []


def test_ctrl_c_stops_the_answer_and_keeps_what_came(talk: Talk) -> None:
    calls: list[None] = []

    def interrupt(*_: object) -> None:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = talk.model.register_forward_pre_hook(interrupt)
    shown = talk.say("hello")
    handle.remove()
    assert "[stopped]" in shown
    full = talk.expected("dates", turn("hello"))[8:]
    assert full.startswith(str(talk.chat.turns[1]["content"]))
    assert 0 < len(str(talk.chat.turns[1]["content"])) < len(full)


def test_without_a_template_lines_are_continued() -> None:
    talk = Talk(None, names=())
    talk.chat.welcome("some/base")
    assert "no chat template" in talk.file.getvalue()
    assert talk.say("once upon") == talk.say("once upon")
    assert talk.chat.turns == []


def test_tab_knows_commands_names_and_settings(talk: Talk) -> None:
    assert completions(talk.chat, "/co") == ["/compare "]
    assert completions(talk.chat, "/adapter ") == ["dates ", "orders ", "none "]
    assert completions(talk.chat, "/set te") == ["temperature "]
    assert completions(talk.chat, "hello /co") == []


def test_a_piped_conversation_is_a_plain_transcript(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/adapter none\nhello"))
    chat(talk.model, talk.tokenizer, base="some/base", stop_ids=(), console=talk.chat.console, sampling=SHORT)
    text = talk.file.getvalue()
    assert "\x1b" not in text
    assert text.count("> hello") == 2
    assert "the base answers now" in text


def test_quit_leaves_the_rest_unread(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nhello\n"))
    chat(talk.model, talk.tokenizer, base="some/base", stop_ids=(), console=talk.chat.console, sampling=SHORT)
    assert "> hello" not in talk.file.getvalue()


TERMINAL_SCRIPT = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
from rich.console import Console
from loratune.screen.chat import chat
from tests.data.toy_tokenizers import CHATML, toy_tokenizer
from tests.screen.test_chat import SHORT, make_model
tokenizer = toy_tokenizer(CHATML)
chat(make_model(tokenizer), tokenizer, base="some/base", stop_ids=(), console=Console(), sampling=SHORT)
print("left")
"""


def test_on_a_terminal_tab_completes_and_ctrl_d_leaves() -> None:
    """In a pseudo-terminal: keys are pressed, and the process ends by itself with status 0."""
    ours, theirs = pty.openpty()
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL_SCRIPT],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=root,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(root)},
    )
    os.close(theirs)
    seen = ""

    def wait_for(words: str, again: bytes = b"") -> None:
        """Reads until the words appear, and presses the key `again` every second."""
        nonlocal seen
        for _ in range(60):
            if words in seen:
                break
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096).decode("utf-8", "replace")
            elif again:
                os.write(ours, again)
        assert words in seen, f"waited for {words!r} after {seen!r}"
        seen = seen.partition(words)[2]

    wait_for("> ")
    os.write(ours, b"/ad\tor\t\r")
    wait_for("orders answers now")
    wait_for("> ")
    os.write(ours, b"\x03")
    wait_for("Ctrl-D or /quit leaves", again=b"\x03")  # a key that arrives before readline listens is lost
    wait_for("> ")
    os.write(ours, b"\x04")
    wait_for("left")
    assert process.wait(timeout=30) == 0
    os.close(ours)
