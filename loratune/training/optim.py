"""AdamW on the adapter's float32 masters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loratune.config import Optim, TrainConfig
from loratune.ops.adamw import Held, Settings, clipped_adamw
from loratune.ops.host import is_mapped, mapped_zeros
from loratune.training.compact import BLOCK, CompactAdamW

if TYPE_CHECKING:
    from loratune.ops.adamw_kernels import Updates

STATE_BYTES: dict[Optim, float] = {"adamw": 8.0, "adamw_8bit": 2 * (BLOCK + 4) / BLOCK, "adamw_offload": 0.0}
"""Of the GPU's memory, for each trained parameter."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class JointAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, its state included, that clips and updates all parameters as one (`ops.adamw`).

    Its parameters are one group, on one device, contiguous; its rate may be a tensor there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._step_supports_amp_scaling = False  # so that torch's GradScaler divides gradients itself
        # The last is of the tensors that there are now; a recording may still run one before it.
        self._updates: list[Updates] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient. If one is not finite nothing changes."""
        assert closure is None
        (group,) = self.param_groups
        if any(parameter.grad is not None for parameter in group["params"]):
            self.clipped_step(math.inf, torch.zeros(3, device=group["params"][0].device))

    @torch.no_grad()
    def clipped_step(self, max_norm: float, outcome: Tensor) -> None:
        """The same with gradients clipped by global norm, which are left as they are.

        Args:
            outcome: (3,) float32 on the device: loss, read; norm before clipping and 1 if skipped, written.
        """
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        settings = Settings(beta1, beta2, group["eps"], group["weight_decay"])
        known = [p for p in group["params"] if p.grad is not None or self.state.get(p)]
        self._make_states([parameter for parameter in known if not self.state.get(parameter)])
        states = [self.state[parameter] for parameter in known]
        held = Held(known, *([state[name] for state in states] for name in (*_MOMENTS, "step")))
        gradients = [parameter.grad for parameter in known]
        if not outcome.is_cuda:
            clipped_adamw(held, gradients, group["lr"], settings, max_norm, outcome)
            return
        from loratune.ops import adamw_kernels  # imports Triton, which is installed with PyTorch for CUDA only

        if not self._updates or self._updates[-1].addresses != adamw_kernels.addresses(held):
            self._updates.append(adamw_kernels.Updates(held, settings))
        self._updates[-1](gradients, group["lr"], max_norm, outcome)

    def _make_states(self, parameters: list[nn.Parameter]) -> None:
        """Zeros, all in one piece. Made one by one behind a first backward they would lie wherever something had just
        been freed, and the allocator could not give those pages back to a recording."""
        if not parameters:
            return
        sizes, device = [parameter.numel() for parameter in parameters], parameters[0].device
        steps = torch.zeros(len(parameters), device=device)
        moments = torch.zeros(len(_MOMENTS), sum(sizes), dtype=parameters[0].dtype, device=device)
        parts = zip(steps.unbind(), *(moment.split(sizes) for moment in moments), strict=True)
        for parameter, (step, *own) in zip(parameters, parts, strict=True):
            shaped = [part.view_as(parameter) for part in own]
            self.state[parameter] = {"step": step, **dict(zip(_MOMENTS, shaped, strict=True))}


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in few launches; its rate is set by `set_rate` before each step.

    On a GPU the rate is a tensor there, so that a captured update reads the rate of its own step.
    """
    parameters = list(parameters)
    on_gpu = all(parameter.is_cuda for parameter in parameters) and len(parameters) > 0
    joint = on_gpu and all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    kind = JointAdamW if joint else torch.optim.AdamW
    return kind(
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
    for moment in _MOMENTS:
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
