"""Padding, grouping by length and packing, and TRL as it comes, on the same rows in the same run.

    python tools/bench_batching.py [--rows 64] [--passes 3] [--threads 2] [--max-length 1024]

Rows: questions about the standard library's docstrings (tools/make_docstring_data.py), whose lengths vary as real
answers do; longer ones than --max-length are left out. Model: SmolLM2-135M-Instruct in NF4 with LoRA rank 16 on all
linear layers. A pass is forward and backward over all rows, in steps of 16 rows and micro-batches of 4; packed rows
hold about as many tokens as such a micro-batch and go one at a time. The ways take turns, pass by pass.
TRL: SFTTrainer's collator, random order and loss, with the adapter in fp32 (its bfloat16 is ten times slower on CPUs
without bfloat16 products). Printed: scored tokens per second (median of the passes), the share of all positions that
is padding, and the mean loss, which must be the same in every way.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_docstring_data import make_rows
from trl import SFTConfig, SFTTrainer

from qtune.adapter.attach import attach_adapter, cast_adapter
from qtune.data.batches import StepSampler
from qtune.data.collate import PackedCollator, PaddedCollator
from qtune.data.masks import IGNORED
from qtune.data.prepare import Prepared, prepare
from qtune.device.present import present_device
from qtune.model.load import load_base, load_tokenizer
from qtune.model.loss import install_loss
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.startup.quiet import quiet_libraries, quiet_loading

BATCH, MICRO_BATCH = 16, 4

Batch = dict[str, Any]


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3, help="counted passes of each way, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    quiet_loading()
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(Path(folder), options.rows, options.max_length)
        passes = [{name: _one_pass(*way) for name, way in ways.items()} for _ in range(options.passes + 1)]
    device = present_device()
    print(f"{device.name}; {options.rows} rows of at most {options.max_length} tokens, {options.passes} passes")
    for name in ways:
        _, scored, padding, loss = passes[0][name]
        seconds = [one[name][0] for one in passes[1:]]
        spread = f"{scored / max(seconds):.0f} to {scored / min(seconds):.0f}"
        speed = scored / statistics.median(seconds)
        print(f"{name:30} {speed:6.1f} scored tokens/s ({spread}), padding {padding:5.1%}, loss {loss:.4f}")


def _ways(folder: Path, rows: int, max_length: int) -> dict[str, tuple[Callable[[Batch], float], list[Batch]]]:
    """For each way: a function that runs a micro-batch and returns its summed loss, and the micro-batches of a pass."""
    recipe, packed_recipe = (_recipe(max_length, packing=packing) for packing in (False, True))
    tokenizer = load_tokenizer(recipe.model)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4 * rows)), encoding="utf-8")
    whole = prepare(recipe.data, tokenizer, folder, cache=folder)
    places = {f"{place}" for place in whole.examples["train"][:rows]["place"]}
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for number, line in enumerate(lines, 1) if f"rows.jsonl:{number}" in places]
    (folder / "rows.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    plain = prepare(recipe.data, tokenizer, folder, cache=folder)
    packed = prepare(packed_recipe.data, tokenizer, folder, cache=folder)

    pad = tokenizer.pad_token_id
    shuffled = np.random.default_rng((recipe.training.seed, 0)).permutation(len(plain.train))
    grouped = StepSampler(plain.lengths, BATCH, recipe.training.seed).order()
    trainer = _trl(folder, recipe, plain)
    ours = _model(recipe)
    install_loss(ours.get_base_model())

    def theirs(batch: Batch) -> float:
        scored = int((batch["labels"][:, 1:] != IGNORED).sum())
        return float(trainer.training_step(trainer.model, batch, torch.tensor(1)).detach()) if scored else 0.0

    def own(batch: Batch) -> float:
        loss = ours(**batch | {"use_cache": False}).loss
        loss.backward()
        return float(loss.detach())

    return {
        "TRL, random order": (theirs, list(_batches(plain, shuffled, MICRO_BATCH, trainer.data_collator))),
        "padding, random order": (own, list(_batches(plain, shuffled, MICRO_BATCH, PaddedCollator(pad)))),
        "padding, grouped by length": (own, list(_batches(plain, grouped, MICRO_BATCH, PaddedCollator(pad)))),
        "packing": (own, list(_batches(packed, range(len(packed.train)), 1, PackedCollator(pad)))),
    }


def _batches(
    prepared: Prepared, order: Sequence[int], size: int, collate: Callable[[list[Batch]], Batch]
) -> Iterator[Batch]:
    for start in range(0, len(order), size):
        yield collate([prepared.train[int(row)] for row in order[start : start + size]])


def _one_pass(run: Callable[[Batch], float], batches: list[Batch]) -> tuple[float, int, float, float]:
    """Seconds, scored tokens, padding share, and mean loss of a pass."""
    began = time.perf_counter()
    loss = sum(run(dict(batch)) for batch in batches)
    seconds = time.perf_counter() - began
    scored = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    positions = sum(batch["input_ids"].numel() for batch in batches)
    return seconds, scored, 1 - sum(map(_used, batches)) / positions, loss / scored


def _used(batch: Batch) -> int:
    """Positions that hold a row's token. A packed row's padding is its last document, and of one token: pad."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel()


def _recipe(max_length: int, *, packing: bool) -> Recipe:
    data = {"train": "rows.jsonl", "validation": 0, "max_length": max_length, "on_long_row": "drop", "packing": packing}
    training = {"batch_size": BATCH, "micro_batch_size": MICRO_BATCH, "gradient_checkpointing": False}
    return parse_recipe({"model": {"base": "builtin:smollm2-135m-instruct"}, "data": data, "training": training})


def _model(recipe: Recipe):
    plan = make_plan(recipe, present_device())
    torch.manual_seed(recipe.training.seed)
    return attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan).train()


def _trl(folder: Path, recipe: Recipe, prepared: Prepared) -> SFTTrainer:
    plan = make_plan(recipe, present_device())
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=MICRO_BATCH,
        use_cpu=plan.device.kind == "cpu",
        bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.loss_scaling,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=_model(recipe),
        args=config,
        train_dataset=prepared.train,
        processing_class=load_tokenizer(recipe.model),
    )
    cast_adapter(trainer.model, getattr(torch, plan.adapter_dtype))
    return trainer


if __name__ == "__main__":
    main()
