"""The verdicts at the end of a run and above an evaluation's tables."""

from collections.abc import Sequence

from qtune import console
from qtune.verdicts.verdict import MARKS, Verdict


def show(verdicts: Sequence[Verdict], *, as_messages: bool = False) -> None:
    """Prints a question in a word, its answer and the sentence of each; as messages where stdout has another result."""
    rows = [[MARKS[one.standing], f"{one.question}?", one.text] for one in verdicts]
    drawn = console.table("", ["", "", ""], rows)
    drawn.title, drawn.show_header = None, False
    (console.say if as_messages else console.out)(drawn)
