"""The two models of a comparison, in memory or streamed from the disk: the trained one, and the folder made of it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qtune.adapter.state import load_adapter
from qtune.export.merge import Weights
from qtune.export.opened_run import Source
from qtune.export.verify.streamed import streamed_exported, streamed_trained
from qtune.model.checkpoint import Checkpoint
from qtune.model.load import load_base
from qtune.plan import Plan


@dataclass(frozen=True)
class Exported:
    """An exported folder as a user loads it; `misfits` are the tensors that its loading reported, by kind."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    misfits: dict[str, list[str]]


@dataclass(frozen=True)
class Models:
    """What is compared.

    `reference` is the trained model, or the adapter on the original weights; for int8 the adapter on the dequantized
    weights, for LLM.int8() rounds the inputs of each product to 8 bits, too, which no exported model does.
    """

    trained: PeftModel
    reference: PeftModel
    exported: Exported
    other_weights: PeftModel | None
    device: torch.device
    streamed: bool


def too_large(folder: Path, plan: Plan) -> bool:
    """Whether the exported model and the 4-bit one beside it (about a third of it) would fill the device's memory."""
    values = sum(stored.nbytes // stored.dtype.itemsize for stored in Checkpoint.open(folder).tensors.values())
    width = getattr(torch, plan.compute_dtype).itemsize
    return 1.35 * width * values > 0.8 * plan.device.free_bytes


def load_exported(folder: Path, source: Source, plan: Plan, *, streamed: bool) -> Exported:
    """The folder as a user loads it, on the run's device.

    On a processor without 16-bit products the weights are widened to fp32, which holds each of their values.
    """
    trusted = source.recipe.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    if streamed:
        return Exported(streamed_exported(folder, source.basis.compute_dtype, trust_remote_code=trusted), tokenizer, {})
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if plan.compute_dtype == "float32" else "auto",
        attn_implementation=plan.attention,
        device_map={"": plan.device.torch_name},
        use_safetensors=True,
        trust_remote_code=trusted,
        output_loading_info=True,
    )
    model, report = loaded
    misfits = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    return Exported(model.eval(), tokenizer, misfits)


def load_models(
    source: Source, plan: Plan, exported: Exported, weights: Weights, *, compare_bases: bool, streamed: bool
) -> Models:
    """The trained model, and the adapter on the original weights where it is the reference or its cost is asked for."""

    def on_original_weights() -> PeftModel:
        if streamed:
            return streamed_trained(source.base, source.adapter, replace(source.basis, kind="none"))
        base = AutoModelForCausalLM.from_pretrained(
            source.base,
            dtype=source.basis.compute_dtype,
            attn_implementation=plan.attention,
            device_map={"": plan.device.torch_name},
            trust_remote_code=source.recipe.model.trust_remote_code,
        )
        return load_adapter(base, source.adapter).eval()

    if streamed:
        trained = streamed_trained(source.base, source.adapter, source.basis)
    else:
        base = load_base(source.recipe.model, source.recipe.quantization, plan)
        trained = load_adapter(base, source.adapter).eval()
    original = on_original_weights() if weights == "original" or compare_bases else None
    is_reference = weights == "original" and original is not None
    reference = original if is_reference else trained
    if source.basis.kind == "int8" and not is_reference:
        frozen: Any = load_base(source.recipe.model, source.recipe.quantization, plan)
        reference = load_adapter(frozen.dequantize().to(source.basis.compute_dtype), source.adapter).eval()
    return Models(
        trained=trained,
        reference=reference,
        exported=exported,
        other_weights=None if is_reference else original,
        device=torch.device("cpu" if streamed else plan.device.torch_name),
        streamed=streamed,
    )
