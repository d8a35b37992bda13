"""The peers on the shapes of the ladder, measured like ours: one whole optimizer step, one JSON object per row.

    python -m benchmarks.peers SYSTEM SHAPE BATCH TOKENS [STEPS]
    python -m benchmarks.peers --all OUT.jsonl [SHAPE:BATCH:TOKENS[:SYSTEM] ...]   ours and theirs in turn

SYSTEM is peft, peft+liger or unsloth; the suffix `+gc` recomputes activations, `+nf4` uses a 4-bit base. `--all`
includes loratune, measured by `benchmarks.ladder`.

Random weights, r = 16 on all seven projections, AdamW (fused), `batch` sequences of `tokens` tokens, all tokens
trained. Each system runs in its own process with the settings its documentation recommends for speed: PEFT with
bfloat16 adapters and SDPA, plain or with Liger's kernels and fused loss; Unsloth from a local folder under
autocast, without gradient checkpointing unless `+gc` is given. A step lasts from the tokens on the device to the
end of the update; `first_step_s` from process start to the end of the first step.

Needs a GPU and the peers' packages (peft, liger-kernel, unsloth), which loratune itself does not need.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = ("l7b:4:2048", "l1b:1:512", "l1b:4:2048", "q0_6b:2:2048", "q8b:2:2048", "l7b:1:512")
SYSTEMS = ("peft", "peft+liger", "unsloth")
OURS = "loratune"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


def measure(system: str, shape: str, batch: int, tokens: int, steps: int) -> dict[str, object]:
    """Measures one system on one shape."""
    os.environ.update(_OFFLINE)
    model, autocast = _unsloth(shape, tokens, system) if "unsloth" in system else _peft(shape, system)
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator("cuda").manual_seed(1)
    seconds, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    for index in range(steps + 3):
        ids = torch.randint(0, 260, (batch, tokens), device="cuda", generator=generator)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if index == 0:
            first = time.perf_counter() - STARTED
    median = statistics.median(seconds[3:])
    return {
        "system": system.replace("+gc", "").replace("+nf4", ""), "shape": shape, "batch": batch, "tokens": tokens,
        "precision": "nf4" if "+nf4" in system else "bf16",
        "policy": "recompute" if "+gc" in system else "none", "tok_s": round(batch * tokens / median),
        "step_ms": round(median * 1e3, 2), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "first_step_s": round(first, 1),
        "losses": [round(value, 5) for value in losses[:4]], "machine": torch.cuda.get_device_name(),
        "trained": sum(p.numel() for p in parameters), "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the relevant packages that are installed."""
    found = {}
    for package in ("torch", "triton", "transformers", "peft", "liger-kernel", "unsloth", "trl", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _peft(shape: str, system: str) -> tuple[Any, bool]:
    if "liger" in system:
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3

        patch = apply_liger_kernel_to_qwen3 if shape.startswith("q") else apply_liger_kernel_to_llama
        patch(rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(_base(shape, "+nf4" in system), config, autocast_adapter_dtype=False)
    if "+gc" in system:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train(), False


def _base(shape: str, in_4_bits: bool) -> Any:
    from benchmarks.shapes import model_of

    if not in_4_bits:
        return model_of(shape)
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    form = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder_of(shape), dtype=torch.bfloat16, device_map={"": 0}, quantization_config=form
    )
    return model.requires_grad_(False)


def _unsloth(shape: str, tokens: int, system: str) -> tuple[Any, bool]:
    import unsloth  # isort: skip  (it must come before transformers)
    import torch

    folder = folder_of(shape)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit="+nf4" in system,
        load_in_8bit=False, local_files_only=True,
    )  # fmt: skip
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none", random_state=0,
        use_gradient_checkpointing="unsloth" if "+gc" in system else False,
    )  # fmt: skip
    return model.train(), True


def folder_of(shape: str) -> Path:
    """Folder with the random model and a byte tokenizer, written once to the temporary directory."""
    folder = Path(tempfile.gettempdir()) / f"random-{shape}"
    if not (folder / "complete").exists():
        write_folder(shape)
    return folder


def write_folder(shape: str, device: str = "cuda") -> None:
    """Writes the folder of `folder_of`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.shapes import model_of

    folder = Path(tempfile.gettempdir()) / f"random-{shape}"
    model_of(shape, device).save_pretrained(folder)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    (folder / "complete").touch()


def _all(out: Path, cases: list[str]) -> None:
    with out.open("a") as file:
        for case in cases:
            *shape, last = [*case.split(":"), ""][:4]
            asked = [last] if last else [*SYSTEMS, OURS]
            commands = [
                ["benchmarks.ladder", *shape, "graph"] if s == OURS else ["benchmarks.peers", s, *shape]
                for s in asked
            ]
            for command in commands:
                done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
                if done.returncode:
                    print(*command, done.stderr[-2000:], sep="\n", flush=True)
                    continue
                row = done.stdout.strip().splitlines()[-1]
                print(row, flush=True)
                file.write(row + "\n")
                file.flush()


def main() -> None:
    if sys.argv[1] == "--all":
        _all(Path(sys.argv[2]), sys.argv[3:] or list(CASES))
        return
    system, shape, batch, tokens, *steps = sys.argv[1:]
    print(json.dumps(measure(system, shape, int(batch), int(tokens), int(*steps or [8]))))


if __name__ == "__main__":
    main()
