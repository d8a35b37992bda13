"""Synthetic examples and rows for tests of the training loop."""

from __future__ import annotations

import numpy as np
import torch

from loratune.config import LoraConfig, TrainConfig
from loratune.data.examples import Example
from loratune.data.feed import rows_of_epoch
from loratune.lora.inject import attach
from loratune.training.course import Rows
from loratune.training.objectives.objective import Terms
from loratune.training.objectives.sft import SupervisedFineTuning
from loratune.training.step import row_loss
from tests.conftest import build


def examples(count: int, seed: int = 0, vocabulary: int = 300) -> list[Example]:
    """Documents of very different lengths, each a repeating pattern (so that there is something to learn)."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(rng.choice([3, 7, 18, 47]))
        pattern = rng.integers(3, vocabulary, size=2)
        tokens = np.resize(pattern, length).astype(np.int32)
        weights = np.ones(length, dtype=np.float32)
        weights[: max(1, length // 3)] = 0.0  # a prompt
        made.append(Example(tokens, weights, f"synthetic:{index + 1}"))
    return made


def rows(train: list[Example], held_out: list[Example], tokens_per_row: int = 64, seed: int = 0) -> Rows:
    """Packed rows of training and held-out examples."""
    return Rows(
        lambda epoch: rows_of_epoch(train, tokens_per_row, 0, seed=seed, epoch=epoch),
        rows_of_epoch(held_out, tokens_per_row, 0, seed=0, epoch=0) if held_out else [],
    )


def model_with_adapter(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **lora):
    """A small model with an adapter whose B is not zero, so that every gradient flows."""
    model = build(name, seed, dtype)
    attach(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)), name="default", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if path.endswith("lora_B"):
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """Path -> trained Parameter."""
    return {path: p for path, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model, forward, row) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The loss of one row and the gradients of all trained parameters, which are then removed from the model."""
    with forward.installed():
        loss = row_loss(forward, row)
        loss.backward()
    found = {path: p.grad for path, p in trainable(model).items()}
    for p in model.parameters():
        p.grad = None
    return loss.detach(), found


class NaN(SupervisedFineTuning):
    """An objective whose loss and gradient are NaN."""

    def terms(self, logprobs, batch):
        return Terms(logprobs * float("nan"), batch.document)


def config(**settings) -> TrainConfig:
    """Settings of a short run."""
    return TrainConfig(**({"learning_rate": 5e-3, "max_steps": 12, "warmup_ratio": 0.1} | settings))
