"""The model in the box, N times side by side: one run a rate, all on the same batches, as one computation.

A run of a 5 M parameter model keeps a GPU busy for microseconds at a time, so the runs of a sweep are stacked: a
product with a weight that is trained becomes a batched product, one that is frozen is shared. Runs never meet: each
has its own parameters, loss, Adam state and rate. Full tuning stacks every weight, LoRA only A and B, both through
the same code, so that a comparison of the two compares nothing else. With LoRA the stack computes the
same as `loratune.attach`; `check.py` measures that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu
from transformers import PreTrainedModel

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Kind:
    """The trained tensors: all weights (rank 0), or A and B of some layers."""

    rank: int
    modules: tuple[str, ...] = ATTENTION + MLP
    alpha: float = 32.0


@dataclass(frozen=True)
class Batches:
    """Documents padded at the end to one length, and which of their positions predict a trained token."""

    ids: Tensor  # (documents, L)
    targets: Tensor  # (documents, L): the next token
    weights: Tensor  # (documents, L): 1 where that is trained on

    def to(self, device: torch.device) -> Batches:
        """This batch on `device`."""
        return Batches(self.ids.to(device), self.targets.to(device), self.weights.to(device))

    def capacity(self, documents: int) -> int:
        """Largest number of trained tokens in a batch of `documents` documents."""
        return int(self.weights.sum(1).topk(documents).values.sum())

    def pick(self, order: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One batch: ids (B, L), and positions, targets and weights of its trained tokens, padded to one size."""
        weights = self.weights[order]
        positions = weights.flatten().sort(descending=True, stable=True).indices[:capacity]
        return self.ids[order], positions, self.targets[order].flatten()[positions], weights.flatten()[positions]


class Stack:
    """N runs of one kind.

    `ranks` gives each run a rank of at most `kind.rank`. Columns beyond a run's rank are zero in A and B, so their
    gradients are zero too and they stay zero.
    """

    def __init__(
        self, model: PreTrainedModel, kind: Kind, runs: int, seed: int, ranks: Sequence[int] | None = None
    ) -> None:
        self.kind, self.runs, self.config = kind, runs, model.config
        self.ranks = list(ranks or [kind.rank] * runs)
        self.base = {name: p.detach().float() for name, p in model.named_parameters()}
        device = next(iter(self.base.values())).device
        generator = torch.Generator().manual_seed(seed)
        started = self._full_start() if kind.rank == 0 else self._lora_start(generator)
        self.names, self.shapes = list(started), [tensor.shape for tensor in started.values()]
        flat = torch.cat([tensor.flatten() for tensor in started.values()]).to(device)
        self.flat = flat.repeat(runs, 1)  # (N, parameters of one run)
        for name, tensor in self._tensors().items():
            for run, rank in enumerate(self.ranks):
                if name.endswith(".A"):
                    tensor[run, rank:] = 0
        self.flat.requires_grad_(True)
        self.scaling = kind.alpha / torch.tensor([max(1, rank) for rank in self.ranks], device=device)[:, None, None]
        self.positions = torch.arange(4096, device=device)

    def _full_start(self) -> dict[str, Tensor]:
        return self.base

    def _lora_start(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A Kaiming-uniform, B zero, as `loratune.attach`."""
        started = {}
        for layer in range(self.config.num_hidden_layers):
            for module in self.kind.modules:
                path = f"model.layers.{layer}.{module}"
                d_out, d_in = self.base[f"{path}.weight"].shape
                A = torch.rand(self.kind.rank, d_in, generator=generator) * 2 - 1
                started[f"{path}.A"] = A / math.sqrt(d_in)
                started[f"{path}.B"] = torch.zeros(d_out, self.kind.rank)
        return started

    def _tensors(self) -> dict[str, Tensor]:
        """Name -> (N, *shape), views of the flat parameters."""
        parts = self.flat.split([shape.numel() for shape in self.shapes], dim=1)
        return {n: p.view(self.runs, *s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def losses(self, ids: Tensor, positions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """(N,): mean over the trained tokens of each run. ids (B, L); the others (K,)."""
        trained = self._tensors()
        hidden = self._decoder(trained, ids).flatten(1, 2)[:, positions]  # (N, K, d)
        logits = self._product(trained, "model.embed_tokens", hidden, tied=True)
        picked = logits.gather(2, targets.expand(self.runs, -1)[..., None])[..., 0]
        return ((logits.logsumexp(2) - picked) * weights).sum(1) / weights.sum()

    def _decoder(self, trained: dict[str, Tensor], ids: Tensor) -> Tensor:
        """(B, L) -> (N, B, L, d)."""
        c, (batch, length) = self.config, ids.shape
        table = trained.get("model.embed_tokens.weight")
        if table is None:
            x = embedding(ids, self.base["model.embed_tokens.weight"]).expand(self.runs, -1, -1, -1)
        else:
            x = table[:, ids.flatten()].view(self.runs, batch, length, -1)
        cos, sin = self._rotation(length)
        for layer in range(c.num_hidden_layers):
            path = f"model.layers.{layer}."
            h = self._norm(trained, path + "input_layernorm", x)
            q, k, v = (
                self._product(trained, f"{path}self_attn.{name}", h).view(self.runs * batch, length, -1, c.head_dim)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            repeats = c.num_attention_heads // c.num_key_value_heads
            k, v = (t.repeat_interleave(repeats, 1) for t in (_rotated(k, cos, sin), v))
            attended = scaled_dot_product_attention(_rotated(q, cos, sin), k, v, is_causal=True)
            attended = attended.transpose(1, 2).reshape(self.runs, batch, length, -1)
            x = x + self._product(trained, path + "self_attn.o_proj", attended)
            h = self._norm(trained, path + "post_attention_layernorm", x)
            gate, up = (self._product(trained, f"{path}mlp.{name}", h) for name in ("gate_proj", "up_proj"))
            x = x + self._product(trained, path + "mlp.down_proj", silu(gate) * up)
        return self._norm(trained, "model.norm", x)

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        rates = theta ** (-torch.arange(0, dim, 2, device=self.flat.device) / dim)
        angles = (self.positions[:length, None] * rates).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _norm(self, trained: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
        weight = trained.get(path + ".weight")
        weight = self.base[path + ".weight"] if weight is None else weight.view(self.runs, 1, 1, -1)
        return rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps) * weight

    def _product(self, trained: dict[str, Tensor], path: str, x: Tensor, tied: bool = False) -> Tensor:
        """(N, ..., d_in) -> (N, ..., d_out)."""
        rows = x.flatten(1, -2)
        weight = trained.get(path + ".weight")
        if weight is not None:
            out = torch.bmm(rows, weight.transpose(1, 2))
        else:
            out = rows @ self.base[path + ".weight"].T
            if path + ".A" in trained:
                inner = torch.bmm(rows, trained[path + ".A"].transpose(1, 2))
                B = trained[path + ".B"].transpose(1, 2)
                out = torch.baddbmm(out, inner * self.scaling, B)
        return out.view(*x.shape[:-1], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class Training:
    """Adam on a stack, a rate for each run, constant over the run; on a GPU the whole step is one CUDA graph."""

    def __init__(self, stack: Stack, rates: list[float], batches: Batches, order: Tensor) -> None:
        flat = stack.flat
        self.stack, self.batches, self.order = stack, batches, order.to(flat.device)
        self.rates = torch.tensor(rates, device=flat.device)[:, None]
        self.m, self.v = torch.zeros_like(flat), torch.zeros_like(flat)
        self.step_number = torch.zeros((), device=flat.device)
        self.capacity = batches.capacity(order.shape[1])
        self.now = batches.pick(self.order[0], self.capacity)
        self.losses = torch.zeros(stack.runs, device=flat.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, beta1: float = 0.9, beta2: float = 0.999) -> Tensor:
        """Trains over all of `order` (steps, B). Returns: losses (steps, N), on the CPU."""
        seen = []
        start = self.stack.flat.detach().clone()
        for index, picked in enumerate(self.order):
            for mine, given in zip(self.now, self.batches.pick(picked, self.capacity), strict=True):
                mine.copy_(given)
            if self.stack.flat.is_cuda and index == 0:
                self._record(start, beta1, beta2)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(beta1, beta2)
            seen.append(self.losses.clone())
        return torch.stack(seen).cpu()

    def _step(self, beta1: float, beta2: float) -> None:
        flat = self.stack.flat
        losses = self.stack.losses(*self.now)
        (gradient,) = torch.autograd.grad(losses.sum(), flat)
        with torch.no_grad():
            self.losses.copy_(losses)
            self.step_number += 1
            self.m.lerp_(gradient, 1 - beta1)
            self.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            rate = self.rates / (1 - beta1**self.step_number)
            root = (self.v / (1 - beta2**self.step_number)).sqrt_().add_(1e-8)
            flat.sub_(self.m * rate / root)

    def _record(self, start: Tensor, beta1: float, beta2: float) -> None:
        """Records a step after a warm-up and restores the state from before it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(beta1, beta2)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(beta1, beta2)
        with torch.no_grad():
            self.stack.flat.copy_(start)
            for tensor in (self.m, self.v, self.step_number):
                tensor.zero_()


@torch.no_grad()
def held_out(stack: Stack, batches: Batches, size: int = 100) -> Tensor:
    """(N,): mean loss over the trained tokens of all documents, on the CPU."""
    total, weight = torch.zeros(stack.runs, device=stack.flat.device), 0.0
    for start in range(0, len(batches.ids), size):
        some = torch.arange(start, min(start + size, len(batches.ids)), device=stack.flat.device)
        picked = batches.pick(some, batches.capacity(len(some)))
        total += stack.losses(*picked) * picked[3].sum()
        weight += float(picked[3].sum())
    return (total / weight).cpu()
