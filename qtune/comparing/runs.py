"""Runs -> what is compared of each: its evaluation and its forgetting, measured where they are not there yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qtune.adapter.state import STATE_FILE
from qtune.data.held_out import own_rows
from qtune.errors import InputError, Problem
from qtune.export.adapter_weights import WEIGHTS
from qtune.recipe.schema import Recipe
from qtune.run.drift import accepting_once, recipe_drifts, require_no_drift, values_of
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.identity import refuse_one_twice
from qtune.run.lock import read_lock
from qtune.run.resolved import resolved_recipe
from qtune.run.resumption import CHANGEABLE
from qtune.run.summary import summary_of
from qtune.tuned.base_once import BaseOnce
from qtune.tuned.evaluate import asked_rows, evaluate
from qtune.tuned.evaluation import ANSWER_TOKENS, Evaluation, read_evaluation
from qtune.tuned.forgetting import measure_forgetting
from qtune.tuned.forgotten import Forgetting
from qtune.tuned.task_scores import TaskScores, read_tasks

SEEDS = (("training", "seed"), ("data", "validation_seed"))
"""Of a run, and of the rows that it sets aside, which is the same where nothing else is said."""
ROWS = 100
"""That are asked of runs of which none was evaluated yet."""
ELSEWHERE = ("output",)
"""Tables of a recipe that say where a run stands and nothing of what it learns."""


@dataclass(frozen=True)
class ComparedRun:
    """One run with all that is compared of it."""

    run: str
    seed: int
    base: str
    adapter: str
    settings: dict[str, Any]
    """The resolved recipe without its seed, its output and what decides nothing of the adapter, such as how a step's
    memory was spent: runs that share it differ by chance alone."""
    parameters: int
    seconds: float
    peak_bytes: int
    device: str | None
    evaluation: Evaluation
    forgetting: Forgetting
    tasks: TaskScores | None = None
    """What benchmarks said of it, where they were asked."""
    training_loss: float | None = None
    """What its training loss was at the end; None where no step was logged."""
    ended_early: str | None = None
    """How many of its steps it took, in words, where it has ended before they were taken: "2 of 12 steps"."""


@accepting_once()
def compared_runs(
    folders: Sequence[Path],
    *,
    rows: int | None = None,
    data_file: Path | None = None,
    max_new_tokens: int | None = None,
    accepted: tuple[str, ...] = (),
) -> list[ComparedRun]:
    """What is compared of the runs, in their order. A run that was not evaluated on these rows yet is asked them now.

    rows: how many; None: as many as the one was asked that was asked most, else `ROWS`. max_new_tokens: the most that
    an answer has; None: the most of those that were asked, at least `ANSWER_TOKENS`. data_file, accepted: as
    `evaluate`'s. A larger evaluation that is kept in a run's folder stays there.

    Raises:
        RunError: one has not ended, or is not what was trained. InputError: they were asked different rows, or
            one is named twice.
    """
    opened = [RunDir.open(folder) for folder in folders]
    for run_dir in opened:  # before minutes are spent on the first
        whole_adapter(run_dir)
    refuse_one_twice(opened)
    kept = [_kept_evaluation(run_dir) if data_file is None else None for run_dir in opened]
    if rows is None:
        rows = max((evaluation.rows for evaluation in kept if evaluation is not None), default=ROWS)
    if max_new_tokens is None:
        limits = [one.max_new_tokens for one in kept if one is not None and one.max_new_tokens is not None]
        max_new_tokens = max([ANSWER_TOKENS, *limits])
    kept = [one if one is not None and _is_of(one, rows, max_new_tokens) else None for one in kept]
    _require_same_rows(opened, kept, rows, data_file, accepted)
    bases = BaseOnce()
    found = [
        _compared(run_dir, evaluation, rows, data_file, max_new_tokens, accepted, bases)
        for run_dir, evaluation in zip(opened, kept, strict=True)
    ]
    _require_same_questions(found)
    return found


def _compared(
    run_dir: RunDir,
    kept: Evaluation | None,
    rows: int,
    data_file: Path | None,
    max_new_tokens: int,
    accepted: tuple[str, ...],
    bases: BaseOnce,
) -> ComparedRun:
    recipe, summary, lock = resolved_recipe(run_dir), summary_of(run_dir), read_lock(run_dir)
    if lock is not None:
        require_no_drift(run_dir, list(recipe_drifts(lock, values_of(run_dir))), accepted)
    if kept is None:
        kept = evaluate(
            run_dir,
            rows=rows,
            data_file=data_file,
            max_new_tokens=max_new_tokens,
            accepted=accepted,
            replaces_larger=False,
            bases=bases,
        )
    return ComparedRun(
        str(run_dir.path),
        recipe.training.seed,
        recipe.model.base,
        recipe.adapter.kind,
        _settings(recipe),
        trained_parameters(run_dir),
        summary.seconds,
        summary.peak_bytes,
        lock.last_device.name if lock is not None else None,
        kept,
        measure_forgetting(run_dir, accepted=accepted, bases=bases),
        read_tasks(run_dir),
        None if summary.losses is None else summary.losses.end,
        None if summary.ended_step is None else summary.steps_taken,
    )


def _kept_evaluation(run_dir: RunDir) -> Evaluation | None:
    """The run's last evaluation, if it asked the rows that its recipe sets aside; None where it asked a file's."""
    kept = read_evaluation(run_dir)
    return kept if kept is not None and kept.source == own_rows(resolved_recipe(run_dir)) else None


def _is_of(kept: Evaluation, rows: int, max_new_tokens: int) -> bool:
    """Whether an evaluation asked this many rows for answers of as many tokens, and says of each what it was, and
    whether training saw it."""
    tells = kept.seen_unknown is not None or all(row.is_seen is not None for row in kept.row_losses)
    is_known = bool(kept.row_losses) and tells and all(row.content for row in kept.row_losses)
    is_as_long = kept.would_be_the_same(max_new_tokens)
    return is_known and is_as_long and kept.rows == min(rows, kept.rows_held_out)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides which adapter comes out, but for chance."""
    settings = recipe.model_dump(mode="json", exclude={*ELSEWHERE})
    for table, key in (*SEEDS, *CHANGEABLE):
        settings.get(str(table), {}).pop(str(key), None)
    return settings


def trained_parameters(run_dir: RunDir) -> int:
    """How many numbers were trained; of a run that keeps no state (PiSSA), how many its adapter has."""
    state = run_dir.adapter / STATE_FILE
    with safe_open(state if state.is_file() else run_dir.adapter / WEIGHTS, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  not a dict
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def _require_same_rows(
    runs: Sequence[RunDir],
    kept: Sequence[Evaluation | None],
    rows: int,
    data_file: Path | None,
    accepted: tuple[str, ...],
) -> None:
    """Rows are the same where they say the same, in whatever files they stand and whatever tokens are made of them.

    Raises:
        InputError: the runs were asked, or would be asked, different rows.
    """
    asked = [
        asked_rows(run_dir, rows=rows, data_file=data_file, accepted=accepted)
        if evaluation is None
        else [row.content for row in evaluation.row_losses]
        for run_dir, evaluation in zip(runs, kept, strict=True)
    ]
    for run_dir, found in zip(runs, asked, strict=True):
        if found != asked[0]:
            raise _other_rows(str(run_dir.path), str(runs[0].path), len(found))


def _require_same_questions(runs: Sequence[ComparedRun]) -> None:
    """Also what is taken for a row's question and its answer is the same: a template may cut them otherwise."""
    first, *others = ([(one.request, one.expected) for one in run.evaluation.comparisons] for run in runs)
    for run, found in zip(runs[1:], others, strict=True):
        if found != first:
            message = (
                f"what its {run.evaluation.rows} rows ask and expect is not what they do in {runs[0].run}: their "
                "templates take other parts of a row for the answer, or a prompt leaves one of the models no position "
                "for it; name rows that are plain and short with --data FILE"
            )
            raise InputError(Problem(run.run, message))


def _other_rows(run: str, first: str, rows: int) -> InputError:
    message = (
        f"its {rows} held-out rows are not those of {first} (a share of the training rows, if they are one, is drawn "
        "by the seed, and data.validation_seed keeps it); name the same rows for all of them, on which none was "
        "trained, with --data FILE"
    )
    return InputError(Problem(run, message))
