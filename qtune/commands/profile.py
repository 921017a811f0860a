"""`qtune profile`: memory and time, of a recipe predicted, of a run measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtune import console
from qtune.commands.shared import (
    MOST_PROCESSES,
    MOST_TOKENS,
    SetOption,
    TrustOption,
    agree,
    load_libraries,
    no_more_than,
    opened,
    require_one_card,
    say_drifts,
    say_set_aside,
)

if TYPE_CHECKING:
    from qtune.memory.predict import Prediction
    from qtune.memory.profile import Profile
    from qtune.memory.ways_to_fit import WaysToFit
    from qtune.recipe.file import Resolved
    from qtune.run.folder import RunDir


def profile(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run's folder.")],
    changes: SetOption = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="CARD", help='A card by name, as "RTX 3060".')] = None,
    vram: Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="A card by its memory, as 8GiB.")] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", metavar="N", min=1, callback=no_more_than(MOST_TOKENS), help="Tokens of the longest row."
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--processes", metavar="N", min=1, max=MOST_PROCESSES, help="So many such cards share each step."),
    ] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Also trace what each technique saves.")] = False,
    savings: Annotated[bool, typer.Option("--savings/--no-savings", help="Compare with the usual ways.")] = True,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE", help="Draw one step's timeline: an .svg file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
    trust: TrustOption = False,
) -> None:
    """Show the memory of a recipe, traced without a GPU; or what a run measured, beside its prediction.

    A recipe needs only the model's config.json. Its longest row is read from its data where that is possible; else it
    is data.max_length, or what --length says. Without --gpu or --vram it is planned for the device that is here. What
    is traced for a run is kept in its memory.json, and its report shows it from then on.
    """
    from qtune.at_once import require_base
    from qtune.report.drawing import require_writable

    if timeline is not None:
        require_writable(timeline, "--timeline")
    require_one_card(gpu, vram)
    is_run = Path(target).is_dir()
    others = {"--set": bool(changes), "--gpu": gpu, "--vram": vram, "--length": length, "--processes": processes > 1}
    if is_run and (given := [option for option, value in others.items() if value]):
        raise typer.BadParameter(f"{', '.join(given)}: a run is compared with its own step, as it was measured")
    from qtune.run.folder import RunDir, refuse_missing_run
    from qtune.run.memory import measured_memory

    # What is wrong with a recipe or a run, or its name, is said before seconds of imports.
    refuse_missing_run(target)
    if is_run:
        of: RunDir | Resolved = RunDir.open(Path(target))
    else:
        of = opened(target, "profile", changes, need_rows=False)
    if isinstance(of, RunDir):
        measured_memory(of)
    else:
        require_base(of.recipe)
        say_set_aside(of)
    load_libraries()
    from qtune.report.timeline import write_timeline
    from qtune.startup.quiet import quiet_loading

    quiet_loading()
    if trust:
        agree(of)
    if isinstance(of, RunDir):
        name, prediction = _profile_run(of, savings=savings, explain=explain, as_json=as_json)
    else:
        shown = {"savings": savings, "explain": explain, "as_json": as_json}
        name, prediction = _profile_recipe(of, (gpu, vram), processes, length, **shown)
    if timeline is not None and prediction is not None:
        write_timeline(prediction, f"{name}: one training step", timeline)
        console.say(f"timeline: {timeline}")


def _profile_run(run_dir: "RunDir", *, savings: bool, explain: bool, as_json: bool) -> "tuple[str, Prediction | None]":
    """Shows what a run measured; its name, and what is traced for it."""
    from dataclasses import replace

    from qtune.memory.measured.failure_text import failure_text
    from qtune.memory.profile import trace_run
    from qtune.report.page import renewed_reports
    from qtune.run.memory import measured_memory
    from qtune.run.summary import summary_of
    from qtune.screens import verdicts as verdicts_screen
    from qtune.screens.memory import draw_measured
    from qtune.verdicts.facts import read_facts
    from qtune.verdicts.memory import fits

    say_drifts(run_dir)
    with renewed_reports(run_dir), console.progress("tracing") as bar:
        measured = trace_run(run_dir, savings=savings, explain=explain, tell=bar.tell)
    verdict, summary = replace(fits(read_facts(run_dir)), command=None), summary_of(run_dir)
    if as_json:
        told = {"fits": verdict.answer, "standing": verdict.standing, "sentence": verdict.sentence}
        steps = {"seconds": summary.seconds, "step": summary.step, "steps": summary.steps}
        console.out_json({"run": str(run_dir.path), **told, **steps, "memory": measured_memory(run_dir).figures()})
        return str(run_dir.path), measured.prediction
    verdicts_screen.show([verdict])
    console.out(f"took {console.clock(summary.seconds)} for {summary.step:,} of {summary.steps:,} steps\n")
    console.out(draw_measured(measured))
    if measured.failure is not None:
        console.out(f"\n{failure_text(measured.failure)}")
    return str(run_dir.path), measured.prediction


def _profile_recipe(
    resolved: "Resolved",
    card: tuple[str | None, str | None],
    processes: int,
    length: int | None,
    *,
    savings: bool,
    explain: bool,
    as_json: bool,
) -> "tuple[str, Prediction]":
    """Shows what a recipe will need, on the card of --gpu or --vram; a name for its step, and the step."""
    from dataclasses import asdict, replace

    from qtune.device import cards
    from qtune.memory import profile as stage
    from qtune.memory.ways_to_fit import ways_to_fit
    from qtune.model.geometry import load_geometry
    from qtune.preflight import foreseen
    from qtune.screens.answer import draw_answer
    from qtune.screens.memory import draw_forecast, draw_savings, draw_ways
    from qtune.screens.time import draw_time
    from qtune.timing.forecast import step_duration, time_of
    from qtune.timing.known import known_rates

    with console.progress("tracing") as bar:
        device = replace(cards.device_for(*card), processes=processes)
        profiled = stage.profile(resolved, device, length, bar.tell)
        recipe, plan, config = profiled.recipe, profiled.forecast.plan, load_geometry(resolved.recipe.model)
        time = time_of(config, recipe, profiled.forecast)
    step = f"{recipe.model.base} on {plan.device.name}", profiled.forecast.prediction

    def remedies() -> "WaysToFit | None":
        if profiled.forecast.fits:
            return None
        with console.progress("tracing what would help") as bar:
            return ways_to_fit(config, recipe, profiled.forecast, bar.tell)

    def compared() -> "Profile":
        if not (savings or explain):  # they take longer than the recipe's own step, which need not wait for them
            return profiled
        with console.progress("tracing what to compare with") as bar:
            return stage.compared(profiled, savings=savings, explain=explain, tell=bar.tell)

    problems = foreseen(recipe, config, plan)
    if as_json:
        ways = remedies()
        rest = {
            "ways_to_fit": None if ways is None else ways.to_json(),
            "time": None if time is None else time.to_json(),
        }
        told = {"problems": [asdict(problem) for problem in problems]}
        console.out_json({"recipe": str(resolved.file), **compared().to_json(), **rest, **told})
        return step
    console.out(draw_answer(profiled, time))
    console.out("")
    if (ways := remedies()) is not None:
        console.out(draw_ways(ways, profiled.forecast.budget_bytes, profiled.forecast.prediction.layers))
        console.out("")
    console.out(draw_forecast(profiled, problems))
    if time is not None:
        console.out("")
        console.out(draw_time(time))
    rates = known_rates(plan.device)
    timed = None if rates is None else lambda prediction: step_duration(prediction, plan, rates).seconds
    for part in draw_savings(compared(), cards.SIZES, timed):
        console.out(part)
    return step
