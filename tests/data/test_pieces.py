"""Tokens of pieces, joined, are the tokens of the text, for tokenizers of all kinds and hostile special tokens."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loratune.box import MODEL_DIR
from loratune.config import DataConfig, TrainOn
from loratune.data.examples import Batch, RenderJob, finish_batch, plan_batch
from loratune.data.messages import check_messages
from loratune.data.pieces import Pieces, cut_tokens, joined
from loratune.data.record import Record
from loratune.data.render import template_date
from loratune.data.template import ChatTemplate, encode, plain_prefix, special_tokens
from tests.data.toy_tokenizers import (
    NO_STOP,
    SPECIALS,
    TEMPLATES,
    metaspace_tokenizer,
    space_prefix_tokenizer,
    stop_ids,
    toy_tokenizer,
)

PARTS = [*SPECIALS, "the", " dog", "\n", "  ", "\t", "é", "日本", "a", "<", "|", ">", "<|", "|>", " ", "", "x_", "_"]
HOSTILE = [
    AddedToken("<a>", special=True, normalized=False),
    AddedToken("<a><b>", special=True, normalized=False),  # contains another
    AddedToken("b|", special=True, normalized=False),
    AddedToken("|b", special=True, normalized=False),  # overlaps the one before
    AddedToken("||", special=True, normalized=False),  # overlaps itself
    AddedToken("<left>", special=True, normalized=False, lstrip=True),
    AddedToken("<right>", special=True, normalized=False, rstrip=True),
    AddedToken("[both]", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("word", special=True, normalized=False, single_word=True),
    AddedToken("plain", normalized=True),
    AddedToken("<end>", special=True, normalized=False),
]


def hostile_tokenizer(lowercase: bool) -> PreTrainedTokenizerFast:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(HOSTILE)
    if lowercase:
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words of a fixed vocabulary, BERT's way, with its post-processor."""
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##x": 2, "dog": 3, "a": 4}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.add_special_tokens(["[CLS]", "[SEP]", *SPECIALS])
    words.post_processor = processors.BertProcessing(("[SEP]", 6), ("[CLS]", 5))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


TOKENIZERS = {
    "byte level": toy_tokenizer,
    "pocket": lambda: AutoTokenizer.from_pretrained(MODEL_DIR),
    "prepend": space_prefix_tokenizer,
    "metaspace first": lambda: metaspace_tokenizer("first"),
    "metaspace always": lambda: metaspace_tokenizer("always"),
    "words": word_tokenizer,
    "hostile": lambda: hostile_tokenizer(lowercase=False),
    "hostile and normalised": lambda: hostile_tokenizer(lowercase=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_text(name: str) -> None:
    """400 random texts of special tokens, parts of them, blanks and words."""
    tokenizer, rng = TOKENIZERS[name](), random.Random(name)
    pieces = Pieces(tokenizer)
    parts = [*PARTS, *(token.content for token in HOSTILE), *cut_tokens(tokenizer)]
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(400)]
    whole = encode(tokenizer, texts)
    cut = [pieces.cut(text) for text in texts]
    ids = pieces.encode(piece for found in cut for piece in found)
    assert sum(map(len, cut)) > 1.5 * len(texts)  # otherwise the comparison says nothing
    for text, found in zip(texts, cut, strict=True):
        assert "".join(found) == text
        assert joined(ids, found) == whole[text]


def test_only_tokens_that_stand_alone_are_cut_at() -> None:
    assert cut_tokens(toy_tokenizer()) == SPECIALS
    assert cut_tokens(hostile_tokenizer(lowercase=False)) == [*SPECIALS, "<right>", "<end>"]
    split = toy_tokenizer()
    split.split_special_tokens = True
    assert cut_tokens(split) == []


def test_a_text_that_goes_on_is_cut_as_if_alone() -> None:
    pieces, rng = Pieces(toy_tokenizer()), random.Random(0)
    for _ in range(200):
        first = "".join(rng.choices(PARTS, k=rng.randint(0, 8)))
        second = first * (rng.random() < 0.8) + "".join(rng.choices(PARTS, k=rng.randint(0, 8)))
        assert pieces.cut(second, (first, pieces.cut(first))) == pieces.cut(second)


class Joining(PreTrainedTokenizerFast):
    """A tokenizer that treats whole texts: its last token depends on the length of the text."""

    def _encode_plus(self, text, *args, **kwargs):  # type: ignore[no-untyped-def]
        encoded = super()._encode_plus(text, *args, **kwargs)
        for one, ids in zip(text, encoded["input_ids"], strict=True):
            ids.append(len(one))
        return encoded


def test_a_tokenizer_that_does_not_work_by_parts_gets_whole_texts() -> None:
    tokenizer = Joining(tokenizer_object=toy_tokenizer().backend_tokenizer)
    pieces, text = Pieces(tokenizer), "the<s>dog"
    assert pieces.cut(text) == ["the", "<s>dog"]
    pieces.compare([text])
    assert pieces.cut(text) == [text]
    assert pieces.encode([text]) == encode(tokenizer, [text])


def conversations(rng: random.Random, count: int, system: bool) -> list[Record]:
    words = ["the", " dog", "\n", "  ", "日本", "<think>", "</think>", "<s>", "<|header|>", "x", "dog."]
    records = []
    for number in range(count):
        messages = [{"role": "system", "content": "be brief"}] if system and rng.random() < 0.5 else []
        for turn in range(rng.randint(2, 7)):
            content = "".join(rng.choices(words, weights=[9, 9, 3, 3, 3, 1, 1, 1, 1, 5, 5], k=rng.randint(1, 9)))
            messages.append({"role": ("user", "assistant")[turn % 2], "content": content + "x"})
        records.append(Record(f"f:{number}", check_messages(f"f:{number}", messages)))
    return [*records, Record("f:text", text="the<s>dog"), Record("f:pair", prompt="the ", completion="dog")]


def rendered(records: list[Record], tokenizer: PreTrainedTokenizerFast, train_on: TrainOn, quick: bool) -> Batch:
    job = RenderJob(
        tokenizer,
        None,
        train_on,
        stop_ids(tokenizer),
        special_tokens(tokenizer),
        plain_prefix(tokenizer),
        60,
        True,
        template_date(DataConfig()),
    )
    pieces, chat = Pieces(tokenizer, cut=quick), ChatTemplate(tokenizer, date=job.date, at_once=quick)
    batch = Batch()
    for at in range(0, len(records), 20):
        plan = plan_batch(records[at : at + 20], job, chat, pieces)
        batch.add(finish_batch(plan, pieces.encode(plan.pieces()), job))
    return batch


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", [*TEMPLATES, "no stop"])
def test_examples_are_those_of_the_reference(name: str, train_on: TrainOn) -> None:
    """Tokens, masks, order, faults, notes and counts, against whole texts that are rendered one by one."""
    tokenizer = toy_tokenizer({**TEMPLATES, "no stop": NO_STOP}[name])
    records = conversations(random.Random(name + train_on), 60, system=name != "llama2")
    quick, reference = (rendered(records, tokenizer, train_on, quick) for quick in (True, False))
    assert len(quick.examples) + len(quick.faults) >= len(records) - 1
    for one, other in zip(quick.examples, reference.examples, strict=True):
        assert one.source == other.source
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.weights.tolist() == other.weights.tolist()
        assert (one.token_ids.dtype, one.weights.dtype) == (np.int32, np.float32)
    assert [str(fault) for fault in quick.faults] == [str(fault) for fault in reference.faults]
    assert quick.examples_per_record == reference.examples_per_record
    assert quick.counts == reference.counts + Counter()
