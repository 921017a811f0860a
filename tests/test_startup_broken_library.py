"""A library that cannot be imported is named by every verb, doctor before all, and not by a traceback."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import QtuneError
from qtune.startup.imports import LIBRARIES


def said_by_doctor() -> str:
    error = CliRunner().invoke(app, ["doctor"]).exception
    assert isinstance(error, QtuneError)
    return str(error)


@pytest.mark.parametrize("library", LIBRARIES)
def test_doctor_names_a_library_that_cannot_be_imported(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{library}.py").write_text("raise ImportError('no part.so\\nbecause of it')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library, raising=False)
    said = said_by_doctor()
    assert said.startswith(f"{library} ")
    assert ": cannot be imported (ImportError: no part.so); pip install --force-reinstall " in said
    pip = said.partition("--force-reinstall ")[2].partition(", or")[0].strip("'")
    assert Requirement(pip).name == library


def test_doctor_names_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.startup.imports.LIBRARIES", ("no_such_library",))
    assert said_by_doctor() == "no_such_library: is not installed; pip install no_such_library"
