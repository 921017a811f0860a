"""The demo: each command is shown, what is there is not computed again, and its last words say what to do with it."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from qtune import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo beside a `qtune` that says what it was called with and makes nothing but a run's adapter."""
    scripts = {
        "tools/setup.sh": "",
        ".venv/bin/qtune": 'echo "called: qtune $*"; mkdir -p runs/quickstart/adapter; '
        "touch runs/quickstart/adapter/adapter_config.json",
        ".venv/bin/python": 'echo "called: python $*"',
    }
    for name, text in scripts.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    return Path(shutil.copy(ROOT / "tools" / "demo.sh", tmp_path / "tools"))


def test_it_ends_with_what_was_made_and_what_can_be_done_with_it(demo: Path) -> None:
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for calls in (5, 4):  # the second time the run is there
        done = subprocess.run(["bash", str(demo)], capture_output=True, text=True, check=True)
        assert done.stdout.count("called: ") == calls
        assert done.stdout.count("called: qtune run ") == calls - 4
        said, *commands = done.stdout.rstrip().splitlines()[-3:]
        assert said.startswith("runs/quickstart holds the adapter, the whole model in model/, and report.html")
        for command, verb in zip(commands, ("chat", "init"), strict=True):
            program, named, *rest = shlex.split(command, comments=True)
            assert (program, named) == (".venv/bin/qtune", verb)
            assert {word for word in rest if word.startswith("-")} <= {
                option for one in verbs[verb].params for option in one.opts
            }
