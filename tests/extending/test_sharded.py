"""A sharded base needs one `FrozenWeight`: layers, fused layers and stacks reach W through its two products only.

The weight here holds its rows in two shards, as two ranks would, and gathers them for each product. Every gathered
matrix must be freed when its product is done.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from loratune import tables
from loratune.base.forward import fuse, prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import make_row
from loratune.lora.inject import attach
from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.products import MatrixProduct, mm
from loratune.precision.contract import WeightFormat
from loratune.precision.linear import quantise_linears, quantised_layers
from loratune.training.optim import adamw
from loratune.training.step import train_step
from tests.conftest import build
from tests.training.helpers import examples


@dataclass(frozen=True)
class ShardedWeight:
    """Rows of W in shards; gathered when a product begins, freed when it ends."""

    precision: ClassVar[str] = "sharded"
    shards: tuple[Tensor, ...]
    gathered: list[weakref.ref[Tensor]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(shard) for shard in self.shards), self.shards[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    @property
    def device(self) -> torch.device:
        return self.shards[0].device

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        return DenseWeight(self.dense()).forward(x, bias, onto, mm)

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        return DenseWeight(self.dense()).d_input(dy, onto, mm)

    def dense(self) -> Tensor:
        whole = torch.cat(self.shards)
        self.gathered.append(weakref.ref(whole))
        return whole

    def to(self, device: torch.device, dtype: torch.dtype) -> ShardedWeight:
        return ShardedWeight(tuple(shard.to(device, dtype) for shard in self.shards))


class ShardedFormat(WeightFormat):
    name = "sharded"
    label = "sharded"

    def quantise(self, weight: Tensor) -> FrozenWeight:
        return ShardedWeight(tuple(weight.clone().chunk(2)))


def losses(*, sharded: bool, fused: bool) -> list[float]:
    model = build("llama")
    if sharded:
        quantise_linears(model, ShardedFormat().quantise, skip=[model.get_output_embeddings()])
    attach(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), name="default", seed=0)
    forward = prepare(model)
    assert fuse(forward) or not fused
    if not fused:
        forward.fused = None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=3e-3))
    row = make_row(examples(3, seed=0), 144, 0)
    with forward.installed():
        found = [train_step(forward, [row], parameters, optimizer, max_grad_norm=1.0).loss for _ in range(3)]
        weights = [layer.frozen for _, layer in quantised_layers(model)]
        assert len(weights) == (7 * len(model.model.layers) if sharded else 0)
        gc.collect()
        assert all(isinstance(weight, ShardedWeight) and weight.gathered for weight in weights)
        assert not any(reference() is not None for weight in weights for reference in weight.gathered)
    return found


@pytest.mark.parametrize("fused", [True, False])
def test_a_sharded_base_trains_as_a_whole_one_and_gathers_for_a_product_only(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tables.PRECISIONS, "sharded", "tests.extending.test_sharded:ShardedFormat")
    assert losses(sharded=True, fused=fused) == pytest.approx(losses(sharded=False, fused=fused), rel=1e-4)
