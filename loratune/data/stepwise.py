"""Templates that print message by message: one rendering gives the text before and behind every message.

The prompt of answer i is the template's text for the messages before it, so a conversation of k answers needs 2 k
renderings. Many templates print a head, then one part per message, then an end. If the head and the parts depend on
nothing but the messages so far, and the end on nothing but `add_generation_prompt`, then

    text(messages[:i], add_generation_prompt) = text before message i in any longer conversation + end

`prints_stepwise` proves this from the template's syntax tree. All other templates are rendered once per text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from jinja2 import nodes

N = TypeVar("N", bound=nodes.Node)

_SO_FAR = frozenset(("first", "index", "index0", "previtem", "cycle", "changed"))
"""Attributes of `loop` that do not depend on later messages."""
_GIVEN = frozenset(("messages", "tools", "documents", "loop", "self"))
"""Names that differ between conversations."""
_ELSEWHERE = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)


class Watched(list[Any]):
    """Messages that note how many parts of the text exist when the template asks for the next message."""

    def __init__(self, messages: Iterable[Any], parts: Sequence[str]) -> None:
        """
        Args:
            parts: the list to which the parts are appended as the template yields them.
        """
        super().__init__(messages)
        self.marks: list[int] = []
        self._parts = parts

    def __iter__(self) -> Iterator[Any]:
        for message in super().__iter__():
            self.marks.append(len(self._parts))
            yield message
        self.marks.append(len(self._parts))


def texts_so_far(parts: Sequence[str], marks: Sequence[int]) -> list[str]:
    """The text before each message, then the text behind the last one."""
    texts, text, start = [], "", 0
    for mark in marks:
        text += "".join(parts[start:mark])
        texts.append(text)
        start = mark
    return texts


def prints_stepwise(tree: nodes.Template) -> bool:
    """True if one rendering gives the text of every beginning of a conversation, see above.

    Args:
        tree: the template as parsed by Jinja, before any transformation.
    """
    names = {"messages"} | _aliases(tree)
    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For) and _is_name(node.iter, names)]
    if len(loops) != 1 or any(tree.find_all(_ELSEWHERE)):
        return False
    (at,) = loops
    head, loop, end = tree.body[:at], tree.body[at], tree.body[at + 1 :]
    assert isinstance(loop, nodes.For)
    if loop.test is not None or loop.else_ or loop.recursive:
        return False
    before = [node for node in head if not _is_alias(node)]
    if not all(_looks_back(node, names, inner=False) for node in (*before, loop.target, *loop.body)):
        return False
    changing = _GIVEN | names | {name for node in (*head, loop) for name in _stored(node)}
    return not any(name.name in changing for node in end for name in _all(node, nodes.Name)) and not any(
        _is_random(node) for node in end
    )


def _looks_back(node: nodes.Node, names: set[str], *, inner: bool) -> bool:
    """True if a part of the template depends on no later message and not on `add_generation_prompt`.

    Args:
        inner: inside a loop over something else, in which `loop` has another meaning.
    """
    if isinstance(node, nodes.Getitem) and _is_name(node.node, names):
        return isinstance(node.arg, nodes.Const) and node.arg.value == 0 and type(node.arg.value) is int
    if isinstance(node, nodes.Getattr) and _is_name(node.node, {"loop"}):
        return inner or node.attr in _SO_FAR
    if isinstance(node, nodes.Name):
        return node.name not in names | {"add_generation_prompt", "self"} and (inner or node.name != "loop")
    if _is_random(node):
        return False
    body = node.body if isinstance(node, nodes.For) else []
    return all(
        _looks_back(child, names, inner=inner or any(child is part for part in body))
        for child in node.iter_child_nodes()
    )


def _aliases(tree: nodes.Template) -> set[str]:
    """Names that the template sets to `messages` and to nothing else."""
    stored = [name for node in tree.body for name in _stored(node)]
    targets = [node.target.name for node in tree.body if _is_alias(node)]  # type: ignore[attr-defined]
    return {name for name in targets if stored.count(name) == 1} if "messages" not in stored else set()


def _is_alias(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and _is_name(node.node, {"messages"})
    )


def _is_name(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _is_random(node: nodes.Node) -> bool:
    return any(part.name == "random" for part in _all(node, nodes.Filter))


def _stored(node: nodes.Node) -> list[str]:
    """Names that a part of the template assigns or defines."""
    names = [name.name for name in _all(node, nodes.Name) if name.ctx != "load"]
    return names + [part.name for part in _all(node, nodes.Macro)] + [part.name for part in _all(node, nodes.NSRef)]


def _all(node: nodes.Node, kind: type[N]) -> list[N]:
    """A node and its descendants of one kind."""
    own = [node] if isinstance(node, kind) else []
    return own + list(node.find_all(kind))
