"""The training step against TRL's own, both on the same rows, model, adapter and dtype, in alternating steps.

    python tools/bench_step.py [--steps 10] [--threads 2] [--scored all|answers] [--dtype auto|float32|bfloat16]

Baseline: TRL's SFTTrainer as it comes (its fused LM head, no gradient checkpointing), with the adapter in fp32 or, with
--trl-adapter bfloat16, as TRL makes it, which a CPU without native bfloat16 computes ten times slower.
Both train SmolLM2-135M-Instruct in NF4 with LoRA rank 16 on all linear layers, 2 rows of 256 tokens a step.
Prints medians of seconds per step, tokens per second, their ratio, and the losses, which must agree. On a computer that
other work uses as well, the ratio of processor time is the one to believe.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qtune.adapter.attach import attach_adapter, cast_adapter
from qtune.data.collate import PaddedCollator
from qtune.device.present import present_device
from qtune.memory.measured.meter import Meter
from qtune.model.load import load_base, load_tokenizer
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.run.folder import RunDir
from qtune.startup.quiet import quiet_libraries, quiet_loading
from qtune.training.arguments import sft_config
from qtune.training.trainer import QloraTrainer

ROWS, LENGTH = 2, 256
TEXT = Path(__file__).parent.parent / "README.md"


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each, after two that are not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scored", choices=("all", "answers"), default="all", help="all tokens, or the last quarter")
    parser.add_argument("--dtype", default="auto", help="that both compute in")
    parser.add_argument("--trl-adapter", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    quiet_loading()

    with tempfile.TemporaryDirectory() as folder:
        theirs = _trl(folder, options.scored, options.dtype, options.trl_adapter)
        trainers = {f"TRL, {options.trl_adapter}": theirs, "qtune": _ours(folder, options.scored, options.dtype)}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        worked: dict[str, list[float]] = {name: [] for name in trainers}
        losses: dict[str, list[float]] = {name: [] for name in trainers}
        for step in range(options.steps + 2):
            for name, trainer in trainers.items():
                began, began_work = time.perf_counter(), time.process_time()
                losses[name].append(_step(trainer))
                if step >= 2:
                    seconds[name].append(time.perf_counter() - began)
                    worked[name].append(time.process_time() - began_work)
    shape = f"{ROWS} x {LENGTH} tokens, scored: {options.scored}, {options.dtype}"
    print(f"{options.threads} threads, {shape}, {options.steps} steps each")
    for name in trainers:
        median = statistics.median(seconds[name])
        tokens = ROWS * LENGTH / median
        ends = f"loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}"
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"{name:18} {median:6.2f} s per step ({spread}), {tokens:4.0f} tokens/s, {ends}")
    for name, taken in (("by the clock", seconds), ("of processor time", worked)):
        pairs = [theirs / ours for theirs, ours in zip(*taken.values(), strict=True)]
        print(f"ratio {name:18} {statistics.median(pairs):6.2f} (TRL / qtune, median of pairs)")


def _step(trainer: SFTTrainer) -> float:
    batch = next(iter(trainer.get_train_dataloader()))
    scored = batch["labels"][:, 1:].ne(-100).sum()
    loss = trainer.training_step(trainer.model, batch, scored)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return float(loss)


def _rows(scored: str) -> Dataset:
    tokenizer = load_tokenizer(_recipe().model)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, ROWS * LENGTH, LENGTH)]
    masked = 0 if scored == "all" else 3 * LENGTH // 4
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * masked + row[masked:] for row in rows]})


def _recipe(dtype: str = "auto"):
    return parse_recipe(
        {
            "model": {"base": "builtin:smollm2-135m-instruct"},
            "quantization": {"kind": "nf4", "compute_dtype": dtype},
            "adapter": {"kind": "lora", "rank": 16},
            "data": {"train": "README.md", "max_length": LENGTH},
            "training": {
                "batch_size": ROWS,
                "micro_batch_size": ROWS,
                "schedule": "constant",
                "warmup": 0.0,
                "learning_rate": 2e-4,
            },
        }
    )


def _parts(scored: str, dtype: str):
    recipe = _recipe(dtype)
    plan = make_plan(recipe, present_device())
    tokenizer = load_tokenizer(recipe.model)
    torch.manual_seed(recipe.training.seed)
    model = attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan)
    return recipe, plan, tokenizer, model, _rows(scored), PaddedCollator(tokenizer.pad_token_id)


def _ours(folder: str, scored: str, dtype: str) -> QloraTrainer:
    recipe, plan, tokenizer, model, rows, collator = _parts(scored, dtype)
    run_dir = RunDir(Path(folder) / "ours")
    trainer = QloraTrainer(
        model=model,
        config=sft_config(recipe.training, plan, run_dir, has_validation=False),
        plan=plan,
        training=recipe.training,
        meter=Meter(torch.device(plan.device.torch_name), names_tensors=False),
        tokenizer=tokenizer,
        train=rows,
        validation=None,
        collator=collator,
        lengths=[LENGTH] * ROWS,
        callbacks=[],
        tiled_loss=True,
        note=print,
    )
    trainer.create_optimizer_and_scheduler(1000)
    return trainer


def _trl(folder: str, scored: str, dtype: str, adapter: str) -> SFTTrainer:
    recipe, plan, tokenizer, model, rows, collator = _parts(scored, dtype)
    config = SFTConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=ROWS,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        use_cpu=plan.device.kind == "cpu",
        bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.loss_scaling,
        gradient_checkpointing=plan.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        report_to="none",
        seed=recipe.training.seed,
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, data_collator=collator
    )
    cast_adapter(model, getattr(torch, adapter))
    trainer.model_accepts_loss_kwargs = True
    trainer.create_optimizer_and_scheduler(1000)
    return trainer


if __name__ == "__main__":
    main()
