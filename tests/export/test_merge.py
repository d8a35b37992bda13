"""A merged checkpoint is renamed into place only after it was loaded again and equals base + adapter to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from loratune.config import LoraConfig
from loratune.errors import AdapterError, DataError, ModelError, OutputError
from loratune.export.dtypes import check_written
from loratune.export.merge import Merged, merge_checkpoint
from loratune.lora.inject import activate, active, attach
from tests.conftest import build

GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 300, (length,), generator=GENERATOR).tolist() for length in (5, 40, 17, 2, 31, 24)]
RANDOM = {"init_lora_weights": False}  # B is not zero, so that the adapter has an effect


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


def adapted(name: str, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    model = build(name, dtype=dtype)
    attach(model, LoraConfig(r=4, **RANDOM, **settings), name="a")
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[1]])).logits


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")  # no graph of the comparison is kept
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gptneox", "mixtral", "mamba"])
def test_the_loaded_checkpoint_is_base_plus_adapter(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = adapted(name)
    expected = logits(model)
    result = merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The project promises 1e-4 in float32 for logits of order one.
    assert float((logits(loaded) - expected).abs().max()) <= 1e-4
    assert result.verification.difference.largest <= 1e-4 < result.verification.adapter_effect.largest
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert not [key for key in loaded.state_dict() if "lora" in key]


def test_modules_in_full_and_biases_are_merged_into_their_places(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = adapted("gptneox", modules_to_save=["lm_head"], bias="all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = logits(model)
    merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS)
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("active_before", ["a", None])
def test_the_model_comes_back_as_it_was(
    active_before: str | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = adapted("llama", torch.bfloat16)
    activate(model, active_before)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS)
    after = model.state_dict()
    assert list(active(model)) == ([active_before] if active_before else [])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_merging_for_good_leaves_a_plain_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapted("llama")
    kept = merge_checkpoint(adapted("llama"), tokenizer, "a", tmp_path / "kept", prompts=PROMPTS)
    gone = merge_checkpoint(model, tokenizer, "a", tmp_path / "gone", prompts=PROMPTS, keep_adapter=False)
    assert kept.verification == gone.verification
    assert not active(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_files_hold_the_rounded_sum(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In bfloat16 the difference is an effect of rounding, far below the effect of the adapter."""
    model = adapted("llama")
    layer = model.model.layers[1].mlp.up_proj
    expected = (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).to(dtype)
    result = merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS, dtype=dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {{  # noqa: SIM118
            torch.bfloat16: "BF16", torch.float16: "F16"
        }[dtype]}  # fmt: skip
        assert torch.equal(file.get_tensor("model.layers.1.mlp.up_proj.weight"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    v = result.verification
    assert 0.25 * v.rounding.rms < v.difference.rms < 4 * v.rounding.rms
    assert v.difference.rms < 0.1 * v.adapter_effect.rms


def forget_dtype(folder: Path) -> None:
    """Removes the dtype from a model's configuration."""
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_dtype_of_the_bases_files_is_kept(
    name: str, recorded: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A bfloat16 base that runs in float32 (as on a CPU) gives bfloat16; its float32 tensors stay float32."""
    base = build(name, dtype=torch.bfloat16)
    last_norm = [module for module in base.modules() if "Norm" in type(module).__name__][-1]
    last_norm.weight.data = last_norm.weight.data.float()
    base.save_pretrained(tmp_path / "base")
    if not recorded:
        forget_dtype(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    attach(model, LoraConfig(r=4, **RANDOM), name="a")
    result = merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS)
    assert result.dtype == "bfloat16"
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: t.dtype for key, t in before.items()}
    assert torch.float32 in {tensor.dtype for tensor in after.values()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_stay_tied_and_are_written_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapted("gemma2")
    merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS, dtype=torch.bfloat16)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def forget_layer(model: PreTrainedModel) -> None:
    """The unmerged model has one update that the checkpoint lacks, as if the merge forgot a layer."""
    layer = model.model.layers[0].self_attn.o_proj
    update = (layer.scaling * layer.lora_B @ layer.lora_A).to(layer.weight.dtype)
    layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ update.T)


def scale_output(model: PreTrainedModel) -> None:
    """A change of the instance that no checkpoint holds."""
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * 1.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forgotten_layer_is_refused(dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert_refused(adapted("llama", dtype), forget_layer, tokenizer, tmp_path)


def test_one_percent_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert_refused(adapted("llama"), scale_output, tokenizer, tmp_path)


def assert_refused(
    model: PreTrainedModel, fault: Callable[[PreTrainedModel], None], tokenizer: PreTrainedTokenizerFast, where: Path
) -> None:
    fault(model)
    with pytest.raises(ModelError, match="rounding explains"):
        merge_checkpoint(model, tokenizer, "a", where / "out", prompts=PROMPTS)
    assert list(where.iterdir()) == [], "nothing may be left behind"
    assert list(active(model)) == ["a"]


def test_rounding_that_loses_the_adapter_is_said(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapted("llama", lora_alpha=1e-4)
    result = merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS, dtype=torch.bfloat16)
    assert not result.verification.adapter_survives
    assert "merge in float32" in str(result)


def make_too_large(model: PreTrainedModel) -> str:
    """A finite update that float16 cannot hold."""
    model.model.layers[1].mlp.up_proj.lora_B.data[3] = 1e7
    return r"model.layers.1.mlp.up_proj.weight: .* largest value of float16 is 65,504"


def fill_head(value: float) -> Callable[[PreTrainedModel], str]:
    def fault(model: PreTrainedModel) -> str:
        model.lm_head.weight.data[2, 3] = value
        return r"lm_head"

    return fault


def break_base(model: PreTrainedModel) -> str:
    """NaN in a row of the base's embedding that no prompt reads, so that no logit shows it."""
    model.model.embed_tokens.weight.data[299] = float("nan")
    return r"model.embed_tokens.weight holds NaN"


@pytest.mark.parametrize(
    "fault", [make_too_large, fill_head(float("nan")), fill_head(float("inf")), fill_head(1e5), break_base]
)
@pytest.mark.parametrize("keep_adapter", [False, True])
def test_tensors_that_are_not_finite_are_named_and_not_written(
    fault: Callable[[PreTrainedModel], str], keep_adapter: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build("llama")
    attach(model, LoraConfig(r=4, modules_to_save=["lm_head"], **RANDOM), name="a")
    says = fault(model)
    with pytest.raises((ModelError, AdapterError), match=says):
        merge_checkpoint(
            model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS, dtype=torch.float16, keep_adapter=keep_adapter
        )
    assert list(tmp_path.iterdir()) == []


def test_infinity_in_a_mask_of_the_model_is_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Buffers hold infinity on purpose in some models; a merge leaves them."""
    model = adapted("llama")
    model.model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    check_written(model, model.state_dict(), "x")
    with pytest.raises(ModelError, match=r"x: model.norm.weight holds infinity"):
        model.model.norm.weight.data[0] = float("inf")
        check_written(model, model.state_dict(), "x")


@pytest.fixture
def model() -> PreTrainedModel:
    return adapted("llama")


def refuse(kind: type[Exception], words: str, model: PreTrainedModel, out: Path, **settings: object) -> None:
    given = {"prompts": PROMPTS, **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(kind, match=words):
        merge_checkpoint(model, tokenizer, str(given.pop("name", "a")), out, **given)


def test_existing_folders_are_safe(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refuse(OutputError, "exists already", model, out)
    refuse(OutputError, "not a checkpoint", model, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_inputs_are_not_overwritten(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    for source in (tmp_path / "out", tmp_path / "out" / "adapter"):
        refuse(OutputError, "which the merge reads", model, tmp_path / "out", overwrite=True, sources=[source])


def test_a_checkpoint_is_replaced_only_when_asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    refuse(OutputError, "exists already", model, tmp_path / "out")
    again: Merged = merge_checkpoint(
        model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS, overwrite=True, card=lambda v: f"{v.positions}\n"
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "out" / "README.md").read_text() == f"{again.verification.positions}\n"
    assert again.file_bytes == len(first)


def test_clear_errors_before_any_work(model: PreTrainedModel, tmp_path: Path) -> None:
    refuse(AdapterError, 'no adapter "b"', model, tmp_path / "out", name="b")
    refuse(DataError, "at least one", model, tmp_path / "out", prompts=[])
    refuse(DataError, "none of them empty", model, tmp_path / "out", prompts=[[1], []])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("saved", [["lm_head"], ["model.embed_tokens"]])
@pytest.mark.parametrize("keep_adapter", [False, True])
def test_a_head_trained_alone_is_untied_in_the_checkpoint(
    keep_adapter: bool, saved: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build("gemma3")  # tied
    attach(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, **RANDOM), name="a")
    with torch.no_grad():
        module = model.get_submodule(saved[0])
        module.weight.add_(0.05 * torch.randn_like(module.weight))
    expected = logits(model)
    merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS, keep_adapter=keep_adapter)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    assert float((logits(loaded) - expected).abs().max()) <= 1e-4
    assert model.config.tie_word_embeddings == keep_adapter


def test_a_tied_head_cannot_be_merged(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapted("gpt2", target_modules=["c_attn", "wte"])
    with pytest.raises(AdapterError, match="tied"):
        merge_checkpoint(model, tokenizer, "a", tmp_path / "out", prompts=PROMPTS)
    assert list(tmp_path.iterdir()) == []
    assert list(active(model)) == ["a"]
