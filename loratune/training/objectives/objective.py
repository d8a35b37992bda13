"""The contract of a training objective: a pure function of log-probabilities and the documents they belong to.

An objective returns *terms*, one number per token, document, pair or group, each with the document it belongs to. The
step sums the terms and divides by the normaliser of the whole optimizer step. So neither the number of micro-steps
nor the division of documents into rows changes the gradient. A bank of adapters assigns each term to the job that
owns its document, so several jobs compute their losses from one shared row.

All shapes depend on the row's layout alone, so that a CUDA graph can replay them. An objective therefore masks with
`torch.where` and never indexes by a condition. Two more rules keep jobs in a shared row independent: a term reads
only documents of one job, and `torch.where` comes before any product or difference with another document, because a
NaN times zero is NaN, in the backward too.

A new objective is one file in this folder and one line in `tables.OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from loratune.data.pack import Row


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The N scored positions of one row. Unused places of a recorded row have weight 0."""

    weights: Tensor
    """(N,) float32: loss weight of the target; 0 for positions that do not train."""
    document: Tensor
    """(N,) int32: number of the document in the row, from 0; `documents` for unused places."""
    documents: int
    """Number of documents in the row, or the layout's upper bound."""
    columns: Mapping[str, Tensor]
    """Name -> (N,) float32: the objective's columns of the row, such as reference log-probabilities."""


class Terms(NamedTuple):
    """Summands of a loss or of a metric."""

    values: Tensor
    """(K,) float32"""
    documents: Tensor
    """(K,) int: the document that each summand belongs to."""


class Objective(Protocol):
    """A loss that training minimises, with its metrics."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `Row` that the objective reads."""

    def normaliser(self, row: Row) -> float:
        """The row's share of the divisor, such as its trained tokens or its pairs. Computed on the host."""

    def terms(self, logprobs: Tensor, batch: TokenBatch) -> Terms:
        """Summands of the loss.

        Args:
            logprobs: (N,) float32, log p(target) at each scored position.
        """

    def metrics(self, logprobs: Tensor, batch: TokenBatch) -> Mapping[str, Terms]:
        """Name -> summands of a metric, which evaluations report divided by the same normaliser."""


def document_sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """Sums (N,) values over each document: (documents,). Documents without a scored position have sum 0."""
    return values.new_zeros(batch.documents + 1).index_add(0, batch.document, values)[:-1]
