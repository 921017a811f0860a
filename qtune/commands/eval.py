"""`qtune eval`: the tuned model beside its base, on held-out rows or on benchmarks."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtune import console
from qtune.commands.shared import (
    MOST_ROWS,
    MOST_TOKENS,
    AcceptOption,
    TrustOption,
    agree,
    load_libraries,
    no_more_than,
    options_given,
)

if TYPE_CHECKING:
    from qtune.run.folder import RunDir


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
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, callback=no_more_than(MOST_TOKENS), help="Longest answer, in tokens.")
    ] = 512,
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

    given = options_given(context)
    _refuse_ignored(given, is_tasks=tasks is not None)
    run_dir = RunDir.open(target)
    require_adapter(run_dir)
    load_libraries()
    if trust:
        agree(run_dir)
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
