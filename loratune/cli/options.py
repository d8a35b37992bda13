"""A verb's options as facts: names, types in words, defaults and texts, read from its dataclass of arguments.

tyro parses the words. These facts serve the help (`cli.help`), the printed configuration (`cli.printed`), and the
check of option names, which knows the names of other trainers (`loratune.other_names`).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal

from tyro.conf import Positional, arg

from loratune import other_names
from loratune.errors import ConfigError, nearest
from loratune.short_repr import default_of

_POSITIONAL = typing.get_args(Positional[int])[1]
_HELP = ("-h", "--help", "--help-all")
_METAVARS = {
    "eval_data": "FILE",
    "data": "FILE",
    "chat_template": "FILE",
    "config": "FILE",
    "cache_dir": "DIR",
    "out": "DIR",
    "model": "MODEL",
    "base": "MODEL",
    "device": "DEVICE",
    "memory": "SIZE",
    "gpu": "GPU",
}
"""Setting -> placeholder of its value, where the type says too little."""
_OF_TYPE: dict[object, str] = {int: "N", float: "NUMBER", str: "NAME", bool: "true|false"}


@dataclass(frozen=True)
class Option:
    """One argument of a verb."""

    name: str
    """Its name in Python and TOML."""
    section: str
    """Name of its section in TOML; "" above the sections."""
    value: str
    """Its value in words: "N", "NAME [NAME ...]", "{none, all}"; "" for a switch."""
    text: str
    """Its meaning, from the docstring of the field."""
    default: object
    """Value without the option; MISSING if the option is required."""
    positional: bool
    is_switch: bool
    is_list_of_names: bool
    """Its values are names or numbers, so a comma separates two of them."""
    short: tuple[str, ...] = ()
    """Other spellings, such as -c."""

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """True if the verb does not run without it."""
        return self.default is MISSING

    @property
    def shown_default(self) -> str | None:
        """The default for readers; None if there is none, or if the text states it."""
        if self.required or self.default is None or self.is_switch or self.default in ("", [], {}):
            return None
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def options_of(kind: type[Any], default: object = None, section: str = "") -> list[Option]:
    """All arguments of a dataclass in order; those of its sections follow.

    Args:
        default: an instance whose values are the defaults; None takes those of the class.
    """
    hints, texts = typing.get_type_hints(kind, include_extras=True), documentation(kind)
    own: list[Option] = []
    nested: list[Option] = []
    for setting in fields(kind):
        annotated = hints[setting.name]
        metadata = typing.get_args(annotated)[1:] if typing.get_origin(annotated) is typing.Annotated else ()
        plain = typing.get_args(annotated)[0] if metadata else annotated
        value = default_of(setting) if default is None else getattr(default, setting.name)
        if is_dataclass(plain) and isinstance(plain, type):
            # A variant of LoRA has a configuration class of its own.
            nested += options_of(type(value) if isinstance(value, plain) else plain, value, setting.name)
            continue
        metavar, aliases = _annotations(metadata)
        own.append(
            Option(
                name=setting.name,
                section=section,
                value="" if plain is bool else metavar or _in_words(plain, _METAVARS.get(setting.name)),
                text=texts.get(setting.name, ""),
                default=value,
                positional=_POSITIONAL in metadata,
                is_switch=plain is bool,
                is_list_of_names=_lists_names(plain) and setting.name not in ("data", "eval_data"),
                short=aliases,
            )
        )
    return own + nested


def documentation(kind: type[Any]) -> dict[str, str]:
    """Field -> its docstring, from the source of the class and its bases."""
    texts: dict[str, str] = {}
    for owner in kind.__mro__:
        if not is_dataclass(owner):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for before, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and _is_text(after):
                texts.setdefault(before.target.id, inspect.cleandoc(ast.literal_eval(after.value)))
    return texts


def translate(words: Sequence[str], options: Sequence[Option], verb: str) -> list[str]:
    """The words with the names of this program: names and values of other trainers become ours.

    A switch may be followed by "true" or "false", and a comma may separate names in a list.
    Raises: ConfigError: an option is unknown; the message has our name, an explanation or the nearest name.
    """
    by_name = {option.name: option for option in options if not option.positional}
    short = {name for option in options for name in option.short}
    translated: list[str] = []
    current: Option | None = None
    words = list(words)
    for at, word in enumerate(words):
        if word == "--":
            return translated + words[at:]
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.partition("=")
            plain = name.lstrip("-").replace("-", "_")
            if name in _HELP or name in short:
                current = None
                translated.append(word)
                continue
            positive = plain.removeprefix("no_")
            negated = plain not in by_name and positive in by_name and by_name[positive].is_switch
            current = by_name[positive] if negated else _option(name, plain, by_name, options, verb)
            translated.append("--no-" + current.flag[2:] if negated else current.flag)
            if equals:
                translated += _values(current, value, translated)
        else:
            translated += [word] if current is None else _values(current, word, translated)
            if current is not None and not current.is_list_of_names:
                current = None
    return translated


def _option(name: str, plain: str, by_name: dict[str, Option], options: Sequence[Option], verb: str) -> Option:
    """The option that a word names. Raises ConfigError."""
    if name.startswith("--") and plain in by_name:
        return by_name[plain]
    ours = other_names.same_meaning(plain, by_name)
    if ours is not None and (name.startswith("--") or len(plain) > 1):
        return by_name[ours]
    if any(option.positional and option.name == plain for option in options):
        raise ConfigError(f"{name}: {plain} has no flag; give it first: loratune {verb} {usage(options)}")
    explained = other_names.other_meaning(plain)
    if explained is not None:
        raise ConfigError(f"unknown option {name}: {explained}")
    near = nearest(name, [option.flag for option in by_name.values()])
    raise ConfigError(f"unknown option {name}.{near} See loratune {verb} --help-all")


def _values(option: Option, word: str, before: list[str]) -> list[str]:
    """The words for one value of an option; a switch takes "true" or "false" into its name."""
    if option.is_switch:
        if word.lower() in ("true", "false") and before[-1] == option.flag:
            before[-1] = option.flag if word.lower() == "true" else "--no-" + option.flag[2:]
            return []
        return [word]
    listed = option.is_list_of_names and re.fullmatch(r"[\w.\-]+(,\s*[\w.\-]*)+", word)
    values = [part.strip() for part in word.split(",") if part.strip()] if listed else [word]
    if option.name == "epochs":
        values = [re.sub(r"\.0*$", "", value) for value in values]
    if "true" in option.value:
        values = [value.capitalize() if value in ("true", "false") else value for value in values]
    known = other_names.VALUES.get(option.name, {})
    return [known.get(value, value) for value in values]


def usage(options: Sequence[Option]) -> str:
    """The arguments in one line: positional ones, required ones, and [OPTIONS] for the others."""
    positional = [option.value for option in options if option.positional]
    required = [f"{option.flag} {option.value}" for option in options if option.required and not option.positional]
    return " ".join([*positional, *required, "[OPTIONS]"])


def _annotations(metadata: Sequence[Any]) -> tuple[str | None, tuple[str, ...]]:
    """The placeholder and the other spellings that `tyro.conf.arg` gives an argument."""
    for extra in metadata:
        if isinstance(extra, type(arg(metavar=""))):
            return getattr(extra, "metavar", None), tuple(getattr(extra, "aliases", None) or ())
    return None, ()


def _is_text(node: ast.stmt) -> typing.TypeGuard[ast.Expr]:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _lists_names(expected: Any) -> bool:
    kinds = typing.get_args(expected) if _is_union(expected) else (expected,)
    return any(typing.get_origin(kind) is list for kind in kinds)


def _is_union(expected: Any) -> bool:
    return typing.get_origin(expected) in (typing.Union, types.UnionType)


def _in_words(expected: Any, named: str | None) -> str:
    """The values that an annotated type allows, for readers. `named` is the placeholder of a text."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if _is_union(expected):
        parts = [_in_words(part, named) for part in arguments if part is not type(None)]
        lists = [part for part in parts if "..." in part]
        if lists:
            return lists[0]
        choices = [word for part in parts for word in part.strip("{}").replace("|", ", ").split(", ")]
        return choices[0] if len(choices) == 1 else "{" + ", ".join(choices) + "}"
    if origin is Literal:
        return "{" + ", ".join(map(str, arguments)) + "}" if len(arguments) > 1 else str(arguments[0])
    if origin is list:
        part = _in_words(arguments[0], named)
        return f"{part} [{part} ...]"
    if origin is dict:
        return f"NAME {_OF_TYPE[arguments[1]]} [NAME {_OF_TYPE[arguments[1]]} ...]"
    return named if named and expected is str else _OF_TYPE[expected]
