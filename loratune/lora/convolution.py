"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with an adapter.

A convolution multiplies the flattened kernel, (out channels, in channels · kernel size), with patches of its input.
So the update of that matrix is B A as in a linear layer: A is a convolution to r channels with the kernel, stride,
padding and dilation of the base, and B mixes channels. In memory both are matrices: A (r, in · kernel), B (out, r).
Files hold them as PEFT does, (r, in, *kernel) and (out, r, 1, ...).

With groups PEFT's A sees all input channels and only B is grouped, (out, r / groups). That is no update of the base's
kernel, whose channels see their own group only. So such a layer computes as in PEFT and cannot be merged.

PEFT 0.21 builds A without dilation and with zero padding. Where the base has another dilation or padding, its forward
differs from its own merge; ours is equal to the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, pad
from torch.nn.modules.conv import _ConvNd

from loratune.lora.layer import LoraLayer, TensorSpec
from loratune.ops.dropout import drop


class LoraConvolution(LoraLayer):
    """A convolution plus low-rank update: conv(x, W) + b + scaling · conv(conv(drop(x), A), B)."""

    is_linear = False
    convolve: ClassVar[Callable[..., Tensor]]
    """`torch.nn.functional.conv1d` or its siblings."""

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(in channels · kernel size, out channels). With groups, A sees the channels of all groups."""
        assert isinstance(base, _ConvNd)
        return base.in_channels * math.prod(base.kernel_size), base.out_channels

    @staticmethod
    def refusal(base: nn.Module, r: int) -> str | None:
        """The reason why rank `r` does not fit `base`: B has r / groups columns."""
        assert isinstance(base, _ConvNd)
        if r % base.groups == 0:
            return None
        return f"its {base.groups} groups do not divide rank {r}; set a multiple of {base.groups} in rank_pattern"

    @staticmethod
    def merge_refusal(base: nn.Module) -> str | None:
        """The reason why adapters of `base` are no update of its weight, or None."""
        assert isinstance(base, _ConvNd)
        if base.groups == 1:
            return None
        return f"A sees the channels of all {base.groups} groups, the weight only those of one"

    @staticmethod
    def shapes(base: nn.Module, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
        """B of a grouped convolution is (out, r / groups)."""
        assert isinstance(base, _ConvNd)
        own = {name: spec.shape for name, spec in specs.items()}
        return own | {"lora_B": (base.out_channels, own["lora_B"][1] // base.groups)}

    @staticmethod
    def shapes_in_files(base: nn.Module, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
        """A (r, in, *kernel), B (out, r / groups, 1, ...), and one value for each channel (1, out, 1, ...)."""
        assert isinstance(base, _ConvNd)
        r = specs["lora_A"].shape[0]
        ones = (1,) * len(base.kernel_size)
        own = {name: (1, *spec.shape, *ones) for name, spec in specs.items() if len(spec.shape) == 1}
        return own | {
            "lora_A": (r, base.in_channels, *base.kernel_size),
            "lora_B": (base.out_channels, r // base.groups, *ones),
        }

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the adapter in use, in the shape of `weight`."""
        return super().delta().view(self.own_weight.shape)

    def base_forward(self, x: Tensor) -> Tensor:
        """conv(x, W) + b; (N, in, ...) or (in, ...)."""
        base = self._base[0]
        base._parameters["weight"], base._parameters["bias"] = self._parameters["weight"], self._parameters["bias"]
        out: Tensor = base.forward(x)
        return out

    def lora_forward(self, x: Tensor) -> Tensor:
        """`base_forward` plus the low-rank update."""
        base = self._base[0]
        assert isinstance(base, _ConvNd)
        assert self.lora_A is not None
        assert self.lora_B is not None
        out = self.base_forward(x)
        if self.training and self.lora_dropout > 0.0:
            rows, _ = drop(x.reshape(-1, x.shape[-1]), self.lora_dropout, self.salt, self.state.dropout_row)
            x = rows.view(x.shape)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = (0,) * len(base.kernel_size)
        lora_A = self.lora_A.to(x.dtype).view(-1, base.in_channels, *base.kernel_size)
        lora_B = self.lora_B.to(x.dtype).view(*self.lora_B.shape, *[1] * len(base.kernel_size))
        convolve = type(self).convolve
        hidden = convolve(x, lora_A, None, base.stride, padding, base.dilation)
        return out + convolve(hidden, lora_B, groups=base.groups) * self.scaling


class LoraConv1d(LoraConvolution, nn.Conv1d):
    """`nn.Conv1d` plus low-rank update."""

    convolve = staticmethod(conv1d)


class LoraConv2d(LoraConvolution, nn.Conv2d):
    """`nn.Conv2d` plus low-rank update."""

    convolve = staticmethod(conv2d)


class LoraConv3d(LoraConvolution, nn.Conv3d):
    """`nn.Conv3d` plus low-rank update."""

    convolve = staticmethod(conv3d)


CONVOLUTIONS: dict[type[nn.Module], type[LoraConvolution]] = {
    nn.Conv1d: LoraConv1d,
    nn.Conv2d: LoraConv2d,
    nn.Conv3d: LoraConv3d,
}
"""Base layer -> its adapted layer."""


def convolution_kind(base: nn.Module) -> type[LoraConvolution] | None:
    """The adapted layer for a convolution that computes as PyTorch's own, else None."""
    for kind, adapted in CONVOLUTIONS.items():
        own = type(base)
        if isinstance(base, kind) and isinstance(base, _ConvNd):
            same = own.forward is kind.forward and getattr(own, "_conv_forward", 0) is getattr(
                kind, "_conv_forward", 1
            )
            return adapted if same else None
    return None
