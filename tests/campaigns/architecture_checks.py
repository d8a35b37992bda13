"""What docs/models.md states about one model type, each column tried on a small random model."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import loratune as lt
from loratune.base import one_pass
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.base.lengths import restart_rotary
from loratune.base.probe import probe_row
from loratune.errors import LoratuneError
from loratune.export.merge import merge_checkpoint
from loratune.infer.engine import stream
from loratune.lora.inject import trainable_parameters
from tests.campaigns.small_configs import VOCABULARY, small_config

LENGTHS = (3, 40, 1, 17, 9)
"""Documents of the packed row. One is longer than every window, chunk and top-k of the small configurations."""
TOKEN_LIMIT = 1e-4
"""Largest difference of a token's log-probability: a hundred times float32's rounding in two layers."""
GRADIENT_LIMIT = 1e-3
"""Largest relative difference of the adapters' gradients."""
COLUMNS = ("builds", "attach", "packed", "loss", "files", "peft", "merge", "generate")


FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError, StrictDataclassError),
)
"""Errors that are reported in the table; any other one ends the type's process."""


class Failed(Exception):
    """A column's property does not hold; the text says by how much."""


@dataclass
class Row:
    """One line of docs/models.md."""

    kind: str
    columns: dict[str, str] = field(default_factory=dict)
    """Column -> "" if it passes, or the reason why it does not."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Path, fused layers, and the measured differences."""


def build(kind: str) -> PreTrainedModel:
    """The small random model of a type, frozen, the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(kind), attn_implementation=None)
    model.generation_config.eos_token_id = None
    return model.float().requires_grad_(False).eval()


def adapted(kind: str) -> PreTrainedModel:
    """The model with an adapter on every linear layer whose B is not zero."""
    model = build(kind)
    lt.attach(model, lt.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    return model


def check(kind: str) -> Iterator[Row]:
    """Tries every column; yields the row after each, so that a crash leaves the columns before it."""
    row = Row(kind)
    for column, call in _checks(kind, row.facts).items():
        row.columns[column] = "does not end"
        yield row
        row.columns[column] = tried(call)
        yield row
        if column in ("builds", "attach") and row.columns[column]:
            return


def tried(call: Callable[[], None]) -> str:
    try:
        call()
    except LoratuneError as error:
        return f"refused: {error}"
    except Failed as failure:
        return str(failure)
    except FAULTS as error:
        first, _, _ = str(error).strip().partition("\n")
        return f"{type(error).__name__}: {first[:300]}"
    return ""


def _checks(kind: str, facts: dict[str, Any]) -> dict[str, Callable[[], None]]:
    return {
        "builds": lambda: _builds(kind),
        "attach": lambda: _attaches(kind, facts),
        "packed": lambda: _packs(kind, facts),
        "loss": lambda: _learns(kind, facts),
        "files": lambda: _files(kind, facts),
        "peft": lambda: _peft(kind, facts),
        "merge": lambda: _merges(kind, facts),
        "generate": lambda: _generates(kind),
    }


def _builds(kind: str) -> None:
    model = build(kind)
    assert model.get_input_embeddings() is not None


def _attaches(kind: str, facts: dict[str, Any]) -> None:
    model = build(kind)
    attached = lt.attach(model, lt.LoraConfig(r=2, lora_alpha=4))
    facts["adapted"] = str(attached).splitlines()
    facts["share"] = _share(model)


def _share(model: PreTrainedModel) -> float:
    """Share of the weights of two and three dimensions, embeddings and head aside, that carry an adapter."""
    names = {n.removesuffix(".weight").removesuffix(".lora_A") for n in trainable_parameters(model)}
    embeddings = {
        id(p)
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
        if m is not None
        for p in m.parameters()
    }
    sizes = {
        n.removesuffix(".weight"): p.numel()
        for n, p in model.named_parameters()
        if p.dim() in (2, 3) and id(p) not in embeddings and "lora_" not in n and "bias" not in n
    }
    total = sum(sizes.values())
    return sum(n for name, n in sizes.items() if name in names) / total if total else 0.0


def _row(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A packed row, the positions that predict, and their targets."""
    tokens, position_ids, cu_seqlens = probe_row(model, LENGTHS)
    tokens = tokens % (VOCABULARY - 16) + 16  # without special tokens and lines that are no tokens
    ends = set((cu_seqlens[1:] - 1).tolist())
    predicting = torch.tensor([t for t in range(len(tokens)) if t not in ends])
    return tokens, position_ids, cu_seqlens, predicting, tokens[predicting + 1]


def _alone(model: PreTrainedModel, row: tuple[Tensor, ...]) -> Tensor:
    """Log-probabilities of the row's targets, each document run by itself."""
    tokens, _, cu_seqlens, predicting, targets = row
    parts = []
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        restart_rotary(model)
        parts.append(model(input_ids=tokens[None, a:b], use_cache=False).logits[0])
    logits = torch.cat(parts)[predicting].float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _gradients(logprobs: Tensor, model: PreTrainedModel) -> Tensor:
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(3))
    trained = list(trainable_parameters(model).values())
    found = torch.autograd.grad(logprobs, trained, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found]).double()


def _packs(kind: str, facts: dict[str, Any]) -> None:
    model = adapted(kind)
    forward = prepare(model)
    facts |= {"path": forward.path, "notes": forward.notes, "fused": _fused(forward)}
    row = _row(model)
    expected = _alone(model, row)
    wanted = _gradients(expected, model)
    with forward.installed():
        got = forward.logprobs(*row)
        gradients = _gradients(got, model)
    token = float((got - expected).abs().max())
    gradient = float((gradients - wanted).norm() / wanted.norm())
    facts |= {"token_error": token, "gradient_error": gradient}
    if not token <= TOKEN_LIMIT or not gradient <= GRADIENT_LIMIT:
        raise Failed(f"packed is not unpacked: log-probabilities {token:.1g}, gradients {gradient:.1g}")


def _fused(forward: PackedForward) -> str:
    """What a GPU would run in place of the modules, tried here on the CPU."""
    before = list(forward.notes)
    try:
        if fuse(forward):
            return "layers"
    finally:
        forward.fused, forward.notes = None, before
    if not forward.in_one_call:
        return ""
    with one_pass.installed(forward.model) as count:
        return "norms and MLPs" if count else ""


def _learns(kind: str, facts: dict[str, Any]) -> None:
    model = build(kind)
    lt.attach(model, lt.LoraConfig(r=2, lora_alpha=4))
    forward = prepare(model)
    row = _row(model)
    trained = list(trainable_parameters(model).values())
    optimiser = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    losses = []
    with forward.installed():
        for _ in range(15):
            loss = -forward.logprobs(*row).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    facts["losses"] = [losses[0], losses[-1]]
    if not losses[-1] < losses[0] - 0.02:
        raise Failed(f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f} in 15 steps")


def _logits(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(20)[None] * 7 % 290 + 5
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _files(kind: str, facts: dict[str, Any]) -> None:
    model, again = adapted(kind), build(kind)
    base = _logits(again)
    expected = _logits(model)
    with tempfile.TemporaryDirectory() as folder:
        lt.save(model, f"{folder}/adapter")
        lt.load_adapter(again, f"{folder}/adapter")
    facts["effect"] = float((expected - base).abs().max())
    difference = float((_logits(again) - expected).abs().max())
    if facts["effect"] < 1e-3 or difference > 1e-6 * float(expected.abs().max()):
        raise Failed(f"a saved adapter comes back with a difference of {difference:.1g}")


def _peft(kind: str, facts: dict[str, Any]) -> None:
    model = adapted(kind)
    expected = _logits(model)
    with tempfile.TemporaryDirectory() as folder:
        lt.save(model, f"{folder}/adapter")
        theirs = peft.PeftModel.from_pretrained(build(kind), f"{folder}/adapter").eval()
    difference = float((_logits(theirs) - expected).abs().max())
    facts["peft_error"] = difference
    if difference > 1e-5 * max(1.0, float(expected.abs().max())):
        raise Failed(f"PEFT computes other logits from the saved adapter: difference {difference:.1g}")


def _merges(kind: str, facts: dict[str, Any]) -> None:
    model = adapted(kind)
    prompts = [list(range(5, 25)), list(range(40, 70, 2))]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = lt.load_tokenizer("loratune/pocket")
        merged = merge_checkpoint(model, tokenizer, "default", Path(folder) / "merged", prompts=prompts)
        again = type(model).from_pretrained(Path(folder) / "merged").eval()
        facts["merge_error"] = float((_logits(again) - _logits(model)).abs().max())
    assert merged.verification.passed


def _generates(kind: str) -> None:
    model = adapted(kind)
    tokens = [9, 8, 7, 60, 5, 44, 3, 12, 31]
    answer = list(stream(model, tokens, max_new_tokens=16, stop_ids=()))
    for index, token in enumerate(answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        if logits[token] < logits.max() - 1e-4 * max(1.0, float(logits.abs().max())):
            raise Failed(f"token {index} of a cached answer is not the likeliest one")
        tokens.append(token)
    if len(answer) != 16:
        raise Failed(f"the answer has {len(answer)} of 16 tokens")
