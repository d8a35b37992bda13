"""All settings of a run as a TOML file for people: those without a value are comments that explain them."""

from __future__ import annotations

import textwrap
from typing import Any

import tomli_w

from loratune.cli.options import Option, options_of
from loratune.config import RunConfig

_WIDTH = 100


def commented_toml(config: RunConfig) -> str:
    """The complete configuration. It reads back as `config`."""
    options = options_of(RunConfig, config)
    return "\n".join(
        _section(section, [option for option in options if option.section == section])
        for section in dict.fromkeys(option.section for option in options)
    )


def _section(name: str, options: list[Option]) -> str:
    tables = {option.name: option.default for option in options if isinstance(option.default, dict)}
    values = {option.name: option.default for option in options if option.name not in tables}
    text = f"[{name}]\n" if name else ""
    text += tomli_w.dumps({key: _plain(value) for key, value in values.items() if value is not None})
    for option in options:
        if option.default is None:
            text += "".join(f"# {line}\n" for line in textwrap.wrap(" ".join(option.text.split()), _WIDTH))
            text += f"# {option.name} = {_example(option)}\n"
    for key, table in tables.items():
        text += f"\n[{name}.{key}]\n" + tomli_w.dumps(table)
    return text


def _plain(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _example(option: Option) -> str:
    """The form of a value in TOML: N, "DEVICE", ["NAME", ...]."""
    single = option.value.partition(" [")[0]
    quoted = single if single in ("N", "NUMBER") else f'"{single}"'
    return f"[{quoted}, ...]" if " [" in option.value else quoted
