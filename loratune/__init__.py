"""loratune: LoRA fine-tuning of open models.

    import loratune as lt
    model = lt.load("path/or/id")
    lt.attach(model, lt.LoraConfig(r=16, target_modules="all-linear"), name="sql")
    lt.train(model, lt.load_tokenizer("path/or/id"), "data.jsonl")
    lt.save(model, "out/sql", name="sql")

Each name below is imported on first use, so `import loratune` is fast and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loratune.version import __version__ as __version__

if TYPE_CHECKING:
    from loratune.adapters.combine import combine as combine
    from loratune.adapters.combine import resize as resize
    from loratune.adapters.extract import extract as extract
    from loratune.base.load import load as load
    from loratune.base.load import load_tokenizer as load_tokenizer
    from loratune.config import DataConfig as DataConfig
    from loratune.config import LoraConfig as LoraConfig
    from loratune.config import RunConfig as RunConfig
    from loratune.config import TrainConfig as TrainConfig
    from loratune.errors import LoratuneError as LoratuneError
    from loratune.export.quantised import save_quantised as save_quantised
    from loratune.infer.text import generate as generate
    from loratune.lora.files import adapter_tensors as adapter_tensors
    from loratune.lora.files import attach_tensors as attach_tensors
    from loratune.lora.files import load_adapter as load_adapter
    from loratune.lora.files import save as save
    from loratune.lora.files import set_adapter_tensors as set_adapter_tensors
    from loratune.lora.inject import activate as activate
    from loratune.lora.inject import active as active
    from loratune.lora.inject import adapter_names as adapter_names
    from loratune.lora.inject import attach as attach
    from loratune.lora.inject import config_of as config_of
    from loratune.lora.inject import detach as detach
    from loratune.lora.inject import merge as merge
    from loratune.lora.inject import merged as merged
    from loratune.lora.inject import unmerge as unmerge
    from loratune.lora.replace import replace as replace
    from loratune.lora.status import status as status
    from loratune.lora.store import Store as Store
    from loratune.screen.training import train as train

_HOME = {
    "load": "loratune.base.load",
    "load_tokenizer": "loratune.base.load",
    "DataConfig": "loratune.config",
    "LoraConfig": "loratune.config",
    "RunConfig": "loratune.config",
    "TrainConfig": "loratune.config",
    "LoratuneError": "loratune.errors",
    "save_quantised": "loratune.export.quantised",
    "generate": "loratune.infer.text",
    "combine": "loratune.adapters.combine",
    "resize": "loratune.adapters.combine",
    "extract": "loratune.adapters.extract",
    "adapter_tensors": "loratune.lora.files",
    "attach_tensors": "loratune.lora.files",
    "load_adapter": "loratune.lora.files",
    "save": "loratune.lora.files",
    "set_adapter_tensors": "loratune.lora.files",
    "replace": "loratune.lora.replace",
    "status": "loratune.lora.status",
    "Store": "loratune.lora.store",
    "activate": "loratune.lora.inject",
    "active": "loratune.lora.inject",
    "adapter_names": "loratune.lora.inject",
    "attach": "loratune.lora.inject",
    "config_of": "loratune.lora.inject",
    "detach": "loratune.lora.inject",
    "merge": "loratune.lora.inject",
    "merged": "loratune.lora.inject",
    "unmerge": "loratune.lora.inject",
    "train": "loratune.screen.training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'loratune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, imported or not, for `dir` and tab completion."""
    return sorted({*globals(), *__all__})
