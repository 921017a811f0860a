"""The best state of a run by validation loss: kept while it trains, taken at the end where it is better for sure."""

import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune.adapter.state import STATE_FILE, load_trained_state, save_trained_state
from qtune.recipe.schema import Training
from qtune.run.metrics import EvalRecord, Metric, NoteRecord
from qtune.verdicts.learning import fall_of

CONFIDENCE = 0.95
_NAME = re.compile(r"best-\d+")


class KeepBest(TrainerCallback):
    """Keeps the trained state of the best evaluation in `folder`/best-STEP, and ends a run that finds no better one."""

    def __init__(
        self, folder: Path, training: Training, note: Callable[[str], None], before: Sequence[Metric] = ()
    ) -> None:
        """`before` are the records up to the step that a run goes on from."""
        self.folder = folder
        self.training = training
        self.note = note
        self.best_loss, self.since = math.inf, 0
        for record in before:
            if isinstance(record, EvalRecord) and record.step:
                self._is_better(record.loss)
        last = max((record.step for record in before if not isinstance(record, NoteRecord)), default=0)
        for path in kept_states(folder):
            if _step_of(path) > last:  # of steps that will be taken again
                shutil.rmtree(path, ignore_errors=True)
        self.stopped_early = training.patience is not None and self.since >= training.patience
        """Whether patience has ended the run before its last step."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not state.global_step:  # an adapter that has learned nothing is no result
            return control
        if self._is_better(float(kwargs["metrics"]["eval_loss"])):
            self._keep(kwargs["model"], state.global_step)
        patience = self.training.patience
        if patience is not None and self.since >= patience and state.global_step < state.max_steps:
            self.stopped_early = True
            control.should_training_stop = True
            times = "evaluation" if patience == 1 else f"{patience} evaluations in a row"
            self.note(f"stopped at step {state.global_step}: {times} found no lower loss than {self.best_loss:.4f}")
        return control

    def _is_better(self, loss: float) -> bool:
        """Counts an evaluation; a loss that is no number is none that is better."""
        if loss < self.best_loss:
            self.best_loss, self.since = loss, 0
            return True
        self.since += 1
        return False

    def _keep(self, model: PeftModel, step: int) -> None:
        if self.training.result == "last":
            return
        older = kept_states(self.folder)
        was_training = model.training
        model.eval()  # peft computes the vectors of a prompt encoder without its dropout
        folder = self.folder / f"best-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_trained_state(model, folder)
        model.train(was_training)
        for path in older:
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)

    def take(self, model: PeftModel, records: Sequence[Metric], step: int) -> str | None:
        """Puts the best state into the model where the recipe, or more than noise, says so.

        records: of the whole run; step: at which it has ended. Returns a sentence about what the adapter is, None where
        there was no choice.
        """
        kept = kept_states(self.folder)
        chosen, said = choice(records, [_step_of(path) for path in kept], self.training.result, step)
        if chosen is not None:
            load_trained_state(model, self.folder / f"best-{chosen}")
        return said

    def forget(self) -> None:
        """Removes what was kept, once the adapter is saved."""
        for path in kept_states(self.folder):
            shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("best-"))


def kept_states(folder: Path) -> list[Path]:
    """The kept states in a folder that are whole, the earliest first."""
    found = [path for path in folder.glob("best-*") if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=_step_of)


def choice(records: Sequence[Metric], kept: Sequence[int], result: str, step: int) -> tuple[int | None, str | None]:
    """The step whose state is the run's result, None for the last; and the reason in words, None without a choice.

    kept: the steps that there are states of. Under "best-beyond-noise" the best is taken where the last evaluation is
    above it by more than noise: by the paired interval over the validation rows, widened for as many comparisons as
    there were (Bonferroni), for the lowest of several losses is partly luck.
    """
    looked = [one for one in records if isinstance(one, EvalRecord) and one.step and math.isfinite(one.loss)]
    best = next((one for one in reversed(looked) if one.step in kept), None)
    if best is None or result == "last":
        return None, None
    last = looked[-1]
    if last.step == best.step and step == last.step:
        return None, None
    told = f"validation loss {best.loss:.4f} at step {best.step:,}, {last.loss:.4f} at step {last.step:,}"
    if result == "best":
        return best.step, f"the adapter is that of step {best.step:,}, the best: {told}"
    fall = fall_of(last, best, 1 - (1 - CONFIDENCE) / max(1, len(looked) - 1)) if last is not best else None
    if fall is not None and fall.is_positive:
        text = f"the adapter is that of step {best.step:,}, better than the last by more than noise: {told}"
        return best.step, f'{text} (± {fall.half_width:.4f}); training.result = "last" takes the last'
    return None, f'the adapter is the last: {told}, which may be noise; training.result = "best" takes the best'
