"""A run's folder: names that are free, files that are whole, errors that say which run is meant."""

import json
import os
import time
from pathlib import Path

import pytest

from qtune.errors import RunError
from qtune.run.folder import RunDir, newest_unfinished


def started(directory: Path, name: str) -> RunDir:
    run = RunDir.create(directory, name, "# a recipe\n")
    run.write_text(run.resolved_file, "# resolved\n")
    return run


def finish(run: RunDir) -> None:
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")


def test_a_taken_name_gets_the_next_number(tmp_path: Path) -> None:
    runs = [RunDir.create(tmp_path / "runs", "quick", "text") for _ in range(3)]
    assert [run.path.name for run in runs] == ["quick", "quick-2", "quick-3"]
    assert runs[2].recipe_file.read_text() == "text"


def test_open_wants_a_run_and_names_those_that_are_there(tmp_path: Path) -> None:
    run = started(tmp_path, "quick")
    assert RunDir.open(run.path) == run
    with pytest.raises(RunError) as caught:
        RunDir.open(tmp_path / "quikc")
    assert str(caught.value) == f"{tmp_path}/quikc: no such folder; runs there: {run.path}"
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError) as caught:
        RunDir.open(tmp_path / "other")
    assert str(caught.value) == f"{tmp_path}/other: is not a run: it has no resolved.toml"


def test_a_run_without_an_adapter_says_how_to_finish_it(tmp_path: Path) -> None:
    run = started(tmp_path, "quick")
    with pytest.raises(RunError) as caught:
        run.finished_adapter()
    assert str(caught.value) == f"{run.path}: has no adapter yet; finish it with: qtune run --resume {run.path}"
    finish(run)
    assert run.finished_adapter() == run.adapter


def test_json_keeps_its_letters_and_a_broken_file_is_named(tmp_path: Path) -> None:
    run = started(tmp_path, "quick")
    run.write_json(run.lock_file, {"name": "Käthe", "numbers": [1, 2]})
    assert "Käthe" in run.lock_file.read_text(encoding="utf-8")
    assert run.read_json(run.lock_file) == {"name": "Käthe", "numbers": [1, 2]}
    run.memory_file.write_text("{")
    with pytest.raises(RunError, match=rf"^{run.memory_file}: cannot be read: Expecting property name"):
        run.read_json(run.memory_file)
    with pytest.raises(RunError, match=rf"^{run.eval_file}: cannot be read: .*No such file"):
        run.read_json(run.eval_file)
    json.loads(run.lock_file.read_text(encoding="utf-8"))


def test_the_newest_unfinished_run_of_a_name_is_found(tmp_path: Path) -> None:
    assert newest_unfinished(tmp_path / "none", "quick") is None
    first, second, third = (started(tmp_path, "quick") for _ in range(3))
    started(tmp_path, "quick-lora")
    started(tmp_path, "quickest")
    for age, run in enumerate((third, second, first)):
        os.utime(run.resolved_file, (time.time() - 60 * age,) * 2)
    finish(third)
    assert newest_unfinished(tmp_path, "quick") == second


def test_a_name_may_hold_what_a_pattern_would_mean(tmp_path: Path) -> None:
    run = started(tmp_path, "try[1]")
    assert newest_unfinished(tmp_path, "try[1]") == run
