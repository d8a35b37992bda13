"""A packed row as batches of documents of similar length, padded on the right.

A causal model computes nothing at a token from later tokens, so padding after a document changes nothing in it, in
any architecture: attention of every kind, recurrences, convolutions. No mask is needed. Models that fail on the
packed paths run this way, in a few calls instead of one for each document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LEAST_SHARE = 0.5
"""A document joins a batch if it has at least this share of the longest document's tokens."""


def batches(lengths: Sequence[int], least_share: float = LEAST_SHARE) -> list[list[int]]:
    """Numbers of the documents of each batch, longest first. Documents without tokens are left out."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for index in order:
        if found and lengths[index] >= least_share * lengths[found[-1][0]]:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def run(call: Callable[[Tensor], Tensor], tokens: Tensor, bounds: Sequence[int], least_share: float) -> Tensor:
    """Runs the documents of a row in batches.

    Args:
        call: (documents, length) tokens -> (documents, length, ...) outputs.
        tokens: (T,) int64.
        bounds: starts of the documents and, last, T.
        least_share: see `batches`; 1 runs documents of different length one by one, 0 all together.

    Returns: (T, ...) outputs in the order of the row.
    """
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    outputs, places = [], []
    for batch in batches(lengths, least_share):
        longest = lengths[batch[0]]
        ids = torch.tensor([[bounds[i] + min(t, lengths[i] - 1) for t in range(longest)] for i in batch])
        kept = torch.tensor([t < lengths[i] for i in batch for t in range(longest)])
        result = call(tokens[ids.to(tokens.device)])
        outputs.append(result.flatten(0, 1)[kept.to(tokens.device)])
        places.append(ids.flatten()[kept])
    order = torch.cat(places).argsort().to(tokens.device)
    return torch.cat(outputs)[order]
