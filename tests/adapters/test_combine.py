"""Combining and resizing adapters: PEFT's `add_weighted_adapter`, and cases that PEFT gets wrong or refuses.

Tolerance of the comparisons with PEFT: 1e-5 of the largest value, float32 arithmetic in another order.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratune.adapters.combine import CombineRecipe, combine, combine_layers, resize
from loratune.adapters.updates import Update, read_updates
from loratune.config import CombineMethod, LoraConfig
from loratune.errors import AdapterError, ConfigError, OutputError
from loratune.lora.files import adapter_tensors, load_adapter, save
from loratune.lora.inject import activate, attach, detach, trainable_parameters
from tests.lora.helpers import fill, make, run

TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gemma": ["embed_tokens", "o_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
WEIGHTS = [0.7, -0.4, 1.5]


def _saved(folder: Path, model: str = "llama", seed: int = 1, **settings: Any) -> Path:
    """An adapter with random values in a folder."""
    with_adapter = make(model)
    attach(with_adapter, LoraConfig(**({"r": 4, "target_modules": TARGETS[model]} | settings)), seed=seed)
    fill(trainable_parameters(with_adapter).values(), seed=seed)
    save(with_adapter, folder)
    return folder


def _three(tmp_path: Path, model: str, **settings: Any) -> list[Path]:
    alphas = (8, 3, 5)
    return [_saved(tmp_path / f"a{i}", model, seed=i, lora_alpha=a, **settings) for i, a in enumerate(alphas)]


def _delta(update: Update) -> Tensor:
    return update.scaling * (update.lora_B.double() @ update.lora_A.double())


def _theirs(model: str, folders: list[Path], **asked: Any) -> dict[str, Tensor]:
    """B A with its scaling for each layer of PEFT's combination, in the order of PEFT's modules.

    The random initial values of the new adapter, which are overwritten, draw from the generator of the methods; so
    the seed is set behind them.
    """
    wrapped = peft.PeftModel.from_pretrained(make(model), folders[0], adapter_name="a0")
    for index, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(folder, adapter_name=f"a{index}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.tuners.lora.model, "_freeze_adapter", lambda *_: torch.manual_seed(5))
        wrapped.add_weighted_adapter([f"a{i}" for i in range(len(folders))], WEIGHTS, "c", **asked)
    found = {}
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            A = module.lora_A["c"].weight if "c" in module.lora_A else module.lora_embedding_A["c"]
            B = module.lora_B["c"].weight if "c" in module.lora_B else module.lora_embedding_B["c"]
            found[path] = module.scaling["c"] * (B.detach().double() @ A.detach().double())
    return found


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("method", get_args(CombineMethod))
def test_every_method_agrees_with_peft(tmp_path: Path, model: str, method: CombineMethod) -> None:
    folders = _three(tmp_path, model)
    asked: dict[str, Any] = {} if method in ("cat", "linear", "svd") else {"density": 0.6}
    if method.endswith("svd"):
        asked["svd_rank"] = 5
    theirs = _theirs(model, folders, combination_type=method, **asked)
    recipe = CombineRecipe(method, asked.get("svd_rank"), asked.get("density"), seed=5)
    sources = [read_updates(folder).layers for folder in folders]
    parts = [({path: layers[path] for path in theirs}, w) for layers, w in zip(sources, WEIGHTS, strict=True)]
    ours, _, _ = combine_layers(parts, recipe)
    assert list(ours) == list(theirs)
    for path, expected in theirs.items():
        assert float(expected.abs().max()) > 0.01
        assert float((_delta(ours[path]) - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), path


@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_signs_elected_by_frequency_agree_with_peft(tmp_path: Path, method: CombineMethod) -> None:
    folders = _three(tmp_path, "llama")
    theirs = _theirs(
        "llama", folders, combination_type=method, density=0.6, majority_sign_method="frequency", svd_rank=5
    )
    combine(
        folders,
        tmp_path / "c",
        weights=WEIGHTS,
        method=method,
        density=0.6,
        majority_sign="frequency",
        rank=5 if method == "ties_svd" else None,
    )
    ours = read_updates(tmp_path / "c").layers
    for path, expected in theirs.items():
        assert float((_delta(ours[path]) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_random_draws_follow_the_seed(tmp_path: Path) -> None:
    folders = _three(tmp_path, "llama")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        combine(folders, tmp_path / f"out-{name}", method="dare_linear", seed=seed)
    a, b, c = ((tmp_path / f"out-{n}" / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_any_adapters_of_one_model_add_up_exactly(tmp_path: Path, method: CombineMethod) -> None:
    """Mixed ranks, scalings, rsLoRA, patterns and missing layers: logits equal those of the sum in the model."""
    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8},
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 3, "target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5}}
        | {"alpha_pattern": {"embed_tokens": 2}},
    ]
    folders = [_saved(tmp_path / f"a{i}", seed=i, **s) for i, s in enumerate(settings)]
    weights = [1.0, -0.5, 2.0]
    done = combine(folders, tmp_path / "sum", weights=weights, method=method, rank=12 if method == "svd" else None)
    model = make("llama")
    base = run(model)
    for index, folder in enumerate(folders):
        load_adapter(model, folder, name=f"a{index}")
    activate(model, {f"a{i}": w for i, w in enumerate(weights)})
    expected = run(model)
    detach(model)
    load_adapter(model, done.path)
    assert float((expected - base).abs().max()) > 0.1
    assert float((run(model) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    theirs = peft.PeftModel.from_pretrained(make("llama"), done.path)
    assert float((run(theirs) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert done.rank == (4 + 2 + 5 if method == "cat" else 12)
    assert done.error is None if method == "cat" else done.error <= 1e-7


def test_the_result_is_plain_for_every_reader(tmp_path: Path) -> None:
    """One rank everywhere and alpha / r = 1: readers that ignore patterns or rsLoRA scale it rightly."""
    first = _saved(tmp_path / "a", r=4, use_rslora=True, rank_pattern={"v_proj": 2})
    second = _saved(tmp_path / "b", r=3, target_modules=["k_proj"])
    combine([first, second], tmp_path / "c")
    fields = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (4, 4, False)
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert {update.r for update in read_updates(tmp_path / "c").layers.values()} == {4}
    assert sorted(fields["target_modules"]) == ["down_proj", "k_proj", "q_proj", "v_proj"]


def test_layers_chosen_by_expressions_are_named_one_by_one(tmp_path: Path) -> None:
    first = _saved(tmp_path / "a", target_modules=r".*layers\.0.*q_proj")
    second = _saved(tmp_path / "b", target_modules=["q_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"])
    combine([first, second], tmp_path / "c")
    model = make("llama")
    assert set(load_adapter(model, tmp_path / "c").ranks) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def _tail(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_resizing_gives_the_nearest_of_its_rank_and_reports_the_error(tmp_path: Path, rank: int) -> None:
    folder = _saved(tmp_path / "a", use_rslora=True, modules_to_save=["model.norm"])
    done = resize(folder, tmp_path / "b", rank)
    before, after = read_updates(folder), read_updates(tmp_path / "b")
    assert list(after.layers) == list(before.layers)
    for path, update in before.layers.items():
        full = _delta(update)
        lost = float((_delta(after.layers[path]) - full).norm() / full.norm())
        assert lost == pytest.approx(_tail(full, rank), abs=1e-6)
        assert done.errors[path] == pytest.approx(lost, abs=1e-6)
        assert after.layers[path].r == rank
    assert all(torch.equal(after.others[key], tensor) for key, tensor in before.others.items())
    assert after.others


def test_a_larger_rank_can_be_trained(tmp_path: Path) -> None:
    """Rows and columns that are both zero would never get a gradient."""
    resize(_saved(tmp_path / "a"), tmp_path / "b", 7)
    model = make("llama")
    load_adapter(model, tmp_path / "b")
    tokens = torch.arange(3, 20)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in trainable_parameters(model).items():
        if name.endswith("lora_B"):
            assert parameter.grad is not None
            assert bool((parameter.grad.abs().sum(dim=0) > 0).all()), name


def test_cutting_reports_the_error_that_was_made(tmp_path: Path) -> None:
    folders = _three(tmp_path, "llama")
    done = combine(folders, tmp_path / "c", weights=WEIGHTS, method="svd", rank=5)
    sources = [read_updates(folder).layers for folder in folders]
    after = read_updates(tmp_path / "c").layers
    lost, whole = [], []
    for path, update in after.items():
        full = sum(w * _delta(layers[path]) for layers, w in zip(sources, WEIGHTS, strict=True))
        assert isinstance(full, Tensor)
        lost.append(float((_delta(update) - full).norm()))
        whole.append(float(full.norm()))
        assert done.errors[path] == pytest.approx(lost[-1] / whole[-1], rel=1e-4)
        assert done.errors[path] == pytest.approx(_tail(full, 5), rel=1e-4)
    assert done.error == pytest.approx(math.hypot(*lost) / math.hypot(*whole), rel=1e-4)
    assert json.loads((tmp_path / "c" / "provenance.json").read_text())["relative_error"] == done.error


def test_an_untrained_adapter_has_nothing_to_lose(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=4, target_modules=["q_proj"]))
    save(model, tmp_path / "a")
    assert resize(tmp_path / "a", tmp_path / "b", 2).error == 0.0
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "c", method="svd")
    assert all(float(_delta(u).abs().max()) == 0.0 for u in read_updates(tmp_path / "c").layers.values())


def _mistakes() -> dict[str, tuple[type[Exception], str, dict[str, Any]]]:
    return {
        "ranks": (
            AdapterError,
            r'needs equal ranks, but layer ".*down_proj" has 2 and 4; use "svd"',
            {"method": "linear"},
        ),
        "weights": (ConfigError, "1 weights for 2 adapters", {"weights": [1.0]}),
        "not finite": (ConfigError, "must be finite", {"weights": [1.0, math.nan]}),
        "density": (ConfigError, 'method "cat" prunes nothing', {"density": 0.5}),
        "density 0": (ConfigError, "0 < density <= 1", {"method": "ties_svd", "density": 0.0}),
        "rank": (ConfigError, '"cat" adds the ranks up', {"rank": 4}),
        "rank 0": (ConfigError, "at least 1", {"method": "svd", "rank": 0}),
        "rank 10000": (ConfigError, r"the largest useful rank is \d\d$", {"method": "svd", "rank": 10_000}),
    }


@pytest.mark.parametrize("mistake", _mistakes())
def test_mistakes_are_explained_and_write_nothing(tmp_path: Path, mistake: str) -> None:
    kind, message, asked = _mistakes()[mistake]
    folders = [_saved(tmp_path / "a", r=4), _saved(tmp_path / "b", r=2)]
    with pytest.raises(kind, match=message):
        combine(folders, tmp_path / "c", **asked)
    assert not (tmp_path / "c").exists()


def test_adapters_that_have_no_sum_are_refused(tmp_path: Path) -> None:
    plain = _saved(tmp_path / "plain")
    full = _saved(tmp_path / "full", modules_to_save=["model.norm"])
    with pytest.raises(AdapterError, match=r"full: has modules or biases trained in full .*norm"):
        combine([plain, full], tmp_path / "c")
    other = _saved(tmp_path / "other", "gpt2", target_modules=["c_fc"])
    fields = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "gpt2"}))
    fields = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "llama"}))
    with pytest.raises(AdapterError, match=r"made for llama, but .* for gpt2.*--model"):
        combine([plain, other], tmp_path / "c")


def test_a_layer_of_two_shapes_is_refused(tmp_path: Path) -> None:
    a, b = (Update(torch.ones(2, d), torch.ones(4, 2)) for d in (6, 8))
    with pytest.raises(AdapterError, match=r'"q" is \(4, 6\) in one adapter and \(4, 8\)'):
        combine_layers([({"q": a}, 1.0), ({"q": b}, 1.0)], CombineRecipe())


def test_damaged_values_are_named(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    next(t for key, t in tensors.items() if key.endswith("layers.0.self_attn.q_proj.lora_A.weight"))[0, 0] = math.inf
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj.lora_A.weight holds values that are not"):
        resize(tmp_path / "a", tmp_path / "b", 1)


@pytest.mark.parametrize("scale", [1e30, math.nan])
def test_results_that_are_not_finite_are_not_written(scale: float, tmp_path: Path) -> None:
    """The sources are finite; the scaling (or the weight) of the sum is what overflows float32."""
    folder = _saved(tmp_path / "a", lora_alpha=1e12)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor * 1e30 for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises((AdapterError, ConfigError), match=r"out: .*lora_[AB].weight holds infinity|finite"):
        combine([folder], tmp_path / "out", weights=[scale])
    assert not (tmp_path / "out").exists()


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a")
    before = (folder / "adapter_model.safetensors").read_bytes()
    for action in (
        lambda: resize(folder, folder, 2, overwrite=True),
        lambda: combine([folder], tmp_path / "." / "a", overwrite=True),
        lambda: resize(folder, _saved(tmp_path / "b"), 2),
    ):
        with pytest.raises(OutputError):
            action()
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_rank_that_no_layer_can_use_is_an_error(tmp_path: Path) -> None:
    """A rank above the smaller side of a layer adds nothing to it; the largest useful one is accepted."""
    folder = _saved(tmp_path / "a")
    sides = [min(update.shape) for update in read_updates(folder).layers.values()]
    said = rf'rank 10000 is larger than every layer: the widest, "model.+", .*useful rank is {max(sides)}$'
    for rank in (10_000, max(sides) + 1):
        with pytest.raises(ConfigError, match=said.replace("10000", str(rank))):
            resize(folder, tmp_path / "b", rank)
    assert not (tmp_path / "b").exists()
    done = resize(folder, tmp_path / "b", max(sides))
    narrow = [path for path, update in read_updates(folder).layers.items() if min(update.shape) < max(sides)]
    assert list(done.narrow) == narrow != []
    assert f"{len(narrow)} layers are narrower than rank {max(sides)}" in str(done)


def test_resizing_to_a_larger_rank_keeps_the_output(tmp_path: Path) -> None:
    """At its own rank and above, for every kind of layer."""
    for (name, targets), rank in itertools.product(TARGETS.items(), (4, 6)):
        folder = _saved(tmp_path / f"{name}{rank}", name, target_modules=targets, lora_alpha=3)
        resize(folder, tmp_path / f"{name}{rank}-resized", rank)
        logits: list[Tensor] = []
        for source in (folder, tmp_path / f"{name}{rank}-resized"):
            model: nn.Module = make(name)
            load_adapter(model, source)
            logits.append(run(model))
        assert float((logits[1] - logits[0]).abs().max()) <= 1e-5 * float(logits[0].abs().max())
        assert len(adapter_tensors(model)) == 2 * len(read_updates(folder).layers)
