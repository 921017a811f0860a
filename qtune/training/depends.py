"""What a run depends on, as its lock has it: noted when it begins, compared and noted again when it goes on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qtune import console
from qtune.data.template import choose_template
from qtune.errors import InputError, RunError
from qtune.model.contents import Contents
from qtune.model.load import checksums_loaded, load_config, load_tokenizer
from qtune.model.local import base_folder
from qtune.records import run_id_in
from qtune.run.drift import (
    BASE,
    Drift,
    contents_here,
    locked_sources,
    require_no_drift,
    require_same_base,
    resume_drifts,
    said_of_an_old_lock,
    values_of,
)
from qtune.run.folder import RunDir
from qtune.run.history import identity_to_begin_with
from qtune.run.lock import Lock, lock_of, read_lock, recipe_values, write_lock
from qtune.run.resolved import recipe_of_text, resolved_recipe, resolved_text, written_text
from qtune.training.inputs import Inputs


def base_now(inputs: Inputs, *, whole: bool = False) -> Contents:
    """What the base's files hold, whose weights are loaded; `whole` hashes every byte of them."""
    recipe = inputs.recipe
    checksums = checksums_loaded(recipe.model, recipe.quantization, inputs.plan)
    return contents_here(recipe.model, inputs.tokenizer, whole=whole, checksums=checksums)


def lock_now(inputs: Inputs, run_dir: RunDir, base: Contents, text: str | None = None) -> Lock:
    """What the run depends on, as it is here and now.

    base: what its files hold (`base_now`). text: of a resolved.toml that is about to be written, else the one that is
    there.
    """
    model = inputs.recipe.model
    if text is None:
        text = written_text(run_dir)
    written = recipe_of_text(text)
    return lock_of(
        inputs.recipe,
        inputs.plan,
        base_folder(model),
        getattr(load_config(model), "_commit_hash", None),
        inputs.prepared,
        locked_sources(written, run_dir.path, ("train", "validation", "test")),
        base,
        recipe_values(text),
    )


def begin_lock(inputs: Inputs, run_dir: RunDir, base: Contents) -> None:
    """Writes the lock of a run that has none: what it begins with, and who it is. base: as in `lock_now`."""
    run_id, ancestors = identity_to_begin_with(run_dir)
    lock = lock_now(inputs, run_dir, base)
    if not _is_of(run_dir.memory_file, run_id):  # but of an attempt that ended before there was an identity
        run_dir.memory_file.unlink(missing_ok=True)
    write_lock(run_dir, replace(lock, run_id=run_id, ancestors=ancestors))


def _is_of(record: Path, run_id: str | None) -> bool:
    """Whether a record says that it is of this run; also of one that cannot be read, which is for its reader to say."""
    try:
        return run_id_in(record) == run_id
    except RunError:
        return True


def blame_drift(run_dir: RunDir, accepted: Sequence[str]) -> None:
    """Whoever cannot go on is told first what changed under the run: the rest may follow from it.

    Raises:
        RunError: something is not what it was, and that was not accepted.
    """
    try:
        recipe = resolved_recipe(run_dir)
        tokenizer = load_tokenizer(recipe.model)
        template = choose_template(recipe.data.chat_template, tokenizer, run_dir.path).text
    except InputError:
        return
    require_same_base(run_dir, recipe, tokenizer, template, accepted, kinds=(*BASE, "recipe"))


def require_unchanged(inputs: Inputs, run_dir: RunDir, accepted: Sequence[str], base: Contents) -> list[Drift]:
    """Compares what the run depends on with its lock; the drifts that were accepted. base: as in `lock_now`.

    Raises:
        RunError: something is not what it was, and that was not accepted.
    """
    begun, written = read_lock(run_dir), resolved_recipe(run_dir)
    if begun is None:
        return []
    now = lock_now(inputs, run_dir, base)
    parts = locked_sources(written, run_dir.path, ("validation", "test"))
    drifts = list(resume_drifts(begun, now, values_of(run_dir), parts))
    require_no_drift(run_dir, drifts, accepted)
    return drifts


def go_on_with(
    inputs: Inputs, run_dir: RunDir, step: int, accepted: Sequence[str], base: Contents, *, is_changed: bool
) -> None:
    """Compares what the run depends on with its lock, and adds to that what it goes on with; its beginning stays.

    step: the one that it goes on after. base: as in `lock_now`. is_changed: whether the recipe of `inputs` is another
    than resolved.toml's, which is then written.

    Raises:
        RunError: something is not what it was, and that was not accepted.
    """
    begun = read_lock(run_dir)
    drifts = require_unchanged(inputs, run_dir, accepted, base)
    text = resolved_text(inputs.resolved, inputs.plan) if is_changed else None
    if begun is not None:
        if (said := said_of_an_old_lock(begun)) is not None:
            console.say(f"{run_dir.path}: {said}")
        if base.is_whole and not begun.knows_whole_weights:
            console.say(f"{run_dir.path}: its lock.json has no hash of the whole weights to compare with; now it has")
        now = lock_now(inputs, run_dir, base, text)
        # The lock comes first: whoever is killed between the two finds values that the lock knows.
        write_lock(run_dir, begun.resumed_as(now, step, tuple(dict.fromkeys(drift.kind for drift in drifts))))
    elif step:
        console.say(f"{run_dir.path} has no lock.json: what it began with cannot be compared")
    if text is not None:
        run_dir.write_text(run_dir.resolved_file, text)
