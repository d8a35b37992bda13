"""Adapters in host memory behind a few slots give the same bits as adapters that are all resident."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError
from loratune.lora.files import adapter_tensors, load_adapter, save
from loratune.lora.inject import activate, active, attach, detach, merge, trainable_parameters, unmerge
from loratune.lora.store import Store
from tests.conftest import build
from tests.lora.helpers import fill, run

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4},
    "b": {"r": 4, "lora_alpha": 3, "lora_dropout": 0.1},
    "c": {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "d": {"r": 7, "target_modules": ["down_proj"], "rank_pattern": {r"layers\.1\.mlp\.down_proj": 3}},
    "e": {"r": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = build("llama")
        attach(model, LoraConfig(**settings), name=name)
        fill(trainable_parameters(model).values(), seed=seed)
        save(model, root / name, name=name)
    return {name: root / name for name in SETTINGS}


def _expected(folders: dict[str, Path], dtype: torch.dtype) -> dict[str | None, Tensor]:
    model = build("llama", dtype=dtype)
    logits: dict[str | None, Tensor] = {None: run(model)}
    for name, folder in folders.items():
        load_adapter(model, folder, name=name)
        logits[name] = run(model)
    return logits


def _stored(folders: dict[str, Path], slots: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Store]:
    model = build("llama", dtype=dtype)
    store = Store(model, slots)
    for name, folder in folders.items():
        store.load(folder, name)
    return model, store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_of_switches_gives_the_bits_of_resident_adapters(
    folders: dict[str, Path], dtype: torch.dtype
) -> None:
    """Also in bfloat16, where the store rounds A and B: each use would round them to the same values."""
    expected = _expected(folders, dtype)
    assert all(not torch.equal(expected[name], expected[None]) for name in folders)
    model, store = _stored(folders, slots=2, dtype=dtype)
    assert torch.equal(run(model), expected[None])  # loading takes nothing into use
    generator = random.Random(0)
    for _ in range(30):
        name = generator.choice([*folders, None])
        if generator.random() < 0.3:
            store.prefetch(generator.choice(list(folders)))
        activate(model, name)
        assert torch.equal(run(model), expected[name])
        assert len(store.resident) <= 2


def test_the_slot_used_longest_ago_goes_and_pinned_ones_stay(folders: dict[str, Path]) -> None:
    model, store = _stored(folders, slots=3)
    for name in ("a", "b", "c", "a", "d"):
        activate(model, name)
    assert store.resident == ("c", "a", "d")
    store.pin("c")
    activate(model, "e")
    assert store.resident == ("d", "c", "e")
    store.unpin("c")
    store.prefetch("a", "b")
    assert store.resident == ("e", "a", "b")  # e is in use


def test_nothing_is_allocated_by_switching(folders: dict[str, Path]) -> None:
    """The slots keep their addresses, and every Parameter in use is in one of them."""
    model, store = _stored(folders, slots=2)
    buffers = {(slot.buffer.data_ptr(), slot.buffer.numel()) for slot in store._slots}
    for name in [*folders, *folders]:
        activate(model, name)
        assert {(slot.buffer.data_ptr(), slot.buffer.numel()) for slot in store._slots} == buffers
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            assert any(start <= parameter.data_ptr() < start + size for start, size in buffers)


class _Operations(TorchDispatchMode):
    """Records the operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_swap_in_is_one_copy_and_switching_to_it_is_none(folders: dict[str, Path]) -> None:
    """For any number of tensors: each operation would be a launch, and decoding is bound by launches."""
    model, store = _stored(folders, slots=3)
    for name in (*"abcde", *"abcde"):  # each has been in each slot
        activate(model, name)
    with _Operations() as ahead:
        store.prefetch("a")
    with _Operations() as switched:
        activate(model, "a")
    with _Operations() as on_demand:
        activate(model, "b")
    assert ahead.names == on_demand.names == ["slice", "copy_"]
    assert switched.names == []


def test_too_few_slots_is_said_and_changes_nothing(folders: dict[str, Path]) -> None:
    model, store = _stored(folders, slots=2)
    activate(model, "a")
    before = run(model)
    with pytest.raises(AdapterError, match="no slot for adapter"):
        activate(model, ["a", "b", "c"])
    store.pin("b")
    with pytest.raises(AdapterError, match=r'no slot for adapter "c": all 2 hold adapters .*unpin'):
        store.prefetch("c")
    assert active(model) == ("a",)
    assert torch.equal(run(model), before)


def test_several_at_once_and_everything_else_that_takes_a_name(folders: dict[str, Path], tmp_path: Path) -> None:
    model, _ = _stored(folders, slots=2)
    plain = build("llama")
    for name in ("a", "b"):
        load_adapter(plain, folders[name], name=name)
    for which in ({"a": 0.5, "b": -2.0}, ["a", "b"]):
        activate(model, which)
        activate(plain, which)
        assert torch.equal(run(model), run(plain))
    activate(model, "e")  # a is evicted now, and saved from the host
    save(model, tmp_path / "a", name="a")
    again = build("llama")
    load_adapter(again, tmp_path / "a", name="a")
    tensors = adapter_tensors(again, "a")
    assert tensors.keys() == adapter_tensors(plain, "a").keys()
    assert all(torch.equal(tensors[key], t) for key, t in adapter_tensors(plain, "a").items())
    activate(plain, "a")
    merge(model, "a")
    assert float((run(model) - run(plain)).abs().max()) <= 1e-5 * float(run(plain).abs().max())
    unmerge(model)
    assert active(model) == ("e",)


def test_a_larger_adapter_makes_the_slots_larger(folders: dict[str, Path]) -> None:
    model = build("llama")
    store = Store(model, 2)
    store.load(folders["c"], "c")
    activate(model, "c")
    expected, small = run(model), store.slot_bytes
    store.load(folders["a"], "a")
    assert store.slot_bytes > small
    assert torch.equal(run(model), expected)
    assert "c" in store.resident


def test_beside_adapters_that_train(folders: dict[str, Path]) -> None:
    """An adapter outside of the store keeps its gradients while others are loaded and taken into use."""
    model = build("llama")
    attach(model, LoraConfig(r=2), name="mine")
    store = Store(model, 1)
    store.load(folders["a"], "a")
    assert active(model) == ("mine",)
    assert all(p.requires_grad for p in trainable_parameters(model).values())
    activate(model, "a")
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(AdapterError, match='"a" is in a store, rounded for inference'):
        trainable_parameters(model)
    with pytest.raises(AdapterError, match='"mine" is not in the store'):
        store.pin("mine")


def test_detached_adapters_are_forgotten(folders: dict[str, Path]) -> None:
    model, store = _stored(folders, slots=2)
    activate(model, "a")
    detach(model, "a")
    assert store.resident == ()
    with pytest.raises(AdapterError, match='no adapter "a"'):
        store.prefetch("a")
    store.load(folders["a"], "a")
    detach(model)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_mistakes(folders: dict[str, Path], tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="slots is 0"):
        Store(model, 0)
    store = Store(model)
    store.load(folders["a"], "a")
    with pytest.raises(AdapterError, match="already attached"):
        store.load(folders["b"], "a")
    with pytest.raises(AdapterError, match="no such folder"):
        store.load(tmp_path / "no", "n")
    with pytest.raises(AdapterError, match="has a store of adapters already"):
        Store(model)
    other = build("llama")
    attach(other, LoraConfig(r=2, modules_to_save=["model.norm"]))
    save(other, tmp_path / "full")
    with pytest.raises(AdapterError, match="a store does not hold"):
        store.load(tmp_path / "full", "full")
    assert store.resident == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_copies_overlap_and_nothing_is_allocated(folders: dict[str, Path]) -> None:
    expected = {}
    model = build("llama", dtype=torch.bfloat16).cuda()

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 40, device="cuda")[None]).logits

    for name, folder in folders.items():
        load_adapter(model, folder, name=name)
        expected[name] = logits()
    detach(model)
    store = Store(model, 2)
    for name, folder in folders.items():
        store.load(folder, name)
    activate(model, "a")
    logits()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    generator, got = random.Random(0), []
    for _ in range(100):
        name, following = generator.choice(list(folders)), generator.choice(list(folders))
        activate(model, name)
        if following != name:
            store.prefetch(following)
        got.append((name, logits().cpu()))
    assert torch.cuda.memory_allocated() == allocated
    assert all(torch.equal(out, expected[name].cpu()) for name, out in got)


def test_a_prefetched_adapter_is_read_from_the_host_until_it_is_used(folders: dict[str, Path]) -> None:
    """Its bytes may not have arrived yet, and only switching to it waits for them."""
    model, store = _stored(folders, slots=2)
    buffers = [slot.buffer for slot in store._slots]
    store.prefetch("a")
    for buffer in buffers:
        buffer.fill_(0)  # as if nothing had arrived
    assert all(float(tensor.abs().max()) > 0 for tensor in adapter_tensors(model, "a").values())
