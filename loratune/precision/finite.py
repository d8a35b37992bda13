"""Refuses to write NaN and infinity: every command that writes tensors passes them through here first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loratune.errors import LoratuneError


def fault_of(tensor: Tensor) -> str:
    """ "NaN" or "infinity" if the tensor holds one, "" if all its values are finite numbers."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.numel() == 0:
        return ""
    least, most = tensor.aminmax()  # one reading; NaN wins over every number
    if bool(least.isfinite() & most.isfinite()):
        return ""
    return "NaN" if bool(tensor.isnan().any()) else "infinity"


def check_finite(tensors: Mapping[str, Tensor], where: str, kind: type[LoratuneError]) -> None:
    """Raises `kind` with the name of the first tensor that holds NaN or infinity.

    Args:
        where: output or adapter that the tensors belong to, for the start of the message.
    """
    for name, tensor in tensors.items():
        if fault := fault_of(tensor):
            raise kind(f"{where}: {name} holds {fault}, so it is not written")


def overflow(dtype: torch.dtype) -> str:
    """The cause of an infinity that appears when finite values are rounded to `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return f"the largest value of {name} is {torch.finfo(dtype).max:,.5g}"
