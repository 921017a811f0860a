"""Whether a run can be believed: its last steps taken again from a checkpoint, and compared bit for bit."""

import tempfile
from collections.abc import Sequence
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
from qtune.run.folder import RunDir
from qtune.run.owner import owned
from qtune.run.resumption import resumed_recipe
from qtune.training.build import build_model, make_trainer
from qtune.training.callbacks import Metrics, StopOnSignal
from qtune.training.checkpoints import fault_of, named_checkpoints, step_of
from qtune.training.depends import require_unchanged
from qtune.training.inputs import Inputs, gather
from qtune.training.saved_state import OPTIMIZER, load_state

NEVER = 1_000_000_000
"""Steps between two checkpoints where none is wanted."""


def prove(run_dir: RunDir, accepted: Sequence[str] = ()) -> str:
    """Takes the steps between a run's last two checkpoints again (from its start, where there is one alone), and says
    in a sentence that they led to the same parameters. Nothing in the run's folder changes.

    Raises:
        RunError: there is no checkpoint that is whole, or the run is not what it was.
        TrainingError: other parameters came out.
    """
    with owned(run_dir, "proving the last steps"):
        whole = [path for path in named_checkpoints(run_dir.checkpoints) if fault_of(path) is None]
        if not whole:
            raise RunError(Problem(str(run_dir.checkpoints), "no checkpoint is whole, so there is nothing to repeat"))
        last, first = whole[-1], whole[-2] if len(whole) > 1 else None
        inputs = gather(resumed_recipe(run_dir), run_dir, accepted=accepted)
        require_unchanged(inputs, run_dir, accepted)
        begin, end = 0 if first is None else step_of(first), step_of(last)
        console.say(f"repeating steps {begin + 1} to {end} from {first or 'the start'}")
        model, optimizer = _repeated(inputs, first, end)
    compared = {
        f"{name} of the adapter": (tensor, model[name]) for name, tensor in load_file(last / STATE_FILE).items()
    }
    compared |= {f"the optimizer's {name}": pair for name, pair in _pairs(load_state(last, OPTIMIZER), optimizer)}
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
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control


def _repeated(inputs: Inputs, checkpoint: Path | None, end: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained tensors and the optimizer's state after step `end`."""
    changes = {
        "eval_every": "never", "checkpoint_every": NEVER, "checkpoint_minutes": None, "trackers": (),
    }  # fmt: skip
    recipe = inputs.recipe
    quiet = recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})
    inputs = replace(inputs, resolved=replace(inputs.resolved, recipe=quiet))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        meter = Meter(torch.device(inputs.plan.device.torch_name))
        metrics = Metrics(run_dir.metrics_file, lambda record: None, meter)
        model, tiled = build_model(inputs)
        kept_start(model, recipe, run_dir.checkpoints / "initial")
        stop = StopOnSignal(lambda: None)
        trainer = make_trainer(inputs, run_dir, model, tiled, metrics, stop, evaluate_first=False)
        trainer.add_callback(StopAt(end))
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            meter.close()
        state: dict[str, Any] = trainer.optimizer.state_dict()
        return {name: tensor.clone() for name, tensor in trained_state(model).items()}, state


def _pairs(saved: Any, again: Any, name: str = "state") -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """The tensors at the same places of two states."""
    if isinstance(saved, Tensor):
        return [(name, (saved, again))] if isinstance(again, Tensor) else []
    if isinstance(saved, dict):
        return [
            pair for key, inner in saved.items() if key in again for pair in _pairs(inner, again[key], f"{name}.{key}")
        ]
    if isinstance(saved, (list, tuple)):
        found = zip(saved, again, strict=False)
        return [pair for number, (one, two) in enumerate(found) for pair in _pairs(one, two, f"{name}.{number}")]
    return []
