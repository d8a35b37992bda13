"""Tokenises long texts in pieces, each distinct piece once.

A tokenizer finds its special tokens first and tokenises the text between them part by part. So a text may be cut
before a special token, and the tokens of the pieces, one after another, are those of the text. The prompts and
answers of one conversation then share most of their pieces: every character is tokenised once, not once per answer.

The cut is exact if no other added token can overlap the special token or take blanks from its left (`cut_tokens`).
A piece keeps its special token at its front, so tokenizers that treat the start of a text differently see the same.
`Pieces` also compares both ways on its first texts, and cuts no text of a tokenizer for which they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from loratune.data.template import encode

COMPARED = 32
COMPARED_CHARACTERS = 200_000
"""Texts of the first batch that are tokenised both ways, and their length."""

Ids = dict[str, list[int]]
"""Piece -> token ids."""
Cut = tuple[str, list[str]]
"""A text and its pieces."""


class _AddedToken(Protocol):
    content: str
    lstrip: bool
    single_word: bool
    normalized: bool


class Pieces:
    """Cuts texts for one tokenizer, and tokenises the pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, cut: bool = True) -> None:
        """
        Args:
            cut: False: every text is one piece, the reference to compare with.
        """
        self._tokenizer = tokenizer
        tokens = cut_tokens(tokenizer) if cut else []
        self._mark = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._compared = False

    def cut(self, text: str, known: Cut = ("", [""])) -> list[str]:
        """The pieces of a text, at least one.

        Args:
            known: another text with its pieces. If it is the beginning of this one, only the rest is searched.
        """
        if self._mark is None:
            return [text]
        beginning, pieces = known
        pieces = pieces[:-1] if text.startswith(beginning) else []
        start = len(beginning) - len(known[1][-1]) if pieces else 0
        for match in self._mark.finditer(text, start + 1):
            pieces.append(text[start : match.start()])
            start = match.start()
        pieces.append(text[start:])
        return pieces

    def compare(self, texts: Sequence[str]) -> None:
        """Tokenises some texts both ways; if they differ, no text is cut from now on."""
        if self._mark is None or self._compared:
            return
        ends = accumulate(map(len, texts))
        chosen = [text for text, end in zip(texts[:COMPARED], ends, strict=False) if end <= COMPARED_CHARACTERS]
        whole = encode(self._tokenizer, chosen)  # first, since it also resets truncation and padding
        cut = [self.cut(text) for text in chosen]
        ids = self.encode(chain.from_iterable(cut))
        if any(joined(ids, pieces) != whole[text] for text, pieces in zip(chosen, cut, strict=True)):
            self._mark = None
        self._compared = True

    def encode(self, pieces: Iterable[str]) -> Ids:
        """Tokenises each distinct piece once."""
        if self._mark is None:
            return encode(self._tokenizer, pieces)
        distinct = list(dict.fromkeys(pieces))
        backend = self._tokenizer.backend_tokenizer  # `cut_tokens` found it
        encoded = backend.encode_batch_fast(distinct, add_special_tokens=False)  # without offsets, at half the cost
        return {piece: tokens.ids for piece, tokens in zip(distinct, encoded, strict=True)}


def joined(ids: Ids, pieces: Sequence[str]) -> list[int]:
    """Token ids of the pieces, one after another."""
    return list(chain.from_iterable(map(ids.__getitem__, pieces)))


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of pieces at the front of both."""
    shortest = min(len(first), len(second))
    return next((at for at in range(shortest) if first[at] != second[at]), shortest)


def cut_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens before which a text can be cut; empty for tokenizers that do not work by parts.

    Such a token is found in the raw text wherever it occurs: no other token contains it or ends with its beginning.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return []
    every: Iterable[_AddedToken] = backend.get_added_tokens_decoder().values()
    raw = [token for token in every if not token.normalized]
    texts = [token.content for token in raw]
    plain = [token.content for token in raw if not (token.lstrip or token.single_word)]
    return [text for text in plain if _stands_alone(text, texts)]


def _stands_alone(token: str, all_tokens: Sequence[str]) -> bool:
    if not token or token[0].isspace() or token[0].isalnum() or token[0] == "_":
        return False
    starts = [token[:length] for length in range(1, len(token))]
    return not any(
        (token in other and token != other) or any(other.endswith(start) for start in starts) for other in all_tokens
    )
