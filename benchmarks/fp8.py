"""An 8-bit base: microseconds of each kernel at a model's widths, and whole steps.

    python -m benchmarks.fp8 OUT.jsonl [--shape l7b] [--tokens 8192] [--steps 12] [--kernels-only]

One JSON object per row. For each projection and direction of one layer, medians over rounds with a cold cache:

    separate_us    the low-rank product, and the rows quantised in a pass of their own
    augmented_us   both in one reading, by number of warps
    unmeasured_us  the same if no pass has measured the row maximum (attention's output)
    product_us     the frozen product that follows
    transposed_us  the weight transposed for the backward, with and without adapter columns

Then the passes with and without row maxima, the adapter columns of all layers together (`refresh_us`), and the
step: `benchmarks.ladder` for l7b 4 x 2048 and q8b 2 x 2048, weights stored once and twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ladder import CASES, measure, release
from benchmarks.shapes import SHAPES
from loratune.ops import layer
from loratune.ops.low_rank import down_project
from loratune.ops.measure import PAD_COLUMNS, Measure, row_statistics, statistics_of
from loratune.ops.projection import StackedAdapters
from loratune.precision import fp8, fp8_kernels, fp8_rows
from loratune.precision.fp8_projection import Fp8Projection, refresher

BF16 = torch.bfloat16
RANK = 16
ROUNDS = 20


def timed(run: Callable[[], object]) -> float:
    """Median microseconds on the device, with a cache that other numbers fill before each round.

    The work is recorded, because some kernels run faster than the host can launch them.
    """
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    found = []
    for _ in range(ROUNDS):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return round(statistics.median(found), 1)


def padded(x: Tensor, asked: Measure) -> Tensor:
    """x with the row maximum in the padding columns."""
    out = torch.nn.functional.pad(x, (0, PAD_COLUMNS))
    statistics_of(out, x.shape[1]).copy_(row_statistics(x, asked))
    return out


def a_projection(d_out: int, d_in: int, members: int, *, hold_transposed: bool) -> Fp8Projection:
    """Random weights with adapters of `members` layers."""
    ranks = RANK * members
    weight = torch.randn(d_out, d_in, device="cuda", dtype=BF16) * 0.02
    held = fp8.Fp8Weight.joined([fp8.Fp8Weight.quantised(weight)], ranks)
    adapter = torch.randn(ranks, d_in, device="cuda", dtype=BF16) / d_in**0.5
    other = torch.randn(d_out, ranks, device="cuda", dtype=BF16) * 1e-3
    member = StackedAdapters([slice(0, d_out)], [slice(0, ranks)], [1.0])
    return Fp8Projection.of(held, None, (adapter, other), member, hold_transposed=hold_transposed)


def of_a_product(name: str, p: Fp8Projection, tokens: int, *, backward: bool) -> dict[str, object]:
    """Timings of one projection in one direction."""
    d_out, d_in = p.frozen.shape
    width = d_out if backward else d_in
    matrix, columns = (p.lora_B, p.frozen.row_scale) if backward else (p.lora_A.T, None)
    numbers = p.factors[2:] if backward else p.factors[:2]
    x = torch.randn(tokens, width, device="cuda", dtype=BF16)
    with_measure = padded(x, Measure(columns))
    found: dict[str, object] = {"projection": name, "direction": "backward" if backward else "forward"}
    found["separate_us"] = timed(lambda: (down_project(x, matrix), fp8_rows.quantise_rows(x, columns)))
    found["low_rank_us"] = timed(lambda: down_project(x, matrix))
    by_warps = {}
    before = fp8_kernels.WARPS
    for fp8_kernels.WARPS in (4, 8):
        by_warps[str(fp8_kernels.WARPS)] = timed(
            lambda: fp8_rows.quantise_augmented(with_measure, matrix, columns, numbers)
        )
    fp8_kernels.WARPS = before
    found["augmented_us"] = by_warps
    found["unmeasured_us"] = timed(lambda: fp8_rows.quantise_augmented(x, matrix, columns, numbers))
    rows, _ = fp8_rows.quantise_augmented(with_measure, matrix, columns, numbers)
    if backward:
        transposed = fp8_rows.transposed(p.frozen.values, p.lora_A, numbers[:1])
        found["transposed_us"] = timed(lambda: fp8_rows.transposed(p.frozen.values, p.lora_A, numbers[:1]))
        found["transposed_alone_us"] = timed(lambda: fp8_rows.transposed(p.frozen.values))
        found["product_us"] = timed(lambda: fp8_rows.product(rows, transposed, p.frozen.column_scale, BF16))
    else:
        found["product_us"] = timed(lambda: fp8_rows.product(rows, p.augmented, p.frozen.scale[:, 0], BF16))
    return found


def of_passes(width: int, mlp: int, heads: tuple[int, int], tokens: int) -> list[dict[str, object]]:
    """Timings of the passes with and without row maxima."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=BF16)

    x, y, z, weight, gate_up, d_active = (
        random(tokens, width), random(tokens, width), random(tokens, width), random(width), random(tokens, 2 * mlp),
        random(tokens, mlp),
    )  # fmt: skip
    parts = [random(tokens, count, 128) for count in (heads[0], heads[1], heads[1])]
    cos, sin = random(tokens, 128), random(tokens, 128)
    spec, split = layer.NormSpec(weight, 1e-6), layer.HeadSpec(*heads, 128, 128)
    found: list[dict[str, object]] = []
    for function, arguments, scaled in (
        (layer.norm, (x, spec), 0),
        (layer.add_norm, (x, y, spec), 0),
        (layer.norm_backward, (y, z, x, spec), width),
        (layer.gated, (gate_up, "silu"), 0),
        (layer.gated_backward, (gate_up, d_active, "silu"), 2 * mlp),
        (layer.rotate_heads_backward, (*parts, cos, sin, None, split), 128 * (heads[0] + 2 * heads[1])),
    ):
        asked = Measure(torch.ones(scaled, device="cuda", dtype=BF16) if scaled else None)
        call: Callable[..., object] = function
        found.append(
            {
                "pass": function.__name__,
                "plain_us": timed(lambda: call(*arguments, PAD_COLUMNS)),  # noqa: B023
                "measuring_us": timed(lambda: call(*arguments, PAD_COLUMNS, asked)),  # noqa: B023
            }
        )
    return found


def kernels(shape: str, tokens: int) -> list[dict[str, object]]:
    """All result rows for one model's widths."""
    config = SHAPES[shape]
    width, mlp, heads, key_value, layers = (
        int(str(config[name]))
        for name in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        )
    )  # fmt: skip
    dim = int(str(config.get("head_dim", width // heads)))
    projections = {
        "qkv": a_projection((heads + 2 * key_value) * dim, width, 3, hold_transposed=False),
        "o": a_projection(width, heads * dim, 1, hold_transposed=False),
        "gate_up": a_projection(2 * mlp, width, 2, hold_transposed=False),
        "down": a_projection(width, mlp, 1, hold_transposed=False),
    }
    all_layers = refresher(list(projections.values()) * layers)  # the projections of one layer, repeated
    all_layers()
    found = [
        of_a_product(name, p, tokens, backward=backward)
        for name, p in projections.items()
        for backward in (False, True)
    ]
    found += of_passes(width, mlp, (heads, key_value), tokens)
    found.append({"refresh_us": timed(all_layers), "projections": layers * len(projections)})
    return [{"shape": shape, "tokens": tokens, "machine": torch.cuda.get_device_name(), **row} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="l7b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kernels-only", action="store_true")
    given = parser.parse_args()

    def write(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        with given.out.open("a") as out:
            out.write(json.dumps(row) + "\n")

    for row in kernels(given.shape, given.tokens):
        write(row)
    release()
    for case in CASES if not given.kernels_only else []:
        if case[3] == "fp8":
            write(measure(*case, "graph", given.steps))
            release()


if __name__ == "__main__":
    main()
