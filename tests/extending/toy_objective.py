"""A toy pairwise objective: -log σ(β (s_chosen - s_rejected)), where s is a document's summed log-probability.

A pair is two neighbouring documents. The column "side" is 1 on the tokens of the chosen one and -1 on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from loratune.data.pack import Row
from loratune.training.objectives.objective import Terms, TokenBatch, document_sums


@dataclass(frozen=True)
class Pairs:
    beta: float = 0.1
    columns: tuple[str, ...] = ("side",)

    def normaliser(self, row: Row) -> float:
        """Number of pairs."""
        return float((row.columns["side"][row.cu_seqlens[:-1].long()] > 0).sum())

    def terms(self, logprobs: Tensor, batch: TokenBatch) -> Terms:
        chosen, margin = self._margins(logprobs, batch)
        return Terms(torch.where(chosen, -logsigmoid(self.beta * margin), 0.0), _all_documents(margin))

    def metrics(self, logprobs: Tensor, batch: TokenBatch) -> Mapping[str, Terms]:
        chosen, margin = self._margins(logprobs, batch)
        return {"accuracy": Terms((chosen & (margin > 0)).float(), _all_documents(margin))}

    def _margins(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        sums = document_sums(batch.weights * logprobs, batch)
        chosen = document_sums(batch.columns["side"], batch) > 0
        return chosen, torch.where(chosen, sums, 0.0) - torch.where(chosen, sums.roll(-1), 0.0)


def _all_documents(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device)


pairs = Pairs()
