"""`qtune check`: everything that can be wrong before a run, found without training."""

import logging
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtune import console
from qtune.adapter.starts import kept_start
from qtune.data.batches import StepSampler, padding_share
from qtune.data.figures import SplitFigures, split_figures
from qtune.data.findings import Finding
from qtune.data.lengths import most_tokens
from qtune.data.prepare import Prepared
from qtune.data.samples import Sample, samples_of
from qtune.device.present import one_sentence, present_device
from qtune.disk import told
from qtune.errors import DataError, InputError, ModelError, Problem, TrainingError
from qtune.memory.forecast import Forecast
from qtune.memory.measured.meter import Meter
from qtune.memory.profile import Profile, profile
from qtune.memory.ways_to_fit import WaysToFit, ways_to_fit
from qtune.model.geometry import load_geometry, shipped_geometry
from qtune.plan import Plan
from qtune.preflight import Disk, Preflight, examine
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Data, Recipe
from qtune.recipe.text import show_value
from qtune.run.folder import RunDir, passing_folder
from qtune.run.metrics import TrainRecord, read_metrics
from qtune.run.resolved import settled_values
from qtune.timing.forecast import TimeForecast, attempted_time
from qtune.training.build import build_model, make_trainer
from qtune.training.callbacks import Metrics, StopOnSignal
from qtune.training.inputs import Inputs
from qtune.training.rehearsal import Rehearsal, rehearse

log = logging.getLogger(__name__)

TIMED_STEPS = 4
"""Steps of a timing; the first one does not count."""
TIMED_ACCUMULATION = 2
"""Micro-batches of such a step, at most: an optimizer's step costs little beside one."""


@dataclass(frozen=True)
class Batches:
    """An epoch in figures. The padding shares are of all positions: rows in random order, and grouped by length."""

    rows: int
    tokens: int
    refused: int
    """Rows that are too long to be trained on, which are in none of the other figures."""
    steps_per_epoch: int
    steps: int
    batch_size: int
    micro_batch_size: int
    padding_shuffled: float
    padding_grouped: float
    packed: bool


@dataclass(frozen=True)
class Check:
    """The whole examination; the screen and the JSON are made from it."""

    preflight: Preflight
    splits: list[SplitFigures]
    batches: Batches
    samples: list[Sample]
    time: TimeForecast | None
    """How long the run will take; None where the device's rates, or its memory, are not known."""
    step_seconds: float | None
    """Measured, where it was asked for."""
    rehearsal: Rehearsal | None = None
    """Where it was asked for."""
    ways: WaysToFit | None = None
    """What would make the step fit, where it does not."""

    @property
    def resolved(self) -> Resolved:
        """The recipe, with the findings that --allow waives."""
        return self.preflight.resolved

    @property
    def data(self) -> Data:
        """Its [data] table."""
        return self.resolved.recipe.data

    @property
    def plan(self) -> Plan:
        """What a run would do on this device."""
        return self.preflight.plan

    @property
    def prepared(self) -> Prepared:
        """The rows as ids and labels."""
        return self.preflight.prepared

    @property
    def is_empty(self) -> bool:
        """Whether there is no row to train on, which is refused; every figure of the rows would be 0."""
        return not len(self.prepared.train)

    @property
    def findings(self) -> list[Finding]:
        """What the gate found, errors first."""
        return self.preflight.inspection.findings

    @property
    def stopping(self) -> list[Finding]:
        """The findings that would stop a run."""
        return self.preflight.stopping

    @property
    def problems(self) -> list[Problem]:
        """What else would stop it; bad rows are shown apart."""
        refusals = [error for error in self.preflight.refusals if not isinstance(error, DataError)]
        return list(dict.fromkeys(problem for error in refusals for problem in error.problems))

    @property
    def disk(self) -> Disk | None:
        """What a run and its export will write."""
        return self.preflight.disk

    @property
    def memory(self) -> Forecast | str:
        """What a step will need; in words why, where that cannot be traced."""
        return self.preflight.forecast or "it was not asked for"

    @property
    def paths(self) -> str:
        """Where the relative paths of the recipe start from, where those are two places; else empty."""
        here, beside = Path.cwd(), self.resolved.folder.resolve()
        if here == beside:
            return ""
        return (
            f"Paths in [data] start from {beside}; model.base, adapter.start_from and output.directory from {here}, "
            "where qtune was called"
        )

    @property
    def values(self) -> list[tuple[str, str, str]]:
        """Each key that somebody or a rule decided: its name, value and origin."""
        settled = settled_values(self.resolved, self.plan)
        return [
            (
                ".".join(map(str, path)),
                show_value(value),
                origin.reason if origin.source == "recipe" else origin.in_words,
            )
            for path, value, origin in settled
            if origin.source != "default"
        ]

    def require(self) -> None:
        """Ends as the run would: see `Preflight.require`."""
        self.preflight.require()

    def to_json(self) -> str:
        """Everything for machines; `stops` names the findings that would stop a run, `problems` what else would."""
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
            "streaming": asdict(prepared.streaming),
            "bad_rows": [asdict(bad) for bad in prepared.bad_rows],
            "findings": [finding.to_json() for finding in self.findings],
            "stops": sorted({finding.kind for finding in self.stopping}),
            "problems": [asdict(problem) for error in self.preflight.refusals for problem in error.problems],
            "warnings": self.preflight.warnings,
            "splits": [asdict(split) for split in self.splits],
            "batches": asdict(self.batches),
            "samples": [asdict(sample) for sample in self.samples],
            "disk": None if self.disk is None else asdict(self.disk),
            "memory": {"untraced": self.memory} if isinstance(self.memory, str) else self.memory.figures(),
            "ways_to_fit": None if self.ways is None else self.ways.to_json(),
            "time": None if self.time is None else self.time.to_json(),
            "step_seconds": self.step_seconds,
            "rehearsal": None if self.rehearsal is None else asdict(self.rehearsal),
        }
        return console.json_text(value)


def check(
    resolved: Resolved,
    allow: Sequence[str] = (),
    *,
    samples: int = 3,
    timed: bool = False,
    rehearsed: bool = False,
) -> Check:
    """Examines a recipe and its data. With `timed`, the model is loaded and a few micro-batches are run; with
    `rehearsed`, all that a run will do is done once.

    Raises:
        InputError: the model or a data source cannot be found. Bad rows and findings do not raise: see `require`.
    """
    preflight = examine(resolved.allowing(allow), traced=True)
    recipe, prepared = preflight.resolved.recipe, preflight.prepared
    most = most_tokens(recipe.data)
    splits = [split_figures(split, most) for split in preflight.inspection.splits.values()]
    is_timed = timed and not preflight.refusals
    return Check(
        preflight,
        splits,
        batches_of(recipe, preflight.plan, prepared, splits[0]),
        samples_of(prepared.examples["train"], preflight.tokenizer, samples, most),
        attempted_time(recipe, preflight.forecast),
        _timed(preflight) if is_timed else None,
        _rehearsed(preflight) if rehearsed and not preflight.refusals else None,
        _ways(preflight),
    )


def _ways(preflight: Preflight) -> WaysToFit | None:
    """All remedies of a step that does not fit; None where it does, or where they cannot be traced."""
    forecast = preflight.forecast
    if not isinstance(forecast, Forecast) or forecast.fits:
        return None
    recipe = preflight.resolved.recipe
    try:
        with console.progress("tracing what would help") as bar:
            return ways_to_fit(load_geometry(recipe.model), recipe, forecast, bar.tell)
    except ModelError:
        log.debug("no remedy could be traced", exc_info=True)
        return None


def memory_alone(resolved: Resolved) -> Profile | None:
    """The step's memory where model and rows cannot be had and the sizes of the model are known all the same.

    Whatever prevents it is not raised: it would take the place of the error that is being told.
    """
    try:
        if shipped_geometry(resolved.recipe.model) is None:
            return None
        return profile(resolved, present_device())
    except InputError:
        return None
    except Exception:  # a trace runs the code of torch, transformers and peft, which fails in every way
        log.debug("the memory cannot be traced", exc_info=True)
        return None


def batches_of(recipe: Recipe, plan: Plan, prepared: Prepared, train: SplitFigures) -> Batches:
    """Steps and padding of the first epoch; of a long stream, the padding of rows spread over it.

    Rows that are too long to be trained on are counted apart; `train` are the figures of the others.
    """
    training, is_used = recipe.training, prepared.lengths <= most_tokens(recipe.data)
    lengths = prepared.lengths[is_used]
    rows, tokens, refused = len(lengths), int(lengths.sum()), len(is_used) - len(lengths)
    if prepared.stream is not None:
        rows, tokens, refused = train.examples, train.tokens, train.refused
    per_epoch = -(-rows // training.batch_size)
    shuffled = np.random.default_rng((training.seed, 0)).permutation(len(lengths))
    grouped = StepSampler(lengths, training.batch_size, training.seed).order()
    return Batches(
        rows,
        tokens,
        refused,
        per_epoch,
        # A part of an epoch is rounded up, as transformers does.
        training.steps or math.ceil(training.epochs * per_epoch),
        training.batch_size,
        plan.micro_batch_size,
        padding_share(lengths[shuffled], plan.micro_batch_size),
        padding_share(lengths[grouped], plan.micro_batch_size),
        prepared.packed,
    )


def _timed(preflight: Preflight) -> float:
    with one_sentence(
        f"A run would not fit either; qtune fit {shlex.quote(str(preflight.resolved.file))} shows what would help"
    ):
        return step_seconds(preflight)


def _rehearsed(preflight: Preflight) -> Rehearsal:
    """All that a run will do, once; in a folder beside where it will be, which is removed.

    Raises:
        OutOfMemory, TrainingError, InputError: a run would end so.
    """
    resolved, plan = preflight.resolved, preflight.plan
    inputs = Inputs(
        resolved,
        plan,
        preflight.tokenizer,
        preflight.prepared,
        preflight.forecast if isinstance(preflight.forecast, Forecast) else None,
    )
    with told(TrainingError), passing_folder(Path(resolved.recipe.output.directory)) as folder:
        run_dir, meter = RunDir(folder), Meter(torch.device(plan.device.torch_name))
        model, tiled = build_model(inputs)
        initial = kept_start(model, resolved.recipe, run_dir.checkpoints / "initial")
        metrics = Metrics(run_dir.metrics_file, lambda record: None, meter)
        stop = StopOnSignal(lambda: None)
        trainer = make_trainer(inputs, run_dir, model, tiled, metrics, stop, evaluate_first=False)
        try:
            with console.waiting("rehearsing once what a run will do"):
                return rehearse(trainer, inputs, run_dir, has_initial=initial is not None)
        finally:
            meter.close()
            inputs.prepared.close()


def step_seconds(preflight: Preflight) -> float:
    """Seconds of a step: the run's own trainer takes a few small ones, whose speed is that of the large.

    Raises:
        OutOfMemory: not even one row fits, so that a run would not either.
    """
    plan, recipe = preflight.plan, preflight.resolved.recipe
    accumulation = min(TIMED_ACCUMULATION, plan.accumulation_steps)
    changes = {
        "steps": TIMED_STEPS, "batch_size": accumulation * plan.micro_batch_size, "log_every": 1,
        "eval_every": "never", "checkpoint_every": "epoch", "checkpoint_minutes": None, "trackers": (),
    }  # fmt: skip
    short = recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})
    inputs = Inputs(
        replace(preflight.resolved, recipe=short),
        replace(plan, accumulation_steps=accumulation),
        preflight.tokenizer,
        preflight.prepared,
        preflight.forecast if isinstance(preflight.forecast, Forecast) else None,
    )
    console.say(f"timing {TIMED_STEPS} steps of {changes['batch_size']} rows")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        meter = Meter(torch.device(plan.device.torch_name))
        metrics = Metrics(run_dir.metrics_file, lambda record: None, meter, scales_loss=plan.loss_scaling)
        model, tiled = build_model(inputs)
        stop = StopOnSignal(lambda: None)
        make_trainer(inputs, run_dir, model, tiled, metrics, stop, evaluate_first=False).train()
        metrics.meter.close()
        inputs.prepared.close()
        records = read_metrics(run_dir.metrics_file)
    # The first step is slower: memory is taken and kernels are chosen.
    speeds = [record.tokens_per_second for record in records if isinstance(record, TrainRecord) and record.step > 1]
    tokens = float(preflight.prepared.lengths.mean()) * recipe.training.batch_size
    return tokens * sum(1 / speed for speed in speeds) / len(speeds)
