"""Supervised fine-tuning: the weighted negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loratune.data.pack import Row
from loratune.training.objectives.objective import Terms, TokenBatch


@dataclass(frozen=True, slots=True)
class SupervisedFineTuning:
    """Loss = -sum of weight x log p(target), over the summed weight of the optimizer step."""

    columns: tuple[str, ...] = ()

    def normaliser(self, row: Row) -> float:
        """Summed weight of the row's trained tokens."""
        return float(row.weights.sum())

    def terms(self, logprobs: Tensor, batch: TokenBatch) -> Terms:
        """One term per token."""
        return Terms(-(batch.weights * logprobs), batch.document)

    def metrics(self, logprobs: Tensor, batch: TokenBatch) -> Mapping[str, Terms]:
        """No metrics: the loss is the only measure."""
        return {}


sft = SupervisedFineTuning()
