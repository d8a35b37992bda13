"""Every mistake of a user ends in one clear error: status 2, no traceback, nothing written or overwritten.

Each case is a mistake at the real command line. The error must give the fault, its place and the nearest fix. The
working folder must stay the same to the byte: no output folder, no temporary file, no changed file.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from loratune import manifest
from loratune.box import MODEL_DIR
from tests.cli_lab import (
    CHAT,
    SHORT,
    TOKENIZER_FILES,
    Outcome,
    finish,
    loratune,
    small_model,
    start,
    tree,
    write_jsonl,
)


@dataclass(frozen=True)
class Lab:
    """A working folder with a small model `base`, an adapter of it `adapter`, and good data `chat.jsonl`."""

    here: Path

    def write(self, name: str, content: str | bytes) -> str:
        data = content.encode() if isinstance(content, str) else content
        (self.here / name).write_bytes(data)
        return name

    def jsonl(self, *records: dict[str, Any]) -> str:
        write_jsonl(self.here / "bad.jsonl", records)
        return "bad.jsonl"

    def edit_json(self, name: str, **changes: Any) -> None:
        path = self.here / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def link(self, name: str) -> None:
        """A link to nowhere, beside a second adapter and a file of jobs."""
        shutil.copytree(self.here / "adapter", self.here / "twin")
        (self.here / name).symlink_to("nowhere")
        self.write("jobs.toml", 'data = ["chat.jsonl"]\n')

    def remove(self, name: str) -> None:
        path = self.here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def tensors(self, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.here / name)
        change(tensors)
        save_file(tensors, self.here / name, {"format": "pt"})


class Case(NamedTuple):
    """One mistake: its name, its change to the working folder, its command, and text of the error."""

    name: str
    words: Callable[[Lab], list[str]]
    says: tuple[str, ...]


def train(*words: str, model: str = "base", data: str = "chat.jsonl") -> list[str]:
    return ["train", model, data, "--out", "out", *SHORT, *words]


def on(data: Callable[[Lab], str], *words: str) -> Callable[[Lab], list[str]]:
    """A training run on the data file that `data` writes."""
    return lambda lab: train(*words, data=data(lab))


def setting(*words: str) -> Callable[[Lab], list[str]]:
    return lambda lab: train(*words)


def toml(text: str, *words: str) -> Callable[[Lab], list[str]]:
    return lambda lab: ["train", "-c", lab.write("bad.toml", text), "--out", "out", *words]


def after(change: Callable[[Lab], object], *words: str) -> Callable[[Lab], list[str]]:
    """The command `words` after `broken` has damaged the folder."""

    def make(lab: Lab) -> list[str]:
        change(lab)
        return list(words) or train()

    return make


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"text of {role}"} for role in roles]}


def long(words: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "long " * words}, *GOOD["messages"][1:]]}


def plain(*words: str) -> Callable[[Lab], list[str]]:
    return lambda lab: list(words)


GOOD = turns("user", "assistant")
LATIN = os.fsdecode(b"caf\xe9")
RUN = 'model = "base"\ndata = ["chat.jsonl"]\n'


def encoder(folder: Path) -> None:
    """A BERT. transformers would load its weights as a causal model without a causal mask."""
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    tf.BertForMaskedLM(tf.BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL_DIR / name, folder)


DATA = [
    Case("missing data file", lambda lab: train(data="chta.jsonl"), ("chta.jsonl", "no such file", '"chat.jsonl"')),
    Case("data in a missing folder", lambda lab: train(data="no/x.jsonl"), ("no/x.jsonl", 'folder "no"')),
    Case("data is a folder", lambda lab: train(data="base"), ("base", "is a folder")),
    Case("empty data file", on(lambda lab: lab.write("e.jsonl", "")), ("e.jsonl", "empty")),
    Case("only blank lines", on(lambda lab: lab.write("e.jsonl", "\n\n")), ("e.jsonl", "no records")),
    Case(
        "broken JSON at line 3",
        on(lambda lab: lab.write("b.jsonl", json.dumps(GOOD) + "\n" + json.dumps(GOOD) + '\n{"messages": [}\n')),
        ("b.jsonl:3: broken JSON at column 15",),
    ),
    Case("broken JSON list", on(lambda lab: lab.write("b.json", '[\n{"text": "a"}\n{"text": "b"}]')), ("b.json:3",)),
    Case("JSON that is no list", on(lambda lab: lab.write("b.json", '"text"')), ("b.json:1", "list of objects")),
    Case(
        "wrong role",
        on(lambda lab: lab.jsonl(GOOD, turns("user", "assitant"))),
        ('bad.jsonl:2: message 2 has role "assitant"', 'Did you mean "assistant"?'),
    ),
    Case("no assistant turn", on(lambda lab: lab.jsonl(turns("user"))), ("bad.jsonl:1", "from the assistant")),
    Case("answer to nothing", on(lambda lab: lab.jsonl(turns("assistant"))), ("bad.jsonl:1", "answers nothing")),
    Case("empty messages", on(lambda lab: lab.jsonl({"messages": []})), ("bad.jsonl:1", "messages is empty")),
    Case("messages of numbers", on(lambda lab: lab.jsonl({"messages": [1]})), ("bad.jsonl:1: message 1", "object")),
    Case("content missing", on(lambda lab: lab.jsonl({"messages": [{"role": "user"}]})), ("bad.jsonl:1", "content")),
    Case(
        "unknown fields",
        on(lambda lab: lab.jsonl({"promt": "a", "answer": "b"})),
        ("bad.jsonl:1", '"promt", "answer"', 'Did you mean "prompt"?'),
    ),
    Case(
        "mixed formats",
        on(lambda lab: lab.jsonl(GOOD, {"text": "a"})),
        ("bad.jsonl:2", "text", "began with messages"),
    ),
    Case(
        "another format than named",
        on(lambda lab: "chat.jsonl", "--format", "alpaca"),
        ("chat.jsonl:1", '"instruction"'),
    ),
    Case(
        "invalid UTF-8",
        on(lambda lab: lab.write("l.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')),
        ("l.jsonl:2", "0xe9", "UTF-8"),
    ),
    Case("UTF-16", on(lambda lab: lab.write("u.txt", "text".encode("utf-16"))), ("u.txt:1", "UTF-16")),
    Case(
        "ragged CSV row",
        on(lambda lab: lab.write("r.csv", "prompt,completion\na,b\nc,d,e\n")),
        ("r.csv:3: 3 cells", "2 columns"),
    ),
    Case(
        "unknown extension", on(lambda lab: lab.write("d.jsonlines", "x")), ("d.jsonlines", "unknown kind", ".jsonl")
    ),
    Case("Parquet that is none", on(lambda lab: lab.write("d.parquet", "x")), ("d.parquet", "Parquet")),
    Case(
        "alpaca without output",
        on(lambda lab: lab.jsonl({"instruction": "a", "outputs": "b"})),
        ("bad.jsonl:1", 'no "output"', '"outputs"'),
    ),
    Case(
        "document longer than a row",
        on(lambda lab: lab.jsonl(GOOD, long(90))),
        ("bad.jsonl:2", "64", "--truncate", "--tokens-per-row"),
    ),
    Case(
        "document longer than the model's context",
        on(lambda lab: lab.jsonl(GOOD, long(300)), "--tokens-per-row", "2048"),
        ("bad.jsonl:2", "256", "--truncate"),
    ),
    Case("a single record", on(lambda lab: lab.jsonl(GOOD)), ("bad.jsonl:1", "--eval-fraction 0")),
    Case(
        "held-out file missing",
        setting("--eval-data", "held.jsonl"),
        ("held.jsonl", "no such file"),
    ),
]

SETTINGS = [
    Case("unknown command", plain("trian"), ('unknown command "trian"', 'Did you mean "train"?')),
    Case("unknown flag", setting("--lerning-rate", "1"), ("--lerning-rate", "--learning-rate")),
    Case("no arguments", plain("train"), ("MODEL", "--out DIR")),
    Case("flag without its value", setting("--r"), ("--r",)),
    Case("word for a number", setting("--r", "many"), ("--r", "many")),
    Case("word that is no choice", setting("--precision", "bf16"), ("--precision", "bfloat16")),
    Case("no data", plain("train", "base", "--out", "out"), ("no training data",)),
    Case("no data to evaluate", plain("eval", "adapter"), ("no data files given",)),
    Case("no data to preview", plain("preview", "base"), ("no data files given",)),
    Case("nobody to chat with", plain("chat"), ("no adapter or base model given",)),
    Case("merge to nowhere", plain("merge", "adapter"), ("--out DIR",)),
    Case("one word too many", plain("inspect", "adapter", "base"), ("Unrecognized options: base",)),
    Case(
        "negative alpha for a layer", setting("--alpha-pattern", "q_proj", "-1"), ('alpha_pattern["q_proj"] is -1',)
    ),
    Case("no output folder", plain("train", "base", "chat.jsonl"), ("--out",)),
    Case("rank 0", setting("--r", "0"), ("r is 0", "at least 1")),
    Case("negative rate", setting("--learning-rate", "-1"), ("learning_rate is -1.0", "positive")),
    Case("rate that is not a number", setting("--learning-rate", "nan"), ("learning_rate is nan",)),
    Case("infinite alpha", setting("--lora-alpha", "inf"), ("lora_alpha is inf", "finite")),
    Case("dropout 1", setting("--lora-dropout", "1.0"), ("lora_dropout is 1.0", "p < 1")),
    Case("all held out", setting("--eval-fraction", "1"), ("eval_fraction is 1.0", "share < 1")),
    Case("no steps", setting("--max-steps", "0"), ("max_steps is 0", "at least 1")),
    Case("one token a row", setting("--tokens-per-row", "1"), ("tokens_per_row is 1", "at least 2")),
    Case("unknown setting in TOML", toml(RUN + "[lora]\nrnak = 1\n"), ("bad.toml", "[lora]", '"rnak"')),
    Case("near setting in TOML", toml(RUN + "[lora]\nlora_alhpa = 1\n"), ("bad.toml [lora]", '"lora_alpha"')),
    Case("wrong type in TOML", toml(RUN + '[lora]\nr = "8"\n'), ("bad.toml [lora]", "r = '8'", "whole number")),
    Case("section as a value", toml(RUN + "lora = 8\n"), ("bad.toml", "lora = 8", "[lora]")),
    Case("wrong section", toml(RUN + "[lora]\nlearning_rate = 1.0\n"), ("learning_rate", "[training]")),
    Case("no section", toml(RUN + "r = 8\n"), ('unknown setting "r"', "[lora]")),
    Case("range in TOML", toml(RUN + "[lora]\nr = 0\n"), ("bad.toml", "r is 0")),
    Case("broken TOML", toml(RUN + "[lora\n"), ("bad.toml", "line 3")),
    Case(
        "TOML in Latin-1",
        lambda lab: ["train", "-c", lab.write("l.toml", b'out = "\xe9"')],
        ("l.toml:1", "byte 0xe9", "UTF-8"),
    ),
    Case("missing TOML", plain("train", "-c", "rnu.toml", "--out", "out"), ("rnu.toml", "No such file")),
    Case("-c without its value", plain("train", "-c"), ("-c needs a value",)),
    Case("unknown tracker", setting("--log-to", "wandbb"), ("wandb",)),
    Case("tracker that is not installed", setting("--log-to", "wandb"), ("wandb", "pip install")),
    Case("unknown device", setting("--device", "gpu"), ("gpu", "cuda")),
    Case("unknown target", setting("--target-modules", "q_porj"), ('"q_porj"', '"q_proj"')),
    Case("unlike any target", setting("--target-modules", "xyz"), ('"xyz"', "Layers here: ", "q_proj")),
    Case("broken expression", setting("--target-modules", "(q_proj"), ("(q_proj",)),
    Case(
        "expression in TOML that fits nothing",
        toml(RUN + '[lora]\ntarget_modules = ".*query"\n'),
        ('".*query"', "Layers here: "),
    ),
    Case("broken expression in TOML", toml(RUN + '[lora]\ntarget_modules = "(q"\n'), ('"(q"', "regular expression")),
    Case("exclusion of nothing", setting("--exclude-modules", "q_prj"), ("exclude_modules", '"q_proj"')),
    Case("everything excluded", setting("--exclude-modules", ".*proj"), ("exclude_modules", "no layer")),
    Case("rank above the layer", setting("--r", "64"), ("rank 64", "32", "rank_pattern")),
    Case("modules_to_save of nothing", setting("--modules-to-save", "lm_haed"), ("lm_haed", '"lm_head"')),
    Case("bias where there is none", setting("--bias", "all"), ("bias", "none")),
    Case("missing layer", setting("--layers-to-transform", "7"), ("layers_to_transform 7", "layers 0 to 1")),
    Case("missing chat template", setting("--chat-template", "t.jinja"), ("t.jinja", "cannot be read")),
    Case(
        "broken chat template",
        lambda lab: train("--chat-template", lab.write("t.jinja", "{% for m in %}")),
        ("t.jinja:1", "Jinja"),
    ),
    Case(
        "template without a stop",
        lambda lab: train(
            "--chat-template", lab.write("t.jinja", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
        ),
        ("chat.jsonl:", "stop token", "--chat-template"),
    ),
]

MODELS = [
    Case("missing model", lambda lab: train(model="bsae"), ("bsae: no such folder", '"base"')),
    Case("missing model by path", lambda lab: train(model="./bsae"), ("no such folder", '"base"')),
    Case("model is a file", lambda lab: train(model="chat.jsonl"), ("chat.jsonl", "is a file")),
    Case("no config.json", after(lambda lab: lab.remove("base/config.json")), ("base", "config.json")),
    Case("config.json broken", after(lambda lab: lab.write("base/config.json", "{")), ("base", "config")),
    Case(
        "unknown architecture",
        after(lambda lab: lab.edit_json("base/config.json", model_type="lama", architectures=["Lama"])),
        ("base", "lama"),
    ),
    Case(
        "encoder",
        after(lambda lab: encoder(lab.here / "encoder"), *train(model="encoder")),
        ("encoder", "BertForMaskedLM is not a causal language model"),
    ),
    Case(
        "no tokenizer",
        after(lambda lab: [lab.remove(f"base/{n}") for n in ("tokenizer.json", "tokenizer_config.json")]),
        ("base", "no tokenizer"),
    ),
    Case("tokenizer broken", after(lambda lab: lab.write("base/tokenizer.json", "{")), ("base", "tokenizer")),
    Case("no weights", after(lambda lab: lab.remove("base/model.safetensors")), ("base", "no weights")),
    Case(
        "pickled weights",
        after(lambda lab: (lab.here / "base/model.safetensors").rename(lab.here / "base/pytorch_model.bin")),
        ("base", "pytorch_model.bin", "can run code", "safetensors"),
    ),
    Case(
        "truncated weights",
        after(lambda lab: os.truncate(lab.here / "base/model.safetensors", 5000)),
        ("base", "cannot be read as safetensors"),
    ),
    Case(
        "missing tensors",
        after(lambda lab: lab.tensors("base/model.safetensors", lambda t: t.pop("model.norm.weight"))),
        ("base", "missing", "model.norm.weight"),
    ),
    Case(
        "tensors of another size",
        after(lambda lab: lab.edit_json("base/config.json", intermediate_size=40)),
        ("base", "wrong shape", "model.layers.0.mlp"),
    ),
    Case("adapter as a base", lambda lab: train(model="adapter"), ("adapter", "not a base model", "base")),
    Case(
        "no chat template for chat data",
        after(lambda lab: lab.remove("base/chat_template.jinja")),
        ("chat template", "--chat-template"),
    ),
]

ADAPTERS = [
    Case("merge of a base", plain("merge", "base", "--out", "out"), ("base", "base model", "adapter")),
    Case("inspection of a base", plain("inspect", "base"), ("base", "adapter_config.json")),
    Case("inspection of nothing", plain("inspect", "adpater"), ("adpater", '"adapter"')),
    Case("chat with nothing", plain("chat", "adpater"), ("adpater", '"adapter"')),
    Case("chat with an empty folder", after(lambda lab: (lab.here / "e").mkdir(), "chat", "e"), ("e", "adapter")),
    Case("adapter of another model", plain("chat", "adapter", "--model", "other"), ("adapter", "another model")),
    Case(
        "evaluation on another model",
        plain("eval", "adapter", "chat.jsonl", "--model", "other"),
        ("adapter", "another model"),
    ),
    Case(
        "adapters of two bases",
        after(
            lambda lab: [
                shutil.copytree(lab.here / "adapter", lab.here / "second"),
                (lab.here / "second/run.toml").unlink(),
                (lab.here / "second/identity.json").unlink(),
                lab.edit_json("second/adapter_config.json", base_model_name_or_path="other"),
            ],
            "chat",
            "adapter",
            "second",
        ),
        ("second belongs to other", "--model"),
    ),
    Case("an adapter named twice", plain("chat", "adapter", "adapter"), ("twice",)),
    Case("adapter and base", plain("chat", "adapter", "base"), ("base", "adapter")),
    Case(
        "unexpected tensors",
        after(
            lambda lab: [
                lab.remove("adapter/manifest.json"),  # as if another program had written the tensors
                lab.tensors("adapter/adapter_model.safetensors", lambda t: t.update(x=torch.ones(1))),
            ],
            "chat",
            "adapter",
        ),
        ("adapter", "unexpected", "x"),
    ),
    Case(
        "missing adapter tensors",
        after(
            lambda lab: [
                lab.remove("adapter/manifest.json"),
                lab.tensors("adapter/adapter_model.safetensors", lambda t: t.pop(min(t))),
            ],
            "eval",
            "adapter",
            "chat.jsonl",
        ),
        ("adapter", "missing", "lora_A"),
    ),
    Case(
        "pickled adapter",
        after(
            lambda lab: (lab.here / "adapter/adapter_model.safetensors").rename(
                lab.here / "adapter/adapter_model.bin"
            ),
            "merge",
            "adapter",
            "--out",
            "out",
        ),
        ("adapter_model.bin", "pickle", "convert"),
    ),
    Case(
        "corrupt adapter",
        after(lambda lab: os.truncate(lab.here / "adapter/adapter_model.safetensors", 500), "inspect", "adapter"),
        ("adapter_model.safetensors", "damaged"),
    ),
    Case(
        "broken adapter_config.json",
        after(lambda lab: lab.write("adapter/adapter_config.json", "{"), "chat", "adapter"),
        ("adapter_config.json", "not JSON", "line 1"),
    ),
    Case(
        "another kind of adapter",
        after(lambda lab: lab.edit_json("adapter/adapter_config.json", peft_type="IA3"), "inspect", "adapter"),
        ("adapter_config.json", "IA3", "LORA"),
    ),
    Case(
        "a variant that is not implemented",
        after(lambda lab: lab.edit_json("adapter/adapter_config.json", use_qalora=True), "chat", "adapter"),
        ("adapter_config.json", "use_qalora"),
    ),
    Case(
        "base that is gone",
        after(
            lambda lab: [
                lab.remove("base"),
                lab.edit_json("adapter/adapter_config.json", base_model_name_or_path="gone"),
            ],
            "chat",
            "adapter",
        ),
        ("adapter", "its base model (base or gone) is not here", "--model"),
    ),
    Case(
        "run.toml damaged",
        after(lambda lab: lab.write("adapter/run.toml", "model = \n"), "chat", "adapter"),
        ("adapter/run.toml", "line 1"),
    ),
    Case(
        "prompts that are gone",
        after(lambda lab: lab.remove("chat.jsonl"), "merge", "adapter", "--out", "out"),
        ("--data",),
    ),
    Case("raw text to answer", on(lambda lab: lab.write("t.txt", "text")), ("t.txt:1", "--eval-fraction")),
    Case(
        "answers to raw text",
        lambda lab: ["eval", "adapter", lab.write("t.txt", "text")],
        ("t.txt:1", "--no-generate"),
    ),
    Case(
        "run.toml without a model",
        after(lambda lab: lab.write("adapter/run.toml", "out = 'a'\n"), "chat", "adapter"),
        ("adapter/run.toml: model is missing",),
    ),
    Case("limit 0", plain("eval", "adapter", "chat.jsonl", "--limit", "0"), ("limit is 0", "at least 1")),
    Case("no new tokens", plain("eval", "adapter", "chat.jsonl", "--max-new-tokens", "0"), ("max_new_tokens", "1")),
    Case("negative temperature", plain("chat", "adapter", "--temperature", "-1"), ("temperature", "-1")),
    Case("top_p 0", plain("chat", "adapter", "--top-p", "0"), ("top_p", "0")),
]

OUTPUT = [
    Case("output exists", lambda lab: train("--out", "adapter"), ("adapter: exists already", "--overwrite")),
    Case("output is a file", lambda lab: train("--out", "chat.jsonl"), ("chat.jsonl", "exists")),
    Case(
        "output is a file, to overwrite",
        lambda lab: train("--out", "chat.jsonl", "--overwrite"),
        ("chat.jsonl", "a file"),
    ),
    Case("output below a file", lambda lab: train("--out", "chat.jsonl/out"), ("chat.jsonl", "Not a directory")),
    Case("output is not a run", lambda lab: train("--out", "base", "--overwrite"), ("base", "not a run")),
    Case("output in /proc", lambda lab: train("--out", "/proc/out"), ("/proc/out", "cannot write")),
    *(
        Case(
            f"{verb} to a link", after(lambda lab: lab.link("gone"), *words), ("gone: is a link to a missing place",)
        )
        for verb, words in {
            "train": train("--out", "gone/inner"),
            "sweep": ["sweep", "base", "jobs.toml", "--out", "gone"],
            "merge": ["merge", "adapter", "--out", "gone"],
            "combine": ["combine", "adapter", "twin", "--out", "gone"],
            "resize": ["resize", "adapter", "--rank", "1", "--out", "gone"],
            "extract": ["extract", "base", "--base", "base", "--out", "gone/inner"],
            "quantise": ["quantise", "base", "--out", "gone"],
            "demo": ["demo", "--out", "gone"],
        }.items()
    ),
    *(
        Case(f"{words[0]} with a name in Latin-1", plain(*words), ("caf\\udce9", "not UTF-8", "rename"))
        for words in (
            train("--out", LATIN),
            train(model=LATIN),
            train(data=LATIN),
            train("--chat-template", LATIN),
            ["chat", LATIN],
            ["inspect", LATIN],
        )
    ),
    Case("merge onto a folder", plain("merge", "adapter", "--out", "other"), ("other", "exists", "--overwrite")),
    Case(
        "merge onto its base",
        plain("merge", "adapter", "--out", "base", "--overwrite"),
        ("base", "would overwrite"),
    ),
    Case(
        "merge onto the adapter",
        plain("merge", "adapter", "--out", "adapter", "--overwrite"),
        ("adapter", "would overwrite"),
    ),
    Case("merge into /proc", plain("merge", "adapter", "--out", "/proc/out"), ("/proc/out", "cannot write")),
    Case("demo onto a folder", plain("demo", "--out", "other"), ("other", "exists", "--overwrite")),
]

RESUME = [
    Case("resume without a run", plain("train", "--resume", "--out", "out"), ("out", "resume")),
    Case("resume a misspelt run", plain("train", "--resume", "--out", "adpater"), ("adpater", '"adapter"')),
    Case(
        "resume without a checkpoint",
        after(lambda lab: lab.remove("adapter/checkpoints"), "train", "--resume", "--out", "adapter"),
        ("adapter", "no checkpoint", "--overwrite"),
    ),
    Case(
        "resume a complete run", plain("train", "--resume", "--out", "adapter"), ("adapter", "complete", "--epochs")
    ),
    *(
        Case(f"resume with another {name}", plain("train", "--resume", "--out", "adapter", *words), says)
        for name, words, says in (
            ("seed", ("--seed", "7"), ("training.seed", "0", "7")),
            ("rank", ("--r", "4"), ("lora.r", "2", "4")),
            ("rate", ("--learning-rate", "0.5"), ("training.learning_rate", "0.0018", "0.5")),
            ("schedule", ("--lr-scheduler-type", "linear"), ("training.lr_scheduler_type", "cosine", "linear")),
            ("row", ("--tokens-per-row", "128"), ("dataset.tokens_per_row", "64", "128")),
            ("number of steps, lower", ("--max-steps", "1"), ("training.max_steps", "2", "1")),
            ("model", ("--max-steps", "9", "other", "chat.jsonl"), ("model", "base", "other")),
        )
    ),
    Case(
        "resume on changed data",
        after(
            lambda lab: write_jsonl(lab.here / "chat.jsonl", CHAT[::-1]),
            "train",
            "--resume",
            "--out",
            "adapter",
            "--max-steps",
            "9",
        ),
        ("chat.jsonl", "changed"),
    ),
    Case(
        "resume from damaged checkpoints",
        after(
            lambda lab: [file.write_text("{") for file in lab.here.glob("adapter/checkpoints/*/progress.json")],
            "train",
            "--resume",
            "--out",
            "adapter",
            "--max-steps",
            "9",
        ),
        ("no checkpoint is intact", "progress.json is damaged", "--overwrite"),
    ),
    Case(
        "resume on changed weights",
        after(
            lambda lab: lab.tensors("base/model.safetensors", lambda t: t[min(t)].view(-1)[7:8].add_(1)),
            "train",
            "--resume",
            "--out",
            "adapter",
            "--max-steps",
            "9",
        ),
        ("adapter: the base model", "has changed since the training", "--overwrite"),
    ),
    Case(
        "adapter of changed weights",
        after(
            lambda lab: lab.tensors("base/model.safetensors", lambda t: t[min(t)].view(-1)[7:8].add_(1)),
            "merge",
            "adapter",
            "--out",
            "out",
        ),
        ("adapter: the base model", "has changed since the training", "--model"),
    ),
    Case(
        "adapter without its template",
        after(lambda lab: lab.remove("adapter/chat_template.jinja"), "chat", "adapter"),
        ("chat_template.jinja", "missing", "--chat-template"),
    ),
    Case(
        "damaged identity",
        after(lambda lab: lab.write("adapter/identity.json", "{"), "chat", "adapter"),
        ("adapter/identity.json", "damaged"),
    ),
]

CASES = [*DATA, *SETTINGS, *MODELS, *ADAPTERS, *OUTPUT, *RESUME]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder. Every case gets a copy."""
    here = tmp_path_factory.mktemp("bad_input")
    small_model(here / "base")
    small_model(here / "other", hidden_size=48)
    write_jsonl(here / "chat.jsonl", CHAT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        made = loratune(*train("--max-steps", "2"), "--out", "adapter")
    assert made.status == 0, made.err
    return here


@pytest.fixture
def lab(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    here = tmp_path / "lab"
    shutil.copytree(template, here)
    for name in ("identity.json", "adapter_config.json"):  # as if the adapter had been trained here
        recorded = here / "adapter" / name
        recorded.write_text(recorded.read_text().replace(str(template), str(here)))
    found = manifest.read(here / "adapter")
    assert found is not None
    manifest.write(here / "adapter", found.run, found.step, found.files)
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "200")
    return Lab(here)


def words_of(text: str) -> str:
    """The text without line breaks and without the box of the argument parser."""
    return " ".join(re.sub(r"[╭╮╰╯│─|+]", " ", text).split())


def check(outcome: Outcome, says: tuple[str, ...]) -> None:
    """One clear error on standard error."""
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert len(re.findall("^error: |For full helptext", outcome.err, re.MULTILINE)) == 1, outcome.err
    for said in says:
        assert said in words_of(outcome.err), outcome.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_one_clear_error_and_nothing_written(case: Case, lab: Lab) -> None:
    words = case.words(lab)
    before = tree(lab.here)
    outcome = loratune(*words)
    check(outcome, case.says)
    assert tree(lab.here) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_gpu_that_is_not_there(lab: Lab) -> None:
    before = tree(lab.here)
    check(loratune(*train("--device", "cuda")), ("device cuda", "no CUDA GPU"))
    assert tree(lab.here) == before


def test_a_real_process_says_the_same(lab: Lab) -> None:
    """Status, streams and folder in a process of its own, for mistakes found early and late."""
    os.truncate(lab.here / "adapter/adapter_model.safetensors", 500)
    lab.jsonl(turns("user", "assitant"))
    before = tree(lab.here)
    mistakes = {
        "did-you-mean": (["trian"], ("unknown command",)),
        "flag": (train("--lerning-rate", "1"), ("--learning-rate",)),
        "data": (train(data="bad.jsonl"), ("bad.jsonl:1: message 2", "assistant")),
        "adapter": (["inspect", "adapter"], ("damaged",)),
    }
    processes = {name: start(*words, cwd=lab.here) for name, (words, _) in mistakes.items()}
    for name, process in processes.items():
        outcome = finish(process)
        check(outcome, mistakes[name][1])
        assert outcome.out == ""
    assert tree(lab.here) == before


def test_without_a_network_a_hub_id_fails_in_seconds(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server listens on port 9. The libraries alone would retry for a minute."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(lab.here.parent / "hub"))
    before = tree(lab.here)
    started = time.monotonic()
    model = start(*train(model="someone/model"), cwd=lab.here)
    data = start("train", "base", "someone/data", "--out", "out-of-data", *SHORT, cwd=lab.here)
    check(finish(model), ("someone/model", "not downloaded before", "cannot be reached"))
    check(finish(data), ("someone/data", "not downloaded before", "cannot be reached"))
    assert time.monotonic() - started < 45  # nearly all of it is importing torch, in two processes at once
    assert tree(lab.here) == before


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Limits the size of files of this process. Writes then fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system mounted at `folder`. Skips the test if mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_whole(folder: Path) -> None:
    """Every file in the folder is complete, and none has a temporary name."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        match path.suffix:
            case ".safetensors":
                load_file(path)
            case ".json":
                json.loads(path.read_text())
            case ".jsonl":
                assert [json.loads(line) for line in path.read_text().splitlines()]
            case ".toml":
                tomllib.loads(path.read_text())


def test_a_disk_that_fills_up_while_training(lab: Lab) -> None:
    with files_of_at_most(12_000):  # the adapter has 16 KiB
        check(loratune(*train("--r", "8", "--max-steps", "3")), ("out/checkpoints/step-000001", "cannot be written"))
    assert_whole(lab.here / "out")


def test_a_disk_that_fills_up_while_merging(lab: Lab) -> None:
    before = tree(lab.here)
    with files_of_at_most(100_000):
        check(loratune("merge", "adapter", "--out", "out"), ("out", "cannot be written"))
    assert tree(lab.here) == before


def test_a_full_disk(lab: Lab) -> None:
    with mounted(lab.here / "small", "size=64k"):
        check(loratune(*train("--r", "8"), "--out", "small/out"), ("small/out", "cannot be written", "No space left"))
        assert_whole(lab.here / "small")
        check(loratune("merge", "adapter", "--out", "small/merged"), ("small/merged", "needs", "are free"))
        assert not (lab.here / "small/merged").exists()


def test_a_read_only_disk(lab: Lab) -> None:
    with mounted(lab.here / "disk", "ro"):
        for words in (
            train("--out", "disk/out"),
            ["merge", "adapter", "--out", "disk/out"],
            ["demo", "--out", "disk/d"],
        ):
            check(loratune(*words), ("disk/", "cannot write", "Read-only file system"))
        assert not any((lab.here / "disk").iterdir())


def test_a_cache_that_cannot_be_written(lab: Lab) -> None:
    before = tree(lab.here)
    check(loratune(*train("--cache-dir", "/proc/cache")), ("/proc/cache", "cannot be written", "--cache-dir"))
    assert tree(lab.here) == before


def test_overwrite_replaces_what_a_run_left_and_nothing_else(lab: Lab) -> None:
    """With --overwrite the same commands work, and a user's own file in the folder stays."""
    lab.write("adapter/mine.txt", "keep")
    old = (lab.here / "adapter/adapter_model.safetensors").read_bytes()
    done = loratune(*train("--max-steps", "1", "--seed", "3"), "--out", "adapter", "--overwrite")
    assert done.status == 0, done.err
    assert (lab.here / "adapter/mine.txt").read_text() == "keep"
    assert (lab.here / "adapter/adapter_model.safetensors").read_bytes() != old
    assert [path.name for path in (lab.here / "adapter/checkpoints").glob("step-*")] == ["step-000001"]
