"""A library that cannot be imported is named by every verb, doctor before all, and not by a traceback."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from qtune.cli import app
from qtune.startup.imports import LIBRARIES, import_libraries


def said_by_doctor() -> tuple[str, str]:
    """Of the library that stands in the way: what was found, and the way out. The rest is told beside it."""
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1, done.exception
    findings = json.loads(done.stdout)
    assert {"qtune", "python"} <= {one["name"] for one in findings}
    (broken,) = (one for one in findings if one["verdict"] == "problem")
    assert [one["name"] for one in findings].count(broken["name"]) == 1, "no version of it beside it"
    return f"{broken['name']} {broken['value']}", broken["advice"]


@pytest.fixture
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    library = request.param
    (tmp_path / f"{library}.py").write_text("raise ImportError('no part.so\\nbecause of it')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library, raising=False)
    return library


@pytest.mark.parametrize("broken", LIBRARIES, indirect=True)
def test_doctor_names_a_library_that_cannot_be_imported_also_to_programs(broken: str) -> None:
    said, advice = said_by_doctor()
    assert said.startswith(f"{broken} version ")
    assert said.endswith(" cannot be imported (ImportError: no part.so)")
    pip = advice.removeprefix("pip install --force-reinstall ").partition(", or")[0].strip("'")
    assert Requirement(pip).name == broken


@pytest.mark.parametrize("broken", LIBRARIES[:1], indirect=True)
def test_doctor_shows_people_the_same_and_other_verbs_say_it(broken: str) -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("✗"))
    assert line.split()[1] == broken
    assert done.stdout.endswith("1 problem\n")
    error = CliRunner().invoke(app, ["profile", "quickstart"]).exception
    assert str(error).startswith(f"{broken}: version ")


def test_doctor_names_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.startup.imports.LIBRARIES", ("no_such_library",))
    assert said_by_doctor() == ("no_such_library is not installed", "pip install no_such_library")


def test_each_library_is_named_as_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_there_yet.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("qtune.startup.imports.LIBRARIES", ("json", "not_there_yet"))
    told: list[str] = []

    @contextmanager
    def waiting(for_what: str) -> Iterator[Callable[[str], None]]:
        told.append(for_what)
        yield told.append

    import_libraries(waiting)
    assert told == ["loading the libraries", "json, 1 of 2", "not_there_yet, 2 of 2"]
