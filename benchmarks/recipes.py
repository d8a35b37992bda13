"""Tokens a second of one optimizer step for each kind of fused decoder layer, one JSON object a row.

    python -m benchmarks.recipes OUT.jsonl [MODEL ...]

Each model is measured twice in one process: `fused`, as `loratune train` runs it, and `separate`, with transformers'
layers and one pass for each norm and gated activation (`base.one_pass`). A row of `fused` has the ratio of the two.
`fused` is false in a row if no recipe fitted.

All models have one shape: 16 layers of width 2,048, 16 heads of 128 with 8 key heads (16 in GPT-NeoX and GPT-2), an
MLP of 8,192, a vocabulary of 32,000. Weights are random, in bfloat16; r = 16 on all linear layers; AdamW. A step
trains all tokens of one packed row of two documents of 2,048 tokens. It runs as a CUDA graph. Its time ends with the
loss on the host; rows give the median of 12 steps. All models take under three minutes on an H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from transformers import PreTrainedModel

from benchmarks.ladder import WARM_UP, release
from benchmarks.shapes import row_of
from loratune.base.forward import prepare, take_one_pass
from loratune.config import LoraConfig, TrainConfig
from loratune.lora.inject import attach
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, set_rate

LAYERS, WIDTH, MLP, HEADS, VOCABULARY = 16, 2048, 8192, 16, 32000
DOCUMENTS, TOKENS, STEPS = 2, 2048, 12
_GRANITE = {  # of Granite 3; an attention multiplier of 1, the default, saturates every softmax
    "attention_multiplier": 1 / 128, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
}  # fmt: skip
_ALL = {
    "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "pad_token_id": 0,
}  # fmt: skip
_FEW_KEYS = _ALL | {"num_key_value_heads": HEADS // 2}
_HEAD_DIM = _FEW_KEYS | {"head_dim": WIDTH // HEADS}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_FEW_KEYS)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_FEW_KEYS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_HEAD_DIM)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_HEAD_DIM)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_FEW_KEYS)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_FEW_KEYS)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_FEW_KEYS, **_GRANITE)),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_HEAD_DIM)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_ALL)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=MLP, n_positions=8192, vocab_size=VOCABULARY
        )
    ),
}


def random_model(name: str) -> PreTrainedModel:
    """A frozen bfloat16 model with random weights on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return MODELS[name]().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def measure(name: str, variant: str) -> dict[str, object]:
    """One model, `fused` or `separate`."""
    model = random_model(name)
    attach(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"), name="default", seed=0)
    forward = prepare(model)
    if variant == "separate":
        forward.fused = None
        take_one_pass(forward)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, TrainConfig(learning_rate=2e-4))
    step = GraphStep(forward, parameters, optimizer, 1.0, record=True)
    rows = [[row_of([TOKENS] * DOCUMENTS, DOCUMENTS * TOKENS, seed)] for seed in range(4)]
    seconds, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    with forward.installed():
        for index in range(STEPS + WARM_UP):
            set_rate(optimizer, 1e-4)
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(step(rows[index % 4], rows[(index + 1) % 4]).loss)
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_UP:])
    return {
        "model": name, "variant": variant, "layers": LAYERS, "width": WIDTH, "mlp": MLP, "documents": DOCUMENTS,
        "tokens": TOKENS, "tok_s": round(DOCUMENTS * TOKENS / median), "step_ms": round(median * 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "fused": forward.fused is not None,
        "one_pass": forward.one_pass, "path": forward.path, "notes": [*forward.notes, *filter(None, [step.why_not])],
        "losses": [round(loss, 5) for loss in losses[:4]], "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__, "transformers": tf.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes")
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"from {', '.join(MODELS)}; default: all")
    given = parser.parse_args()
    for name in given.models or MODELS:
        separate = measure(name, "separate")
        release()
        fused = measure(name, "fused")
        release()
        fused["ratio"] = round(int(str(fused["tok_s"])) / int(str(separate["tok_s"])), 3)
        for row in (separate, fused):
            line = json.dumps(row)
            print(line, flush=True)
            with given.out.open("a") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
