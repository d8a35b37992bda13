"""Hot replacement: a running model gets new weights, all or none."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import activate, active, attach, detach, trainable_parameters
from loratune.lora.layer import LoraLayer
from loratune.lora.replace import replace
from loratune.lora.store import Store
from tests.conftest import build
from tests.lora.helpers import fill, run

OLD: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
NEW: dict[str, dict[str, Any]] = {
    "same": OLD,
    "rank and scaling": OLD | {"r": 7, "use_rslora": True},
    "other layers": {"r": 2, "target_modules": ["v_proj", "down_proj"]},
    "in full": OLD | {"modules_to_save": ["model.norm"]},
}


def _saved(folder: Path, seed: int, **settings: Any) -> Path:
    model = build("llama")
    attach(model, LoraConfig(**settings))
    fill(trainable_parameters(model).values(), seed=seed)
    save(model, folder)
    return folder


def _alone(folder: Path) -> Tensor:
    model = build("llama")
    load_adapter(model, folder)
    return run(model)


def _adapted(model: torch.nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("at_next_forward", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_the_next_forward_is_that_of_the_new_adapter(
    tmp_path: Path, kind: str, at_next_forward: bool, stored: bool
) -> None:
    old, new, other = (
        _saved(tmp_path / "old", 1, **OLD),
        _saved(tmp_path / "new", 2, **NEW[kind]),
        _saved(tmp_path / "other", 3, **OLD),
    )
    expected = [_alone(folder) for folder in (old, new, other)]
    model = build("llama")
    if stored:
        store = Store(model, 1)
        store.load(old, "x")
    else:
        load_adapter(model, old, name="x")
    load_adapter(model, other, name="other")
    activate(model, "x")
    assert torch.equal(run(model), expected[0])
    if stored and kind == "in full":
        with pytest.raises(AdapterError, match="a store does not hold"):
            replace(model, new, "x", at_next_forward=at_next_forward)
        assert torch.equal(run(model), expected[0])
        return
    replace(model, new, "x", at_next_forward=at_next_forward)
    assert torch.equal(run(model), expected[1])
    assert active(model) == ("x",)
    activate(model, "other")
    assert torch.equal(run(model), expected[2])
    activate(model, "x")
    assert torch.equal(run(model), expected[1])
    detach(model, "other")
    assert torch.equal(run(model), expected[1])
    layers = {"same": 4, "rank and scaling": 4, "other layers": 4, "in full": 4}
    assert len(_adapted(model)) == layers[kind]
    detach(model)
    assert torch.equal(run(model), run(build("llama")))


def test_one_that_is_not_in_use_is_replaced_as_quietly(tmp_path: Path) -> None:
    old, new = _saved(tmp_path / "old", 1, **OLD), _saved(tmp_path / "new", 2, **NEW["other layers"])
    model = build("llama")
    for name in ("x", "y"):
        load_adapter(model, old, name=name)
    replace(model, new, "x")
    assert active(model) == ("y",)
    assert torch.equal(run(model), _alone(old))
    activate(model, {"x": 1.0, "y": 1.0})
    both = run(model)
    replace(model, old, "x")  # while it is part of a sum
    assert not torch.equal(run(model), both)


def test_no_forward_sees_a_mixture_while_other_threads_replace(tmp_path: Path) -> None:
    """A hundred forwards, while another thread replaces the adapter as fast as it can."""
    folders = [_saved(tmp_path / f"v{i}", i, **kind) for i, kind in enumerate((OLD, NEW["other layers"], OLD))]
    expected = [_alone(folder) for folder in folders]
    model = build("llama")
    load_adapter(model, folders[0], name="x")
    stop = threading.Event()
    replaced = 0

    def keep_replacing() -> None:
        nonlocal replaced
        while not stop.is_set():
            replaced += 1
            replace(model, folders[replaced % 3], "x", at_next_forward=True)

    thread = threading.Thread(target=keep_replacing)
    thread.start()
    seen: set[int] = set()
    try:
        for _ in range(100):
            logits = run(model)
            matching = [i for i, version in enumerate(expected) if torch.equal(version, logits)]
            assert len(matching) == 1
            seen.update(matching)
    finally:
        stop.set()
        thread.join()
    assert replaced > 3
    assert len(seen) > 1


def test_an_error_leaves_the_old_adapter_at_work(tmp_path: Path) -> None:
    old = _saved(tmp_path / "old", 1, **OLD)
    wrong = tmp_path / "wrong"
    model = build("gpt2")
    attach(model, LoraConfig(r=2, target_modules=["c_attn"]))
    save(model, wrong)
    model = build("llama")
    load_adapter(model, old, name="x")
    for at_next_forward in (False, True):
        for folder, message in ((wrong, "leaves no layer"), (tmp_path / "no", "no such folder")):
            with pytest.raises(AdapterError, match=message):
                replace(model, folder, "x", at_next_forward=at_next_forward)
            assert active(model) == ("x",)
            assert torch.equal(run(model), _alone(old))
    with pytest.raises(AdapterError, match='no adapter "z"'):
        replace(model, old, "z")


def test_the_base_behind_an_adapter_with_modules_of_its_own(tmp_path: Path) -> None:
    full, new = _saved(tmp_path / "full", 1, **NEW["in full"]), _saved(tmp_path / "new", 2, **OLD)
    model = build("llama")
    load_adapter(model, full, name="x")
    with pytest.raises(AdapterError, match="replace without at_next_forward"):
        replace(model, new, "x", at_next_forward=True)
    replace(model, new, "x")
    assert torch.equal(run(model), _alone(new))
    replace(model, full, "x")
    assert torch.equal(run(model), _alone(full))


def test_detached_while_waiting(tmp_path: Path) -> None:
    old, new = _saved(tmp_path / "old", 1, **OLD), _saved(tmp_path / "new", 2, **OLD)
    model = build("llama")
    load_adapter(model, old, name="x")
    load_adapter(model, old, name="y")
    replace(model, new, "x", at_next_forward=True)
    detach(model, "x")
    assert torch.equal(run(model), _alone(old))  # the output of y
