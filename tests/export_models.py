"""Tiny models of several families and random adapters on them, made when a test asks; no downloads."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qtune.adapter.attach import attach_adapter
from qtune.adapter.state import save_adapter
from qtune.device.present import present_device
from qtune.export.adapter_weights import open_adapter
from qtune.export.basis import Basis
from qtune.export.layout import empty_model, layout_of
from qtune.export.merge import Merge, Weights, plan_merge, write_merge
from qtune.export.model_files import copy_side_files, merged_config, write_json
from qtune.model.checkpoint import Checkpoint
from qtune.model.load import load_base
from qtune.plan import make_plan
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NF4 = Basis("nf4", True, torch.float32, torch.float32)


def tiny_base(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random model of a family, saved as a checkpoint folder."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initial biases are 0 and norms 1; nothing would notice if an export lost them.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "embed" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


PACKED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
SKIPPED = "model.layers.1.mlp.down_proj"


def packed_base(plain: Path, folder: Path, kind: str, compute_dtype: str = "float32", *skipped: str) -> Path:
    """A checkpoint as bitsandbytes has quantized and transformers saved it; modules that are `skipped` in 16 bits."""
    words = {**PACKED[kind], "bnb_4bit_compute_dtype": compute_dtype}
    if skipped:
        words["llm_int8_skip_modules"] = ["lm_head", *skipped]
    stored = BitsAndBytesConfig(**words)
    AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=stored).save_pretrained(
        folder
    )
    return folder


def live_base(folder: Path, basis: Basis = NF4) -> PreTrainedModel:
    """The model as training holds it: quantized by transformers and bitsandbytes."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=basis.kind,
        bnb_4bit_use_double_quant=basis.double_quantization,
        bnb_4bit_compute_dtype=basis.compute_dtype,
    )
    eight_bit = BitsAndBytesConfig(load_in_8bit=True)
    # A None would hide the quantization that a checkpoint brings along.
    quantization = (
        {} if basis.kind == "none" else {"quantization_config": eight_bit if basis.kind == "int8" else four_bit}
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=basis.load_dtype, **quantization)
    model.requires_grad_(False)
    return model


def live_adapter(base: Path, config: PeftConfig, folder: Path, basis: Basis = NF4) -> PeftModel:
    """The live base with an adapter of random values, which is also saved to `folder`."""
    model = get_peft_model(live_base(base, basis), copy.deepcopy(config))
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval()
    model.save_pretrained(str(folder))
    return model


def merged(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    basis: Basis = NF4,
    weights: Weights = "dequantized",
    dtype: torch.dtype = torch.float32,
) -> tuple[Merge, PreTrainedModel]:
    """The merge written to `output` and loaded as a user would."""
    checkpoint = Checkpoint.open(base)
    layout = layout_of(empty_model(base), list(checkpoint.tensors))
    merge = plan_merge(checkpoint, layout, open_adapter(adapter), basis, weights, dtype)
    output.mkdir()
    write_merge(merge, output, lambda _: None, shard_bytes=100_000)
    copy_side_files(base, base, output)
    write_json(output / "config.json", merged_config(base, dtype, merge.config_changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(output)
    return merge, model.eval()


def some_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids [rows, length] without special tokens."""
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3))  # type: ignore[call-overload]


TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "What is the capital of France? The capital of France is Paris.",
    "Name a colour. Blue. Another, please. Green. You are brief.",
    "system user assistant",
]
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def tiny_tokenizer(folder: Path, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 320 tokens with ChatML's special tokens, saved into a model folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    fast.save_pretrained(folder)
    return fast


QUESTIONS = [f"What is {number} and {number + 1}?" for number in range(24)]


def tiny_run(
    folder: Path,
    adapter: str = 'kind = "lora"\nrank = 4',
    *,
    family: str = "llama",
    data: str = "",
    quantization: str = 'kind = "nf4"\ncompute_dtype = "float32"\nminimum_share = 0.0',
    packed: tuple[str, ...] = (),
    **changes: Any,
) -> RunDir:
    """A finished run: a tiny base with a tokenizer, rows, resolved.toml and a random adapter as qtune saves it.

    packed: what `packed_base` is told, of a base whose checkpoint is quantized already.
    """
    base = tiny_base(folder / ("plain" if packed else "base"), family, **changes)
    if packed:
        base = packed_base(base, folder / "base", *packed)
    tiny_tokenizer(base)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {index}."}]}
        for index, question in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # transformers refuses sdpa for Gemma 2, whose logits are capped.
    attention = "eager" if family == "gemma2" else "sdpa"
    text = (
        f'[model]\nbase = "{base}"\nattention = "{attention}"\n'
        f"[quantization]\n{quantization}\n"
        f'[adapter]\ndtype = "float32"\n{adapter}\n'
        f'[data]\ntrain = "{folder / "rows.jsonl"}"\nvalidation = 0.5\nmax_length = 128\n{data}\n'
        "[training]\nlearning_rate = 1e-3\nmicro_batch_size = 1\n"
    )
    run = RunDir(folder / "run")
    run.path.mkdir()
    run.write_text(run.recipe_file, text)
    run.write_text(run.resolved_file, text)
    recipe = resolved_recipe(run)
    plan = make_plan(recipe, present_device())
    torch.manual_seed(5)
    model = attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    run.adapter.mkdir()
    save_adapter(model, run.adapter)
    return run
