"""Tokens that end a turn: where they come from, which ones other programs lack, and where they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from loratune.base import generation
from loratune.base.load import POCKET, load, load_tokenizer, stop_ids, stop_note
from loratune.config import LoraConfig
from loratune.errors import ModelError
from loratune.export.merge import merge_checkpoint
from loratune.export.quantised import save_quantised
from loratune.lora.inject import attach

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose template ends turns with <|turn|>, while its generation settings and eos_token differ."""
    model, tokenizer = load(POCKET, device="cpu"), load_tokenizer(POCKET)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"eos_token_id": 3, "temperature": 0.7, "do_sample": False}  # odd, but published models have it
    (tmp_path / "base" / generation.FILE).write_text(json.dumps(settings))
    return tmp_path / "base"


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.convert_tokens_to_ids("<|turn|>"))


def test_a_token_that_only_the_template_has_is_a_stop_token_and_named(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    model = load(str(folder), device="cpu")
    for named in (str(folder), model):
        assert stop_ids(named, tokenizer) == {3, tokenizer.eos_token_id, end_of(tokenizer)}
        (note,) = stop_note(named, tokenizer, ("conversation",))
        assert '"<|turn|>"' in note
        assert generation.FILE in note


def test_the_note_is_about_the_end_of_the_data(folder: Path) -> None:
    """Prompts and completions end with the tokenizer's end of text, conversations as the template says."""
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.eos_token
    (note,) = stop_note(str(folder), tokenizer, ("completion",))
    assert f'"{end}"' in note
    assert "<|turn|>" not in note
    (note,) = stop_note(str(folder), tokenizer, ("conversation", "text"))
    assert f'"<|turn|>" or "{end}"' in note
    assert stop_note(POCKET, load_tokenizer(POCKET), ("conversation", "completion", "text")) == []
    settings = {"eos_token_id": [tokenizer.eos_token_id, end_of(tokenizer)]}
    (folder / generation.FILE).write_text(json.dumps(settings))
    assert stop_note(str(folder), tokenizer, ("conversation", "text")) == []


def test_without_generation_settings_other_programs_stop_where_the_configuration_says(folder: Path) -> None:
    (folder / generation.FILE).unlink()
    tokenizer = load_tokenizer(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end_of(tokenizer)}))
    assert stop_note(str(folder), tokenizer, ("conversation",)) == []
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    assert stop_note(str(folder), tokenizer, ("conversation",))


@pytest.mark.parametrize("how", ["merge", "quantise"])
def test_written_checkpoints_stop_where_the_model_learned_to(how: str, folder: Path, tmp_path: Path) -> None:
    tokenizer, out = load_tokenizer(str(folder)), tmp_path / "out"
    if how == "merge":
        model = load(str(folder), device="cpu")
        attach(model, LoraConfig(r=2), name="a")
        merge_checkpoint(model, tokenizer, "a", out, prompts=[[5, 6, 7]])
    else:
        save_quantised(load(str(folder), "nf4", "cpu"), out, tokenizer)
    wanted = [3, *sorted([tokenizer.eos_token_id, end_of(tokenizer)])]
    settings = json.loads((out / generation.FILE).read_text())
    assert settings["eos_token_id"] == wanted
    assert settings["temperature"] == 0.7
    assert GenerationConfig.from_pretrained(out).eos_token_id == wanted
    assert stop_note(str(out), AutoTokenizer.from_pretrained(out), ("conversation",)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"eos_token_id": [1, 2', "is not JSON"),
        ("", "is not JSON"),
        ("[]", "an object is expected"),
        ('{"eos_token_id": "</s>"}', "must be a token id or a list"),
        ('{"eos_token_id": [2, 1.5]}', "must be a token id or a list"),
        ('{"eos_token_id": true}', "must be a token id or a list"),
        ('{"eos_token_id": NaN}', "NaN"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "given twice"),
        ('{"max_new_tokens": "many"}', "not usable"),
    ],
)
def test_a_damaged_file_is_an_error_and_not_a_missing_file(text: str, says: str, folder: Path) -> None:
    (folder / generation.FILE).write_text(text)
    tokenizer = load_tokenizer(str(folder))
    for action in (lambda: load(str(folder), device="cpu"), lambda: stop_ids(str(folder), tokenizer)):
        with pytest.raises(ModelError, match=rf"generation_config\.json.*{says}"):
            action()


def test_a_dangling_link_is_an_error(folder: Path) -> None:
    (folder / generation.FILE).unlink()
    (folder / generation.FILE).symlink_to(folder / "nowhere")
    with pytest.raises(ModelError, match=r"generation_config\.json: is a link to a missing file"):
        load(str(folder), device="cpu")
