"""Which key is meant by one that is not there: another table's, another kind's, or one by another tool's name."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from qtune.recipe.schema import KINDS, KeyPath, Recipe, Table

TABLES = {
    "adapter": ("lora", "qlora", "peft", "lora_config", "peft_config", "prompt_tuning", "p_tuning"),
    "quantization": ("bnb", "bitsandbytes", "quant", "bnb_config", "quantization_config"),
    "data": ("dataset", "datasets", "dataset_config"),
    "training": ("train", "trainer", "sft", "sft_config", "training_args", "training_arguments", "hyperparameters"),
    "model": ("base_model", "llm"),
    "memory": ("hardware", "vram", "gpu"),
    "output": ("save", "export", "checkpoint"),
}
"""What other tools call our tables."""

KEYS = {
    ("model", "base"): ("model", "name", "model_name", "model_name_or_path", "model_id", "base_model", "pretrained"),
    ("model", "attention"): ("attn_implementation", "attn", "flash_attention", "use_flash_attention_2"),
    ("quantization", "kind"): ("load_in_4bit", "load_in_8bit", "bits", "bnb_4bit_quant_type", "quant_type", "scheme"),
    ("quantization", "double_quantization"): ("bnb_4bit_use_double_quant", "double_quant", "use_double_quant"),
    ("quantization", "compute_dtype"): ("bnb_4bit_compute_dtype", "bf16", "fp16", "torch_dtype", "mixed_precision"),
    ("adapter", "kind"): ("type", "peft_type", "method", "adapter_type"),
    ("adapter", "rank"): ("r", "lora_r", "lora_rank"),
    ("adapter", "alpha"): ("lora_alpha",),
    ("adapter", "dropout"): ("lora_dropout",),
    ("adapter", "target_modules"): ("lora_target_modules", "targets", "modules", "lora_target"),
    ("adapter", "rslora"): ("use_rslora",),
    ("adapter", "dora"): ("use_dora",),
    ("adapter", "initialization"): ("init_lora_weights", "prompt_tuning_init", "init"),
    ("adapter", "virtual_tokens"): ("num_virtual_tokens", "prompt_length", "prefix_length", "n_tokens"),
    ("adapter", "encoder_hidden_size"): ("encoder_hidden", "hidden_size"),
    ("adapter", "encoder"): ("encoder_reparameterization_type", "encoder_type"),
    ("adapter", "projection"): ("prefix_projection",),
    ("adapter", "text"): ("prompt_tuning_init_text", "init_text", "prompt"),
    ("data", "train"): ("path", "file", "files", "train_file", "train_data", "train_dataset", "dataset", "data"),
    ("data", "validation"): (
        *("val_set_size", "test_size", "eval_split", "validation_split", "validation_file", "eval_dataset", "val"),
    ),
    ("data", "test"): ("test_file", "test_data", "test_dataset"),
    ("data", "max_length"): (
        *("max_seq_length", "max_seq_len", "seq_length", "seq_len", "sequence_len", "cutoff_len", "block_size"),
        *("context_length", "model_max_length", "max_tokens"),
    ),
    ("data", "columns"): ("dataset_text_field", "text_field", "text_column", "prompt_column", "response_column"),
    ("data", "system"): ("system_message",),
    ("data", "loss_on"): ("train_on_inputs", "completion_only_loss", "assistant_only_loss", "mask_inputs"),
    ("data", "packing"): ("sample_packing", "pack"),
    ("data", "shuffle_rows"): ("shuffle", "shuffle_buffer", "buffer_size"),
    ("training", "epochs"): ("num_train_epochs", "num_epochs", "n_epochs", "epoch"),
    ("training", "steps"): ("max_steps", "num_steps", "iterations", "iters"),
    ("training", "batch_size"): ("effective_batch_size", "global_batch_size", "batch"),
    ("training", "micro_batch_size"): (
        *("per_device_train_batch_size", "per_device_batch_size", "gradient_accumulation_steps", "grad_accum"),
        *("gradient_accumulation", "micro_batch"),
    ),
    ("training", "learning_rate"): ("lr", "learning-rate", "max_lr", "rate", "lr_rate"),
    ("training", "schedule"): ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    ("training", "warmup"): ("warmup_ratio", "warmup_steps", "num_warmup_steps"),
    ("training", "weight_decay"): ("wd", "decay"),
    ("training", "max_gradient_norm"): ("max_grad_norm", "grad_clip", "gradient_clipping", "clip", "clip_grad_norm"),
    ("training", "optimizer"): ("optim", "optimizer_type"),
    ("training", "gradient_checkpointing"): (
        "use_gradient_checkpointing",
        "grad_checkpoint",
        "activation_checkpointing",
    ),
    ("training", "seed"): ("random_seed", "random_state"),
    ("training", "log_every"): ("logging_steps", "log_steps", "log_interval"),
    ("training", "eval_every"): ("eval_steps", "evals_per_epoch", "evaluation_steps", "eval_interval"),
    ("training", "checkpoint_every"): ("save_steps", "saves_per_epoch", "save_every", "save_interval"),
    ("training", "keep_checkpoints"): ("save_total_limit", "max_checkpoints"),
    ("training", "patience"): ("early_stopping", "early_stopping_patience"),
    ("training", "result"): ("load_best_model_at_end", "best", "save_best"),
    ("training", "trackers"): ("report_to", "wandb", "wandb_project", "tensorboard", "logger", "tracker"),
    ("memory", "budget"): ("vram", "max_memory", "limit", "memory", "gpu_memory"),
    ("memory", "layers"): ("cpu_offload", "offload", "device_map"),
    ("output", "directory"): ("output_dir", "dir", "folder", "path", "out"),
    ("output", "name"): ("run_name", "experiment_name"),
    ("output", "gguf"): ("save_gguf",),
}
"""What other tools call our keys; the same word may mean one key in one table and another elsewhere."""


def table_meant(word: str) -> str | None:
    """Our table by another tool's name; None for any other word."""
    plain = _plain(word)
    return next((table for table, others in TABLES.items() if plain in others), None)


def keys_meant(word: str) -> list[str]:
    """The keys, "table.key", that have this name, else those that other tools call so; none for any other word."""
    table, _, key = word.rpartition(".")  # a whole one is itself
    tables = [one for one in _tables() if not table or one[0] == table]
    own = [f"{name}.{key}" for name, kinds in tables if any(key in kind.model_fields for kind in kinds)]
    plain = _plain(word)
    return own or [".".join(key) for key, others in KEYS.items() if plain in others]


def is_switch(key: str) -> bool:
    """Whether a key, "table.key", is true or false and nothing else."""
    return any(annotation is bool for annotation in _annotations(key))


def takes_list(key: str) -> bool:
    """Whether the value of a key, "table.key", can be a list."""
    return any(map(_holds_list, _annotations(key)))


def _annotations(key: str) -> list[Any]:
    """The types that a key has, in each kind of its table that has it."""
    table, _, name = key.partition(".")
    its = dict(_tables()).get(table, ())
    return [kind.model_fields[name].annotation for kind in its if name in kind.model_fields]


def _holds_list(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list) or any(map(_holds_list, get_args(annotation)))


def advice(path: KeyPath, value: object = None) -> str | None:
    """What to say of a key that is not there; None where its word is that of no key.

    value: that it was given; of a table, the keys in it are looked at as well.
    """
    *inside, word = map(str, path)
    if not inside:
        if (table := table_meant(word)) is not None:
            keys = value if isinstance(value, Mapping) else ()
            meant = {key: found for key in keys if (found := keys_meant(str(key)))}
            others = "".join(f", and its {key}: {' or '.join(_first_in(table, found))}" for key, found in meant.items())
            return f"here that is: [{table}]{others}"
        found = keys_meant(word)
        return f"it stands in a table: {' or '.join(found)}" if found else None
    if len(inside) > 1:  # an entry of data.train, which has keys of its own
        return None
    if (kinds := _kinds_with(inside[0], word)) != []:
        return "that is a key of kind = " + " or ".join(f'"{kind}"' for kind in kinds)
    found = keys_meant(word)
    return f"here that is: {' or '.join(_first_in(inside[0], found))}" if found else None


def _first_in(table: str, keys: list[str]) -> list[str]:
    """The keys of a table; all where none is one of it."""
    return [key for key in keys if key.startswith(f"{table}.")] or keys


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _tables() -> Iterator[tuple[str, tuple[type[Table], ...]]]:
    """Each table of a recipe with the kinds that it has."""
    for name, field in Recipe.model_fields.items():
        yield name, get_args(field.annotation) or (field.annotation,)


def _kinds_with(table: str, key: str) -> list[str]:
    """The kinds of a table that have a key."""
    return [kind for kind, its in KINDS.get(table, {}).items() if key in its.model_fields]
