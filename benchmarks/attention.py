"""Attention alone: microseconds forward and backward, and the error, one JSON object per row.

    python -m benchmarks.attention [OUT.jsonl]

`kernel` is "flash4" (`ops.attention.flash`, if installed) or "pytorch": cuDNN for documents of equal length, else
FlashAttention 2. Ten calls are recorded as one graph, so the host's launches do not count. Uneven documents have
the log-normal lengths of `benchmarks.instruction`, mostly below 500 tokens. `error` is |x - x64| / |x64| against
float64, for the output and for the gradients of query, key and value.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.ops.attention import flash
from loratune.ops.attention.capped import DocumentSpans
from loratune.ops.attention.documents import document_attention
from loratune.ops.attention.recorded import RecordedAttention

SHAPES = {
    "Llama-2-7B 4 x 2048": (32, 32, 128, 8192),
    "Llama-3.2-1B 4 x 2048": (32, 8, 64, 8192),
    "Llama-3.2-1B 1 x 512": (32, 8, 64, 512),
    "Qwen3-8B 2 x 2048": (32, 8, 128, 4096),
    "Qwen3-0.6B 2 x 2048": (16, 8, 128, 4096),
    "heads of 256, 2 x 2048": (8, 4, 256, 4096),
}
"""Query heads, key and value heads, head_dim, tokens."""
CALLS = 10


def lengths_of(even: bool, tokens: int) -> list[int]:
    """Lengths of the documents that fill a row."""
    if even:
        return [min(2048, tokens)] * max(1, tokens // 2048)
    generator, lengths, left = torch.Generator().manual_seed(1), list[int](), tokens
    while left:
        drawn = int(torch.exp(5.19 + 0.9 * torch.randn(1, generator=generator)).clamp(16, 1500))
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


def microseconds(work: Callable[[], object]) -> float:
    """Microseconds of one call: the median of ten replays of `CALLS` recorded calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds) / CALLS * 1e6, 1)


def measure(name: str, even: bool) -> list[dict[str, object]]:
    """One result row per kernel."""
    heads, kv_heads, dim, tokens = SHAPES[name]
    lengths = lengths_of(even, tokens)
    torch.manual_seed(0)
    stacked = torch.randn(tokens, heads + 2 * kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    incoming = torch.randn(tokens, heads * dim, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    bound = lengths[0] if even else 1 << (max(lengths) - 1).bit_length()  # as `training.graph` rounds it

    def forward(stacked: Tensor, **kernel: Any) -> RecordedAttention:
        def attend(*heads: Tensor) -> Tensor:
            qkv = (tensor.transpose(0, 1)[None] for tensor in heads)
            out, _ = document_attention(torch.nn.Identity(), *qkv, None, cu_seq_lens_q=ends, **kernel)
            return out.reshape(tokens, -1)

        return RecordedAttention(attend, stacked, [heads, kv_heads, kv_heads])

    def both(stacked: Tensor, **kernel: Any) -> list[Tensor]:
        attended = forward(stacked, **kernel)
        return [attended.out, *attended.backward(incoming.to(stacked.dtype))]

    exact = both(stacked.double())
    rows, trials = [], flash.FlashTrials()
    for kernel in ("pytorch", *(["flash4"] if flash.fits(stacked.device, dim) else [])):
        asked = {"max_length_q": bound, "spans": DocumentSpans(ends, trials if kernel == "flash4" else None)}
        got = both(stacked, **asked)
        error = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
        taken = microseconds(lambda asked=asked: forward(stacked, **asked))
        altogether = microseconds(lambda asked=asked: both(stacked, **asked))
        rows.append(
            {
                "shape": name, "documents": len(lengths), "even": even, "kernel": kernel, "forward_us": taken,
                "backward_us": round(altogether - taken, 1), "error": [round(e, 5) for e in error],
                "machine": torch.cuda.get_device_name(), "torch": torch.__version__,
                "flash_attn_4": importlib.metadata.version("flash-attn-4") if kernel == "flash4" else None,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    for name, (*_, tokens) in SHAPES.items():
        for even in (True, False) if tokens > 512 else (True,):
            for row in measure(name, even):
                print(json.dumps(row), flush=True)
                if len(sys.argv) > 1:
                    with Path(sys.argv[1]).open("a") as out:
                        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
