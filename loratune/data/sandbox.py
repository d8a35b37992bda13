"""The environment in which chat templates run: that of transformers, with limits on time and size.

A template is a program from a model's folder, so it may loop for hours or build a string of terabytes. transformers'
sandbox hides Python from it but sets no limits. Here every loop step, call, filter and operator counts, and every few
steps the processor time is compared with a limit. Operations that enlarge their input are bounded before they run.
Templates within the limits give the same text as in transformers.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

SECONDS = 0.5
"""Processor time for one conversation. Common templates need some microseconds a message."""
MAX_ITEMS = 1 << 24
"""Largest string, in characters, and list."""
MAX_NUMBER = 1_000_000
"""Largest whole number that a function or filter accepts, for example as a width."""
MAX_BITS = 20_000
"""Largest product or power of whole numbers; Python prints at most 4,300 digits."""
MAX_FORMAT = 200
"""Longest format of a date, in characters."""
_STEPS_PER_LOOK = 32
_WIDE = re.compile(r"\d{6}")
_GROWS = re.compile(
    "batch|center|encode|expandtabs|format|format_map|indent|join|ljust|pprint|replace|rjust|round|slice|tojson"
    "|translate|wordwrap|zfill"
)
"""Functions and filters whose result may be as large as the product of two of their inputs."""

_STRUCTURAL = re.compile(
    "attr|count|d|default|first|groupby|items|last|length|list|map|max|min|random|reject|rejectattr|reverse|select"
    "|selectattr"
)
"""Filters that do not print or compare all that a list or object contains."""


class TemplateLimit(jinja2.TemplateError):
    """The template needs more time or memory than any conversation should."""


class _Meter(threading.local):
    """Steps of the rendering in progress, and the processor time at which it must end."""

    steps = 0
    deadline: float | None = None
    """None until the first look at the clock."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja with transformers' filters and functions, a fixed date, and limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, date: datetime) -> None:
        """
        Args:
            date: the time that `strftime_now` prints.
        """
        model = chat_template_utils._compile_jinja_template("").environment
        extensions = [type(extension) for extension in model.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._meter = _Meter()
        self.filters = {name: self._guarded(name, function) for name, function in model.filters.items()}
        self.filters |= {_COUNTED: functools.partial(_Loop, self), _JOINED: self._joined}
        self.globals = dict(model.globals) | {"strftime_now": functools.partial(_strftime, date)}
        del self.globals["lipsum"]  # random text
        self.concat = self._concat  # type: ignore[method-assign]
        self.finalize = _weighed

    def start(self) -> None:
        """Begins to count the steps of one rendering."""
        self._meter.steps, self._meter.deadline = 0, None

    def count(self) -> None:
        """Counts one step. Raises TemplateLimit: the time is over."""
        meter = self._meter
        meter.steps += 1
        if meter.steps % _STEPS_PER_LOOK:
            return
        now = time.thread_time()  # a system call, which short renderings do without
        if meter.deadline is None:
            meter.deadline = now + SECONDS
        elif now > meter.deadline:
            raise TemplateLimit(f"it has taken {SECONDS} seconds of processor time and is not done")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the template."""
        self.count()
        if args or kwargs:
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            _check_inputs(getattr(obj, "__name__", ""), [owner, *args, *kwargs.values()])
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator that can enlarge its inputs."""
        self.count()
        if operator == "+":
            return _bounded(left + right)
        if operator == "%":
            if isinstance(left, str):
                _check_inputs("format", [left, *(right if isinstance(right, tuple) else [right])])
            return _bounded(left % right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateLimit(f"{operator} gives a whole number of more than {MAX_BITS:,} bits")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, Sized) and isinstance(times, int) and len(items) * times > MAX_ITEMS:
                    raise _too_large(len(items) * times)
        return self.binop_table[operator](left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Limits().visit(tree)
        tree.set_environment(self)
        return tree

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.count()
            inputs = [*args[skipped:], *kwargs.values()]
            _check_inputs(name, inputs)
            if prints:
                for value in inputs:
                    _weighed(value)
            return _bounded(function(*args, **kwargs))

        prints = _STRUCTURAL.fullmatch(name) is None
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context
        return guarded

    def _joined(self, parts: Iterable[Any]) -> str:
        """The operator ~."""
        self.count()
        return self._concat(str(_weighed(part)) for part in parts)

    def _concat(self, parts: Iterable[str]) -> str:
        whole = list(parts)
        length = sum(map(len, whole))
        if length > MAX_ITEMS:
            raise _too_large(length)
        return "".join(whole)


_COUNTED, _JOINED = "loop step", "joined text"  # with a blank, so no template can name them


class _Limits(NodeTransformer):
    """Counts the steps of every loop, and bounds the operator ~, which has no hook of its own."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(
            nodes.List(node.nodes, lineno=node.lineno), _JOINED, [], [], None, None, lineno=node.lineno
        )


class _Loop:
    """The items of a loop, each of which counts. It has a length if they have one."""

    def __init__(self, environment: TemplateEnvironment, items: Any) -> None:
        self._environment, self._items = environment, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        count = self._environment.count
        for item in self._items:
            count()
            yield item


def _check_inputs(name: str, inputs: list[Any]) -> None:
    """Raises TemplateLimit if the result could be huge or take long."""
    for value in inputs:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimit(f"{name}: the number {str(value)[:20]} exceeds {MAX_NUMBER:,}")
    if inputs and _GROWS.fullmatch(name):
        for value in inputs:
            _weighed(value)
        sizes = [_size(value) for value in inputs]
        if (sizes[0] or 1) * max(sizes[1:], default=1) > MAX_ITEMS:
            raise _too_large(sizes[0] * max(sizes[1:]))
        if name.startswith("format") and any(isinstance(value, str) and _WIDE.search(value) for value in inputs[:1]):
            raise TemplateLimit("a format has a width of six or more digits")


def _size(value: Any) -> int:
    """The factor by which an input may enlarge a result."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_ITEMS:
        raise _too_large(len(value))
    return value


def _weighed(value: Any) -> Any:
    """The value. Raises TemplateLimit: it is a list or object whose text would be huge, because it repeats parts."""
    if not isinstance(value, list | tuple | dict):
        return value
    left, waiting = MAX_ITEMS, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.keys()
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
        left -= 16 + (len(part) if isinstance(part, str | list | tuple | dict) else 0)
        if left < 0:
            raise _too_large(MAX_ITEMS)
    return value


def _too_large(items: int) -> TemplateLimit:
    return TemplateLimit(f"it builds a text or list of {items:,} items or more; the limit is {MAX_ITEMS:,}")


def _strftime(date: datetime, format: str) -> str:
    if len(format) > MAX_FORMAT:
        raise TemplateLimit(f"the format of a date has {len(format):,} characters; the limit is {MAX_FORMAT}")
    return date.strftime(format)
