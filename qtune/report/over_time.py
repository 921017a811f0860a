"""What the model said to the same rows while it trained, one answer above the other."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from qtune.report.html import Html, element, table
from qtune.report.sections import paragraph, section
from qtune.run.metrics import AnswersRecord, SampleAnswer

MOST_ANSWERS = 12
"""To one question; of more the first, the last and some between are shown."""

Said = tuple[int, SampleAnswer]
"""An answer and the step after which it was given."""


def answers_over_time(records: Sequence[AnswersRecord]) -> Html:
    """Each sampled row with its answers, step by step."""
    # Not by place: a run that goes on names the same file from another folder. Rows that ask the same, or begin with
    # the same long text, are told apart by their order, which is that of the rows.
    asked: dict[tuple[str, str, int], list[Said]] = {}
    for record in records:
        seen: Counter[tuple[str, str]] = Counter()
        for one in record.answers:
            row = (one.request, one.expected)
            asked.setdefault((*row, seen[row]), []).append((record.step, one))
            seen[row] += 1
    return section(
        "What it answered while it trained",
        paragraph(
            "The same held-out rows after each evaluation, answered greedily; an ellipsis: it was stopped there."
        ),
        *(part for said in asked.values() for part in _question(said)),
    )


def _question(said: Sequence[Said]) -> list[Html]:
    one = said[0][1]
    rows = [(_steps(together), _marked(together[0][1])) for together in _shown(said)]
    last = f"; what it answers is {one.last_turn}" if one.last_turn else ""
    told = f"Asked {one.other_turns} of the conversation{last}."
    others = [element("p", told, class_="dim")] if one.other_turns else []
    return [
        element("h3", one.request or one.place),
        *others,
        table(("after step", "its answer"), [*rows, ("expected", one.expected)], class_="answers steps"),
    ]


def _shown(said: Sequence[Said]) -> list[list[Said]]:
    """Equal answers that follow each other as one, and of those at most as many as a page bears."""
    together = [list(group) for _, group in groupby(said, key=lambda one: one[1].answer)]
    if len(together) <= MOST_ANSWERS:
        return together
    last = len(together) - 1
    return [together[round(at * last / (MOST_ANSWERS - 1))] for at in range(MOST_ANSWERS)]


def _steps(together: Sequence[Said]) -> str:
    first, last = together[0][0], together[-1][0]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _marked(one: SampleAnswer) -> str:
    return f"✓ {one.answer}" if one.answer == one.expected else one.answer
