"""AdamW on the adapter's float32 masters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loratune.config import Optim, TrainConfig
from loratune.ops.adamw import AdamWSettings, AdamWState, clipped_adamw
from loratune.ops.host import is_mapped, mapped_zeros
from loratune.training.checkpoint import MOMENTS
from loratune.training.compact import BLOCK, CompactAdamW
from loratune.training.step import ClippedOptimizer

if TYPE_CHECKING:
    from loratune.ops.adamw_kernels import ClippedAdamWLaunches

STATE_BYTES: dict[Optim, float] = {"adamw": 8.0, "adamw_8bit": 2 * (BLOCK + 4) / BLOCK, "adamw_offload": 0.0}
"""GPU memory of the optimizer's state, bytes per trained parameter."""


class FusedAdamW(ClippedOptimizer, torch.optim.AdamW):
    """PyTorch's fused AdamW (arXiv:1711.05101)."""

    def move_moments_to_host(self) -> None:
        """Moves float32 moments on a GPU to mapped host memory; missing moments start as zeros there."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not parameters or not all(parameter.is_cuda for parameter in parameters):
            return
        for moment in MOMENTS:
            for parameter, on_host in zip(parameters, _mapped(parameters, copy=False), strict=True):
                state = self.state[parameter]
                if moment in state:
                    on_host.copy_(state[moment])
                state.setdefault("step", torch.zeros((), device=parameter.device))
                state[moment] = on_host


class JointAdamW(FusedAdamW):
    """AdamW that clips and updates all parameters in three kernel launches (`ops.adamw`), with PyTorch's state.

    The parameters form one group, on one device, and are contiguous. The rate may be a tensor on that device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._step_supports_amp_scaling = False  # torch's GradScaler then divides the gradients itself
        # The last entry is for the current tensors. A recording may still run an earlier one.
        self._updates: list[ClippedAdamWLaunches] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient. If a gradient is not finite, nothing changes."""
        assert closure is None
        (group,) = self.param_groups
        if any(parameter.grad is not None for parameter in group["params"]):
            self.clipped_step(math.inf, torch.zeros(3, device=group["params"][0].device))

    @torch.no_grad()
    def clipped_step(self, max_norm: float, outcome: Tensor) -> None:
        """See `training.step.StepOptimizer`. Gradients are not changed."""
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        settings = AdamWSettings(beta1, beta2, group["eps"], group["weight_decay"])
        known = [p for p in group["params"] if p.grad is not None or self.state.get(p)]
        self._make_states([parameter for parameter in known if not self.state.get(parameter)])
        states = [self.state[parameter] for parameter in known]
        held = AdamWState(known, *([state[name] for state in states] for name in (*MOMENTS, "step")))
        gradients = [parameter.grad for parameter in known]
        if not outcome.is_cuda:
            clipped_adamw(held, gradients, group["lr"], settings, max_norm, outcome)
            return
        from loratune.ops import adamw_kernels  # imports Triton, which is installed with PyTorch for CUDA only

        if not self._updates or self._updates[-1].addresses != adamw_kernels.addresses(held):
            self._updates.append(adamw_kernels.ClippedAdamWLaunches(held, settings))
        self._updates[-1](gradients, group["lr"], max_norm, outcome)

    def _make_states(self, parameters: list[nn.Parameter]) -> None:
        """Creates zero moments as slices of one tensor.

        Separate tensors, created after the first backward, would be scattered over memory that was just freed. The
        allocator could then not return those pages to a recording.
        """
        if not parameters:
            return
        sizes, device = [parameter.numel() for parameter in parameters], parameters[0].device
        steps = torch.zeros(len(parameters), device=device)
        moments = torch.zeros(len(MOMENTS), sum(sizes), dtype=parameters[0].dtype, device=device)
        slices = zip(steps.unbind(), *(moment.split(sizes) for moment in moments), strict=True)
        for parameter, (step, *own) in zip(parameters, slices, strict=True):
            shaped = [flat.view_as(parameter) for flat in own]
            self.state[parameter] = {"step": step, **dict(zip(MOMENTS, shaped, strict=True))}


def adamw(
    parameters: Iterable[nn.Parameter], config: TrainConfig, faster: Collection[nn.Parameter] = ()
) -> FusedAdamW:
    """AdamW with float32 moments; `set_rate` sets its rate before each step.

    For parameters on a GPU the rate is a tensor on that GPU, so that a recorded update reads the rate of its own
    step. `faster` is as in `optimizer_of`.
    """
    parameters = list(parameters)
    groups = _groups(parameters, config, faster)
    on_gpu = _all_on_gpu(parameters)
    one_launch = len(groups) == 1 and all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return (JointAdamW if on_gpu and one_launch else FusedAdamW)(
        groups,
        lr=_rate(parameters, config),
        capturable=on_gpu,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def optimizer_of(
    parameters: Iterable[nn.Parameter], config: TrainConfig, faster: Collection[nn.Parameter] = ()
) -> ClippedOptimizer:
    """The optimizer of `config.optim`. For "adamw_offload", the caller moves the moments to the host.

    The rate of the parameters in `faster` is `config.loraplus_lr_ratio` times that of the others.
    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
    """
    parameters = list(parameters)
    if config.optim != "adamw_8bit":
        return adamw(parameters, config, faster)
    return CompactAdamW(
        _groups(parameters, config, faster),
        _rate(parameters, config),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _groups(
    parameters: list[nn.Parameter], config: TrainConfig, faster: Collection[nn.Parameter]
) -> list[dict[str, Any]]:
    """One group for each learning rate; `set_rate` multiplies the rate by a group's "rate_factor"."""
    ratio = config.loraplus_lr_ratio
    if ratio == 1 or not faster:
        return [{"params": parameters, "lr": _rate(parameters, config)}]
    ids = {id(parameter) for parameter in faster}
    slow, fast = ([p for p in parameters if (id(p) in ids) is chosen] for chosen in (False, True))
    groups: list[dict[str, Any]] = [{"params": fast, "lr": _rate(fast, config, ratio), "rate_factor": ratio}]
    return [{"params": slow, "lr": _rate(slow, config)}, *groups] if slow else groups


def _all_on_gpu(parameters: list[nn.Parameter]) -> bool:
    return bool(parameters) and all(parameter.is_cuda for parameter in parameters)


def _rate(parameters: list[nn.Parameter], config: TrainConfig, factor: float = 1.0) -> Tensor | float:
    rate = config.rate * factor
    return torch.tensor(rate, device=parameters[0].device) if _all_on_gpu(parameters) else rate


def masters_on_host(parameters: Iterable[nn.Parameter]) -> None:
    """Moves float32 masters on a GPU to host memory that the GPU can address."""
    parameters = list(parameters)
    if _all_on_gpu(parameters):
        for parameter, on_host in zip(parameters, _mapped(parameters, copy=True), strict=True):
            parameter.data = on_host


def masters_on_device(parameters: Iterable[nn.Parameter]) -> None:
    """Reverses `masters_on_host`."""
    for parameter in parameters:
        if is_mapped(parameter):
            parameter.data = parameter.data.clone()


def never_updated(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """True if no step has updated the parameter. Waits for the device if moments were created in advance."""
    state = optimizer.state.get(parameter)
    return not state or not float(state["step"])


def _mapped(parameters: list[nn.Parameter], *, copy: bool) -> list[Tensor]:
    """One mapped host tensor per parameter, with its values or zeros, all slices of one buffer."""
    flat = mapped_zeros(sum(p.numel() for p in parameters), parameters[0].device)
    slices = flat.split([p.numel() for p in parameters])
    shaped = [part.view(p.shape) for part, p in zip(slices, parameters, strict=True)]
    if copy:
        torch._foreach_copy_(shaped, [parameter.detach() for parameter in parameters])
    return shaped


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next update; a group with a "rate_factor" gets that many times the rate."""
    for group in optimizer.param_groups:
        own = rate * group.get("rate_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0.

    The rate rises linearly over the warm-up. The last step of the warm-up has the full rate. The first step has a
    rate above zero, since a rate of zero would waste it. Then the rate is constant, or falls along a cosine or a
    line, which would reach zero one step after the end.
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
