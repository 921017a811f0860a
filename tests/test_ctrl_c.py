"""The suite ends at a Ctrl-C that a test has taken for its own, and not at one that a test has sent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROGRAM = """
import os, signal
from ctrl_c import CTRL_C

def test_first():
    signal.signal(signal.SIGINT, lambda *_: None)
    {press}

def test_second():
    pass
"""


@pytest.mark.parametrize(
    ("press", "code", "passed"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", pytest.ExitCode.INTERRUPTED, "1 passed"),
        ("CTRL_C.press()", pytest.ExitCode.OK, "2 passed"),
        ("if not os.fork(): os.kill(os.getpid(), signal.SIGINT); os._exit(0)\n    os.wait()", 0, "2 passed"),
    ],
    ids=["a person", "the test", "a process that it forks"],
)
def test_a_ctrl_c_that_is_caught_ends_the_suite_after_its_test(
    tmp_path: Path, press: str, code: int, passed: str
) -> None:
    file = tmp_path / "test_pressed.py"
    file.write_text(PROGRAM.format(press=press))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(file)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert passed in done.stdout
