"""Train the tokenizer: byte-level BPE, 4,096 tokens, every digit its own token, six special tokens, no unknowns.

The chat format spends two tokens a turn: `<|user|>text<|end|><|assistant|>text<|end|>`. Earlier turns are written
the same whatever comes later, so a packed or cached conversation is exact. Plain text is `<|begin|>text<|end|>`.

    python -m tools.pocket.tokenizer --out FOLDER
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.pocket import library
from tools.pocket.grammar import Turn
from tools.pocket.tasks_chat import conversation

VOCABULARY = 4096
CONTEXT = 1024
PAD, BEGIN, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip

CHAT_TEMPLATE = """{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('roles are system, user and assistant, not ' + message.role) }}
{%- endif %}
{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def chat_text(turns: list[Turn]) -> str:
    """A conversation in the template's format, without jinja, which would be too slow for millions of them."""
    return "".join(f"<|{role}|>{content}{END}" for role, content in turns)


def training_texts(n_conversations: int, seed: int) -> Iterator[str]:
    """Generated chats and a share of the library, without special tokens."""
    rng = random.Random(seed)
    for _ in range(n_conversations):
        for _, content in conversation(rng):
            yield content
    yield from library.documents(seed)[:2500]


def train(n_conversations: int = 80_000, seed: int = 0) -> Tokenizer:
    """Learn the merges; the byte alphabet is always in, so any text can be written and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(n_conversations, seed), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template as transformers reads them."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    save(train(), parser.parse_args().out)
