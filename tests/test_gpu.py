"""What only a CUDA card can show. Run by tools/check_gpu.sh; skipped where torch sees no card."""

import contextlib
import gc
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtune.device.present import present_device
from qtune.errors import OutOfMemory
from qtune.model.builtin import builtin_folder
from qtune.model.host import activations_on_host
from qtune.model.load import load_base
from qtune.model.loss import tiled_cross_entropy
from qtune.model.stored_rows import CompressedRows, HostRows
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.shipped import find_recipe
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe
from qtune.startup.allocator import VARIABLES
from qtune.training import train
from qtune.training.trainer import QloraTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

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
    phases = json.loads(run_dir.memory_file.read_text())["measured"]["phases"]
    for name in ("load", "forward", "backward", "optimizer"):
        assert phases[name]["allocated_peak_bytes"] > 50 * 2**20, name
        assert phases[name]["reserved_peak_bytes"] >= phases[name]["allocated_peak_bytes"], name


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_the_optimizers_of_bitsandbytes_train_on_the_card(optimizer, tmp_path):
    changes = ["training.steps=12", f"training.optimizer={optimizer}", f"output.directory={tmp_path}"]
    trained = RunDir(tmp_path / qtune("run", "quickstart", *(part for change in changes for part in ("--set", change))))
    first, *_, last = losses(trained)
    assert last < 0.7 * first


def test_embeddings_and_activations_in_host_memory_give_the_same_losses_in_less_of_the_cards(run_dir, tmp_path):
    changes = ["training.steps=12", f"output.directory={tmp_path}", "training.gradient_checkpointing=true"]
    changes += [f"training.micro_batch_size={resolved_recipe(run_dir).training.micro_batch_size}"]
    peaks, curves = [], []
    for where in ("device", "host"):
        here = [*changes, f"memory.embeddings={where}", f"memory.activations={where}", f"output.name={where}"]
        trained = RunDir(
            tmp_path / qtune("run", "quickstart", *(part for change in here for part in ("--set", change)))
        )
        curves.append(losses(trained))
        phases = json.loads(trained.memory_file.read_text())["measured"]["phases"]
        peaks.append({name: phases[name]["allocated_peak_bytes"] for name in ("load", "forward", "backward")})
    # The head's blocks are summed in another order, and 16 bits round each sum.
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
    on_card, on_host = peaks
    embeddings = 49152 * 576 * 2  # SmolLM2 135M: vocabulary x hidden x 16 bits, tied
    assert on_card["load"] - on_host["load"] > 0.9 * embeddings
    assert on_card["backward"] - on_host["backward"] > 0.9 * embeddings


@pytest.mark.parametrize(("how", "bits", "rel"), [("int8", 8.5, 0.05), ("nf4", 4.5, 0.25)])
def test_compressed_embeddings_train_on_the_card_in_their_own_size(run_dir, how, bits, rel, tmp_path):
    changes = ["training.steps=12", f"output.directory={tmp_path}", f"memory.embeddings={how}"]
    changes += [f"training.micro_batch_size={resolved_recipe(run_dir).training.micro_batch_size}"]
    trained = RunDir(tmp_path / qtune("run", "quickstart", *(part for change in changes for part in ("--set", change))))
    # The step by step losses follow those of the run whose tables are whole: only the tables' rounding is between.
    assert losses(trained) == pytest.approx(losses(run_dir), rel=rel)
    held = [
        json.loads(run.memory_file.read_text())["measured"]["phases"]["forward"]["allocated_peak_bytes"]
        for run in (run_dir, trained)
    ]
    saved = 49152 * 576 * (16 - bits) / 8  # SmolLM2 135M: vocabulary x hidden, tied
    assert held[0] - held[1] > 0.8 * saved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_compressed_rows_read_back_on_the_card_as_on_the_processor(how, dtype):
    weight = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    there, here = (CompressedRows(weight.to(device), how, torch.device(device)) for device in ("cuda", "cpu"))
    assert float((there.codes.cpu() != here.codes).float().mean()) < 1e-3  # ties are rounded either way
    there.codes, there.scales = here.codes.cuda(), here.scales.cuda()
    ids = torch.tensor([[0, 7, 999], [5, 5, 400]])
    for ours, theirs in (
        (there.block(10, 700, torch.device("cuda")), here.block(10, 700, torch.device("cpu"))),
        (there.look_up(ids.cuda()), here.look_up(ids)),
    ):
        assert ours.is_cuda
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.cpu(), theirs, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_the_quantized_copy_is_the_model_that_the_card_has_quantized(tmp_path, monkeypatch):
    from qtune.model import quantized_copy

    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_copy, "FROM_BYTES", 1)
    folder = tmp_path / "base"
    shutil.copytree(builtin_folder("smollm2-135m-instruct"), folder)
    recipe = parse_recipe({"model": {"base": str(folder)}, "data": {"train": "rows.jsonl"}, "quantization": {}})
    plan = make_plan(recipe, present_device())
    made, read = (
        {name: value.cpu() for name, value in load_base(recipe.model, recipe.quantization, plan).state_dict().items()}
        for _ in range(2)
    )
    assert list((tmp_path / "cache" / "quantized").iterdir())
    assert made.keys() == read.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, read[name]), name


def test_saved_activations_wait_in_pinned_memory_and_come_back_bit_for_bit():
    weight = torch.randn(512, 512, device="cuda", requires_grad=True)
    x = torch.randn(4096, 512, device="cuda")
    left: list[torch.Tensor] = []
    gradients = []
    for around in (contextlib.nullcontext(), activations_on_host(torch.nn.Identity(), left.append)):
        weight.grad = None
        with around:
            y = (x @ weight).tanh().square().sum()
        y.backward()
        gradients.append(weight.grad.clone())
    assert left
    assert all(tensor.is_pinned() for tensor in left)
    assert torch.equal(*gradients)


def test_a_head_in_pinned_memory_scores_as_one_on_the_card():
    hidden = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5000, 256, dtype=torch.bfloat16).pin_memory()
    labels = torch.randint(0, 5000, (300,), device="cuda")
    results = []
    for head in (HostRows(weight), weight.cuda()):
        hidden.grad = None
        loss, correct, _ = tiled_cross_entropy(hidden, head, None, labels, tile_bytes=2**19)
        loss.backward()
        results.append((loss, correct, hidden.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_snapshot_of_the_allocator_is_what_pytorchs_viewer_reads(tmp_path):
    changes = ["--set", "training.steps=3", "--set", f"output.directory={tmp_path}"]
    folder = RunDir(tmp_path / qtune("run", "quickstart", "--memory-snapshot", *changes))
    # As torch.cuda._memory_viz, the viewer's command line, reads it.
    with folder.snapshot_file.open("rb") as stream:
        snapshot = pickle.load(stream)
    assert snapshot["segments"]
    allocated = [event for trace in snapshot["device_traces"] for event in trace if event["action"] == "alloc"]
    assert len(allocated) > 1000
    assert any("qtune" in frame["filename"] for event in allocated for frame in event["frames"])


def test_memory_that_runs_out_is_seen_with_what_is_alive_and_who_else_is_on_the_card(tmp_path, monkeypatch):
    original = QloraTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        kept = original(self, *args, **kwargs)
        torch.empty(2**44, dtype=torch.uint8, device="cuda")  # more than any card has
        return kept

    program = (
        "import torch; held = torch.empty(2**28, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    gc.collect()
    torch.cuda.empty_cache()
    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    try:
        with pytest.raises(OutOfMemory, match=r"CUDA out of memory\. Tried to allocate 16384\.00 GiB\n"):
            train.run(load_recipe(find_recipe("quickstart"), ["training.steps=1", f"output.directory={tmp_path}"]))
    finally:
        other.communicate("\n")
    kept = json.loads((tmp_path / "quickstart" / "memory.json").read_text())
    report = kept["failure"]
    assert (report["wanted_bytes"], report["counted"], report["untraced"]) == (2**44, "tensor by tensor", "")
    assert report["total_bytes"] == torch.cuda.mem_get_info()[1]
    allocated = max(kept["measured"]["phases"][name]["allocated_peak_bytes"] for name in ("forward", "backward"))
    assert 0.5 * allocated < sum(report["alive"].values()) < 1.05 * allocated
    listed = {one["pid"]: one["bytes"] for one in report["others"] or ()}
    if other.pid in listed:  # a container may hide it, or give it another number
        assert listed[other.pid] > 2**28


def test_the_export_is_the_model_that_was_trained_on_the_card(run_dir):
    assert qtune("export", str(run_dir.path)) == str(run_dir.path / "model")


PLAYED = """
import random, torch
rng, held = random.Random(0), []
for _ in range(400):
    if held and rng.random() < 0.5:
        held.pop(rng.randrange(len(held)))
    else:
        held.append(torch.empty(int(2 ** rng.uniform(5, 26)), dtype=torch.uint8, device="cuda"))
print(torch.cuda.memory_stats()["reserved_bytes.all.peak"])
"""


@pytest.mark.parametrize("expandable", [False, True])
def test_the_allocator_reserves_what_the_simulated_one_does(expandable):
    from qtune.memory.tracing.caching_allocator import ExpandableSegments, FixedSegments

    environment = os.environ | {"PYTORCH_ALLOC_CONF": f"expandable_segments:{expandable}"}
    done = subprocess.run([sys.executable, "-c", PLAYED], env=environment, capture_output=True, text=True, check=True)
    rng, held = random.Random(0), []
    allocator = ExpandableSegments() if expandable else FixedSegments()
    for _ in range(400):
        if held and rng.random() < 0.5:
            allocator.free(held.pop(rng.randrange(len(held))))
        else:
            held.append(allocator.allocate(int(2 ** rng.uniform(5, 26))))
    assert int(done.stdout) == allocator.peak


def test_a_run_has_expandable_segments_where_nobody_chose_otherwise():
    program = (
        "from qtune.startup.allocator import *; use_expandable_segments(); import torch; torch.zeros(1, device='cuda');"
    )
    program += "print(torch.cuda.memory.memory_snapshot()[0]['is_expandable'])"
    unset = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", program], env=unset, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sys.platform == "linux")


def test_layers_that_wait_elsewhere_give_every_gradient_of_those_on_the_card_and_the_traced_peak():
    import bench_streamed

    for lean in (True, False):
        worst = bench_streamed.differences(bench_streamed.WIDE, bench_streamed.compute_dtype(), lean=lean)
        assert max(worst.values()) < 2e-2, worst
    found = bench_streamed.measured(bench_streamed.WIDE, 3, 1, 2048, "host", steps=2)
    layers = bench_streamed.WIDE["num_hidden_layers"]
    assert found["loads"] == 2 * (layers - 2)
    # Beside the tensors stand two cuBLAS workspaces.
    assert found["allocated_peak_gib"] == pytest.approx(found["traced_peak_gib"] + 64 / 1024, rel=0.03)
