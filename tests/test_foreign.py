"""Names, small JSON files and TOML files of unknown origin: plain values, or one error of the caller's class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratune import foreign
from loratune.errors import ConfigError


@pytest.mark.parametrize("name", ["a", "naïve", "日本", "a b", "😀", "a\nb"])
def test_names_that_files_can_hold(name: str) -> None:
    assert foreign.is_text(name)
    foreign.check_name(name, ConfigError)


@pytest.mark.parametrize(
    ("name", "shown"), [(os.fsdecode(b"x/caf\xe9"), r"x/caf\\udce9"), ("a\0b", r"a\\0b"), ("\ud83d", r"\\ud83d")]
)
def test_names_that_no_file_can_hold(name: str, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"^{shown}: this name is not UTF-8 text; rename the file or folder$"):
        foreign.check_name(name, ConfigError)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfx\xef\xbb\xbf")
    assert foreign.read_text(tmp_path / "a", ConfigError) == "x\ufeff"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"a": NaN}', "NaN is not a value"),
        ('{"a": 1, "a": 2}', '"a" is given twice, with different values'),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deeply: more than 64"),
        ('{"a":' * 9999 + "1", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit \\(4300"),
    ],
)
def test_json_that_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=f"^x: .*{fault}"):
        foreign.parse_json(text, "x", ConfigError)


def test_json_that_is_read() -> None:
    text = '{"a": 1, "a": 1, "b": [Infinity, -1e400], "c": {"d": null}, "e": 123456789012345678901234567890}'
    inf = float("inf")
    assert foreign.parse_json(text, "x", ConfigError) == {
        "a": 1, "b": [inf, -inf], "c": {"d": None}, "e": 123456789012345678901234567890,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a =", "not valid TOML: Invalid value"),
        ("a = 1\na = 2\n", "not valid TOML: .*line 2"),
        ("a = " + "[" * 9999, "nested too deeply"),
        ("a = " + "9" * 5000, "not valid TOML: Exceeds the limit \\(4300"),
    ],
)
def test_toml_that_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=f"^x: .*{fault}"):
        foreign.parse_toml(text, "x", ConfigError)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to a missing file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_bytes(b"12345"), "has 5 bytes; such a file has at most 4"),
    ],
)
def test_files_that_are_not_read(tmp_path: Path, make: object, fault: str) -> None:
    assert callable(make)
    make(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"a: .*{fault}$"):
        foreign.read_bytes(tmp_path / "a", ConfigError, most=4)
