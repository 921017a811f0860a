"""The training step against TRL's and Unsloth's, all on the same rows, base, adapter and dtype, in alternating steps.

    python tools/bench_step.py [--steps 10] [--threads 2] [--scored all|answers] [--dtype auto|float32|bfloat16]
    python tools/bench_step.py --model "Llama 3.1 8B" --rows 4 --length 2048 --checkpointing --unsloth-python FILE
    python tools/bench_step.py --trainers TRL-apart TRL      # what a process of its own changes

    TRL        SFTTrainer as it comes (its fused LM head), with the adapter in fp32 or, with --trl-adapter bfloat16, as
               TRL makes it, which a CPU without native bfloat16 computes ten times slower
    TRL-apart  the same in a process of its own: on a processor as it comes, for beside qtune it has what a run of qtune
               asks of the C library (`device/freed_memory.py`), which serves the whole process
    Unsloth    in a process of its own, where it is installed; --unsloth-python names the Python that has it, for
               2026.10 asks for transformers and TRL older than qtune's. Without a card its layers are peft's
    qtune      as a run takes it

The built-in model unless --base (a folder) or --model (a published geometry with random weights) says otherwise, in NF4
with LoRA rank 16 on all linear layers, 2 rows of 256 tokens a step. No layer is computed twice, or with --checkpointing
every one, or with --checkpointing usual as each trainer does when it is not told: TRL and Unsloth every layer, qtune on
a processor none for as long as its memory is ample (what it does on a card depends on the card: tools/bench_card.py).
Printed are medians of seconds per step, tokens per second, the first and last loss, which must agree, the peak of each,
and ratios to the last trainer named. On a computer that other work uses as well, the ratio of processor time is the one
to believe. Peaks are the tensors' on a card; on a CPU the whole memory of a process, and only of one with one trainer.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from bare_trainer import bare_trainer
from bench_card import allocated, free, ready, update
from memory_table import MODELS
from random_checkpoint import random_checkpoint
from step_apart import Apart, Job, Meter, RefusedError, Taken, trl_trainer
from trl import SFTTrainer

from qtune.adapter.attach import attach_adapter
from qtune.device.freed_memory import freed_memory_stays
from qtune.device.present import present_device
from qtune.memory.kept_dequantized import plan_at_first
from qtune.model.load import load_base, load_config, load_tokenizer
from qtune.model.local import local_base
from qtune.plan import Plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.startup.quiet import quiet_libraries, quiet_loading

BUILTIN = "builtin:smollm2-135m-instruct"
TEXT = Path(__file__).parent.parent / "README.md"
TRAINERS = ("TRL", "TRL-apart", "Unsloth", "qtune")
CHECKPOINTING: dict[str, tuple[bool, bool | str]] = {
    "none": (False, False), "every": (True, True), "usual": (True, "auto")
}  # fmt: skip
"""(TRL's and Unsloth's, the recipe's), by the command's word."""
NOT_COUNTED = 2
"""Steps of each before those that are: what is made once is made in them."""


class Stepping(Protocol):
    """A trainer that takes one step when it is asked."""

    def step(self) -> Taken: ...

    def close(self) -> None: ...


@dataclass
class Here:
    """A trainer in this process."""

    trainer: SFTTrainer
    others_bytes: int = 0
    """What the other ones in this process hold on the card."""

    def step(self) -> Taken:
        """One micro-batch as transformers' loop takes it, which has the batch before a step begins."""
        batch = next(iter(self.trainer.get_train_dataloader()))
        meter = Meter()
        loss = update(self.trainer, batch)
        seconds, worked, peak = meter.read()
        return Taken(float(loss), seconds, worked, peak - self.others_bytes if peak and on_card() else None)

    def close(self) -> None:
        """It ends with this process."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the comparison and prints it."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    quiet_libraries()
    quiet_loading()
    with tempfile.TemporaryDirectory() as folder:
        if options.model:
            options.base = str(random_checkpoint(options.model, Path(folder) / "base"))
        taken = steps_in_turn(options, Path(folder))
    report(options, taken)


def steps_in_turn(options: argparse.Namespace, folder: Path) -> dict[str, list[Taken]]:
    """Of each trainer that can be had all its steps, those that are not counted first."""
    with ExitStack() as ends:
        trainers: dict[str, Stepping] = {}
        taken: dict[str, list[Taken]] = {}
        held: dict[str, int] = {}
        if "qtune" in options.trainers:
            ends.enter_context(freed_memory_stays(torch.device(present_device().torch_name)))
        for name, make in makers(options, folder).items():
            before = allocated()
            try:
                trainer = make()
                ends.callback(trainer.close)
                taken[name] = [trainer.step() for _ in range(NOT_COUNTED)]
                trainers[name] = trainer
            except RefusedError as refusal:
                print(f"{name} is left out: {refusal}")
            free()
            held[name] = allocated() - before
        for name, trainer in trainers.items():
            if isinstance(trainer, Here):
                trainer.others_bytes = sum(size for other, size in held.items() if other != name)
        for _ in range(options.steps):
            for name, trainer in trainers.items():
                taken[name].append(trainer.step())
    return taken


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=10, help=f"counted steps of each, after {NOT_COUNTED} that are not"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scored", choices=("all", "answers"), default="all", help="all tokens, or the last quarter")
    parser.add_argument("--dtype", default="auto", help="that all compute in")
    parser.add_argument("--trl-adapter", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["TRL", "Unsloth", "qtune"])
    parser.add_argument("--unsloth-python", type=Path, default=Path(sys.executable))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", default=BUILTIN, help="a folder, or the built-in model")
    which.add_argument("--model", choices=[model[0] for model in MODELS], help="a geometry with random weights")
    parser.add_argument("--rows", type=int, default=2, help="in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of each row")
    parser.add_argument(
        "--checkpointing", nargs="?", const="every", default="none", choices=tuple(CHECKPOINTING),
        help="which layers are computed twice (default none; without a word every one)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.checkpointing == "usual" and on_card():
        parser.error(
            "--checkpointing usual: what qtune does on a card is settled by what fits it; use tools/bench_card.py"
        )
    return options


def report(options: argparse.Namespace, taken: dict[str, list[Taken]]) -> None:
    """A line for each trainer, and ratios to the last one."""
    shape = f"{options.rows} x {options.length} tokens, scored: {options.scored}, {options.dtype}"
    shape += f", layers computed twice: {options.checkpointing}"
    print(f"{options.threads} threads, {shape}, {options.steps} steps each")
    counted = {name: steps[NOT_COUNTED:] for name, steps in taken.items()}
    for name, steps in counted.items():
        seconds = [step.seconds for step in steps]
        median = statistics.median(seconds)
        peak = max((step.peak_bytes for step in steps if step.peak_bytes), default=None)
        print(
            f"{name:10} {median:6.2f} s per step ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{statistics.median(step.worked_seconds for step in steps):.2f} of processor time, "
            f"{options.rows * options.length / median:4.0f} tokens/s, "
            f"loss {taken[name][0].loss:.4f} -> {taken[name][-1].loss:.4f}"
            + ("" if peak is None else f", peak {peak / 2**30:.2f} GiB")
        )
    *others, last = counted
    for name in others:
        pairs = list(zip(counted[name], counted[last], strict=True))
        clock = [theirs.seconds / its.seconds for theirs, its in pairs]
        worked = [theirs.worked_seconds / its.worked_seconds for theirs, its in pairs]
        print(
            f"{name} / {last}, median of pairs (least to most): {spread(clock)} by the clock, "
            f"{spread(worked)} of processor time"
        )


def spread(ratios: list[float]) -> str:
    """ "1.75 (1.70 to 1.81)"."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


# --- trainers ------------------------------------------------------------------------------------------------------


def makers(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Stepping]]:
    """How each of the trainers is had, on the same rows."""
    recipe = recipe_of(options)
    plan = plan_at_first(recipe, present_device(), load_config(recipe.model))
    rows = rows_of(options, recipe)
    rows_file = folder / "rows.json"
    rows_file.write_text(json.dumps(rows))

    def job(trainer: str) -> Job:
        return job_of(options, recipe, plan, trainer, rows_file, folder / trainer)

    known: dict[str, Callable[[], Stepping]] = {
        "TRL": lambda: Here(ready(trl_trainer(job("TRL")))),
        "TRL-apart": lambda: apart(Path(sys.executable), job("TRL")),
        "Unsloth": lambda: apart(options.unsloth_python, job("Unsloth")),
        "qtune": lambda: Here(ours(folder / "qtune", recipe, plan, rows)),
    }
    return {name: known[name] for name in options.trainers}


def apart(python: Path, job: Job) -> Apart:
    """In a process of its own, whose libraries it names."""
    found = Apart(python, job)
    print(f"{job.trainer} in a process of its own: {', '.join(map(' '.join, found.versions.items()))}")
    return found


def ours(folder: Path, recipe: Recipe, plan: Plan, rows: dict[str, list[list[int]]]) -> SFTTrainer:
    """qtune's trainer, as a run builds it."""
    base = load_base(recipe.model, recipe.quantization, plan)
    torch.manual_seed(recipe.training.seed)
    model = attach_adapter(base, recipe.adapter, plan)
    trainer = bare_trainer(model, recipe, plan, load_tokenizer(recipe.model), rows, folder)
    return ready(trainer)


def job_of(options: argparse.Namespace, recipe: Recipe, plan: Plan, trainer: str, rows_file: Path, folder: Path) -> Job:
    """The same for a trainer of others."""
    return Job(
        trainer=trainer,
        base=str(local_base(recipe.model)),
        rows=str(rows_file),
        folder=str(folder),
        device=plan.device.torch_name,
        dtype=plan.compute_dtype,
        adapter_dtype=options.trl_adapter,
        checkpointing=CHECKPOINTING[options.checkpointing][0],
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        learning_rate=plan.learning_rate,
        seed=recipe.training.seed,
        threads=options.threads,
    )


def rows_of(options: argparse.Namespace, recipe: Recipe) -> dict[str, list[list[int]]]:
    """Full rows of English and code, again from the start where the text is too short."""
    ids = load_tokenizer(recipe.model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    needed = options.rows * options.length
    ids = (ids * (needed // len(ids) + 1))[:needed]
    rows = [ids[start : start + options.length] for start in range(0, needed, options.length)]
    masked = 0 if options.scored == "all" else 3 * options.length // 4
    return {"input_ids": rows, "labels": [[-100] * masked + row[masked:] for row in rows]}


def recipe_of(options: argparse.Namespace) -> Recipe:
    """LoRA of rank 16 on all linear layers in NF4, a constant rate."""
    return parse_recipe(
        {
            "model": {"base": options.base},
            # A checkpoint that goes away again leaves nothing behind in the cache.
            "quantization": {"kind": "nf4", "compute_dtype": options.dtype, "keep_copy": not options.model},
            "adapter": {"kind": "lora", "rank": 16},
            "data": {"train": "README.md", "max_length": options.length},
            "training": {
                "batch_size": options.rows,
                "micro_batch_size": options.rows,
                "gradient_checkpointing": CHECKPOINTING[options.checkpointing][1],
                "schedule": "constant",
                "warmup": 0.0,
                "learning_rate": 2e-4,
            },
        }
    )


def on_card() -> bool:
    """Whether steps are taken on a card."""
    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
