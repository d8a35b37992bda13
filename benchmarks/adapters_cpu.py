"""Adapters on a CPU beside PEFT: attach, load, switch, merge, and one training step, in one run.

    python -m benchmarks.adapters_cpu [--hidden 1024] [--layers 16] [--rounds 9] [--out RESULTS.json]

Ours and the peer alternate, and the medians of the rounds are compared. The peer is PEFT, or the bare operation that
nothing can undercut: reading the file for `load`, `addmm_` on every weight for `merge`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from safetensors.torch import load_file

from loratune.config import LoraConfig
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import activate, attach, detach, merge
from loratune.lora.state import require

RANK, RESIDENT = 16, 200


def main() -> None:
    """Measures everything and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="JSON file for the results")
    given = parser.parse_args()
    sizes = {"hidden": given.hidden, "layers": given.layers}
    found = [
        attaching(**sizes, rounds=given.rounds),
        loading(**sizes, rounds=given.rounds),
        merging(**sizes, rounds=given.rounds),
        stepping(**sizes, rounds=given.rounds),
        stepping_dora(**sizes, rounds=given.rounds),
        *switching(given.layers),
    ]
    result = {
        "command": "python -m benchmarks.adapters_cpu", "machine_cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "peft": peft.__version__,
        "rank": RANK, **sizes, "results": found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def llama(hidden: int, layers: int) -> Any:
    """A frozen model of Llama's shape with random weights in float32."""
    config = tf.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=512,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).requires_grad_(False).eval()


def peft_config() -> Any:
    """PEFT's configuration of our adapters."""
    return peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")


OURS = LoraConfig(r=RANK, lora_alpha=2 * RANK)


def attaching(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """`attach` and `get_peft_model` on a bare model."""
    ours, theirs = llama(hidden, layers), llama(hidden, layers)
    times: dict[str, list[float]] = {"loratune": [], "peft": []}
    for _ in range(rounds):
        times["loratune"].append(_ms(lambda: attach(ours, OURS)))
        detach(ours)
        wrapped: list[Any] = []
        times["peft"].append(_ms(lambda: wrapped.append(peft.get_peft_model(theirs, peft_config()))))  # noqa: B023
        theirs = wrapped[0].unload()
    return compared("attach", times, target="at least 5 times faster than PEFT")


def loading(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """`load_adapter`, the bare read of the file, and PEFT's `load_adapter`."""
    ours, theirs = llama(hidden, layers), peft.get_peft_model(llama(hidden, layers), peft_config())
    attach(ours, OURS)
    for parameter in require(ours).get("default").parameters().values():
        parameter.data.normal_()
    times: dict[str, list[float]] = {"loratune": [], "bare": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        save(ours, folder)
        file = f"{folder}/adapter_model.safetensors"
        for number in range(rounds):
            times["loratune"].append(_ms(lambda: load_adapter(ours, folder, "loaded")))
            detach(ours, "loaded")
            times["bare"].append(_ms(lambda: [tensor.clone() for tensor in load_file(file).values()]))
            times["peft"].append(_ms(lambda: theirs.load_adapter(folder, f"loaded{number}")))  # noqa: B023
            theirs.delete_adapter(f"loaded{number}")
        size = os.path.getsize(file)
    return compared("load", times, target="at most 3 times the bare read") | {"bytes": size}


def merging(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """An irreversible `merge`, bare `addmm_` on every weight, and PEFT's `merge_adapter`."""
    times: dict[str, list[float]] = {"loratune": [], "bare": [], "peft": []}
    ours, theirs = llama(hidden, layers), peft.get_peft_model(llama(hidden, layers), peft_config())
    for _ in range(rounds):
        attach(ours, OURS)
        parts = [
            (layer.weight, weights.lora_B.detach(), weights.lora_A.detach())
            for path, layer in require(ours).layers.items()
            for weights in [require(ours).get("default").layers[path]]
        ]

        def bare(parts: list[Any] = parts) -> None:
            with torch.no_grad():
                for weight, lora_B, lora_A in parts:
                    weight.addmm_(lora_B, lora_A, alpha=2.0)

        times["bare"].append(_ms(bare))
        times["loratune"].append(_ms(lambda: merge(ours, reversible=False)))
        times["peft"].append(_ms(theirs.merge_adapter))
        theirs.unmerge_adapter()
    return compared("merge", times, target="at most 1.5 times bare addmm_")


def stepping(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of 128 tokens, with our plain LoRA and with PEFT's."""
    ours, theirs = llama(hidden, layers), peft.get_peft_model(llama(hidden, layers), peft_config())
    attach(ours, OURS)
    ids = torch.randint(0, 500, (1, 128))
    times: dict[str, list[float]] = {"loratune": [], "peft": []}
    for _ in range(rounds):
        for name, model in (("loratune", ours), ("peft", theirs)):
            times[name].append(_ms(lambda: model(input_ids=ids, labels=ids).loss.backward()))  # noqa: B023
    return compared("forward and backward of 128 tokens as modules", times, target="not slower than PEFT")


def stepping_dora(hidden: int, layers: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of 512 tokens, with our DoRA, our plain LoRA and PEFT's DoRA."""
    models = {"loratune": llama(hidden, layers), "lora": llama(hidden, layers)}
    attach(models["loratune"], LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True))
    attach(models["lora"], OURS)
    asked = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=True)
    models["peft"] = peft.get_peft_model(llama(hidden, layers), asked)
    ids = torch.randint(0, 500, (1, 512))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_ms(lambda: model(input_ids=ids, labels=ids).loss.backward()))  # noqa: B023
    return compared("forward and backward of 512 tokens with DoRA", times, target="at most 1.3 times plain LoRA")


def switching(layers: int, hidden: int = 64) -> Iterator[dict[str, Any]]:
    """Random switches among resident adapters; PEFT has 20, because it needs minutes to attach 200."""
    ours, theirs = llama(hidden, layers), llama(hidden, layers)
    config, asked = LoraConfig(r=2), peft.LoraConfig(r=2, target_modules="all-linear")
    wrapped = peft.get_peft_model(theirs, asked, adapter_name="0")
    for index in range(RESIDENT):
        attach(ours, config, name=str(index))
    for index in range(1, 20):
        wrapped.add_adapter(str(index), asked)
    generator = random.Random(0)
    for count in (20, RESIDENT):
        times: dict[str, list[float]] = {"loratune": [], "peft": []}
        gc.collect()
        for _ in range(400):
            name, among_20 = str(generator.randrange(count)), str(generator.randrange(20))
            times["loratune"].append(_ms(lambda: activate(ours, name)))  # noqa: B023
            times["peft"].append(_ms(lambda: wrapped.set_adapter(among_20)))  # noqa: B023
        yield compared(f"switch among {count}", times, target="at most 1 ms") | {
            "p99_ms": _round(sorted(times["loratune"])[-4]),
            "adapted_layers": len(require(ours).layers),
        }


def compared(what: str, times: dict[str, list[float]], target: str) -> dict[str, Any]:
    """Median milliseconds of each way, and ours as a share of the others."""
    medians = {way: statistics.median(values) for way, values in times.items()}
    shares = {f"ours / {way}": _round(medians["loratune"] / ms) for way, ms in medians.items() if way != "loratune"}
    return {"what": what, "target": target, "median_ms": {way: _round(ms) for way, ms in medians.items()}} | shares


def _ms(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def _round(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
