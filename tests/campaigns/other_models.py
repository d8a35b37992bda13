"""Encoders, encoder-decoders, vision, audio and vision-language models through the Python API.

Each class is built small and random. The columns: an adapter on every linear layer; its logits and gradients in PEFT;
a saved adapter comes back; merged, and unmerged to the bit; and the loss that falls under AdamW.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn

import loratune as lt
from loratune.lora.inject import trainable_parameters
from tests.campaigns.architecture_checks import Failed, Row, tried
from tests.campaigns.small_configs import shrunk

COLUMNS = ("attach", "files", "peft", "merge", "loss")

GROUPS: dict[str, tuple[str, ...]] = {
    "encoders": (
        "AlbertForMaskedLM",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "DebertaV2ForMaskedLM",
        "DebertaV2ForSequenceClassification",
        "DistilBertForSequenceClassification",
        "ElectraForSequenceClassification",
        "MPNetForMaskedLM",
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
    ),
    "encoder-decoders": (
        "BartForConditionalGeneration",
        "BlenderbotSmallForConditionalGeneration",
        "MBartForConditionalGeneration",
        "MT5ForConditionalGeneration",
        "MarianMTModel",
        "PegasusForConditionalGeneration",
        "T5ForConditionalGeneration",
        "UMT5ForConditionalGeneration",
    ),
    "vision": (
        "BeitForImageClassification",
        "CLIPVisionModel",
        "ConvNextForImageClassification",
        "DeiTForImageClassification",
        "Dinov2ForImageClassification",
        "SegformerForImageClassification",
        "SiglipVisionModel",
        "SwinForImageClassification",
        "ViTForImageClassification",
    ),
    "audio": (
        "ASTForAudioClassification",
        "HubertForCTC",
        "Wav2Vec2ForCTC",
        "WhisperForConditionalGeneration",
    ),
    "vision-language, text tokens": (
        "Gemma3ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    ),
}
_IMAGES = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
ADJUST: dict[str, dict[str, Any]] = {
    "ASTForAudioClassification": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "ConvNextForImageClassification": {
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
        "layer_scale_init_value": 1.0,
    },
    "SegformerForImageClassification": {
        "hidden_sizes": [16, 16, 32, 32],
        "decoder_hidden_size": 32,
        "num_attention_heads": [1, 1, 2, 2],
    },
    "SwinForImageClassification": _IMAGES | _STAGES | {"patch_size": 2},
    **dict.fromkeys(("BeitForImageClassification", "DeiTForImageClassification"), _IMAGES),
    **dict.fromkeys(("CLIPVisionModel", "Dinov2ForImageClassification", "SiglipVisionModel"), _IMAGES),
    "ViTForImageClassification": _IMAGES,
    **{
        name: {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        for name in ("HubertForCTC", "Wav2Vec2ForCTC")
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {"rope_parameters": _SECTIONS},
        "vision_config": {"depth": 1, "embed_dim": 64},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {"rope_parameters": _SECTIONS},
        "vision_config": {"depth": 1, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": {"rope_parameters": _SECTIONS},
        "vision_config": {"depth": 1, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
    "WhisperForConditionalGeneration": {"num_mel_bins": 16, "max_source_positions": 32},
}


def build(name: str) -> tf.PreTrainedModel:
    """The small random model of a class, frozen, the same in every call."""
    make = getattr(tf, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: tf.PreTrainedModel = make(shrunk(make.config_class, ADJUST.get(name, {})))
    return model.float().requires_grad_(False).eval()


def inputs(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    """Fixed inputs of two examples."""
    draw, config = torch.Generator().manual_seed(1), model.config
    tokens = torch.randint(20, 200, (2, 12), generator=draw)
    if model.main_input_name == "input_ids":
        given = {"input_ids": tokens}
    elif model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None)
        side = size if isinstance(size, int) else 32
        given = {"pixel_values": torch.randn(2, 3, side, side, generator=draw)}
    elif model.main_input_name == "input_features":
        given = {"input_features": torch.randn(2, config.num_mel_bins, 64, generator=draw)}
    elif hasattr(config, "num_mel_bins"):
        given = {"input_values": torch.randn(2, config.max_length, config.num_mel_bins, generator=draw)}
    else:
        given = {"input_values": torch.randn(2, 4000, generator=draw)}
    return given | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The logits, or the first output of models without a head."""
    found: Tensor = model(**given)[0]
    return found


def _adapted(name: str) -> tf.PreTrainedModel:
    model = build(name)
    lt.attach(model, lt.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    return model


def check(name: str) -> Iterator[Row]:
    """Tries every column; yields the row after each."""
    row = Row(name)
    calls = {"attach": _attaches, "files": _files, "peft": _peft, "merge": _merges, "loss": _learns}
    for column, call in calls.items():
        row.columns[column] = tried(lambda call=call: call(name, row.facts))
        yield row


def _attaches(name: str, facts: dict[str, Any]) -> None:
    model = _adapted(name)
    total = sum(isinstance(m, nn.Linear) for m in build(name).modules())
    given = inputs(model)
    loss = output(model, given).square().mean()
    trained = trainable_parameters(model)
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    unused = [n for n, gradient in zip(trained, found, strict=True) if gradient is None]
    facts |= {"adapted": len(trained) // 2, "linears": total, "without gradient": len(unused)}


def _files(name: str, facts: dict[str, Any]) -> None:
    model, again = _adapted(name), build(name)
    given = inputs(model)
    with torch.no_grad():
        before, expected = output(again, given), output(model, given)
        with tempfile.TemporaryDirectory() as folder:
            lt.save(model, f"{folder}/adapter")
            lt.load_adapter(again, f"{folder}/adapter")
        got = output(again, given)
    if not float((expected - before).abs().max()) > 1e-4 or not torch.equal(got, expected):
        raise Failed("a saved adapter does not come back the same")


def _peft(name: str, facts: dict[str, Any]) -> None:
    model = _adapted(name)
    given = inputs(model)
    with tempfile.TemporaryDirectory() as folder:
        lt.save(model, f"{folder}/adapter")
        theirs = peft.PeftModel.from_pretrained(build(name), f"{folder}/adapter", is_trainable=True).eval()
    ours, other = output(model, given), output(theirs, given)
    difference = float((ours - other).abs().max())
    if difference > 1e-5 * max(1.0, float(ours.abs().max())):
        raise Failed(f"PEFT computes another result from the saved adapter: difference {difference:.1g}")
    norms = [
        _norm(out, parts) for out, parts in ((ours, trainable_parameters(model).values()), (other, _lora(theirs)))
    ]
    facts["peft_error"] = difference
    if abs(norms[0] - norms[1]) > 1e-4 * norms[1]:
        raise Failed(f"PEFT gets other gradients: norm {norms[1]:.5g}, here {norms[0]:.5g}")


def _lora(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _norm(out: Tensor, parameters: Any) -> float:
    trained = list(parameters)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((out * weights).mean(), trained, allow_unused=True, materialize_grads=True)
    return float(torch.cat([gradient.flatten() for gradient in found]).double().norm())


def _merges(name: str, facts: dict[str, Any]) -> None:
    model = _adapted(name)
    given = inputs(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        expected = output(model, given)
        lt.merge(model)
        merged = output(model, given)
        lt.unmerge(model)
    difference = float((merged - expected).abs().max())
    if difference > 2e-5 * max(1.0, float(expected.abs().max())):
        raise Failed(f"merging changes the result by {difference:.1g}")
    if not all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights):
        raise Failed("unmerging does not restore the weights to the bit")


def _learns(name: str, facts: dict[str, Any]) -> None:
    model = build(name)
    lt.attach(model, lt.LoraConfig(r=2, lora_alpha=4))
    given = inputs(model)
    with torch.no_grad():
        wanted = output(model, given)
        wanted = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)) * wanted.std()
    optimiser = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(15):
        loss = (output(model, given) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    facts["losses"] = [losses[0], losses[-1]]
    if not losses[-1] < 0.98 * losses[0]:
        raise Failed(f"the loss goes from {losses[0]:.4g} to {losses[-1]:.4g} in 15 steps")
