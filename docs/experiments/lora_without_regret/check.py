"""Compares the stacked runs with loratune (LoRA) and plain PyTorch (full): losses of a few steps must agree.

python -m docs.experiments.lora_without_regret.check
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import loratune as lt
from docs.experiments.lora_without_regret.run import examples, padded
from docs.experiments.lora_without_regret.stacked import Kind, Stack, Training
from loratune.base.load import POCKET
from loratune.lora.inject import trainable_parameters

STEPS, BATCH, RATES = 4, 4, [1e-3, 4e-3]


def reference(kind: Kind, stack: Stack, rate: float, ids: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor):
    """Losses of `STEPS` steps in transformers' model, with the library's adapter or all weights trained."""
    model = lt.load(POCKET, "float32", "cpu")
    if kind.rank:
        lt.attach(model, lt.LoraConfig(r=kind.rank, lora_alpha=kind.alpha))
        parameters = trainable_parameters(model)
        begun = stack._tensors()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(begun[name.replace(".lora_", ".")][0])
    else:
        parameters = dict(model.requires_grad_(True).named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        logits = model(input_ids=ids[rows]).logits.flatten(0, 1)
        token_losses = cross_entropy(logits, targets[rows].flatten(), reduction="none")
        loss = (token_losses * mask[rows].flatten()).sum() / mask[rows].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Compares rank 4 and full tuning at two rates each. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as folder:
        batches = padded(examples("dates", Path(folder))[0])
    order = torch.arange(STEPS * BATCH).view(STEPS, BATCH)
    model = lt.load(POCKET, "float32", "cpu")
    for kind in (Kind(4), Kind(0)):
        rates = RATES if kind.rank else [rate / 10 for rate in RATES]
        stack = Stack(model, kind, len(rates), seed=0)
        begun = Stack(model, kind, 1, seed=0)
        got = Training(stack, rates, batches, order).run()
        for run, rate in enumerate(rates):
            expected = reference(kind, begun, rate, batches.ids, batches.targets, batches.weights)
            worst = max(abs(a - b) / b for a, b in zip(got[:, run].tolist(), expected, strict=True))
            print(f"rank {kind.rank} rate {rate}: losses {expected}, largest relative difference {worst:.1e}")
            assert worst < 1e-4


if __name__ == "__main__":
    main()
