"""The lean step beside peft's on the card that is about to train: one small layer, its loss and every gradient.

Nothing of a training step is so quietly wrong as a gradient: loss and outputs can look right while it is not
(bitsandbytes#2034). Tests compare both on a CPU; a card's libraries and kernels are its own.
"""

from __future__ import annotations

import contextlib
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.adapter.lean import install_lean_step

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest ||difference|| / ||gradient|| that is rounding. In bfloat16 two right ways differ by 1 to 3 %."""

HIDDEN, INTERMEDIATE, ROWS, LENGTH = 256, 704, 2, 160
"""More rows than the hidden size, so that the MLP is computed in more than one tile."""


def lean_difference(device: str, dtype: torch.dtype) -> float:
    """The largest relative difference of any gradient, NF4 with double quantization and checkpointing; infinite where
    one is no number."""
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(0)
        model = _small_model(device, dtype)
        ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), device=device)
        theirs = _gradients(model, ids, dtype)
        install_lean_step(model, dtype, recompute=True)
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
