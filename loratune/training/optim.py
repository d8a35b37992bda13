"""AdamW on the adapter's float32 masters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loratune.config import Optim, TrainConfig
from loratune.ops.host import is_mapped, mapped_zeros
from loratune.training.compact import BLOCK, CompactAdamW

STATE_BYTES: dict[Optim, float] = {"adamw": 8.0, "adamw_8bit": 2 * (BLOCK + 4) / BLOCK, "adamw_offload": 0.0}
"""Of the GPU's memory, for each trained parameter."""


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in its fused form; its rate is set by `set_rate` before each step.

    On a GPU the rate is a tensor there, so that a captured update reads the rate of its own step.
    """
    parameters = list(parameters)
    on_gpu = all(parameter.is_cuda for parameter in parameters) and len(parameters) > 0
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(config.rate, device=parameters[0].device) if on_gpu else config.rate,
        capturable=on_gpu,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def optimizer_of(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as `config.optim` has it; where its moments lie is chosen by `moments_on_host`."""
    parameters = list(parameters)
    if config.optim != "adamw_8bit":
        return adamw(parameters, config)
    on_gpu = bool(parameters) and all(parameter.is_cuda for parameter in parameters)
    rate = torch.tensor(config.rate, device=parameters[0].device) if on_gpu else config.rate
    return CompactAdamW(
        parameters,
        rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def masters_on_host(parameters: Iterable[nn.Parameter]) -> None:
    """Moves float32 masters on a GPU to host memory that the GPU reads and writes where it is."""
    parameters = list(parameters)
    if parameters and all(parameter.is_cuda for parameter in parameters):
        for parameter, there in zip(parameters, _mapped(parameters, copy=True), strict=True):
            parameter.data = there


def masters_on_device(parameters: Iterable[nn.Parameter]) -> None:
    """Moves masters that `masters_on_host` has moved back."""
    for parameter in parameters:
        if is_mapped(parameter):
            parameter.data = parameter.data.clone()


def moments_on_host(optimizer: torch.optim.Optimizer) -> None:
    """The same for AdamW's moments: those that it has, and zeros for those that it would make at the first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, CompactAdamW):  # a quarter of the bytes, which stay where they are
        return
    if not parameters or not all(parameter.is_cuda for parameter in parameters):
        return
    for moment in ("exp_avg", "exp_avg_sq"):
        fresh = _mapped(parameters, copy=False)
        for parameter, there in zip(parameters, fresh, strict=True):
            state = optimizer.state[parameter]
            if moment in state:
                there.copy_(state[moment])
            state.setdefault("step", torch.zeros((), device=parameter.device))
            state[moment] = there


def never_updated(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """True if no step has reached the parameter; waits for the device where moments were made in advance."""
    state = optimizer.state.get(parameter)
    return not state or not float(state["step"])


def _mapped(parameters: list[nn.Parameter], *, copy: bool) -> list[Tensor]:
    """One tensor in host memory for each parameter, with its values or zeros, all in one piece."""
    flat = mapped_zeros(sum(p.numel() for p in parameters), parameters[0].device)
    parts = [
        part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
    ]
    if copy:
        torch._foreach_copy_(parts, [parameter.detach() for parameter in parameters])
    return parts


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
        return config.rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match config.lr_scheduler_type:
        case "cosine":
            return config.rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return config.rate * (1 - progress)
        case "constant":
            return config.rate
