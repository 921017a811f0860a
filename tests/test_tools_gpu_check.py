"""tools/gpu/check.sh with a Python that pretends to have a card: what fails is said, and is its exit status."""

import os
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parent.parent / "tools" / "gpu" / "check.sh"

# What is asked for a text answers with a path or a name; what is named in $FAILING fails.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*"$FAILING"*) exit 1 ;;
*builtin_folder*) echo /nowhere ;;
*runs.py*) echo 1b-1x2048 ;;
*collect.py*) echo "{}" ;;
*trl_script.py*) echo '{"rows": 4}' ;;
esac
"""


def check(folder: Path, failing: str, *parts: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("python", PYTHON), ("nvidia-smi", "#!/usr/bin/env bash\necho a card\n")):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(folder / "bin" / "python"),
        "OUT": str(folder / "out"),
        "WORK": str(folder / "work"),
        "FAILING": failing,
    }
    return subprocess.run(["bash", str(CHECK), *parts], env=environment, capture_output=True, text=True, check=False)


def test_a_whole_check_writes_its_measurements(tmp_path: Path) -> None:
    done = check(tmp_path, failing="nothing at all")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"measurements.json", "tests.txt", "logs.tar.gz"}


def test_a_part_that_there_is_not_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    done = check(tmp_path, "nothing at all", "memroy")
    assert done.returncode == 2
    assert "no part is called memroy; there are memory, trl and tests" in done.stderr


@pytest.mark.parametrize(
    ("failing", "named"),
    [
        ("-m pytest", "tests, tests.txt"),
        ("1b-1x2048.toml", "1b-1x2048, logs/1b-1x2048.log"),
        ("make_checkpoint.py 8b", "checkpoint 8b"),
        ("trl_script.py", "TRL, logs/trl-4.log"),
        ("alone-8b-4x2048", "logs/alone-8b-4x2048.log"),
        ("8b-4x2048-auto", "logs/8b-4x2048-auto.log"),
        ("collect.py", "no measurements.json"),
        ("runs.py", "runs.py"),
        ("make_rows.py", "make_rows.py"),
    ],
)
def test_what_fails_is_named_and_is_the_exit_status(failing: str, named: str, tmp_path: Path) -> None:
    done = check(tmp_path, failing)
    assert done.returncode == 1, done.stdout
    assert named in (tmp_path / "out" / "failed.txt").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "logs.tar.gz").is_file(), "the logs of what failed are kept"
