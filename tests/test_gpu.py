"""What only a CUDA card can show. Run by tools/check_gpu.sh; skipped where torch sees no card."""

import json
import subprocess
import sys

import pytest
import torch

from qtune.run_dir import RunDir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def qtune(*arguments: str) -> str:
    """Runs the command as a user would and returns what it printed to stdout."""
    done = subprocess.run([sys.executable, "-m", "qtune", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    """A short run of the quickstart on the card, with everything left to its rules."""
    folder = tmp_path_factory.mktemp("runs")
    changes = ["training.steps=12", f"output.directory={folder}"]
    return RunDir(folder / qtune("run", "quickstart", *(part for change in changes for part in ("--set", change))))


def losses(run_dir: RunDir) -> list[float]:
    records = map(json.loads, run_dir.metrics_file.read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_training_in_the_dtype_of_the_card_lowers_the_loss(run_dir):
    first, *_, last = losses(run_dir)
    assert last < 0.7 * first


def test_the_card_computes_in_16_bits(run_dir):
    expected = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    assert f'compute_dtype = "{expected}"' in run_dir.resolved_file.read_text()


def test_the_allocator_is_asked_for_every_phase(run_dir):
    phases = run_dir.read_json(run_dir.memory_file)["measured"]["phases"]
    for name in ("load", "forward", "backward", "optimizer"):
        assert phases[name]["allocated_peak_bytes"] > 50 * 2**20, name
        assert phases[name]["reserved_peak_bytes"] >= phases[name]["allocated_peak_bytes"], name


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_the_optimizers_of_bitsandbytes_train_on_the_card(optimizer, tmp_path):
    changes = ["training.steps=12", f"training.optimizer={optimizer}", f"output.directory={tmp_path}"]
    trained = RunDir(tmp_path / qtune("run", "quickstart", *(part for change in changes for part in ("--set", change))))
    first, *_, last = losses(trained)
    assert last < 0.7 * first


def test_the_export_is_the_model_that_was_trained_on_the_card(run_dir):
    assert qtune("export", str(run_dir.path)) == str(run_dir.path / "model")
