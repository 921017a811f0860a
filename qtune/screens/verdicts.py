"""The verdicts at the end of a run and above an evaluation's tables."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qtune import console
from qtune.verdicts.verdict import MARKS, Verdict


def show(verdicts: Sequence[Verdict], *, as_messages: bool = False) -> None:
    """Prints a question in a word, its answer and the sentence of each; as messages where stdout has another result."""
    (console.say if as_messages else console.out)(Group(*_lines(verdicts)))


def _lines(verdicts: Sequence[Verdict]) -> Iterator[RenderableType]:
    """Each in a table of its own, for the command below it is one line, whatever the width: a broken one cannot be
    pasted."""
    width = max((len(one.question) for one in verdicts), default=0) + 1
    for one in verdicts:
        drawn = console.table("", ["", "", ""], [[MARKS[one.standing], f"{one.question}?", one.told]])
        drawn.title, drawn.show_header = None, False
        drawn.columns[1].min_width = width
        yield drawn
        if one.command is not None:
            yield Text(f"{'':{width + 5}}{one.command}", no_wrap=True, overflow="ignore")
