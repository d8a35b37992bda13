"""AdamW on the adapter's float32 masters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loratune.config import TrainConfig


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in its fused form; its rate is set by `set_rate` before each step.

    On a GPU the rate is a tensor there, so that a captured update reads the rate of its own step.
    """
    parameters = list(parameters)
    on_gpu = all(parameter.is_cuda for parameter in parameters) and len(parameters) > 0
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(config.learning_rate, device=parameters[0].device) if on_gpu else config.learning_rate,
        capturable=on_gpu,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next update."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Rises linearly over the warm-up so that its last step has the full rate (and the first one is not wasted at
    zero), then falls to zero one step after the end along a cosine or a line, or stays.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match config.lr_scheduler_type:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return config.learning_rate * (1 - progress)
        case "constant":
            return config.learning_rate
