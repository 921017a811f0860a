"""What a run needs before anything heavy is loaded, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.data.batches import rows_of_step
from qtune.data.findings import said_before_a_run
from qtune.data.prepare import Prepared
from qtune.data.stream import RowStream
from qtune.device.present import present_device
from qtune.errors import InputError, Problem
from qtune.memory.forecast import Forecast, attempted
from qtune.memory.longest import longest_of
from qtune.model.load import load_config
from qtune.plan import Plan
from qtune.preflight import Preflight, examine
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Recipe, Training
from qtune.run.checkpoints import usable_checkpoints
from qtune.run.folder import RunDir
from qtune.timing.forecast import TimeForecast, attempted_time
from qtune.timing.known import known_rates
from qtune.tuned.seen import prompts_in, seen_rows, stand_in_training


@dataclass(frozen=True)
class Inputs:
    """What a run needs before anything heavy is loaded."""

    resolved: Resolved
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    forecast: Forecast | None
    """What memory is predicted to be needed; None on a CPU, where nothing is decided by it."""
    time: TimeForecast | None = None
    """How long the run is predicted to take; None where no rates of the device are known."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe


def gather(resolved: Resolved, run_dir: RunDir | None = None, *, accepted: Sequence[str] = ()) -> Inputs:
    """A recipe whose preflight found nothing that stops it; what it warns of is said.

    run_dir: of a run that goes on. accepted: drifts of the base of the run that it starts from.

    Raises:
        InputError, GateError: something stops it.
    """
    goes_on = run_dir is not None and bool(usable_checkpoints(run_dir.checkpoints))
    folder = run_dir.path if run_dir else None
    preflight = examine(resolved, folder=folder, accepted=accepted, loads=True, goes_on=goes_on)
    preflight.require()
    warnings = preflight.warnings if run_dir is None else preflight.limits
    for warning in (*said_before_a_run(preflight.inspection.findings), *warnings):
        console.say(warning)
    forecast = preflight.forecast if isinstance(preflight.forecast, Forecast) else None
    return Inputs(
        resolved,
        preflight.plan,
        preflight.tokenizer,
        preflight.prepared,
        forecast,
        _time(resolved.recipe, preflight),
    )


def _time(recipe: Recipe, preflight: Preflight) -> TimeForecast | None:
    """On a CPU the step is traced for this alone, where the processor was measured."""
    device = preflight.plan.device
    if known_rates(device) is None:
        return None
    found = preflight.forecast or attempted(
        load_config(recipe.model), recipe, device, longest_of(preflight.prepared, recipe.data)
    )
    return attempted_time(recipe, found)


def seen_validation(inputs: Inputs) -> list[bool | None]:
    """Of each validation row whether its prompt stands in rows that are trained on, or that a run was trained on which
    this one starts from; None where that is not known. Empty where there is none."""
    data, rows = inputs.recipe.data, inputs.prepared.examples.get("validation")
    if rows is None:
        return []
    is_share = isinstance(data.validation, float)
    if is_share and inputs.recipe.adapter.start_from is None:
        # Drawn so that hardly any does: first ones of talks may, where most begin alike.
        return list(map(bool, stand_in_training(inputs.prepared, prompts_in(rows))))
    return seen_rows(inputs.recipe, inputs.resolved.folder, inputs.tokenizer, rows, is_share=is_share).flags


MOST_NAMED = 8


def batch_in_words(inputs: Inputs, step: int) -> str:
    """The rows of an optimizer step, by their places in the files: "rows a.jsonl:4, a.jsonl:9 and 14 more"."""
    prepared, training = inputs.prepared, inputs.recipe.training
    if prepared.stream is not None:
        numbers = _streamed_rows(prepared.stream, training, step)
    else:
        numbers = rows_of_step(prepared.lengths, training.batch_size, training.seed, step)
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    if prepared.stream is not None:
        places = [prepared.stream.example(number)["place"] for number in numbers[:MOST_NAMED]]
        return f"rows {', '.join(places)}{more}"
    if prepared.order is None:
        return f"packed rows {', '.join(str(number + 1) for number in numbers[:MOST_NAMED])}{more}"
    examples = prepared.examples["train"].select_columns(["place"])
    return f"rows {', '.join(examples[int(prepared.order[number])]['place'] for number in numbers[:MOST_NAMED])}{more}"


def _streamed_rows(stream: RowStream, training: Training, step: int) -> list[int]:
    """The rows of an optimizer step of a stream."""
    sampler = stream.order(training.batch_size, training.seed)
    epoch, place = divmod(step - 1, -(-len(sampler) // training.batch_size))
    sampler.set_epoch(epoch)
    return [int(row) for row in sampler.step(place)]


def require_allocator() -> None:
    """A CPU's allocator keeps no history of what it gave away."""
    device = present_device()
    if device.kind != "cuda":
        message = f"only a CUDA card's allocator can be asked for it, and this would run on {device.name}; leave it out"
        raise InputError(Problem("--memory-snapshot", message))
