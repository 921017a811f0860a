"""`qtune run`: which run is meant, by recipe, folder or seeds; its training; what stands at its end."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtune import console
from qtune.commands.shared import (
    MOST_PROCESSES,
    AcceptOption,
    AllowOption,
    SetOption,
    TrustOption,
    agree,
    load_libraries,
    opened,
    say_next,
    say_set_aside,
)
from qtune.errors import InputError, Interrupted, Problem, QtuneError, RunError, TrainingError
from qtune.startup.launched import launched

if TYPE_CHECKING:
    from qtune.recipe.file import Resolved
    from qtune.run.folder import RunDir


MOST_SEEDS = 100
"""Runs of one command."""


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
    allow: AllowOption = None,
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
    # What is wrong with a recipe or a run's name is said before seconds of imports.
    accepted, allowed = tuple(accept_drift or ()), tuple(allow or ())
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
        _prove(Path(target), accepted, trust=trust)
        return
    if seeds > 1 and (resume or snapshot):
        raise typer.BadParameter("--seeds makes new runs: not with --resume, and not with --memory-snapshot")
    changes = changes or []
    if resume:
        run_dir, changes = _to_resume(target, changes)
    else:
        resolved = _to_begin(target, changes, allowed, accepted, shared)
    if processes is not None and processes > 1:
        from qtune.training.launch import launch

        raise typer.Exit(launch(_without_processes(sys.argv[1:]), processes))
    if resume:
        _say_others(target, run_dir)
    else:
        recipes, seeded = _announced(resolved, changes, seeds)
    load_libraries()
    if trust:
        agree(run_dir if resume else resolved)
    from qtune.training import train

    if seeds > 1:
        _run_seeds(recipes, seeded, allowed, accepted, whole_weights=whole_weights)
        return
    if resume:
        run_dir = train.resume(
            run_dir, changes, allowed, snapshot=snapshot, accepted=accepted, whole_weights=whole_weights
        )
    else:
        run_dir = train.run(resolved, allowed, snapshot=snapshot, accepted=accepted, whole_weights=whole_weights)
    if launched().is_leader:
        _end_run(run_dir)


def _prove(folder: Path, accepted: tuple[str, ...], *, trust: bool) -> None:
    """Repeats the last steps of a run, and prints how they compare."""
    from qtune.run.folder import RunDir

    run_dir = RunDir.open(folder)
    load_libraries()
    if trust:
        agree(run_dir)
    from qtune.training.proof import prove

    console.out(prove(run_dir, accepted))


def _to_begin(
    target: str, changes: list[str], allow: tuple[str, ...], accepted: tuple[str, ...], processes: int
) -> "Resolved":
    """The recipe of a new run, with what can be told of it before a library is loaded, and by each of the processes
    that share it."""
    from qtune.plan import share_of
    from qtune.run.folder import require_writable

    resolved = opened(target, "run", changes)
    share_of(resolved.recipe.training.batch_size, processes)
    resolved.allowing(allow)
    require_writable(Path(resolved.recipe.output.directory))
    if accepted and resolved.recipe.adapter.start_from is None:
        raise typer.BadParameter(
            "--accept-drift goes with --resume, or with a recipe whose adapter.start_from names a run: a new run "
            "depends on nothing that could have changed"
        )
    return resolved


def _announced(first: "Resolved", changes: list[str], seeds: int) -> "tuple[list[Resolved], list[list[str]]]":
    """The recipes of one command, one for each seed, each with its changes, and with what is said of them before they
    are trained; what their files' and models' names show to be wrong comes first."""
    from qtune.at_once import require_at_once
    from qtune.model.hub import require_reachable
    from qtune.recipe.file import load_recipe

    say_set_aside(first)
    require_at_once(first)
    require_reachable(first.recipe.model, "config.json")
    seeded = _seeded(first, changes, seeds) if seeds > 1 else [changes]
    # All of them before any is trained: the last seed may be too large.
    recipes = [load_recipe(first.file, words) for words in seeded] if seeds > 1 else [first]
    for one in recipes:
        say_next(one)
    return recipes, seeded


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


def _seeded(first: "Resolved", changes: list[str], count: int) -> list[list[str]]:
    """The changes that make a recipe those of its seed and of each of the `count` - 1 behind it."""
    seed = first.recipe.training.seed
    own = [[f"training.seed={one}", f"output.name={first.run_name}-seed{one}"] for one in range(seed, seed + count)]
    data = first.recipe.data
    if isinstance(data.validation, float) and data.validation and data.validation_seed is None:
        # All are measured on the same rows, which none of them was trained on.
        own = [[*words, f"data.validation_seed={seed}"] for words in own]
    return [[*changes, *words] for words in own]


def _run_seeds(
    recipes: "list[Resolved]",
    seeded: list[list[str]],
    allow: tuple[str, ...],
    accepted: tuple[str, ...],
    *,
    whole_weights: bool,
) -> None:
    """Trains each, and says how far their losses lie apart.

    seeded: the changes that each has been made by.

    A seed whose training ends in an error, as one that diverges, is told, and the others are trained all the same; that
    it happens to some of them is what several seeds are for.

    Raises:
        Interrupted: with the commands for the seeds that no run was begun of; these are said before any other error.
        TrainingError: some have failed, after all have been tried.
    """
    from qtune.run.summary import summary_of
    from qtune.screens.run import spread_text
    from qtune.training import train

    runs, failed = [], []
    for number, resolved in enumerate(recipes, start=1):
        try:
            runs.append(train.run(resolved, allow, accepted=accepted, whole_weights=whole_weights))
            _end_run(runs[-1])
        except QtuneError as error:
            if isinstance(error, TrainingError) and launched().processes == 1:
                failed.append(resolved.recipe.training.seed)
                console.say_error(f"seed {failed[-1]}: {error}")
                continue
            options = _options(allow, accepted, whole_weights=whole_weights)
            left = [_beginning(resolved.file, words, options) for words in seeded[number:]]
            if not left:
                raise
            of_those = "the seed that was not begun" if len(left) == 1 else f"the {len(left)} seeds that were not begun"
            if isinstance(error, Interrupted):
                raise Interrupted("\n".join([f"{error}", f"{of_those}:", *left])) from error
            console.say("\n".join([f"{of_those}:", *left]))
            raise
    if len(runs) > 1:
        console.say(spread_text([summary_of(run_dir) for run_dir in runs]))
    if failed:
        which = f"seed {failed[0]}" if len(failed) == 1 else f"seeds {', '.join(map(str, failed))}"
        raise TrainingError(f"of {len(recipes)} seeds {len(runs)} came to their end; not {which}, as said above")


def _options(allow: tuple[str, ...], accepted: tuple[str, ...], *, whole_weights: bool) -> list[str]:
    """What a command was told besides the changes of its recipe."""
    named = [("--allow", allow), ("--accept-drift", accepted)]
    return [word for option, values in named for one in values for word in (option, one)] + (
        ["--hash-weights"] if whole_weights else []
    )


def _beginning(recipe: Path, changes: list[str], options: list[str]) -> str:
    """The command for a new run of a recipe."""
    return shlex.join(["qtune", "run", str(recipe), *(word for one in changes for word in ("--set", one)), *options])


def _to_resume(target: str, changes: list[str]) -> "tuple[RunDir, list[str]]":
    """The run that is meant, and the changes for the rest of it, which it can take."""
    from qtune.run.resumption import resumed_recipe

    run_dir, left = _unfinished(target, changes)
    if left:
        resumed_recipe(run_dir, left)
    return run_dir, left


def _unfinished(target: str, changes: list[str]) -> "tuple[RunDir, list[str]]":
    """The run that is meant by its folder or by its recipe, and those changes that have not said which run is meant."""
    from qtune.run.finished import adapter_fault
    from qtune.run.folder import RunDir, refuse_missing_run
    from qtune.run.resumption import (
        newest_finished,
        newest_unfinished,
        nothing_to_resume,
        resuming,
        unfinished_seeds,
    )

    refuse_missing_run(target)
    if Path(target).is_dir():
        run_dir = RunDir.open(Path(target))
        if run_dir.is_finished and adapter_fault(run_dir) is None:
            raise RunError(nothing_to_resume(run_dir, changes))
        return run_dir, changes
    resolved = opened(target, "run", changes, need_start=False)
    directory = Path(resolved.recipe.output.directory)
    newest = newest_unfinished(directory, resolved.run_name)
    if newest is None:
        if (ended := newest_finished(directory, resolved.run_name)) is not None:
            own = [change for change in changes if not change.startswith("output.")]
            said = nothing_to_resume(ended, own)
            raise InputError(Problem(target, f"has no unfinished run; its latest, {said.place}, {said.message}"))
        if seeds := unfinished_seeds(directory, resolved.run_name):
            ways = ", ".join(resuming(run) for run in seeds)
            raise InputError(
                Problem(target, f"has runs of several seeds; to go on with one that has not ended: {ways}")
            )
        begin = shlex.join(["qtune", "run", target])
        raise InputError(Problem(target, f"has no run in {directory} to go on with; begin one with: {begin}"))
    naming = ("output.directory", "output.name")
    return newest, [change for change in changes if change.partition("=")[0].strip() not in naming]


def _say_others(target: str, run_dir: "RunDir") -> None:
    """Of a recipe's runs that could go on: which one does, and which else there are."""
    from qtune.run.listing import others_to_resume

    if launched().is_leader and not Path(target).is_dir() and (others := others_to_resume(run_dir)):
        named = ", ".join(str(other.path) for other in others)
        console.say(f"going on with {run_dir.path}, the latest of {target}; others that could: {named}")


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
