"""Several processes share the rows of each step, and train the adapter of one."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ROWS
from forked import SECONDS, Forked, Parent, parent
from safetensors.torch import load_file
from torch import Tensor

from qtune.adapter.state import STATE_FILE

pytestmark = pytest.mark.slow

ADAPTERS = {
    "lora": 'kind = "lora"\nrank = 4',
    "p-tuning": 'kind = "p-tuning"\nvirtual_tokens = 4',
    "prompt-tuning": 'kind = "prompt-tuning"\nvirtual_tokens = 4',
}
# 20 training rows in steps of 8: an epoch's last step has 4 rows, so that one of two processes has none.
STEP = "batch_size = 8\nmicro_batch_size = 4\nlearning_rate = 1e-3\nrehearse = false\nsample_answers = 0\n"
TRAINING = f"{STEP}steps = 6\ncheckpoint_every = 2\nkeep_checkpoints = 9"

Recipe = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all runs of this file are, with rows, and a cache that they share."""
    made = tmp_path_factory.mktemp("ranks")
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTUNE_CACHE", str(made / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(made / "config"))
        yield made


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[Parent]:
    """What starts them."""
    with parent(folder) as made:
        yield made


@pytest.fixture(scope="module")
def recipe(folder: Path, tiny_model: Path) -> Recipe:
    """A function that writes a recipe of a name; its runs go to `folder`/runs."""

    def write(name: str, training: str = TRAINING, *, adapter: str = "lora", data: str = "", more: str = "") -> Path:
        file = folder / f"{name}.toml"
        share = "" if "validation" in data else "validation = 0.1\n"
        file.write_text(
            f'[model]\nbase = "{tiny_model}"\n'
            '[quantization]\ncompute_dtype = "float32"\nminimum_share = 0.0\n'
            f"[adapter]\n{ADAPTERS[adapter]}\n"
            f'[data]\ntrain = "rows.jsonl"\n{share}max_length = 128\n{data}\n'
            f'[training]\n{training}\n{more}\n[output]\ndirectory = "{folder / "runs"}"\n'
        )
        return file

    return write


def trained(run: Path) -> dict[str, Tensor]:
    """The whole trained state of a run."""
    return load_file(run / "adapter" / STATE_FILE)


def furthest(one: Path, other: Path) -> float:
    """The largest difference between the trained states of two runs."""
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def records(run: Path, kind: str) -> list[dict[str, float]]:
    """The records of a kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def checkpoints(run: Path) -> list[str]:
    """The names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("checkpoint-*"))


def done(started: Sequence[Forked]) -> Sequence[Forked]:
    """Processes that have all ended well."""
    for process in started:
        assert process.ended() == 0, process.messages
    return started


def require_same_run(one: Path, other: Path) -> None:
    """The same steps and evaluations with the same figures, and the same adapter."""
    for kind in ("train", "eval"):
        first, second = records(one, kind), records(other, kind)
        assert [line["step"] for line in first] == [line["step"] for line in second]
        for key in ("loss", "accuracy"):
            assert [line[key] for line in second] == pytest.approx([line[key] for line in first], abs=1e-6)
    assert furthest(one, other) <= 1e-6


@pytest.fixture(scope="module")
def run_of_one(processes: Parent, recipe: Recipe, folder: Path) -> Callable[[str], Path]:
    """A function that gives the finished run of one process with an adapter, which it trains once."""

    def trained_run(kind: str) -> Path:
        run = folder / "runs" / kind
        if not run.exists():
            done([processes.start("run", recipe(kind, adapter=kind))])
        return run

    return trained_run


@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_processes_train_the_adapter_of_one(
    kind: str, run_of_one: Callable[[str], Path], processes: Parent, folder: Path
) -> None:
    alone, run = run_of_one(kind), folder / "runs" / f"two-{kind}"
    first, second = done(processes.several(2, "run", folder / f"{kind}.toml", "--set", f"output.name={run.name}"))
    assert first.out.read_text().strip() == str(run), "one of them speaks"
    assert first.messages.count("step 6/6") == 1
    assert (second.messages, second.out.read_text()) == ("", "")
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    require_same_run(alone, run)


def test_a_run_goes_on_with_two_processes_and_then_with_one(
    run_of_one: Callable[[str], Path], processes: Parent
) -> None:
    run = run_of_one("lora")
    again = run.with_name("again")
    shutil.copytree(run, again)
    for count, lost in ((2, ("4", "6")), (1, ("6",))):
        shutil.rmtree(again / "adapter")
        for step in lost:
            shutil.rmtree(again / "checkpoints" / f"checkpoint-{step}")
        done(processes.several(count, "run", "--resume", again))
        assert checkpoints(again) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert (again / "checkpoints" / "checkpoint-4" / "random-1.safetensors").is_file(), "two processes made it"
    assert not (again / "checkpoints" / "checkpoint-6" / "random-1.safetensors").exists(), "one process made it"
    assert furthest(run, again) <= 1e-6


EVERYTHING = (
    "batch_size = 6\nmicro_batch_size = 1\nlearning_rate = 1e-3\nsteps = 9\neval_every = 2\ncheckpoint_every = 3\n"
    'skip_outlier_steps = true\nsample_answers = 1\nevaluate_first = true\nresult = "best"\nrehearse = true'
)
STAND_OUT_SOON = "import qtune.training.outliers as outliers; outliers.LEAST, outliers.DEVIATIONS = 3, 0.5"


@pytest.mark.parametrize(
    ("name", "training", "data", "more"),
    [
        ("guarded", EVERYTHING, "validation = 0.15", ""),
        ("packed", EVERYTHING.replace("batch_size = 6", "batch_size = 2"), "packing = true", ""),
        ("streamed", EVERYTHING, "validation = 0.15", '[memory]\nlayers = "host"'),
        ("stopped", f'{STEP}epochs = 40\neval_every = 1\npatience = 2\nresult = "best"', "", ""),
    ],
)
def test_so_do_they_with_everything_that_decides_over_a_step(
    name: str, training: str, data: str, more: str, processes: Parent, recipe: Recipe, folder: Path
) -> None:
    training = training.replace("1e-3", "3e-1") if name == "stopped" else training
    file, alone, two = (
        recipe(name, training, data=data, more=more),
        folder / "runs" / name,
        folder / "runs" / f"2{name}",
    )
    done([processes.start("run", file, first=STAND_OUT_SOON)])
    words = ("run", file, "--set", f"output.name={two.name}")
    first, second = done(processes.several(2, *words, first={0: STAND_OUT_SOON, 1: STAND_OUT_SOON}))
    require_same_run(alone, two)
    assert [line.get("skipped") for line in records(alone, "train")] == [
        line.get("skipped") for line in records(two, "train")
    ]
    assert second.messages == ""
    if name == "stopped":
        assert len(records(two, "train")) < 40
    else:
        assert any(line.get("skipped") for line in records(two, "train")), "otherwise nothing is shown of it"
        assert "rehearsed in" in first.messages
        assert "what it answers now" in first.messages


SHORT_OF_MEMORY = """
import torch
from qtune.training.trainer import QloraTrainer
compute, sums = QloraTrainer.compute_loss, QloraTrainer._sums
def short(self, model, inputs, *rest, **more):
    if len(inputs["input_ids"]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return compute(self, model, inputs, *rest, **more)
def short_sums(self, batch):
    if len(batch["input_ids"]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return sums(self, batch)
QloraTrainer.compute_loss, QloraTrainer._sums = short, short_sums
"""


def test_memory_that_runs_out_in_one_process_changes_nothing(
    run_of_one: Callable[[str], Path], processes: Parent, folder: Path
) -> None:
    words = ("run", folder / "lora.toml", "--set", "output.name=short")
    alone = run_of_one("lora")
    first, second = done(
        processes.several(2, *words, first={1: SHORT_OF_MEMORY, 0: SHORT_OF_MEMORY.replace("> 2", "> 9")})
    )
    said = "process 1 of 2, counted from 0: out of memory: micro-batches are now split into 2; the batch stays the same"
    assert said in second.messages
    assert "batches of the evaluation are now split into" in first.messages
    require_same_run(alone, folder / "runs" / "short")


def reaches_a_step(run: Path, is_running: Callable[[], bool]) -> None:
    """Waits until a step of the run is recorded."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and is_running():
        if (run / "metrics.jsonl").is_file() and records(run, "train"):
            return
        time.sleep(0.05)
    pytest.fail("no step was taken")


LONG = f"{STEP}steps = 5000\ncheckpoint_every = 4000"


def test_whichever_process_is_asked_to_stop_all_save_once_and_end(
    processes: Parent, recipe: Recipe, folder: Path
) -> None:
    started = processes.several(2, "run", recipe("asked", LONG))
    reaches_a_step(folder / "runs" / "asked", started[0].is_running)
    started[1].send(signal.SIGTERM)
    first, second = started
    assert (first.ended(), second.ended()) == (130, 130), first.messages + second.messages
    (saved,) = checkpoints(folder / "runs" / "asked")
    step = saved.removeprefix("checkpoint-")
    assert first.messages.count(f"stopped at step {step} of 5000, which is saved") == 1
    assert "error" not in first.messages + second.messages


def ended_by(function: str, module: str, when: str = "True") -> str:
    """Python that kills its process where it comes to a function."""
    return f"""
import os, signal
import {module} as module
owner = {f"module.{function.rpartition('.')[0]}" if "." in function else "module"}
name = {function.rpartition(".")[2]!r}
wrapped = getattr(owner, name)
def killed(*args, **more):
    if {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return wrapped(*args, **more)
setattr(owner, name, killed)
"""


STAGES = {
    "reading": ended_by("gather", "qtune.training.follow"),
    "loading": ended_by("build_model", "qtune.training.follow"),
    "a step": ended_by("QloraTrainer.training_step", "qtune.training.trainer", "args[0].state.global_step == 1"),
    "an evaluation": ended_by("QloraTrainer.evaluate", "qtune.training.trainer"),
    "saving": ended_by("QloraTrainer._save_checkpoint", "qtune.training.trainer"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_dies_ends_the_run_with_a_sentence_wherever_it_is(
    stage: str, processes: Parent, recipe: Recipe, folder: Path
) -> None:
    name = f"dies-in-{stage.replace(' ', '-')}"
    training = f"{STEP}steps = 4\neval_every = 2\ncheckpoint_every = 3"
    first, second = processes.several(2, "run", recipe(name, training), first={1: STAGES[stage]})
    assert (first.ended(), second.ended()) == (1, -signal.SIGKILL), first.messages
    assert first.messages.count("error: ") == 1
    assert "error: another process of this run has ended" in first.messages
    assert f"qtune run --resume {folder / 'runs' / name}" in first.messages
    assert "Traceback" not in first.messages
