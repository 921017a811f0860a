"""The best state of a run by validation loss: kept while it trains, taken at the end where it is better for sure."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune import console
from qtune.adapter.state import STATE_FILE, load_trained_state, save_trained_state
from qtune.manifest import fault, is_sealed, seal
from qtune.recipe.schema import Training
from qtune.run.folder import RunDir
from qtune.run.identity import foreign_folder, saved_by
from qtune.run.metrics import EvalRecord, Metric, NoteRecord
from qtune.run.resumption import kept_folders, kept_step
from qtune.verdicts.interval import Fall
from qtune.verdicts.learning import fall_of

CONFIDENCE = 0.95


class KeepBest(TrainerCallback):
    """Keeps the trained state of the best evaluation in `folder`/best-STEP, and ends a run that finds no better one."""

    def __init__(
        self,
        folder: Path,
        training: Training,
        note: Callable[[str, int], None],
        before: Sequence[Metric] = (),
        judged: Callable[[float], float] = lambda loss: loss,
    ) -> None:
        """`before` are the records up to the step that a run goes on from; `note` is told why the run has ended early,
        and after which step. judged: the loss of all validation rows -> that of those which training has not seen, by
        which states are compared (`Metrics.judged`)."""
        self.folder = folder
        self.training = training
        self.note = note
        self.judged = judged
        self.best_loss, self.since = math.inf, 0
        self.chosen: int | None = None
        """The step whose state is the result, once that was decided; None: the last."""
        for record in before:
            if isinstance(record, EvalRecord) and record.step:
                self._count(record.judged_loss)
        last = max((record.step for record in before if not isinstance(record, NoteRecord)), default=0)
        for path in kept_states(folder):
            if kept_step(path) > last:  # of steps that will be taken again
                shutil.rmtree(path, ignore_errors=True)
        for path in kept_folders(folder):
            if (said := _fault(path)) is not None:
                console.say(f"{path} is not what was kept: {said}; it is left as it is")
        kept = {kept_step(path) for path in kept_states(folder)}
        losses = [record.judged_loss for record in before if isinstance(record, EvalRecord) and record.step in kept]
        self.kept_loss = min(losses, default=math.inf)
        """The lowest loss that there is a state of: the best one's may be lost."""
        self.stopped_early = training.patience is not None and self.since >= training.patience
        """Whether patience has ended the run before its last step."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not state.global_step:  # an adapter that has learned nothing is no result
            return control
        loss = self.judged(float(kwargs["metrics"]["eval_loss"]))
        self._count(loss)
        if loss < self.kept_loss:
            self.kept_loss = loss
            self._keep(kwargs["model"], state.global_step)
        patience = self.training.patience
        if patience is not None and self.since >= patience and state.global_step < state.max_steps:
            self.stopped_early = True
            control.should_training_stop = True
            times = "evaluation" if patience == 1 else f"{patience} evaluations in a row"
            said = f"stopped at step {state.global_step}: {times} found no lower loss than {self.best_loss:.4f}"
            self.note(said, state.global_step)
        return control

    def _count(self, loss: float) -> None:
        """Counts an evaluation for patience; a loss that is no number is none that is better."""
        if loss < self.best_loss:
            self.best_loss, self.since = loss, 0
        else:
            self.since += 1

    def _keep(self, model: PeftModel, step: int) -> None:
        if self.training.result == "last":
            return
        older = kept_states(self.folder)
        was_training = model.training
        model.eval()  # peft computes the vectors of a prompt encoder without its dropout
        RunDir(self.folder.parent).require_there()
        folder = self.folder / f"best-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_trained_state(model, folder)
        seal(folder, step, by=saved_by(self.folder.parent))
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
        self.chosen, said = choice(records, [kept_step(path) for path in kept], self.training.result, step)
        if self.chosen is not None:
            load_trained_state(model, self.folder / f"best-{self.chosen}")
        return said

    def forget(self) -> None:
        """Removes what was kept, once the adapter is saved; not what the adapter is, of which it may have to be made
        again (`run.finished.adapter_fault`)."""
        for path in kept_states(self.folder):
            if kept_step(path) != self.chosen:
                shutil.rmtree(path, ignore_errors=True)


def kept_states(folder: Path) -> list[Path]:
    """The kept states in a folder that are whole, the earliest first."""
    return [path for path in kept_folders(folder) if (path / STATE_FILE).is_file() and _fault(path) is None]


def _fault(path: Path) -> str | None:
    """What is wrong with a kept state; of one that an older version kept, without a manifest, nothing is known."""
    return fault(path, kept_step(path)) or foreign_folder(path.parents[1], path) if is_sealed(path) else None


def choice(records: Sequence[Metric], kept: Sequence[int], result: str, step: int) -> tuple[int | None, str | None]:
    """The step whose state is the run's result, None for the last; and the reason in words, None without a choice.

    kept: the steps that there are states of. Under "best-beyond-noise" the best is taken where the last evaluation is
    above it by more than noise, and the run ended there: by the paired interval over the validation rows, widened for
    as many comparisons as there were (Bonferroni), for the lowest of several losses is partly luck. A best that there
    is no state of is said.
    """
    looked = [one for one in records if isinstance(one, EvalRecord) and one.step and math.isfinite(one.judged_loss)]
    if not looked or result == "last":
        return None, None
    best, last = min(looked, key=lambda one: one.judged_loss), looked[-1]
    if last.step == best.step and step == last.step:
        return None, None
    if result != "best" and step > last.step:
        told = f"the adapter is the last, of step {step:,}: nothing was measured behind step {last.step:,}"
        return None, f'{told}; with training.result = "best" a run takes the best that was measured'
    fall = _beyond_noise(best, looked)
    if result != "best" and fall is None:
        told = f"the adapter is the last: {_compared(best, last)}, which may be noise"
        return None, f'{told}; with training.result = "best" a run takes the best, whatever noise is'
    if best.step not in kept:
        return _second_best(best, looked, kept, result, step)
    told = _compared(best, last)
    if result == "best" or fall is None:
        return best.step, f"the adapter is that of step {best.step:,}, the best: {told}"
    text = f"the adapter is that of step {best.step:,}, better than the last by more than noise: {told}"
    others = len(looked) - 1
    of_all = f" for {others} comparisons" if others > 1 else ""
    interval = f"95 % interval{of_all} {fall.low:.4f} to {fall.high:.4f}"
    return best.step, f'{text}, lower by {fall.mean:.4f} ({interval}); training.result = "last" takes the last'


def _second_best(
    best: EvalRecord, looked: Sequence[EvalRecord], kept: Sequence[int], result: str, step: int
) -> tuple[int | None, str]:
    """What is taken, and why, where the best state is lost: the best that was kept, if it would have been taken."""
    last = looked[-1]
    lost = f"the state of step {best.step:,}, which was better, is no longer there: {_compared(best, last)}"
    found = min((one for one in looked if one.step in kept), key=lambda one: one.judged_loss, default=None)
    is_last = found is None or (found is last and step == last.step)
    if found is None or is_last or (result != "best" and _beyond_noise(found, looked) is None):
        return None, f"the adapter is the last, for {lost}"
    return (
        found.step,
        f"the adapter is that of step {found.step:,}, validation loss {found.judged_loss:.4f}, for {lost}",
    )


def _beyond_noise(best: EvalRecord, looked: Sequence[EvalRecord]) -> Fall | None:
    """How far an evaluation is below the last one; None where that may be noise."""
    if best is looked[-1]:
        return None
    fall = fall_of(looked[-1], best, 1 - (1 - CONFIDENCE) / max(1, len(looked) - 1))
    return fall if fall is not None and fall.is_positive else None


def _compared(best: EvalRecord, last: EvalRecord) -> str:
    return f"validation loss {best.judged_loss:.4f} at step {best.step:,}, {last.judged_loss:.4f} at step {last.step:,}"
