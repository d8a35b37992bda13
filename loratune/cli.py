"""The command line: one verb, one function. The only place that prints, exits and reads the environment.

`loratune VERB --help` lists a verb's settings, made from its dataclass by tyro. Everything heavy is imported inside
the verb that needs it, so that help and errors in arguments come at once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from loratune.ahead import read_ahead
from loratune.errors import ConfigError, LoratuneError, nearest

if TYPE_CHECKING:
    from rich.console import Console

USAGE_ERROR = 2
INTERRUPTED = 130

NOT_FOR_TEXT = ("librosa", "scipy", "sklearn", "soundfile", "torchaudio", "torchvision")
"""Packages that transformers imports where they are installed, and needs for sound, images and assisted decoding."""


class Verb(NamedTuple):
    """A command: its line in the overview, and the function that gets the words after it."""

    summary: str
    run: Callable[[list[str]], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0: done, also when `train` was asked to stop by Ctrl-C or SIGTERM and saved everything. 2: a mistake that the
    message explains. 130: Ctrl-C before anything could be saved.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(words)
    except LoratuneError as error:
        _fail(str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        _fail("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # the system refuses something that no check foresaw, such as reading a folder
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return USAGE_ERROR
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        _print_overview()
    elif words[0] in ("-V", "--version"):
        from loratune import __version__

        print(f"loratune {__version__}")
    elif words[0] in VERBS:
        VERBS[words[0]].run(words[1:])
    else:
        raise ConfigError(f'unknown command "{words[0]}".{nearest(words[0], VERBS)} See loratune --help')


def _print_overview() -> None:
    console = _console()
    console.print("[bold]loratune[/]  LoRA fine-tuning of open models\n")
    for name, verb in VERBS.items():
        console.print(f"  [cyan]{name:<9}[/] {verb.summary}", highlight=False)
    console.print("\n[dim]loratune VERB --help lists a verb's settings. Start with: loratune demo[/]")


def _train(words: list[str]) -> None:
    from loratune.arguments import parse_train
    from loratune.config import to_toml

    print_config = "--print-config" in words
    config = parse_train([word for word in words if word != "--print-config"])
    # Segments that grow in place leave no holes between activations of many sizes; read when PyTorch is imported.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if print_config:
        print(to_toml(config), end="")
        return
    read_ahead(config.model)
    with _libraries():
        from loratune.runs.run import run
        from loratune.screen import progress

    console = _console()
    with _stop_on_signals(console) as stop:
        events = run(config, stop, _cache_dir(config.dataset.cache_dir))
        progress.summary(progress.watch(events, console), console)


def _sweep(words: list[str]) -> None:
    from loratune.arguments import parse_sweep

    given = parse_sweep(words)
    from loratune.sweep.plan import read_plan

    plan = read_plan(given.jobs, model=given.model, out=given.out, precision=given.precision, device=given.device)
    read_ahead(given.model)
    with _libraries():
        from loratune.screen import sweep as screen
        from loratune.sweep.run import sweep

    console = _console()
    with _stop_on_signals(console) as stop:
        events = sweep(
            plan,
            Path(given.jobs).read_text(encoding="utf-8"),
            given.out,
            at_once=given.at_once,
            overwrite=given.overwrite,
            resumed=given.resume,
            stop=stop,
            cache_dir=_cache_dir(plan.jobs[0].config.dataset.cache_dir),
        )
        screen.summary(screen.watch(events, console), console)


def _preview(words: list[str]) -> None:
    from loratune.arguments import Preview, parse

    given = parse(Preview, words, "preview")
    with _libraries():
        from loratune.base import load as base
        from loratune.data.feed import prepare, rows_of_epoch
        from loratune.runs.evaluation import pad_id
        from loratune.screen.preview import draw_preview

    tokenizer = base.load_tokenizer(given.model, given.dataset.chat_template)
    stop_ids = base.stop_ids(given.model, tokenizer)
    dataset = prepare(
        given.data,
        tokenizer,
        given.dataset,
        stop_ids=stop_ids,
        max_tokens=base.max_document_tokens(base.load_config(given.model)),
        seed=given.seed,
        cache_dir=_cache_dir(given.dataset.cache_dir),
    )
    rows = rows_of_epoch(dataset.train, given.dataset.tokens_per_row, pad_id(tokenizer), seed=given.seed, epoch=0)
    draw_preview(_console(), tokenizer, dataset, rows, stop_ids=stop_ids, show=given.examples)


def _eval(words: list[str]) -> None:
    from loratune.arguments import Eval, parse

    given = parse(Eval, words, "eval")
    with _libraries():
        from loratune.config import DataConfig
        from loratune.data.records import read_records
        from loratune.infer.opened import open_folders
        from loratune.runs.evaluation import evaluate
        from loratune.screen.evaluate import as_json, draw

    records = read_records(given.data, given.format)[: given.limit]
    opened = open_folders([given.adapter], model=given.model, precision=given.precision, device=given.device)
    settings = DataConfig(train_on=given.train_on, tokens_per_row=given.tokens_per_row, truncate=given.truncate)
    result = evaluate(
        opened.model,
        opened.tokenizer,
        records,
        name=next(iter(opened.adapters), opened.base),
        stop_ids=opened.stop_ids,
        settings=settings,
        generate=given.generate,
        max_new_tokens=given.max_new_tokens,
    )
    data = ", ".join(given.data)
    if given.json:
        print(json.dumps(as_json([result], data=data, answers=True), ensure_ascii=False))
    else:
        draw([result], _console(), data=data)


def _chat(words: list[str]) -> None:
    from loratune.arguments import Chat, parse

    given = parse(Chat, words, "chat")
    with _libraries():
        from loratune.infer.engine import Sampling
        from loratune.infer.opened import open_folders
        from loratune.screen.chat import chat

    sampling = Sampling(
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=0,
        seed=given.seed,
    )
    opened = open_folders(given.adapters, model=given.model, precision=given.precision, device=given.device)
    chat(
        opened.model,
        opened.tokenizer,
        base=opened.base,
        stop_ids=opened.stop_ids,
        console=_console(),
        sampling=sampling,
    )


def _merge(words: list[str]) -> None:
    from loratune.arguments import Merge, parse

    given = parse(Merge, words, "merge")
    with _libraries():
        from loratune.base.load import DTYPES
        from loratune.export.merge import merge_checkpoint
        from loratune.infer.opened import open_folders
        from loratune.lora.files import read_config
        from loratune.runs.card import render_merged_card
        from loratune.runs.evaluation import real_prompts

    opened = open_folders([given.adapter], model=given.model)
    if not opened.adapters:
        raise ConfigError(f"{given.adapter}: this is a base model; give the folder of an adapter")
    ((name, folder),) = opened.adapters.items()
    console = _console()
    with console.status("merging, writing, reloading and comparing"):
        merged = merge_checkpoint(
            opened.model,
            opened.tokenizer,
            name,
            given.out,
            prompts=real_prompts(opened.tokenizer, opened.run, given.data),
            dtype=DTYPES.get(given.precision),
            overwrite=given.overwrite,
            keep_adapter=False,
            sources=[folder],
            card=lambda checked: render_merged_card(
                Path(given.out).name, opened.base, read_config(folder), opened.run, checked.difference.largest
            ),
        )
    console.print(str(merged), markup=False, soft_wrap=True)


def _combine(words: list[str]) -> None:
    from loratune.arguments import Combine, parse

    given = parse(Combine, words, "combine")
    with _libraries():
        from loratune.adapters.combine import combine

    made = combine(
        given.adapters,
        given.out,
        weights=given.weights or None,
        method=given.method,
        rank=given.rank,
        density=given.density,
        majority_sign=given.majority_sign,
        seed=given.seed,
        model=given.model,
        overwrite=given.overwrite,
    )
    _console().print(str(made), markup=False, soft_wrap=True)


def _resize(words: list[str]) -> None:
    from loratune.arguments import Resize, parse

    given = parse(Resize, words, "resize")
    with _libraries():
        from loratune.adapters.combine import resize

    made = resize(given.adapter, given.out, given.rank, overwrite=given.overwrite)
    _console().print(str(made), markup=False, soft_wrap=True)


def _extract(words: list[str]) -> None:
    from loratune.arguments import Extract, names, parse

    given = parse(Extract, words, "extract")
    with _libraries():
        from loratune.adapters.extract import extract

    made = extract(
        given.tuned,
        given.base,
        given.out,
        rank=given.rank,
        target_modules=names(given.target_modules) or "all-linear",
        device=given.device,
        overwrite=given.overwrite,
    )
    _console().print(str(made), markup=False, soft_wrap=True)


def _quantise(words: list[str]) -> None:
    from loratune.arguments import Quantise, parse

    given = parse(Quantise, words, "quantise")
    with _libraries():
        from loratune.base.load import load, load_tokenizer
        from loratune.export.quantised import save_quantised

    tokenizer = load_tokenizer(given.model)
    model = load(given.model, "nf4", given.device)
    console = _console()
    done = save_quantised(model, given.out, tokenizer, overwrite=given.overwrite)
    console.print(str(done), markup=False, soft_wrap=True)


def _estimate(words: list[str]) -> None:
    from loratune.arguments import Estimate, parse

    given = parse(Estimate, words, "estimate")
    with _libraries():
        from loratune.memory import estimate
        from loratune.memory.budget import RowSetting
        from loratune.memory.devices import at_hand, named
        from loratune.screen.estimate import as_json, draw
        from loratune.units import bytes_of

    device = named(given.gpu) if given.gpu else at_hand()
    wish = estimate.EstimateRequest(
        given.precision,
        given.lora,
        RowSetting(given.tokens_per_row, given.gradient_accumulation_steps),
        given.activations,
        device.memory_bytes > 0,
    )
    limit = bytes_of(given.memory) if given.memory else device.memory_bytes
    found = estimate.estimate(estimate.model_from_config(given.model, given.precision), wish, device, limit)
    if given.json:
        print(json.dumps(as_json(found)))
    else:
        draw(found, _console(), _tokens_in(given.model, given.data, given.tokens_per_row))


def _tokens_in(model: str, data: list[str], tokens_per_row: int) -> int:
    """Tokens of all rows of one pass over the data, padding included; 0 for no data."""
    if not data:
        return 0
    from loratune.base import load as base
    from loratune.config import DataConfig
    from loratune.data.feed import prepare, rows_of_epoch

    tokenizer = base.load_tokenizer(model)
    dataset = prepare(
        data,
        tokenizer,
        DataConfig(tokens_per_row=tokens_per_row),
        stop_ids=base.stop_ids(model, tokenizer),
        max_tokens=base.max_document_tokens(base.load_config(model)),
        seed=0,
        cache_dir=_cache_dir(None),
    )
    return len(rows_of_epoch(dataset.train, tokens_per_row, 0, seed=0, epoch=0)) * tokens_per_row


def _inspect(words: list[str]) -> None:
    from loratune.arguments import Inspect, parse

    given = parse(Inspect, words, "inspect")
    with _libraries():
        from loratune.screen.inspect import draw, inspect

    draw(inspect(given.adapter), _console())


def _demo(words: list[str]) -> None:
    from loratune.arguments import Demo, parse

    given = parse(Demo, words, "demo")
    with _libraries():
        from loratune.demo import demo

    demo(given.out, _console(), overwrite=given.overwrite)


@contextmanager
def _stop_on_signals(console: Console) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into an orderly end after the current step; a second Ctrl-C ends at once."""
    import signal

    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        console.print("[yellow]stopping after this step and saving; Ctrl-C again to stop without saving[/]")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cache_dir(setting: str | None) -> str | None:
    """The folder for rendered data: as set, else the user's cache folder; "" turns caching off."""
    if setting is not None:
        return setting or None
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(home) / "loratune")


@contextmanager
def _libraries() -> Iterator[None]:
    """Around the imports of a verb: keeps the libraries quiet, and the garbage collector away.

    Imports make 600,000 objects that live to the end, and going through them again and again took a fifth of their
    time; `freeze` spares the run from doing so later. And transformers imports whatever it finds installed, a quarter
    of all modules for nothing here: it does not find those. Only a process of our own may decide that, hence here.
    """
    gc.disable()
    try:
        with _not_found(() if "transformers" in sys.modules else NOT_FOR_TEXT):
            _quiet_libraries()
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _not_found(names: Sequence[str]) -> Iterator[None]:
    """These packages are as if not installed meanwhile, as Python has it for a None in `sys.modules`."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    absent = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            modules.pop(name, None)


def _quiet_libraries() -> None:
    """Keeps the loading bars and advice of the libraries below out of what a user reads here."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))


VERBS: dict[str, Verb] = {
    "demo": Verb("the whole journey on the model in the box; no network, no GPU needed", _demo),
    "preview": Verb("what the model will really see of your data", _preview),
    "train": Verb("one adapter from a model and your data", _train),
    "estimate": Verb("the memory and speed of a run, from the model's configuration alone", _estimate),
    "sweep": Verb("many adapters at once: a grid of rates and ranks, compared", _sweep),
    "eval": Verb("loss, perplexity and exact match on held-out data", _eval),
    "chat": Verb("talk to adapters, switch between them, compare", _chat),
    "merge": Verb("a merged checkpoint, verified against the adapter", _merge),
    "combine": Verb("one adapter of several: sums, TIES, DARE, pruning", _combine),
    "resize": Verb("an adapter with another rank", _resize),
    "extract": Verb("an adapter from the difference of two checkpoints", _extract),
    "quantise": Verb("a 4-bit checkpoint of a model, in bitsandbytes' format", _quantise),
    "inspect": Verb("what an adapter is and what it was trained on", _inspect),
}


if __name__ == "__main__":
    sys.exit(main())
