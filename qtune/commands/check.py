"""`qtune check`: everything that would spoil a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from qtune import console
from qtune.commands.shared import (
    MOST_ROWS,
    AllowOption,
    RecipeArgument,
    SetOption,
    TrustOption,
    agree,
    load_libraries,
    opened,
    say_next,
    say_set_aside,
)
from qtune.errors import InputError


def check(
    recipe: RecipeArgument,
    changes: SetOption = None,
    allow: AllowOption = None,
    rows: Annotated[
        int,
        typer.Option("--rows", "--show", min=0, max=MOST_ROWS, help="How many rows to show as the model sees them."),
    ] = 3,
    timed: Annotated[bool, typer.Option("--time", help="Load the model and measure how long a step takes.")] = False,
    rehearsed: Annotated[
        bool,
        typer.Option("--rehearse", help="Do once all that a run will do: step, evaluation, checkpoint, answer."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust: TrustOption = False,
) -> None:
    """Look for everything that would spoil a run: rows, template, labels, lengths, memory, disk. Nothing is trained.

    The same gate opens every `qtune run`. Exit code 1: labels would train the wrong thing; 2: rows cannot be used.
    """
    from qtune.at_once import require_at_once

    with _with_memory(recipe, changes, as_json=as_json):
        resolved = opened(recipe, "check", changes)
    require_at_once(resolved)
    say_set_aside(resolved)
    say_next(resolved)
    with _with_memory(recipe, changes, as_json=as_json):
        load_libraries()
        from qtune import check as stage
        from qtune.screens.check import draw_check

        if trust:
            agree(resolved)
        result = stage.check(resolved, allow or (), samples=rows, timed=timed, rehearsed=rehearsed)
    if as_json:
        console.out_raw(result.to_json())
    else:
        console.out(draw_check(result))
    result.require()


@contextmanager
def _with_memory(recipe: str, changes: list[str] | None, *, as_json: bool) -> Iterator[None]:
    """Where model or rows cannot be had, what is known all the same is said, and then what is wrong."""
    try:
        yield
    except InputError:
        if not as_json:
            _show_memory_alone(recipe, changes)
        raise


def _show_memory_alone(recipe: str, changes: list[str] | None) -> None:
    """Shows the step's memory where the recipe is right and its rows or its model are what cannot be had."""
    try:
        resolved = opened(recipe, "check", changes, need_rows=False)
    except InputError:
        return
    load_libraries()
    from qtune.check import memory_alone
    from qtune.screens.answer import draw_answer
    from qtune.screens.memory import draw_forecast

    known = memory_alone(resolved)
    if known is not None:
        console.out(draw_answer(known, None, is_timed=False))
        console.out("")
        console.out(draw_forecast(known, []))
