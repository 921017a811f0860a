"""Nothing that a row, an answer or a file name holds can command a terminal or a page."""

import io
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from qtune import console
from qtune.control_characters import visible
from qtune.report.html import element

COMMANDS = ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\x08\x08", "a\rb", "\x7f", "\u202egnp.exe", "\u2066x\u2069"]
RAW = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"} | set("\u202e\u2066\u2069")


@pytest.fixture(params=["file", "terminal"])
def stdout(request, monkeypatch):
    """stdout as a file and as a terminal, without colours so that no code of ours is in it."""
    stream = io.StringIO()
    stream.isatty = lambda: request.param == "terminal"
    monkeypatch.setattr("qtune.console.sys", SimpleNamespace(stdout=stream, stderr=stream))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    return stream


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reaches_the_terminal(stdout, command):
    console.out(command)
    console.out(Text(command, style="bold"))
    console.out(console.table(command, [command], [[command], [Text(command)]]))
    console.out_raw(command)
    assert not RAW & set(stdout.getvalue())


def test_a_command_is_shown_as_its_escape(stdout):
    console.out("[red] \x1b[31m esc \u202e")
    assert stdout.getvalue() == "[red] \\x1b[31m esc \\u202e\n"


@given(st.text())
def test_visible_text_keeps_everything_else(text):
    shown = visible(text)
    assert not RAW & set(shown)
    assert "".join(c for c in text if visible(c) == c) == "".join(c if visible(c) == c else "" for c in text)
    assert visible(shown) == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_json_says_the_same_with_its_own_escapes(stdout, command):
    console.out_json({"answer": command})
    assert not RAW & set(stdout.getvalue())
    assert json.loads(stdout.getvalue()) == {"answer": command}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reaches_the_page(command):
    page = element("p", command, title=command)
    assert not RAW & set(page)
    assert element("p", "<script>") == "<p>&lt;script&gt;</p>"


def test_a_progress_display_shows_brackets_of_a_file_name(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("qtune.console.sys", SimpleNamespace(stdout=stream, stderr=stream))
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress("reading rows[bold].jsonl", 2) as bar:
        bar.advance()
    assert "rows[bold].jsonl" in stream.getvalue()
