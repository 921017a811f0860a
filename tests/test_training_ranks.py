"""Several processes share the rows of each step, and train the adapter of one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROWS, WARM, WriteRecipe, run_qtune, run_warm, run_warm_qtune
from safetensors.torch import load_file
from torch import Tensor
from warm import LAUNCHER, Warm

from qtune.adapter.state import STATE_FILE

pytestmark = pytest.mark.slow

SECONDS = 300
"""After which a process that should have ended is taken to hang."""

ADAPTERS = {
    "lora": 'kind = "lora"\nrank = 4',
    "p-tuning": 'kind = "p-tuning"\nvirtual_tokens = 4',
    "prompt-tuning": 'kind = "prompt-tuning"\nvirtual_tokens = 4',
}
# 20 training rows in steps of 8: an epoch's last step has 4 rows, so that one of two processes has none.
STEP = "batch_size = 8\nmicro_batch_size = 4\nlearning_rate = 1e-3\nrehearse = false\n"
TRAINING = f"{STEP}steps = 6\ncheckpoint_every = 2\nkeep_checkpoints = 9"

RunOfOne = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_of_one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunOfOne]:
    """A function that gives the finished run of one process with an adapter, which it trains once."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def trained_run(kind: str) -> Path:
        run = folder / "runs" / kind
        if not run.exists():
            recipe = folder / f"{kind}.toml"
            recipe.write_text(
                f'[model]\nbase = "{tiny_model}"\n'
                '[quantization]\ncompute_dtype = "float32"\nminimum_share = 0.0\n'
                f"[adapter]\n{ADAPTERS[kind]}\n"
                '[data]\ntrain = "rows.jsonl"\nvalidation = 0.1\nmax_length = 128\n'
                f'[training]\n{TRAINING}\n[output]\ndirectory = "{folder / "runs"}"\n'
            )
            done = run_warm_qtune("run", recipe)
            assert done.returncode == 0, done.stderr
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTUNE_CACHE", str(folder / "cache"))
        yield trained_run


def trained(run: Path) -> dict[str, Tensor]:
    """The whole trained state of a run."""
    return load_file(run / "adapter" / STATE_FILE)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two states."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def records(run: Path, kind: str) -> list[dict[str, float]]:
    """The records of a kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def checkpoints(run: Path) -> list[str]:
    """The names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("checkpoint-*"))


def environment() -> dict[str, str]:
    """As `qtune_process` has it."""
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def reaches_a_step(run: Path, process: "subprocess.Popen[str] | Warm") -> None:
    """Waits until a step of the run is recorded."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and records(run, "train"):
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"no step was taken: {process.communicate()[1]}")


def ended(process: "subprocess.Popen[str] | Warm") -> tuple[int, str]:
    """The exit code and the messages of a process and of those that it has started; none of them stays."""
    everybody = psutil.Process(process.pid).children(recursive=True)
    try:
        messages = process.communicate(timeout=SECONDS)[1]
    finally:
        process.kill()
        left = [one for one in everybody if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        for one in left:
            one.kill()
    assert not left, "somebody was left behind"
    return process.returncode, messages


@pytest.mark.parametrize(
    ("kind", "data"), [("lora", ""), ("p-tuning", ""), ("prompt-tuning", "streaming = true  # all rows in one window")]
)
def test_two_processes_train_the_adapter_of_one(
    kind: str, data: str, run_of_one: RunOfOne, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    alone = run_of_one(kind)
    recipe = write_recipe(adapter=ADAPTERS[kind], training=TRAINING, data=data)
    command = ("run", recipe, "--set", "output.name=two", "--processes", "2")
    two = run_qtune(*command) if kind == "lora" else run_warm(LAUNCHER, *command)
    assert two.returncode == 0, two.stderr
    assert two.stdout.strip() == str(tmp_path / "runs" / "two"), "one of them speaks"
    assert two.stderr.count("step 6/6") == 1
    run = tmp_path / "runs" / "two"
    assert furthest(trained(alone), trained(run)) <= 1e-6
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for of_kind in ("train", "eval"):
        one, other = records(alone, of_kind), records(run, of_kind)
        assert [line["step"] for line in one] == [line["step"] for line in other]
        for key in ("loss", "accuracy"):
            assert [line[key] for line in other] == pytest.approx([line[key] for line in one], abs=1e-6)


def test_a_run_goes_on_with_two_processes_and_then_with_one(run_of_one: RunOfOne) -> None:
    run = run_of_one("lora")
    again = run.with_name("again")
    shutil.copytree(run, again)
    for made_by, lost in ((["--processes", "2"], ("4", "6")), ([], ("6",))):
        shutil.rmtree(again / "adapter")
        for step in lost:
            shutil.rmtree(again / "checkpoints" / f"checkpoint-{step}")
        resumed = run_warm(LAUNCHER, "run", "--resume", again, *made_by)
        assert resumed.returncode == 0, resumed.stderr
        assert checkpoints(again) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert (again / "checkpoints" / "checkpoint-4" / "random-1.safetensors").is_file(), "two processes made it"
    assert not (again / "checkpoints" / "checkpoint-6" / "random-1.safetensors").exists(), "one process made it"
    assert furthest(trained(run), trained(again)) <= 1e-6


def test_a_signal_to_the_launcher_saves_once_and_all_end(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(training=f"{STEP}steps = 5000\ncheckpoint_every = 4000")
    process = WARM.start(LAUNCHER, "run", recipe, "--processes", "2")
    run = tmp_path / "runs" / "tiny"
    reaches_a_step(run, process)
    process.send_signal(signal.SIGINT)
    code, messages = ended(process)
    assert code == 130, messages
    (saved,) = checkpoints(run)
    step = saved.removeprefix("checkpoint-")
    assert messages.count(f"stopped at step {step} of 5000, which is saved") == 1
    assert f"go on with: qtune run --resume {run} --processes 2" in messages
    assert "error" not in messages


def test_a_process_that_is_killed_ends_the_run_with_a_sentence(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(training=f"{STEP}steps = 5000\ncheckpoint_every = 1")
    process = WARM.start(LAUNCHER, "run", recipe, "--processes", "2")
    run = tmp_path / "runs" / "tiny"
    reaches_a_step(run, process)
    _, second = sorted(psutil.Process(process.pid).children(), key=lambda one: (one.create_time(), one.pid))
    second.kill()
    code, messages = ended(process)
    assert code == 1, messages
    assert "error: process 1 of 2, counted from 0, was ended by SIGKILL, and the run with it" in messages
    assert "another process of this run has ended" in messages
    assert f"go on with: qtune run --resume {run} --processes 2" in messages
    assert "Traceback" not in messages


def agents(*words: str) -> list["subprocess.Popen[str]"]:
    """Two torchrun agents on this computer, as two computers would run them, with a process each."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return [
        subprocess.Popen(
            [*torchrun, f"--node-rank={node}", *meeting, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for node in (0, 1)
    ]


SHORT_OF_MEMORY = """
import os, sys, torch
from qtune.cli import main
from qtune.startup.launched import launched
if launched().rank == 1:
    from qtune.training.trainer import QloraTrainer
    compute = QloraTrainer.compute_loss
    def short(self, model, inputs, *rest, **more):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, model, inputs, *rest, **more)
    QloraTrainer.compute_loss = short
main()
"""


def test_two_torchrun_agents_train_the_adapter_of_one_though_memory_runs_out_on_one_of_them(
    run_of_one: RunOfOne, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    alone = run_of_one("lora")
    recipe = write_recipe(training=TRAINING)
    script = tmp_path / "short_of_memory.py"
    script.write_text(SHORT_OF_MEMORY)
    started = agents(str(script), "run", str(recipe), "--set", "output.name=agents")
    (first, second) = [ended(process) for process in started]
    assert first[0] == 0, first[1]
    assert second[0] == 0, second[1]
    assert "process 1 of 2, counted from 0: out of memory: micro-batches are now split into 2" in second[1]
    assert "step 6/6" in first[1]
    assert "step 6/6" not in second[1]
    assert furthest(trained(alone), trained(tmp_path / "runs" / "agents")) <= 1e-6


def test_what_is_wrong_is_said_once(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training=TRAINING)
    odd = run_qtune("run", recipe, "--processes", "3")
    assert odd.returncode == 2
    assert odd.stderr == (
        "error: training.batch_size = 8: the rows of a step cannot be shared out evenly among 3 processes; 6 or 9 "
        "could; or start 2 or 4 or 8 processes\n"
    )
    for words in (["--prove", "--resume"], ["--seeds", "2"]):
        refused = run_qtune("run", recipe, "--processes", "2", *words)
        assert refused.returncode == 2
        assert f"{words[0]} is for one process" in refused.stderr
    short = run_warm(LAUNCHER, "run", recipe, "--processes", "2", "--set", "data.max_length=16")
    assert short.returncode == 1
    assert short.stderr.count("error: ") == 1, short.stderr
