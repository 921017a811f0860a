"""The training step on a CUDA card: equal to peft's, then timed in alternation with TRL's own, on random weights.

    python tools/bench_card.py [--steps 6] [--seconds 170] [--shapes 4x2048] [--profile qtune] [--out FILE.json]

First every gradient of a small model, with qtune's functions and without, in fp32 and in 16 bits, and each Triton
kernel against PyTorch's operations: a difference ends the run. Then the trainers of --trainers, of one geometry
(Llama-3.1-8B's unless --small), stand on the card together and take steps in turn. Printed are medians of seconds,
tokens per second, the peak of each (what the others hold subtracted), of those that --profile names one step under
PyTorch's profiler and one under Python's. Memory and time do not depend on the weights.

    qtune    every layer computed twice       peft         the same with peft's layers
    kept     nothing computed twice           leanest      embeddings and activations on the host, paged 8-bit AdamW
    TRL      as its plain script makes it     compressed   embeddings in int8, adapter in bf16, 8-bit AdamW
"""

import argparse
import cProfile
import gc
import io
import json
import pstats
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bare_trainer import bare_trainer
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.quantizers.auto import AutoHfQuantizer
from trl import SFTConfig, SFTTrainer

from qtune.adapter.attach import attach_adapter
from qtune.adapter.lean import install_lean_step
from qtune.data.collate import PaddedCollator
from qtune.device.present import present_device
from qtune.kernels import comparison, ops
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.host import store_embeddings
from qtune.model.layer_stream import stream_layers
from qtune.model.load import quantization_config
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe

EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SMALL = {
    "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 3, "num_attention_heads": 10,
    "num_key_value_heads": 2, "vocab_size": 4096,
}  # fmt: skip


def main() -> None:
    """Checks, measures, prints, and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each, after two that are not")
    parser.add_argument("--seconds", type=float, default=170, help="no new measurement begins after so many")
    parser.add_argument("--shapes", nargs="+", default=["4x2048", "1x2048"])
    parser.add_argument(
        "--trainers", nargs="+", choices=[*VARIANTS, "TRL"], default=["qtune", "kept", "leanest", "TRL"]
    )
    parser.add_argument("--profile", nargs="+", default=[], help="trainers of which one step runs under the profilers")
    parser.add_argument("--no-equality", action="store_true", help="measure at once: equality was seen before")
    parser.add_argument("--small", action="store_true", help="a small model, to see that the script runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    began = time.perf_counter()
    found: dict[str, Any] = {"versions": {"torch": torch.__version__}, "device": present_device().name}

    def left() -> float:
        return options.seconds - (time.perf_counter() - began)

    def keep(name: str, value: Any) -> None:
        found[name] = value
        print(f"[{time.perf_counter() - began:5.1f} s] {name}: {json.dumps(value)}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))

    if torch.cuda.is_available():
        keep("kernels", kernel_differences())
    for dtype in () if options.no_equality else (torch.float32, torch.bfloat16):
        for checkpointing in (False, True):
            difference = gradient_difference(dtype, checkpointing)
            keep(f"gradients {dtype} checkpointing={checkpointing}", difference)
            if difference["worst"] > (2e-4 if dtype is torch.float32 else 6e-2):
                raise SystemExit("the gradients are not equal: nothing was measured")
    geometry = SMALL if options.small else EIGHT_B
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            rows, length = map(int, shape.split("x"))
            if left() < 25:
                print(f"no time left for {shape}")
                break
            measure(geometry, rows, length, options, folder, keep, left)


# --- equality ------------------------------------------------------------------------------------------------------


def kernel_differences() -> dict[str, Any]:
    """Each Triton kernel against PyTorch's operations on the card; the reason where PyTorch's take its place."""
    found: dict[str, Any] = {}
    for name in comparison.COMPARED:
        kernel = ops.card_kernel(name)
        found[name] = kernel if isinstance(kernel, str) else comparison.difference(name, kernel, compute_dtype())
    return found


def gradient_difference(dtype: torch.dtype, checkpointing: bool) -> dict[str, float]:
    """peft's step and ours on the same weights: losses, and the largest relative difference of any gradient."""
    losses, gradients = [], []
    for lean in (False, True):
        recipe, plan = parts(2, 500, dtype)
        model = random_model(SMALL, recipe, plan)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if lean:
            install_lean_step(model, dtype)
        ids = torch.arange(1000, device=model.device).view(2, 500) * 7 % SMALL["vocab_size"]
        kind = model.device.type
        for _ in range(2):
            with torch.autocast(kind, dtype) if dtype is not torch.float32 else nullcontext():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        losses.append(float(loss))
        gradients.append({n: p.grad.float().cpu() for n, p in model.named_parameters() if p.requires_grad})
        del model, loss
        free()
    theirs, ours = gradients
    worst = max(comparison.relative(ours[name], theirs[name]) for name in theirs)
    return {"peft": losses[0], "ours": losses[1], "worst": worst}


# --- models --------------------------------------------------------------------------------------------------------


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "qtune": {},
    "peft": {"training": {"lean_step": False}},
    "kept": {"training": {"gradient_checkpointing": False}},
    "dequantized": {"training": {"gradient_checkpointing": False}, "memory": {"keep_dequantized": True}},
    "leanest": {
        "training": {"optimizer": "paged-adamw-8bit"},
        "memory": {"embeddings": "host", "activations": "host", "loss_tile": "16 MiB"},
    },
    "compressed": {
        "adapter": {"dtype": "bfloat16"},
        "training": {"optimizer": "adamw-8bit"},
        "memory": {"embeddings": "int8"},
    },
}
"""What each differs in from the first."""


def parts(rows: int, length: int, dtype: torch.dtype, variant: str = "qtune") -> tuple[Recipe, Plan]:
    """LoRA r16 on all linear layers, on the card that is here."""
    differs = VARIANTS[variant]
    recipe = parse_recipe(
        {
            "model": {"base": "random"},
            "adapter": {"kind": "lora", "rank": 16, **differs.get("adapter", {})},
            "quantization": {"kind": "nf4", "compute_dtype": str(dtype).removeprefix("torch.")},
            "data": {"train": "random", "max_length": length},
            "training": {
                "batch_size": rows, "micro_batch_size": rows, "schedule": "constant", "warmup": 0.0,
                "learning_rate": 1e-4, "gradient_checkpointing": True, "lean_step": True, **differs.get("training", {}),
            },
            "memory": differs.get("memory", {}),
        }
    )  # fmt: skip
    return recipe, make_plan(recipe, present_device())


def random_model(geometry: dict[str, int], recipe: Recipe, plan: Plan) -> Any:
    """A Llama of random NF4 weights with double quantization where the plan wants it, its adapter attached."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, plan.compute_dtype), plan.device.torch_name
    config = LlamaConfig(**geometry, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192)
    quantization = quantization_config(recipe.quantization, dtype)
    model = bare_model(config, dtype, quantization, "sdpa")
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)  # transformers' trainer asks it
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            fill_packed(module, dtype, device)
        else:
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    made = torch.empty(tensor.shape, dtype=dtype, device=device)
                    made = made.fill_(1) if made.dim() == 1 else made.normal_(0, 0.02)
                    module._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    store_embeddings(model, plan.embeddings, device)
    if plan.layers != "device":
        stream_layers(model, plan.layers, device)
    return attach_adapter(model, recipe.adapter, plan)


def fill_packed(module: Any, dtype: torch.dtype, device: str) -> None:
    """Random codes, absmax about 0.05: weights of about the size that a trained model's have."""
    old = module.weight.quant_state
    codes = torch.randint(0, 256, tuple(module.weight.shape), dtype=torch.uint8, device=device)
    blocks = old.absmax.numel()
    nested = QuantState(
        absmax=torch.full((old.state2.absmax.numel(),), 0.01, device=device),
        code=create_dynamic_map().to(device), blocksize=256, dtype=torch.float32,
    )  # fmt: skip
    state = QuantState(
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device), shape=old.shape,
        code=get_4bit_type("nf4", device=device), blocksize=64, quant_type="nf4", dtype=dtype,
        offset=torch.tensor(0.05, device=device), state2=nested,
    )  # fmt: skip
    module.weight = bitsandbytes.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=True, quant_type="nf4",
        module=module, bnb_quantized=True,
    )  # fmt: skip
    module.quant_state = state
    module.support_avx512bf16_for_cpu = False


def tokenizer() -> PreTrainedTokenizerFast:
    """Trainers ask for one; no row goes through it."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def random_rows(rows: int, length: int, vocabulary: int) -> dict[str, list[list[int]]]:
    """Full rows, every token scored."""
    ids = torch.randint(3, vocabulary, (rows, length)).tolist()
    return {"input_ids": ids, "labels": ids}


# --- trainers ------------------------------------------------------------------------------------------------------


def ours(geometry: dict[str, int], rows: int, length: int, folder: str, variant: str) -> SFTTrainer:
    """qtune's trainer, as a run builds it."""
    recipe, plan = parts(rows, length, compute_dtype(), variant)
    trainer = bare_trainer(
        random_model(geometry, recipe, plan), recipe, plan, tokenizer(),
        random_rows(rows, length, geometry["vocab_size"]), Path(folder) / f"qtune-{variant}",
    )  # fmt: skip
    return ready(trainer)


def trl(geometry: dict[str, int], rows: int, length: int, folder: str, *, use_liger_kernel: bool = False) -> SFTTrainer:
    """SFTTrainer as a plain script makes it: bf16, checkpointing, AdamW, TRL's own loss and adapter type."""
    recipe, plan = parts(rows, length, compute_dtype())
    model = random_model(geometry, recipe, plan)
    config = SFTConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=rows, learning_rate=1e-4, lr_scheduler_type="constant",
        optim="adamw_torch", use_cpu=plan.device.kind == "cpu", bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.loss_scaling, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=length, remove_unused_columns=False,
        report_to="none", disable_tqdm=True,
        use_liger_kernel=use_liger_kernel,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_dict(random_rows(rows, length, geometry["vocab_size"])),
        processing_class=tokenizer(), data_collator=PaddedCollator(0),
    )  # fmt: skip
    return ready(trainer)


def compute_dtype() -> torch.dtype:
    """The card's own."""
    return torch.bfloat16 if present_device().bf16 else torch.float16 if torch.cuda.is_available() else torch.float32


def ready(trainer: SFTTrainer) -> SFTTrainer:
    """The parts of `Trainer.train` that come before its first step."""
    trainer.model_accepts_loss_kwargs = True
    if trainer.args.gradient_checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.model.enable_input_require_grads()
    trainer.create_optimizer_and_scheduler(1000)
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model.train()
    return trainer


def step(trainer: SFTTrainer) -> float:
    """One micro-batch as transformers' loop takes it, from counting to letting go of the gradients; seconds until the
    card has done all of it."""
    batch = next(iter(trainer.get_train_dataloader()))
    synchronize()
    began = time.perf_counter()
    update(trainer, batch)
    synchronize()
    return time.perf_counter() - began


def update(trainer: SFTTrainer, batch: dict[str, Any]) -> torch.Tensor:
    """Forward, backward, clipping and update as transformers' loop does them; the mean loss."""
    scored = batch["labels"][:, 1:].ne(-100).sum()
    loss = trainer.training_step(trainer.model, batch, scored)
    trainer.floating_point_ops(batch)
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return loss


def synchronize() -> None:
    """Waits for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes of tensors on the card."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def free() -> None:
    """Gives everything back that nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    geometry: dict[str, int], rows: int, length: int, options: argparse.Namespace, folder: str, keep: Any, left: Any
) -> None:
    """Steps in turn, then one of each under the profilers."""
    makers = {
        name: (lambda: trl(geometry, rows, length, folder))
        if name == "TRL"
        else (lambda name=name: ours(geometry, rows, length, folder, name))
        for name in options.trainers
    }
    trainers: dict[str, SFTTrainer] = {}
    held: dict[str, int] = {}
    for name, make in makers.items():
        before = allocated()
        trainers[name] = make()
        for _ in range(2):
            step(trainers[name])
        free()
        held[name] = allocated() - before
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    peaks = dict.fromkeys(trainers, 0)
    for _ in range(options.steps):
        if left() < 12:
            break
        for name, trainer in trainers.items():
            others = sum(size for other, size in held.items() if other != name)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(step(trainer))
            if torch.cuda.is_available():
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - others)
    for name in trainers:
        if not seconds[name]:
            continue
        median = statistics.median(seconds[name])
        result = {
            "seconds": round(median, 4), "least": round(min(seconds[name]), 4),
            "tokens_per_second": round(rows * length / median), "peak_gib": round(peaks[name] / 2**30, 3),
            "held_gib": round(held[name] / 2**30, 3), "steps": len(seconds[name]),
        }  # fmt: skip
        keep(f"{rows}x{length} {name}", result)
    for name, trainer in trainers.items():
        if name in options.profile and left() > 8:
            keep(f"{rows}x{length} {name}, processor", profiled_python(trainer))
            keep(f"{rows}x{length} {name}, kernels", profiled(trainer))
    del trainers, trainer
    free()


def profiled_python(trainer: SFTTrainer) -> list[str]:
    """What the processor did in one step, Python's functions by their own time."""
    seen = cProfile.Profile()
    seen.enable()
    step(trainer)
    seen.disable()
    text = io.StringIO()
    pstats.Stats(seen, stream=text).sort_stats("tottime").print_stats(28)
    return [line.strip()[-150:] for line in text.getvalue().splitlines() if line.strip()]


def profiled(trainer: SFTTrainer) -> dict[str, Any]:
    """One step: kernels by name, how many, how long, and what the processor did meanwhile."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as seen:
        wall = step(trainer)
    events = seen.key_averages()
    kernels = [event for event in events if "CUDA" in str(event.device_type)]
    total = sum(event.self_device_time_total for event in kernels)
    most = sorted(kernels, key=lambda event: -event.self_device_time_total)[:30]
    calls = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
    return {
        "idle": idle(seen),
        "wall_s": round(wall, 4), "kernel_s": round(total / 1e6, 4), "launches": sum(event.count for event in kernels),
        "top": [[round(e.self_device_time_total / 1e3, 2), e.count, e.key[:90]] for e in most],
        "processor": [[round(e.self_cpu_time_total / 1e3, 2), e.count, e.key[:60]] for e in calls],
    }  # fmt: skip


def idle(seen: profile) -> dict[str, Any]:
    """Where the card waited for the processor: ms in all, and of the longest waits, with the kernels around them."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events()
        if "CUDA" in str(event.device_type)
    )
    waits, end, before = [], None, ""
    for start, stop, name in kernels:
        if end is not None and start > end:
            waits.append((start - end, before[:50], name[:50]))
        if end is None or stop > end:
            end, before = stop, name
    longest = sorted(waits, reverse=True)[:24]
    return {
        "ms": round(sum(wait for wait, *_ in waits) / 1e3, 2),
        "longest": [[round(wait / 1e3, 3), *names] for wait, *names in longest],
    }


if __name__ == "__main__":
    main()
