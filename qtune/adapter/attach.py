"""Adapters: a recipe's table -> peft's configuration, attached to the base model; their whole state on disk."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    EvaConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.device.present import is_out_of_memory
from qtune.errors import ModelError, Problem
from qtune.model.host import refuse_trained_embeddings
from qtune.plan import Plan
from qtune.recipe.schema import IA3, Adapter, Lora, PrefixTuning, PromptTuning, PTuning

STATE_FILE = "trained_state.safetensors"
"""Every trained tensor under its module's name. peft's own file has no prompt encoder, only what it computed."""

LSTM_LAYERS = 2
"""Layers of the p-tuning LSTM where the recipe gives none; the paper's encoder (arXiv:2103.10385, section 3.2)."""


def peft_config(adapter: Adapter) -> PeftConfig:
    """peft's words for our adapter. Defaults of peft that matter are spelled out: they move between versions."""
    match adapter:
        case Lora():
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=adapter.target_modules
                if isinstance(adapter.target_modules, str)
                else list(adapter.target_modules),
                use_rslora=adapter.rslora,
                use_dora=adapter.dora,
                # LoftQ starts from zero and is filled in afterwards, when the base is there to compare with.
                init_lora_weights=True if adapter.initialization in ("default", "loftq") else adapter.initialization,
                # rho = 1: every layer keeps the rank of the recipe, so that its memory is the one that was predicted.
                eva_config=EvaConfig(rho=1.0) if adapter.initialization == "eva" else None,
                bias="none",
            )
        case PTuning():
            is_lstm = adapter.encoder == "lstm"
            return PromptEncoderConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=adapter.virtual_tokens,
                encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM
                if is_lstm
                else PromptEncoderReparameterizationType.MLP,
                encoder_hidden_size=adapter.encoder_hidden_size,
                # peft warns when the MLP is given another number of layers than its fixed ones, and ignores it.
                encoder_num_layers=(adapter.encoder_layers or LSTM_LAYERS) if is_lstm else 2,
                encoder_dropout=adapter.encoder_dropout,
            )
        case PromptTuning():
            # A text start is filled in afterwards: peft would want the tokenizer's path in the saved configuration.
            sample = adapter.initialization == "vocabulary"
            return PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=adapter.virtual_tokens,
                prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB if sample else PromptTuningInit.RANDOM,
            )
        case PrefixTuning():
            return PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=adapter.virtual_tokens,
                prefix_projection=adapter.projection,
                encoder_hidden_size=adapter.encoder_hidden_size,
            )
        case IA3():
            given: dict[str, Any] = {}
            if adapter.target_modules is not None:
                given["target_modules"] = list(adapter.target_modules)
                given["feedforward_modules"] = list(adapter.feedforward_modules or ())
            return IA3Config(task_type="CAUSAL_LM", **given)


def attach_adapter(
    network: PreTrainedModel, adapter: Adapter, plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None
) -> PeftModel:
    """Puts a fresh adapter on the frozen base, its weights in `plan.adapter_dtype`.

    `tokenizer` is needed for a prompt that starts from a text.

    Raises:
        ModelError: the adapter does not fit this model (a target module that it does not have, for example).
    """
    try:
        with warnings.catch_warnings():
            # peft 0.21 proposes weights without storage for EVA; the few bytes are not worth what may stay without.
            warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
            chosen = peft_config(adapter)
            if isinstance(adapter, Lora) and adapter.target_modules == "all-linear":
                chosen.exclude_modules = routers(network) or None
            model = get_peft_model(network, chosen, autocast_adapter_dtype=True)
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        name = getattr(network.config, "_name_or_path", "") or type(network).__name__
        raise ModelError(Problem(name, f"{adapter.kind} adapter: {str(error).splitlines()[0]}")) from error
    refuse_trained_embeddings(model)
    cast_adapter(model, getattr(torch, plan.adapter_dtype))
    if isinstance(adapter, PromptTuning) and adapter.text is not None and tokenizer is not None:
        _start_from_text(model, tokenizer, adapter.text)
    return model


def routers(network: torch.nn.Module) -> list[str]:
    """Names of linear layers whose class computes something else from its product: routers of experts, which return
    scores and choices (Llama 4, Phi-3.5-MoE). An adapter would take their place and return the product."""
    own = torch.nn.Linear.forward
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).forward is not own
    ]


def cast_adapter(model: PeftModel, dtype: torch.dtype) -> None:
    """Casts what is trained and nothing else. TRL 1.16 makes it bfloat16 on every 4-bit base (trl, sft_trainer.py)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _start_from_text(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Lester et al. 2021, section 2.1: the prompt starts as the embeddings of words, here repeated or cut to fit."""
    vectors = model.prompt_encoder[model.active_adapter].embedding.weight
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(Problem("", f"adapter.text = {text!r}: has no tokens"))
    fitted = torch.tensor([ids[position % len(ids)] for position in range(len(vectors))], device=vectors.device)
    vectors.copy_(model.get_base_model().get_input_embeddings()(fitted).to(vectors.dtype))


def trained_state(model: PeftModel) -> dict[str, Tensor]:
    """Every trained tensor by its name in the model, prompt encoder included. No copies."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained_state(model: PeftModel, folder: Path) -> None:
    """Writes `trained_state` whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in trained_state(model).items()}
    temporary = folder / f".{STATE_FILE}"
    save_file(state, temporary)
    temporary.replace(folder / STATE_FILE)


@torch.no_grad()
def load_trained_state(model: PeftModel, folder: Path) -> None:
    """Puts a saved state into a model with the same adapter attached, bit for bit.

    Raises:
        ModelError: the file is missing, or its tensors are not those of this adapter.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise ModelError(Problem(str(file), "no such file: the adapter's state is not complete"))
    saved, here = load_file(file), trained_state(model)
    if saved.keys() != here.keys():
        odd = ", ".join(sorted(saved.keys() ^ here.keys())[:3])
        raise ModelError(Problem(str(file), f"is of another adapter than the recipe's: {odd}"))
    for name, tensor in saved.items():
        if tensor.shape != here[name].shape:
            raise ModelError(
                Problem(str(file), f"{name} is {list(tensor.shape)}, the recipe makes it {list(here[name].shape)}")
            )
        here[name].copy_(tensor)


def save_adapter(model: PeftModel, folder: Path, initial: Path | None = None) -> None:
    """peft's format, which every peft user can load, and the full state beside it, which training can go on from.

    initial: PiSSA's adapter before training. Its base was rewritten, so what is saved is the difference, a LoRA of
    twice the rank on the original base (arXiv:2404.02948, appendix C), and no state: that would belong to the rewritten
    base.
    """
    if initial is not None:
        with warnings.catch_warnings():
            # peft 0.21 loads the initial adapter beside the trained one for the difference, and warns of its own doing.
            warnings.filterwarnings("ignore", "PiSSA changes the base weights of the model")
            model.save_pretrained(
                folder, safe_serialization=True, path_initial_model_for_weight_conversion=str(initial)
            )
        return
    model.eval()  # peft saves what a prompt encoder computes, which must not be what its dropout leaves of it
    model.save_pretrained(folder, safe_serialization=True)
    save_trained_state(model, folder)


def adapter_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """What peft has put on a base model: the adapters of its layers, and prompt encoders."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                yield from getattr(module, name).parameters()
        elif isinstance(module, PeftModel) and hasattr(module, "prompt_encoder"):
            yield from module.prompt_encoder.parameters()


def load_adapter(network: PreTrainedModel, folder: Path) -> PeftModel:
    """The base model with a saved adapter on it, frozen, bit for bit in the dtype it was saved in."""
    # Left alone, peft 0.21 would round a float32 adapter to the 16 bits of its base before it is asked for anything.
    model = PeftModel.from_pretrained(network, str(folder), autocast_adapter_dtype=True)
    saved = {tensor.dtype for tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).values()}
    if len(saved) == 1:
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.to(next(iter(saved)))
    model.requires_grad_(False)  # peft leaves soft prompts trainable
    return model
