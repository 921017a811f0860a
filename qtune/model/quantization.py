"""bitsandbytes' words for a recipe's quantization, and how much of a model came out quantized."""

import copy
import logging
from dataclasses import dataclass
from math import prod
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from qtune.errors import InputError, ModelError, Problem, first_line
from qtune.recipe.schema import EightBit, FourBit, Quantization, Unquantized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters as the model's author counts them: a packed 4-bit weight counts each of its values."""

    total: int
    quantized: int
    trainable: int

    @property
    def quantized_share(self) -> float:
        """Share of the base model's parameters that is stored quantized."""
        return self.quantized / max(1, self.total - self.trainable)


def quantization_config(quantization: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' words for our quantization."""
    match quantization:
        case FourBit():
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization.kind,
                bnb_4bit_use_double_quant=quantization.double_quantization,
                bnb_4bit_compute_dtype=compute_dtype,
                bnb_4bit_quant_storage=torch.uint8,
            )
        case EightBit():
            return BitsAndBytesConfig(load_in_8bit=True)
        case Unquantized():
            return None


def held_as(quantization: Quantization, config: PretrainedConfig) -> Quantization:
    """How a base is held under a recipe's quantization: as its checkpoint says, where that brings its own.

    Raises:
        ModelError: it does not say how.
    """
    if not is_stored_quantized(config):
        return quantization
    given: Any = config.quantization_config
    try:
        stored: Any = AutoQuantizationConfig.from_dict(given) if isinstance(given, dict) else given
    except (ValueError, TypeError) as error:
        message = f"quantization_config names no quantization ({first_line(error)}); remove it if there is none"
        raise ModelError(Problem(f"{config.name_or_path}, config.json", message)) from error
    if stored.load_in_8bit:
        return EightBit(kind="int8", compute_dtype=quantization.compute_dtype)
    computed: Any = str(stored.bnb_4bit_compute_dtype).removeprefix("torch.")
    return FourBit(
        kind=stored.bnb_4bit_quant_type,
        double_quantization=stored.bnb_4bit_use_double_quant,
        compute_dtype=computed,
    )


def require_kind(config: PretrainedConfig, quantization: Quantization) -> None:
    """A checkpoint that brings its own quantization is trained in that; a recipe that says another plans for another.

    Raises:
        InputError: the recipe's kind is not the checkpoint's.
    """
    held = held_as(quantization, config).kind
    if held != quantization.kind:
        message = f'the checkpoint of the base is stored in {held} and is trained as it is; set it to "{held}"'
        raise InputError(Problem(f'quantization.kind = "{quantization.kind}"', message))


def unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the same model, had its checkpoint brought no quantization."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def is_stored_quantized(config: PretrainedConfig) -> bool:
    """Whether a checkpoint brings its own quantization. Its quantizer decides where it can be loaded to: it is loaded
    whole, and what belongs to the host moves there afterwards."""
    return getattr(config, "quantization_config", None) is not None


def count_parameters(network: torch.nn.Module) -> ParameterCount:
    """Counts every parameter once (tied weights are one), packed ones by the shape they stand for."""
    total = quantized = trainable = 0
    for parameter in network.parameters():
        state = getattr(parameter, "quant_state", None)
        count = prod(state.shape) if state is not None else parameter.numel()
        total += count
        quantized += count if _is_packed(parameter) else 0
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(total, quantized, trainable)


def _is_packed(parameter: torch.nn.Parameter) -> bool:
    return isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params))


def quantized_too_little(base: str, network: PreTrainedModel, quantization: Quantization) -> Problem | None:
    """What is wrong where less of a model than `minimum_share` is quantized. A bare model on the meta device will do.

    It is not for checkpoints that bring their own quantization: those are what they are.
    """
    if isinstance(quantization, Unquantized):
        return None
    count = count_parameters(network)
    log.debug("%d of %d parameters quantized", count.quantized, count.total)
    if count.quantized_share >= quantization.minimum_share:
        return None
    largest = max(
        ((name, p.numel()) for name, p in network.named_parameters() if not _is_packed(p)),
        key=lambda item: item[1],
    )
    return Problem(
        base,
        f"only {count.quantized_share:.0%} of its {count.total / 1e6:,.0f} M parameters could be quantized; "
        f"quantization.minimum_share asks for {quantization.minimum_share:.0%}. The largest tensor left in "
        f"{network.dtype} is {largest[0]} ({largest[1] / 1e6:,.0f} M): bitsandbytes quantizes linear layers only, so "
        "fused experts and embeddings stay. Lower quantization.minimum_share if the memory is there",
    )
