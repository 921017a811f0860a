"""Ctrl-C ends every verb with one line, what is kept, and 130; at any moment, and without a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import Interrupted
from qtune.run.folder import RunDir
from qtune.verbs import KEPT

COMMANDS = {
    "init": ["init", "--base", "org/base", "--data", "rows.jsonl", "-o", "new.toml"],
    "run": ["run", "recipe.toml"],
    "check": ["check", "recipe.toml"],
    "profile": ["profile", "recipe.toml"],
    "fit": ["fit", "recipe.toml"],
    "swap": ["swap", "recipe.toml"],
    "eval": ["eval", "runs/x"],
    "compare": ["compare", "runs/x", "runs/y"],
    "export": ["export", "runs/x"],
    "report": ["report", "runs/x"],
    "chat": ["chat", "runs/x"],
    "list": ["list", "."],
}


def ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_verb_that_is_stopped_says_what_is_kept(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "recipe.toml").write_text('[model]\nbase = "org/base"\n[data]\ntrain = "rows.jsonl"\n')
    monkeypatch.setattr("qtune.recipe.file.load_recipe", ctrl_c)
    monkeypatch.setattr("qtune.run.folder.RunDir.open", ctrl_c)
    monkeypatch.setattr("qtune.run.listing.list_runs", ctrl_c)
    monkeypatch.setattr("qtune.init.look_at", ctrl_c)
    monkeypatch.setattr("qtune.tuned.target.run_meant", ctrl_c)
    ended = CliRunner().invoke(app, COMMANDS[verb])
    assert isinstance(ended.exception, Interrupted)
    assert str(ended.exception) == (f"stopped; {KEPT[verb]}" if verb in KEPT else "stopped")
    assert ended.exception.exit_code == 130


RECIPE = '[model]\nbase = "builtin:smollm2-135m-instruct"\n[data]\ntrain = "rows.jsonl"\n[output]\ndirectory = "runs"\n'


@pytest.mark.parametrize("verb", ["run", "run --seeds 2", "init"])
def test_a_verb_that_is_stopped_after_it_has_saved_its_work_does_not_say_that_there_is_none(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's report and figures, the next seed, what is said of the rows: all come after what is kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "recipe.toml").write_text(RECIPE)
    ended = iter([RunDir(tmp_path / "runs" / "one")])
    monkeypatch.setattr("qtune.training.train.run", lambda *_, **__: next(ended, None) or ctrl_c())
    monkeypatch.setattr("qtune.commands.run._show_end", (lambda _: None) if "seeds" in verb else ctrl_c)
    monkeypatch.setattr("qtune.init.said_of_rows", ctrl_c)
    words = [*COMMANDS["init"], "-o", "new.toml"] if verb == "init" else [*verb.split(), "recipe.toml"]
    said = str(CliRunner().invoke(app, words).exception)
    assert said.startswith("stopped; ")
    assert "no step" not in said
    assert "no recipe" not in said
    if verb == "run":
        folder = tmp_path / "runs" / "one"
        assert said == f"stopped; {folder} has ended, and is saved; its report: qtune report {folder}"


PROGRAM = """
import os, signal, sys
from qtune.startup import interrupts
{before}
os.kill(os.getpid(), signal.SIGINT)
sys.stderr.write("went on")
"""
SWALLOWED = "interrupts.take_interrupts()\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: pass"

GOES_ON = f"{SWALLOWED}\ninterrupts.take_again()\n{SWALLOWED.partition(chr(10))[2]}"


@pytest.mark.parametrize("before", ["interrupts.keep_nothing_yet()", SWALLOWED, GOES_ON])
def test_the_end_is_at_once_and_one_line(before: str) -> None:
    """At the start; after one that was swallowed; after one that was answered and another that was swallowed."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")


def test_the_command_can_be_stopped_while_it_imports_and_says_one_line() -> None:
    """Whenever that is: the first line is there before the libraries are."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qtune", "doctor"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "loading the libraries …\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    # On a busy machine one library takes longer than three seconds, and the next one is named.
    said = [line for line in err.splitlines() if not line.startswith("loading the libraries: ")]
    assert (process.returncode, out, said) == (130, "", ["stopped"])
