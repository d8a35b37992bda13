"""Switching: activate among 200 resident adapters, swap-ins from host memory beside work, replacement.

    python -m benchmarks.switching [--shape l7b] [--out RESULTS.jsonl]      one GPU
    python -m benchmarks.switching --cpu                                    host time, beside PEFT's

One JSON object per line. `activate` costs only host time, since it launches nothing. A swap-in is bound by the
bus, so it is reported in GB/s beside a bare copy of the same bytes. Work is a forward of 2,048 tokens, or of one
token as in generation.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from loratune.config import LoraConfig
from loratune.lora.build import build
from loratune.lora.files import save
from loratune.lora.inject import activate, attach, detach, join
from loratune.lora.replace import replace
from loratune.lora.select import select
from loratune.lora.state import Adapter, Adapters, LayerWeights, require
from loratune.lora.store import Store
from loratune.ops.host import pinned

RANK, RESIDENT, SWITCHES = 16, 200, 1000
CONFIG = LoraConfig(r=RANK, lora_alpha=RANK)


def fill_device(model: nn.Module, count: int) -> None:
    """`count` resident adapters in float32; only the first is initialised, since values are never read."""
    attach(model, CONFIG, name="0")
    state = require(model)
    first, selection = state.adapters["0"], select(model, CONFIG)
    for index in range(1, count):
        layers = {
            path: LayerWeights(
                part.kind,
                part.variant,
                {name: nn.Parameter(torch.empty_like(tensor)) for name, tensor in part.tensors.items()},
                part.scaling,
            )
            for path, part in first.layers.items()
        }
        join(model, state, str(index), selection, Adapter(CONFIG, layers))


def switches(model: nn.Module, count: int) -> dict[str, Any]:
    """Host milliseconds of random switches among `count` resident adapters."""
    generator = random.Random(0)
    order = [str(generator.randrange(count)) for _ in range(SWITCHES)]
    for name in range(count):  # each once: plans are made at the first switch
        activate(model, str(name))
    gc.collect()
    before = _allocations()
    taken = [_ms(lambda name=name: activate(model, name)) for name in order]  # type: ignore[misc]
    after = _allocations()
    return {
        "what": "activate, resident", "adapters": count, "layers": len(require(model).layers), "switches": SWITCHES,
        "median_ms": _round(statistics.median(taken)), "p99_ms": _round(sorted(taken)[-SWITCHES // 100]),
        "worst_ms": _round(max(taken)), "allocated_bytes": after[0] - before[0], "allocations": after[1] - before[1],
    }  # fmt: skip


def _allocations() -> tuple[int, int]:
    """Bytes in use on the GPU, and the number of allocations so far."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_allocated(), int(torch.cuda.memory_stats()["allocation.all.allocated"])


def fill_store(model: nn.Module, stored: int, slots: int) -> Store:
    """A store with uninitialised adapters."""
    store, selection, state = Store(model, slots), select(model, CONFIG), Adapters()
    for index in range(stored):
        adapter = build(model, CONFIG, selection, seed=None, device=torch.device("cpu"))
        store.prepare(str(index), selection, adapter)()
        join(model, state, str(index), selection, adapter)
        state.store = store
    return store


def swaps(model: Any, stored: int = 4, slots: int = 3) -> Iterator[dict[str, Any]]:
    """Swap-ins from pinned memory: alone, beside work, and without looking ahead."""
    store = fill_store(model, stored, slots)
    size = store.slot_bytes
    owner = type("Owner", (), {})()
    host = pinned(owner, torch.Size([size]), torch.uint8)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    bare = statistics.median(_gpu_ms(lambda: device.copy_(host, non_blocking=True)) for _ in range(10))
    names = [str(i % stored) for i in range(24)]
    for name in names:  # each in each slot once
        activate(model, name)
    swapped = statistics.median(_gpu_ms(lambda name=name: activate(model, name)) for name in names)  # type: ignore[misc]
    torch.cuda.synchronize()
    host_ms = statistics.median(_ms(lambda name=name: activate(model, name)) for name in names)  # type: ignore[misc]
    yield {
        "what": "swap-in alone", "bytes": size, "bare_copy_ms": _round(bare), "bare_gb_s": _round(size / bare / 1e6),
        "swap_ms": _round(swapped), "swap_gb_s": _round(size / swapped / 1e6), "host_ms": _round(host_ms),
        "stored": stored, "slots": slots,
    }  # fmt: skip
    side = torch.cuda.Stream()

    def copy() -> None:
        with torch.cuda.stream(side):
            device.copy_(host, non_blocking=True)

    for tokens, forwards in ((2048, 8), (1, 20)):
        yield _beside_work(model, store, names[:forwards], tokens, copy)


KINDS = ("resident", "copying", "ahead", "on_demand")
"""Ways to provide an adapter: resident; resident beside a bare copy; copied one forward ahead; copied on demand."""
ROUNDS = 6


def _beside_work(model: Any, store: Store, names: list[str], tokens: int, copy: Callable[[], None]) -> dict[str, Any]:
    """Forwards of `tokens` tokens, each with an adapter that is not on the device when its predecessor begins.

    The kinds alternate in rotating order, because the speed of a shared host drifts by more than they differ.
    Returns milliseconds per forward until the device is idle (median and minimum of the rounds), and the host's
    milliseconds in switching, in starting a copy, and in the forward.
    """
    ids = torch.randint(0, 1000, (1, tokens), device=model.device)
    parts: dict[str, dict[str, list[float]]] = {kind: {"switch": [], "start": [], "forward": []} for kind in KINDS}

    def work() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def run(kind: str) -> None:
        resident, took = kind in ("resident", "copying"), parts[kind]
        for index, name in enumerate(names):
            following = names[(index + 1) % len(names)]
            took["switch"].append(_ms(lambda name=names[index % 2] if resident else name: activate(model, name)))  # type: ignore[misc]
            if kind == "copying":
                took["start"].append(_ms(copy))
            if kind == "ahead":
                took["start"].append(_ms(lambda name=following: store.prefetch(name)))  # type: ignore[misc]
            took["forward"].append(_ms(work))

    for kind in KINDS:
        run(kind)
    for lists in parts.values():
        for times in lists.values():
            times.clear()
    before = _allocations()[0]
    whole: dict[str, list[float]] = {kind: [] for kind in KINDS}
    gc.collect()
    for number in range(ROUNDS):
        for kind in (*KINDS[number % len(KINDS) :], *KINDS[: number % len(KINDS)]):
            for name in names[:2]:
                activate(model, name)
            whole[kind].append(_gpu_ms(lambda kind=kind: run(kind)) / len(names))  # type: ignore[misc]
    result: dict[str, Any] = {"what": "a swap-in before every forward", "tokens": tokens, "forwards": len(names)}
    for kind, times in whole.items():
        result[f"{kind}_ms"], result[f"{kind}_least_ms"] = _round(statistics.median(times)), _round(min(times))
    result["host_ms"] = {
        kind: {part: _round(statistics.median(times)) for part, times in lists.items() if times}
        for kind, lists in parts.items()
    }
    return result | {"rounds": ROUNDS, "allocated_bytes": _allocations()[0] - before}


def replacements(model: Any, folder: Path) -> dict[str, Any]:
    """Hot replacement: time beside the work, and time of the exchange before the next forward."""
    ids = torch.randint(0, 1000, (1, 1), device="cuda")
    with torch.no_grad():
        model(input_ids=ids)
        beside, plain, exchanged = [], [], []
        for _ in range(6):
            beside.append(_ms(lambda: replace(model, folder, "0", at_next_forward=True)))
            exchanged.append(_ms(lambda: model(input_ids=ids)))
            plain.append(_ms(lambda: model(input_ids=ids)))
    return {
        "what": "replace", "prepared_ms": _round(statistics.median(beside)),
        "forward_ms": _round(statistics.median(plain)),
        "forward_with_exchange_ms": _round(statistics.median(exchanged)),
    }  # fmt: skip


def beside_peft(adapters: int = 20) -> list[dict[str, Any]]:
    """Host time of switching on 32 narrow layers of 7 projections, alternating with PEFT."""
    import peft

    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 32, "num_attention_heads": 4,
        "vocab_size": 300,
    }  # fmt: skip
    ours, theirs = (tf.LlamaForCausalLM(tf.LlamaConfig(**settings)).requires_grad_(False) for _ in range(2))
    asked = peft.LoraConfig(r=2, target_modules="all-linear")
    wrapped = peft.get_peft_model(theirs, asked, adapter_name="0")
    attach(ours, LoraConfig(r=2), name="0")
    for index in range(1, adapters):
        attach(ours, LoraConfig(r=2), name=str(index))
        wrapped.add_adapter(str(index), asked)
    generator = random.Random(0)
    taken: dict[str, list[float]] = {"loratune": [], "peft": []}
    for _ in range(200):
        name = str(generator.randrange(adapters))
        taken["loratune"].append(_ms(lambda name=name: activate(ours, name)))  # type: ignore[misc]
        taken["peft"].append(_ms(lambda name=name: wrapped.set_adapter(name)))  # type: ignore[misc]
    return [
        {"what": "activate on a CPU", "system": system, "adapters": adapters, "layers": 224,
         "median_ms": _round(statistics.median(times)), "worst_ms": _round(max(times))}
        for system, times in taken.items()
    ]  # fmt: skip


def _ms(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def _gpu_ms(action: Callable[[], object]) -> float:
    """Milliseconds until the device has finished."""
    torch.cuda.synchronize()
    return _ms(lambda: (action(), torch.cuda.synchronize()))


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def on_gpu(shape: str, parts: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the measurements on one GPU as they finish."""
    from benchmarks.shapes import model_of

    model = model_of(shape)
    if "swaps" in parts:
        yield from swaps(model)
        detach(model)
    if "resident" in parts:
        fill_device(model, RESIDENT)
        yield switches(model, RESIDENT)
        detach(model)
    if "replace" in parts:
        attach(model, CONFIG, name="0")
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "adapter", name="0")
            yield replacements(model, Path(folder) / "adapter")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--shape", default="l7b")
    arguments.add_argument("--parts", default="swaps,resident,replace")
    arguments.add_argument("--cpu", action="store_true")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    rows = beside_peft() if given.cpu else on_gpu(given.shape, given.parts.split(","))
    machine = "CPU" if given.cpu else torch.cuda.get_device_name()
    about = {} if given.cpu else {"shape": given.shape, "r": RANK}
    for row in rows:
        line = json.dumps(
            row | about | {"machine": machine, "torch": torch.__version__, "transformers": tf.__version__}
        )
        print(line, flush=True)
        if given.out:
            with given.out.open("a") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
