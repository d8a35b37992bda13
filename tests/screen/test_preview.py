"""The preview shows every token, and trained tokens are recognisable with and without colour."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from loratune.config import DataConfig, TrainConfig
from loratune.data.feed import Dataset, EpochRows, prepare, rows_of_epoch
from loratune.screen.preview import draw_preview, warnings
from loratune.training.choices import choose
from tests.data.toy_tokenizers import CHATML, stop_ids, toy_tokenizer

TOKENIZER = toy_tokenizer(CHATML)
TRAINING = TrainConfig()
STOPS = stop_ids(TOKENIZER)


def data(
    folder: Path, count: int = 60, answer: str = "the\tdog\n日本 🦊", row: int = 256
) -> tuple[Dataset, EpochRows]:
    file = folder / "[train].jsonl"  # rich must not read brackets as markup
    messages = [{"role": "user", "content": "[INST] What?"}, {"role": "assistant", "content": answer}]
    file.write_text("".join(json.dumps({"messages": messages, "id": n}) + "\n" for n in range(count)))
    dataset = prepare([str(file)], TOKENIZER, DataConfig(tokens_per_row=row), stop_ids=STOPS)
    return dataset, rows_of_epoch(dataset.train, row, 0, seed=0, epoch=0)


def drawn(dataset: Dataset, rows: EpochRows, *, colour: bool = False, encoding: str = "utf-8") -> str:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, newline="")
    system = "truecolor" if colour else None
    console = Console(file=file, width=200, force_terminal=colour, color_system=system, no_color=not colour)
    chosen = choose(DataConfig(), TrainConfig(), [len(example) for example in dataset.train], [], 256)
    draw_preview(console, TOKENIZER, dataset, rows, stop_ids=STOPS, show=2, chosen=chosen)
    file.flush()
    return buffer.getvalue().decode(encoding)


def test_without_colour_trained_stretches_are_in_brackets(tmp_path: Path) -> None:
    text = drawn(*data(tmp_path))
    lines = [line.strip(" │") for line in text.splitlines()]
    start = lines.index("<|im_start|>user↵")
    assert lines[start : start + 5] == [
        "<|im_start|>user↵",
        "[INST] What?<|im_end|>↵",
        "<|im_start|>assistant↵",
        "⟦the⇥dog↵",
        "日本 🦊■<|im_end|>⟧↵",
    ]
    assert "\x1b" not in text


def test_plain_ascii_consoles_can_show_it(tmp_path: Path) -> None:
    text = drawn(*data(tmp_path), encoding="ascii")
    assert "[[the\\tdog\\n" in text
    assert "\\u65e5\\u672c" in text


def test_with_colour_trained_tokens_have_a_background_of_their_own(tmp_path: Path) -> None:
    shown = Text.from_ansi(drawn(*data(tmp_path), colour=True))
    body = shown.plain.index("<|im_start|>user")  # below the legend
    console = Console()

    def background(at: int) -> str | None:
        color = shown.get_style_at_offset(console, at).bgcolor
        return None if color is None or color.is_default else color.name

    answer = shown.plain.index("日本", body)
    trained = {background(answer), background(answer + 1)}  # two tokens, two shades
    stop = background(shown.plain.index("<|im_end|>", answer))
    assert background(shown.plain.index("What", body)) is None
    assert len(trained) == 2
    assert len(trained | {stop, None}) == 4


def test_it_says_sources_lengths_rows_and_notes(tmp_path: Path) -> None:
    dataset, rows = data(tmp_path)
    text = drawn(dataset, rows)
    assert "[train].jsonl:1 " in text
    assert "57 to train on, 3 held out" in text
    assert f"{len(rows)} row{'' if len(rows) == 1 else 's'} of {rows.tokens_per_row} tokens" in text
    assert f"{rows.fullness:.1%} full" in text
    assert 'the fields "id" are not used' in text
    assert "… and 55 more" in text


def test_the_middle_of_a_long_example_is_left_out(tmp_path: Path) -> None:
    dataset, rows = data(tmp_path, answer="begin " + "x " * 600 + "end", row=4096)
    text = drawn(dataset, rows)
    assert "tokens …" in text
    assert "begin" in text
    assert "end■<|im_end|>" in text


def test_rows_that_waste_time_or_steps_are_warned_of(tmp_path: Path) -> None:
    assert any("only 1 optimizer step," in text for text in warnings(*data(tmp_path, count=5, row=4096), TRAINING))
    dataset, rows = data(tmp_path, answer="the dog " * 80, row=1024)
    length = len(dataset.train[0])
    assert length > 150
    assert not any("full" in text for text in warnings(dataset, rows, TRAINING))
    half_empty = rows_of_epoch(dataset.train, 2 * length - 1, 0, seed=0, epoch=0)  # two documents never fit
    assert any("Rows are only 5" in text for text in warnings(dataset, half_empty, TRAINING))


def test_nothing_held_out_is_warned_of(tmp_path: Path) -> None:
    dataset, rows = data(tmp_path)
    assert any("Nothing is held out" in text for text in warnings(Dataset(dataset.train, []), rows, TRAINING))
