"""Options and sentences that several verbs have."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtune import console
from qtune.startup.imports import import_libraries
from qtune.startup.interrupts import nothing_to_keep
from qtune.startup.launched import launched

if TYPE_CHECKING:
    from qtune.recipe.file import Resolved
    from qtune.run.folder import RunDir

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that comes with qtune: quickstart.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, as training.epochs=2. Repeatable."),
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="FINDING",
        help="Do not count this finding of the gate as an error, as --allow too-long. Repeatable.",
    ),
]


def _accepting(last: str, example: str) -> Any:
    """--accept-drift of a verb; its help names what that verb compares (`run.drift`, for which help need not wait)."""
    named = f"weights, config, generation, tokenizer, code, template, {last}, as --accept-drift {example}"
    said = f"Go on although this is not what the run was trained with: {named}. Repeatable."
    return typer.Option("--accept-drift", metavar="NAME", help=said)


AcceptOption = Annotated[list[str] | None, _accepting("rows, recipe, versions or processor", "rows")]
AcceptUsingOption = Annotated[list[str] | None, _accepting("recipe, versions or processor", "versions")]
"""Of verbs that compare no rows."""
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Agree that the Python code that comes with the model runs here; remembered for this code.",
    ),
]

MOST_TOKENS = 16_777_216
"""As data.max_length."""
MOST_ROWS = 1_000_000
MOST_PROCESSES = 64
"""Of one computer: more cards than any has."""


def no_more_than(most: float) -> Callable[[float | None], float | None]:
    """A callback of an option that refuses more than its largest value, and what is no number, which a range lets pass.

    Help shows a range in full, and many digits in it take the room of the options' names.
    """

    def checked(value: float | None) -> float | None:
        if value is not None and value != value:
            raise typer.BadParameter("nan is not a number")
        if value is not None and value > most:
            raise typer.BadParameter(f"should be at most {most:,}")
        return value

    return checked


def load_libraries() -> None:
    """Imports what computes: seconds, and nothing else can be said in them.

    Raises:
        LibraryError: one of the libraries cannot be imported.
    """
    with nothing_to_keep():
        import_libraries(console.waiting)


def opened(
    recipe: str,
    verb: str,
    changes: Sequence[str] | None = None,
    *,
    need_rows: bool = True,
    need_start: bool = True,
) -> "Resolved":
    """The recipe that a verb was given, whose lines its errors name from here on.

    Raises:
        RecipeError: there is none, or it is wrong: said before seconds of imports.
    """
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe

    file = find_recipe(recipe, verb)
    return is_given(load_recipe(file, changes or (), need_rows=need_rows, need_start=need_start))


def agree(of: "RunDir | Resolved") -> None:
    """Remembers consent to the code that comes with the model of a run or a recipe."""
    from qtune.model.local import base_folder
    from qtune.model.trust import grant_for
    from qtune.run.folder import RunDir
    from qtune.run.resolved import resolved_recipe

    model = (resolved_recipe(of) if isinstance(of, RunDir) else of.recipe).model
    grant_for(base_folder(model), model.revision)


def say_next(resolved: "Resolved") -> None:
    """What a new run will be called, where that is not what the recipe says."""
    from qtune.run.listing import said_of_next

    if launched().is_leader:
        for sentence in said_of_next(Path(resolved.recipe.output.directory), resolved.run_name):
            console.say(sentence)


def say_set_aside(resolved: "Resolved") -> None:
    """What a recipe says and --set has put something else in the place of, a sentence each."""
    for sentence in resolved.set_aside:
        console.say(sentence)


def say_drifts(run_dir: "RunDir") -> None:
    """Who works in a run at this moment, and what is not any more what it was trained with."""
    from qtune.run.drift import said_of
    from qtune.run.owner import owner_of

    if (owner := owner_of(run_dir)) is not None:
        console.say(f"{run_dir.path} belongs to {owner}: what is shown is what it has written so far")
    for said in said_of(run_dir):
        console.say(f"{run_dir.path}: {said}")


def require_one_card(gpu: str | None, vram: str | None) -> None:
    """--gpu or --vram, or neither, and a card that is known.

    Raises:
        typer.BadParameter, InputError: both, or one that is not known.
    """
    from qtune.device.cards import require_known

    if gpu is not None and vram is not None:
        raise typer.BadParameter("--gpu and --vram name two cards; give one of them")
    require_known(gpu, vram)


def options_given(context: typer.Context) -> frozenset[str]:
    """The options that were written on the command line, by their names; a switch by the side that was chosen."""
    options: set[str] = set()
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        source = context.get_parameter_source(name)
        if option.param_type_name == "option" and source is not None and source.name == "COMMANDLINE":
            written = option.secondary_opts if value is False and option.secondary_opts else option.opts
            options |= {written[0], f"{written[0]} {value}"}
    return frozenset(options)
