"""The command line: parse, call one stage, turn its errors into exit codes. Stages are imported inside their verb."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtune import __version__, console
from qtune.disk import refusal_of
from qtune.errors import InputError, Interrupted, LibraryError, Problem, QtuneError, RunError, SaidElsewhere
from qtune.startup.allocator import use_expandable_segments
from qtune.startup.imports import import_libraries
from qtune.startup.interrupts import nothing_to_keep, take_interrupts
from qtune.startup.launched import forget_launcher, is_to_meet, launched, use_own_card
from qtune.startup.quiet import quiet_libraries
from qtune.startup.streams import BROKEN_PIPE_CODE, OutputEndedError, guard_streams
from qtune.startup.waiting_threads import let_waiting_threads_sleep
from qtune.verbs import RUNS, Verbs

if TYPE_CHECKING:
    from qtune.memory.fit import Fitted
    from qtune.memory.predict import Prediction
    from qtune.memory.profile import Profile
    from qtune.memory.ways_to_fit import WaysToFit
    from qtune.recipe.file import Resolved
    from qtune.recipe.schema import Recipe
    from qtune.run.folder import RunDir


app = typer.Typer(
    name="qtune",
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune large language models in 4 bits on one ordinary graphics card.",
    epilog="Exit codes: 0 done · 1 the work failed · 2 the input is wrong · 130 interrupted, state saved · "
    "141 nobody reads the results any more.",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that comes with qtune: quickstart.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, as training.epochs=2. Repeatable."),
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
MOST_SEEDS = 100
"""Runs of one command."""
MOST_ROWS = 1_000_000
MOST_COPIES = 100
MOST_PROCESSES = 64
"""Of one computer: more cards than any has."""


def _a_number(value: float) -> float:
    """A range lets NaN pass, which is neither below nor above it."""
    if value != value:
        raise typer.BadParameter("nan is not a number")
    return value


def _load_libraries() -> None:
    """Seconds in which nothing else can be said."""
    with nothing_to_keep():
        import_libraries(console.waiting)


def _version(value: bool) -> None:
    if value:
        console.out(f"qtune {__version__}")
        raise typer.Exit


def _agree(of: "RunDir | Resolved") -> None:
    """Remembers consent to the code that comes with the model of a run or a recipe."""
    from qtune.model.local import base_folder
    from qtune.model.trust import grant_for
    from qtune.run.folder import RunDir
    from qtune.run.resolved import resolved_recipe

    model = (resolved_recipe(of) if isinstance(of, RunDir) else of.recipe).model
    grant_for(base_folder(model), model.revision)


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if launched().processes > 1 and context.invoked_subcommand != "run":
        forget_launcher(os.environ)  # there is nobody to meet: each says it, and ends
        raise InputError(Problem("WORLD_SIZE", "only qtune run shares its work out; start this without a launcher"))


@app.command(rich_help_panel="Prepare")
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


@app.command(rich_help_panel="Train")
def run(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE|RUN", help="A recipe, or with --resume a run's folder."),
    ],
    changes: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was stopped: RUN, or RECIPE's latest unfinished run."),
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="FINDING",
            help="Train in spite of this finding of the gate, as --allow too-long. Repeatable.",
        ),
    ] = None,
    snapshot: Annotated[
        bool,
        typer.Option(
            "--memory-snapshot",
            help="Keep the CUDA allocator's history of the first two steps for https://pytorch.org/memory_viz.",
        ),
    ] = False,
    accept_drift: AcceptOption = None,
    trust: TrustOption = False,
    whole_weights: Annotated[
        bool,
        typer.Option(
            "--hash-weights",
            help="Hash the base's weights into lock.json, and compare on resuming; their checksums are, anyway.",
        ),
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", metavar="N", min=1, max=MOST_SEEDS, help="Train N runs: training.seed, and the seeds after it."
        ),
    ] = 1,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            metavar="N",
            min=1,
            max=MOST_PROCESSES,
            help="Share the rows of each step among N processes of this computer, each with a card of its own.",
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="With --resume RUN: repeat its last steps and compare the parameters bit by bit."),
    ] = False,
) -> None:
    """Train a recipe into a new folder under runs/.

    Ctrl-C saves a checkpoint and says how to go on; a second Ctrl-C stops at once. The result is RUN/adapter; see what
    was learned with `qtune eval RUN`, and hand it over with `qtune export RUN`. On resuming, --set changes how
    memory is spent and what is logged and saved; a lower training.learning_rate goes on as a new run beside this one;
    what else would make another run is refused. A base, rows or libraries that are not what the run began with stop it,
    unless --accept-drift names what may differ. Runs of 50 steps or more are rehearsed first (training.rehearse).
    With --seeds, the runs NAME-seed42, NAME-seed43 … and the spread of their losses, which is what chance does to one.
    Under torchrun or accelerate launch, or with --processes, several processes share the rows of each step.
    """
    from qtune.at_once import require_at_once
    from qtune.model.hub import require_reachable
    from qtune.plan import share_of
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe
    from qtune.run.folder import RunDir, require_writable
    from qtune.run.resumption import resumed_recipe

    # What is wrong with a recipe or a run's name is said before seconds of imports.
    accepted = tuple(accept_drift or ())
    shared = max(processes or 1, launched().processes)
    if shared > 1 and (prove or seeds > 1):
        which = "--prove" if prove else "--seeds"
        raise typer.BadParameter(f"{which} is for one process; start it without a launcher and without --processes")
    if processes is not None and processes > 1 and launched().processes > 1:
        raise typer.BadParameter("a launcher has started this process already; --processes is for running without one")
    if prove:
        if not resume or not Path(target).is_dir():
            raise typer.BadParameter("--prove wants a run's folder: qtune run --resume runs/NAME --prove")
        if changes or allow or snapshot or whole_weights or seeds > 1:
            others = "--set, --allow, --memory-snapshot, --hash-weights or --seeds"
            raise typer.BadParameter(f"--prove repeats what was done, and goes with no {others}")
        proven = RunDir.open(Path(target))
        _load_libraries()
        if trust:
            _agree(proven)
        from qtune.training import proof

        console.out(proof.prove(proven, accepted))
        return
    if seeds > 1 and (resume or snapshot):
        raise typer.BadParameter("--seeds makes new runs: not with --resume, and not with --memory-snapshot")
    if resume:
        run_dir, changes = _unfinished(target, changes or [])
        if changes:
            resumed_recipe(run_dir, changes)
    else:
        resolved = is_given(load_recipe(find_recipe(target), changes or ()))
        share_of(resolved.recipe.training.batch_size, shared)
        resolved.allowing(allow or ())
        require_writable(Path(resolved.recipe.output.directory))
        if accepted and resolved.recipe.adapter.start_from is None:
            raise typer.BadParameter(
                "--accept-drift goes with --resume, or with a recipe whose adapter.start_from names a run: a new run "
                "depends on nothing that could have changed"
            )
    if processes is not None and processes > 1:
        from qtune.training.launch import launch

        raise typer.Exit(launch(_without_processes(sys.argv[1:]), processes))
    if not resume:
        _say_set_aside(resolved)
        require_at_once(resolved)
        require_reachable(resolved.recipe.model, "config.json")
        recipes = _seeded(resolved, changes or [], seeds) if seeds > 1 else [resolved]
        for one in recipes:
            _say_next(one)
    _load_libraries()
    if trust:
        _agree(run_dir if resume else resolved)
    from qtune.training import train

    if seeds > 1:
        _run_seeds(recipes, tuple(allow or ()), accepted, whole_weights=whole_weights)
        return
    if resume:
        run_dir = train.resume(
            run_dir,
            changes or (),
            tuple(allow or ()),
            snapshot=snapshot,
            accepted=accepted,
            whole_weights=whole_weights,
        )
    else:
        run_dir = train.run(
            resolved, tuple(allow or ()), snapshot=snapshot, accepted=accepted, whole_weights=whole_weights
        )
    if launched().is_leader:
        _end_run(run_dir)


def _say_next(resolved: "Resolved") -> None:
    """What a new run will be called, where that is not what the recipe says."""
    from qtune.run.listing import said_of_next

    if launched().is_leader:
        for sentence in said_of_next(Path(resolved.recipe.output.directory), resolved.run_name):
            console.say(sentence)


def _say_set_aside(resolved: "Resolved") -> None:
    for sentence in resolved.set_aside:
        console.say(sentence)


def _without_processes(words: list[str]) -> list[str]:
    """The words of a command without --processes N or --processes=N."""
    kept: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--processes":
            words.pop(0)
        elif not word.startswith("--processes="):
            kept.append(word)
    return kept


def _seeded(first: "Resolved", changes: list[str], count: int) -> "list[Resolved]":
    """The recipe with its seed and with each of the `count` - 1 behind it: all of them before any is trained, for the
    last seed may be too large."""
    from qtune.recipe.file import load_recipe

    seed = first.recipe.training.seed
    own = [[f"training.seed={one}", f"output.name={first.run_name}-seed{one}"] for one in range(seed, seed + count)]
    data = first.recipe.data
    if isinstance(data.validation, float) and data.validation and data.validation_seed is None:
        # All are measured on the same rows, which none of them was trained on.
        own = [[*words, f"data.validation_seed={seed}"] for words in own]
    return [load_recipe(first.file, [*changes, *words]) for words in own]


def _run_seeds(
    recipes: "list[Resolved]", allow: tuple[str, ...], accepted: tuple[str, ...], *, whole_weights: bool
) -> None:
    """Trains each, and says how far their losses lie apart."""
    from qtune.run.summary import summary_of
    from qtune.screens.run import spread_text
    from qtune.training import train

    runs = []
    for resolved in recipes:
        runs.append(train.run(resolved, allow, accepted=accepted, whole_weights=whole_weights))
        _end_run(runs[-1])
    console.say(spread_text([summary_of(run_dir) for run_dir in runs]))


def _unfinished(target: str, changes: list[str]) -> "tuple[RunDir, list[str]]":
    """The run that is meant by its folder or by its recipe, and those changes that have not said which run is meant."""
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe
    from qtune.run.finished import adapter_fault
    from qtune.run.folder import RunDir, refuse_missing_run
    from qtune.run.resumption import newest_finished, newest_unfinished, nothing_to_resume

    refuse_missing_run(target)
    if Path(target).is_dir():
        run_dir = RunDir.open(Path(target))
        if run_dir.is_finished and adapter_fault(run_dir) is None:
            raise RunError(nothing_to_resume(run_dir, changes))
        return run_dir, changes
    resolved = is_given(load_recipe(find_recipe(target), changes))
    directory = Path(resolved.recipe.output.directory)
    unfinished = newest_unfinished(directory, resolved.run_name)
    if unfinished is None:
        if (ended := newest_finished(directory, resolved.run_name)) is not None:
            own = [change for change in changes if not change.startswith("output.")]
            said = nothing_to_resume(ended, own)
            raise InputError(Problem(target, f"has no unfinished run; its latest, {said.place}, {said.message}"))
        begin = shlex.join(["qtune", "run", target])
        raise InputError(Problem(target, f"has no run in {directory} to go on with; begin one with: {begin}"))
    naming = ("output.directory", "output.name")
    return unfinished, [change for change in changes if change.partition("=")[0].strip() not in naming]


def _end_run(run_dir: "RunDir") -> None:
    """Writes the report of a run that has ended, says what the run has come to, and prints its folder.

    Raises:
        Interrupted: by Ctrl-C, which costs the run nothing any more.
    """
    from qtune.run.finished import said_of_end

    try:
        _show_end(run_dir)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; {said_of_end(run_dir)}") from error


def _show_end(run_dir: "RunDir") -> None:
    from qtune.report.page import attempt_report
    from qtune.run.summary import summary_of
    from qtune.screens import verdicts as verdicts_screen
    from qtune.screens.run import summary_text
    from qtune.verdicts.of_run import attempt_verdicts

    attempt_report(run_dir)
    verdicts_screen.show(attempt_verdicts(run_dir), as_messages=True)
    console.say(summary_text(summary_of(run_dir)))
    console.out(f"{run_dir.path}")


def _given(context: typer.Context) -> frozenset[str]:
    """The options that were written on the command line, by their names; a switch by the side that was chosen."""
    options: set[str] = set()
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        source = context.get_parameter_source(name)
        if option.param_type_name == "option" and source is not None and source.name == "COMMANDLINE":
            written = option.secondary_opts if value is False and option.secondary_opts else option.opts
            options |= {written[0], f"{written[0]} {value}"}
    return frozenset(options)


@app.command(name="eval", rich_help_panel="Try")
def evaluate(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as runs/quickstart.")],
    rows: Annotated[
        int, typer.Option(min=1, max=MOST_ROWS, help="How many held-out rows, spread evenly over all of them.")
    ] = 100,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to use instead of the recipe's.", exists=True)
    ] = None,
    shown: Annotated[
        int, typer.Option("--show", min=0, max=MOST_ROWS, help="How many answers to show side by side.")
    ] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 512,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Benchmarks of lm-evaluation-harness (or YAML files) instead of rows."),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, max=100, help="Of --tasks: solved examples before each.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="Of --tasks: questions of each, at most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
    accept_drift: AcceptOption = None,
    trust: TrustOption = False,
) -> None:
    """Compare the tuned model with its base on rows that training did not see.

    Did it learn, with a 95 % interval over rows; loss, perplexity, exactly right answers; for free text ROUGE-L, length
    and repetition instead; answers side by side. The rows are the recipe's data.test, else its validation rows.
    Those whose prompts training saw too, that of a run that this one started from included, are left out of the
    figures, unless hardly any others are left.
    Everything is written to RUN/eval.json. With --tasks both are asked public benchmarks instead, as the harness asks
    them, without a chat template; the figures are written to RUN/tasks.json.
    """
    from qtune.run.finished import require_adapter
    from qtune.run.folder import RunDir

    given = _given(context)
    _refuse_ignored(given, is_tasks=tasks is not None)
    run_dir = RunDir.open(target)
    require_adapter(run_dir)
    _load_libraries()
    if trust:
        _agree(run_dir)
    if tasks is not None:
        _evaluate_tasks(run_dir, tasks, fewshot, limit, as_json=as_json, accepted=tuple(accept_drift or ()))
        return
    from qtune.report.page import renewed_reports
    from qtune.screens import evaluation as evaluation_screen
    from qtune.screens import verdicts as verdicts_screen
    from qtune.tuned import evaluate as stage
    from qtune.verdicts.learning import learned_against_base

    with renewed_reports(run_dir):
        evaluation = stage.evaluate(
            run_dir, rows=rows, data_file=data, max_new_tokens=max_new_tokens, accepted=tuple(accept_drift or ())
        )
    if "--rows" in given and rows > evaluation.rows_held_out:
        console.say(
            f"--rows {rows}: there are {evaluation.rows_held_out:,} {evaluation.source}; all of them were asked"
        )
    if as_json:
        console.out_json(evaluation.to_json())
    else:
        verdicts_screen.show([learned_against_base(evaluation, shlex.quote(str(target)))])
        console.out("")
        evaluation_screen.show(evaluation, shown)


def _refuse_ignored(given: frozenset[str], *, is_tasks: bool) -> None:
    """Refuses options that mean nothing beside --tasks, or nothing without it."""
    others = ("--rows", "--data", "--show", "--max-new-tokens") if is_tasks else ("--fewshot", "--limit")
    if ignored := [option for option in others if option in given]:
        why = "--tasks asks benchmarks, not rows" if is_tasks else "only --tasks has them"
        raise typer.BadParameter(f"{', '.join(ignored)}: {why}")


def _evaluate_tasks(
    run_dir: "RunDir",
    names: str,
    fewshot: int | None,
    limit: int | None,
    *,
    as_json: bool,
    accepted: tuple[str, ...],
) -> None:
    """Base against tuned on benchmarks, in one table."""
    from qtune.records import plain
    from qtune.report.page import renewed_reports
    from qtune.screens import tasks as screen
    from qtune.tuned import tasks as stage

    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise typer.BadParameter("--tasks names no task")
    with renewed_reports(run_dir):
        found = stage.evaluate_tasks(run_dir, listed, fewshot=fewshot, limit=limit, accepted=accepted)
    if as_json:
        console.out_json(plain(found))
    else:
        screen.show(found)


@app.command(rich_help_panel="Try")
def compare(
    targets: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of finished runs, two or more.")],
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_ROWS, help="How many held-out rows; left out, as many as were evaluated, else 100."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to ask them all, instead of each recipe's.", exists=True)
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of a table.")] = False,
    accept_drift: AcceptOption = None,
    trust: TrustOption = False,
) -> None:
    """Compare finished runs: loss and right answers on the same held-out rows, forgetting, time, memory.

    Runs of one recipe that differ by their seed alone are one line, with the spread between them. Intervals are of
    95 %, by drawing rows and runs again. Forgotten is by how much the loss rose on a short text that comes with qtune
    and has nothing to do with any rows. What is measured is kept in each run's folder, but for fewer rows than are
    kept there. Rows are the same where they say the same, in whatever files they stand.
    """
    from qtune.run.finished import require_adapter
    from qtune.run.folder import RunDir
    from qtune.run.identity import refuse_one_twice

    if len(targets) < 2:
        raise typer.BadParameter("one run is examined with qtune eval; name two or more")
    opened = [RunDir.open(target) for target in targets]
    for run_dir in opened:
        require_adapter(run_dir)
    refuse_one_twice(opened)
    if page is not None:
        from qtune.report.drawing import require_writable

        require_writable(page, "--page", "page", ".html")
    _load_libraries()
    for run_dir in opened if trust else ():
        _agree(run_dir)
    from qtune.comparing.runs import compared_runs
    from qtune.comparing.table import compare as compared
    from qtune.report.comparison import write_comparison
    from qtune.report.page import renewed_reports
    from qtune.screens import comparison as comparison_screen

    with renewed_reports(*opened):
        runs = compared_runs(targets, rows=rows, data_file=data, accepted=tuple(accept_drift or ()))
    found = compared(runs)
    if as_json:
        console.out_json(found.to_json())
    else:
        comparison_screen.show(found)
    if page is not None:
        write_comparison(found, page)
        console.say(f"page: {page}")


@app.command(rich_help_panel="Try")
def chat(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run's folder, an exported model's, a hub id or a built-in model."),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter/--no-adapter", help="Talk to the tuned model or to its base.")
    ] = True,
    system: Annotated[
        str | None, typer.Option(help="System message; by default the recipe's data.system_prompt.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(min=0, max=100, callback=_a_number, help="0 takes the likeliest token, 1 draws from the model."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, callback=_a_number, help="Draw from the likeliest tokens of this total share."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 512,
    accept_drift: AcceptUsingOption = None,
    trust: TrustOption = False,
) -> None:
    """Talk to a run or a model; answers appear as they are made.

    /help lists what can be typed besides questions; Ctrl-C stops an answer, Ctrl-D leaves. Lines may be piped in.
    """
    from qtune.run.finished import require_adapter
    from qtune.tuned.target import require_model, run_meant

    run_dir = run_meant(target)
    if run_dir is None:
        require_model(target)
    elif adapter:
        require_adapter(run_dir)
    _load_libraries()
    from qtune.tuned import chat as stage
    from qtune.tuned.generate import Sampling

    session = stage.open_session(target, adapter=adapter, accepted=tuple(accept_drift or ()), trusted=trust)
    session.sampling, session.max_new_tokens = Sampling(temperature, top_p, seed), max_new_tokens
    session.system = system if system is not None else session.system
    if prompt is None:
        stage.chat(session, stage.typed_lines())
        return
    stage.answered(session, prompt)


@app.command(rich_help_panel="Use")
def export(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's folder; may be left out with --verify-only.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; RUN/model if left out.")
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16"], typer.Option("--dtype", help="Type of the exported weights.")
    ] = "float16",
    base: Annotated[
        Literal["dequantized", "original"],
        typer.Option(
            "--base",
            help="What the adapter is merged into: the weights that training saw (dequantized), or those of the base "
            "checkpoint, which it was not trained on.",
        ),
    ] = "dequantized",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the written model with the one that was trained.")
    ] = True,
    verify_only: Annotated[
        Path | None,
        typer.Option(
            "--verify-only",
            metavar="DIR",
            help="Compare a folder that was exported before, as RUN/model; of its GGUF files the checksums.",
        ),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter alone, in peft's format.")
    ] = False,
    compare_bases: Annotated[
        bool, typer.Option("--compare-bases", help="Also measure what merging into the original weights costs.")
    ] = False,
    gguf: Annotated[
        Literal["f16", "bf16", "q8_0"] | None,
        typer.Option(
            "--gguf",
            help="Also write a GGUF file for llama.cpp, LoRA as adapter.gguf and, where proven, an Ollama Modelfile; "
            "to a verified export that is there, they alone are added.",
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="REPO",
            help="Upload the folder to this repository, private: a model that was verified, or the adapter alone.",
        ),
    ] = None,
    accept_drift: AcceptUsingOption = None,
    trust: TrustOption = False,
) -> None:
    """Turn a run into a model that others can load, and prove that it is the model that was trained.

    LoRA and IA3 are merged into the weights. The folder loads with plain transformers. It is loaded back and compared
    with the live 4-bit model and its adapter on held-out rows; the figures are kept in verify.json and in the model
    card. A model that fails is kept, marked as unverified, and the exit code is 1.
    """
    from qtune.export.conflicts import refuse_conflicts
    from qtune.export.output import refuse_existing_output, require_exported, run_around
    from qtune.run.finished import require_adapter
    from qtune.run.folder import RunDir, runs_here

    given = _given(context)
    refuse_conflicts(given)
    # What is wrong with a run or a folder is said before seconds of imports.
    if verify_only is not None:
        require_exported(verify_only)
        opened = RunDir.open(run) if run is not None else run_around(verify_only)
    elif run is not None:
        opened = RunDir.open(run)
    else:
        raise typer.BadParameter(f"name a run, as qtune export runs/quickstart{runs_here()}")
    require_adapter(opened)
    if verify_only is None:
        refuse_existing_output(
            opened, output, adapter_only=adapter_only, force=force, gguf=gguf, given=frozenset(given)
        )
    _load_libraries()
    from qtune.export import export as stage
    from qtune.report.page import renewed_reports
    from qtune.screens import export as screen

    if trust:
        _agree(opened)
    if verify_only is not None:
        with renewed_reports(opened):
            folder = stage.verify_only(verify_only, opened, screen.show, accepted=tuple(accept_drift or ()))
        console.out(f"{folder}")
        return
    options = stage.Options(
        output=output,
        weights=base,
        dtype=dtype,
        force=force,
        verify=verify,
        adapter_only=adapter_only,
        gguf=gguf,
        compare_bases=compare_bases,
        push_to=push_to,
        accepted=tuple(accept_drift or ()),
        given=given,
    )
    with renewed_reports(opened):
        folder = stage.export_run(opened, options, screen.show)
    console.out(f"{folder}")


@app.command(rich_help_panel="Prepare")
def check(
    recipe: RecipeArgument,
    changes: SetOption = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="FINDING",
            help="Do not count this finding as an error, as --allow too-long. Repeatable.",
        ),
    ] = None,
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
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe

    file = find_recipe(recipe, "check")
    # What is wrong with a recipe is said before seconds of imports.
    with _with_memory(file, changes or [], as_json=as_json):
        resolved = is_given(load_recipe(file, changes or ()))
    require_at_once(resolved)
    _say_set_aside(resolved)
    _say_next(resolved)
    with _with_memory(file, changes or [], as_json=as_json):
        _load_libraries()
        from qtune import check as stage
        from qtune.screens.check import draw_check

        if trust:
            _agree(resolved)
        result = stage.check(resolved, allow or (), samples=rows, timed=timed, rehearsed=rehearsed)
    if as_json:
        console.out_raw(result.to_json())
    else:
        console.out(draw_check(result))
    result.require()


@contextmanager
def _with_memory(file: Path, changes: list[str], *, as_json: bool) -> Iterator[None]:
    """Where model or rows cannot be had, what is known all the same is said, and then what is wrong."""
    try:
        yield
    except InputError:
        if not as_json:
            _show_memory_alone(file, changes)
        raise


def _show_memory_alone(file: Path, changes: list[str]) -> None:
    """Shows the step's memory where the recipe is right and its rows or its model are what cannot be had."""
    from qtune.recipe.file import load_recipe

    try:
        resolved = load_recipe(file, changes, need_rows=False)
    except InputError:
        return
    _load_libraries()
    from qtune.check import memory_alone
    from qtune.screens.answer import draw_answer
    from qtune.screens.memory import draw_forecast

    known = memory_alone(resolved)
    if known is not None:
        console.out(draw_answer(known, None, is_timed=False))
        console.out("")
        console.out(draw_forecast(known, []))


@app.command(name="list", rich_help_panel="Runs")
def list_all(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the runs are, or one of them.")] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """List the runs of a folder, or one run: state, base, adapter, losses, size and age, the latest first."""
    import time
    from dataclasses import asdict

    from qtune.run.listing import list_runs, listed_folder
    from qtune.screens.listing import draw_runs

    # Where nothing was trained yet there is no folder either; one that somebody names is there or misspelt.
    runs = list_runs(directory) if directory.exists() or directory != RUNS else []
    if as_json:
        console.out_json([asdict(run) for run in runs])
    else:
        console.out(draw_runs(runs, listed_folder(directory), time.time()))


@app.command(rich_help_panel="Runs")
def report(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, finished or not.")],
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="First trace what its memory is compared with, if not yet known.")
    ] = True,
    trust: TrustOption = False,
) -> None:
    """Draw a run as one HTML page: curves, memory, rows with the trained tokens marked, answers, origins of values.

    The page needs neither network nor scripts. It is written to RUN/report.html; while the run trains, ask again for
    newer figures. The run's end, eval, compare, export and profile write it anew by themselves. What is traced (the
    predicted step, what other ways of training would take, what each technique saves) is kept in the run.
    """
    from qtune.run.folder import RunDir

    run_dir = RunDir.open(target)
    from qtune.report.page import trace_memory, write_report

    if trust:
        _agree(run_dir)
    if trace:
        trace_memory(run_dir)
    console.out(f"{write_report(run_dir)}")
    _say_drifts(run_dir)


def _say_drifts(run_dir: "RunDir") -> None:
    from qtune.run.drift import said_of
    from qtune.run.owner import owner_of

    if (owner := owner_of(run_dir)) is not None:
        console.say(f"{run_dir.path} belongs to {owner}: what is shown is what it has written so far")
    for said in said_of(run_dir):
        console.say(f"{run_dir.path}: {said}")


@app.command(rich_help_panel="Prepare")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure how fast this device is, and keep it for predictions of time.")
    ] = False,
) -> None:
    """Examine this computer: versions, device, disk; what qtune would choose here, and why.

    --measure takes ten to thirty seconds; what it finds stands for the device's data sheet from then on. Ends with exit
    code 1 if something stands in the way of training.
    """
    from qtune.diagnosis import has_problems, to_json, without_libraries
    from qtune.screens import doctor as doctor_screen

    try:
        _load_libraries()
    except LibraryError as error:
        findings = without_libraries(error)
    else:
        from qtune.doctor import examine

        findings = examine(RUNS, measure=measure)
    if as_json:
        console.out_json(to_json(findings))
    else:
        doctor_screen.show(findings)
    if has_problems(findings):
        raise typer.Exit(1)


@app.command(rich_help_panel="Prepare")
def profile(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run's folder.")],
    changes: SetOption = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="CARD", help='A card by name, as "RTX 3060".')] = None,
    vram: Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="A card by its memory, as 8GiB.")] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, max=MOST_TOKENS, help="Tokens of the longest row.")
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
    _require_one_card(gpu, vram)
    is_run = Path(target).is_dir()
    others = {"--set": bool(changes), "--gpu": gpu, "--vram": vram, "--length": length, "--processes": processes > 1}
    if is_run and (given := [option for option, value in others.items() if value]):
        raise typer.BadParameter(f"{', '.join(given)}: a run is compared with its own step, as it was measured")
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe
    from qtune.run.folder import RunDir, refuse_missing_run
    from qtune.run.memory import measured_memory

    # What is wrong with a recipe or a run, or its name, is said before seconds of imports.
    refuse_missing_run(target)
    if is_run:
        of: RunDir | Resolved = RunDir.open(Path(target))
    else:
        of = is_given(load_recipe(find_recipe(target), changes or (), need_rows=False))
    if isinstance(of, RunDir):
        measured_memory(of)
    else:
        require_base(of.recipe)
        _say_set_aside(of)
    _load_libraries()
    from qtune.report.timeline import write_timeline
    from qtune.startup.quiet import quiet_loading

    quiet_loading()
    if trust:
        _agree(of)
    if isinstance(of, RunDir):
        name, prediction = _profile_run(of, savings=savings, explain=explain, as_json=as_json)
    else:
        shown = {"savings": savings, "explain": explain, "as_json": as_json}
        name, prediction = _profile_recipe(of, (gpu, vram), processes, length, **shown)
    if timeline is not None and prediction is not None:
        write_timeline(prediction, f"{name}: one training step", timeline)
        console.say(f"timeline: {timeline}")


def _require_one_card(gpu: str | None, vram: str | None) -> None:
    from qtune.device.cards import require_known

    if gpu is not None and vram is not None:
        raise typer.BadParameter("--gpu and --vram name two cards; give one of them")
    require_known(gpu, vram)


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

    _say_drifts(run_dir)
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


@app.command(rich_help_panel="Prepare")
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
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe, written_beside
    from qtune.whole import place_taken

    _require_one_card(gpu, vram)
    others = {"--output": output is not None, "--allow": bool(allow), "--force": force}
    if unknown := set(allow or ()) - {"length"}:
        raise typer.BadParameter(f"--allow {', '.join(sorted(unknown))}: only length can be allowed, as --allow length")
    if largest is not None and (ignored := [option for option, is_given in others.items() if is_given]):
        raise typer.BadParameter(f"{', '.join(ignored)}: --max only says a value, and changes and writes nothing")
    if largest is not None and as_json:
        raise typer.BadParameter("--json: the answer to --max is one line of text")
    file = find_recipe(recipe, "fit")
    resolved = is_given(load_recipe(file, changes or (), need_rows=False))
    require_base(resolved.recipe)
    _say_set_aside(resolved)
    target = output or written_beside(file, ".fit.toml")
    if largest is None and (taken := place_taken(target, force=force)) is not None:
        raise typer.BadParameter(f"{target} {taken}")
    _load_libraries()
    from qtune.memory import fit as stage
    from qtune.startup.quiet import quiet_loading
    from qtune.whole import write_text

    quiet_loading()
    if trust:
        _agree(resolved)
    if largest is not None:
        with console.progress("tracing") as bar:
            found = stage.largest_value(resolved.recipe, gpu, vram, largest, bar.tell)
        console.out(found)
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
    from dataclasses import asdict

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


@app.command(rich_help_panel="Prepare")
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
    from qtune.recipe.file import load_recipe
    from qtune.recipe.places import is_given
    from qtune.recipe.shipped import find_recipe, written_beside

    file = find_recipe(recipe, "swap")
    resolved = is_given(load_recipe(file, changes or ()))
    target = output or written_beside(file, ".swapped.toml")
    require_row_files(resolved.recipe.data, resolved.folder)
    require_swappable(resolved, target, force=force)
    given = None if words is None else words_of_text(words)
    _say_set_aside(resolved)
    _load_libraries()
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


def main() -> None:
    """The `qtune` command: an error meant for the user becomes a message and an exit code, any other a traceback."""
    quiet_libraries()
    use_expandable_segments()
    let_waiting_threads_sleep()
    use_own_card()
    guard_streams()
    take_interrupts()
    try:
        try:
            _parse_and_run()
        finally:  # what is still in the buffer may be what cannot be written
            sys.stdout.flush()
    except OutputEndedError as error:
        if error.reader_left:
            sys.exit(BROKEN_PIPE_CODE)
        console.say_error(str(error))
        sys.exit(1)
    except Interrupted as stopped:
        # What the user asked for is no error.
        console.say(str(stopped))
        sys.exit(stopped.exit_code)
    except SaidElsewhere as error:
        sys.exit(error.exit_code)
    except QtuneError as error:
        console.say_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.say("stopped")
        sys.exit(130)
    except Exception as error:
        if (known := _told(error)) is None:
            raise
        console.say_error(known)
        sys.exit(1)


def _parse_and_run() -> None:
    """The command. What stops one of several processes before they have met ends all, and is said once."""
    try:
        app()
    except QtuneError as raised:
        from qtune.recipe.places import located

        error = located(raised)
        if is_to_meet():
            raise _said_once(error) from raised
        if error is raised:
            raise
        raise error from raised


def _said_once(error: QtuneError) -> QtuneError:
    _load_libraries()
    from qtune.training.meeting import end_together

    return end_together(error)


def _told(error: Exception) -> str | None:
    """What is said of an error that nobody has raised on purpose, and that is none of ours; None: a bug of ours."""
    if (refused := refusal_of(error)) is not None:
        return refused
    if "torch" not in sys.modules:
        return None
    from qtune.device.present import is_out_of_memory, memory_ran_out

    if not is_out_of_memory(error):
        return None
    return str(memory_ran_out(error, "Close what else takes memory, or use a larger device"))
