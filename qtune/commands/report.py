"""`qtune report`: a run as a page."""

from pathlib import Path
from typing import Annotated

import typer

from qtune import console
from qtune.commands.shared import TrustOption, agree, say_drifts


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
        agree(run_dir)
    if trace:
        trace_memory(run_dir)
    console.out(f"{write_report(run_dir)}")
    say_drifts(run_dir)
