"""Compares two checkouts of loratune: the same commands must give the same losses and the same files, to the bit.

    python tools/compare_trees.py OLD NEW [--steps 50] [--json OUT]

OLD and NEW are folders that hold a `loratune` package. Each trains, through the command line and in float32 on a CPU,
the bundled model and five small random models of other architectures: one adapter with `train`, and three adapters of
different ranks, rates and seeds with `sweep`. Compared are the loss of every step, the held-out losses, and the bytes
of every adapter file. Use it to show that a change of structure does not change behaviour.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 5,
}
MODELS = ("pocket", "qwen3", "gemma2", "phi3", "gpt_neox", "qwen2_moe")
COMPARED = ("adapter_model.safetensors", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
JOBS = """
data = [{train}]
eval_data = [{held_out}]
tokens_per_row = 128
gradient_accumulation_steps = 2
max_steps = {steps}
eval_every_steps = {every}

[[job]]
name = "small"
r = 4
learning_rate = 1e-3

[[job]]
name = "wide"
r = 16
learning_rate = 2e-3
seed = 3

[[job]]
name = "dropout"
r = 8
lora_dropout = 0.1
learning_rate = 4e-3
"""


def main() -> None:
    """Runs both trees, compares, prints a line for each run, and exits with 1 on any difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the losses and hashes of both trees to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        box = given.new.resolve() / "loratune" / "box"
        inputs = prepare_inputs(Path(scratch), box, given.steps)
        trees = {name: getattr(given, name).resolve() for name in ("old", "new")}
        results = {name: run_tree(tree, inputs, Path(scratch) / name, given.steps) for name, tree in trees.items()}
    different = 0
    for run, old in results["old"].items():
        new = results["new"][run]
        faults = [key for key in old if old[key] != new.get(key)]
        different += bool(faults)
        verdict = f"DIFFERENT {faults}" if faults else "equal"
        print(f"{run:<20} {len(old['losses'])} losses, {len(old) - 1} files: {verdict}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(bool(different))


def prepare_inputs(scratch: Path, box: Path, steps: int) -> dict[str, Path]:
    """Writes the models, the data and the jobs file; returns model name -> folder, plus "data" and "jobs"."""
    import transformers as tf

    data = scratch / "data"
    data.mkdir()
    for name, count in (("train", 400), ("heldout", 24)):
        lines = (box / "data" / f"dates.{name}.jsonl").read_text().splitlines()[:count]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    paths = {
        name: json.dumps(str(data / f"{file}.jsonl")) for name, file in (("train", "train"), ("held_out", "heldout"))
    }
    jobs = scratch / "jobs.toml"
    jobs.write_text(JOBS.format(**paths, steps=steps, every=steps // 2))
    inputs = {"data": data, "jobs": jobs, "pocket": box / "model"}
    for name in MODELS[1:]:
        settings = SIZES | ({"moe_intermediate_size": 48, "num_experts": 4} if "moe" in name else {})
        if name in ("qwen3", "gemma2"):
            settings["head_dim"] = 16
        if name == "qwen2_moe":
            settings |= {"shared_expert_intermediate_size": 48, "num_experts_per_tok": 2}
        if name == "phi3":
            settings["pad_token_id"] = 0
        tf.set_seed(0)
        model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(name, **settings))
        inputs[name] = scratch / name
        model.save_pretrained(inputs[name])
        for file in TOKENIZER_FILES:
            shutil.copy(box / "model" / file, inputs[name])
    return inputs


def run_tree(tree: Path, inputs: dict[str, Path], out: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Trains everything with the package in `tree`; returns run name -> losses and file hashes."""
    out.mkdir()
    found = {}
    for model in MODELS:
        modules = ["--exclude-modules", "shared_expert_gate"] if model == "qwen2_moe" else []
        command(
            tree, "train", inputs[model], inputs["data"] / "train.jsonl", "--out", out / model,
            "--eval-data", inputs["data"] / "heldout.jsonl", "--max-steps", steps, "--eval-every-steps", steps // 2,
            "--save-every-steps", steps // 2, "--tokens-per-row", 128, "--gradient-accumulation-steps", 2,
            "--r", 8, "--lora-dropout", 0.05, "--learning-rate", 2e-3, "--device", "cpu", "--precision", "float32",
            "--cache-dir", "",
            *modules,
        )  # fmt: skip
        found[model] = read_run(out / model)
        if modules:
            continue  # a job has no key for excluded modules that both trees accept
        bank = out / f"{model}-bank"
        command(
            tree, "sweep", inputs[model], inputs["jobs"], "--out", bank, "--device", "cpu", "--precision", "float32"
        )
        for job in ("small", "wide", "dropout"):
            found[f"{model}-bank/{job}"] = read_run(next(bank.rglob(f"{job}/metrics.jsonl")).parent)
    return found


def command(tree: Path, *words: object) -> None:
    """Runs one verb with the package in `tree`, on one thread and with an empty cache."""
    with tempfile.TemporaryDirectory() as scratch:
        run_command(tree, Path(scratch), *words)


def run_command(tree: Path, scratch: Path, *words: object) -> None:
    """`command`, with the folder that serves as cache."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["XDG_CACHE_HOME"] = str(scratch)
    done = subprocess.run(
        [sys.executable, "-m", "loratune.cli", *map(str, words)],
        cwd=scratch, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{tree}: loratune {' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def read_run(folder: Path) -> dict[str, Any]:
    """The losses of a run, and the SHA-256 of every adapter file below its folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    files = sorted(path for path in folder.rglob("*") if path.name in COMPARED)
    return {"losses": losses} | {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


if __name__ == "__main__":
    main()
