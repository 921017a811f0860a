"""The lean step beside peft's on the card that is about to train: one small layer, its loss and every gradient.

Nothing of a training step is so quietly wrong as a gradient: loss and outputs can look right while it is not
(bitsandbytes#2034). Tests compare both on a CPU; a card's libraries and kernels are its own.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.adapter.lean import install_lean_step
from qtune.device.present import is_out_of_memory
from qtune.errors import first_line
from qtune.plan import compute_dtype_rule

if TYPE_CHECKING:
    from qtune.device.present import Device
    from qtune.recipe.schema import Recipe

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest ||difference|| / ||gradient|| that is rounding. In bfloat16 two right ways differ by 1 to 3 %."""

HIDDEN, INTERMEDIATE, ROWS, LENGTH = 256, 704, 2, 160
"""More rows than the hidden size, so that the MLP is computed in more than one tile."""


def examined(device: Device, recipe: Recipe) -> Device:
    """The device with what speaks against the lean step there, in the type that the recipe computes in; found out once
    in a process. A card that is only described, and a recipe that asks for peft's layers, are left as they are."""
    if recipe.training.lean_step is False or not _is_here(device):
        return device
    given = recipe.quantization.compute_dtype
    dtype = compute_dtype_rule(device)[0] if given == "auto" else given
    return replace(device, lean_problem=lean_problem(device.torch_name, getattr(torch, dtype)))


def _is_here(device: Device) -> bool:
    if device.kind == "cpu":
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_name(0) == device.name


@functools.cache
def lean_problem(torch_name: str, dtype: torch.dtype) -> str | None:
    """What speaks against the lean step on a device that is here; None: it gives peft's gradients there.

    Raises:
        Exception: memory ran out.
    """
    try:
        difference = lean_difference(torch_name, dtype)
    except Exception as error:  # whatever a library may say: peft's layers compute the same
        if is_out_of_memory(error):
            raise
        return first_line(error)
    return None if difference <= TOLERANCES[dtype] else f"gradients differ by {difference:.1e}"


def lean_difference(device: str, dtype: torch.dtype) -> float:
    """The largest relative difference of any gradient, NF4 with double quantization and checkpointing; infinite where
    one is no number."""
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(0)
        model = _small_model(device, dtype)
        ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), device=device)
        theirs = _gradients(model, ids, dtype)
        install_lean_step(model, dtype, tile_bytes=0)
        ours = _gradients(model, ids, dtype)
    found = [float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-30)) for name in theirs]
    return max(difference if difference == difference else float("inf") for difference in found)


def _small_model(device: str, dtype: torch.dtype) -> PeftModel:
    """A Llama of one layer, quantized on the device, an adapter on it that changes something."""
    config: Any = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, attention_bias=True,
    )  # fmt: skip
    network: Any = LlamaForCausalLM(config)
    network.to(dtype)
    for parent in list(network.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, dtype, True, "nf4"
                )
                packed.weight = bitsandbytes.nn.Params4bit(child.weight.data, False, quant_type="nf4", module=packed)
                packed.bias = child.bias
                packed.support_avx512bf16_for_cpu = False
                setattr(parent, name, packed)
    network.requires_grad_(False).to(device)
    network.is_loaded_in_4bit = True
    model = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    network.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _gradients(model: PeftModel, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of one step, by name; taken from the model."""
    is_low = dtype is not torch.float32
    with torch.autocast(ids.device.type, dtype) if is_low else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
