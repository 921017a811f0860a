"""The quickstart data: the files are what the tool makes, and the test rows are unseen in every way that counts."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "recipes" / "data"


def load_tool():
    spec = importlib.util.spec_from_file_location("make_quickstart_data", ROOT / "tools" / "make_quickstart_data.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in (DATA / f"quickstart_{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def requests(name: str) -> list[str]:
    return [row["messages"][0]["content"] for row in rows(name)]


def answers(name: str) -> list[str]:
    return [row["messages"][1]["content"] for row in rows(name)]


def meanings(name: str) -> list[tuple[tuple[str, object], ...]]:
    """Every answer as its (key, value) pairs: the command and the combination of its arguments."""
    return [tuple(sorted(json.loads(answer).items())) for answer in answers(name)]


def test_there_are_enough_rows():
    assert len(rows("train")) >= 600
    assert len(rows("test")) >= 100


@pytest.mark.parametrize("name", ["train", "test", "swapped"])
def test_the_files_are_what_the_tool_makes(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_quickstart_data.py", "--output", str(tmp_path)])
    load_tool().main()
    assert (tmp_path / f"quickstart_{name}.jsonl").read_bytes() == (DATA / f"quickstart_{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_row_is_a_request_and_one_json_command(name):
    for row in rows(name):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        command = json.loads(row["messages"][1]["content"])
        assert json.dumps(command, ensure_ascii=False) == row["messages"][1]["content"]
        assert all(isinstance(value, str | int) for value in command.values())


@pytest.mark.parametrize("name", ["train", "test"])
def test_no_row_is_there_twice(name):
    assert max(Counter(request.casefold() for request in requests(name)).values()) == 1
    assert max(Counter(meanings(name)).values()) == 1


def test_no_test_request_is_in_the_training_rows():
    assert not {r.casefold() for r in requests("train")} & {r.casefold() for r in requests("test")}


def test_no_test_command_has_arguments_seen_in_training():
    assert not set(meanings("train")) & set(meanings("test"))


def test_no_test_answer_text_is_in_the_training_rows():
    assert not set(answers("train")) & set(answers("test"))


def test_the_commands_are_balanced_and_asked_for_in_many_ways():
    tool = load_tool()
    for name in ("train", "test"):
        commands = Counter(json.loads(answer)["command"] for answer in answers(name))
        assert set(commands) == {command.name for command in tool.COMMANDS}
        assert max(commands.values()) == min(commands.values())
    assert all(len(set(command.phrasings)) >= 10 for command in tool.COMMANDS)


def test_each_kind_of_command_has_one_set_of_keys():
    keys = {(json.loads(answer)["command"], tuple(json.loads(answer))) for answer in answers("train") + answers("test")}
    assert len(keys) == len({command for command, _ in keys}) >= 6


@pytest.mark.parametrize("name", ["train", "test"])
def test_everything_that_an_answer_says_stands_in_its_request(name):
    for request_, answer in zip(requests(name), answers(name), strict=True):
        for key, value in json.loads(answer).items():
            assert key == "command" or str(value).casefold() in request_.casefold(), (request_, answer)


def test_a_message_is_sent_as_it_was_said_to_whom_it_was_said():
    told = [(r, a) for r, a in zip(requests("train"), answers("train"), strict=True) if r.startswith("Tell ")]
    messages = [(r.removeprefix("Tell ").split(" that ", 1), a) for r, a in told if " that " in r]
    assert messages
    for (to, text), answer in messages:
        assert answer == json.dumps({"command": "send_message", "to": to, "text": text})


def test_another_seed_makes_other_rows():
    tool = load_tool()
    assert tool.make_rows(1) != tool.make_rows(2)
    assert tool.make_rows(1) == tool.make_rows(1)
