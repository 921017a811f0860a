"""A warm process ends, speaks and is stopped as one of its own would be."""

import signal
from pathlib import Path

import pytest
from conftest import WARM, run_qtune, run_warm, run_warm_qtune

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("print('said')", (0, "said\n", "")),
        ("import sys\nsys.exit(3)", (3, "", "")),
        ("import sys\nsys.exit('no')", (1, "", "no\n")),
        ("import sys\nprint('no', file=sys.stderr)", (0, "", "no\n")),
        ("import os, signal\nprint('begun', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", (-9, "begun\n", "")),
    ],
)
def test_it_ends_with_its_own_code_and_words(program: str, ended: tuple[int, str, str]) -> None:
    done = run_warm(program)
    assert (done.returncode, done.stdout, done.stderr) == ended


def test_an_error_is_a_traceback() -> None:
    done = run_warm("1 / 0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_it_has_its_arguments_its_environment_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = "import os, sys\nprint(sys.argv, os.environ['OF_ITS_OWN'], os.getcwd(), 'HOME' in os.environ)"
    process = WARM.start(program, "a", Path("b"), environment={"OF_ITS_OWN": "x"})
    assert process.communicate() == (f"['qtune', 'a', 'b'] x {tmp_path} False\n", "")


def test_more_than_a_pipe_holds_is_read() -> None:
    assert len(run_warm("print('a' * 1_000_000)").stdout) == 1_000_001


WAITING = """
import sys, time
from pathlib import Path
try:
    Path(sys.argv[1]).touch()
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGINT, (0, "interrupted\n")), (signal.SIGKILL, (-signal.SIGKILL, ""))]
)
def test_a_signal_reaches_it(number: int, ended: tuple[int, str], tmp_path: Path) -> None:
    process = WARM.start(WAITING, tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate()
    assert (process.returncode, said) == ended


def test_a_command_says_what_it_says_when_it_is_started(tmp_path: Path) -> None:
    asked = ("check", tmp_path / "none.toml")
    cold, warm = run_qtune(*asked), run_warm_qtune(*asked)
    assert cold.returncode == 2
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
