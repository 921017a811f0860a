"""A published measurement as a step that can be traced: what its fields and notes say, and nothing that they do not.

`build_of` reads a record: a JSON object with the fields of memory_records.json. Whatever cannot be represented is a
`CannotBuildError` with the reason.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes
import torch
from old_transformers import (
    ACCURACY_SINCE,
    EXPERTS,
    FUSED_EXPERTS_SINCE,
    PLAIN_CHECKPOINTS_SINCE,
    KeepsOutputs,
    TrainerLoss,
    Version,
    install_loss_of,
)
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from transformers.optimization import Adafactor

from qtune.memory.savings import upcast_unquantized
from qtune.memory.tracing.bare_model import bare_model
from qtune.memory.tracing.step import Batch, Step
from qtune.model.load import attention_rule

GIB = 2**30
UNITS = {"bytes": 1, "mib": 2**20, "gib": GIB, "mb": 10**6, "gb": 10**9}

FAMILIES = (
    (r"gemma-?3", "gemma3_text"), (r"gemma-?2", "gemma2"), (r"gemma", "gemma"), (r"qwen-?3.*-a\d+b", "qwen3_moe"),
    (r"qwen-?3", "qwen3"), (r"qwen(2|1\.5).*(-a\d+(\.\d+)?b|moe)", "qwen2_moe"), (r"qwen-?(2|1\.5)|qwq", "qwen2"),
    (r"mixtral", "mixtral"), (r"ministral|mistral|zephyr|mathstral", "mistral"), (r"phi-?(3|4)", "phi3"),
    (r"phi-?(1|2)", "phi"), (r"olmoe", "olmoe"), (r"olmo-?2", "olmo2"), (r"olmo", "olmo"),
    (r"powermoe|granite.*-a\d+m", "granitemoe"), (r"granite|powerlm", "granite"),
    (r"smollm3", "smollm3"), (r"starcoder2", "starcoder2"), (r"stablelm", "stablelm"), (r"pythia|neox", "gpt_neox"),
    (r"gpt-?2", "gpt2"), (r"\bopt-", "opt"),
    (r"llama|smollm|vicuna|\byi-|guanaco|alpaca|wizard|deepseek-(llm|coder|math)|solar|hermes", "llama"),
)  # fmt: skip
"""Model name -> architecture; the geometry comes from the record."""

LETTERS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj",
           "down": "down_proj"}  # fmt: skip
"""Short names that papers and posts give to layers."""

OTHER_TRAINERS = ("torchtune", "litgpt", "unsloth", "megatron", "nemo", "deepspeed", "mlx", "keras", "torchao")


FUSED = r"(?<!no )(?<!without )(triton|foak|fused[- ](ops|kernels|lora|rms|rope|norm|swiglu|attention projection)\w*)"
"""Words of stacks whose layers are other operations than transformers'."""
FP32_NORMS = r"(layer ?)?norms? (are |kept |stay |left |weights )*in (fp32|float32)|(fp32|float32) (layer ?)?norms?"


class CannotBuildError(Exception):
    """Why a record is skipped."""


Quantity = Literal["peak", "peak reserved", "after forward", "after backward", "after step", "after load"]


@dataclass(frozen=True)
class Build:
    """A record as something to trace."""

    config: PretrainedConfig
    version: Version
    """transformers' version."""
    attention: str
    """As the record names it; sdpa or eager in the trace."""
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None
    fp32_norms: bool
    """Whether the norms alone were cast to fp32."""
    upcast: bool
    """Whether what is not quantized was cast to fp32 (`prepare_model_for_kbit_training`)."""
    adapter: Any
    """peft's configuration; None: all weights are trained."""
    fp32_adapter: bool
    step: Step
    quantity: Quantity
    mean_length: int | None = None
    """Tokens of a row on average, where the steps before the largest one had shorter batches."""
    empties_cache: bool = False
    """Whether the script hands back after a step what the allocator does not use."""

    def model(self, config: PretrainedConfig) -> torch.nn.Module:
        """The model that is trained, on the meta device, of `config` (the record's, or one with fewer layers)."""
        rule = "eager" if self.attention == "eager" else attention_rule(config)[0]
        model = bare_model(config, self.dtype, self.quantization, rule)
        install_loss_of(self.version, model)
        if self.upcast:
            upcast_unquantized(model)
        elif self.fp32_norms:
            for name, module in model.named_modules():
                if "norm" in name.rpartition(".")[2]:
                    module.float()
        if self.adapter is None:
            return model.requires_grad_(True)
        with torch.device("meta"):
            return get_peft_model(model, self.adapter, autocast_adapter_dtype=self.fp32_adapter)


def build_of(record: dict[str, Any]) -> Build:
    """Reads a record.

    Raises:
        CannotBuildError: a field is missing, or names what a trace of transformers, peft and bitsandbytes cannot be.
    """
    _require_one_plain_process(record)
    quantity = quantity_of(record)
    version = version_of(record, "transformers")
    config = config_of(record)
    if version < FUSED_EXPERTS_SINCE and _experts(record) and config.model_type not in EXPERTS:
        raise CannotBuildError(f"the experts of {config.model_type} before transformers 5")
    compute = dtype_in(record.get("compute_dtype")) or torch.bfloat16
    quantization = quantization_of(record, compute)
    weights = str(record.get("weights_dtype") or "")
    return Build(
        config=config,
        version=version,
        attention=attention_of(record),
        dtype=compute if quantization else dtype_in(weights) or compute,
        quantization=quantization,
        fp32_norms=re.search(FP32_NORMS, said(record)) is not None,
        upcast=quantization is not None and is_upcast(record),
        adapter=adapter_of(record),
        fp32_adapter=dtype_in(record.get("adapter_dtype")) in (None, torch.float32),
        step=step_of(record, compute, quantity, version),
        quantity=quantity,
        mean_length=record.get("mean_length"),
        empties_cache=bool(record.get("empties_cache")),
    )


def measured_gib(record: dict[str, Any]) -> float | None:
    """The measured value in GiB; None if the record has none."""
    if record.get("value_gib") is not None:
        return float(record["value_gib"])
    unit = UNITS.get(str(record.get("unit") or "").lower())
    return None if record.get("value") is None or unit is None else float(record["value"]) * unit / GIB


def said(record: dict[str, Any]) -> str:
    """Features in words and notes, in lower case."""
    words = [str(f) for f in record.get("features") or [] if not str(f).startswith("{")]
    return " | ".join([*words, str(record.get("notes") or "")]).lower()


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """The JSON objects among the features: keys of peft's configuration that are not its defaults."""
    found: dict[str, Any] = {}
    for feature in record.get("features") or []:
        if isinstance(feature, dict):
            found |= feature
        elif str(feature).startswith("{"):
            try:
                found |= json.loads(feature)
            except ValueError as error:
                raise CannotBuildError(f"feature {feature!r} is no JSON object") from error
    return found


def dtype_in(text: Any) -> torch.dtype | None:
    """The first floating-point type that a text names."""
    found = re.search(r"(bfloat|bf|float|fp)(16|32)|half", str(text or "").lower())
    if found is None:
        return None
    if found[0] == "half" or (found[1] in ("float", "fp") and found[2] == "16"):
        return torch.float16
    return torch.float32 if found[2] == "32" else torch.bfloat16


def version_of(record: dict[str, Any], library: str) -> Version:
    """Version of a library in the record's software line; far in the future where it is not named."""
    found = re.search(rf"(?<![\w-]){library}[ =v]+(\d+)\.(\d+)", str(record.get("software") or "").lower())
    return (int(found[1]), int(found[2])) if found else (999,)


def _require_one_plain_process(record: dict[str, Any]) -> None:
    if (record.get("num_gpus") or 1) > 1 or record.get("sharding"):
        raise CannotBuildError(
            f"{record.get('num_gpus')} GPUs, sharding {record.get('sharding')!r}: a trace is one process"
        )
    software = f"{record.get('software') or ''} {record.get('source') or ''}".lower()
    if other := next((name for name in OTHER_TRAINERS if re.search(rf"\b{name}\b", software)), None):
        raise CannotBuildError(f"{other} has models, losses or kernels of its own")
    if re.search(r"(?<!no )(?<!without )(cpu|activation|optimizer|param\w*)[- ]offload", said(record)):
        raise CannotBuildError("offloading by other means than qtune's")
    if kernels := re.search(FUSED, said(record)):
        raise CannotBuildError(f"{kernels[0]!r}: fused kernels keep other tensors than the model's own operations")
    if re.search(r"torch\.?compile(?!: (no|off|false))", said(record)) and "no torch" not in said(record):
        raise CannotBuildError("torch.compile chooses what is kept")


def quantity_of(record: dict[str, Any]) -> Quantity:
    named = str(record.get("measured_quantity") or "").lower()
    if re.search(r"nvidia-smi|nvml|device used", named):
        raise CannotBuildError(
            f"{record['measured_quantity']!r} has the CUDA context and what the allocator keeps in it"
        )
    if re.search(r"after (the )?(first )?forward(?! and)", named):
        return "after forward"
    if re.search(r"after (the |a |one )?((first )?forward and )?backward", named):
        return "after backward"
    if re.search(r"after (the )?(model )?load|only weights|weights only|model loaded", named):
        return "after load"
    if re.search(r"peak|max", named):
        return "peak reserved" if "reserved" in named else "peak"
    if re.search(r"after (the |a )?((first|optimizer|training|last) )?(step|train)", named):
        return "after step"
    raise CannotBuildError(f"measured quantity {record.get('measured_quantity')!r}")


def config_of(record: dict[str, Any]) -> PretrainedConfig:
    g = record.get("geometry") or {}
    missing = [key for key in ("hidden", "layers", "heads", "intermediate", "vocab") if not g.get(key)]
    if missing:
        raise CannotBuildError(f"geometry lacks {', '.join(missing)}")
    if g["hidden"] % g["heads"] and not g.get("head_dim"):
        raise CannotBuildError(f"geometry: {g['hidden']} hidden units do not divide among {g['heads']} heads")
    name = str(record.get("model") or "").lower()
    model_type = g.get("model_type") or next((kind for part, kind in FAMILIES if re.search(part, name)), None)
    if model_type is None:
        raise CannotBuildError(f"no known architecture for the model name {record.get('model')!r}")
    if _experts(record) and model_type == "llama":
        raise CannotBuildError(f"no known architecture with experts for the model name {record.get('model')!r}")
    values: dict[str, Any] = {
        "hidden_size": g["hidden"],
        "num_hidden_layers": g["layers"],
        "num_attention_heads": g["heads"],
        "num_key_value_heads": g.get("kv_heads") or g["heads"],
        "intermediate_size": g["intermediate"],
        "vocab_size": g["vocab"],
        "tie_word_embeddings": bool(g.get("tied")),
        "max_position_embeddings": 131072,
        "pad_token_id": 0,
    }
    if model_type == "opt":
        values |= {"ffn_dim": g["intermediate"], "word_embed_proj_dim": g["hidden"]}
    elif model_type == "gpt2":
        values |= {"n_inner": g["intermediate"]}
    if model_type not in ("gpt2", "opt", "gpt_neox"):
        values["head_dim"] = g.get("head_dim") or g["hidden"] // g["heads"]
    if not model_type.startswith("gemma"):
        values["sliding_window"] = None
    if experts := _experts(record):
        values |= {"num_local_experts": experts, "num_experts": experts}
        if active := _first(g, "experts_per_token", "num_experts_per_tok", "active_experts", "top_k"):
            values["num_experts_per_tok"] = active
        if width := _first(g, "moe_intermediate", "moe_intermediate_size", "expert_intermediate"):
            values["moe_intermediate_size"] = width
        if shared := _first(g, "shared_expert_intermediate", "shared_expert_intermediate_size"):
            values["shared_expert_intermediate_size"] = shared
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise CannotBuildError(f"{model_type}: {error}") from error


def _first(table: dict[str, Any], *keys: str) -> Any:
    return next((table[key] for key in keys if table.get(key)), None)


def _experts(record: dict[str, Any]) -> int | None:
    return _first(record.get("geometry") or {}, "experts", "num_experts", "num_local_experts", "n_experts")


def quantization_of(record: dict[str, Any], compute: torch.dtype) -> BitsAndBytesConfig | None:
    given = record.get("quantization") or {}
    kind = str(given.get("type") or "none").lower()
    if kind == "none" or dtype_in(kind):
        return None
    if re.fullmatch(r"(bnb|bitsandbytes)?[- ]?(nf4|fp4|4-?bit|int4)( .*)?", kind):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4" if "fp4" in kind else "nf4",
            bnb_4bit_use_double_quant=bool(given.get("double_quant")),
            bnb_4bit_compute_dtype=compute,
        )
    if re.fullmatch(r"(bnb|bitsandbytes)?[- ]?(int8|8-?bit|llm\.int8(\(\))?)( .*)?", kind):
        return BitsAndBytesConfig(load_in_8bit=True)
    raise CannotBuildError(f"quantization {kind!r} is not bitsandbytes'")


def is_upcast(record: dict[str, Any]) -> bool:
    """Whether k-bit preparation left everything that is not quantized in fp32: by its type, or by the words."""
    if record.get("kbit_preparation") is not None:
        return bool(record["kbit_preparation"])
    weights = str(record.get("weights_dtype") or "").lower()
    if rest := re.search(r"(rest|other|unquantized|non-quantized|embed|norm|head)[^,;]*", weights):
        named = dtype_in(rest[0])
        if named is not None:
            return named is torch.float32
    words = said(record)
    if re.search(r"(without|no|not|skip\w*)( \w+)? (k-?bit|prepare_model|upcast)|not (\w+ )?upcast", words):
        return False
    return bool(re.search(r"prepare_model_for_kbit|k-?bit prep|upcast\w*[^.|]*(norm|embed|head|unquantized)", words))


def attention_of(record: dict[str, Any]) -> str:
    named = str(record.get("attention_implementation") or "").lower()
    return "eager" if "eager" in named else "flash_attention_2" if "flash" in named else "sdpa"


def targets_of(given: Any) -> list[str] | str:
    """Layers that a record names: a list, or a text such as "q,v" or "all linear layers"."""
    if isinstance(given, str):
        if re.search(r"all[- _]linear|all linear", given.lower()):
            return "all-linear"
        named = re.findall(r"\b\w+_proj\b|\bquery_key_value\b|\bc_attn\b|\bc_proj\b|\bc_fc\b|\bw[123]\b", given)
        given = named or [word for word in re.split(r"[,/ +]+", given.strip()) if word]
    names = [LETTERS.get(str(name).removesuffix("proj").strip("_ "), str(name)) for name in given]
    if unknown := [name for name in names if " " in name or not re.fullmatch(r"[\w.]+", name)]:
        raise CannotBuildError(f"target modules {', '.join(unknown)!r} name no layers")
    return names


def adapter_of(record: dict[str, Any]) -> Any:
    """peft's configuration of the record's method; None for full fine-tuning."""
    method = re.sub(r"[ _]+", "-", str(record.get("method") or "").lower())
    settings = settings_of(record)
    tokens = settings.get("num_virtual_tokens") or record.get("num_virtual_tokens")
    if method in ("full", "full-fine-tuning", "full-finetuning", "full-ft"):
        return None
    if method in ("lora", "qlora", "dora", "qdora", "rslora", "qrslora"):
        given = record.get("target_modules") or settings.get("target_modules")
        rank = record.get("rank") or settings.get("r")
        if not given or not rank:
            raise CannotBuildError(f"LoRA without {'target modules' if rank else 'a rank'}")
        dropout = re.search(r"dropout[ :=of]*(\d?\.\d+)", said(record))
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=record.get("alpha") or rank,
            lora_dropout=float(dropout[1]) if dropout else float(settings.get("lora_dropout") or 0.0),
            target_modules=targets_of(given),
            use_dora="dora" in method or bool(settings.get("use_dora")),
            use_rslora="rslora" in method or bool(settings.get("use_rslora")),
            modules_to_save=settings.get("modules_to_save"),
        )
    if method in ("ia3", "(ia)3"):
        return IA3Config(
            task_type="CAUSAL_LM",
            **{k: settings[k] for k in ("target_modules", "feedforward_modules") if settings.get(k)},
        )
    if method not in ("p-tuning", "ptuning", "prompt-tuning", "prefix-tuning"):
        raise CannotBuildError(f"method {record.get('method')!r} is not one that qtune trains")
    if not tokens:
        raise CannotBuildError(f"{method} without a number of virtual tokens")
    if method == "prompt-tuning":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    if method == "prefix-tuning":
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=tokens,
            prefix_projection=bool(settings.get("prefix_projection")),
            encoder_hidden_size=settings.get("encoder_hidden_size"),
        )
    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        encoder_hidden_size=settings.get("encoder_hidden_size"),
        encoder_reparameterization_type=settings.get("encoder_reparameterization_type", "MLP"),
        encoder_num_layers=settings.get("encoder_num_layers", 2),
    )


def loss_of(record: dict[str, Any], autocast: bool, version: Version) -> Any:
    words, named = said(record), str(record.get("loss") or "").lower()
    kernel = re.search(r"liger|fused (loss|cross|lm|linear)|fused$|chunked|cut cross|fast (loss|cross)|foak", named)
    if kernel := kernel or re.search(r"liger|fused (loss|cross|ops)|chunked|cut cross|fast (loss|cross)|foak", words):
        raise CannotBuildError(f"{kernel[0]!r} names kernels that never hold the logits")
    if "use_cache stays on" in words or "cache is also returned" in words:
        return KeepsOutputs()
    trl = version_of(record, "trl")
    return TrainerLoss(widened=autocast, accuracy=trl != (999,) and trl >= ACCURACY_SINCE)


def optimizer_of(record: dict[str, Any]) -> tuple[Any, bool]:
    """What makes the optimizer of its parameters, and whether its state is paged; None where there was none."""
    name = str(record.get("optimizer") or "none").lower()
    bits = 8 if re.search(r"8-?bit", name) else 32
    own = "paged" in name or bits == 8 or "bnb" in name or "bitsandbytes" in name
    if name in ("none", "null", "-", "no optimizer", "no"):
        return None, False
    if re.search(r"galore|muon|lomo|schedule|sophia|ademamix|apollo", name):
        raise CannotBuildError(f"optimizer {record.get('optimizer')!r}")
    if "lion" in name:
        return (lambda p: bitsandbytes.optim.Lion(p, lr=1e-4, optim_bits=bits)), "paged" in name
    if "adafactor" in name:
        return (lambda p: Adafactor(p, lr=1e-4, scale_parameter=False, relative_step=False)), False
    if "sgd" in name:
        return (lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9 if "momentum" in name else 0.0, foreach=True)), False
    if "adam" not in name:
        raise CannotBuildError(f"optimizer {record.get('optimizer')!r}")
    if own:
        return (lambda p: bitsandbytes.optim.AdamW(p, lr=1e-4, optim_bits=bits)), "paged" in name
    fused = "fused" in name
    return (lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=not fused, fused=fused or None)), False


def step_of(record: dict[str, Any], compute: torch.dtype, quantity: Quantity, version: Version) -> Step:
    rows, length = record.get("batch_size"), record.get("sequence_length")
    if not rows or not length:
        raise CannotBuildError("no batch size or no sequence length")
    words = said(record)
    autocast = None
    if re.search(r"(?<!no )\b(autocast|amp|mixed precision)\b", words) and "no autocast" not in words:
        autocast = torch.float16 if compute is torch.float16 or "fp16" in words else torch.bfloat16
    checkpointing: Literal["none", "reentrant", "non-reentrant"] = "none"
    if record.get("gradient_checkpointing"):
        plain = version >= PLAIN_CHECKPOINTS_SINCE
        if re.search(r"non-?re-?entrant|use_reentrant ?= ?false", words):
            plain = True
        elif re.search(r"re-?entrant|use_reentrant ?= ?true", words):
            plain = False
        checkpointing = "non-reentrant" if plain else "reentrant"
    optimizer, paged = optimizer_of(record)
    forward_only = quantity == "after forward"
    padded = re.search(r"\bpadded", str(record.get("sequence_length_kind") or "").lower())
    return Step(
        batch=Batch(rows, length, masked=bool(padded)),
        loss=KeepsOutputs() if forward_only else loss_of(record, autocast is not None, version),
        optimizer=None if forward_only else optimizer,
        checkpointing=checkpointing,
        autocast=autocast,
        max_gradient_norm=None if re.search(r"no (grad\w* )?clip", words) else 1.0,
        paged=paged,
        accumulates=(record.get("grad_accum") or 1) > 1,
        ends_after="forward" if forward_only else "step",
    )
