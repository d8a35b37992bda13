"""Settings under their names in other trainers: our name with the same meaning, or a sentence about the difference.

Sources: transformers' TrainingArguments, TRL, PEFT, Unsloth, LLaMA-Factory, Axolotl, torchtune, mlx-lm, OpenAI.
"""

from __future__ import annotations

from collections.abc import Collection

from loratune.errors import nearest

SAME_MEANING: dict[str, tuple[str, ...]] = {
    "r": ("lora_r", "lora_rank", "rank", "lora_dim"),
    "rank": ("r", "lora_r", "lora_rank", "lora_dim"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("lora_target", "lora_target_modules", "lora_modules", "lora_attn_modules"),
    "modules_to_save": ("additional_target", "lora_modules_to_save"),
    "use_rslora": ("rslora", "peft_use_rslora"),
    "bias": ("lora_bias",),
    "init_lora_weights": ("peft_init_lora_weights",),
    "layers_to_transform": ("peft_layers_to_transform", "lora_layers_to_transform"),
    "learning_rate": ("lr",),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "epochs": ("num_train_epochs", "num_epochs", "n_epochs", "epoch"),
    "max_steps": ("iters", "max_iters", "num_steps", "steps", "max_train_steps", "num_training_steps"),
    "gradient_accumulation_steps": ("gradient_accumulation", "grad_accum", "grad_accumulation_steps"),
    "optim": ("optimizer", "optimiser"),
    "weight_decay": ("wd",),
    "adam_beta1": ("beta1",),
    "adam_beta2": ("beta2",),
    "adam_epsilon": ("adam_eps", "eps"),
    "max_grad_norm": ("clip_grad_norm", "grad_clip", "gradient_clipping", "max_norm"),
    "eval_every_steps": ("eval_steps", "steps_per_eval"),
    "save_every_steps": ("save_steps", "save_every", "checkpointing_steps"),
    "log_to": ("report_to",),
    "seed": ("random_state", "random_seed", "data_seed"),
    "out": ("output_dir", "output", "out_dir", "save_path", "output_path"),
    "overwrite": ("overwrite_output_dir",),
    "eval_data": ("eval_dataset", "eval_file", "validation_file", "val_data", "test_datasets"),
    "eval_fraction": ("val_size", "val_set_size", "test_size"),
    "num_proc": ("preprocessing_num_workers", "dataset_num_proc", "dataset_processes"),
    "max_new_tokens": ("max_tokens",),
}
"""Our name -> names elsewhere with the same meaning and unit."""

_BATCH = (
    "a micro-step is one packed row of tokens_per_row tokens, so there is no batch size in documents; "
    "set tokens_per_row, and gradient_accumulation_steps for rows per optimizer step"
)
_LENGTH = (
    "documents are packed into rows of tokens_per_row tokens; set that. A longer document is an error unless "
    "truncate is set"
)
_MODEL = "the base model is called model; on the command line it is the first word"
_DATA = "training files are called data; on the command line they follow the model"
_PRECISION = 'set precision: "bfloat16", "float16", "float32", "nf4" (4 bits) or "fp8" (8 bits); by default automatic'
_TRAIN_ON = 'set train_on: "assistant" (the default), "last" or "all"'
_SFT = "only supervised fine-tuning (sft) is available; preference objectives are not"
_PARALLEL = "a run uses one device; training on several GPUs is not available"
_ALWAYS = "documents are always packed, and never see each other; leave it out"
_ATTENTION = "the fastest exact attention is chosen automatically; leave it out"


def _each(names: str, sentence: str) -> dict[str, str]:
    """One sentence for several names, which are separated by spaces."""
    return dict.fromkeys(names.split(), sentence)


OTHER_MEANING: dict[str, str] = {
    **_each(
        "per_device_train_batch_size per_device_batch_size micro_batch_size batch_size train_batch_size "
        "per_device_eval_batch_size eval_batch_size per_gpu_train_batch_size",
        _BATCH,
    ),
    **_each(
        "max_seq_length max_seq_len max_length cutoff_len sequence_len block_size context_length model_max_length",
        _LENGTH,
    ),
    **_each(
        "packing sample_packing pad_to_sequence_len neat_packing padding_free",
        _ALWAYS,
    ),
    **_each(
        "model_name_or_path model_name base_model model_id model_path",
        _MODEL,
    ),
    **_each(
        "dataset_name datasets train_file dataset_path data_path train_data train_dataset dataset_dir training_file",
        _DATA,
    ),
    **_each(
        "bf16 fp16 load_in_4bit load_in_8bit quantization_bit dtype torch_dtype model_dtype mixed_precision "
        "bnb_4bit_quant_type quantization tf32",
        _PRECISION,
    ),
    **_each(
        "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss "
        "train_on_responses_only mask_history train_on_input",
        _TRAIN_ON,
    ),
    **_each(
        "beta pref_beta pref_loss dpo_beta loss_type rl stage",
        _SFT,
    ),
    **_each(
        "deepspeed fsdp fsdp_config num_gpus nproc_per_node ddp_timeout",
        _PARALLEL,
    ),
    **_each(
        "attn_implementation flash_attn flash_attention use_flash_attention_2 sdp_attention",
        _ATTENTION,
    ),
    "warmup_steps": "set warmup_ratio, the share of all optimizer steps",
    "num_warmup_steps": "set warmup_ratio, the share of all optimizer steps",
    "lora_scale": "set lora_alpha; the update is multiplied by lora_alpha / r",
    "lora_layers": "set layers_to_transform, a list of layer indices",
    "lora_target_linear": 'target_modules is "all-linear" by default, which is the same; leave it out',
    "gradient_checkpointing": 'set activations: "auto" (the default), "none", "selective", "full" or "offload"',
    "use_gradient_checkpointing": 'set activations: "auto" (the default), "none", "selective", "full" or "offload"',
    "resume_from_checkpoint": "set resume; the run continues from the last checkpoint in its output folder",
    "logging_steps": "every step is written to metrics.jsonl; leave it out",
    "save_total_limit": "the best and the last checkpoint are kept; leave it out",
    "load_best_model_at_end": "the best adapter on held-out data is always the result; leave it out",
    "eval_strategy": "held-out data are evaluated ten times in a run; eval_every_steps sets another interval",
    "evaluation_strategy": "held-out data are evaluated ten times in a run; eval_every_steps sets another interval",
    "save_strategy": "a checkpoint is saved at every evaluation; save_every_steps sets another interval",
    "finetuning_type": "every run trains a LoRA adapter; leave it out",
    "use_peft": "every run trains a LoRA adapter; leave it out",
    "use_lora": "every run trains a LoRA adapter; leave it out",
    "adapter": 'every run trains a LoRA adapter; leave it out. QLoRA is precision "nf4"',
    "do_train": "every run trains and evaluates; leave it out",
    "do_eval": "every run trains and evaluates; leave it out",
    "template": "the chat template is the model's own; chat_template names a file with another one",
    "max_samples": "all records are used; put fewer into the file",
    "group_by_length": "documents are packed, so no padding is saved by it; leave it out",
    "neftune_noise_alpha": "NEFTune is not available",
    "gpu": "set device, for example cuda:1",
    "gpus": _PARALLEL,
    "use_cpu": 'set device to "cpu"',
    "no_cuda": 'set device to "cpu"',
    "tokenizer_name": "the tokenizer is the model's own; leave it out",
    "remove_unused_columns": "unused fields of records are ignored with a note; leave it out",
    "push_to_hub": "loratune uploads nothing; use huggingface-cli upload",
}
"""A name elsewhere -> the way to say it here."""

VALUES: dict[str, dict[str, str]] = {
    "optim": dict.fromkeys(["adamw_torch", "adamw_torch_fused", "adamw_hf"], "adamw")
    | dict.fromkeys(["adamw_bnb_8bit", "adamw_8bit"], "adamw_8bit"),
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "target_modules": {"all": "all-linear"},
}
"""Our setting -> values elsewhere -> our value with the same meaning."""


def same_meaning(name: str, known: Collection[str]) -> str | None:
    """Our name for a setting called `name` elsewhere, if it is among the `known` names; None otherwise."""
    homes = [ours for ours, others in SAME_MEANING.items() if name in others and ours in known]
    return homes[0] if homes else None


def other_meaning(name: str) -> str | None:
    """A sentence for a setting that exists elsewhere under this name, but not here; None if it is unknown."""
    return OTHER_MEANING.get(name)


def hint(name: str, known: Collection[str]) -> str:
    """The end of the message 'unknown setting "name".': our name, an explanation, the nearest names, or ""."""
    ours = same_meaning(name, known)
    if ours is not None:
        return f" It is called {ours} here."
    explained = other_meaning(name)
    return f" Here, {explained}." if explained else nearest(name, known)
