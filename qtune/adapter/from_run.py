"""An adapter that starts as an earlier run's: a LoRA, a soft prompt with its encoder, a prefix, or IA3 scales."""

from pathlib import Path

from peft import PeftModel

from qtune.adapter.state import load_trained_state
from qtune.errors import Problem, RunError
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe

# What may differ between the two runs: everything else decides what the saved tensors mean.
FREE = {"start_from", "initialization", "text", "dropout", "encoder_dropout", "dtype"}


def start_from(model: PeftModel, recipe: Recipe) -> None:
    """Puts the adapter that the recipe names into a model with a fresh one attached; nothing to do where it names none.

    Raises:
        RunError: that run has not ended, or its base model or adapter differs from the recipe's.
    """
    if recipe.adapter.start_from is None:
        return
    run = RunDir.open(Path(recipe.adapter.start_from).expanduser())
    folder = run.finished_adapter()
    earlier = resolved_recipe(run)
    problems = []
    if earlier.model.base != recipe.model.base:
        problems.append(f"was trained on {earlier.model.base}, not on {recipe.model.base}")
    before, now = (one.adapter.model_dump(exclude=FREE) for one in (earlier, recipe))
    problems += [
        f"adapter.{key} = {before.get(key)!r} there, {now.get(key)!r} in the recipe"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if problems:
        raise RunError([Problem(str(run.path), problem) for problem in problems])
    load_trained_state(model, folder)
