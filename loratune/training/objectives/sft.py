"""Objectives: small pure functions of the log-probabilities that a model gives to tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""(log-probabilities (N,), weights (N,)) -> the sum, over tokens, of what is to be minimised."""


def sft(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Supervised fine-tuning: the weighted negative log-likelihood, summed (not averaged) over tokens.

    The step divides by the trained tokens of the whole optimizer step, so that neither the number of micro-steps
    nor the way documents fell into rows changes the gradient.
    """
    return -(weights * logprobs).sum()
