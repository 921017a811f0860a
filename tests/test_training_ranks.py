"""Several processes share the rows of each step, and train the adapter of one."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import ROWS, qtune_process
from ranks import SECONDS, Started, launch, meeting_place, start, start_several, who
from safetensors.torch import load_file
from torch import Tensor

from qtune.adapter.state import STATE_FILE
from qtune.device.present import present_device
from qtune.memory.tracing.categories import GRADIENTS
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.run.checkpoints import complete_checkpoints
from qtune.timing.forecast import between_seconds

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


def done(started: Sequence[Started]) -> Sequence[Started]:
    """Processes that have all ended well."""
    for process in started:
        assert process.ended() == 0, process.messages
    return started


def mean_difference(one: Path, other: Path) -> float:
    """The mean difference of a number of the trained states of two runs."""
    first, second = trained(one), trained(other)
    found = torch.cat([(first[name] - second[name]).abs().flatten().double() for name in first])
    return float(found.mean())


def require_same_run(one: Path, other: Path, most: float = 1e-6) -> None:
    """The same steps and evaluations with the same figures, and the same adapter. most: of any number of it."""
    for kind in ("train", "eval"):
        first, second = records(one, kind), records(other, kind)
        assert [line["step"] for line in first] == [line["step"] for line in second]
        for key in ("loss", "accuracy"):
            assert [line[key] for line in second] == pytest.approx([line[key] for line in first], abs=1e-6)
    assert furthest(one, other) <= most


@pytest.fixture(scope="module")
def run_of_one(recipe: Recipe, folder: Path) -> Callable[[str], Path]:
    """A function that gives the finished run of one process with an adapter, which it trains once."""

    def trained_run(kind: str) -> Path:
        run = folder / "runs" / kind
        if not run.exists():
            done([start("run", recipe(kind, adapter=kind))])
        return run

    return trained_run


@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_processes_train_the_adapter_of_one(kind: str, run_of_one: Callable[[str], Path], folder: Path) -> None:
    alone, run = run_of_one(kind), folder / "runs" / f"two-{kind}"
    changes = ["--set", f"output.name={run.name}"]
    if kind == "prompt-tuning":  # in one window, whose order is that of rows in memory
        changes += ["--set", "data.streaming=true"]
    first, second = done(start_several(2, "run", folder / f"{kind}.toml", *changes))
    assert first.results.strip() == str(run), "one of them speaks"
    assert first.messages.count("step 6/6") == 1
    assert (second.messages, second.results) == ("", "")
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    require_same_run(alone, run)


def test_a_run_goes_on_with_two_processes_and_then_with_one(run_of_one: Callable[[str], Path]) -> None:
    run = run_of_one("lora")
    again = run.with_name("again")
    shutil.copytree(run, again)
    for count, lost in ((2, ("4", "6")), (1, ("6",))):
        shutil.rmtree(again / "adapter")
        for step in lost:
            shutil.rmtree(again / "checkpoints" / f"checkpoint-{step}")
        done(start_several(count, "run", "--resume", again))
        assert checkpoints(again) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert (again / "checkpoints" / "checkpoint-4" / "random-1.safetensors").is_file(), "two processes made it"
    assert not (again / "checkpoints" / "checkpoint-6" / "random-1.safetensors").exists(), "one process made it"
    assert furthest(run, again) <= 1e-6


@pytest.mark.parametrize("begins", ["loftq", "eva"])
def test_a_start_that_looks_at_the_base_is_the_same_in_two_processes_that_share_its_layers(
    begins: str, recipe: Recipe, folder: Path
) -> None:
    file = recipe(begins, f"{STEP}steps = 2", data="validation = 0", more='[memory]\nlayers = "sharded"')
    starting = ("run", file, "--set", f"adapter.initialization={begins}")
    done([start(*starting)])
    done(start_several(2, *starting, "--set", f"output.name=two-{begins}"))
    assert furthest(folder / "runs" / begins, folder / "runs" / f"two-{begins}") <= 1e-6


EVERYTHING = (
    "batch_size = 6\nmicro_batch_size = 1\nlearning_rate = 1e-3\nsteps = 9\neval_every = 3\ncheckpoint_every = 4\n"
    'skip_outlier_steps = true\nsample_answers = 0\nevaluate_first = true\nresult = "best"\nrehearse = true'
)
STAND_OUT_SOON = "import qtune.training.outliers as outliers; outliers.LEAST, outliers.DEVIATIONS = 3, 0.5"


@pytest.mark.parametrize(
    ("name", "training", "data", "more"),
    [
        ("guarded", EVERYTHING.replace("answers = 0", "answers = 1"), "validation = 0.15", ""),
        ("read", EVERYTHING, "validation = 0.15\nstreaming = true\nshuffle_rows = 8", ""),
        ("packed", EVERYTHING.replace("batch_size = 6", "batch_size = 2"), "packing = true", ""),
        ("streamed", EVERYTHING, "validation = 0.15", '[memory]\nlayers = "host"'),
        ("sharded", EVERYTHING, "validation = 0.15", '[memory]\nlayers = "sharded"'),
        ("stopped", f'{STEP}epochs = 40\neval_every = 1\npatience = 2\nresult = "best"', "", ""),
    ],
)
def test_so_do_they_with_everything_that_decides_over_a_step(
    name: str, training: str, data: str, more: str, recipe: Recipe, folder: Path
) -> None:
    training = training.replace("1e-3", "3e-1") if name == "stopped" else training
    file, alone, two = (
        recipe(name, training, data=data, more=more),
        folder / "runs" / name,
        folder / "runs" / f"2{name}",
    )
    done([start("run", file, first=STAND_OUT_SOON)])
    words = ("run", file, "--set", f"output.name={two.name}")
    first, second = done(start_several(2, *words, first={0: STAND_OUT_SOON, 1: STAND_OUT_SOON}))
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
        assert ("what it answers now" in first.messages) is (name == "guarded")
    if name == "sharded":
        held = re.search(r"each process holds ([\d.]+) KiB of ([\d.]+) KiB of 4-bit layers", first.messages)
        assert held is not None, first.messages
        assert float(held[1]) == pytest.approx(float(held[2]) / 2, abs=0.2)


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


def test_memory_that_runs_out_in_one_process_changes_nothing(run_of_one: Callable[[str], Path], folder: Path) -> None:
    words = ("run", folder / "lora.toml", "--set", "output.name=short")
    alone = run_of_one("lora")
    first, second = done(start_several(2, *words, first={1: SHORT_OF_MEMORY, 0: SHORT_OF_MEMORY.replace("> 2", "> 9")}))
    said = "process 1 of 2, counted from 0: out of memory: micro-batches are now split into 2; the batch stays the same"
    assert said in second.messages
    assert "batches of the evaluation are now split into" in first.messages
    # Products of other rows at once add in another order, and Adam's first steps enlarge that where a gradient is
    # hardly more than rounding (NOTES.md): single numbers by 1.4e-6 on a processor with AVX2, 1.1e-9 on average.
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    require_same_run(alone, folder / "runs" / "short", most=1e-6 if has_avx512 else 3e-6)
    assert mean_difference(alone, folder / "runs" / "short") <= 1e-8


def reaches_a_step(run: Path, is_running: Callable[[], bool], *, saved: bool = False) -> None:
    """Waits until a step of the run is recorded; where it is asked for, until one is saved: that comes after."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and is_running():
        is_taken = (run / "metrics.jsonl").is_file() and records(run, "train")
        if complete_checkpoints(run / "checkpoints") if saved else is_taken:
            return
        time.sleep(0.05)
    pytest.fail("no step was taken")


LONG = f"{STEP}steps = 5000\ncheckpoint_every = 4000"


def test_whichever_process_is_asked_to_stop_all_save_once_and_end(recipe: Recipe, folder: Path) -> None:
    started = start_several(2, "run", recipe("asked", LONG))
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


@pytest.mark.parametrize(
    ("stage", "layers"), [*((stage, "device") for stage in STAGES), ("loading", "sharded"), ("a step", "sharded")]
)
def test_a_process_that_dies_ends_the_run_with_a_sentence_wherever_it_is(
    stage: str, layers: str, recipe: Recipe, folder: Path
) -> None:
    name = f"{layers}-dies-in-{stage.replace(' ', '-')}"
    training = f"{STEP}steps = 4\neval_every = 2\ncheckpoint_every = 3"
    file = recipe(name, training, more=f'[memory]\nlayers = "{layers}"')
    first, second = start_several(2, "run", file, first={1: STAGES[stage]})
    assert (first.ended(), second.ended()) == (1, -signal.SIGKILL), first.messages
    assert first.messages.count("error: ") == 1
    assert "error: another process of this run has ended" in first.messages
    assert f"qtune run --resume {folder / 'runs' / name}" in first.messages
    assert "Traceback" not in first.messages


ANOTHER_BYTE = """
import qtune.model.sharded_layers as sharded
cut_up = sharded._cut_up
def changed(block, mesh):
    block[-1] += 1
    return cut_up(block, mesh)
sharded._cut_up = changed
"""


def test_a_layer_that_sharding_changes_is_refused_by_one_sentence(recipe: Recipe) -> None:
    file = recipe("changed", more='[memory]\nlayers = "sharded"')
    first, second = start_several(2, "run", file, first={1: ANOTHER_BYTE})
    assert (first.ended(), second.ended()) == (2, 2)
    (error,) = (line for line in first.messages.splitlines() if line.startswith("error: "))
    assert 'memory.layers = "sharded": layer 0 is not the same after FSDP has cut it up' in error
    assert 'with "host" or "disk" it waits there' in error
    assert second.messages == ""


def test_memory_that_runs_out_where_layers_are_sharded_ends_all_of_them(recipe: Recipe) -> None:
    file = recipe("out", more='[memory]\nlayers = "sharded"')
    first, second = start_several(2, "run", file, first={1: SHORT_OF_MEMORY})
    assert (first.ended(), second.ended()) == (1, 1)
    assert "error: process 1 of 2, counted from 0: a micro-batch does not fit: with memory.layers" in second.messages
    assert "error: another process of this run has ended" in first.messages
    assert "Traceback" not in first.messages + second.messages


def two(*words: Sequence[str | Path], first: Sequence[str] = ("", "")) -> tuple[Started, Started]:
    """Two processes of one run that were given different words."""
    place = meeting_place()
    one, other = (
        start(*own, told=place | who(rank, 2), first=before)
        for rank, (own, before) in enumerate(zip(words, first, strict=True))
    )
    return one, other


def test_what_is_wrong_with_all_is_said_once(recipe: Recipe) -> None:
    file, alone = recipe("wrong"), "is for one process; start it without a launcher and without --processes"
    for words, code, said in (
        (("--set", "adapter.rnak=3"), 2, "--set: adapter.rnak = 3: no such key in [adapter]; did you mean 'rank'?"),
        (("--rnak",), 2, "qtune run --rnak: no such option; "),
        (("--set", "data.max_length=16"), 1, "the data would train the wrong thing"),
        (("--seeds", "2"), 2, f"qtune run: --seeds {alone}"),
        (("--prove", "--resume"), 2, f"qtune run: --prove {alone}"),
    ):
        first, second = start_several(2, "run", file, *words)
        assert (first.ended(), second.ended()) == (code, code)
        assert first.messages.count(f"error: {said}") == 1, first.messages
        assert second.messages == ""


def test_what_is_wrong_with_one_is_said_by_that_one(recipe: Recipe, folder: Path) -> None:
    missing = folder / "missing.toml"
    first, second = two(("run", recipe("wrong")), ("run", missing))
    assert (first.ended(), second.ended()) == (2, 2)
    assert "error" not in first.messages
    assert second.messages.startswith(f"error: process 1 of 2, counted from 0: {missing}: no such file")
    assert not (folder / "runs" / "wrong").exists()


OTHER_VERSIONS = "import qtune.training.meeting as m; m.versions = lambda: {'torch': '2.0.1'}"
OTHER_ROWS = "import qtune.training.follow as f; f.rows_seen = lambda inputs: 'others'"
OTHER_BASE = "import qtune.training.follow as f; f.base_now = lambda inputs: 'another'"


@pytest.mark.parametrize(
    ("words", "before", "said"),
    [
        (("--set", "adapter.rank=8"), "", "adapter.rank: 4 in process 0 and 8 in process 1; start all with the same"),
        ((), OTHER_VERSIONS, f"torch: process 0 has {version('torch')} and process 1 2.0.1; install the same for all"),
        ((), OTHER_ROWS, "the rows of process 1 are not those of process 0; all must read the same files"),
        ((), OTHER_BASE, "the base's files of process 1 are not those of process 0; all must read the same files"),
    ],
)
def test_processes_that_were_not_given_the_same_end_with_a_sentence(
    words: tuple[str, ...], before: str, said: str, recipe: Recipe
) -> None:
    file = recipe("unlike")
    first, second = two(("run", file), ("run", file, *words), first=("", before))
    assert (first.ended(), second.ended()) == (2, 2)
    place = rf"{re.escape(str(file))}:[0-9]+: " if words else ""
    assert re.search(f"error: {place}{re.escape(said)}", first.messages)
    assert first.messages.count("error: ") == 1
    assert second.messages == ""


def test_a_port_that_is_taken_and_a_process_that_never_comes_are_named(recipe: Recipe) -> None:
    file, few = (
        recipe("wrong"),
        "import qtune.training.meeting as m, datetime; m.COMING = datetime.timedelta(seconds=2)",
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        late = start("run", file, told=place | who(0, 2))
        assert late.ended() == 1
    place = meeting_place()
    waiting = start("run", file, told=place | who(0, 2), first=few)
    assert waiting.ended() == 1
    for process in (late, waiting):
        assert "error: the processes of this run did not meet at 127.0.0.1:" in process.messages
        assert "Traceback" not in process.messages


def test_a_leader_that_dies_takes_the_others_with_it(recipe: Recipe) -> None:
    file = recipe("leader-dies", f"{STEP}steps = 4\ncheckpoint_every = 3")
    first, second = start_several(2, "run", file, first={0: STAGES["saving"]})
    assert (first.ended(), second.ended()) == (-signal.SIGKILL, 1)
    assert second.messages == "", "whoever has started them says which was killed"


FULL_DISK = """
import errno
import qtune.training.trainer as trainer
def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")
trainer.save_tree = full
"""


def test_a_full_disk_ends_all_with_the_leaders_sentence(recipe: Recipe) -> None:
    first, second = start_several(2, "run", recipe("full"), first={0: FULL_DISK, 1: FULL_DISK})
    assert (first.ended(), second.ended()) == (1, 1)
    assert "error: the checkpoint of step 2 could not be written: No space left on device" in first.messages
    assert second.messages == ""


SENT = """
import json, os, socket, struct, time
from pathlib import Path
from qtune.training.ranks import Ranks
def sent():
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:
            continue
    return total
add = Ranks.add_gradients
def counted(self, model):
    self.all_of(None)
    time.sleep(0.1)
    before = sent()
    add(self, model)
    time.sleep(0.1)
    Path(os.environ["QTUNE_CACHE"], f"moved-{self.processes}-{self.rank}").write_text(str(sent() - before))
Ranks.add_gradients = counted
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a socket has sent")
@pytest.mark.parametrize("count", [2, 4])
def test_adding_up_gradients_moves_the_bytes_that_are_predicted(count: int, recipe: Recipe, folder: Path) -> None:
    file = recipe("moved", f"{STEP.replace('size = 4', 'size = 2')}steps = 1", data="validation = 0")
    name = f"moved-{count}"
    done(start_several(count, "run", file, "--set", f"output.name={name}", first=dict.fromkeys(range(count), SENT)))
    gradients = sum(tensor.numel() * 4 for tensor in trained(folder / "runs" / name).values())
    device = replace(present_device(), processes=count)
    plan = make_plan(load_recipe(file).recipe, device)
    rates = SimpleNamespace(host_link=1.0)
    predicted = between_seconds(SimpleNamespace(timeline={GRADIENTS: [0, gradients]}), plan, rates)
    moved = [int((folder / "cache" / f"{name}-{rank}").read_text()) for rank in range(count)]
    assert moved == pytest.approx([predicted] * count, rel=0.03)


def test_one_process_of_a_launcher_is_one_process(run_of_one: Callable[[str], Path], folder: Path) -> None:
    words = ("run", folder / "lora.toml", "--set", "output.name=launched")
    run_of_one("lora")
    done([start(*words, told=meeting_place() | who(0, 1))])
    assert furthest(run_of_one("lora"), folder / "runs" / "launched") == 0


def settings(words: str) -> dict[str, str]:
    """Of torchrun's words, by its own parser."""
    from torch.distributed.run import get_args_parser

    return vars(get_args_parser().parse_args(shlex.split(words)))


TOOLS = Path(__file__).parent.parent / "tools"


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs are these scripts."""
    folder.mkdir()
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    root = str(Path(__file__).parent.parent)
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": root}
    return {**os.environ, **paths}


@pytest.mark.parametrize("node", [0, 1])
def test_skypilot_starts_an_agent_on_each_computer(node: int, tmp_path: Path) -> None:
    task = yaml.safe_load((TOOLS / "sky.yaml").read_text())
    assert (task["num_nodes"], task["envs"]) == (2, {"RECIPE": "recipe.toml"})
    environment = stand_ins(tmp_path / "bin", torchrun='echo "$@"', cd="")
    environment |= {
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NUM_GPUS_PER_NODE": "4", "RECIPE": "one.toml",
    }  # fmt: skip
    script = task["run"].replace("cd /shared", f"cd {tmp_path}")
    done = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    said = settings(done.stdout)
    assert (said["nnodes"], said["node_rank"], said["nproc_per_node"]) == ("2", node, "4")
    assert (said["master_addr"], said["master_port"]) == ("10.0.0.4", 29500)
    assert (said["training_script"], said["training_script_args"]) == ("qtune", ["run", "one.toml"])
    assert said["module"]


# --- with real launchers ---------------------------------------------------------------------------------------------

SRUN = """
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first || wait $first; code=$?
wait $second || wait $second
exit $((code | $?))
"""


def test_slurms_script_starts_two_agents_that_train_the_adapter_of_one(
    run_of_one: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    alone, script = run_of_one("lora"), TOOLS / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    torchrun = f'exec {sys.executable} -m torch.distributed.run "$@"'
    environment = stand_ins(tmp_path / "bin", srun=SRUN, scontrol="echo 127.0.0.1; echo other", torchrun=torchrun)
    port = next(port for port in iter(lambda: int(meeting_place()["MASTER_PORT"]), 0) if 29500 <= port < 39500)
    environment |= {
        "SLURM_JOB_NODELIST": "c[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(port - 29500),
    }  # fmt: skip
    words = ["bash", script, folder / "lora.toml", "--set", "output.name=agents"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 6/6") == 1
    assert furthest(alone, folder / "runs" / "agents") <= 1e-6


def test_a_signal_to_the_launcher_saves_once_and_all_end(recipe: Recipe, folder: Path) -> None:
    run = folder / "runs" / "launcher"
    process = qtune_process("run", recipe(run.name, LONG), "--processes", "2")
    everybody = [psutil.Process(process.pid)]
    try:
        reaches_a_step(run, lambda: process.poll() is None)
        everybody += everybody[0].children(recursive=True)
        process.send_signal(signal.SIGINT)
        messages = process.communicate(timeout=SECONDS)[1]
        left = [one for one in everybody if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        for one in everybody:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    assert left == [], "somebody was left behind"
    assert process.returncode == 130, messages
    require_saved_once(run, messages)


def require_saved_once(run: Path, messages: str) -> None:
    """One checkpoint, and what is said of it."""
    (saved,) = checkpoints(run)
    step = saved.removeprefix("checkpoint-")
    assert messages.count(f"stopped at step {step} of 5000, which is saved") == 1
    assert f"go on with: qtune run --resume {run} --processes 2" in messages
    assert "error" not in messages


def children(launcher: Started) -> list[psutil.Process]:
    """The processes that a launcher has started, by their numbers."""
    return sorted(psutil.Process(launcher.pid).children(), key=lambda one: (one.create_time(), one.pid))


def test_so_does_the_end_of_its_terminal(recipe: Recipe, folder: Path) -> None:
    run = folder / "runs" / "terminal"
    launcher = launch("run", recipe(run.name, LONG), "--processes", "2")
    reaches_a_step(run, launcher.is_running)
    started = children(launcher)
    launcher.send(signal.SIGHUP)
    assert launcher.ended() == 130, launcher.messages
    assert not any(one.is_running() for one in started)
    require_saved_once(run, launcher.messages)


def test_the_launcher_says_which_process_was_killed(recipe: Recipe, folder: Path) -> None:
    run = folder / "runs" / "killed"
    file = recipe("killed", f"{STEP}steps = 5000\ncheckpoint_every = 1")
    launcher = launch("run", file, "--processes", "2")
    reaches_a_step(run, launcher.is_running, saved=True)
    started = children(launcher)
    started[1].kill()
    assert launcher.ended() == 1, launcher.messages
    assert not any(one.is_running() for one in started)
    said = launcher.messages
    assert "error: process 1 of 2, counted from 0, was ended by SIGKILL, and the run with it" in said
    assert "another process of this run has ended" in said
    assert f"go on with: qtune run --resume {run} --processes 2" in said
    assert "Traceback" not in said


def test_a_number_of_processes_that_cannot_share_a_step_is_refused_at_once(recipe: Recipe) -> None:
    file = recipe("odd")
    (line,) = [at for at, text in enumerate(file.read_text().splitlines(), 1) if text.startswith("batch_size")]
    odd = launch("run", file, "--processes", "3")
    assert odd.ended() == 2
    assert odd.messages == (
        f"error: {file}:{line}: training.batch_size = 8: the rows of a step cannot be shared out evenly among 3 "
        "processes; 6 or 9 could; or start 2 or 4 or 8 processes\n"
    )
