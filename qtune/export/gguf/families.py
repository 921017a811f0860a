"""Model families that a GGUF can hold: their metadata, their tensors' names and what llama.cpp wants done to them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig

from qtune.errors import ModelError, Problem

Change = Callable[[str, Tensor, PretrainedConfig], Tensor]


@dataclass(frozen=True)
class Family:
    """A family as llama.cpp knows it.

    `change` makes of a parameter what llama.cpp stores under its name; `metadata` adds keys beyond the common ones.
    """

    architecture: MODEL_ARCH
    change: Change
    metadata: Callable[[GGUFWriter, PretrainedConfig], None]


def _unchanged(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    return tensor


def _interleaved(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """llama.cpp's rotary embedding turns neighbouring rows of query and key, transformers' the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((count for part, count in heads.items() if f".{part}." in name), None)
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _norms_plus_one(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """Gemma multiplies with 1 + weight; llama.cpp multiplies with what is stored."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _plain(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_rope_dimension_count(head_size(config))
    _with_head_size(writer, config)


def _with_head_size(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))


def _gemma2(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _with_head_size(writer, config)
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _with_head_size(writer, config)
    writer.add_sliding_window(config.sliding_window)


def _phi3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    rotary = int(head_size(config) * rope_of(config).get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_scaling_orig_ctx_len(_original_length(config))
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, _interleaved, _plain),
    "mistral": Family(MODEL_ARCH.LLAMA, _interleaved, _plain),
    "qwen2": Family(MODEL_ARCH.QWEN2, _unchanged, lambda writer, config: None),
    "qwen3": Family(MODEL_ARCH.QWEN3, _unchanged, _with_head_size),
    "gemma2": Family(MODEL_ARCH.GEMMA2, _norms_plus_one, _gemma2),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, _norms_plus_one, _gemma3),
    "phi3": Family(MODEL_ARCH.PHI3, _unchanged, _phi3),
}


@dataclass(frozen=True)
class Gemma:
    """What llama.cpp (src/llama-model.cpp, `load_hparams`) takes for granted instead of reading it from the file."""

    pattern: int
    """Of so many layers, all but the last slide."""
    wide_layers: int
    """Models with so many layers scale attention by the hidden size of a head's share, others by the head size."""


GEMMAS = {"gemma2": Gemma(2, 46), "gemma3_text": Gemma(6, 62)}
SLIDING_THETA = 10_000.0


def _gemma_difference(config: PretrainedConfig, known: Gemma) -> str | None:
    """In what a Gemma differs from llama.cpp's idea of it, in words."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    scalar = config.hidden_size / heads if layers == known.wide_layers else head_size(config)
    if config.query_pre_attn_scalar != scalar:
        return f"query_pre_attn_scalar = {config.query_pre_attn_scalar}, there {scalar:g}"
    full = [number for number, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if full != list(range(known.pattern - 1, layers, known.pattern)):
        return f"layers {full} have full attention, there every {known.pattern}th"
    sliding = (config.rope_parameters or {}).get("sliding_attention")
    if sliding and (sliding["rope_theta"], sliding.get("rope_type", "default")) != (SLIDING_THETA, "default"):
        return f"rope_theta = {sliding['rope_theta']:g} in sliding layers, there {SLIDING_THETA:g}"
    return None


def family_of(config: PretrainedConfig, place: str) -> Family:
    """The family of a model.

    Raises:
        ModelError: by name, the family is not known, or a variant of a known one would come out wrong.
    """
    kind = config.model_type
    problem = None
    if kind not in FAMILIES:
        problem = f"model type {kind!r} has no GGUF export here; there is {', '.join(FAMILIES)}"
    elif kind in GEMMAS and (difference := _gemma_difference(config, GEMMAS[kind])):
        problem = f"llama.cpp computes {kind} models otherwise than this one: {difference}"
    elif _scaling_kind(config) not in ("default", "linear", "llama3", "yarn", "longrope"):
        problem = f"rotary scaling {_scaling_kind(config)!r} has no GGUF export here"
    if problem is not None:
        raise ModelError(Problem(place, problem))
    return FAMILIES[kind]


def head_size(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary parameters of the layers with full attention; Gemma 3 keeps one table for each kind of layer."""
    parameters = dict(config.rope_parameters or {})
    return dict(parameters.get("full_attention", parameters))


def add_metadata(writer: GGUFWriter, family: Family, config: PretrainedConfig) -> None:
    """Everything that llama.cpp must know to run the model, except its tokenizer."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = _scaling_kind(config)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(_original_length(config))
    elif kind == "longrope":
        # As transformers has it (modeling_rope_utils, `_compute_longrope_parameters`): what is given comes first.
        stretch = float(rope.get("factor") or config.max_position_embeddings / _original_length(config))
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(_original_length(config)))
        writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or factor))
    family.metadata(writer, config)


def extra_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Rotary factors that llama.cpp reads as tensors, by their GGUF names, fp32."""
    rope = rope_of(config)
    kind = _scaling_kind(config)
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    return {"rope_freqs.weight": _llama3_factors(config, rope)} if kind == "llama3" else {}


def gguf_name(family: Family, layers: int, parameter: str) -> str | None:
    """The GGUF name of a parameter such as "model.layers.0.mlp.up_proj.weight"; None where the family has none."""
    stem, _, suffix = parameter.rpartition(".")
    name = get_tensor_name_map(family.architecture, layers).get_name(stem)
    return None if name is None else f"{name}.{suffix}"


def _llama3_factors(config: PretrainedConfig, rope: dict[str, Any]) -> Tensor:
    """By how much Llama 3.1 slows each frequency, [head size / 2].

    Source: transformers, modeling_rope_utils._compute_llama3_parameters; llama.cpp divides the frequencies by these.
    """
    size = head_size(config)
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    wavelengths = 2 * math.pi / frequencies
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > original / low, torch.full_like(between, factor), between)
    return torch.where(wavelengths < original / high, torch.ones_like(between), factors).float()


def _scaling_kind(config: PretrainedConfig) -> str:
    return str(rope_of(config).get("rope_type", "default"))


def _original_length(config: PretrainedConfig) -> int:
    rope = rope_of(config)
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)
