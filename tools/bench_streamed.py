"""Layers that wait in host memory or on disk, on the device that is here: equal gradients first, then peak and time.

    python tools/bench_streamed.py [--model 8b] [--shapes 1x1x2048 4x1x2048] [--where host disk] [--out results.json]

First the loss and every gradient of a small model, of three micro-batches that pass the layers together and of three
that pass one by one, beside those of the same weights on the device: a difference ends the run. Then a model of random
weights takes whole steps (a shape is micro-batches x rows x tokens) with everything else on the host as well, by its
own functions and AdamW with 8-bit state: the peak of the allocator beside the traced one, and the median of seconds
beside the predicted ones. Memory and time do not depend on the weights. --small: to see that the script runs.
"""

import argparse
import gc
import json
import statistics
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_card import EIGHT_B, SMALL, compute_dtype, random_model
from transformers import LlamaConfig

from qtune.adapter.lean import install_lean_step
from qtune.device.present import present_device
from qtune.kernels import comparison
from qtune.memory.predict import Longest, optimizer_of, predict, summarize
from qtune.model.host import activations_on_host
from qtune.model.layer_major import layer_by_layer
from qtune.model.layer_stream import stream_of
from qtune.model.loss import install_loss
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.timing.forecast import step_duration
from qtune.timing.known import known_rates

warnings.filterwarnings("ignore")

SEVENTY_B = EIGHT_B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
GEOMETRIES = {"8b": EIGHT_B, "70b": SEVENTY_B}
WIDE = SMALL | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 16,
                "num_key_value_heads": 4}  # fmt: skip
"""Weights of several MiB: an allocator gives such blocks to the next one that asks."""


def main() -> None:
    """Checks, measures, prints, and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=GEOMETRIES, default="8b")
    parser.add_argument("--shapes", nargs="*", default=["1x1x2048", "4x1x2048"])
    parser.add_argument("--where", nargs="+", choices=("device", "host", "disk"), default=["host"])
    parser.add_argument("--steps", type=int, default=4, help="counted steps of each, after one that is not")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--skip-equality", action="store_true", help="it was seen here already")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "device": present_device().name}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))

    dtypes = () if options.skip_equality else (torch.float32, compute_dtype())
    for dtype in dict.fromkeys(dtypes):
        for lean in (True, False):
            worst = differences(SMALL if options.small else WIDE, dtype, lean=lean)
            keep(f"gradients {dtype}, {'lean' if lean else 'peft'}", worst)
            if max(worst.values()) > (1e-4 if dtype is torch.float32 else 2e-2):
                raise SystemExit("the gradients are not equal: nothing was measured")
    geometry = SMALL if options.small else GEOMETRIES[options.model]
    for where in options.where:
        for shape in options.shapes:
            micro_batches, rows, length = map(int, shape.split("x"))
            keep(
                f"{options.model} {shape} {where}",
                measured(geometry, micro_batches, rows, length, where, options.steps),
            )


def parts(micro_batches: int, rows: int, length: int, dtype: torch.dtype, **memory: str) -> tuple[Recipe, Plan]:
    """LoRA r16 on all linear layers, checkpointed, on the device that is here."""
    recipe = parse_recipe(
        {
            "model": {"base": "random"},
            "quantization": {"kind": "nf4", "compute_dtype": str(dtype).removeprefix("torch.")},
            "data": {"train": "random", "max_length": length},
            "training": {
                "batch_size": micro_batches * rows, "micro_batch_size": rows, "optimizer": "adamw-8bit",
                "gradient_checkpointing": True,
            },
            "memory": memory,
        }
    )  # fmt: skip
    return recipe, make_plan(recipe, present_device())


# --- equality ------------------------------------------------------------------------------------------------------


def differences(geometry: dict[str, int], dtype: torch.dtype, *, lean: bool) -> dict[str, float]:
    """The largest relative difference of any gradient, by where the layers waited and how micro-batches passed."""
    expected = gradients(geometry, dtype, "device", together=False, lean=lean)
    found = {}
    for where, together in (("host", False), ("host", True), ("disk", True)):
        ours = gradients(geometry, dtype, where, together=together, lean=lean)
        name = f"{where}, {'together' if together else 'one by one'}"
        found[name] = max(comparison.relative(ours[key], expected[key]) for key in expected)
    return found


def gradients(
    geometry: dict[str, int], dtype: torch.dtype, where: str, *, together: bool, lean: bool
) -> dict[str, torch.Tensor]:
    """Of two steps of three micro-batches of unequal length, added up."""
    recipe, plan = parts(3, 2, 400, dtype, layers=where)
    model = adapted(geometry, recipe, plan, lean=lean)
    batches = [
        torch.arange(2 * n, device=model.device).view(2, n) * 7 % geometry["vocab_size"] for n in (400, 300, 350)
    ]
    for _ in range(2):
        step(model, batches, plan, together=together)
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}
    del model
    free()
    return found


def adapted(geometry: dict[str, int], recipe: Recipe, plan: Plan, *, lean: bool = True) -> Any:
    """Random weights, an adapter that changes something, our loss, every layer checkpointed."""
    model = random_model(geometry, recipe, plan)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    install_loss(model.get_base_model(), tile_bytes=plan.loss_tile_bytes)
    if lean:
        install_lean_step(model, getattr(torch, plan.compute_dtype))
    return model


def step(model: Any, batches: list[torch.Tensor], plan: Plan, *, together: bool) -> float:
    """Forward and backward of all micro-batches; the loss."""
    dtype = getattr(torch, plan.compute_dtype)
    low = dtype is not torch.float32

    def forward(ids: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=ids, labels=ids, use_cache=False)
        loss: torch.Tensor = output.loss / output.scored
        return loss

    total = 0.0
    for group in [batches] if together else [[batch] for batch in batches]:
        kept = activations_on_host(model) if plan.activations == "host" else nullcontext()
        with torch.autocast(model.device.type, dtype) if low else nullcontext(), kept:
            losses = layer_by_layer(model, [partial(forward, ids) for ids in group])
        loss = torch.stack(losses).sum()
        loss.backward()
        total += float(loss.detach())
    return total


# --- peak and time -------------------------------------------------------------------------------------------------


def measured(
    geometry: dict[str, int], micro_batches: int, rows: int, length: int, where: str, steps: int
) -> dict[str, Any]:
    """Steps of a model whose embeddings, head and activations are on the host too."""
    memory = {"embeddings": "host", "activations": "host", "loss_tile": "16MiB"}
    recipe, plan = parts(micro_batches, rows, length, compute_dtype(), layers=where, **memory)
    config = LlamaConfig(**geometry, rms_norm_eps=1e-5, max_position_embeddings=8192)
    prediction = summarize(predict(config, recipe, plan, Longest(length, equal=True)))
    rates = known_rates(plan.device)
    model = adapted(geometry, recipe, plan)
    optimizer = optimizer_of(plan)([p for p in model.parameters() if p.requires_grad])
    batches = [
        torch.randint(3, geometry["vocab_size"], (rows, length), device=model.device) for _ in range(micro_batches)
    ]
    free()
    taken, stream = [], stream_of(model)
    for number in range(steps + 1):
        if number == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        before, began = 0 if stream is None else stream.loads, time.perf_counter()
        loss = step(model, batches, plan, together=where != "device")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    result: dict[str, Any] = {
        "seconds": round(statistics.median(taken[1:]), 4),
        "predicted_seconds": None if rates is None else round(step_duration(prediction, plan, rates).seconds, 4),
        "tokens_per_second": round(micro_batches * rows * length / statistics.median(taken[1:])),
        "traced_peak_gib": round(prediction.peak.bytes / 2**30, 3),
        "loss": round(loss, 4),
    }
    if stream is not None:
        result |= {"loads": stream.loads - before, "layer_mib": round(stream.homes[0].numel() / 2**20, 1)}
    if torch.cuda.is_available():
        result["allocated_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        result["reserved_peak_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    del model, optimizer, stream
    free()
    return result


def free() -> None:
    """Gives the allocator's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
