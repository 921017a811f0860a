"""Whose a run's folder is, where two computers or containers give processes the same numbers."""

import fcntl
import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from qtune.errors import RunError
from qtune.records import plain
from qtune.run.folder import RunDir
from qtune.run.owner import FILE, Owner, owned, owner_of


def written(run: RunDir, **changes: object) -> None:
    me = psutil.Process().create_time()
    owner = plain(Owner(os.getpid(), socket.gethostname(), me, "then"))
    (run.path / FILE).write_text(json.dumps({**owner, **changes}))


def test_a_process_of_another_container_with_the_same_number_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    run = RunDir(tmp_path)
    written(run)
    assert owner_of(run) is None, "this process"
    written(run, host="elsewhere")
    owner = owner_of(run)
    assert owner is not None
    assert owner.host == "elsewhere"
    with pytest.raises(RunError, match=f"belongs to process {os.getpid()} on elsewhere"), owned(run):
        pass


def test_a_lock_that_a_process_of_the_same_number_holds_is_not_this_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    began = psutil.Process().create_time()
    written(run, process_started=began - 1000)
    with (run.path / FILE).open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        owner = owner_of(run)
        assert owner is not None
        assert owner.process_started == pytest.approx(began - 1000)
        written(run)
        assert owner_of(run) is None
