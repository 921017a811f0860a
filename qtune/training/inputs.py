"""What a run needs before anything heavy is loaded, as a value; whatever can fail early fails here."""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qtune import console
from qtune.data.findings import gate
from qtune.data.inspection import inspect
from qtune.data.prepare import Prepared, prepare
from qtune.device.present import Device, present_device
from qtune.errors import InputError, Problem, RunError
from qtune.memory.forecast import Forecast, attempted
from qtune.memory.longest import Rows, longest_of
from qtune.model.load import attention_rule, load_config, load_tokenizer
from qtune.plan import Plan, make_plan
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.run.lock import read_lock, rows_hash
from qtune.sizes import GIB
from qtune.startup.quiet import quiet_loading


@dataclass(frozen=True)
class Inputs:
    """What a run needs before anything heavy is loaded."""

    resolved: Resolved
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    forecast: Forecast | None
    """What memory is predicted to be needed; None on a CPU, where nothing is decided by it."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe


def gather(resolved: Resolved) -> Inputs:
    """Everything that can fail early: configuration, tokenizer, rows, masks, gate."""
    quiet_loading()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(Problem("WORLD_SIZE", "qtune trains on one card in one process; start it without a launcher"))
    recipe = resolved.recipe
    _require_trackers(recipe)
    config = load_config(recipe.model)
    plan = make_plan(recipe, present_device(), attention_rule(config))
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe.data, tokenizer, resolved.folder, seed=recipe.training.seed)
    tokenizer.chat_template = prepared.template.text
    gate(inspect(prepared, recipe.data, config.get_text_config().vocab_size).findings, recipe.data.allow)
    expected = _predict(config, recipe, plan.device, longest_of(prepared)) if plan.device.kind == "cuda" else None
    return Inputs(resolved, expected.plan if expected else plan, tokenizer, prepared, expected)


def require_allocator() -> None:
    """A CPU's allocator keeps no history of what it gave away."""
    device = present_device()
    if device.kind != "cuda":
        message = f"only a CUDA card's allocator can be asked for it, and this would run on {device.name}; leave it out"
        raise InputError(Problem("--memory-snapshot", message))


def _require_trackers(recipe: Recipe) -> None:
    """transformers would only say it after the model is loaded."""
    missing = [name for name in recipe.training.trackers if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise InputError(Problem("training.trackers", f"not installed: {names}; pip install {names}, or remove it"))


def _predict(config: PretrainedConfig, recipe: Recipe, device: Device, rows: Rows) -> Forecast | None:
    """What the run will need; a prediction that fails stops no run that may fit."""
    found = attempted(config, recipe, device, rows)
    if isinstance(found, str):
        console.say(f"memory could not be predicted ({found}); micro-batches shrink if they must")
        return None
    if not found.fits:
        need, budget = found.prediction.need.total_bytes / GIB, found.budget_bytes / GIB
        what = "one row is" if found.plan.micro_batch_size == 1 else f"{found.plan.micro_batch_size} rows are"
        console.say(f"{what} predicted to need {need:.1f} GiB of {budget:.1f}; qtune fit shows what would help")
    return found


def require_same_rows(inputs: Inputs, run_dir: RunDir) -> None:
    lock = read_lock(run_dir)
    if lock is not None and lock.training_rows_blake2b != rows_hash(inputs.prepared):
        message = (
            "the training rows are not those that the run began with, so the rest would not be the same run; put the "
            "data back as it was, or begin again with qtune run"
        )
        raise RunError(Problem(str(run_dir.path), message))
