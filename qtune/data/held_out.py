"""The rows that nothing was trained on, and an even choice of them."""

import itertools
from collections.abc import Callable, Hashable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.prepare import prepare
from qtune.errors import DataError, Problem
from qtune.recipe.schema import Recipe


def held_out_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, data_file: Path | None = None
) -> tuple[str, Dataset]:
    """The source in words, and its rows: the file, else the recipe's test rows, else its validation rows.

    folder: what relative paths of the recipe start from.

    Raises:
        DataError: the recipe sets no rows aside, or they cannot be read.
    """
    data = recipe.data
    given = str(data_file.resolve()) if data_file else data.test if data.test is not None else data.validation
    if not isinstance(given, float):
        # Only these rows are read; the training rows may be gone by now.
        alone = data.model_copy(
            update={"train": given, "validation": 0.0, "test": None, "packing": False, "streaming": False}
        )
        name = str(data_file) if data_file else own_rows(recipe)
        split = "test" if data_file or data.test is not None else "validation"
        return name, prepare(alone, tokenizer, folder, split=split).examples["train"]
    prepared = prepare(data, tokenizer, folder, seed=recipe.training.seed)
    if prepared.held_out is None:
        raise DataError(Problem("data.validation", "the recipe sets no rows aside; name some with --data FILE"))
    return own_rows(recipe), prepared.examples[prepared.held_out]


def own_rows(recipe: Recipe) -> str:
    """What the rows that a recipe itself sets aside are called, in words."""
    return "test rows" if recipe.data.test is not None else "validation rows"


def spread(available: int, wanted: int) -> list[int]:
    """`wanted` row numbers spread evenly over all of them, in order."""
    count = min(available, wanted)
    return [number * available // count for number in range(count)]


def spread_unlike(available: int, wanted: int, content: Callable[[int], Hashable]) -> list[int]:
    """As `spread`, of rows with different contents: for one that says what an earlier one says the next that does not.
    Fewer than `wanted` where there are no more."""
    found: dict[Hashable, int] = {}
    for row in spread(available, wanted):
        for other in itertools.chain(range(row, available), range(row)):
            if (own := content(other)) not in found:
                found[own] = other
                break
    return sorted(found.values())
