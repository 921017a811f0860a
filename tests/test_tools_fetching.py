"""tools/setup.sh says what it fetches and how much, without pip's wall of text, and fails where pip does."""

import os
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import fetching  # noqa: E402  after the path

PIP = """\
Looking in indexes: https://pypi.org/simple
WARNING: Location 'file:///nowhere/' is ignored: it is neither a file nor a directory.
Obtaining file:///home/me/qtune
Collecting bitsandbytes<0.51,>=0.50 (from qtune==0.1.0)
  Downloading bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl (43.1 MB)
Collecting typer<1,>=0.20 (from qtune==0.1.0)
  Downloading typer-0.29.2-py3-none-any.whl.metadata (16 kB)
Collecting torch<2.15,>=2.9 (from qtune==0.1.0)
  Using cached torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (1.1 GB)
  Downloading anyio-4.16.0-py3-none-any.whl (114 kB)
"""
DONE = "Installing collected packages: torch, typer, anyio\nSuccessfully installed torch-2.13.0\n"


class Terminal(StringIO):
    """A screen that is one."""

    def isatty(self) -> bool:
        return True


def told(text: str, screen: StringIO) -> str:
    log = StringIO()
    fetching.tell(text.splitlines(keepends=True), log, screen)
    assert log.getvalue() == text, "nothing that pip said is lost"
    return re.sub(r"\d+ s\b", "N s", screen.getvalue())


def test_a_file_gets_a_line_for_each_large_package_and_the_sum() -> None:
    assert told(PIP + DONE, StringIO()).splitlines() == [
        "bitsandbytes-0.50.2 (43 MB)",
        "torch-2.13.0 (1,100 MB, in the cache)",
        "fetched 2 files, 43 MB; installing 3 packages …",
        "fetched 2 files, 43 MB, in N s with installing",
    ]


def test_a_terminal_has_one_line_that_is_drawn_anew() -> None:
    shown = told(PIP + DONE, Terminal())
    assert shown.count("\n") == 1
    assert "\r\033[K1 files, 43 MB, N s: bitsandbytes-0.50.2 (43 MB)" in shown
    assert "\r\033[K2 files, 43 MB, N s: installing 3 packages" in shown
    assert "WARNING" not in shown


@pytest.mark.parametrize("screen", [StringIO, Terminal])
def test_errors_are_shown_as_pip_says_them(screen: type[StringIO]) -> None:
    shown = told(f"{PIP}ERROR: No matching distribution found for torch\n", screen())
    assert "ERROR: No matching distribution found for torch\n" in shown


FAKE = """\
#!/usr/bin/env bash
case "$*" in
    "-c"*) exit 0 ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/bin/qtune && chmod +x .venv/bin/qtune ;;
    "-m pip"*) cat pip.txt; exit "$(cat pip.rc)" ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize("code", [0, 1])
def test_the_setup_is_done_where_pip_was_and_else_says_where_to_look(tmp_path: Path, code: int) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("pyproject.toml", "tools/constraints.txt", "tools/setup.sh", "tools/fetching.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "pip.txt").write_text(PIP + (DONE if code == 0 else "ERROR: No space left on device\n"))
    (tmp_path / "pip.rc").write_text(str(code))
    command = ["bash", str(tmp_path / "tools" / "setup.sh")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": str(python)}
    )
    assert done.returncode == code, done.stderr
    assert "packages, PyTorch the largest; all that pip says is in .venv/pip.log\n" in done.stderr
    assert "bitsandbytes-0.50.2 (43 MB)\n" in done.stderr
    assert (tmp_path / ".venv" / "installed").is_file() == (code == 0)
    assert ("pip could not install them; what it said is in .venv/pip.log" in done.stderr) == (code == 1)
    assert len(done.stderr.splitlines()) < 16
