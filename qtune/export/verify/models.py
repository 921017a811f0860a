"""The two models of a comparison, in memory or streamed from the disk: the trained one, and the folder made of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qtune import console
from qtune.adapter.state import load_adapter
from qtune.export.merge import Weights
from qtune.export.opened_run import OpenedRun
from qtune.export.verify.exact import in_float32
from qtune.export.verify.streamed import streamed_exported, streamed_trained
from qtune.model.checkpoint import Checkpoint
from qtune.model.load import load_base, load_config
from qtune.model.weights import load_weights
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

    `reference` is the trained model, or the adapter on the original weights where those were merged into. `device` is
    where token ids go; `streamed` models compute in float32 by themselves, the others under `in_float32`.
    """

    trained: PeftModel
    reference: PeftModel
    exported: Exported
    other_weights: PeftModel | None
    device: torch.device
    streamed: bool

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """While the block runs, all of them compute in float32 on the values of their weights."""
        with ExitStack() as stack:
            for model in {id(one): one for one in (self.trained, self.reference, self.other_weights) if one}.values():
                stack.enter_context(in_float32(model))
            stack.enter_context(in_float32(self.exported.model))
            yield


def comparing(plan: Plan) -> Plan:
    """The plan of a run for comparing: everything on the device, attention that computes in float32."""
    attention = "sdpa" if plan.attention == "flash_attention_2" else plan.attention
    return replace(plan, attention=attention, embeddings="device", activations="device")


def too_large(folder: Path, plan: Plan) -> bool:
    """Whether the exported model and the 4-bit one beside it (about a third of it) would fill the device's memory,
    with the largest tensor in float32 beside them."""
    tensors = [(one.nbytes, one.nbytes // one.dtype.itemsize) for one in Checkpoint.open(folder).tensors.values()]
    stored, largest = sum(nbytes for nbytes, _ in tensors), max(values for _, values in tensors)
    return 1.35 * stored + torch.float32.itemsize * largest > 0.8 * plan.device.free_bytes


def load_exported(folder: Path, source: OpenedRun, plan: Plan, *, streamed: bool) -> Exported:
    """The folder as a user loads it, in its own dtype, on the run's device."""
    trusted = source.trusts(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    device = torch.device(plan.device.torch_name)
    if streamed:
        return Exported(streamed_exported(folder, device, trust_remote_code=trusted), tokenizer, {})
    with console.progress(f"loading {folder}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
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
    source: OpenedRun, plan: Plan, exported: Exported, weights: Weights, *, compare_bases: bool, streamed: bool
) -> Models:
    """The trained model, and the adapter on the original weights where it is the reference or its cost is asked for."""
    device = torch.device(plan.device.torch_name)
    trusted = source.recipe.model.trust_remote_code

    def on_original_weights() -> PeftModel:
        if streamed:
            unquantized = replace(source.basis, kind="none")
            return streamed_trained(source.base, source.adapter, unquantized, device, trust_remote_code=trusted)
        with console.progress(f"loading {source.base_name} as its author stored it"):
            base = load_weights(
                str(source.base),
                load_config(source.recipe.model),
                source.basis.load_dtype,
                attn_implementation=plan.attention,
                device_map={"": plan.device.torch_name},
                trust_remote_code=trusted,
            )
        return load_adapter(base, source.adapter).eval()

    if streamed:
        trained = streamed_trained(source.base, source.adapter, source.basis, device, trust_remote_code=trusted)
    else:
        base = load_base(source.recipe.model, source.recipe.quantization, plan)
        trained = load_adapter(base, source.adapter).eval()
    original = on_original_weights() if weights == "original" or compare_bases else None
    is_reference = weights == "original" and original is not None
    return Models(
        trained=trained,
        reference=original if is_reference and original is not None else trained,
        exported=exported,
        other_weights=None if is_reference else original,
        device=device,
        streamed=streamed,
    )
