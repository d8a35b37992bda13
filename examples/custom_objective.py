"""A custom objective: rank the right answer above a wrong one, by the margin of their log-probabilities.

    python examples/custom_objective.py [--steps 20]

Two neighbouring documents of a row are a pair: the same question with the right and with a wrong answer. The
objective sees the log-probability of every trained token and the document it belongs to."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import loratune as lt
from loratune.base.forward import prepare
from loratune.box import data_file
from loratune.config import TrainConfig
from loratune.data.examples import Example
from loratune.data.pack import Row, make_row
from loratune.data.records import read_records
from loratune.data.render import render
from loratune.training.objectives.objective import Terms, TokenBatch, document_sums
from loratune.training.optim import adamw, set_rate
from loratune.training.step import train_step


@dataclass(frozen=True)
class Margin:
    """-log sigmoid(beta (right - wrong)), where each is a document's summed log-probability."""

    beta: float = 0.1
    columns: tuple[str, ...] = ()

    def normaliser(self, row: Row) -> float:
        """Number of pairs."""
        return float((len(row.cu_seqlens) - 1) // 2)

    def terms(self, logprobs: Tensor, batch: TokenBatch) -> Terms:
        """One term per pair, which belongs to the pair's first document."""
        margin = self._margins(logprobs, batch)
        return Terms(-logsigmoid(self.beta * margin), 2 * torch.arange(len(margin), device=margin.device))

    def metrics(self, logprobs: Tensor, batch: TokenBatch) -> Mapping[str, Terms]:
        """Share of pairs in the right order."""
        margin = self._margins(logprobs, batch)
        return {"accuracy": Terms((margin > 0).float(), 2 * torch.arange(len(margin), device=margin.device))}

    def _margins(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        sums = document_sums(batch.weights * logprobs, batch)
        pairs = len(sums) // 2
        return sums[: 2 * pairs : 2] - sums[1 : 2 * pairs : 2]


def main() -> None:
    """Trains on pairs and prints loss by loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    model, tokenizer = lt.load("loratune/pocket"), lt.load_tokenizer("loratune/pocket")
    lt.attach(model, lt.LoraConfig(r=8))
    records = read_records([str(data_file("dates", "train"))], "auto")[:64]
    stop_ids = frozenset({tokenizer.eos_token_id})
    examples = render(records, tokenizer, lt.DataConfig(), max_tokens=200, stop_ids=stop_ids).examples
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    set_rate(optimizer, 1e-3)
    forward = prepare(model)
    with forward.installed():
        for step in range(given.steps):
            first = 4 * step % (len(examples) - 4)
            row = pairs_of(examples[first : first + 5])
            done = train_step(forward, [row], parameters, optimizer, max_grad_norm=1.0, objective=Margin())
            print(f"step {step + 1:>2}  loss {done.loss:.4f}")


def pairs_of(examples: list[Example]) -> Row:
    """A row of pairs: each example, and its prompt with the answer of the next example."""
    documents = []
    for right, other in itertools.pairwise(examples):
        prompt, answer = int(right.weights.argmax()), int(other.weights.argmax())
        tokens = torch.cat([torch.as_tensor(right.token_ids[:prompt]), torch.as_tensor(other.token_ids[answer:])])
        weights = torch.cat([torch.as_tensor(right.weights[:prompt]), torch.as_tensor(other.weights[answer:])])
        documents += [right, Example(tokens.numpy(), weights.numpy(), "wrong answer")]
    return make_row(documents, 1024, 0)


if __name__ == "__main__":
    main()
