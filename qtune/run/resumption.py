"""A stopped run's recipe, with the few values that may change before it goes on: never what is learned."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtune.errors import Problem, RecipeError
from qtune.recipe.file import Origin, Resolved, leaves, load_recipe
from qtune.recipe.schema import KeyPath
from qtune.run.folder import RunDir
from qtune.run.resolved import written_origins

BUDGET, MICRO_BATCH = ("memory", "budget"), ("training", "micro_batch_size")

CHANGEABLE: tuple[KeyPath, ...] = (
    # How a step's memory is spent: the gradient is the same, but for the order in which it is summed.
    MICRO_BATCH,
    ("training", "gradient_checkpointing"),
    BUDGET,
    ("memory", "embeddings"),
    ("memory", "activations"),
    ("memory", "loss_tile"),
    # When something is measured, said or saved between two steps.
    ("training", "log_every"),
    ("training", "eval_every"),
    ("training", "checkpoint_every"),
    ("training", "checkpoint_minutes"),
    ("training", "keep_checkpoints"),
    ("training", "trackers"),
    # What the gate lets through (the rows themselves must be the same), and what an export writes afterwards.
    ("data", "allow"),
    ("output", "gguf"),
)
"""Keys that do not decide which adapter comes out. Every other one does: the optimizer's state and the schedule of the
learning rate are in the checkpoint, and rows, weights and the adapter are what they were made for."""


def resumed_recipe(run_dir: RunDir, changes: Sequence[str] = ()) -> Resolved:
    """What was decided when the run began (resolved.toml), changed by `--set` texts; origins as they were written.

    A budget that changes lets the micro-batch follow from memory again, if it did so before.

    Raises:
        RecipeError: a change is wrong, or would make another run.
    """
    before = load_recipe(run_dir.resolved_file)
    if not changes:
        return before
    after = load_recipe(run_dir.resolved_file, changes)
    old, new = dict(leaves(before.recipe)), dict(leaves(after.recipe))
    changed = [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]
    kinds = {path[0] for path in changed if path[1] == "kind"}  # another kind has other keys: it alone is named
    refused = [path for path in changed if path not in CHANGEABLE and (path[0] not in kinds or path[1] == "kind")]
    if refused:
        raise RecipeError([_refusal(path, new, run_dir) for path in refused])
    written = written_origins(run_dir.resolved_file.read_text(encoding="utf-8"))
    origins = {path: written.get(path, Origin("default")) for path in new}
    if BUDGET in changed and MICRO_BATCH not in changed and origins[MICRO_BATCH].source == "rule":
        training = after.recipe.training.model_copy(update={"micro_batch_size": "auto"})
        after = replace(after, recipe=after.recipe.model_copy(update={"training": training}))
    return replace(after, origins=origins | dict.fromkeys(changed, Origin("--set", "on resuming")))


def _refusal(path: KeyPath, values: Mapping[KeyPath, Any], run_dir: RunDir) -> Problem:
    key = ".".join(map(str, path))
    may = ", ".join(".".join(map(str, one)) for one in CHANGEABLE)
    place = f"--set {key}" if path in values else key
    message = (
        f"decides what is learned, so the rest would not be the same run; start a new one with: qtune run "
        f"{run_dir.resolved_file} --set output.name={run_dir.path.name} --set {key}=… (on resuming these may change: "
        f"{may})"
    )
    return Problem(place, message)
