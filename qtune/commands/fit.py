"""`qtune fit`: a recipe changed until it fits a card."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtune import console
from qtune.commands.shared import (
    RecipeArgument,
    SetOption,
    TrustOption,
    agree,
    load_libraries,
    opened,
    require_one_card,
    say_set_aside,
)

if TYPE_CHECKING:
    from qtune.memory.fit import Fitted
    from qtune.recipe.schema import Recipe


def fit(
    recipe: RecipeArgument,
    changes: SetOption = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="CARD", help='A card by name, as "RTX 3060".')] = None,
    vram: Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="Memory to fit into, as 8GiB.")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="KEY", help="Also change this, as --allow length. Repeatable."),
    ] = None,
    largest: Annotated[
        Literal["length", "batch"] | None,
        typer.Option("--max", metavar="WHAT", help="Only say the largest length or batch that fits."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the changed recipe here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
    trust: TrustOption = False,
) -> None:
    """Change a recipe until it fits a card, the least painful changes first, each one traced.

    The effective batch never changes, and rows get shorter only with --allow length. The new recipe keeps its comments;
    without --output it goes beside the old one as NAME.fit.toml. Exit code 1: nothing fits; the smallest budget that
    would is named. Without --gpu or --vram it is fitted to the card that is here.
    """
    from qtune.at_once import require_base
    from qtune.recipe.shipped import written_beside
    from qtune.whole import place_taken

    require_one_card(gpu, vram)
    others = {"--output": output is not None, "--allow": bool(allow), "--force": force}
    if unknown := set(allow or ()) - {"length"}:
        raise typer.BadParameter(f"--allow {', '.join(sorted(unknown))}: only length can be allowed, as --allow length")
    if largest is not None and (ignored := [option for option, is_given in others.items() if is_given]):
        raise typer.BadParameter(f"{', '.join(ignored)}: --max only says a value, and changes and writes nothing")
    resolved = opened(recipe, "fit", changes, need_rows=False)
    require_base(resolved.recipe)
    say_set_aside(resolved)
    target = output or written_beside(resolved.file, ".fit.toml")
    if largest is None and (taken := place_taken(target, force=force)) is not None:
        raise typer.BadParameter(f"{target} {taken}")
    load_libraries()
    from qtune.memory import fit as stage
    from qtune.startup.quiet import quiet_loading
    from qtune.whole import write_text

    quiet_loading()
    if trust:
        agree(resolved)
    if largest is not None:
        with console.progress("tracing") as bar:
            found = stage.largest_value(resolved.recipe, gpu, vram, largest, bar.tell)
        if as_json:
            console.out_json(asdict(found))
        else:
            console.out(found.text)
        if not found.value:
            raise typer.Exit(1)
        return
    with console.progress("tracing") as bar:
        fitted = stage.fit_recipe(resolved, gpu, vram, allow_length=bool(allow), tell=bar.tell)
    _show_fitted(resolved.recipe, fitted, length_is_allowed=bool(allow), as_json=as_json)
    if not fitted.fits:
        raise typer.Exit(1)
    if fitted.changes or output is not None:
        write_text(target, stage.fitted_text(resolved, fitted, target))
        console.say(f"written: {target}{'' if fitted.changes else ', unchanged'}")
    else:
        console.say("nothing to change, so nothing is written")


def _show_fitted(recipe: "Recipe", fitted: "Fitted", *, length_is_allowed: bool, as_json: bool) -> None:
    """Shows how a search ended: the changes, the time of a step before and after them, what a run would refuse."""
    from qtune.model.geometry import load_geometry
    from qtune.model.load import attention_rule
    from qtune.plan import make_plan
    from qtune.preflight import foreseen
    from qtune.recipe.parse import changed
    from qtune.screens.memory import draw_fit, refusals_text
    from qtune.screens.time import draw_steps
    from qtune.timing.forecast import step_of

    if not as_json:
        console.out(draw_fit(fitted, recipe, length_is_allowed=length_is_allowed))
    config, ended = load_geometry(recipe.model), changed(recipe, fitted.changes)
    asked = make_plan(recipe, fitted.plan.device, attention_rule(config), fitted.rows.longest.most)
    steps = [step_of(config, recipe, asked, fitted.rows.longest)]
    steps += [step_of(config, ended, fitted.plan, fitted.longest)] if fitted.changes else []
    refusals = foreseen(ended, config, fitted.plan)
    if as_json:
        before, after = (None if step is None else step.seconds for step in (steps[0], steps[-1]))
        took = {"step_seconds_as_asked": before, "step_seconds": after}
        console.out_json({**fitted.to_json(), **took, "problems": [asdict(problem) for problem in refusals]})
        return
    console.out(draw_steps(steps))
    if refusals:
        console.out(refusals_text(refusals))
