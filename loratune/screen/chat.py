"""`loratune chat`: a conversation with a base model and its adapters, with switching at any time.

One copy of the base is in memory. Switching re-points the adapter's few matrices, so nothing is loaded again. The
model sees the conversation through the tokenizer's own chat template, as in training. A model without a template
continues each line by itself, as it does with prompt/completion data.

On a terminal, readline edits the lines: history, and Tab completes commands, names and settings. From a pipe, each
line is echoed before its answer and no escape code is written, so transcripts can be saved and compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.base.load import max_document_tokens
from loratune.data.prompting import PromptForm, in_words, without_template
from loratune.data.record import Message
from loratune.data.template import chat_text, encode, plain_prefix
from loratune.errors import ConfigError, DataError, LoratuneError, nearest
from loratune.infer.engine import Detokenizer, Sampling, stream
from loratune.lora.inject import activate, adapter_names
from loratune.screen.text import visible

try:
    import readline
except ImportError:  # Windows and minimal builds of Python lack it; input() then edits lines by itself
    readline = None  # type: ignore[assignment]

BASE = "none"
"""Name of the bare base in commands. An adapter of this name cannot be chosen."""

DEFAULTS = Sampling(max_new_tokens=512, temperature=0.0, top_p=1.0, top_k=0, seed=None)

_COMMANDS = {
    "/adapter": ("[NAME]", "switch to this adapter; none is the bare base"),
    "/compare": ("[TEXT]", "put this, or the last question, to the base and all adapters"),
    "/system": ("[TEXT]", "set or remove the system message, and start a new conversation"),
    "/reset": ("", "start a new conversation"),
    "/set": ("[NAME VALUE]", "temperature 0.7, top_p 0.9, max_new_tokens 256, ..."),
    "/help": ("", "list the commands"),
    "/quit": ("", "leave, like Ctrl-D; Ctrl-C stops an answer"),
}
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue")


class Chat:
    """One conversation with a model and its attached adapters."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int],
        console: Console,
        sampling: Sampling = DEFAULTS,
        forms: Mapping[str | None, Sequence[PromptForm]] | None = None,
    ) -> None:
        """Starts with the first adapter active, or with the base if there is none.

        Args:
            forms: adapter name, or None for the base -> forms of its training data (`data.prompting`).
        """
        self.forms = forms or {}
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.console, self.sampling = console, sampling
        self.names = adapter_names(model)
        self.active: str | None = None
        self.system: str | None = None
        self.turns: list[Message] = []
        self._last_question: str | None = None
        self._switch(self.names[0] if self.names else None)

    def say(self, line: str) -> bool:
        """Answers one line, a command or a message. Returns False if it ends the conversation."""
        text = line.strip()
        if not text:
            return True
        try:
            if text.startswith("/"):
                return self._command(text)
            self._ask(text)
        except LoratuneError as error:
            self._note(str(error), "red")
        return True

    def welcome(self, base: str) -> None:
        """Prints the names of the base and the adapters, and the command for help."""
        people = f" with {', '.join(self.names)}" if self.names else ""
        self.console.print(
            Text.assemble(("loratune chat", "bold"), f"  {base}{people}  ", ("/help", "cyan")), soft_wrap=True
        )
        if not self.tokenizer.chat_template:
            self._note("This model has no chat template: it continues each line, without the earlier ones.")
        elif self._plain:
            self._note(self._how_trained())

    def _command(self, text: str) -> bool:
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        match word:
            case "/adapter":
                self._choose(rest)
            case "/compare":
                self._compare(rest)
            case "/system":
                self.system, self.turns = rest or None, []
                self._note("system message set; new conversation" if rest else "no system message; new conversation")
            case "/reset":
                self.turns = []
                self._note("new conversation")
            case "/set":
                self._set(rest)
            case "/help":
                self._help()
            case "/quit" | "/exit":
                return False
            case _:
                raise ConfigError(f"unknown command {word}.{nearest(word, _COMMANDS)} /help lists them")
        return True

    def _ask(self, question: str) -> None:
        """Adds a question and its answer to the conversation, also an answer that Ctrl-C cut."""
        self._last_question = question
        answer = self._answer([*self.turns, {"role": "user", "content": question}])
        if answer and not self._plain:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _compare(self, question: str) -> None:
        """Puts a question to the base and every adapter without changing the conversation."""
        asked = question or self._last_question
        if asked is None:
            raise ConfigError("nothing to compare yet: /compare TEXT, or ask something first")
        self._last_question = asked
        history = self.turns
        if not question and history and history[-2]["content"] == asked:
            history = history[:-2]  # ask it again at its place in the conversation
        before = self.active
        try:
            for name in (None, *self.names):
                self._switch(name)
                self._answer([*history, {"role": "user", "content": asked}])
        finally:
            self._switch(before)

    def _answer(self, messages: Sequence[Message]) -> str:
        """Streams one answer to the screen, after the name of the adapter."""
        prompt = self._prompt(messages)
        tokens = stream(self.model, prompt, stop_ids=self.stop_ids, **asdict(self.sampling))
        self.console.print(self._label(self.active), end="")
        detokenizer, pieces, drawn = Detokenizer(self.tokenizer), [""], 0
        try:
            for token in tokens:
                drawn += 1
                pieces.append(detokenizer.add(token))
                self._write(pieces[-1])
            pieces.append(detokenizer.finish())
            self._write(pieces[-1] if "".join(pieces).strip() else "(no text)")
        except KeyboardInterrupt:
            self._write(" [stopped]")
        finally:
            self.console.print()
        if drawn == self.sampling.max_new_tokens:
            self._note(f"cut at {drawn} tokens; /set max_new_tokens {2 * drawn} allows more")
        return "".join(pieces)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        if self._plain:
            text = str(messages[-1]["content"])
            return plain_prefix(self.tokenizer) + encode(self.tokenizer, [text])[text]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        text = chat_text(self.tokenizer, [*system, *messages], None, source="chat", answer_next=True)
        prompt = encode(self.tokenizer, [text])[text]
        limit = max_document_tokens(self.model)
        if limit is not None and len(prompt) >= limit:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens and the model allows {limit}; /reset starts a new one"
            )
        return prompt

    @property
    def _plain(self) -> bool:
        """True if the model sees a line without the chat template and the earlier turns, as in training."""
        return not self.tokenizer.chat_template or without_template(self.forms.get(self.active, ()))

    def _how_trained(self) -> str:
        trained = in_words(self.forms.get(self.active, ()))
        return f"{self.active or 'This model'} was trained on {trained}: it continues each line as it stands."

    def _choose(self, name: str) -> None:
        if not name:
            for known in (*self.names, None):
                mark = "  (answers now)" if known == self.active else ""
                self.console.print(Text.assemble(self._label(known), (mark, "dim")))
            return
        if name != BASE and name not in self.names:
            have = ", ".join((*self.names, BASE))
            raise ConfigError(f'no adapter "{name}"; there are {have}.{nearest(name, (*self.names, BASE))}')
        self._switch(None if name == BASE else name)
        self._note(f"{name} answers now" if name != BASE else "the base answers now, without an adapter")
        if self.tokenizer.chat_template and self._plain:
            self._note(self._how_trained())

    def _switch(self, name: str | None) -> None:
        if self.names:
            activate(self.model, name)
        self.active = name

    def _set(self, rest: str) -> None:
        if not rest:
            for setting in fields(Sampling):
                self._note(f"{setting.name} {getattr(self.sampling, setting.name)}")
            return
        name, _, value = rest.replace("=", " ").partition(" ")
        if name not in _KINDS:
            raise ConfigError(f'no setting "{name}"; there are {", ".join(_KINDS)}.{nearest(name, _KINDS)}')
        self.sampling = replace(self.sampling, **{name: _number(name, value.strip())})
        self._note(f"{name} {getattr(self.sampling, name)}")

    def _help(self) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for command, (arguments, meaning) in _COMMANDS.items():
            table.add_row(Text(f"{command} {arguments}"), meaning)
        self.console.print(table)

    def _label(self, name: str | None) -> Text:
        width = max(map(len, ("base", *self.names)))
        colour = "dim" if name is None else f"bold {_COLOURS[self.names.index(name) % len(_COLOURS)]}"
        return Text(f"{name or 'base':<{width}}  ", style=colour)

    def _write(self, piece: str) -> None:
        self.console.print(Text(visible(piece)), end="", soft_wrap=True)
        self.console.file.flush()

    def _note(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str,
    stop_ids: Collection[int],
    console: Console,
    sampling: Sampling = DEFAULTS,
    forms: Mapping[str | None, Sequence[PromptForm]] | None = None,
) -> None:
    """Runs a conversation on standard input until it ends.

    Args:
        model: the base with all adapters attached under the names that the user will type.
        base: name of the base model in the first line.
        forms: see `Chat`.
    """
    talk = Chat(model, tokenizer, stop_ids=stop_ids, console=console, sampling=sampling, forms=forms)
    talk.welcome(base)
    for line in _typed_lines(talk) if sys.stdin.isatty() else _piped_lines(console):
        if not talk.say(line):
            return


def completions(talk: Chat, line: str) -> list[str]:
    """Completions of the last word of `line`, for Tab."""
    words = line.split(" ")
    if len(words) == 1:
        known: Collection[str] = _COMMANDS
    elif len(words) == 2 and words[0] in ("/adapter", "/set"):
        known = (*talk.names, BASE) if words[0] == "/adapter" else _KINDS
    else:
        return []
    return [word + " " for word in known if word.startswith(words[-1])]


_KINDS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": lambda value: None if value == "none" else int(value),
}


def _number(name: str, value: str) -> Any:
    try:
        return _KINDS[name](value)
    except ValueError:
        example = {"max_new_tokens": "256", "temperature": "0.7", "top_p": "0.9", "top_k": "40", "seed": "1"}[name]
        raise ConfigError(f'/set {name} needs a number, not "{value}"; for example /set {name} {example}') from None


def _typed_lines(talk: Chat) -> Iterator[str]:
    """Lines from a terminal until Ctrl-D."""
    console = talk.console
    # \001 and \002 enclose characters that readline must not count in the width of the line.
    prompt = "> " if console.color_system is None else "\001\033[1m\002> \001\033[0m\002"
    if readline is not None:
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        readline.set_completer(_completer(talk))
    while True:
        console.print()
        try:
            line = input(prompt)
        except KeyboardInterrupt:
            console.print()
            console.print(Text("Ctrl-D or /quit leaves", style="dim"))
            continue
        except EOFError:
            console.print()
            return
        yield line


def _completer(talk: Chat) -> Callable[[str, int], str | None]:
    def complete(_: str, state: int) -> str | None:
        found = completions(talk, readline.get_line_buffer()[: readline.get_endidx()])
        return found[state] if state < len(found) else None

    return complete


def _piped_lines(console: Console) -> Iterator[str]:
    """Lines from a file or another program, echoed so that the transcript is complete."""
    try:
        for line in sys.stdin:
            if line.strip():
                console.print(Text(f"\n> {line.rstrip()}"), soft_wrap=True)
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error
