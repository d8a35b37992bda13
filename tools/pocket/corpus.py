"""The pretraining stream: documents packed whole into rows of 1,024 tokens, made by many processes, never stored.

A row is uint16: the token in the low 12 bits, bit 15 set on tokens whose prediction is trained in full (assistant
turns, plain text), bit 14 on the first token of a document. One shard is a fixed function of its number.
"""

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tools.pocket import library, tokenizer
from tools.pocket.tasks_chat import conversation

TOKENS_PER_ROW = 1024
ROWS_PER_SHARD = 2048
LIBRARY_SHARE = 0.10  # of all tokens
TRAINED, START, TOKEN = np.uint16(0x8000), np.uint16(0x4000), np.uint16(0x0FFF)

Tokens = npt.NDArray[np.uint16]


class HeldOutSkillError(AssertionError):
    """A document shows a skill that pretraining must not contain."""


def flagged(documents: list[list[int]], ids_of: dict[str, int]) -> list[Tokens]:
    """Token ids of documents with the start bit and the trained bits set; each document opens with a role token."""
    tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents])
    starts = np.cumsum([0] + [len(ids) for ids in documents[:-1]])
    is_role, is_trained = np.zeros(4096, dtype=bool), np.zeros(4096, dtype=bool)
    is_role[[ids_of[r] for r in (tokenizer.BEGIN, tokenizer.SYSTEM, tokenizer.USER, tokenizer.ASSISTANT)]] = True
    is_trained[[ids_of[r] for r in (tokenizer.BEGIN, tokenizer.ASSISTANT)]] = True
    roles = is_role[tokens]
    speaker = tokens[np.maximum.accumulate(np.where(roles, np.arange(len(tokens)), 0))]
    tokens[~roles & is_trained[speaker]] |= TRAINED
    tokens[starts] |= START
    return np.split(tokens, starts[1:])


def pack(documents: list[Tokens], n_rows: int) -> Tokens:
    """Fill rows with whole documents, first come first served; the rest of a row stays padding (token 0)."""
    rows = np.zeros((n_rows, TOKENS_PER_ROW), dtype=np.uint16)
    open_rows = [[0, i] for i in range(min(16, n_rows))]  # used tokens, row number
    opened = len(open_rows)
    for document in documents:
        slot = next((s for s in open_rows if s[0] + len(document) <= TOKENS_PER_ROW), None)
        if slot is None:
            if opened == n_rows:
                break
            slot = max(open_rows)  # close the fullest
            slot[:] = [0, opened]
            opened += 1
        rows[slot[1], slot[0] : slot[0] + len(document)] = document
        slot[0] += len(document)
    return rows


class Maker:
    """Makes shards in one process: the tokenizer and the tokenized library are loaded once."""

    def __init__(self, tokenizer_file: Path, library_texts: list[str] | None = None) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.ids_of = dict(zip(tokenizer.SPECIAL, range(len(tokenizer.SPECIAL)), strict=True))
        texts = library.documents() if library_texts is None else library_texts
        self.library = self._encode([f"{tokenizer.BEGIN}{t}{tokenizer.END}" for t in texts])

    def _encode(self, texts: list[str]) -> list[Tokens]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return flagged([e.ids for e in encoded if len(e.ids) <= TOKENS_PER_ROW], self.ids_of)

    def chats(self, rng: random.Random, n: int) -> list[Tokens]:
        """n generated conversations, each checked to be free of the held-out skills."""
        texts = [tokenizer.chat_text(conversation(rng)) for _ in range(n)]
        for text in texts:
            if not library.is_clean(text):
                raise HeldOutSkillError(text)
        return self._encode(texts)

    def shard(self, number: int, n_rows: int = ROWS_PER_SHARD) -> Tokens:
        """(n_rows, 1024) rows of shard `number`: one part library, nine parts generated conversations."""
        rng = random.Random(f"shard/{number}")
        wanted = n_rows * TOKENS_PER_ROW * 1.02
        documents: list[Tokens] = []
        size = 0
        while size < wanted * LIBRARY_SHARE:
            documents.append(rng.choice(self.library))
            size += len(documents[-1])
        while size < wanted:
            more = self.chats(rng, 1000)
            documents += more
            size += sum(map(len, more))
        rng.shuffle(documents)
        return pack(documents, n_rows)
