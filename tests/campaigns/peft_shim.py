"""PEFT's own LoRA tests, run against loratune.

    python -m tests.campaigns.peft_shim CHECKOUT [pytest options]

CHECKOUT is a source tree of PEFT of the installed version, with its `tests` folder; none of its code is part of this
project. The names that its tests import (`get_peft_model`, `PeftModel`, `get_peft_model_state_dict`) are replaced by
a thin wrapper around loratune's public functions. Tests of other methods than LoRA are left out.

A test is *not applicable* if it sets a field that loratune does not have, or reads a private part of PEFT's layers
(`base_layer`, `lora_A["default"]`, ...). Its reason is printed. Every other failure is a fault. The script ends with
the counts and exits with 1 if a test failed.
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loratune as lt
import tests as tests_here
from loratune.adapters.combine import combine
from loratune.errors import AdapterError, LoratuneError

_OPTIONAL = ("diffusers",)
TESTS = ["tests/test_custom_models.py"]
_SAME = {f.name for f in fields(lt.LoraConfig)}
_IRRELEVANT = {"base_model_name_or_path", "inference_mode", "peft_version", "task_type", "fan_in_fan_out", "revision"}
# Lines that cannot work with any other library, by their own words.
_PRIVATE = re.compile(
    r"base_layer|lora_(A|B|dropout|magnitude|variant|embedding)|BaseTunerLayer|\.scaling|merged_adapters|"
    r"original_module|token_adapter|modules_to_save(\[|\.)|inject_adapter|requires_grad|model_card|hf_device_map|\.r\[|"
    r"_is_prompt_learning|has_active_enabled_adapter|disable_adapter_layers|adapter_names="
)
# The same for failed assertions: the adapter's name in parameter names, uploads, texts of layers.
_PRIVATE_CLAIM = re.compile(r"correctly_converted|push_to_hub|BaseTunerLayer|in print_output|merged_adapters|\.r\b")
_OTHER_WORDS = "not applicable: PEFT's words of an error"
_original_get, _original_class = peft.get_peft_model, peft.PeftModel
_original_set = peft.set_peft_model_state_dict
_original_state = peft.get_peft_model_state_dict


def converted(config: Any) -> lt.LoraConfig:
    """loratune's configuration; skips the test if a field in use has no counterpart."""
    default = peft.LoraConfig()
    if config.target_parameters:
        pytest.skip("not applicable: target_parameters that are not experts")
    for name, value in vars(config).items():
        if name in _SAME or name in _IRRELEVANT or value == getattr(default, name, None) or name.startswith("_"):
            continue
        if name == "peft_type" or not value:
            continue
        pytest.skip(f"not applicable: {name} = {value!r}")
    values = {name: getattr(config, name) for name in _SAME if getattr(config, name, None) is not None}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(name), set | tuple):
            values[name] = sorted(values[name])
    if not values.get("target_modules"):
        pytest.skip("not applicable: no target_modules")
    if values["init_lora_weights"] not in (True, False, "gaussian"):
        pytest.skip(f"not applicable: init_lora_weights = {values['init_lora_weights']!r}")
    return lt.LoraConfig(**values)


class Tuner(nn.Module):
    """Stands for PEFT's `base_model`: the adapted model under `.model`."""

    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def set_adapter(self, which: str | Sequence[str], **_: Any) -> None:
        translated(lt.activate, self.model, which)

    @property
    def active_adapters(self) -> list[str]:
        return [lt.merged(self.model) or ""] if lt.merged(self.model) else list(lt.active(self.model))

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names


class Shim(nn.Module):
    """`PeftModel`, by loratune's functions."""

    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.peft_config: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    @property
    def net(self) -> nn.Module:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        return self.net

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """With PEFT's mark in the names of modules that are trained in full."""
        full = [f"base_model.model.{path}." for entry in lt.status(self.net).adapters for path in entry.in_full]
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield (
                (f"{name}.modules_to_save" if any(f"{name}.".startswith(path) for path in full) else name),
                parameter,
            )

    def add_adapter(self, adapter_name: str, peft_config: Any, **options: Any) -> None:
        _check_options(options)
        config = converted(peft_config)
        seed = int(torch.randint(1 << 31, ()))  # from the global generator, as PEFT's initial values
        translated(lt.attach, self.net, config, adapter_name, seed, active=not self.peft_config)
        self.peft_config[adapter_name] = peft_config

    def set_adapter(self, adapter_name: str, **_: Any) -> None:
        self.base_model.set_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        rest = [name for name in self.active_adapters if name != adapter_name]
        translated(lt.detach, self.net, adapter_name)
        del self.peft_config[adapter_name]
        if not lt.active(self.net) and self.peft_config:  # PEFT activates another one
            lt.activate(self.net, rest or next(iter(self.peft_config)))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        merged, active = lt.merged(self.net), lt.active(self.net)
        if merged is not None:
            lt.unmerge(self.net)
            active = lt.active(self.net)
        lt.activate(self.net, None)
        try:
            yield
        finally:
            lt.activate(self.net, active)
            if merged is not None:
                lt.merge(self.net, merged)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        names = adapter_names or self.active_adapters
        if len(names) > 1:
            pytest.skip("not applicable: merges several adapters in place; loratune combines them first")
        if lt.merged(self.net) is not None:
            warnings.warn("All adapters are already merged, nothing to do.", UserWarning, stacklevel=2)
        elif names:
            translated(lt.merge, self.net, names[0])

    def unmerge_adapter(self) -> None:
        if lt.merged(self.net) is not None:
            lt.unmerge(self.net)

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, **_: Any
    ) -> nn.Module:
        names = adapter_names or self.active_adapters
        self.unmerge_adapter()
        if len(names) > 1:
            pytest.skip("not applicable: merges several adapters in place; loratune combines them first")
        for name in lt.adapter_names(self.net):
            if name not in names:
                lt.detach(self.net, name)
        translated(lt.merge, self.net, names[0], reversible=False)
        return self.net

    def unload(self) -> nn.Module:
        self.unmerge_adapter()
        lt.detach(self.net)
        return self.net

    def save_pretrained(
        self, save_directory: Any, safe_serialization: bool = True, selected_adapters: Any = None, **_: Any
    ) -> None:
        if not safe_serialization:
            pytest.skip("not applicable: pickles are never written")
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) / ("" if name == "default" else name)
            folder.mkdir(parents=True, exist_ok=True)
            translated(lt.save, self.net, folder, name, overwrite=True)

    def load_adapter(self, model_id: Any, adapter_name: str, **options: Any) -> Any:
        _check_options(options)
        translated(lt.load_adapter, self.net, model_id, adapter_name, active=not self.peft_config)
        self.peft_config[adapter_name] = peft.PeftConfig.from_pretrained(str(model_id))
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **options: Any,
    ) -> Any:
        if peft.PeftConfig.from_pretrained(str(model_id)).peft_type != "LORA":
            return _original_class.from_pretrained(model, model_id, adapter_name, is_trainable, config, **options)
        shim = cls(model)
        shim.train(is_trainable)
        shim.load_adapter(model_id, adapter_name, **options)
        if config is not None:
            config.inference_mode = not is_trainable
            shim.peft_config[adapter_name] = config
        return shim

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd", **more: Any
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in adapters:
                translated(lt.save, self.net, Path(folder) / name, name)
            translated(
                combine,
                [Path(folder) / name for name in adapters],
                Path(folder) / "combined",
                weights=weights,
                method=combination_type,
                rank=more.get("svd_rank"),
                density=more.get("density"),
                majority_sign=more.get("majority_sign_method", "total"),
            )
            translated(lt.load_adapter, self.net, Path(folder) / "combined", adapter_name, active=False)
        self.peft_config[adapter_name] = self.peft_config[adapters[0]]


def translated(act: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls one of loratune's functions; its errors in the words that PEFT's tests look for."""
    try:
        return act(*args, **kwargs)
    except AdapterError as error:
        if "cannot have lora_dropout" in str(error):
            pytest.skip("not applicable: lora_dropout of a MultiheadAttention is refused; PEFT ignores it")
        if "non-finite" in str(error) or "holds NaN" in str(error) or "holds infinity" in str(error):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter default seems to be broken: {error}"
            ) from error
        raise ValueError(str(error)) from error


def _check_options(options: dict[str, Any]) -> None:
    if options.get("autocast_adapter_dtype") is False:
        pytest.skip("not applicable: autocast_adapter_dtype = False; masters are float32")


def get_peft_model(
    model: nn.Module, peft_config: Any, adapter_name: str = "default", mixed: bool = False, **o: Any
) -> Any:
    """PEFT's function, for LoRA through loratune."""
    if type(peft_config) is not peft.LoraConfig or mixed:
        return _original_get(model, peft_config, adapter_name, mixed, **o)
    shim = Shim(model)
    shim.add_adapter(adapter_name, peft_config, **{k: v for k, v in o.items() if k == "autocast_adapter_dtype"})
    return shim


def get_peft_model_state_dict(
    model: Any, state_dict: Any = None, adapter_name: str = "default", **o: Any
) -> dict[str, Tensor]:
    """PEFT's function, for LoRA through loratune."""
    if not isinstance(model, Shim) and isinstance(getattr(model, "module", None), Shim):  # in FSDP
        model = model.module
    if isinstance(model, Shim):
        return lt.adapter_tensors(model.net, adapter_name)
    result: dict[str, Tensor] = _original_state(model, state_dict, adapter_name, **o)
    return result


def set_peft_model_state_dict(model: Any, tensors: dict[str, Tensor], adapter_name: str = "default", **o: Any) -> Any:
    """PEFT's function, for LoRA through loratune."""
    if isinstance(model, Shim):
        return translated(lt.set_adapter_tensors, model.net, tensors, adapter_name)
    return _original_set(model, tensors, adapter_name, **o)


class Plugin:
    """Keeps the LoRA tests and tells failures from tests of PEFT's inner parts."""

    def __init__(self, root: Path) -> None:
        self.root, self.counts, self.reasons = root, Counter[str](), Counter[str]()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leaves out tests of other methods."""
        items[:] = [item for item in items if self._is_lora(item)]
        for kind in {item.cls for item in items if hasattr(item.cls, "check_modelcard")}:
            kind.check_modelcard = lambda *_: None  # runs write model cards, `save` writes none

    def _is_lora(self, item: Any) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for name in ("config_cls", "config"):
            if name in params:
                return params[name] is peft.LoraConfig or type(params[name]) is peft.LoraConfig
        return "LoraConfig" in inspect.getsource(item.function) or item.cls.__name__ == "TestMultiRankAdapter"

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Turns failures at a line that names a private part into skips."""
        report = (yield).get_result()
        if report.when == "call" and report.failed and "multiple_adapters_with_bias_raises" in item.name:
            why = "not applicable: loratune allows several adapters with biases"
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, why)
        if report.when == "call" and report.failed and not isinstance(call.excinfo.value, LoratuneError):
            entries = [entry for entry in call.excinfo.traceback if Path(str(entry.path)).is_relative_to(self.root)]
            line = str(entries[-1].statement) if entries else ""
            if "Regex pattern did not match" in str(call.excinfo.value) and _is_ours(call.excinfo.value):
                report.outcome, report.longrepr = (
                    "skipped",
                    (str(item.path), 0, _OTHER_WORDS),
                )
                line = ""
            claims = isinstance(call.excinfo.value, AssertionError)
            if found := (_PRIVATE_CLAIM if claims else _PRIVATE).search(line):
                report.outcome, report.longrepr = (
                    "skipped",
                    (str(item.path), 0, f"not applicable: reads {found[0]!r}"),
                )
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.counts["not applicable" if report.skipped else report.outcome] += 1
            if report.skipped:
                text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                self.reasons[text.removeprefix("Skipped: ")] += 1
            elif report.failed:
                self.failed.append(item.nodeid)


def _is_ours(error: BaseException) -> bool:
    """True if the error whose words were compared was raised by loratune."""
    context = error.__context__
    while context is not None and not isinstance(context, LoratuneError):
        context = context.__cause__ or context.__context__
    return context is not None


def _placeholder(package: str) -> ModuleType:
    """A module with an empty class under every name, for imports of packages that no LoRA test here needs."""
    module = ModuleType(package)
    module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
    module.__spec__ = ModuleSpec(package, None)
    return module


def main(arguments: list[str]) -> int:
    """Runs the tests of a checkout; returns the exit status."""
    root = Path(arguments[0]).resolve()
    peft.get_peft_model, peft.PeftModel = get_peft_model, Shim  # type: ignore[misc]
    peft.get_peft_model_state_dict = get_peft_model_state_dict
    peft.set_peft_model_state_dict = set_peft_model_state_dict
    tests_here.__path__.append(str(root / "tests"))  # PEFT's tests import their helpers from a package of that name
    for package in _OPTIONAL:
        if find_spec(package) is None:
            sys.modules[package] = _placeholder(package)
    plugin = Plugin(root)
    tests = [str(root / test) for test in TESTS]
    options = [
        "-q",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "--rootdir",
        str(root),
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--tb=short",
        *arguments[1:],
    ]
    pytest.main([*tests, *options], plugins=[plugin])
    for reason, count in plugin.reasons.most_common():
        print(f"{count:5} {reason}")
    for name in plugin.failed:
        print(f"failed: {name}")
    print(dict(plugin.counts))
    return 1 if plugin.counts["failed"] or not plugin.counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
