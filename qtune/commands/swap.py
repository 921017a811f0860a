"""`qtune swap`: rows with other words."""

from pathlib import Path
from typing import Annotated

import typer

from qtune import console
from qtune.commands.shared import RecipeArgument, SetOption, load_libraries, opened, say_set_aside

MOST_COPIES = 100


def swap(
    recipe: RecipeArgument,
    changes: SetOption = None,
    copies: Annotated[
        int, typer.Option("--copies", min=1, max=MOST_COPIES, help="How many copies there will be of each row.")
    ] = 2,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="WORD", help="A word that stays as it is, as --keep billing. Repeatable."),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option("--words", metavar="FILE", help="A text whose words come in; left out, the model's vocabulary."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the changed recipe here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files that are written.")] = False,
) -> None:
    """Add rows with other words, for answers that copy from their requests: the model learns to copy, not the names.

    Where request and answer share a word, a name or a place, both get another one. The copies, and the rows they are
    made of, come into a file beside the new recipe, NAME.swapped.toml; rows without such a word, and those that are
    held out, come into files of their own, without copies. Not for answers that judge or know: a label that stands in
    its request is no name (--keep).
    """
    from qtune.at_once import require_row_files
    from qtune.data.swap_files import require_swappable, words_of_text
    from qtune.recipe.shipped import written_beside

    resolved = opened(recipe, "swap", changes)
    target = output or written_beside(resolved.file, ".swapped.toml")
    require_row_files(resolved.recipe.data, resolved.folder)
    require_swappable(resolved, target, force=force)
    given = None if words is None else words_of_text(words)
    say_set_aside(resolved)
    load_libraries()
    from qtune import swap as stage
    from qtune.init import NEXT
    from qtune.screens.commands import commands_text
    from qtune.screens.swap import draw_examples

    made = stage.swap(resolved, target, copies, given, keep or ())
    for sentence in stage.said_of(made, resolved):
        console.say(sentence)
    console.say(draw_examples(made.examples))
    console.out(f"{target}")
    console.say(commands_text([(["qtune", verb, str(target)], does) for verb, does in NEXT]))
