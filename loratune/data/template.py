"""The model's own chat template and tokenizer, called in the two ways that data needs.

loratune has no templates of its own. The tokenizer's Jinja template renders conversations, as it does in inference.
Templated text is tokenised without adding special tokens, because the template prints them; adding them again would
give two BOS tokens. Text without a template gets the special tokens that the tokenizer puts before a plain prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from loratune import foreign
from loratune.data.record import Message
from loratune.data.sandbox import TemplateEnvironment, TemplateLimit
from loratune.data.stepwise import Watched, prints_stepwise, texts_so_far
from loratune.errors import ConfigError, DataError, ModelError

TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Everything that Jinja's own code and Python's operators raise in a template."""
COMPARED = 16
"""Conversations for which texts from one rendering are compared with texts rendered one by one."""
CLOCK = "strftime_now"
"""The function with which templates print the date."""


def read_template(path: str) -> str:
    """Reads a Jinja chat template from a file, for a tokenizer with no template or a wrong one.

    Raises: ConfigError: the file is missing, unreadable, not UTF-8 or empty.
    """
    try:
        template = foreign.regular(Path(path)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error}") from error
    if not template.strip():
        raise ConfigError(f"chat_template: {path} is empty")
    return template


def require_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Raises ModelError if there is no chat template to render conversations with."""
    if chat_template is None and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, and the data holds "
            "conversations; name one with --chat-template FILE, or use prompt/completion or raw text data"
        )


def prints_date(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> bool:
    """True if the chat template can print the date, so that its text depends on the day."""
    own = tokenizer.chat_template or ""
    texts = [chat_template] if chat_template else list(own.values()) if isinstance(own, dict) else [own]
    return any(CLOCK in text for text in texts)


class ChatTemplate:
    """A tokenizer's chat template, compiled once, with its clock stopped at one date."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None = None,
        date: datetime | None = None,
        *,
        at_once: bool = True,
    ) -> None:
        """
        Args:
            text: Jinja text used in place of the tokenizer's own.
            date: the time that the template prints, by default now.
            at_once: False: `turns` renders each text on its own, the reference to compare with.
        """
        self._tokenizer, self._text = tokenizer, text
        self._environment = TemplateEnvironment(date or datetime.now())
        self._compiled: dict[str, jinja2.Template] = {}
        self._stepwise: dict[str, bool] = {}  # template -> whether it prints message by message
        self._ends: dict[str, str] = {}  # template -> its text for `add_generation_prompt`
        self._to_compare = COMPARED
        self._tokens = tokenizer.special_tokens_map
        own = type(tokenizer).apply_chat_template
        self._replaced = own is not PreTrainedTokenizerBase.apply_chat_template
        self._at_once = at_once and not self._replaced

    def shown(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as templates see them: without "weight", with all names of the reasoning."""
        plain = [
            {key: value for key, value in message.items() if key != "weight"} if "weight" in message else message
            for message in messages
        ]
        alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)  # absent before transformers 5.18
        return plain if alias is None else cast(list[Message], alias(plain))

    def source_of(self, tools: Sequence[dict[str, Any]] | None) -> str:
        """The Jinja text for conversations with or without tools.

        Raises: ModelError: the tokenizer has several templates and no default.
        """
        try:
            text: str = self._tokenizer.get_chat_template(self._text, list(tools) if tools else None)
        except ValueError as error:
            raise ModelError(f"the tokenizer has no chat template for these data: {error}") from error
        return text.removeprefix("\ufeff")

    def render(
        self, shown: list[Message], tools: Sequence[dict[str, Any]] | None, *, source: str, answer_next: bool
    ) -> str:
        """Renders a conversation to text.

        Args:
            shown: messages from `shown`.
            source: file:line, for errors.
            answer_next: end with the header of an answer, after which the model generates.
        Raises:
            DataError: the template rejects the conversation; the message quotes it.
            ModelError: the template has a syntax error, or exceeds the limits of `sandbox`.
        """
        listed: list[Any] | None = list(tools) if tools else None
        if not shown:
            raise DataError(f"{source}: there is no message before it")
        try:
            if self._replaced:
                text = self._tokenizer.apply_chat_template(
                    shown, listed, chat_template=self._text, add_generation_prompt=answer_next, tokenize=False
                )
            else:
                text = self._template(listed).render(
                    messages=shown, tools=listed, documents=None, add_generation_prompt=answer_next, **self._tokens
                )
        except ModelError:
            raise
        except TemplateLimit as error:  # the next conversation would take as long
            raise ModelError(f"{source}: the chat template is not usable: {error}") from error
        except TEMPLATE_FAULTS as error:
            raise DataError(f"{source}: the chat template refuses this conversation: {describe(error)}") from error
        return checked_text(str(text), source)

    def turns(
        self, shown: list[Message], tools: Sequence[dict[str, Any]] | None, answers: Sequence[int], *, source: str
    ) -> Iterator[tuple[str, str]]:
        """Renders the prompt of each answer, as in inference, and the prompt with the answer.

        Args:
            answers: increasing indices of messages.
            source: file:line; errors also name the message.
        Raises: as `render`.
        """
        quick = self._turns_at_once(shown[: answers[-1] + 1], tools, answers)
        if quick is None:
            return self._turns_one_by_one(shown, tools, answers, source)
        if self._to_compare:
            self._to_compare -= 1
            one_by_one = list(self._turns_one_by_one(shown, tools, answers, source))
            if quick != one_by_one:
                self._stepwise[self.source_of(tools)] = False
                return iter(one_by_one)
        return iter(quick)

    def _turns_one_by_one(
        self, shown: list[Message], tools: Sequence[dict[str, Any]] | None, answers: Sequence[int], source: str
    ) -> Iterator[tuple[str, str]]:
        for index in answers:
            place = f"{source}: message {index + 1}"
            prompt = self.render(shown[:index], tools, source=place, answer_next=True)
            yield prompt, self.render(shown[: index + 1], tools, source=place, answer_next=False)

    def _turns_at_once(
        self, shown: list[Message], tools: Sequence[dict[str, Any]] | None, answers: Sequence[int]
    ) -> list[tuple[str, str]] | None:
        """All turns from one rendering; None if the template does not allow it, or fails in any way."""
        text = self.source_of(tools) if self._at_once else ""
        if not text or not self._stepwise.get(text, True) or answers[0] == 0:
            return None
        try:
            if text not in self._ends:
                self._stepwise[text] = prints_stepwise(jinja2.parser.Parser(self._environment, text).parse())
                if not self._stepwise[text]:
                    return None
                whole, beginnings = self._beginnings(shown, tools, answer_next=True)
                self._ends[text] = whole[len(beginnings[-1]) :]
            whole, beginnings = self._beginnings(shown, tools, answer_next=False)
        except (DataError, *TEMPLATE_FAULTS):  # found again, with its place, when rendered one by one
            return None
        end = whole[len(beginnings[-1]) :]
        return [(beginnings[index] + self._ends[text], beginnings[index + 1] + end) for index in answers]

    def _beginnings(
        self, shown: list[Message], tools: Sequence[dict[str, Any]] | None, *, answer_next: bool
    ) -> tuple[str, list[str]]:
        """The text of a conversation, and the part of it before each message and behind the last one."""
        listed: list[Any] | None = list(tools) if tools else None
        parts: list[str] = []
        watched = Watched(shown, parts)
        template = self._template(listed)
        names = {"messages": watched, "tools": listed, "documents": None, "add_generation_prompt": answer_next}
        for part in template.root_render_func(template.new_context(names | self._tokens)):
            parts.append(part)
        if len(watched.marks) != len(shown) + 1:
            raise DataError("the template leaves its loop early")
        return checked_text(self._environment.concat(parts), ""), texts_so_far(parts, watched.marks)

    def _template(self, tools: list[dict[str, Any]] | None) -> jinja2.Template:
        text = self.source_of(tools)
        self._environment.start()
        if text not in self._compiled:
            self._compiled[text] = self._compile(text)
            self._environment.start()
        return self._compiled[text]

    def _compile(self, text: str) -> jinja2.Template:
        try:
            return self._environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is broken at line {error.lineno}: {error.message}") from error
        except (SyntaxError, *TEMPLATE_FAULTS) as error:
            raise ModelError(f"the chat template is broken: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """The first lines of an error's message, or its type if it has none."""
    text = str(error)
    return text[:300] if text else type(error).__name__


def checked_text(text: str, source: str) -> str:
    """Returns the text. Raises DataError: it holds half of a surrogate pair, which no tokenizer accepts."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise DataError(
                f"{source}: \\u{half:04x} is half of a surrogate pair, not a character; fix the text"
            ) from error
    return text


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    source: str,
    chat_template: str | None = None,
    answer_next: bool,
) -> str:
    """Renders one conversation to text, with today's date; for many, see `ChatTemplate.render`."""
    chat = ChatTemplate(tokenizer, chat_template)
    return chat.render(chat.shown(messages), tools, source=source, answer_next=answer_next)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Tokenises each distinct text once, without added special tokens. Returns text -> token ids."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(
        distinct,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about long texts: `render` checks lengths
    )
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, specials: bool = True) -> str:
    """The text of token ids, with or without special tokens, and without clean-up of spaces."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not specials, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one sequence gives one text
    return text


def plain_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before plain text, such as BOS."""
    framed: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
    return framed[:start]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends plain text.

    Raises: ModelError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-text token (eos_token), which "
            "prompt/completion and raw text data need"
        )
    return int(tokenizer.eos_token_id)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special and added tokens."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
