"""Whether a run can be believed: its last steps taken again from a checkpoint, and compared bit for bit."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune import console
from qtune.adapter.starts import kept_start
from qtune.adapter.state import STATE_FILE, trained_state
from qtune.errors import Problem, RunError, TrainingError
from qtune.memory.measured.meter import Meter
from qtune.run.checkpoints import OPTIMIZER, named_checkpoints, step_of
from qtune.run.folder import RunDir
from qtune.run.history import require_own_lock
from qtune.run.lock import read_lock
from qtune.run.metrics import forget_after
from qtune.run.owner import owned
from qtune.run.resumption import resumed_recipe
from qtune.training.build import build_model, make_trainer
from qtune.training.callbacks import Metrics, StopOnSignal
from qtune.training.checkpoints import fault_of
from qtune.training.depends import base_now, require_unchanged
from qtune.training.inputs import Inputs, gather
from qtune.training.saved_state import load_state

NEVER = 1_000_000_000
"""Steps between two checkpoints where none is wanted."""


def prove(run_dir: RunDir, accepted: Sequence[str] = ()) -> str:
    """Takes the steps between a run's last two checkpoints again (from its start, where there is one alone), and says
    in a sentence that they led to the same parameters. Nothing in the run's folder changes.

    Raises:
        RunError: there is no checkpoint that is whole, the run is not what it was, or went on otherwise since.
        TrainingError: other parameters, or other parts of a state, came out.
    """
    require_own_lock(run_dir)
    with owned(run_dir, "proving the last steps"):
        faults = {path: fault_of(path) for path in named_checkpoints(run_dir.checkpoints)}
        for path, said in faults.items():
            if said is not None:
                console.say(f"{path} is not whole, and left out: {said}")
        whole = [path for path, said in faults.items() if said is None]
        if not whole:
            raise RunError(Problem(str(run_dir.checkpoints), "no checkpoint is whole, so there is nothing to repeat"))
        last, first = whole[-1], whole[-2] if len(whole) > 1 else None
        begin, end = 0 if first is None else step_of(first), step_of(last)
        _require_same_way(run_dir, begin, end)
        inputs = gather(resumed_recipe(run_dir), run_dir, accepted=accepted)
        require_unchanged(inputs, run_dir, accepted, base_now(inputs))
        console.say(f"steps {begin + 1} to {end} are taken again, from {first or 'the start'}")
        model, optimizer = _repeated(inputs, run_dir.metrics_file, first, end)
    pairs = [
        *_pairs(load_file(last / STATE_FILE), model, "the adapter's "),
        *_pairs(load_state(last, OPTIMIZER), optimizer, "the optimizer's "),
    ]
    if unmatched := [name for name, pair in pairs if pair is None]:
        raise TrainingError(
            f"steps {begin + 1} to {end} led elsewhere: {len(unmatched)} places of {last} hold something else, or are "
            f"missing on one side, the first of them {unmatched[0]}"
        )
    compared = {name: pair for name, pair in pairs if pair is not None}
    odd = [name for name, (saved, again) in compared.items() if not torch.equal(saved.cpu(), again.cpu())]
    if odd:
        largest = max(
            float((compared[name][0].cpu().float() - compared[name][1].cpu().float()).abs().max()) for name in odd
        )
        raise TrainingError(
            f"steps {begin + 1} to {end} led elsewhere: {len(odd)} of {len(compared)} tensors differ from {last}, by "
            f"{largest:.3g} at most, the first of them {odd[0]}"
        )
    count = sum(saved.numel() for saved, _ in compared.values())
    return (
        f"steps {begin + 1} to {end} were repeated: all {count:,} numbers of the adapter and of the optimizer's state "
        f"are those of {last}, bit for bit"
    )


class StopAt(TrainerCallback):
    """Ends training after a step; `advance` is called after each."""

    def __init__(self, step: int, advance: Callable[[], None]) -> None:
        self.step, self.advance = step, advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.advance()
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control


DECIDES_BITS = ("training.learning_rate", "training.micro_batch_size", "training.lean_step", "memory.loss_tile")
"""What may change where a run goes on, and with it the numbers of a step, or their last bits."""


def _require_same_way(run_dir: RunDir, begin: int, end: int) -> None:
    """The steps after `begin` were taken as the run is now.

    Raises:
        RunError: the run went on otherwise, with another learning rate for example, after a later step; or by several
            processes.
    """
    lock = read_lock(run_dir)
    if lock is None:
        return
    values, processes = lock.recipe or {}, lock.device.processes
    for part in lock.resumed:
        processes = part.device.processes if part.from_step <= begin else max(processes, part.device.processes)
        now = part.recipe or values
        changed = [key for key in DECIDES_BITS if values.get(key) != now.get(key)]
        changed += part.accepted
        if changed and part.from_step > begin:
            message = (
                f"the run went on otherwise from step {part.from_step} ({', '.join(changed)}), so steps {begin + 1} to "
                f"{end} cannot be repeated as it is now; that needs another checkpoint since then"
            )
            raise RunError(Problem(str(run_dir.checkpoints), message))
        values = now
    if processes > 1:
        message = (
            f"steps {begin + 1} to {end} were taken by {processes} processes, which add their gradients in another "
            "order than one does: the last bits may differ, and one process cannot prove them"
        )
        raise RunError(Problem(str(run_dir.checkpoints), message))


def _repeated(
    inputs: Inputs, metrics_file: Path, checkpoint: Path | None, end: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained tensors and the optimizer's state after step `end`; `metrics_file` is the run's own."""
    changes = {
        "eval_every": "never", "checkpoint_every": NEVER, "checkpoint_minutes": None, "trackers": (),
    }  # fmt: skip
    recipe = inputs.recipe
    quiet = recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})
    inputs = replace(inputs, resolved=replace(inputs.resolved, recipe=quiet))
    begin = 0 if checkpoint is None else step_of(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        if metrics_file.is_file():  # a step stands out, and is skipped, beside those before it
            shutil.copyfile(metrics_file, run_dir.metrics_file)
            forget_after(run_dir.metrics_file, begin)
        meter = Meter(torch.device(inputs.plan.device.torch_name))
        metrics = Metrics(run_dir.metrics_file, lambda record: None, meter, scales_loss=inputs.plan.loss_scaling)
        model, tiled = build_model(inputs, after=begin)
        kept_start(model, recipe, run_dir.checkpoints / "initial")
        stop = StopOnSignal(lambda: None)
        trainer = make_trainer(inputs, run_dir, model, tiled, metrics, stop, evaluate_first=False)
        try:
            with console.progress(f"repeating steps {begin + 1} to {end}", end - begin) as bar:
                trainer.add_callback(StopAt(end, bar.advance))
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            meter.close()
            inputs.prepared.close()
        state: dict[str, Any] = trainer.optimizer.state_dict()
        return {name: tensor.clone() for name, tensor in trained_state(model).items()}, state


def _pairs(saved: Any, again: Any, name: str) -> list[tuple[str, tuple[Tensor, Tensor] | None]]:
    """The values at the same places of two states, numbers as tensors; None where they cannot be compared."""
    if isinstance(saved, Tensor) and isinstance(again, Tensor):
        return [(name, (saved, again) if saved.shape == again.shape and saved.dtype == again.dtype else None)]
    if isinstance(saved, Mapping) and isinstance(again, Mapping):
        keys = dict.fromkeys([*saved, *again])
        both = [(key, saved.get(key, _MISSING), again.get(key, _MISSING)) for key in keys]
    elif isinstance(saved, (list, tuple)) and isinstance(again, (list, tuple)) and len(saved) == len(again):
        both = [(at, one, two) for at, (one, two) in enumerate(zip(saved, again, strict=True))]
    else:
        kinds = (Tensor, Mapping, list, tuple)
        is_same = not isinstance(saved, kinds) and not isinstance(again, kinds) and saved == again
        return [] if is_same else [(name, None)]
    within = name if name.endswith(" ") else f"{name}."
    return [pair for key, one, two in both for pair in _pairs(one, two, f"{within}{key}")]


_MISSING = object()
