"""Training rows as the model sees them: every token of the rendered conversation, those that are scored told apart."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.prepare import Prepared, prepare
from qtune.data.samples import by_length, example_of, is_scored, pieces_of
from qtune.model.load import load_tokenizer
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.run.lock import rows_hash
from qtune.run.resolved import read_resolved
from qtune.run.shown_rows import RowPiece, ShownRow, ShownRows


def shown_rows(prepared: Prepared, recipe: Recipe, *, changed: bool = False) -> ShownRows:
    """A few rows of a run: the first, one of middle length, the longest, and one that is held out for validation."""
    validation = prepared.examples.get("validation")
    return ShownRows(
        tuple(_chosen(prepared, prepared.tokenizer)),
        len(prepared.examples["train"]),
        0 if validation is None else len(validation),
        recipe.adapter.prompt_length,
        prepared.template.origin,
        changed,
    )


def rows_of(run_dir: RunDir, trained_on: str | None = None) -> ShownRows:
    """`shown_rows` of a run that has kept none, from its files as they are now.

    `trained_on` is the run's hash of its training rows (`lock.rows_hash`).

    Raises:
        InputError: the rows or the tokenizer are no longer where the run found them.
    """
    resolved = read_resolved(run_dir)
    recipe = resolved.recipe
    prepared = prepare(recipe.data, load_tokenizer(recipe.model), resolved.folder, seed=recipe.training.seed)
    return shown_rows(prepared, recipe, changed=trained_on is not None and rows_hash(prepared) != trained_on)


def _chosen(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Iterator[ShownRow]:
    train = prepared.examples["train"]
    order = by_length(train)
    wanted = {"first row": 0, "middle length": int(order[len(order) // 2]), "longest": int(order[-1])}
    seen = set()
    for title, number in wanted.items():
        if number not in seen:
            seen.add(number)
            yield _shown_row(title, example_of(train, number), tokenizer)
    if "validation" in prepared.examples:
        yield _shown_row("held out for validation", prepared.examples["validation"][0], tokenizer)


def _shown_row(title: str, example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> ShownRow:
    ids, scored = example["input_ids"], is_scored(example)
    pieces = tuple(RowPiece(text, counts) for text, counts in pieces_of(ids, scored, tokenizer))
    return ShownRow(title, example["place"], len(ids), sum(scored), pieces)
