"""`qtune doctor`: this computer, and what qtune would choose on it."""

from typing import Annotated

import typer

from qtune import console
from qtune.commands.shared import load_libraries
from qtune.errors import LibraryError
from qtune.verbs import RUNS


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
        load_libraries()
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
