"""`qtune check`: everything that can be wrong before a run, found without training."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qtune import console
from qtune.adapter.attach import attach_adapter
from qtune.data.batches import StepSampler, padding_share
from qtune.data.collate import collator_for
from qtune.data.figures import Sample, SplitFigures, samples_of, split_figures
from qtune.data.findings import Finding, gate, stopping
from qtune.data.inspection import inspect
from qtune.data.prepare import Prepared, refuse_bad_rows, survey
from qtune.device.present import present_device
from qtune.memory.longest import longest_of
from qtune.memory.profile import Forecast, attempted
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.builtin import cache_folder
from qtune.model.load import attention_rule, count_parameters, load_base, load_config, load_tokenizer
from qtune.model.loss import install_loss
from qtune.plan import Plan, make_plan
from qtune.recipe.file import Resolved, show_value
from qtune.recipe.schema import Data, Recipe
from qtune.run.resolved import settled_values
from qtune.startup.quiet import quiet_loading
from qtune.timing.forecast import TimeForecast, time_of

# bf16 or fp16: what an export writes for each parameter.
EXPORT_BYTES = 2
# Two moments of AdamW in fp32 for each trained parameter.
OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class Batches:
    """An epoch in figures. The padding shares are of all positions: rows in random order, and grouped by length."""

    rows: int
    steps_per_epoch: int
    steps: int
    batch_size: int
    micro_batch_size: int
    padding_shuffled: float
    padding_grouped: float
    packed: bool


@dataclass(frozen=True)
class Disk:
    """Bytes that a run and its export will write, and what is free where each goes."""

    checkpoints_bytes: int
    export_bytes: int
    cache_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Check:
    """The whole examination; the screen and the JSON are made from it."""

    resolved: Resolved
    plan: Plan
    prepared: Prepared
    findings: list[Finding]
    allow: tuple[str, ...]
    splits: list[SplitFigures]
    batches: Batches
    samples: list[Sample]
    disk: Disk
    memory: Forecast | str
    """What a step will need; in words why, where that cannot be traced."""
    time: TimeForecast | None
    """How long the run will take; None where the device's rates, or its memory, are not known."""
    step_seconds: float | None
    """Measured, where it was asked for."""

    @property
    def data(self) -> Data:
        """The [data] table."""
        return self.resolved.recipe.data

    @property
    def stopping(self) -> list[Finding]:
        """The findings that would stop a run."""
        return stopping(self.findings, self.allow)

    @property
    def values(self) -> list[tuple[str, str, str]]:
        """Each key that somebody or a rule decided: its name, value and origin."""
        settled = settled_values(self.resolved, self.plan)
        return [
            (".".join(map(str, path)), show_value(value), f"{origin.source} {origin.reason}".strip())
            for path, value, origin in settled
            if origin.source != "default"
        ]

    def require(self) -> None:
        """Ends as the run would.

        Raises:
            DataError: bad rows that are not skipped, or no rows. GateError: errors that are not waived.
        """
        refuse_bad_rows(self.prepared, self.data)
        gate(self.findings, self.allow)

    def to_json(self) -> str:
        """Everything for machines; `stops` names the findings that would stop a run."""
        prepared = self.prepared
        value: dict[str, Any] = {
            "recipe": str(self.resolved.file),
            "values": [dict(zip(("key", "value", "origin"), one, strict=True)) for one in self.values],
            "template": {"origin": prepared.template.origin, "end_of_turn": prepared.end_of_turn},
            "sources": [
                {
                    "name": source.name,
                    "split": source.split,
                    "format": source.row_format,
                    "weight": source.weight,
                    "rows": source.stored.rows,
                    "bad": source.stored.bad_count,
                    "dropped": source.stored.dropped_count,
                }
                for source in prepared.sources
            ],
            "bad_rows": [asdict(bad) for bad in prepared.bad_rows],
            "findings": [finding.to_json() for finding in self.findings],
            "stops": sorted({finding.kind for finding in self.stopping}),
            "splits": [asdict(split) for split in self.splits],
            "batches": asdict(self.batches),
            "samples": [asdict(sample) for sample in self.samples],
            "disk": asdict(self.disk),
            "memory": self._memory_json(),
            "time": None if self.time is None else self.time.to_json(),
            "step_seconds": self.step_seconds,
        }
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def _memory_json(self) -> dict[str, Any]:
        """Without the timeline, which is for pictures."""
        if isinstance(self.memory, str):
            return {"untraced": self.memory}
        found = self.memory.to_json()
        return {name: value for name, value in found.items() if name not in ("phases", "timeline")} | {
            "fits": self.memory.fits
        }


def check(resolved: Resolved, allow: Sequence[str] = (), *, samples: int = 3, timed: bool = False) -> Check:
    """Examines a recipe and its data. With `timed`, the model is loaded and a few micro-batches are run.

    Raises:
        InputError: the model or a data source cannot be found. Bad rows and findings do not raise: see `require`.
    """
    quiet_loading()
    recipe = resolved.recipe
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    plan = make_plan(recipe, present_device(), attention_rule(config))
    prepared = survey(recipe.data, tokenizer, resolved.folder, seed=recipe.training.seed)
    inspection = inspect(prepared, recipe.data, config.get_text_config().vocab_size)
    memory: Forecast | str = "there are no rows"
    if len(prepared.train):
        with console.progress("tracing a step"):
            memory = attempted(config, recipe, plan.device, longest_of(prepared))
    # On a card the micro-batch of the run follows from its memory.
    plan = plan if isinstance(memory, str) else memory.plan
    return Check(
        resolved,
        plan,
        prepared,
        inspection.findings,
        (*recipe.data.allow, *allow),
        [split_figures(split) for split in inspection.splits.values()],
        batches_of(recipe, plan, prepared),
        samples_of(prepared.examples["train"], tokenizer, samples),
        disk_of(recipe, plan, config),
        memory,
        None if isinstance(memory, str) else time_of(config, recipe, memory),
        step_seconds(recipe, plan, prepared, tokenizer) if timed and len(prepared.train) else None,
    )


def batches_of(recipe: Recipe, plan: Plan, prepared: Prepared) -> Batches:
    """Steps and padding of the first epoch."""
    training, lengths = recipe.training, prepared.lengths
    per_epoch = -(-len(lengths) // training.batch_size)
    shuffled = np.random.default_rng((training.seed, 0)).permutation(len(lengths))
    grouped = StepSampler(lengths, training.batch_size, training.seed).order()
    return Batches(
        len(lengths),
        per_epoch,
        training.steps or round(training.epochs * per_epoch),
        training.batch_size,
        plan.micro_batch_size,
        padding_share(lengths[shuffled], plan.micro_batch_size),
        padding_share(lengths[grouped], plan.micro_batch_size),
        prepared.packed,
    )


def disk_of(recipe: Recipe, plan: Plan, config: PretrainedConfig) -> Disk:
    """What the run will write. A checkpoint is written before the oldest goes, so one more than is kept must fit."""
    model = bare_model(config, torch.bfloat16, None, plan.attention)
    with torch.device("meta"):
        count = count_parameters(attach_adapter(model, recipe.adapter, plan))
    adapter_bytes = count.trainable * getattr(torch, plan.adapter_dtype).itemsize
    # The adapter in peft's format and its full state, and the optimizer's moments.
    checkpoint = 2 * adapter_bytes + OPTIMIZER_BYTES * count.trainable
    directory = Path(recipe.output.directory).absolute()
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    return Disk(
        (recipe.training.keep_checkpoints + 1) * checkpoint + adapter_bytes,
        EXPORT_BYTES * (count.total - count.trainable),
        _folder_bytes(cache_folder() / "examples"),
        shutil.disk_usage(existing).free,
    )


def step_seconds(recipe: Recipe, plan: Plan, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> float:
    """Seconds of a step, from the speed of a few micro-batches of it (the optimizer's share is left out)."""
    with console.progress("timing a step"):
        model = attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan, tokenizer)
        install_loss(model.get_base_model(), tile_bytes=plan.loss_tile_bytes)
        collate = collator_for(prepared.packed, int(str(tokenizer.pad_token_id)), plan.attention)
        order = StepSampler(prepared.lengths, recipe.training.batch_size, recipe.training.seed).order()
        size = plan.micro_batch_size
        chosen = np.linspace(0, max(0, len(order) - size), 4).astype(int)
        positions = seconds = 0.0
        for number, start in enumerate(chosen):
            batch = collate([prepared.train[int(row)] for row in order[start : start + size]])
            began = time.perf_counter()
            tensors = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            model(**tensors, use_cache=False).loss.backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first one is slower: memory is taken and kernels are chosen
                seconds += time.perf_counter() - began
                positions += tensors["input_ids"].numel()
    padded = prepared.lengths.sum() / (1 - padding_share(prepared.lengths[order], size))
    return float(padded / len(order) * recipe.training.batch_size * seconds / positions)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
