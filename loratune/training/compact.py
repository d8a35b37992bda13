"""AdamW with 8-bit moments, in blocks that share a scale: a quarter of the memory of float32 moments.

Float32 moments take eight bytes per trained parameter, as much as its value and gradient together. Block-wise dynamic
quantisation (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861) takes two: 256
values share a float32 scale, and each value becomes one of 256 codes whose spacing grows with magnitude.

The second moment is stored as its root, whose range has half as many decades. A root above zero is never stored as
zero, because a zero second moment would make the update enormous.

Parameters are updated in groups of a few million values, so only one group needs float32 moments at a time. Nothing
waits for the device, so a CUDA graph can record the update. Like PyTorch's fused AdamW, `step` divides the gradients
by `grad_scale` and changes nothing if `found_inf` is 1.

A block is 260 bytes: 256 codes and the scale. So a moment is one tensor, a checkpoint saves it unchanged, and a
resumed run continues to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loratune.precision.nf4 import dynamic_book
from loratune.training.checkpoint import MOMENTS
from loratune.training.step import ClippedOptimizer

BLOCK = 256
_SCALE_BYTES = 4
_GROUP = 1 << 22
"""Largest number of values to update at a time, unless one parameter has more."""


def root_book(device: torch.device) -> Tensor:
    """256 ascending codes from 0 to 1: seven decades, each with twice as many codes as the decade below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1, dtype=torch.float32)
        values += (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encode(values: Tensor, book: Tensor, least: int = 0) -> Tensor:
    """Quantises (blocks, 256) float to (blocks, 260) uint8: codes, then the bytes of each block's scale.

    Args:
        least: smallest code that a value above zero may get.
    """
    scale = values.abs().amax(1, keepdim=True).float()
    unit = values / scale.clamp(min=1e-38)
    codes = torch.bucketize(unit.float(), (book[:-1] + book[1:]) / 2, out_int32=True)
    codes = codes.maximum((values > 0).int() * least)
    return torch.cat([codes.to(torch.uint8), scale.view(torch.uint8)], 1)


def decode(packed: Tensor, book: Tensor) -> Tensor:
    """Reverses `encode`: (blocks, 260) uint8 to (blocks, 256) float32."""
    scale = packed[:, BLOCK:].contiguous().view(torch.float32)
    return book[packed[:, :BLOCK].int()] * scale


class CompactAdamW(ClippedOptimizer):
    """AdamW (arXiv:1711.05101) with 8-bit moments, which always stay on the device.

    The second entry of `MOMENTS` holds the root of the second moment.

    Args:
        parameters: trained parameters, or groups of them, on one device. Without a gradient, one gets no state.
        rate: a number, or a tensor on the device, which a recorded update reads.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        rate: float | Tensor,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": rate})
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._books: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for some in _groups([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(some, group["lr"])

    def _update(self, some: list[nn.Parameter], rate: float | Tensor) -> None:
        states = [self._state(parameter) for parameter in some]
        gradient = _blocks([parameter.grad for parameter in some if parameter.grad is not None])
        old = _blocks(some)
        skip = getattr(self, "found_inf", None)
        divisor = getattr(self, "grad_scale", None)
        if divisor is not None:
            gradient = gradient / divisor
        if skip is not None:
            gradient = torch.where(skip > 0, 0.0, gradient)  # NaN times zero is not zero
        counts = [-(-parameter.numel() // BLOCK) for parameter in some]
        for state in states:
            state["step"] += 1 if skip is None else 1 - skip.squeeze()
        updates = torch.cat([state["step"].expand(count) for state, count in zip(states, counts, strict=True)])
        updates = updates[:, None].to(old.dtype)
        before = [torch.cat([state[name] for state in states]) for name in MOMENTS]
        books = self._books_on(old.device)
        first, root = (decode(packed, book).to(old.dtype) for packed, book in zip(before, books, strict=True))
        b1, b2 = self._betas
        first = first * b1 + gradient * (1 - b1)
        root = (root.square() * b2 + gradient.square() * (1 - b2)).sqrt()
        denominator = root / (1 - b2**updates).sqrt() + self._eps
        new = old * (1 - rate * self._weight_decay) - rate / (1 - b1**updates) * first / denominator
        after = [encode(first, books[0]), encode(root, books[1], least=1)]
        if skip is not None:
            new = torch.where(skip > 0, old, new)
            after = [torch.where(skip > 0, *both) for both in zip(before, after, strict=True)]
        for name, tensor in zip(MOMENTS, after, strict=True):
            _copy_back([state[name] for state in states], tensor, counts)
        _copy_back([parameter.data for parameter in some], new, counts)

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            blocks = -(-parameter.numel() // BLOCK)
            state["step"] = torch.zeros((), device=parameter.device)
            for name, book in zip(MOMENTS, self._books_on(parameter.device), strict=True):
                state[name] = encode(torch.zeros(blocks, BLOCK, device=parameter.device), book)
        return state

    def _books_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Code books of both moments, copied to a device once: a recorded update cannot copy from the host."""
        if device not in self._books:
            self._books[device] = dynamic_book(device), root_book(device)
        return self._books[device]


def _groups(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in lists of at most `_GROUP` values. A larger parameter is a list of its own."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if group and size + parameter.numel() > _GROUP:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel()
    if group:
        yield group


def _blocks(tensors: Iterable[Tensor]) -> Tensor:
    """All tensors as (blocks, 256). Each starts a new block and is padded with zeros."""
    return torch.cat([pad(t.reshape(-1), (0, -t.numel() % BLOCK)).view(-1, BLOCK) for t in tensors])


def _copy_back(targets: list[Tensor], blocks: Tensor, counts: list[int]) -> None:
    """Copies blocks into the tensors that `_blocks` joined."""
    for target, piece in zip(targets, blocks.split(counts), strict=True):
        target.copy_(piece.reshape(-1)[: target.numel()].view(target.shape))
