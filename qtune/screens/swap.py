"""Rows of `qtune swap` beside what has become of them."""

from typing import TYPE_CHECKING, Any

from rich.text import Text

from qtune.console import BareTable
from qtune.data.swapped import places_of
from qtune.tuned.asked import text_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from qtune.data.conversation import Conversation
    from qtune.data.swapped import Copy

LONGEST = 300
"""Characters of a message that are shown from its begin on."""
AROUND = 30
"""Characters that are shown on both sides of a word that stands behind them."""


def draw_examples(examples: "Sequence[tuple[Conversation, Copy]]") -> BareTable:
    """Of each row what was asked and answered, and below it the same of its copy, what came in marked.

    Where a word was exchanged in another turn too, or in one by another role, each of these turns has a line with its
    role: a copy can be judged only where its words are seen in what is asked and in what is answered.
    """
    table = BareTable(show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for talk, copy in examples:
        shown = _shown_turns(talk, copy.exchanged)
        table.add_row("row", _turns(talk, shown, copy.exchanged))
        came_in = set(copy.exchanged.values())
        changed = _turns(copy.talk, shown, came_in)
        for start, end in places_of(came_in, changed.plain):
            changed.stylize("bold", start, end)
        table.add_row("copy", changed)
    return table


def _shown_turns(talk: "Conversation", words: "Collection[str]") -> list[int]:
    """The places of the last two turns and of those in which one of the words stands."""
    count = len(talk.messages)
    return [at for at, one in enumerate(talk.messages) if at >= count - 2 or places_of(words, _said(one))]


def _turns(talk: "Conversation", shown: "Sequence[int]", words: "Collection[str]") -> Text:
    """A question and its answer in a line, where these are all that is shown; else a line for each turn."""
    turns = [(talk.messages[at]["role"], _shortened(_said(talk.messages[at]), words)) for at in shown]
    if [role for role, _ in turns] == ["user", "assistant"]:
        return Text(f"{turns[0][1]} → {turns[1][1]}")
    lines: list[str] = []
    for at, before, (role, text) in zip(shown, (-1, *shown), turns, strict=False):
        left_out = sum(one["role"] != "system" for one in talk.messages[before + 1 : at])
        if left_out:
            lines.append("… 1 turn …" if left_out == 1 else f"… {left_out} turns …")
        lines.append(f"{role}: {text}")
    return Text("\n".join(lines))


def _said(message: dict[str, Any]) -> str:
    """All of a message in which words are exchanged, and the functions that it calls."""
    return " ".join(filter(None, (message.get("reasoning_content"), text_of(message))))


def _shortened(text: str, words: "Collection[str]") -> str:
    """How a text begins, and of what follows the surroundings of each of the words that has not been shown by then."""
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    end, parts = LONGEST - 1, [line[: LONGEST - 1]]
    seen: set[str] = set()
    for start, stop in places_of(words, line):
        if stop > end and line[start:stop] not in seen:
            begin, before, end = max(end, start - AROUND), end, min(len(line), stop + AROUND)
            parts.append(f"{'…' if begin > before else ''}{line[begin:end]}")
        seen.add(line[start:stop])
    return f"{''.join(parts)}{'…' if end < len(line) else ''}"
