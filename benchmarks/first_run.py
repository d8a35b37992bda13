"""The first run: `loratune train` without flags against a small tuned sweep, on eight data sets.

    python -m benchmarks.first_run build/first-run [NAME ...]    # one JSON line per data set
    python -m benchmarks.first_run --table build/first-run       # the table of docs/first-run.md
    python -m benchmarks.first_run OUT --model FOLDER --device cuda --together

A data set is made from a fixed seed. The sweep tries three rates and two numbers of steps, with the rows of the first
run, and takes the run with the best held-out metric. The metric is exact match of generated answers on records that
neither run has seen; for raw text, perplexity, of which the inverse is compared. Times are training and evaluation
during training, without loading.

The runs of the sweep follow each other, so that each has a time of its own. `--together` trains them in one bank, as
`loratune sweep` does, and the sweep has one time. The larger model comes from

    python -m tools.pocket.pretrain --size middle --seconds 200 --tokenizer loratune/box/model --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.box import data_file
from loratune.config import DataConfig, RunConfig
from loratune.data.records import read_records
from loratune.infer.opened import open_folders, read_run
from loratune.lora.inject import activate
from loratune.runs import metrics
from loratune.runs.evaluation import evaluate
from loratune.runs.run import Prepared, run
from loratune.sweep.plan import read_plan
from loratune.sweep.run import Ready, sweep

RATES = (6e-4, 1.8e-3, 4e-3)
STEPS = (60, 180)
STEPS_OF = {"long documents": (20, 60)}
"""Shorter sweeps, where a step has thousands of tokens."""
HELD_OUT = 100

Records = list[dict[str, Any]]
_WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "cold",
    "warm",
    "fast",
    "slow",
    "round",
    "flat",
    "dark",
    "light",
    "dry",
    "wet",
    "soft",
    "hard",
    "clean",
]
_THINGS = [
    "cup", "lamp", "chair", "book", "coat", "door", "key", "map", "ring", "shoe",
    "box", "hat", "bag", "pen", "clock", "plate", "spoon", "knife", "rope", "stone",
]  # fmt: skip
_NAMES = [
    "Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ines", "Jon",
    "Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma",
]  # fmt: skip
_CITIES = ["Oslo", "Paris", "Rome", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Tokyo", "Bern"]
_GOOD = ["love", "great", "happy", "perfect", "lovely", "superb"]
_BAD = ["hate", "awful", "sad", "broken", "ugly", "poor"]


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def classification(rng: random.Random) -> dict[str, Any]:
    """A review -> positive or negative."""
    good = rng.random() < 0.5
    word = rng.choice(_GOOD if good else _BAD)
    text = f"The {rng.choice(_WORDS)} {rng.choice(_THINGS)} from {rng.choice(_CITIES)} is {word}."
    return _chat(text, "positive" if good else "negative")


def extraction(rng: random.Random) -> dict[str, Any]:
    """A sentence, as prompt and completion without a template -> name and city."""
    name, city = rng.choice(_NAMES), rng.choice(_CITIES)
    shapes = ("{n} moved to {c} in {y}.", "Since {y}, {n} lives in {c}.", "In {c} we met {n} in {y}.")
    text = rng.choice(shapes).format(n=name, c=city, y=rng.randint(1950, 2020))
    return {"prompt": f"{text}\n", "completion": f"name={name}; city={city}"}


def conversation(rng: random.Random) -> dict[str, Any]:
    """Two turns; the second answer needs the first."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    asked = [("My name is {}.", "Hello {}!"), ("Who am I?", "You are {}, and you want a {}.")]
    first = {"role": "user", "content": asked[0][0].format(name) + f" I want a {thing}."}
    turns = [first, {"role": "assistant", "content": asked[0][1].format(name)}]
    turns += [{"role": "user", "content": asked[1][0]}]
    return {"messages": [*turns, {"role": "assistant", "content": asked[1][1].format(name, thing)}]}


def raw_text(rng: random.Random) -> dict[str, Any]:
    """Sentences of a small grammar, without questions."""
    parts = []
    for _ in range(rng.randint(2, 5)):
        a, b = rng.sample(_THINGS, 2)
        parts.append(f"{rng.choice(_NAMES)} put the {rng.choice(_WORDS)} {a} under the {rng.choice(_WORDS)} {b}.")
    return {"text": " ".join(parts)}


def long_document(rng: random.Random) -> dict[str, Any]:
    """A text of about two hundred tokens with one code in it -> the code."""
    lines = [f"{rng.choice(_NAMES)} saw a {rng.choice(_WORDS)} {rng.choice(_THINGS)}." for _ in range(14)]
    code = f"{rng.choice(_WORDS)}-{rng.choice(_THINGS)}"
    lines.insert(rng.randrange(len(lines)), f"The code is {code}.")
    return _chat(" ".join(lines) + " What is the code?", code)


def chinese(rng: random.Random) -> dict[str, Any]:
    """A price in Chinese -> item and number."""
    item, price = rng.choice(["苹果", "米饭", "牛奶", "面包", "茶叶", "鸡蛋"]), rng.randint(2, 99)
    shapes = ("{i}每斤{p}元。", "我买了{p}元的{i}。", "今天{i}的价格是{p}元。")
    return _chat(rng.choice(shapes).format(i=item, p=price), f"{item}：{price}")


def _made(kind: Callable[[random.Random], dict[str, Any]], count: int) -> tuple[Records, Records]:
    rng = random.Random(kind.__name__)
    return [kind(rng) for _ in range(count)], [kind(rng) for _ in range(HELD_OUT)]


def _of_the_box(task: str, count: int) -> tuple[Records, Records]:
    files = (data_file(task, part) for part in ("train", "heldout"))
    train, held = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return train[:count], held[:HELD_OUT]


DATA: dict[str, Callable[[], tuple[Records, Records]]] = {
    "classification": lambda: _made(classification, 100),
    "extraction": lambda: _made(extraction, 500),
    "conversation": lambda: _made(conversation, 300),
    "raw text": lambda: _made(raw_text, 400),
    "dates": lambda: _of_the_box("dates", 2_400),
    "orders": lambda: _of_the_box("orders", 800),
    "long documents": lambda: _made(long_document, 100),
    "chinese": lambda: _made(chinese, 20_000),
}


def measure(
    name: str,
    folder: Path,
    *,
    model: str = "loratune/pocket",
    device: str = "cpu",
    together: bool = False,
    rates: tuple[float, ...] = RATES,
    steps: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Trains without flags and in the sweep; returns metrics and seconds of all runs.

    Args:
        name: a key of `DATA`.
        folder: where data and runs are written.
        together: train the sweep in one bank.
        rates, steps: the grid of the sweep.
    """
    train, held = DATA[name]()
    files = {"train": folder / "train.jsonl", "held": folder / "held.jsonl"}
    for file, records in ((files["train"], train), (files["held"], held)):
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    plain = RunConfig(model=model, data=[str(files["train"])], out=str(folder / "plain"), device=device)
    seconds = {"plain": _seconds(run(plain), Prepared)}
    chosen = read_run(plain.out)
    assert chosen is not None
    grid = [(rate, count) for rate in rates for count in steps or STEPS_OF.get(name, STEPS)]
    if together:
        whole, names = _together(chosen, grid, folder)
    else:
        names = [f"{rate}-{count}" for rate, count in grid]
        for job, (rate, count) in zip(names, grid, strict=True):
            training = replace(chosen.training, learning_rate=rate, max_steps=count, epochs=None)
            seconds[job] = _seconds(run(replace(chosen, out=str(folder / job), training=training)), Prepared)
            print(name, job, f"{seconds[job]:.1f} s", file=sys.stderr, flush=True)
        whole = sum(seconds[job] for job in names)
    outs = [plain.out, *(str(folder / job) for job in names)]
    first, *others = (
        measured | ({"seconds": round(seconds[job], 1)} if job in seconds else {})
        for job, measured in zip(["plain", *names], _measured(outs, files["held"], device), strict=True)
    )
    result = {"data": name, "model": model, "records": len(train), "no flags": first}
    return result | {"sweep": others, "sweep seconds": round(whole, 1)}


def _seconds(events: Iterable[object], first: type[object]) -> float:
    """Duration of a run from its event `first`, which precedes the first step, to its end."""
    started = 0.0
    for event in events:
        if isinstance(event, first):
            started = time.perf_counter()
    return time.perf_counter() - started


def _together(chosen: RunConfig, grid: list[tuple[float, int]], folder: Path) -> tuple[float, list[str]]:
    """Trains a sweep in one bank. Returns its seconds and the folders of its jobs, relative to `folder`."""
    lines = [f"data = {json.dumps(chosen.data)}", f"tokens_per_row = {chosen.dataset.tokens_per_row}"]
    lines += [f"gradient_accumulation_steps = {chosen.training.gradient_accumulation_steps}"]
    for number, (rate, count) in enumerate(grid, start=1):
        lines += ["[[job]]", f'name = "job{number}"', f"learning_rate = {rate}", f"max_steps = {count}"]
    file, out = folder / "jobs.toml", folder / "sweep"
    file.write_text("\n".join(lines) + "\n")
    plan = read_plan(str(file), model=chosen.model, out=str(out), device=chosen.device)
    seconds = _seconds(sweep(plan, file.read_text(), str(out)), Ready)
    return seconds, [f"sweep/{job.name}" for job in plan.jobs]


def _measured(folders: list[str], held: Path, device: str) -> Iterator[dict[str, Any]]:
    """Held-out metric and settings of each run."""
    opened = open_folders(folders, device=device)
    records = read_records([str(held)])
    for name, folder in opened.adapters.items():
        activate(opened.model, name)
        measured = evaluate(
            opened.model,
            opened.tokenizer,
            records,
            name=name,
            stop_ids=opened.stop_ids,
            settings=DataConfig(),
            generate=records[0].text is None,
        )
        settings = read_run(folder)
        assert measured.loss is not None
        assert settings is not None
        steps = [line["step"] for line in metrics.read(folder / "metrics.jsonl")]
        yield {
            "metric": round(1 / measured.loss.perplexity if measured.exact is None else measured.exact.share, 4),
            "loss": round(measured.loss.nats_per_token, 4),
            "steps": max(steps),
            "rate": settings.training.learning_rate,
            "tokens_per_row": settings.dataset.tokens_per_row,
            "rows_per_step": settings.training.gradient_accumulation_steps,
            "epochs": settings.training.epochs,
        }


def rows_of_table(folder: Path) -> Iterator[str]:
    """Lines of a Markdown table, one data set each."""
    heads = ("data", "records", "chosen: row, passes, steps", "no flags", "best of the sweep", "share")
    yield f"| {' | '.join(heads)} | time / best run | time / sweep |"
    yield "|---|---:|---|---:|---|---:|---:|---:|"
    for name in DATA:
        file = folder / f"{name.replace(' ', '-')}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        plain, jobs = found["no flags"], found["sweep"]
        best = max(jobs, key=lambda job: (job["metric"], -job.get("seconds", job["steps"])))
        alone = f"{plain['seconds'] / best['seconds']:.1f}" if "seconds" in best else ""
        yield (
            f"| {name} | {found['records']:,} | {plain['tokens_per_row']}, {plain['epochs']}, {plain['steps']} | "
            f"{plain['metric']:.3f} | {best['metric']:.3f} (rate {best['rate']:g}, {best['steps']} steps) | "
            f"{plain['metric'] / best['metric']:.0%} | {alone} | {plain['seconds'] / found['sweep seconds']:.2f} |"
        )


def main(words: list[str] | None = None) -> None:
    """Measures the named data sets, or all, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results, one file per data set")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"data sets: {', '.join(DATA)}")
    parser.add_argument("--table", action="store_true", help="print the table of the results in OUT")
    parser.add_argument("--model", default="loratune/pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", action="store_true", help="train the sweep in one bank")
    given = parser.parse_args(words)
    if unknown := set(given.names) - set(DATA):
        parser.error(f"no data set is called {', '.join(sorted(unknown))}; there are {', '.join(DATA)}")
    if given.table:
        print("\n".join(rows_of_table(given.out)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or DATA:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder), model=given.model, device=given.device, together=given.together)
        (given.out / f"{name.replace(' ', '-')}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
