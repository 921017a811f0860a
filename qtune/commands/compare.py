"""`qtune compare`: runs side by side."""

from pathlib import Path
from typing import Annotated

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
)


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
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            callback=no_more_than(MOST_TOKENS),
            help="Longest answer, in tokens; left out, as was evaluated, at least 512.",
        ),
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
    load_libraries()
    for run_dir in opened if trust else ():
        agree(run_dir)
    from qtune.comparing.runs import compared_runs
    from qtune.comparing.table import compare as compared
    from qtune.report.comparison import write_comparison
    from qtune.report.page import renewed_reports
    from qtune.screens import comparison as comparison_screen

    with renewed_reports(*opened):
        runs = compared_runs(
            targets,
            rows=rows,
            data_file=data,
            max_new_tokens=max_new_tokens,
            accepted=tuple(accept_drift or ()),
        )
    found = compared(runs)
    if as_json:
        console.out_json(found.to_json())
    else:
        comparison_screen.show(found)
    if page is not None:
        write_comparison(found, page)
        console.say(f"page: {page}")
