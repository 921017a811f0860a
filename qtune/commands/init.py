"""`qtune init`: a commented recipe for a model and its rows."""

from pathlib import Path
from typing import Annotated

import typer

from qtune import console


def init(
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Hub id, folder, GGUF file or built-in model.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Training rows: a file, folder or hub:owner/name.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="KIND",
            help="lora (default), p-tuning, prompt-tuning, prefix-tuning or ia3, as --adapter p-tuning.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="Copy a shipped recipe; --base and --data change it."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path(
        "recipe.toml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the recipes that come with qtune.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors that know TOML.")
    ] = False,
) -> None:
    """Write a commented recipe for a model and a data file.

    It holds the keys worth a first look, each explained. `qtune init --from quickstart` copies one that works as it is.
    """
    from qtune import init as stage
    from qtune.screens.commands import commands_text

    if schema:
        console.out_json(stage.recipe_schema())
        return
    if listed:
        console.out(console.table("", ["name", "what it trains"], stage.shipped_summaries()))
        return
    if source is not None and adapter is not None:
        raise typer.BadParameter("--adapter is for a new recipe; one that is copied with --from has its own")
    if source is None and not (base and data):
        raise typer.BadParameter("name a model with --base and rows with --data, or a recipe with --from (see --list)")
    stage.require_place(output, force=force)
    look = stage.look_at(data) if data else None
    if source is not None:
        text = stage.copied_recipe(source, output, base=base, data=data, look=look)
    else:
        text = stage.new_recipe(str(base), str(data), adapter or "lora", output, look)
    stage.write_recipe(text, output, force=force)
    console.out(f"{output}")
    if look is not None:
        asked = look, str(data), output
        for sentence in (*stage.said_of_shape(*asked), *stage.said_of_rows(*asked), *stage.said_of_steps(*asked)):
            console.say(sentence)
    steps = stage.NEXT if look is None or look.usable else stage.NEXT[:1]
    console.say(commands_text([(["qtune", verb, str(output)], does) for verb, does in steps]))
