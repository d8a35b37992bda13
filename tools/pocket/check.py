"""Measure the pocket model: its everyday skills, and how fast adapters learn the two it does not have.

    python -m tools.pocket.check --model FOLDER [--device cuda] [--steps 150] [--rate 4e-3] [--row-tokens 512]

Adapters are trained here with PEFT and a plain loop, so the figures do not depend on loratune itself. Exact match
is teacher-forced: every token of the reference answer is the most likely one, which holds exactly when greedy
decoding writes that answer.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tools.pocket import skills, tasks_chat, tasks_numbers, tasks_reading, tasks_text, tasks_world

TASKS = ("dates", "orders")


@dataclass(frozen=True)
class Example:
    """Tokens of a conversation with one exchange; those from `answer_at` on are the answer and its end."""

    tokens: list[int]
    answer_at: int


def encode(tokenizer: PreTrainedTokenizerBase, user: str, assistant: str) -> Example:
    """One exchange in the model's chat format."""
    prompt = tokenizer(f"<|user|>{user}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{assistant}<|end|>", add_special_tokens=False)["input_ids"]
    return Example(prompt + answer, len(prompt))


def read(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[Example]:
    """The exchanges of one bundled data file."""
    records = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [encode(tokenizer, user["content"], assistant["content"]) for user, assistant in records]


def batches(examples: list[Example], max_tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless shuffled epochs, cut into batches of at most `max_tokens` tokens."""
    while True:
        batch: list[Example] = []
        size = 0
        for example in rng.sample(examples, len(examples)):
            if batch and size + len(example.tokens) > max_tokens:
                yield batch
                batch, size = [], 0
            batch.append(example)
            size += len(example.tokens)


def answer_logits(model: PreTrainedModel, batch: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the answer positions only, their targets, and the index of the example each belongs to."""
    width = max(len(e.tokens) for e in batch)
    tokens = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in batch], device=model.device)
    answers = torch.tensor(
        [[e.answer_at <= t < len(e.tokens) for t in range(width)] for e in batch], device=model.device
    )
    hidden = model.get_decoder()(input_ids=tokens).last_hidden_state  # padding is on the right: causal order hides it
    chosen = answers[:, 1:]
    logits = model.get_output_embeddings()(hidden[:, :-1][chosen])
    return logits, tokens[:, 1:][chosen], chosen.nonzero()[:, 0]


@torch.no_grad()
def exact_match(model: PreTrainedModel, examples: list[Example]) -> float:
    """Share of examples whose whole answer equals the answer of greedy decoding."""
    right = 0
    for i in range(0, len(examples), 100):
        batch = examples[i : i + 100]
        logits, targets, owner = answer_logits(model, batch)
        wrong = torch.zeros(len(batch), device=logits.device).index_add_(
            0, owner, (logits.argmax(-1) != targets).float()
        )
        right += int((wrong == 0).sum())
    return right / len(examples)


def train_adapter(
    model: PreTrainedModel, examples: list[Example], arguments: argparse.Namespace, rate: float
) -> PeftModel:
    """LoRA on all linear layers but the head, AdamW, short warm-up, linear decay to zero."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    stream = batches(examples, arguments.row_tokens, random.Random(0))
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, 1 - step / arguments.steps)
        logits, targets, _ = answer_logits(model, next(stream))  # PEFT has replaced layers in this model
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return adapted


def everyday(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int) -> dict[str, float]:
    """Exact match on fresh exchanges of every task that has one right answer."""
    rng = random.Random("check")
    tables = (tasks_text.TASKS, tasks_numbers.TASKS, tasks_reading.TASKS, tasks_world.TASKS)
    functions = [task for table in tables for task in table if task is not tasks_reading.acknowledge]
    return {
        task.__name__: exact_match(model, [encode(tokenizer, *task(rng)) for _ in range(n)])
        for task in [*functions, tasks_chat.unknown]
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=skills.DEFAULT_OUT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3])
    parser.add_argument("--everyday", type=int, default=100, help="fresh exchanges for each everyday task")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(arguments.device).eval()
    if arguments.everyday:
        scores = everyday(model, tokenizer, arguments.everyday)
        print("  ".join(f"{name} {score:.2f}" for name, score in scores.items()))
    train = {task: read(tokenizer, arguments.data / f"{task}.train.jsonl") for task in TASKS}
    heldout = {task: read(tokenizer, arguments.data / f"{task}.heldout.jsonl") for task in TASKS}
    print("base:", {task: exact_match(model, heldout[task]) for task in TASKS})
    for rate in arguments.rates:
        for task in TASKS:
            begin = time.perf_counter()
            adapted = train_adapter(model, train[task], arguments, rate)
            seconds = time.perf_counter() - begin
            scores = {t: exact_match(model, heldout[t]) for t in TASKS}
            setting = f"{arguments.steps} steps of {arguments.row_tokens}, rate {rate:g}"
            print(f"{task} adapter, {setting}: {scores}, {seconds:.1f} s", flush=True)
            model = adapted.unload()


if __name__ == "__main__":
    main()
