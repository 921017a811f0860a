"""A fresh adapter onto the frozen base, in its own dtype."""

import warnings

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from qtune.adapter.module_names import unmatched_names
from qtune.adapter.peft_config import peft_config
from qtune.adapter.prefix import let_prefix_be_checkpointed
from qtune.adapter.prompt_encoder import make_residual
from qtune.device.present import is_out_of_memory
from qtune.errors import ModelError, Problem, first_line
from qtune.model.host import refuse_trained_embeddings
from qtune.model.layer_stream import join_stream
from qtune.plan import Plan
from qtune.recipe.schema import Adapter, Lora, PrefixTuning, PromptTuning, PTuning


def attach_adapter(network: PreTrainedModel, adapter: Adapter, plan: Plan) -> PeftModel:
    """Puts a fresh adapter on the frozen base, its weights in `plan.adapter_dtype`; `starts.start` goes on from there.

    Raises:
        ModelError: the adapter does not fit this model (a target module that it does not have, for example).
    """
    name = network.config.name_or_path or type(network).__name__
    if problems := list(unmatched_names(network, adapter)):
        raise ModelError(problems)
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
        raise ModelError(Problem(name, f"{adapter.kind} adapter: {first_line(error)}")) from error
    refuse_trained_embeddings(model)
    if isinstance(adapter, PromptTuning | PTuning) and adapter.residual:
        make_residual(model, adapter)
    join_stream(model)
    if isinstance(adapter, PrefixTuning):
        let_prefix_be_checkpointed(model)
    if plan.device.kind == "cpu":
        _keep_lstm_in_its_dtype(model)
    _refuse_trained_head(model)
    cast_adapter(model, getattr(torch, plan.adapter_dtype))
    return model


def _refuse_trained_head(model: PeftModel) -> None:
    """The tiled loss reads the head's weight, whatever the head is called and whatever stands around it.

    Raises:
        ModelError: there is an adapter on the head.
    """
    base = model.get_base_model()
    head: torch.nn.Module | None = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in base.named_modules() if module is head)
        message = (
            f"{name} is the model's LM head, whose weight the loss reads directly, so an adapter on it would not be "
            f"trained; remove {name.rpartition('.')[2]}"
        )
        raise ModelError(Problem("adapter.target_modules", message))


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


def _keep_lstm_in_its_dtype(model: PeftModel) -> None:
    """An LSTM encoder of p-tuning computes in its weights' dtype, whatever autocast says: oneDNN has no LSTM in 16 bits
    for processors with AVX2 alone, and the encoder is small beside the model."""
    for module in model.modules():
        if isinstance(module, torch.nn.LSTM):
            module.forward = torch.autocast("cpu", enabled=False)(module.forward)  # type: ignore[method-assign]


def cast_adapter(model: PeftModel, dtype: torch.dtype) -> None:
    """Casts what is trained and nothing else. TRL 1.16 makes it bfloat16 on every 4-bit base (trl, sft_trainer.py)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
