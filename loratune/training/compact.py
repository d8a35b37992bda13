"""AdamW whose moments take a quarter of the memory: 8 bits each, in blocks that share a scale.

Float32 moments are eight bytes a trained parameter, as much as its value and gradient together. Block-wise dynamic
quantisation (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861) makes that two:
256 values share a float32 scale, and each is the nearest of 256 values whose spacing grows with magnitude. For the
second moment it is the root that is kept: its range is half as many decades, so that no small but real second moment
becomes zero, which would make its update enormous. A root that is not zero is never stored as zero.

Parameters are taken in parts of a few million values, so that the float32 moments of a part are all that an update
needs beside them. Nothing waits for the device, so that the update can be recorded in a CUDA graph; as PyTorch's
fused AdamW does there, it divides gradients by `grad_scale` and changes nothing where `found_inf` says so.

A block of 256 codes and its scale lie together as 260 bytes, so that a moment is one tensor: a checkpoint saves it as
it is, and a resumed run goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loratune.precision.nf4 import dynamic_book

BLOCK = 256
_SCALE_BYTES = 4
_PART = 1 << 22  # values that are updated at a time

_MOMENTS = ("exp_avg", "exp_avg_sq")  # as PyTorch's AdamW calls them; here the second is held as its root


def root_book(device: torch.device) -> Tensor:
    """256 values from 0 to 1, ascending: seven decades, each with twice as many values as the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1, dtype=torch.float32)
        values += (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encode(values: Tensor, book: Tensor, least: int = 0) -> Tensor:
    """(blocks, 256) float to (blocks, 260) uint8: codes, and the bytes of each block's scale.

    Args:
        least: the lowest code of a value above zero.
    """
    scale = values.abs().amax(1, keepdim=True).float()
    unit = values / scale.clamp(min=1e-38)
    codes = torch.bucketize(unit.float(), (book[:-1] + book[1:]) / 2, out_int32=True)
    codes = codes.maximum((values > 0).int() * least)
    return torch.cat([codes.to(torch.uint8), scale.view(torch.uint8)], 1)


def decode(packed: Tensor, book: Tensor) -> Tensor:
    """(blocks, 260) uint8 to (blocks, 256) float32."""
    scale = packed[:, BLOCK:].contiguous().view(torch.float32)
    return book[packed[:, :BLOCK].int()] * scale


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with moments in 8 bits.

    Args:
        parameters: on one device; those that never get a gradient never get a state.
        rate: a number, or a tensor on the device that an update recorded in a graph reads.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
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
        """One update of everything that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for part in _parts([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(part, group["lr"])

    def _update(self, part: list[nn.Parameter], rate: float | Tensor) -> None:
        states = [self._state(parameter) for parameter in part]
        gradient = _blocks([parameter.grad for parameter in part if parameter.grad is not None])
        old = _blocks(part)
        skip = getattr(self, "found_inf", None)
        divisor = getattr(self, "grad_scale", None)
        if divisor is not None:
            gradient = gradient / divisor
        if skip is not None:
            gradient = torch.where(skip > 0, 0.0, gradient)  # not a number times zero is not zero
        counts = [-(-parameter.numel() // BLOCK) for parameter in part]
        for state in states:
            state["step"] += 1 if skip is None else 1 - skip.squeeze()
        taken = torch.cat([state["step"].expand(count) for state, count in zip(states, counts, strict=True)])
        taken = taken[:, None].to(old.dtype)
        held = [torch.cat([state[name] for state in states]) for name in _MOMENTS]
        books = self._books_on(old.device)
        first, root = (decode(packed, book).to(old.dtype) for packed, book in zip(held, books, strict=True))
        b1, b2 = self._betas
        first = first * b1 + gradient * (1 - b1)
        root = (root.square() * b2 + gradient.square() * (1 - b2)).sqrt()
        denominator = root / (1 - b2**taken).sqrt() + self._eps
        new = old * (1 - rate * self._weight_decay) - rate / (1 - b1**taken) * first / denominator
        kept = [encode(first, books[0]), encode(root, books[1], least=1)]
        if skip is not None:
            new = torch.where(skip > 0, old, new)
            kept = [torch.where(skip > 0, before, after) for before, after in zip(held, kept, strict=True)]
        for name, tensor in zip(_MOMENTS, kept, strict=True):
            _copy_back([state[name] for state in states], tensor, counts)
        _copy_back([parameter.data for parameter in part], new, counts)

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            blocks = -(-parameter.numel() // BLOCK)
            state["step"] = torch.zeros((), device=parameter.device)
            for name, book in zip(_MOMENTS, self._books_on(parameter.device), strict=True):
                state[name] = encode(torch.zeros(blocks, BLOCK, device=parameter.device), book)
        return state

    def _books_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Code books of both moments, copied to a device once: a recorded update cannot copy from the host."""
        if device not in self._books:
            self._books[device] = dynamic_book(device), root_book(device)
        return self._books[device]


def _parts(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in lists of at most `_PART` values where one alone does not have more."""
    part: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if part and size + parameter.numel() > _PART:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.numel()
    if part:
        yield part


def _blocks(tensors: Iterable[Tensor]) -> Tensor:
    """All tensors as (blocks, 256), each beginning a block of its own and filled up with zeros."""
    return torch.cat([pad(t.reshape(-1), (0, -t.numel() % BLOCK)).view(-1, BLOCK) for t in tensors])


def _copy_back(targets: list[Tensor], blocks: Tensor, counts: list[int]) -> None:
    """Blocks back into the tensors that they were made of."""
    for target, piece in zip(targets, blocks.split(counts), strict=True):
        target.copy_(piece.reshape(-1)[: target.numel()].view(target.shape))
