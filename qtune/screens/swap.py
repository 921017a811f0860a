"""Rows of `qtune swap` beside what has become of them."""

from typing import TYPE_CHECKING

from rich.text import Text

from qtune.console import BareTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtune.data.conversation import Conversation
    from qtune.data.swapped import Copy

LONGEST = 300
"""Characters of a message that are shown."""


def draw_examples(examples: "Sequence[tuple[Conversation, Copy]]") -> BareTable:
    """Of each row what was asked and answered, and below it the same of its copy, what came in marked."""
    table = BareTable(show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for talk, copy in examples:
        table.add_row("row", _last_turns(talk))
        shown = _last_turns(copy.talk)
        shown.highlight_words(list(copy.exchanged.values()), style="bold", case_sensitive=False)
        table.add_row("copy", shown)
    return table


def _last_turns(talk: "Conversation") -> Text:
    """The last question and its answer, or the calls that are it."""
    asked, answered = talk.messages[-2:]
    return Text(" → ").join(
        Text(_shortened(message.get("content") or str(message.get("tool_calls")))) for message in (asked, answered)
    )


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
