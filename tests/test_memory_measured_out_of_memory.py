"""Memory that runs out: in every phase it is said what was alive, what was predicted and what would have fit."""

import json
import shlex
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import WriteRecipe
from test_memory_trace import CPU
from test_training_train import run
from typer.testing import CliRunner

from qtune import cli
from qtune.device.present import present_device
from qtune.device.processes import Holder, other_holders, parse_holders
from qtune.errors import ModelError, OutOfMemory, Problem
from qtune.memory import budget as stage
from qtune.memory import profile
from qtune.memory.allowance import Need
from qtune.memory.longest import Rows
from qtune.memory.measured import out_of_memory
from qtune.memory.measured.failure_text import failure_text
from qtune.memory.measured.meter import Meter
from qtune.memory.measured.out_of_memory import first_report, with_offers
from qtune.memory.predict import Longest, Prediction
from qtune.memory.remedies import Room, remedies
from qtune.memory.tracing import categories
from qtune.memory.tracing.history import Moment
from qtune.model.load import load_config
from qtune.plan import Plan, make_plan
from qtune.recipe.file import load_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.sizes import size_text
from qtune.training import build, train, trainer
from qtune.training.trainer import QloraTrainer

GIB, MIB = 2**30, 2**20
DRIVER = 673 * MIB
"""What is taken for the driver and the allocator."""

REFUSED = "CUDA out of memory. Tried to allocate 64.00 KiB"
SAID = f"{REFUSED}. GPU 0 has a total capacity of 7.79 GiB of which 12.00 MiB is free.\nMore than anybody reads."

TRAINING = "steps = 2\nbatch_size = 2\nmicro_batch_size = 2\ncheckpoint_every = 1\neval_every = 2"


def refuse(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(SAID)


def computed_and_refused(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_loss(self: QloraTrainer, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        refuse()

    return compute_loss


def refused_in_eval(meter: Meter, _: int) -> None:
    if meter.phase == "eval":
        refuse()


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A computer of 8 GiB, of which some are free and 2 are this process's."""

    def free(free_bytes: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * GIB, available=free_bytes))
        monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=2 * GIB))

    return free


def by_hand(config: Any, recipe: Recipe, plan: Plan, longest: Longest) -> Prediction:
    """A step in round figures, so that every number of a report can be checked in one's head.

    Weights 1 GiB; moments 1 GiB, a quarter with 8 bits; a row 1 GiB of activations, a quarter with checkpointing, and
    half a GiB in evaluation; the loss 512 MiB, a quarter with small tiles.
    """
    state = GIB if plan.optimizer == "adamw" else GIB // 4
    rest = GIB + state
    row = GIB // 4 if plan.gradient_checkpointing else GIB
    tile = 512 * MIB * plan.loss_tile_bytes // (64 * MIB)
    sizes = {
        "forward": rest + plan.micro_batch_size * row,
        "backward": rest + plan.micro_batch_size * row + tile,
        "optimizer": rest + 128 * MIB,
        "eval": rest + plan.micro_batch_size * GIB // 2,
    }
    moments = {
        phase: Moment(total, phase, "", "", {categories.OPTIMIZER: state, categories.OTHER: total - state})
        for phase, total in sizes.items()
    }
    peak = max(moments.values(), key=lambda moment: moment.bytes)
    need = Need(peak.bytes, rest, context_bytes=DRIVER)
    return Prediction(peak, moments, need, 0, 0, 2, 2, 0.1, {}, [], [])


def needed(peak_bytes: int) -> str:
    """With what the driver and the allocator add."""
    return f"{(peak_bytes + DRIVER) / GIB:.2f} GiB"


# --- what is said, phase by phase ----------------------------------------------------------------------------------

RESUME = "qtune run --resume {run}"
NEW = "qtune run {run}/resolved.toml"
CHECKPOINTING = "the forward is computed twice: more time, same result"
EIGHT_BITS = "8-bit moments: results as with 32 bits (arXiv:2110.02861)"
IS_NEW = "(a new run: it decides what is learned)"
TOO_LOW = "less than the 7.00 GiB that were to be had, so it was too low, or memory was taken meanwhile"


def prediction(rows: int, here: str, peak_bytes: int, verdict: str) -> str:
    return (
        f"predicted for {rows} x 57 tokens: {here} GiB here, {peak_bytes / GIB:.2f} GiB at the step's peak, "
        f"{needed(peak_bytes)} with driver and allocator: {verdict}"
    )


def memory(free: str) -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}: {free} GiB of 8.00 GiB free, 2.00 GiB held by this run"


def with_eight_bits() -> list[str]:
    """Two rows: 1 + 0.25 + 2 + 0.5 GiB."""
    return [
        f'  training.optimizer = "adamw-8bit": 3.75 GiB at the peak, {needed(3840 * MIB)} needed; {EIGHT_BITS}',
        f"    {NEW} --set training.optimizer=adamw-8bit  {IS_NEW}",
    ]


REPORTS: dict[str, tuple[tuple[Any, str, Any], int, list[str]]] = {
    # A row: 1 + 1 + 1 + 0.5 GiB. With the driver's share, 2.75 with checkpointing, 2.75 with 8-bit moments and 3.125
    # with small tiles are too much for 3 GiB; 2 with checkpointing and 8-bit moments together are not.
    "a step in which not even one row fits": (
        (QloraTrainer, "compute_loss", computed_and_refused(QloraTrainer.compute_loss)),
        GIB,
        [
            f"memory ran out in the backward pass of step 1, at 1 x 46 tokens: {REFUSED}",
            "alive (tensor by tensor): {alive}",
            prediction(1, "3.50", 3584 * MIB, "more than the 3.00 GiB that were to be had"),
            memory("1.00"),
            "would have fit, least harm first, each traced:",
            "  training.micro_batch_size = 1, training.gradient_checkpointing = true, "
            f'training.optimizer = "adamw-8bit": 2.00 GiB at the peak, {needed(2 * GIB)} needed; '
            f"{CHECKPOINTING}; {EIGHT_BITS}",
            f"    {NEW} --set training.micro_batch_size=1 --set training.gradient_checkpointing=true --set "
            f"training.optimizer=adamw-8bit  {IS_NEW}",
            f"no step is saved yet; with more memory free, as it was: {RESUME}",
        ],
    ),
    "an evaluation in which not even one row fits": (
        (Meter, "scored", refused_in_eval),
        5 * GIB,
        [
            f"memory ran out in the evaluation after step 2, at 1 x 50 tokens: {REFUSED}",
            "alive (tensor by tensor): {alive}",
            prediction(1, "2.50", 3584 * MIB, TOO_LOW),
            memory("5.00"),
            "would have fit, least harm first, each traced:",
            '  training.micro_batch_size = 1, training.optimizer = "adamw-8bit": 2.75 GiB at the peak, '
            f"{needed(2816 * MIB)} needed; {EIGHT_BITS}",
            f"    {NEW} --set training.micro_batch_size=1 --set training.optimizer=adamw-8bit  {IS_NEW}",
            f"saved is checkpoint-1; with more memory free, as it was: {RESUME}",
        ],
    ),
    "an optimizer step": (
        (torch.optim.AdamW, "step", refuse),
        5 * GIB,
        [
            f"memory ran out in the optimizer step of step 1: {REFUSED}",
            "alive (tensor by tensor): {alive}",
            prediction(2, "2.12", 4608 * MIB, TOO_LOW),
            memory("5.00"),
            "would have fit, least harm first, each traced:",
            *with_eight_bits(),
            f"no step is saved yet; with more memory free, as it was: {RESUME}",
        ],
    ),
    "loading": (
        (build, "load_base", refuse),
        GIB // 4,
        [
            f"memory ran out while the model was loaded: {REFUSED}",
            prediction(2, "1.00", 4608 * MIB, "more than the 2.25 GiB that were to be had"),
            memory("0.25"),
            # With everything: 1 + 0.25 GiB, and in the evaluation another half.
            f"no change of the recipe would have fit: the least that one of them needs is {needed(1792 * MIB)}",
            f"no step is saved yet; with more memory free, as it was: {RESUME}",
        ],
    ),
    "saving a checkpoint": (
        (trainer, "save_trained_state", refuse),
        5 * GIB,
        [
            f"memory ran out while saving after step 1: {REFUSED}",
            "alive (what stays between steps): {alive}",
            prediction(2, "2.00", 4608 * MIB, TOO_LOW),
            memory("5.00"),
            "would have fit, least harm first, each traced:",
            *with_eight_bits(),
            f"no step is saved yet; with more memory free, as it was: {RESUME}",
        ],
    ),
    "saving the adapter": (
        (train, "_save", refuse),
        5 * GIB,
        [
            f"memory ran out while saving after step 2: {REFUSED}",
            "alive (what stays between steps): {alive}",
            prediction(2, "2.00", 4608 * MIB, TOO_LOW),
            memory("5.00"),
            "would have fit, least harm first, each traced:",
            *with_eight_bits(),
            f"saved is checkpoint-2; with more memory free, as it was: {RESUME}",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_the_whole_report_of(
    name: str, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, computer: Callable[[int], None]
) -> None:
    (owner, attribute, replacement), free_bytes, lines = REPORTS[name]
    recipe = write_recipe(training=TRAINING)
    computer(free_bytes)
    monkeypatch.setattr(stage, "predicted", by_hand)
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(OutOfMemory) as caught:
        run(recipe)
    run_dir = RunDir(recipe.parent / "runs" / "tiny")
    report = json.loads(run_dir.memory_file.read_text())["failure"]
    alive = ", ".join(f"{category} {size_text(held)}" for category, held in report["alive"].items())
    assert str(caught.value) == "\n".join(lines).format(run=run_dir.path, alive=alive)
    assert caught.value.exit_code == 1
    assert failure_text(report) == str(caught.value)  # as `qtune profile RUN` shows it
    if name != "loading":
        # 2 layers, hidden 64, 320 tokens: counted by hand in 4 bits, and in fp32.
        assert report["alive"]["base weights 4-bit"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64) // 2
        assert report["alive"]["embeddings"] == 320 * 64 * 4


# --- what would have fit -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_failed_run_is_let_go_before_anything_is_traced_and_goes_on_as_it_was_told(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(training=TRAINING)
    loaded: list[weakref.ref[Any]] = []
    load, search = build.load_base, out_of_memory.remedies

    def load_base(*arguments: Any) -> Any:
        network = load(*arguments)
        loaded.append(weakref.ref(network))
        return network

    def searched(*arguments: Any) -> Any:
        assert [network() for network in loaded] == [None]
        return search(*arguments)

    monkeypatch.setattr(build, "load_base", load_base)
    monkeypatch.setattr(out_of_memory, "remedies", searched)
    with monkeypatch.context() as patch:
        patch.setattr(QloraTrainer, "compute_loss", computed_and_refused(QloraTrainer.compute_loss))
        patch.setattr("test_memory_measured_out_of_memory.SAID", "CUDA out of memory. Tried to allocate 1.00 KiB.")
        with pytest.raises(OutOfMemory):
            run(recipe)
    run_dir = RunDir(recipe.parent / "runs" / "tiny")
    report = json.loads(run_dir.memory_file.read_text())["failure"]
    assert report["untraced"] == ""
    first = report["offers"][0]
    assert first["change"] == "training.micro_batch_size = 1, training.gradient_checkpointing = true"
    assert first["peak_bytes"] <= report["predicted"]["peak_bytes"] - 1024
    assert report["offers"][1]["change"] == 'training.micro_batch_size = 1, training.optimizer = "adamw-8bit"'

    program, *arguments = shlex.split(first["command"])
    assert program == "qtune"
    monkeypatch.setattr(sys, "argv", ["qtune", *arguments])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert run_dir.is_finished
    resolved = load_recipe(run_dir.resolved_file).recipe
    assert (resolved.training.micro_batch_size, resolved.training.gradient_checkpointing) == (1, True)
    assert "failure" not in json.loads(run_dir.memory_file.read_text())
    capsys.readouterr()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "stopped"),
        (ModelError(Problem("tiny", "has no layers")), "ModelError: tiny: has no layers"),
        (torch.OutOfMemoryError(SAID), f"OutOfMemoryError: {SAID.splitlines()[0]}"),
    ],
)
def test_a_report_that_cannot_be_traced_says_why_and_everything_else(
    error: BaseException, reason: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(out_of_memory, "remedies", fails)
    recipe = recipe_for(tiny_model)
    plan = make_plan(recipe, CPU)
    failure = Meter(torch.device("cpu")).failure(MemoryError())
    holders = [Holder(12, "python3", 3 * GIB), Holder(34, "", None)]
    first = first_report(failure, recipe, plan, RunDir(tmp_path / "my run"), "checkpoint-7", holders)
    report = with_offers(first, recipe, plan, Rows(Longest(64), "said"), RunDir(tmp_path / "my run"), print)
    free, own, total = (f"{one / GIB:.2f}" for one in (failure.free_bytes, failure.own_bytes, failure.total_bytes))
    assert failure_text(json.loads(json.dumps(report.to_json()))) == (
        "memory ran out while the model was loaded: MemoryError\n"
        f"{CPU.name}: {free} GiB of {total} GiB free, {own} GiB held by this run\n"
        "also on it: python3 (pid 12) 3.00 GiB, a process (pid 34) of unknown size\n"
        f"what would have fit is not known: {reason}\n"
        f"saved is checkpoint-7; with more memory free, as it was: qtune run --resume '{tmp_path}/my run'"
    )


def recipe_for(tiny_model: Path, **training: Any) -> Recipe:
    tables = {"model": {"base": str(tiny_model)}, "data": {"train": "rows.jsonl"}, "training": training}
    return parse_recipe(tables)


def found_for(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, available_bytes: int, phase: str, short_bytes: int = 1
) -> list[str]:
    monkeypatch.setattr(stage, "predicted", by_hand)
    plan = make_plan(recipe, CPU)
    room = Room(available_bytes, phase, short_bytes)
    found = remedies(load_config(recipe.model), recipe, plan, Longest(64), plan.micro_batch_size, room)
    return [remedy.words for remedy in found.found]


def test_the_least_harmful_changes_come_first_and_only_those_that_save_enough(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_model, batch_size=8, micro_batch_size=4)
    # 6.5 GiB: two rows are enough, and so is checkpointing with all four.
    assert found_for(monkeypatch, recipe, 16 * GIB, "backward") == [
        "training.micro_batch_size = 2",
        "training.gradient_checkpointing = true",
    ]
    # In the forward small tiles save nothing; if 2 GiB were missing, 8-bit moments do not save enough.
    assert found_for(monkeypatch, recipe, 16 * GIB, "forward", 2 * GIB) == [
        "training.micro_batch_size = 2",
        "training.gradient_checkpointing = true",
    ]
    assert found_for(monkeypatch, recipe, 16 * GIB, "optimizer") == ['training.optimizer = "adamw-8bit"']
    assert found_for(monkeypatch, recipe, 16 * GIB, "load") == []
    # Only everything together fits 2560 MiB: 1 + 0.25 GiB, half a GiB in evaluation, and the driver's share.
    assert found_for(monkeypatch, recipe, 2560 * MIB, "backward") == [
        "training.micro_batch_size = 1, training.gradient_checkpointing = true, "
        'training.optimizer = "adamw-8bit", memory.loss_tile = "16MiB"'
    ]
    assert found_for(monkeypatch, recipe, 2 * GIB, "backward") == []


def test_a_run_that_has_begun_is_first_offered_what_it_can_go_on_with(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_model, batch_size=1, gradient_checkpointing=True)
    plan, config = make_plan(recipe, CPU), load_config(recipe.model)
    monkeypatch.setattr(stage, "predicted", by_hand)
    told: list[str] = []
    for is_begun, expected in (
        (False, ['training.optimizer = "adamw-8bit"', 'memory.loss_tile = "16MiB"']),
        (True, ['memory.loss_tile = "16MiB"', 'training.optimizer = "adamw-8bit"']),
    ):
        room = Room(16 * GIB, "backward", 1, is_begun)
        found = remedies(config, recipe, plan, Longest(64), 1, room, told.append).found
        assert [one.words for one in found] == expected
    assert told[:2] == ["1 x 64 tokens", '1 x 64 tokens, training.optimizer = "adamw-8bit"']


def test_a_lever_that_is_not_possible_is_passed_over(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(config: Any, recipe: Recipe, plan: Plan, longest: Longest) -> Prediction:
        if plan.gradient_checkpointing:
            raise ModelError(Problem("tiny", "cannot"))
        return by_hand(config, recipe, plan, longest)

    recipe = recipe_for(tiny_model, batch_size=1)
    plan = make_plan(recipe, CPU)
    monkeypatch.setattr(stage, "predicted", predicted)
    found = remedies(load_config(recipe.model), recipe, plan, Longest(64), 1, Room(16 * GIB, "backward", 1)).found
    assert [one.words for one in found] == ['training.optimizer = "adamw-8bit"', 'memory.loss_tile = "16MiB"']


def test_the_profile_of_a_run_ends_with_its_report(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Meter(torch.device("cpu")).failure(MemoryError())
    recipe = recipe_for(tiny_model)
    report = first_report(failure, recipe, make_plan(recipe, CPU), RunDir(Path("runs/x")), None, None).to_json()
    measured = {"device": "cpu", "method": "by hand", "phases": {}, "static": {}, "peak_bytes": 0}
    monkeypatch.setattr(RunDir, "open", lambda path: RunDir(path))
    monkeypatch.setattr("qtune.run.memory.measured_memory", lambda run_dir: measured)
    monkeypatch.setattr(profile, "trace_run", lambda run_dir, **_: profile.Measured(measured, None, [], [], report))
    shown = CliRunner().invoke(cli.app, ["profile", str(tiny_model)])
    assert shown.exit_code == 0, shown.exception
    assert shown.stdout.endswith(f"\n\n{failure_text(report)}\n")


# --- what an allocator says, and who else is there -----------------------------------------------------------------


def test_the_request_that_was_refused_is_read_from_the_allocators_own_words() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)  # PyTorch's own CPU allocator says no
    meter = Meter(torch.device("cpu"))
    assert meter.failure(refused.value).wanted_bytes == 2**60
    assert meter.failure(torch.OutOfMemoryError(SAID)).wanted_bytes == 64 * 1024
    assert meter.failure(MemoryError()).wanted_bytes == 0


LISTED = f"""\
1234, /usr/bin/python3, 5120
{2**22 + 1}, C:\\Games\\best, game.exe, [N/A]
77, [Not Found], 12
junk
"""


def test_other_processes_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.device.processes._name", lambda pid: "Xorg" if pid == 77 else "")
    holders = [Holder(1234, "python3", 5120 * MIB), Holder(77, "Xorg", 12 * MIB)]
    assert parse_holders(LISTED, own_pid=2**22 + 1) == holders
    assert parse_holders(LISTED, own_pid=1234)[1].bytes is None

    monkeypatch.setenv("PATH", str(tmp_path))
    assert other_holders("abc") is None  # no such tool
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint('12, ' + ' '.join(sys.argv[1:]) + ', 1')\n")
    tool.chmod(0o755)
    (seen,) = other_holders("abc") or ()
    assert seen.name == ("-i GPU-abc --query-compute-apps=pid,process_name,used_memory --format=csv,noheader,nounits")
    tool.write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    assert other_holders("abc") is None


def test_a_card_without_room_for_a_context_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="RTX 3060", uuid="abc"))
    with pytest.raises(OutOfMemory) as caught:
        present_device()
    assert str(caught.value) == (
        "RTX 3060 has no memory left to begin with; nvidia-smi may show what holds it: free some, or choose another "
        "card with CUDA_VISIBLE_DEVICES"
    )
