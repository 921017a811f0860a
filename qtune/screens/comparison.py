"""The screen of `qtune compare`."""

from typing import TYPE_CHECKING

from qtune import console

if TYPE_CHECKING:
    from qtune.comparing.table import SideBySide


def show(comparison: "SideBySide") -> None:
    """Prints a line for each configuration, and what its figures are."""
    from qtune.comparing.table import cells, explanation, task_cells

    head, rows = cells(comparison)
    console.out(console.on_its_side(comparison.asked, head, rows, right=range(2, len(head))))
    console.out("")
    if comparison.tasks:
        head, rows = task_cells(comparison)
        console.out(console.on_its_side("Benchmarks", head, rows, right=range(2, len(head))))
        console.out("")
    for sentence in explanation(comparison):
        console.out(sentence)
