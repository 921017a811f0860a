"""An adapter that starts as an earlier run's: a LoRA, a soft prompt with its encoder, a prefix, or IA3 scales."""

from pathlib import Path

from qtune.errors import Problem, RunError
from qtune.recipe.schema import Recipe
from qtune.run.checkpoints import TRAINED_STATE
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe

# What may differ between the two runs: everything else decides what the saved tensors mean.
FREE = {"start_from", "initialization", "text", "dropout", "encoder_dropout", "dtype"}


def earlier_adapter(recipe: Recipe) -> Path | None:
    """The folder of the adapter that the recipe's starts as; None where it names no run.

    Raises:
        RunError: that run has not ended, or its base model or adapter differs from the recipe's.
    """
    if recipe.adapter.start_from is None:
        return None
    run = RunDir.open(Path(recipe.adapter.start_from).expanduser())
    folder = whole_adapter(run)
    earlier = resolved_recipe(run)
    problems = []
    if _place(earlier.model.base) != _place(recipe.model.base):
        problems.append(f"was trained on {earlier.model.base}, not on {recipe.model.base}")
    before, now = (one.adapter.model_dump(exclude=FREE) for one in (earlier, recipe))
    if before["kind"] != now["kind"]:  # another kind has other keys: it alone is named
        before, now = {"kind": before["kind"]}, {"kind": now["kind"]}
    problems += [
        f"adapter.{key} = {before.get(key)!r} there, {now.get(key)!r} in the recipe"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if not (folder / TRAINED_STATE).is_file():
        problems.append("keeps no trained state to start from, as a run with PiSSA does, whose base was rewritten")
    if problems:
        raise RunError([Problem(str(run.path), problem) for problem in problems])
    return folder


def _place(base: str) -> str:
    """A folder or file as one name, however it is written; a run has written it from the root."""
    path = Path(base).expanduser()
    return str(path.resolve()) if path.exists() else base
