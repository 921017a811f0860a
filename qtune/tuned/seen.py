"""Which rows' prompts training has seen: that of a run, and that of every run whose adapter it started from."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import DOCUMENT, Conversation, RowError
from qtune.data.order import with_system
from qtune.data.prepare import Prepared, prepare
from qtune.data.prompts import prompt_hash
from qtune.errors import InputError, Problem, RunError, first_line
from qtune.recipe.schema import Recipe
from qtune.run.drift import locked_sources, source_drifts
from qtune.run.folder import RunDir
from qtune.run.lock import Lock, read_lock
from qtune.run.resolved import as_written, resolved_recipe


@dataclass(frozen=True)
class SeenRows:
    """What is known of some rows.

    by_training: whether a row's prompt stands in rows that were trained on, [rows]. unknown: why there may be more, for
    what some training saw cannot be read now; None where all of it was.
    """

    by_training: np.ndarray
    unknown: str | None = None

    @property
    def flags(self) -> list[bool | None]:
        """Of each row: seen, not seen, or None where that is not known."""
        return [True if one else False if self.unknown is None else None for one in self.by_training.tolist()]

    @property
    def count(self) -> int | None:
        """How many of them training saw, as far as is known; None where nothing is."""
        count = int(self.by_training.sum())
        return count if count or self.unknown is None else None


def seen_rows(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    run_dir: RunDir | None = None,
    is_share: bool = False,
) -> SeenRows:
    """Which of some examples' prompts the training of a recipe saw, or that of a run in the chain it started from.

    recipe, folder: as they were written, and what its paths start from. run_dir: where its lock says which rows it was
    trained on. is_share: the rows are a share of the training rows that was set aside, as these are now. It is drawn so
    that hardly a prompt of it is among those that are left: the first ones of talks may be, where most begin alike.
    """
    prompts = prompts_in(rows)
    found, unknown = np.zeros(len(rows), bool), list[str]()
    try:
        found |= _seen_by(recipe, folder, tokenizer, [prompts], None if is_share else run_dir)
    except InputError as error:
        unknown.append(f"the training rows cannot be read as they were ({first_line(error)})")
    known, start_from = {None if run_dir is None else run_dir.path.resolve()}, recipe.adapter.start_from
    while start_from is not None:
        path = Path(start_from).expanduser()
        if path.resolve() in known:
            break
        known.add(path.resolve())
        try:
            earlier = RunDir.open(path)
            recipe, folder = as_written(earlier, resolved_recipe(earlier))
        except InputError as error:
            unknown.append(f"the run that it started from cannot be read ({first_line(error)})")
            break
        try:
            as_there = [prompts, *_prompts_with_system_of(recipe, rows)]
            found |= _seen_by(recipe, folder, tokenizer, as_there, earlier)
        except InputError as error:
            said = f"the training rows of {earlier.path}, from which it started, cannot be read as they were"
            unknown.append(f"{said} ({first_line(error)})")
        start_from = recipe.adapter.start_from
    return SeenRows(found, "; ".join(unknown) or None)


def _seen_by(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    run_dir: RunDir | None,
) -> np.ndarray:
    """Which rows have one of their prompts in the training rows of a recipe, [rows].

    prompts: hashes [rows] of each way in which the rows may have been written.

    Raises:
        InputError: the training rows cannot be read, or are no longer what the run was trained on.
    """
    if run_dir is not None:
        _require_rows_as_they_were(run_dir)
    data = recipe.data.model_copy(update={"test": None, "packing": False})
    prepared = prepare(data, tokenizer, folder, seed=recipe.training.seed)
    return np.any([stand_in_training(prepared, hashes) for hashes in prompts], axis=0)


def stand_in_training(prepared: Prepared, prompts: np.ndarray) -> np.ndarray:
    """Which of some prompts, by their hashes, stand in the training rows: [prompts]."""
    if prepared.stream is not None:
        return prepared.stream.has_prompts(prompts)
    return np.isin(prompts, prompts_in(prepared.examples["train"]))


def _require_rows_as_they_were(run_dir: RunDir) -> None:
    """Raises a RunError where the files of a run's training rows are not those of its lock, in any of its parts."""
    lock = read_lock(run_dir)
    if lock is None:
        return
    now = locked_sources(resolved_recipe(run_dir), run_dir.path, ("train",))
    for part in (lock.data, *(part.data for part in lock.resumed)):
        for drift in source_drifts(Lock(data=part), now):
            raise RunError(Problem("", drift.message))


def prompts_in(rows: Dataset) -> np.ndarray:
    """The hashes of some examples' prompts: [rows]."""
    return np.asarray(rows.with_format("numpy")["prompt_hash"][:])


def _prompts_with_system_of(recipe: Recipe, rows: Dataset) -> list[np.ndarray]:
    """The rows' prompts as another recipe would have written them, which may have a system message of its own: [rows]
    without any system message, and with that recipe's."""
    talks = [Conversation.from_json(text) for text in rows["conversation"]]
    bare = [[message for message in talk.messages if message["role"] != "system"] for talk in talks]
    return [
        np.array([_hash_of(messages, policy, prompt) for messages in bare], dtype=np.int64)
        for policy, prompt in (("keep", None), (recipe.data.system, recipe.data.system_prompt))
    ]


def _hash_of(messages: list[dict[str, Any]], policy: str, prompt: str | None) -> int:
    """As the column prompt_hash; where the policy cannot be followed, that of the messages as they are."""
    if messages[0]["role"] != DOCUMENT:
        with contextlib.suppress(RowError):
            messages = with_system(messages, policy, prompt)
    return prompt_hash(Conversation(tuple(messages)))
