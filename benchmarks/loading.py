"""From a folder of bfloat16 weights to a 4-bit model on the GPU: seconds and peak host memory.

    python -m benchmarks.loading write FOLDER [SHAPE]     a checkpoint of random weights, in shards of 5 GB
    python -m benchmarks.loading ours FOLDER              one JSON object
    python -m benchmarks.loading bitsandbytes FOLDER      transformers + bitsandbytes, then ours, compared by bits

Host memory is Linux's peak resident set (VmHWM), mapped files included, minus its value after all imports with
the GPU in use. Each system runs in its own process; the files are in the page cache for both.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

GIB = 1 << 30


def _status(field: str) -> float:
    """One field of /proc/self/status in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return round(int(line.split()[1]) * 1024 / GIB, 3)
    return float("nan")


def _reset_peak() -> bool:
    """Resets VmHWM; not every container allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _measured(name: str, load: Any) -> tuple[Any, dict[str, object]]:
    import torch
    import transformers

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    reset, before = _reset_peak(), _status("VmRSS")
    start = time.perf_counter()
    model = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return model, {
        "system": name, "seconds": round(seconds, 2), "host_before_gib": before, "host_peak_gib": _status("VmHWM"),
        "host_over_start_gib": round(_status("VmHWM") - before, 3), "host_after_gib": _status("VmRSS"),
        "peak_was_reset": reset, "device_gib": round(torch.cuda.memory_allocated() / GIB, 3),
        "device_peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "device_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def write(folder: str, shape: str) -> None:
    """A random checkpoint of one of `benchmarks.shapes`."""
    from benchmarks.shapes import model_of

    start = time.perf_counter()
    model = model_of(shape)
    model.save_pretrained(folder, max_shard_size="5GB")
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    print(json.dumps({"wrote": folder, "bytes": size, "seconds": round(time.perf_counter() - start, 1)}))


def ours(folder: str) -> tuple[Any, dict[str, object]]:
    """Loads with loratune."""
    from loratune.base.load import load

    return _measured("loratune", lambda: load(folder, "nf4", "cuda"))


def bitsandbytes(folder: str) -> tuple[Any, dict[str, object]]:
    """Loads with transformers and bitsandbytes."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model, found = _measured(
        "transformers + bitsandbytes",
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=torch.bfloat16, device_map={"": 0}
        ),
    )
    return model, found | {"bitsandbytes": bnb.__version__}


def compare(folder: str, theirs: Any) -> dict[str, object]:
    """Number of layers that dequantise to the same bits as bitsandbytes'."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from loratune.precision.linear import quantised_layers

    model, found = ours(folder)
    layers = dict(quantised_layers(model))
    equal = 0
    for path, layer in layers.items():
        weight = theirs.get_submodule(path).weight
        equal += bool(torch.equal(layer.frozen.dense(), dequantize_4bit(weight.data, weight.quant_state)))
    return {"compared": len(layers), "equal_to_the_bit": equal, "second_load_seconds": found["seconds"]}


if __name__ == "__main__":
    verb, folder, *rest = sys.argv[1:]
    if verb == "write":
        write(folder, rest[0] if rest else "l7b")
    elif verb == "ours":
        print(json.dumps(ours(folder)[1]))
    else:
        theirs, found = bitsandbytes(folder)
        print(json.dumps(found), flush=True)
        print(json.dumps(compare(folder, theirs)))
