"""Rows and their copies on the screen: each word that came in is seen in what is asked and in what is answered."""

import io
from typing import Any

from rich.console import Console

from qtune.data.conversation import Conversation
from qtune.data.swapped import Copy
from qtune.screens.swap import draw_examples


def turns(*said: tuple[str, Any]) -> Conversation:
    return Conversation(tuple({"role": role, "content": text} for role, text in said))


def lines_of(talk: Conversation, copy: Copy, width: int = 120) -> list[str]:
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(draw_examples([(talk, copy)]))
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


def test_one_question_and_its_answer_are_a_line() -> None:
    talk, copy = (
        turns(("system", "Be short."), ("user", f"Call {name} now"), ("assistant", f"call {name}"))
        for name in ("Anna", "Lamp")
    )
    assert lines_of(talk, Copy(copy, {"Anna": "Lamp"})) == [
        "row   Call Anna now → call Anna",
        "copy  Call Lamp now → call Lamp",
    ]


def test_an_earlier_turn_in_which_a_word_was_exchanged_is_shown() -> None:
    talk, copy = (
        turns(
            ("system", "Take orders."),
            ("user", f"Six {thing}, please"),
            ("assistant", "Where to?"),
            ("user", "Porto, for Lena"),
            ("assistant", f"SHIP 6 x {thing} -> Porto (Lena)"),
        )
        for thing in ("lamp", "purs")
    )
    assert lines_of(talk, Copy(copy, {"lamp": "purs"})) == [
        "row   user: Six lamp, please",
        "      … 1 turn …",
        "      user: Porto, for Lena",
        "      assistant: SHIP 6 x lamp -> Porto (Lena)",
        "copy  user: Six purs, please",
        "      … 1 turn …",
        "      user: Porto, for Lena",
        "      assistant: SHIP 6 x purs -> Porto (Lena)",
    ]


def test_a_word_of_the_system_message_of_a_call_or_of_a_thought_is_seen_too() -> None:
    def made(system: str, place: str, plan: str) -> Conversation:
        call = {"type": "function", "function": {"name": "ask", "arguments": {"city": place}}}
        return Conversation(
            (
                {"role": "system", "content": f"You serve {system}."},
                {"role": "user", "content": f"How warm is {place}, {plan}?"},
                {"role": "assistant", "content": "I ask.", "tool_calls": [call]},
                {"role": "tool", "content": "21"},
                {"role": "assistant", "content": f"21, says {system}", "reasoning_content": f"They are {plan}."},
            )
        )

    talk, copy = made("Acme", "Porto", "leaving"), made("Lamp", "Purs", "moving")
    assert lines_of(talk, Copy(copy, {"Acme": "Lamp", "Porto": "Purs", "leaving": "moving"}))[5:] == [
        "copy  system: You serve Lamp.",
        "      user: How warm is Purs, moving?",
        '      assistant: I ask. ask({"city": "Purs"})',
        "      tool: 21",
        "      assistant: They are moving. 21, says Lamp",
    ]


def test_a_word_behind_the_begin_of_a_long_turn_is_shown_with_what_stands_around_it() -> None:
    def made(name: str, other: str) -> Conversation:
        asked = f"{'many words ' * 40}and then call {name} at once, {'more of them ' * 20}or {other}"
        return turns(("user", asked), ("assistant", f"{other}, {name}"))

    came = {"Anna": "Lamp", "Ben": "Purs"}
    lines = lines_of(made("Anna", "Ben"), Copy(made("Lamp", "Purs"), came), 2000)
    for line, (first, last) in zip(lines, (("Anna", "Ben"), ("Lamp", "Purs")), strict=True):
        assert f" call {first} at once, " in line
        assert f" or {last} → {last}, {first}" in line
        assert len(line) < 500


def test_what_came_in_is_marked_as_a_whole_word() -> None:
    talk = turns(("user", "Call Anna in the artshop"), ("assistant", "Anna"))
    copy = turns(("user", "Call art in the artshop"), ("assistant", "art"))
    drawn = list(draw_examples([(talk, Copy(copy, {"Anna": "art"}))]).columns[1].cells)[1]
    assert [(one.start, one.end) for one in drawn.spans] == [(5, 8), (26, 29)]
