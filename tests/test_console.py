"""What people see: results and messages on their streams, and the training display, whole."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, Group
from rich.text import Text

from qtune import console
from qtune.console import clock
from qtune.run.metrics import AnswersRecord, EvalRecord, NoteRecord, TrainRecord
from qtune.screens.time import UNKNOWN
from qtune.training import display as training
from qtune.training.display import TrainingDisplay, plain_line

TRAIN = TrainRecord(
    step=20,
    steps=75,
    epoch=0.2667,
    loss=0.34567,
    accuracy=0.9123,
    learning_rate=9.5e-4,
    gradient_norm=1.25,
    tokens_per_second=1234.5,
    memory_bytes=3 * 2**29,
    memory_peak_bytes=9 * 2**28,
    seconds=40.0,
)
EVAL = EvalRecord(step=20, steps=75, epoch=0.2667, loss=0.25, accuracy=0.95, seconds=41.0)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves: its one element is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A recorded terminal, 80 columns wide, in place of stderr."""
    recorded = Console(
        file=io.StringIO(), record=True, force_terminal=True, width=80, height=30, markup=False, highlight=False
    )
    monkeypatch.setattr(training, "live_console", lambda: recorded)
    monkeypatch.setattr(console, "live_console", lambda: recorded)
    return recorded


# --- streams -------------------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_messages_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.out("runs/quick")
    console.say("loading")
    console.say_error("recipe.toml:1: model.base: is required and missing\nrecipe.toml:2: data: …")
    streams = capsys.readouterr()
    assert streams.out == "runs/quick\n"
    assert streams.err == (
        "loading\nerror: recipe.toml:1: model.base: is required and missing\nrecipe.toml:2: data: …\n"
    )


def test_text_of_users_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[red]no[/red] :smile: {x} 'a' 12 " + "long " * 60
    console.out(text)
    console.say(text)
    assert capsys.readouterr() == (f"{text}\n", f"{text}\n")


def test_json_is_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    console.out_json({"name": "Käthe " * 50})
    written = capsys.readouterr().out
    assert json.loads(written) == {"name": "Käthe " * 50}
    assert "Käthe" in written


def test_a_table_in_a_file_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["forward", "1.25 GiB", "exact " * 8], [Text("backward"), "11.00 GiB", ""]]
    console.out(console.table("Peaks", ["phase", "peak", "how"], rows, right=[1]))
    assert capsys.readouterr().out.splitlines() == [
        "Peaks",
        "phase          peak  how",
        f"forward    1.25 GiB  {'exact ' * 7}exact",
        "backward  11.00 GiB",
    ]


def test_no_line_of_a_table_ends_with_spaces_whatever_its_last_column_holds(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = console.BareTable(show_header=False)
    drawn.add_column(style="dim", no_wrap=True)
    for row in (("a b ", "one\nmore than one"), ("empty", ""), ("styled", Text("x", style="bold"))):
        drawn.add_row(*row)
    console.out(Group(Text("above"), drawn, Text("below")))
    assert capsys.readouterr().out == "above\na b     one\n        more than one\nempty\nstyled  x\nbelow\n"


def test_every_table_that_ends_up_in_a_file_is_one_without_spaces_at_its_ends() -> None:
    """The display of a run draws one of rich's: it is redrawn on a terminal, and a file has lines in its place."""
    package = Path(console.__file__).parent
    users = [file for file in package.rglob("*.py") if "from rich.table import" in file.read_text(encoding="utf-8")]
    assert sorted(file.relative_to(package).as_posix() for file in users) == ["console.py", "training/display.py"]


def test_progress_in_a_file_is_a_line_as_it_begins_and_one_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("merging", 10) as bar:
        for _ in range(10):
            bar.advance()
    with console.progress("loading") as bar:
        bar.advance()
    assert capsys.readouterr() == (
        "",
        "merging …\nmerging: 30 %\nmerging: 50 %\nmerging: 80 %\nmerging: 100 %\nloading …\n",
    )


def test_progress_in_a_file_ends_at_the_end_also_where_there_was_less_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("asking", 10) as bar:
        bar.advance(8)
    assert capsys.readouterr().err == "asking …\nasking: 80 %\nasking: 100 %\n"

    def fail() -> None:
        with console.progress("asking", 10) as bar:
            bar.advance(8)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr().err == "asking …\nasking: 80 %\n"


def test_work_of_which_nobody_knows_how_much_there_is_has_a_line_for_each_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress("tracing") as bar:
        bar.tell("1 x 128 tokens")
        bar.tell("1 x 128 tokens")
        bar.tell("2 x 128 tokens")
    assert capsys.readouterr() == ("", "tracing …\ntracing: 1 x 128 tokens\ntracing: 2 x 128 tokens\n")


@pytest.mark.parametrize(("rows", "tokens"), [(120, 96), (1, 3), (3, 256)])
def test_rows_of_which_shares_are_done_are_whole_at_the_end(
    rows: int, tokens: int, terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is a share of its row: what is shown counts whole rows, and the last one too."""
    shown: list[float] = []
    monkeypatch.setattr(console.Progress, "update", lambda self, task, **said: shown.append(said["completed"]))
    with console.progress("asking", rows) as bar:
        for _ in range(rows * tokens):
            bar.advance(1 / tokens)
    assert shown[-1] == rows
    assert [int(one) for one in shown[tokens - 1 :: tokens]] == list(range(1, rows + 1))


def test_on_a_terminal_the_part_that_is_worked_on_stands_beside_the_bar(
    terminal: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("tracing") as bar:
        bar.tell("1 x 128 tokens")
        bar.tell("2 x 128 tokens")
    assert capsys.readouterr() == ("", "")
    shown = terminal.export_text()
    assert "tracing: 2 x 128 tokens" in shown
    assert "?" not in shown  # no bar of which nobody knows how long it is


def test_progress_on_a_terminal_is_a_bar_that_goes_away(terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("merging", 4) as bar:
        bar.update(1, description="merging shard 1")
        bar.update(3)
    assert capsys.readouterr() == ("", "")
    assert "merging shard 1" in terminal.export_text()


# --- training ------------------------------------------------------------------------------------------------------


def test_a_record_of_training_is_one_line() -> None:
    assert plain_line(TRAIN, 130.4) == (
        "step 20/75  epoch 0.27  loss 0.3457  accuracy 91.2%  lr 9.50e-04  tokens/s 1,234  "
        "memory 1.50 GiB, peak 2.25  2:10 left"
    )
    assert plain_line(EVAL, None) == "step 20: validation loss 0.2500, accuracy 95.0%"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3600, "1:00:00"), (5025, "1:23:45")],
)
def test_time_is_shown_as_clocks_do(seconds: float | None, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_log_has_a_line_every_five_seconds_the_first_the_last_and_every_evaluation(
    capsys: pytest.CaptureFixture[str], hands: list[float]
) -> None:
    with TrainingDisplay() as display:
        for step in range(1, 11):
            hands[0] += 2
            display.show(replace(TRAIN, step=step, steps=10))
            if step == 5:
                display.show(NoteRecord("out of memory: [split]"))
                display.show(replace(EVAL, step=5, steps=10))
    streams = capsys.readouterr()
    figures = "epoch 0.27  loss 0.3457  accuracy 91.2%  lr 9.50e-04  tokens/s 1,234  memory 1.50 GiB, peak 2.25"
    assert streams.out == ""
    assert streams.err.splitlines() == [
        f"step 1/10  {figures}",
        f"step 4/10  {figures}  0:12 left",
        "out of memory: [split]",
        "step 5: validation loss 0.2500, accuracy 95.0%",
        f"step 8/10  {figures}  0:04 left",
        f"step 10/10  {figures}  0:00 left",
    ]


def test_a_resumed_run_counts_its_own_pace(capsys: pytest.CaptureFixture[str], hands: list[float]) -> None:
    with TrainingDisplay() as display:
        display.show(replace(TRAIN, step=60))
        hands[0] += 10
        display.show(replace(TRAIN, step=65))
    assert capsys.readouterr().err.splitlines()[-1].endswith("0:20 left")


def test_a_terminal_shows_one_display_that_is_redrawn(terminal: Console, hands: list[float]) -> None:
    with TrainingDisplay() as display:
        display.show(replace(TRAIN, step=10, loss=1.5))
        hands[0] += 20
        display.show(EVAL)
        display.show(NoteRecord("stopping after this step; once more stops at once"))
        display.show(TRAIN)
    last = [line.rstrip() for line in terminal.export_text().splitlines()][-3:]
    assert last == [
        "step 20/75 ━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ epoch 0.27 1:50 left",
        "loss 0.3457   accuracy 91.2%   eval loss 0.2500   lr 9.50e-04",
        "tokens/s 1,234   memory 1.50 GiB, peak 2.25",
    ]


def test_a_note_stands_above_the_display(terminal: Console, hands: list[float]) -> None:
    with TrainingDisplay() as display:
        display.show(TRAIN)
        display.show(NoteRecord("[stopping]"))
    assert "[stopping]" in terminal.export_text()


def test_what_is_waited_for_is_said_as_it_begins_in_a_file_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.waiting("loading [the libraries]"):
        assert capsys.readouterr() == ("", "loading [the libraries] …\n")
    assert capsys.readouterr() == ("", "")
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(console, "live_console", lambda: screen)
    with console.waiting("loading [the libraries]"):
        pass
    assert isinstance(screen.file, io.StringIO)
    assert "loading [the libraries]" in screen.file.getvalue()


def test_a_long_wait_names_the_part_that_it_is_for(
    capsys: pytest.CaptureFixture[str], hands: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file, once three seconds have passed without a line; on a terminal always."""
    with console.waiting("loading the libraries") as tell:
        for library, seconds in (("torch", 2.0), ("bitsandbytes", 2.0), ("datasets", 0.5), ("peft", 3.0), ("trl", 0.0)):
            tell(library)
            hands[0] += seconds
    assert capsys.readouterr().err.splitlines() == [
        "loading the libraries …",
        "loading the libraries: datasets",
        "loading the libraries: trl",
    ]
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(console, "live_console", lambda: screen)
    with console.waiting("loading the libraries") as tell:
        tell("[torch]")
        screen_text = screen.file.getvalue  # type: ignore[attr-defined]
        console.live_console().line()
    assert "loading the libraries: [torch]" in screen_text()


def test_what_is_said_stands_above_whatever_redraws_itself_and_displays_stand_above_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(console.sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with console.waiting("rehearsing"):
        with console.progress("loading", 4):
            console.say("keeping the model")
        with TrainingDisplay() as display:
            display.show(TRAIN)
            display.show(NoteRecord("a note"))
            console.say("a message")
    for said in ("keeping the model", "a note", "a message"):
        before = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\0", stream.getvalue().partition(said)[0])
        assert before.rpartition("\r")[2].rpartition("\n")[2].strip("\0") == "", "in a line of its own"


def test_what_is_done_between_two_steps_is_shown_until_the_next_record(terminal: Console, hands: list[float]) -> None:
    with TrainingDisplay() as display:
        display.beside("step 0: measuring the validation loss")
        display.show(TRAIN)
        display.beside("step 20: asking 3 validation rows", 0.5)
        assert display._live is not None
        display._live.refresh()
        assert "step 20: asking 3 validation rows, 50% …" in terminal.export_text()
        display.show(AnswersRecord(20, 75, 0.2667, 42.0, ()))
        terminal.export_text()  # what was drawn until then
    assert "asking" not in terminal.export_text()


def test_in_a_file_it_has_a_line_as_it_begins_and_one_every_five_seconds(
    capsys: pytest.CaptureFixture[str], hands: list[float]
) -> None:
    with TrainingDisplay() as display:
        for _ in range(2):
            display.beside("step 20: asking 3 validation rows")
            for tenth in range(1, 10):
                hands[0] += 1.1
                display.beside("step 20: asking 3 validation rows", tenth / 10)
            display.show(EVAL)
    once = ["step 20: asking 3 validation rows …", "step 20: asking 3 validation rows, 50% …"]
    evaluated = "step 20: validation loss 0.2500, accuracy 95.0%"
    assert capsys.readouterr().err.splitlines() == [*once, evaluated, *once, evaluated]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LONG = f"runs/{'a-name-of-many-words-' * 4}"


@pytest.mark.parametrize(
    "command",
    [
        f"qtune run --resume {LONG}",
        f"ollama create better -f {LONG}/Modelfile && ollama run better",
        f"vllm serve {LONG} --served-model-name better --max-model-len 8192",
    ],
)
@pytest.mark.parametrize(
    "said",
    ["stopped at step 2, which is saved\ngo on with: {}", "  {}  # what it does", "use it with one of:\n  here:  {}"],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_command_is_one_line_on_the_narrowest_terminal(
    monkeypatch: pytest.MonkeyPatch, command: str, said: str, grouped: bool
) -> None:
    for name, speak in (("stderr", console.say), ("stdout", console.out), ("stderr", console.say_error)):
        stream = Terminal()
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(f"sys.{name}", stream)
        text = said.format(command)
        prose = "words that are longer than forty columns are folded between them, as they were"
        if speak is console.say_error:
            speak(f"{prose}\n{text}")
        else:
            speak(Group(Text(prose), Text(text)) if grouped else f"{prose}\n{text}")
        lines = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()
        assert [line for line in lines if command in line], "whole"
        assert max(len(line) for line in lines if command not in line) <= 40
        assert prose not in "\n".join(lines), "and prose is folded"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("indent", ["", "    "])
def test_a_command_that_ends_too_long_a_sentence_stands_below_it(
    monkeypatch: pytest.MonkeyPatch, width: int, indent: str
) -> None:
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", stream)
    said, command = UNKNOWN.rsplit(": ", 1)
    long_said = f"{said} {'and so on ' * 9}here"
    console.out(Text(f"{indent}{UNKNOWN}\n{indent}{long_said}: {command}", style="dim"))
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()]
    assert max(map(len, lines)) <= width
    one = [f"{indent}{said}:", f"{indent}  {command}"] if width == 80 else [f"{indent}{said}: {command}"]
    assert lines[: len(one)] == one
    assert lines[-1] == f"{indent}  {command}"
    assert " ".join(line.strip() for line in lines[len(one) : -1]) == f"{long_said}:"


def test_an_error_about_a_verb_s_option_is_wrapped_as_any_sentence_and_its_command_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown_of(message: str) -> list[str]:
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        console.say_error(message)
        return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()]

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    place = "qtune export --verify-only: its value is missing"
    lines = shown_of(f"{place}: a folder that was exported before, as RUN/model; of its GGUF files the checksums")
    assert lines[0].startswith(f"error: {place}:")
    assert max(map(len, lines)) <= 60
    command = "qtune run --resume runs/one-with-a-long-name"
    assert shown_of(f"{place} in one of many ways: {command}")[-1] == f"  {command}"


def test_an_indented_line_goes_on_indented_where_a_terminal_folds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "rows.jsonl:11 (answer is empty), rows.jsonl:21 (no 'answer' in a question-answer row)"
    said = Text(f"warning  skipped: some\n         at {words}\n  qtune check {'long' * 20}")
    for terminal, expected in (
        (True, "         at rows.jsonl:11 (answer is\n         empty), rows.jsonl:21 (no"),
        (False, f"         at {words}\n"),
    ):
        stream = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")
        console.out(Group(said))
        shown = "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
        assert expected in shown
        assert f"\n  qtune check {'long' * 20}\n" in shown


def test_a_line_that_must_not_be_folded_is_not_cut_either(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", stream)
    console.out(Group(Text("x" * 90, no_wrap=True, overflow="ignore")))
    assert "x" * 90 in stream.getvalue()


@pytest.mark.parametrize(("columns", "width"), [("", 120), ("60", 60), ("no number", 120), ("0", 120)])
def test_a_pipe_is_as_wide_as_it_is_told(monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
    """The demo keeps what it shows by way of one."""
    stream = io.StringIO()
    monkeypatch.setenv("QTUNE_WIDTH", columns)
    monkeypatch.setattr("sys.stdout", stream)
    console.out(console.table("", ("name", "what"), [("a", "word " * 60)]))
    assert max(map(len, stream.getvalue().splitlines())) in range(width - 10, width + 1)


def test_what_a_step_was_predicted_to_take_is_called_that() -> None:
    """ "1.61 (0.40)" says nothing to who has not read the code."""
    timed = replace(TRAIN, step_seconds=1.61, predicted_step_seconds=0.4)
    assert "  s/step 1.61 (predicted 0.40)  memory " in plain_line(timed, None)
    assert "  s/step 1.61  memory " in plain_line(replace(timed, predicted_step_seconds=None), None)
