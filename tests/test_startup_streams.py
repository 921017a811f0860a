# ruff: noqa: E501
"""Output that ends before the work does: quiet ends where nobody reads on, and work that goes on without its messages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WriteRecipe, warm_qtune_process

from qtune.startup.streams import BROKEN_PIPE_CODE
from qtune.training.callbacks import StopOnSignal

ROOT = str(Path(__file__).parent.parent)


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `qtune` is the command."""
    python = f'qtune() {{ "{sys.executable}" -m qtune "$@"; }}; set -o pipefail; {command}'
    changed = {**os.environ, "PYTHONPATH": ROOT, **environment}
    return subprocess.run(["bash", "-c", python], capture_output=True, text=True, env=changed, check=False)


LONG = {"help": "run --help", "a table": "init --list", "JSON": "init --schema"}


@pytest.mark.parametrize("arguments", LONG.values(), ids=LONG)
def test_a_reader_that_leaves_ends_a_verb_quietly(arguments: str) -> None:
    ended = shell(f"qtune {arguments} | true; exit ${{PIPESTATUS[0]}}")
    assert (ended.returncode, ended.stderr) in ((BROKEN_PIPE_CODE, ""), (0, ""))  # 0: it was quicker than its reader


def test_a_reader_that_has_left_before_the_verb_began_is_told_by_its_exit_code() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "qtune", "init", "--schema"]
    ended = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}, check=False
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (BROKEN_PIPE_CODE, b"")


@pytest.mark.parametrize("arguments", LONG.values(), ids=LONG)
def test_a_full_disk_under_the_output_is_one_sentence(arguments: str) -> None:
    ended = shell(f"qtune {arguments} > /dev/full")
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: the output cannot be written: No space left on device; what the verb keeps in files is there\n"
    )


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2> >(true)", ">&- 2>&-"])
def test_messages_that_cannot_be_written_change_nothing(where: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[model]\nbse = 1\n")
    ended = shell(f"qtune run {tmp_path}/wrong.toml {where}")
    assert (ended.returncode, ended.stdout) == (2, "")


def test_closed_streams_are_no_reason_to_fail() -> None:
    assert shell("qtune --version >&- 2>&-").returncode == 0


@pytest.mark.parametrize("environment", [{"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}], ids=["LANG=C", "ascii"])  # fmt: skip
@pytest.mark.slow
def test_what_a_terminal_cannot_show_is_shown_as_an_escape(environment: dict[str, str], tmp_path: Path) -> None:
    ended = shell(f"qtune check {tmp_path}/café-日本.toml", **environment)
    assert ended.returncode == 2
    assert "caf\\xe9-\\u65e5\\u672c.toml: no such file" in ended.stderr.replace("\n", " ").replace(
        "\\udcc3\\udca9", "\\xe9"
    ) or ("no such file" in ended.stderr and "Traceback" not in ended.stderr)
    listed = shell("qtune init --schema", **environment)
    assert listed.returncode == 0
    assert json.loads(listed.stdout)["title"] == json.loads(shell("qtune init --schema").stdout)["title"]


def test_a_closed_terminal_stops_a_run_like_the_systems_own_request() -> None:
    asked: list[bool] = []
    stop = StopOnSignal(lambda: asked.append(True))
    before = signal.getsignal(signal.SIGHUP)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGHUP)
    assert (asked, stop.requested) == ([True], True)
    assert signal.getsignal(signal.SIGHUP) is before


def test_under_nohup_a_closed_terminal_is_nothing_to_stop_for() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopOnSignal(lambda: None)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


RUN = "steps = 40\nbatch_size = 2\ncheckpoint_every = 2\nlog_every = 1"


@pytest.mark.slow
def test_a_run_goes_on_when_its_messages_end(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(training="steps = 6\nbatch_size = 2")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "qtune", "run", str(recipe)]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=writing, env={**os.environ, "PYTHONPATH": ROOT}, check=False
    )
    os.close(writing)
    assert (ended.returncode, ended.stdout.decode()) == (0, f"{tmp_path}/runs/tiny\n")
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_second_ctrl_c_says_what_is_saved(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    from test_training_train import wait_for_step

    recipe, metrics = write_recipe(training=RUN.replace("40", "4000")), tmp_path / "runs" / "tiny" / "metrics.jsonl"
    process = warm_qtune_process("run", recipe)
    wait_for_step(process, metrics, 5)
    process.send_signal(signal.SIGSTOP)  # both arrive before the step has ended
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, messages = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in messages
    assert "is saved, and what came after it is not" in messages or "which is saved" in messages
    assert f"go on with: qtune run --resume {tmp_path}/runs/tiny" in messages


@pytest.mark.slow
def test_a_hangup_saves_and_the_run_goes_on_later(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    from test_training_train import wait_for_step

    recipe, metrics = write_recipe(training=RUN.replace("40", "4000")), tmp_path / "runs" / "tiny" / "metrics.jsonl"
    process = warm_qtune_process("run", recipe)
    wait_for_step(process, metrics, 3)
    process.send_signal(signal.SIGHUP)
    _, messages = process.communicate()
    assert process.returncode == 130
    assert "which is saved" in messages
