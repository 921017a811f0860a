"""`qtune list`: the runs of a folder."""

from pathlib import Path
from typing import Annotated

import typer

from qtune import console
from qtune.verbs import RUNS


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
