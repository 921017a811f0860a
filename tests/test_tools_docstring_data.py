"""The docstring rows: what the interpreter itself says, several thousand, the same on every call, nothing executed."""

import importlib.util
import inspect
import itertools
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "make_docstring_data.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_docstring_data", TOOL)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up here when its annotations are strings.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tool) -> list[tuple[str, str]]:
    return [tuple(message["content"] for message in row["messages"]) for row in tool.make_rows()]


@pytest.mark.slow
def test_there_are_several_thousand_rows_of_very_different_length(rows):
    lengths = sorted(len(answer) for _, answer in rows)
    assert len(rows) > 5000
    assert lengths[len(lengths) // 10] < 40
    assert lengths[-len(lengths) // 100] > 1000


@pytest.mark.slow
def test_no_question_is_asked_twice_and_no_answer_is_empty(rows):
    assert len({question for question, _ in rows}) == len(rows)
    assert all(answer == answer.strip() and len(answer) >= 20 for _, answer in rows)


@pytest.mark.slow
def test_answers_are_what_inspect_says(rows):
    answers = dict(rows)
    assert answers["What is the class itertools.groupby?"] == inspect.getdoc(itertools.groupby)
    assert answers["What does math.comb do?"] == inspect.getdoc(math.comb)
    assert answers["What does textwrap.dedent do?"] == inspect.getdoc(textwrap.dedent)
    assert answers["What is the module json for?"] == inspect.getdoc(json).strip()
    iterencode = inspect.getdoc(json.JSONEncoder.iterencode).strip()
    assert answers["What does the method json.encoder.JSONEncoder.iterencode do?"] == iterencode


@pytest.mark.slow
def test_signatures_are_what_inspect_says(rows):
    answers = dict(rows)
    assert answers["What is the signature of textwrap.shorten?"] == "shorten(text, width, **kwargs)"
    assert answers["What is the signature of math.isclose?"] == f"isclose{inspect.signature(math.isclose)}"


@pytest.mark.slow
def test_the_summary_is_the_first_paragraph_on_one_line(rows):
    assert dict(rows)["Describe textwrap.shorten in one paragraph."] == (
        "Collapse and truncate the given text to fit in the given width."
    )


@pytest.mark.slow
def test_the_same_call_gives_the_same_rows_and_a_limit_keeps_the_first(tool, rows):
    again = [tuple(message["content"] for message in row["messages"]) for row in tool.make_rows(50)]
    assert again == rows[:50]


@pytest.mark.slow
def test_private_names_and_test_suites_stay_out(rows):
    words = {word.strip("?") for question, _ in rows for word in question.split() if "." in word.strip("?.")}
    assert not {word for word in words if any(part.startswith("_") for part in word.split("."))}
    assert not {word for word in words if word.split(".")[0] in ("test", "idlelib", "turtledemo")}
    assert not {word for word in words if "tests" in word.split(".")}


@pytest.mark.slow
def test_making_rows_runs_no_library_module(tmp_path):
    """`this` prints a poem, `antigravity` opens a browser, `turtle` wants a screen: none may have been imported."""
    program = (
        f"import runpy, sys; sys.argv = ['make', {str(tmp_path / 'rows.jsonl')!r}, '--rows', '5']\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "assert not {'this', 'antigravity', 'turtle', 'tkinter', 'idlelib', 'webbrowser'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'rows.jsonl'}: 5 rows\n", "")
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [[m["role"] for m in json.loads(line)["messages"]] for line in lines] == [["user", "assistant"]] * 5
