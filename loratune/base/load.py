"""Loads a frozen base model and its tokenizer from a local folder or a hub id.

transformers does the loading. This module adds two checks. Every problem visible in the folder is reported before a
weight is read: no configuration, no tokenizer, pickled weights, an adapter instead of a model. And a checkpoint with
missing tensors is an error instead of a model with random layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune import foreign, hub
from loratune.base import generation, model_config
from loratune.base.model_config import LIBRARY_FAULTS, in_one_line
from loratune.box import MODEL_DIR
from loratune.config import Precision
from loratune.data.prompting import PromptForm
from loratune.data.template import read_template
from loratune.errors import ModelError, nearest
from loratune.ops.attention import documents as attention
from loratune.precision.contract import weight_format
from loratune.precision.loading import form_of_files, load_quantised
from loratune.precision.tensors import Checkpoint
from loratune.tables import PRECISIONS

POCKET = "loratune/pocket"
"""Name of the bundled model, accepted in place of a folder or hub id."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NUMBERS_OF_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""Fields of configurations, in the order in which they count. Whisper has the second, MPT the third."""

_FILES_OF_MODELS = (".json", ".jinja", ".safetensors", ".model", ".txt")


def resolve(model: str) -> str:
    """The local folder or hub id of `model`, after every check that reads no weight.

    If the hub cannot be reached, a hub id becomes the folder of its earlier download.

    Raises: ModelError: the folder is missing, is not a model, holds only pickled weights, or is an adapter; the hub
        has no such model.
    """
    foreign.check_name(model, ModelError)
    if model == POCKET and not Path(model).exists():
        return str(MODEL_DIR)
    folder = Path(model).expanduser()
    if not folder.exists():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, siblings)
        if _looks_like_hub_id(model):
            return _on_hub(model, near)
        raise ModelError(f"{model}: no such folder.{near}")
    if not folder.is_dir():
        raise ModelError(f"{model}: this is a file; give the folder that holds config.json and the weights")
    names = {p.name for p in folder.iterdir()}
    _check_files(folder)
    if "adapter_config.json" in names and "config.json" not in names:
        base = foreign.read_json(folder / "adapter_config.json", ModelError).get("base_model_name_or_path")
        raise ModelError(f"{model}: this is an adapter, not a base model; its base is {base or 'not recorded'}")
    if "config.json" not in names:
        raise ModelError(f"{model}: no config.json in this folder, so it is not a transformers model")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        why = f"only pickled weights ({pickled[0]}), which can run code when loaded" if pickled else "no weights"
        raise ModelError(f"{model}: {why}; loratune reads .safetensors files. Convert with save_pretrained()")
    whole = str(folder.resolve())
    foreign.check_name(whole, ModelError)  # a tokenizer cannot be read from other paths
    return whole


def _check_files(folder: Path) -> None:
    """Raises ModelError if a file of a model is no file. transformers would hang, or go on as if there were none."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _FILES_OF_MODELS:
            try:
                foreign.regular(file)
            except OSError as error:
                raise ModelError(f"{file}: {error.strerror or error}; is the download complete?") from error


def load(
    model: str,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model, frozen and in evaluation mode.

    Args:
        model: a local folder, a hub id, or `POCKET`.
        precision: precision of the weights in memory. "auto" is the format of the files on a GPU and float32 on a
            CPU. "nf4" quantises linear layers to 4 bits while they are read, "fp8" to 8 bits, which GPUs of compute
            capability 8.9 and newer multiply directly. All other tensors are then bfloat16 on a GPU (float16 if the
            files are) and float32 on a CPU. Weights that bitsandbytes stored in 4 bits stay in 4 bits. Weights stored
            in 8 bits with a scale for each row stay in 8 bits under "fp8".
        device: by default the first GPU, else the CPU.
        trust_remote_code: run Python code that belongs to the model. It can do anything on this machine.

    Raises: ModelError: as `resolve`, and when the architecture is unknown, not a causal language model, needs code of
        its own, or tensors are missing from the checkpoint or in a form that is not read.
    """
    where = device_of(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {where}: this machine shows no CUDA GPU; leave the device out to run on the CPU")
    wanted = weight_format(precision) if precision in PRECISIONS else None
    why = None if wanted is None else wanted.why_unsupported(where)
    if why is not None:
        raise ModelError(f"--precision {precision}: {why}")
    source = resolve(model)
    config = load_config(model, trust_remote_code=trust_remote_code)
    generation.read(source)  # transformers would treat a damaged file as missing
    _check_causal(model, config, trust_remote_code)
    files = form_of_files(model, config, wanted)
    stored = Checkpoint(Path(source)).tensors if Path(source).is_dir() else {}
    if stored:
        model_config.check_against_files(model, config, stored, trust_remote_code=trust_remote_code)
    try:
        if wanted is not None or files.reader is not None:
            dtype = _compute_dtype(precision, where, config)
            loaded, missing = load_quantised(local_folder(source), config, dtype, where, files, wanted)
        else:
            loaded, missing = _load_dense(source, config, precision, where, trust_remote_code)
            if files.dequantised and where.type == "cpu" and precision == "auto":
                loaded = loaded.float()
    except (*LIBRARY_FAULTS, SafetensorError) as error:
        if isinstance(error, ModelError | torch.OutOfMemoryError):
            raise
        raise ModelError(f"{model}: the weights cannot be loaded: {in_one_line(error)}") from error
    if missing:
        raise ModelError(
            f"{model}: tensors are missing from the checkpoint or of the wrong shape, {len(missing)} in all, first "
            f"{missing[0]}; is the download complete?"
        )
    model_config.check_layers(model, loaded, stored)
    if model != POCKET and not Path(model).expanduser().exists():
        loaded.name_or_path = model  # adapters name the hub id as their base, not the folder it was downloaded to
    attention.keep_soft_caps(loaded)
    loaded.requires_grad_(False)
    result: PreTrainedModel = loaded.eval()
    return result


def _load_dense(
    source: str, config: Any, precision: Precision, where: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model as transformers loads it, and the names of missing tensors."""
    dtype: torch.dtype | str = DTYPES.get(precision, "auto")
    if precision == "auto" and where.type == "cpu":
        dtype = torch.float32
    loading: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        device_map=None if where.type == "cpu" else {"": where},
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # reported by the caller, with a name
        output_loading_info=True,
    )
    loaded, report = loading
    missing = sorted(report["missing_keys"])
    missing += sorted(str(key[0]) for key in report.get("mismatched_keys", ()) if key[0] not in missing)
    return loaded, missing


def _compute_dtype(precision: Precision, where: torch.device, config: Any) -> torch.dtype:
    """Dtype of products with quantised weights, and of all tensors that are not quantised."""
    if precision in DTYPES:
        return DTYPES[precision]
    if where.type == "cpu":
        return torch.float32
    return torch.float16 if getattr(config, "dtype", None) == torch.float16 else torch.bfloat16


def local_folder(source: str) -> str:
    """The folder that holds the files of `source`, downloaded if it is a hub id."""
    return source if Path(source).is_dir() else snapshot_download(source, allow_patterns=["*.safetensors", "*.json"])


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of `model`; reads no weights. Raises: ModelError: as `load`."""
    return model_config.read_config(model, resolve(model), trust_remote_code=trust_remote_code)


def load_tokenizer(
    model: str, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to `model`.

    Args:
        model: as for `load`.
        chat_template: file with a Jinja chat template that replaces the tokenizer's own.
        trust_remote_code: run Python code that belongs to the tokenizer, as in `load`.

    Raises: ModelError: the folder has no tokenizer, or it needs code of its own. ConfigError: the template file is
        unreadable.
    """
    source = resolve(model)
    if Path(source).is_dir():
        names = {p.name for p in Path(source).iterdir()}
        if not names & {
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "tokenizer_config.json",
        }:
            raise ModelError(
                f"{model}: no tokenizer in this folder (tokenizer.json); save the model's tokenizer there"
            )
    tokenizer = _tokenizer(model, source, trust_remote_code)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{model}: tokenizer_config.json: model_max_length is {tokenizer.model_max_length!r:.60}; it is a number"
        )
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if tokenizer.chat_template:
        generation.render_turns(tokenizer, chat_template or f"{model}: its chat template")
    result: PreTrainedTokenizerBase = tokenizer
    return result


def stop_ids(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> frozenset[int]:
    """Token ids that end the model's turn, from its generation config, its tokenizer and its chat template.

    `model` may be a name, as for `load`; then no weights are read.
    Raises: ModelError: as `load`; generation_config.json is damaged.
    """
    return generation.stop_ids(_generation(model, trust_remote_code), tokenizer)


def stop_note(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forms: Sequence[PromptForm],
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """One sentence if answers in data of these forms end with a token at which other programs do not stop.

    Raises: ModelError: as `stop_ids`.
    """
    found = generation.note(_generation(model, trust_remote_code), tokenizer, forms)
    return [found] if found else []


def max_document_tokens(model: Any) -> int | None:
    """The longest document that a model's positions allow, in tokens; None if its configuration has no limit.

    XLNet writes -1 for no limit. RoBERTa and its descendants count from the padding index + 1, so the lines of their
    table of positions up to the padding index are not free. ProphetNet's predictions look up one position further.
    The tables of BART, OPT and XGLM have lines of their own for the offset.

    Args:
        model: the model, or its configuration.

    Raises: ModelError: no model can be made of the configuration.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _NUMBERS_OF_POSITIONS)
    limit = next((int(value) for value in found if value and value > 0), None)
    if limit is None or getattr(text, "rope_parameters", None):  # rotary embeddings need no table
        return limit
    made = model if isinstance(model, PreTrainedModel) else model_config.without_data(config, torch.float32)
    tables = (module for module in made.modules() if module is not made.get_input_embeddings())
    padding = (
        table.padding_idx for table in tables if isinstance(table, nn.Embedding) and table.num_embeddings == limit
    )
    ahead = int(hasattr(text, "ngram"))
    return limit - max((index + 1 for index in padding if index is not None), default=0) - ahead


def vocabulary(model: PreTrainedModel) -> int | None:
    """The number of tokens that the model can read: rows of its input embedding. None if it has no such table."""
    table = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(table) if isinstance(table, int) else None


def configured_vocabulary(config: Any) -> int | None:
    """The number of tokens in a model's configuration, before it is loaded; None if it has none."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(device: str | torch.device | None) -> torch.device:
    """The named device, by default the first GPU, else the CPU. Raises: ModelError: no such device."""
    try:
        return torch.device(device) if device is not None else default_device()
    except RuntimeError as error:
        raise ModelError(f'device "{device}" is unknown; give cpu, cuda, cuda:1 or mps') from error


def _tokenizer(model: str, source: str, trust_remote_code: bool) -> Any:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        file = Path(source) / name
        if file.exists():
            foreign.read_json(file, ModelError)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises the class Exception itself for a damaged tokenizer.json
        raise model_config.refused(model, "no usable tokenizer", error) from error


def _check_causal(model: str, config: Any, trust_remote_code: bool) -> None:
    """Raises ModelError for models that are not causal, also where the family has a causal variant (BERT)."""
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    made_as = config.architectures or []
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if type(config) not in AutoModelForCausalLM._model_mapping or (made_as and not causal.intersection(made_as)):
        kind = made_as[0] if made_as else config.model_type
        raise ModelError(f"{model}: {kind} is not a causal language model, which train and chat need")


def _generation(model: str | PreTrainedModel, trust_remote_code: bool) -> object:
    """The generation settings; without a file, the model's configuration, as transformers does."""
    if not isinstance(model, str):
        return model.generation_config
    found = generation.read(resolve(model))
    return found or load_config(model, trust_remote_code=trust_remote_code).get_text_config()


def _on_hub(model: str, near: str) -> str:
    try:
        return hub.find(model, "model") or model
    except hub.NotOnHub as error:
        raise ModelError(f"{model}: no such folder here, and the hub cannot provide it: {error}.{near}") from error


def _looks_like_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(p and not p.startswith((".", "~")) for p in parts)
