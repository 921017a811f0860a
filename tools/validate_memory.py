"""Compare traced memory with published measurements.

    python tools/validate_memory.py [RECORDS.json] [--json] [--only ID,ID]

Each record is built as that run was: its model, precision, adapter, loss, optimizer and what was measured. Records that
cannot be built are listed with the reason. No constant here is fitted to a measurement.
"""

import argparse
import json
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import (  # noqa: E402
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.memory.skeleton import bare_model  # noqa: E402
from qtune.memory.step import Batch, Step  # noqa: E402
from qtune.memory.trace import trace  # noqa: E402

GIB = 2**30
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Model families by name; the geometry comes from the record.
FAMILIES = (
    ("gemma-3", "gemma3_text"), ("gemma-2", "gemma2"), ("gemma", "gemma"), ("qwen3", "qwen3"), ("qwen2", "qwen2"),
    ("qwen1.5", "qwen2"), ("mixtral", "mixtral"), ("mistral", "mistral"), ("phi-3", "phi3"), ("phi-4", "phi3"),
    ("olmo-2", "olmo2"), ("granite", "granite"), ("pythia", "gpt_neox"), ("gpt2", "gpt2"), ("llama", "llama"),
    ("smollm", "llama"), ("tinyllama", "llama"), ("vicuna", "llama"), ("yi-", "llama"), ("codellama", "llama"),
)  # fmt: skip


class CannotBuildError(Exception):
    """Why a record is skipped."""


@dataclass(frozen=True)
class Result:
    """One line of the comparison."""

    id: str
    predicted: float | None
    measured: float | None
    exact: bool
    skipped: str | None = None
    where: str = ""
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """Relative, signed: +0.02 is 2 % too much."""
        return None if self.predicted is None or not self.measured else self.predicted / self.measured - 1


def family(name: str) -> str:
    lowered = name.lower()
    for part, model_type in FAMILIES:
        if part in lowered:
            return model_type
    raise CannotBuildError(f"no known architecture for the model name {name!r}")


def config_of(record: dict[str, Any]) -> PretrainedConfig:
    g = record.get("geometry") or {}
    missing = [key for key in ("hidden", "layers", "heads", "intermediate", "vocab") if not g.get(key)]
    if missing:
        raise CannotBuildError(f"geometry lacks {', '.join(missing)}")
    model_type = family(record.get("model", ""))
    values: dict[str, Any] = {
        "hidden_size": g["hidden"],
        "num_hidden_layers": g["layers"],
        "num_attention_heads": g["heads"],
        "num_key_value_heads": g.get("kv_heads") or g["heads"],
        "head_dim": g.get("head_dim") or g["hidden"] // g["heads"],
        "intermediate_size": g["intermediate"],
        "vocab_size": g["vocab"],
        "tie_word_embeddings": bool(g.get("tied")),
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "pad_token_id": 0,
    }
    experts = g.get("experts") or g.get("num_experts") or g.get("num_local_experts")
    if experts:
        values |= {"num_local_experts": experts, "num_experts": experts}
        if active := g.get("experts_per_token") or g.get("num_experts_per_tok"):
            values["num_experts_per_tok"] = active
    if model_type == "gpt2":
        values = {
            "n_embd": g["hidden"], "n_layer": g["layers"], "n_head": g["heads"], "n_inner": g["intermediate"],
            "vocab_size": g["vocab"], "n_positions": 131072,
        }  # fmt: skip
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise CannotBuildError(f"{model_type}: {error}") from error


def quantization_of(record: dict[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig | None:
    given = record.get("quantization") or {}
    kind = str(given.get("type") or "none").lower()
    if kind in ("none", "null", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32"):
        return None
    if kind in ("nf4", "fp4", "bnb-nf4", "bitsandbytes-nf4", "4bit"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4" if kind == "fp4" else "nf4",
            bnb_4bit_use_double_quant=bool(given.get("double_quant")),
            bnb_4bit_compute_dtype=dtype,
        )
    if kind in ("int8", "llm.int8", "llm.int8()", "bnb-int8", "8bit"):
        return BitsAndBytesConfig(load_in_8bit=True)
    raise CannotBuildError(f"quantization {kind!r} is not bitsandbytes'")


def features_of(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Features as one lower-case text, and the JSON objects among them (peft's configuration) as one dictionary."""
    settings: dict[str, Any] = {}
    words = []
    for feature in record.get("features") or []:
        text = str(feature)
        if text.startswith("{"):
            settings |= json.loads(text)
        else:
            words.append(text.lower())
    return " | ".join(words), settings


def adapter_of(record: dict[str, Any]) -> Any:
    """peft's configuration of the record's method; None for full fine-tuning."""
    method = str(record.get("method", "")).lower()
    words, settings = features_of(record)
    dropout = re.search(r"dropout (\d?\.\d+)", f"{words} | {record.get('notes') or ''}".lower())
    tokens = settings.get("num_virtual_tokens")
    if method in ("full", "full fine-tuning", "full-finetuning"):
        return None
    if method in ("lora", "qlora", "dora", "qdora", "rslora"):
        targets = record.get("target_modules") or settings.get("target_modules")
        if targets in ("all linear", "all-linear", "all linear layers"):
            targets = "all-linear"
        if isinstance(targets, str) and targets != "all-linear":
            raise CannotBuildError(f"target modules {targets!r} name no layers")
        if not targets or not record.get("rank"):
            raise CannotBuildError("LoRA without rank or target modules")
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=record["rank"],
            lora_alpha=record.get("alpha") or record["rank"],
            lora_dropout=float(dropout[1]) if dropout else float(settings.get("lora_dropout") or 0.0),
            target_modules=targets,
            use_dora="dora" in method or bool(settings.get("use_dora")),
            use_rslora=bool(settings.get("use_rslora")),
        )
    if (
        method in ("p-tuning", "ptuning", "prompt-tuning", "prompt tuning", "prefix-tuning", "prefix tuning")
        and not tokens
    ):
        raise CannotBuildError(f"{method} without a number of virtual tokens")
    if method in ("p-tuning", "ptuning"):
        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=tokens,
            encoder_hidden_size=settings.get("encoder_hidden_size"),
            encoder_reparameterization_type=settings.get("encoder_reparameterization_type", "MLP"),
            encoder_num_layers=settings.get("encoder_num_layers", 2),
        )
    if method in ("prompt-tuning", "prompt tuning"):
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    if method in ("prefix-tuning", "prefix tuning"):
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=tokens,
            prefix_projection=bool(settings.get("prefix_projection")),
            encoder_hidden_size=settings.get("encoder_hidden_size"),
        )
    if method in ("ia3", "(ia)3"):
        return IA3Config(
            task_type="CAUSAL_LM",
            **{k: settings[k] for k in ("target_modules", "feedforward_modules") if settings.get(k)},
        )
    raise CannotBuildError(f"method {record.get('method')!r} is not one that qtune trains")


def version_of(record: dict[str, Any], library: str) -> tuple[int, ...]:
    """Version of a library in the record's software line; far in the future where it is not named."""
    found = re.search(rf"\b{library} (\d+)\.(\d+)", str(record.get("software") or "").lower())
    return (int(found[1]), int(found[2])) if found else (999,)


def logits_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers since 4.50: whole logits, upcast in the loss function, labels shifted instead of logits."""
    return model(**batch, use_cache=False).loss


def shifted_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers 4.46 to 4.49: upcast and a shifted copy while the 16-bit logits live (loss/loss_utils.py, 4.48)."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return _shifted_cross_entropy(logits.float(), labels)


def old_logits_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers before 4.46: the model's logits are fp32 themselves, and shifted (modeling_llama.py, 4.45)."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    return _shifted_cross_entropy(logits, labels)


def _shifted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    shifted = logits[..., :-1, :].contiguous()
    virtual = logits.shape[1] - labels.shape[1]
    if virtual:  # a soft prompt's positions carry the label that is ignored
        labels = torch.nn.functional.pad(labels, (virtual, 0), value=-100)
    return torch.nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels[..., 1:].contiguous().view(-1))


class KeepsOutputs:
    """A training loop that holds the model's outputs, logits and cache included, until the step is over."""

    def __init__(self) -> None:
        self.outputs: Any = None

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.outputs = None
        outputs = model(**batch, use_cache=True)
        self.outputs = {key: value for key, value in outputs.items() if key != "loss"}
        return outputs.loss


def loss_of(record: dict[str, Any], forward_only: bool) -> Any:
    words, _ = features_of(record)
    notes = str(record.get("notes") or "").lower()
    named = str(record.get("loss") or "").lower()
    if any(word in named + words for word in ("liger", "fused", "chunked", "cut cross", "unsloth")):
        raise CannotBuildError(f"loss {record.get('loss')!r}")
    if forward_only:
        return KeepsOutputs()
    if "kv cache is also returned" in notes or "use_cache stays on" in notes:
        return KeepsOutputs()
    version = version_of(record, "transformers")
    return old_logits_loss if version < (4, 46) else shifted_loss if version < (4, 50) else logits_loss


def optimizer_of(record: dict[str, Any]) -> Any:
    import bitsandbytes

    name = str(record.get("optimizer") or "none").lower()
    if name in ("none", "null", "-", "no optimizer"):
        return None, False
    paged = "paged" in name
    if "8bit" in name or "8-bit" in name:
        return (lambda p: bitsandbytes.optim.AdamW(p, lr=1e-4, optim_bits=8)), paged
    if paged:
        return (lambda p: bitsandbytes.optim.AdamW(p, lr=1e-4, optim_bits=32)), True
    if "sgd" in name:
        return (lambda p: torch.optim.SGD(p, lr=1e-4, foreach=True)), False
    if "adam" in name:
        fused = "fused" in name
        return (lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=not fused, fused=fused or None)), False
    raise CannotBuildError(f"optimizer {record.get('optimizer')!r}")


def step_of(record: dict[str, Any], dtype: torch.dtype) -> Step:
    words, _ = features_of(record)
    quantity = str(record.get("measured_quantity") or "").lower()
    if (record.get("num_gpus") or 1) > 1 or record.get("sharding"):
        raise CannotBuildError("more than one GPU")
    if "peak" not in quantity and "max" not in quantity and "after forward" not in quantity:
        raise CannotBuildError(f"measured quantity {record.get('measured_quantity')!r}")
    rows, length = record.get("batch_size"), record.get("sequence_length")
    if not rows or not length:
        raise CannotBuildError("no batch size or sequence length")
    if "offload" in words:
        raise CannotBuildError("offloading")
    forward_only = "after forward" in quantity
    optimizer, paged = optimizer_of(record)
    checkpointing = "none"
    if record.get("gradient_checkpointing"):
        said = f"{words} | {record.get('notes') or ''}".lower()
        checkpointing = "non-reentrant" if "non-re-entrant" in said or "use_reentrant=false" in said else "reentrant"
    autocast = None
    if "autocast" in words and "no autocast" not in words:
        autocast = torch.float16 if "fp16" in words or record.get("compute_dtype") == "float16" else torch.bfloat16
    return Step(
        batch=Batch(rows, length, masked="padded" in str(record.get("sequence_length_kind") or "").lower()),
        loss=loss_of(record, forward_only),
        optimizer=None if forward_only else optimizer,
        checkpointing=checkpointing,
        autocast=autocast,
        max_gradient_norm=1.0,
        paged=paged,
        ends_after="forward" if forward_only else "step",
    )


def upcast_for_kbit(model: torch.nn.Module) -> None:
    """peft's `prepare_model_for_kbit_training`: every parameter that is not quantized becomes fp32."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if (
                parameter is not None
                and type(parameter).__name__ not in ("Params4bit", "Int8Params")
                and parameter.dtype != torch.float32
            ):
                module._parameters[name] = torch.nn.Parameter(parameter.data.float(), requires_grad=False)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and getattr(model.config, "tie_word_embeddings", False):
        output.weight = model.get_input_embeddings().weight


def predict(record: dict[str, Any]) -> tuple[float, str]:
    """Predicted GiB of the record's measured quantity, and where in the step that is."""
    dtype = DTYPES.get(str(record.get("compute_dtype") or "bfloat16"), torch.bfloat16)
    weights = str(record.get("weights_dtype") or "")
    base_dtype = torch.float32 if weights.startswith("float32") else dtype
    quantization = quantization_of(record, dtype)
    adapter = adapter_of(record)
    step = step_of(record, dtype)
    attention = "eager" if "eager" in str(record.get("attention_implementation") or "") else "sdpa"
    low_adapter = str(record.get("adapter_dtype") or "").startswith(("bfloat16", "float16"))

    def build(config: PretrainedConfig) -> torch.nn.Module:
        model = bare_model(config, base_dtype, quantization, attention)
        if record.get("kbit_preparation"):
            upcast_for_kbit(model)
        if adapter is None:
            return model.requires_grad_(True)
        with torch.device("meta"):
            return get_peft_model(model, adapter, autocast_adapter_dtype=not low_adapter)

    found = trace(config_of(record), build, step)
    moment = found.history.last() if step.ends_after == "forward" else found.history.peak()
    return moment.bytes / GIB, f"{moment.phase} {moment.module}".strip()


def compare(record: dict[str, Any]) -> Result:
    began = time.perf_counter()
    measured = record.get("value_gib")
    exact = bool(record.get("sequence_length_exact"))
    try:
        predicted, where = predict(record)
    except CannotBuildError as reason:
        return Result(record["id"], None, measured, exact, str(reason))
    except Exception as error:
        return Result(
            record["id"],
            None,
            measured,
            exact,
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
        )
    return Result(record["id"], predicted, measured, exact, None, where, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="?", type=Path, default=ROOT / "tools" / "memory_records.json")
    parser.add_argument("--json", action="store_true", help="print a list of results as JSON")
    parser.add_argument("--only", default="", help="comma-separated ids")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    wanted = set(filter(None, arguments.only.split(",")))
    records = [r for r in json.loads(arguments.records.read_text()) if not wanted or r["id"] in wanted]
    results = []
    for record in records:
        result = compare(record)
        results.append(result)
        if arguments.json:
            continue
        if result.skipped is not None:
            print(f"{result.id:60s} skipped: {result.skipped}", flush=True)
        else:
            note = "" if result.exact else "  (length is an upper bound)"
            error = "" if result.error is None else f"{100 * result.error:+6.1f} %"
            print(
                f"{result.id:60s} predicted {result.predicted:7.3f}  measured {result.measured or 0:7.3f} GiB {error}"
                f"  {result.seconds:3.0f} s  {result.where}{note}",
                flush=True,
            )
    if arguments.json:
        keys = [
            {
                "id": r.id,
                "predicted_gib": r.predicted,
                "measured_gib": r.measured,
                "error": r.error,
                "skipped": r.skipped,
            }
            for r in results
        ]
        print(json.dumps(keys, indent=1))


if __name__ == "__main__":
    main()
