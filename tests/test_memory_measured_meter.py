"""The allocator's snapshot: it covers the first steps, whatever becomes of the run; a CPU has none to give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from test_training_train import Killed, kill_in_step, run
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import InputError
from qtune.memory.measured.meter import Meter
from qtune.memory.measured.snapshot import SNAPSHOT_ENTRIES
from qtune.recipe.file import load_recipe
from qtune.run.folder import RunDir
from qtune.training import train


class Allocator:
    """Stands in for the CUDA allocator's history: what it was asked, and files where it wrote them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **asked: self.asked.append(asked))
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", self.dump)

    def dump(self, file: str) -> None:
        self.asked.append("dump")
        Path(file).write_bytes(b"history")


BEGIN, END = {"stacks": "python", "max_entries": SNAPSHOT_ENTRIES}, {"enabled": None}


def test_a_snapshot_ends_with_the_second_step_or_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    meter = Meter(torch.device("cpu"), snapshot=tmp_path / "a")
    assert allocator.asked == [BEGIN]
    for phase in ("forward", "optimizer", "idle", "forward", "optimizer"):
        meter.enter(phase)
        assert allocator.asked == [BEGIN]
    meter.enter("idle")
    assert allocator.asked == [BEGIN, "dump", END]
    meter.enter("optimizer")
    meter.close()
    assert allocator.asked == [BEGIN, "dump", END]
    assert meter.snapshot.said == f"{tmp_path}/a; https://pytorch.org/memory_viz draws it"

    short = Meter(torch.device("cpu"), snapshot=tmp_path / "no folder" / "b")
    short.enter("forward")
    short.close()
    assert allocator.asked[3:] == [BEGIN, "dump", END]
    assert short.snapshot.said.startswith("could not be written: [Errno 2]")
    Meter(torch.device("cpu")).close()
    assert len(allocator.asked) == 6


@pytest.mark.slow
def test_a_run_keeps_its_snapshot_beside_its_other_files(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(train, "require_allocator", lambda: None)
    recipe = write_recipe(training="steps = 3\nbatch_size = 2\nmicro_batch_size = 1\ncheckpoint_every = 1")
    with monkeypatch.context() as patch:
        kill_in_step(patch, 2)
        with pytest.raises(Killed):
            run(recipe)
    run_dir = recipe.parent / "runs" / "tiny"
    assert allocator.asked == []  # nobody asked for one
    train.resume(RunDir.open(run_dir), snapshot=True)
    assert allocator.asked == [BEGIN, "dump", END]
    assert (run_dir / "memory_snapshot.pickle").read_bytes() == b"history"
    said = f"allocator snapshot: {run_dir}/memory_snapshot.pickle; https://pytorch.org/memory_viz draws it\n"
    assert said in capsys.readouterr().err
    train.run(load_recipe(recipe), snapshot=True)
    assert (recipe.parent / "runs" / "tiny-2" / "memory_snapshot.pickle").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
def test_without_a_card_a_snapshot_is_refused_before_anything_is_done(write_recipe: WriteRecipe) -> None:
    recipe, threads = write_recipe(training="steps = 1"), torch.get_num_threads()
    message = (
        f"--memory-snapshot: only a CUDA card's allocator can be asked for it, and this would run on CPU, "
        f"{threads} thread{'' if threads == 1 else 's'}; leave it out"
    )
    with pytest.raises(InputError) as caught:
        train.run(load_recipe(recipe), snapshot=True)
    assert str(caught.value) == message
    asked = CliRunner().invoke(app, ["run", str(recipe), "--memory-snapshot"])
    assert (str(asked.exception), asked.stdout) == (message, "")
    assert not (recipe.parent / "runs").exists()
