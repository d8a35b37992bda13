"""Makes modules of transformers compute in float64 where they would round to float32."""

from __future__ import annotations

import pytest
import torch


def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms convert to float32 and back, which hides errors below 1e-7: convert to float64 instead."""
    to = torch.Tensor.to

    def wide_to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: to(self, torch.float64))
