"""How OpenMP's threads wait, in the environment, before torch reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtune.startup.waiting_threads import SPINS, WAITING, let_waiting_threads_sleep


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.setenv(name, "")  # what the code under test writes is put back as well
        monkeypatch.delenv(name)


def test_waiting_threads_sleep_soon():
    let_waiting_threads_sleep()
    assert os.environ[SPINS[0]] == SPINS[1]


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "infinity")])
def test_the_users_own_way_of_waiting_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    said = {known: os.environ[known] for known in WAITING if known in os.environ}
    assert said == {name: value}


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's wheels elsewhere have other OpenMP libraries")
def test_the_openmp_library_that_torch_brings_obeys():
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    assert library.is_file(), "torch brings another OpenMP library: does it read GOMP_SPINCOUNT?"
    let_waiting_threads_sleep()
    shown = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"],
        env=os.environ | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{SPINS[1]}'" in shown.stderr
