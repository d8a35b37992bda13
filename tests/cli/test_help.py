"""Help: common settings first, readable at every width; the printed configuration; names of other trainers."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from loratune.cli import VERBS
from loratune.cli.help import wrap
from loratune.cli.options import options_of
from loratune.cli.train import TrainArguments, parse_config
from loratune.config import RunConfig, from_dict
from loratune.errors import ConfigError
from tests.cli_lab import loratune, write_jsonl

TRAIN = ["train", "m", "d.jsonl", "--out", "o"]


def words_of(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_is_broken_and_no_line_is_too_long(verb: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    whole = loratune(verb, "--help-all").out
    monkeypatch.setenv("COLUMNS", str(width))
    shown = loratune(verb, "--help-all").out
    assert words_of(shown) == words_of(whole)
    assert max(map(len, shown.splitlines())) <= width
    for internal in ("{None}", "STR", "INT", "FLOAT", "(default: None)"):
        assert internal not in shown


def test_the_overview_fits_sixty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = loratune("--help").out
    assert max(map(len, shown.splitlines())) <= 60
    assert all(re.search(rf"^  {verb} ", shown, re.MULTILINE) for verb in VERBS)


def test_figures_and_formulas_stay_on_one_line() -> None:
    text = "needs 24 GiB of memory and the update is lora_alpha / r times B A, with 0 <= p < 1 and x = 3"
    for width in range(20, 60):
        lines = wrap(text, width)
        assert " ".join(lines) == text
        for whole in ("24 GiB", "lora_alpha / r", "0 <= p < 1", "x = 3"):
            assert any(whole in line for line in lines), (width, lines)


def test_common_settings_come_first_and_the_others_on_demand() -> None:
    short, long = loratune("train", "--help").out, loratune("train", "--help-all").out
    flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", short, re.MULTILINE)
    assert flags[:7] == [
        "--out",
        "--learning-rate",
        "--epochs",
        "--max-steps",
        "--r",
        "--lora-alpha",
        "--target-modules",
    ]
    assert {"--precision", "--memory", "--tokens-per-row", "--config", "--print-config"} <= set(flags)
    assert "--layers-pattern" not in short
    everything = re.findall(r"^  (?:-\w, )?(--[\w-]+)", long, re.MULTILINE)
    options = [option for option in options_of(TrainArguments) if not option.positional]
    assert set(everything) == {option.flag for option in options} | {"--help-all"} | ({"--help"} & set(everything))
    assert f"{len(options) - len(flags)} more options" in short
    assert len(short.splitlines()) < 80


def test_every_option_has_a_meaning() -> None:
    assert not [option.name for option in options_of(TrainArguments) if len(option.text) < 10]


def test_unset_settings_are_printed_as_comments_that_can_be_used() -> None:
    printed = loratune(*TRAIN, "--print-config").out
    config = from_dict(RunConfig, tomllib.loads(printed), "printed")
    assert config == parse_config(TRAIN[1:])
    assert "# Torch device such as cpu, cuda or cuda:1; by default the GPU if there is one.\n# device = " in printed
    unset = {option.name for option in options_of(RunConfig, config) if option.default is None}
    assert unset == set(re.findall(r"^# (\w+) = ", printed, re.MULTILINE))
    uncommented = printed.replace('# device = "DEVICE"', 'device = "cpu"').replace("# max_steps = N", "max_steps = 7")
    changed = from_dict(RunConfig, tomllib.loads(uncommented), "printed")
    assert (changed.device, changed.training.max_steps) == ("cpu", 7)


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        ("--lora-rank 4", "lora", "r", 4),
        ("--lora-r=4", "lora", "r", 4),
        ("--lora_r 4", "lora", "r", 4),
        ("--num-train-epochs 3.0", "training", "epochs", 3),
        ("--num_train_epochs 3", "training", "epochs", 3),
        ("--lr 1e-4", "training", "learning_rate", 1e-4),
        ("-lr 1e-4", "training", "learning_rate", 1e-4),
        ("--target-modules q_proj,v_proj", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("--target_modules=q_proj,v_proj", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("--lora-target all", "lora", "target_modules", "all-linear"),
        ("--target-modules .*(q|v)_proj", "lora", "target_modules", ".*(q|v)_proj"),
        ("--layers-to-transform 0,2", "lora", "layers_to_transform", [0, 2]),
        ("--additional-target lm_head,norm", "lora", "modules_to_save", ["lm_head", "norm"]),
        ("--optim adamw_torch", "training", "optim", "adamw"),
        ("--use-rslora True", "lora", "use_rslora", True),
        ("--use_rslora=false", "lora", "use_rslora", False),
        ("--init-lora-weights false", "lora", "init_lora_weights", False),
        ("--report-to wandb", "training", "log_to", ["wandb"]),
        ("--random-state 3", "training", "seed", 3),
        ("--eval-steps 5", "training", "eval_every_steps", 5),
    ],
)
def test_names_with_the_same_meaning_are_accepted(words: str, section: str, name: str, value: object) -> None:
    config = parse_config([*TRAIN[1:], *words.split()])
    assert getattr(getattr(config, section), name) == value


def test_a_folder_has_its_other_name_too() -> None:
    assert parse_config(["m", "d.jsonl", "--output_dir", "here"]).out == "here"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--per-device-train-batch-size 4", "gradient_accumulation_steps"),
        ("--micro_batch_size=4", "tokens_per_row"),
        ("--max-seq-length 512", "tokens_per_row"),
        ("--load-in-4bit", '"nf4"'),
        ("--bf16", "precision"),
        ("--warmup-steps 10", "warmup_ratio"),
        ("--beta 0.1", "supervised"),
        ("--model-name-or-path x", "first word"),
        ("--gradient-checkpointing", "activations"),
        ("--learning-rte 1e-4", 'Did you mean "--learning-rate"'),
        ("--model x", "give it first: loratune train MODEL DATA"),
        ("-x 3", "unknown option -x"),
    ],
)
def test_other_names_are_answered_in_one_line(words: str, says: str) -> None:
    done = loratune(*TRAIN, *words.split())
    assert done.status == 2
    assert says in done.err
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("lora_rank = 4", "It is called r here"),
        ("num_train_epochs = 4", "It is called epochs here"),
        ("per_device_train_batch_size = 4", "gradient_accumulation_steps"),
    ],
)
@pytest.mark.parametrize("table", ["", "[lora]\n", "[training]\n"])
def test_a_file_names_our_setting(line: str, says: str, table: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"{table}{line}\n")
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config([*TRAIN[1:], "-c", str(file)])


def test_known_names_do_not_hide_our_own() -> None:
    """No setting of ours is listed as a name that means something else."""
    from loratune.other_names import OTHER_MEANING, SAME_MEANING

    ours = {option.name for option in options_of(TrainArguments)}
    assert not ours & OTHER_MEANING.keys()
    assert not ours & {other for name, others in SAME_MEANING.items() if name in ours for other in others}
    assert {f.name for f in fields(RunConfig)} - {"lora", "dataset", "training"} <= ours


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"messages": [{"role": "user", "content": "p"}], "chosen": {}, "rejected": {}},
        {"prompt": "p", "completion": "c", "label": False},
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
    ],
)
def test_preference_data_are_recognised(record: dict[str, object], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [record] * 3)
    done = loratune("preview", "loratune/pocket", str(file), "--cache-dir", "")
    assert done.status == 2
    assert f"{file}:1" in done.err
    assert "only supervised" in done.err


def test_an_error_on_a_terminal_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """`FORCE_COLOR` makes rich take the output for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    said = re.sub(r"\x1b\[[\d;]*m", "", loratune(*TRAIN, "--batch-size", "3").err)
    assert max(map(len, said.splitlines())) <= 60
    assert "one packed row of tokens_per_row tokens, so there is no batch size in documents" in " ".join(said.split())
