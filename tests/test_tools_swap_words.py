"""Rows with other words say the same thing of other words: what an answer copies is still in its request."""

import json
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
WORDS = ["walrus", "granite", "seldom"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DATA.parent.parent / "tools"))
    import swap_words

    return swap_words


def row(request: str, answer: str, *before: dict[str, str]) -> dict[str, object]:
    messages = [*before, {"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def test_a_word_that_is_copied_becomes_the_same_other_word_in_both(tool: ModuleType) -> None:
    one = row("Call Maria, or Maria's brother", '{"call": "Maria"}')
    for seed in range(20):
        request, answer = tool.contents(tool.swapped(one, {"Maria"}, WORDS, random.Random(seed)))
        name = json.loads(answer)["call"]
        assert request == f"Call {name}, or {name}'s brother"
        assert name in {"Maria", *(word.capitalize() for word in WORDS)}


def test_words_of_the_form_of_answers_stay(tool: ModuleType) -> None:
    names = {"Maria", "Tom", "Anna", "David", "Sarah", "Peter", "Olga", "Lucas", "Paul", "Elena", "Laura"}
    rows = [row("call a number now", f'{{"call": "number", "of": "{name}"}}') for name in sorted(names)]
    assert tool.own_words(rows) == names
    assert tool.swapped_rows(rows, WORDS, 1) == rows, "names stand in no request, and the rest is form"


def test_a_word_within_a_longer_one_stays(tool: ModuleType) -> None:
    one = row("feed the cat in the cathedral", "cat")
    seen = {tool.contents(tool.swapped(one, {"cat"}, WORDS, random.Random(seed))) for seed in range(20)}
    assert seen == {("feed the cat in the cathedral", "cat")} | {
        (f"feed the {word} in the cathedral", word) for word in WORDS
    }


def test_earlier_messages_and_other_keys_stay(tool: ModuleType) -> None:
    system = {"role": "system", "content": "Maria is the owner"}
    one = row("Call Maria", "Maria", system) | {"id": 7}
    made = tool.swapped(one, {"Maria"}, WORDS, random.Random(1))
    assert made["messages"][0] == system
    assert [message["role"] for message in made["messages"]] == ["system", "user", "assistant"]
    assert made["id"] == 7
    assert one["messages"][1] == {"role": "user", "content": "Call Maria"}, "the row that was given is as it was"


def test_the_quickstarts_swapped_rows_are_what_the_tool_makes(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    made = tmp_path / "made.jsonl"
    copies = ["--copies", "2"]
    monkeypatch.setattr("sys.argv", ["swap_words.py", str(DATA / "quickstart_train.jsonl"), str(made), *copies])
    tool.main()
    assert made.read_bytes() == (DATA / "quickstart_swapped.jsonl").read_bytes()


def test_no_swapped_row_is_a_test_row(tool: ModuleType) -> None:
    test, swapped = (tool.read(DATA / f"quickstart_{name}.jsonl") for name in ("test", "swapped"))
    asked, answered = ({tool.contents(one)[place].casefold() for one in test} for place in (0, 1))
    assert not asked & {tool.contents(one)[0].casefold() for one in swapped}
    assert not answered & {tool.contents(one)[1].casefold() for one in swapped}


def test_what_an_answer_takes_from_its_request_is_still_there(tool: ModuleType) -> None:
    for one in tool.read(DATA / "quickstart_swapped.jsonl"):
        request, answer = tool.contents(one)
        for key, value in json.loads(answer).items():
            assert key == "command" or re.search(rf"(?i)\b{re.escape(str(value))}\b", request), (request, answer)
