"""The page of `qtune compare`: the same table, and the same policy as a run's own page."""

from pathlib import Path

from qtune.comparing.table import SideBySide, cells, explanation, task_cells
from qtune.disk import told
from qtune.errors import WorkError
from qtune.report.html import Html, element, table
from qtune.report.page import document
from qtune.whole import write_text


def write_comparison(comparison: SideBySide, file: Path) -> None:
    """Writes the page.

    Raises:
        WorkError: it cannot be written.
    """
    with told(WorkError):
        write_text(file, comparison_page(comparison))


def comparison_page(comparison: SideBySide) -> Html:
    """The whole page; it loads and runs nothing."""
    columns, rows = cells(comparison)
    count, runs = len(comparison.lines), sum(len(line.runs) for line in comparison.lines)
    title = f"{count} configuration{'' if count == 1 else 's'}, {runs} runs"
    folders = [(line.name, ", ".join(line.runs), ", ".join(map(str, line.seeds))) for line in comparison.lines]
    return document(
        title,
        element("h1", title),
        element("p", comparison.asked, class_="dim"),
        table(columns, rows, figures=range(2, len(columns))),
        *_tasks(comparison),
        *(element("p", sentence, class_="dim") for sentence in explanation(comparison)),
        element("h2", "The runs"),
        table(("run", "folders", "seeds"), folders),
    )


def _tasks(comparison: SideBySide) -> list[Html]:
    """The benchmarks, where all runs were asked the same."""
    if not comparison.tasks:
        return []
    columns, rows = task_cells(comparison)
    return [element("h2", "Benchmarks"), table(columns, rows, figures=range(2, len(columns)))]
