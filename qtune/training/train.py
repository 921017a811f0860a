"""Training, from a checked recipe to a run's folder; and on again from its last complete checkpoint."""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from qtune import console
from qtune.adapter.attach import attach_adapter, save_adapter
from qtune.adapter.from_run import start_from
from qtune.adapter.starts import start_from_activations, start_from_residual
from qtune.data.collate import collator_for
from qtune.data.findings import gate
from qtune.data.inspection import inspect
from qtune.data.prepare import Prepared, prepare
from qtune.data.sources import find_sources
from qtune.device.present import Device, is_out_of_memory, present_device
from qtune.device.processes import other_holders
from qtune.errors import InputError, Interrupted, ModelError, OutOfMemory, Problem, RunError
from qtune.export.gguf.file import refuse_unconvertible
from qtune.memory.longest import Rows, longest_of
from qtune.memory.measured.failure_text import failure_text
from qtune.memory.measured.meter import Failure, Meter
from qtune.memory.measured.out_of_memory import Report, first_report, with_offers
from qtune.memory.profile import Forecast, attempted
from qtune.model.load import attention_rule, base_folder, count_parameters, load_base, load_config, load_tokenizer
from qtune.model.loss import loss_agrees
from qtune.plan import Plan, make_plan
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Lora, Recipe
from qtune.report.page import write_report
from qtune.run.folder import RunDir
from qtune.run.lock import lock_of, rows_hash
from qtune.run.resolved import resolved_text
from qtune.run.resumption import resumed_recipe
from qtune.startup.quiet import quiet_loading
from qtune.timing.forecast import TimeForecast, time_of
from qtune.timing.known import known_rates
from qtune.training.callbacks import (
    CheckpointClock,
    Intervals,
    Metrics,
    OptimizerPhase,
    StopOnSignal,
    forget_after,
    has_evaluation,
)
from qtune.training.display import TrainingDisplay, clock
from qtune.training.pace import Comparison
from qtune.training.trainer import (
    QloraTrainer,
    complete_checkpoints,
    remove_incomplete_checkpoints,
    require_finite,
    sft_config,
)

log = logging.getLogger(__name__)

CHECKED_TOKENS = 64
"""Length of the row on which the tiled loss is compared with the model's own, before training."""


@dataclass(frozen=True)
class Inputs:
    """What a run needs before anything heavy is loaded."""

    resolved: Resolved
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    forecast: Forecast | None
    """What memory is predicted to be needed; None on a CPU, where nothing is decided by it."""
    time: TimeForecast | None
    """How long the run is predicted to take; None where no rates of the device are known."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe


def run(resolved: Resolved, allow: tuple[str, ...] = (), *, snapshot: bool = False) -> RunDir:
    """Trains a recipe into a new run folder.

    snapshot: of the CUDA allocator, beside the other files of the run.

    Raises:
        InputError: the recipe's data or model cannot be used.
        GateError: the data would train the wrong thing, and `allow` or [data] allow does not waive it.
        WorkError: training failed. Interrupted: the user stopped it; the state is saved.
    """
    if snapshot:
        _require_allocator()
    # What is waived on the command line is part of the run: resolved.toml keeps it for --resume.
    resolved = resolved.allowing(allow)
    inputs = _gather(resolved)
    recipe = inputs.recipe
    name = recipe.output.name or resolved.file.stem
    run_dir = RunDir.create(Path(recipe.output.directory), name, resolved.text)
    run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, inputs.plan))
    _train(inputs, run_dir, None, snapshot)
    write_report(run_dir)
    return run_dir


def resume(
    run_dir: RunDir, changes: Sequence[str] = (), allow: tuple[str, ...] = (), *, snapshot: bool = False
) -> RunDir:
    """Goes on with a run from its last complete checkpoint, exactly as if it had never stopped.

    changes: `--set` texts, of keys that do not decide what is learned (`resumption.CHANGEABLE`).

    Raises:
        RunError: the run has already ended, or its rows are not what they were.
        RecipeError: a change would make another run.
        InputError, WorkError, Interrupted: as `run`.
    """
    if run_dir.is_finished:
        raise RunError(Problem(str(run_dir.path), "has ended; there is nothing to resume"))
    if snapshot:
        _require_allocator()
    # resolved.toml holds what was decided, so that another card or a newer rule cannot change it half way.
    resolved = resumed_recipe(run_dir, changes).allowing(allow)
    inputs = _gather(resolved)
    _require_same_rows(inputs, run_dir)
    if changes or allow:
        run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, inputs.plan))
    remove_incomplete_checkpoints(run_dir.checkpoints)
    checkpoints = complete_checkpoints(run_dir.checkpoints)
    step = int(checkpoints[-1].name.removeprefix("checkpoint-")) if checkpoints else 0
    console.say(f"resuming {run_dir.path} from step {step}")
    forget_after(run_dir.metrics_file, step)
    _train(inputs, run_dir, checkpoints[-1] if checkpoints else None, snapshot)
    write_report(run_dir)
    return run_dir


def _gather(resolved: Resolved) -> Inputs:
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
    is_card, rows = plan.device.kind == "cuda", longest_of(prepared)
    expected = _predict(config, recipe, plan.device, rows) if is_card else None
    duration = _predict_time(config, recipe, plan.device, rows, expected)
    return Inputs(resolved, expected.plan if expected else plan, tokenizer, prepared, expected, duration)


def _require_allocator() -> None:
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
        need, budget = found.prediction.need.total_bytes / 2**30, found.budget_bytes / 2**30
        what = "one row is" if found.plan.micro_batch_size == 1 else f"{found.plan.micro_batch_size} rows are"
        verdict = " (too close to say)" if found.verdict == "too close to say" else ""
        console.say(
            f"{what} predicted to need {need:.1f} GiB of {budget:.1f}{verdict}; qtune fit shows what would help"
        )
    return found


def _predict_time(
    config: PretrainedConfig, recipe: Recipe, device: Device, rows: Rows, expected: Forecast | None
) -> TimeForecast | None:
    """How long the run will take, where that can be known; nothing depends on it."""
    if known_rates(device) is None:
        return None
    found = expected or attempted(config, recipe, device, rows)
    try:
        return None if isinstance(found, str) else time_of(config, recipe, found)
    except ModelError:
        log.debug("the time could not be predicted", exc_info=True)
        return None


def _require_same_rows(inputs: Inputs, run_dir: RunDir) -> None:
    if not run_dir.lock_file.is_file():
        return
    if run_dir.read_json(run_dir.lock_file).get("training_rows_blake2b") != rows_hash(inputs.prepared):
        message = (
            "the training rows are not those that the run began with, so the rest would not be the same run; put the "
            "data back as it was, or begin again with qtune run"
        )
        raise RunError(Problem(str(run_dir.path), message))


def _train(inputs: Inputs, run_dir: RunDir, checkpoint: Path | None, snapshot: bool) -> None:
    """Trains, or says why memory ran out and what would have fit."""
    failure: Failure | None = None
    file = run_dir.snapshot_file if snapshot else None
    try:
        _load_and_train(inputs, run_dir, checkpoint, Meter(torch.device(inputs.plan.device.torch_name), snapshot=file))
    except OutOfMemory as error:
        log.debug("memory ran out", exc_info=True)
        failure = error.failure
        if failure is None:
            raise
    # Outside of the handler nothing holds the failed step's frames, and with them the model, any longer.
    if failure is not None:
        raise OutOfMemory(failure_text(_explained(failure, inputs, run_dir).to_json()), failure)


def _load_and_train(inputs: Inputs, run_dir: RunDir, checkpoint: Path | None, meter: Meter) -> None:
    recipe = inputs.recipe
    display = TrainingDisplay()
    metrics = Metrics(run_dir.metrics_file, display.show, meter)
    stop = StopOnSignal(lambda: metrics.note("stopping after this step; once more stops at once"))
    with _measured(meter, inputs, run_dir), _seeing_out_of_memory(meter):
        meter.enter("load")
        model, tiled = _build_model(inputs)
        _write_lock(inputs, run_dir, model)
        if _is_pissa(recipe):
            model.save_pretrained(_initial_adapter(run_dir))
        owed = checkpoint is not None and _is_owed_evaluation(checkpoint, inputs, run_dir)
        trainer = _make_trainer(inputs, run_dir, model, tiled, metrics, stop, evaluate_first=owed)
        with display, stop.listening():
            if checkpoint is not None and _is_last(checkpoint):
                trainer.take_state_of(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if trainer.comparison is not None:
                metrics.note(f"{trainer.comparison}")
            if trainer.state.global_step >= trainer.state.max_steps:
                meter.enter("save")
                require_finite(model, trainer.state.global_step)
                _save(model, inputs, run_dir)
    if not run_dir.is_finished:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved\n"
            f"go on with: qtune run --resume {run_dir.path}"
        )


def _explained(failure: Failure, inputs: Inputs, run_dir: RunDir) -> Report:
    """The report of a run whose memory ran out, kept in memory.json before and after what would have fit is traced."""
    gc.collect()
    others = None
    if inputs.plan.device.kind == "cuda":
        torch.cuda.empty_cache()
        others = other_holders(str(torch.cuda.get_device_properties(0).uuid))
    saved = complete_checkpoints(run_dir.checkpoints)
    name = saved[-1].name if saved else None
    report = first_report(failure, inputs.recipe, inputs.plan, run_dir, name, others)
    kept = run_dir.read_json(run_dir.memory_file)
    run_dir.write_json(run_dir.memory_file, kept | {"failure": report.to_json()})
    with console.progress("memory ran out; tracing what would have fit (Ctrl-C leaves it out)") as bar:
        rows = longest_of(inputs.prepared)
        report = with_offers(
            report, inputs.recipe, inputs.plan, rows, run_dir, lambda words: bar.update(bar.done + 1, description=words)
        )
    run_dir.write_json(run_dir.memory_file, kept | {"failure": report.to_json()})
    return report


def _is_last(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def _is_owed_evaluation(checkpoint: Path, inputs: Inputs, run_dir: RunDir) -> bool:
    """Whether the run was stopped between saving an epoch's last step and evaluating it."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    ends_epoch = float(state.epoch or 0).is_integer() or _is_last(checkpoint)
    evaluates = inputs.recipe.training.eval_every == "epoch" and inputs.prepared.validation is not None
    return ends_epoch and evaluates and not has_evaluation(run_dir.metrics_file, state.global_step)


@contextmanager
def _seeing_out_of_memory(meter: Meter) -> Iterator[None]:
    """Looks at what is alive as soon as memory has run out, wherever no micro-batch can be split.

    Raises:
        OutOfMemory: with what was seen.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) and error.failure is not None:
            raise
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error), meter.failure(error.__cause__ or error)) from error


@contextmanager
def _measured(meter: Meter, inputs: Inputs, run_dir: RunDir) -> Iterator[None]:
    """Keeps what was predicted and measured, however training ends."""
    try:
        yield
    finally:
        measured = meter.result()
        meter.close()
        if meter.snapshot_written:
            console.say(f"allocator snapshot: {meter.snapshot_written}")
        predicted = {"predicted": inputs.forecast.to_json()} if inputs.forecast else {}
        run_dir.write_json(run_dir.memory_file, {**predicted, "measured": measured})


def _build_model(inputs: Inputs) -> tuple[PeftModel, bool]:
    """The 4-bit base with a fresh adapter, and whether the tiled loss is exact for this family."""
    recipe, plan = inputs.recipe, inputs.plan
    if recipe.output.gguf is not None:
        refuse_unconvertible(load_config(recipe.model), inputs.tokenizer, recipe.model.base)
    with console.progress(f"loading {recipe.model.base}"):
        network = load_base(recipe.model, recipe.quantization, plan)
    row = inputs.prepared.train[0]["input_ids"][:CHECKED_TOKENS]
    tiled = loss_agrees(network, torch.tensor([row], device=network.device))
    if not tiled:
        console.say(
            f"{type(network).__name__} computes its logits in its own way: they are kept whole, which costs memory"
        )
    set_seed(recipe.training.seed)
    model = attach_adapter(network, recipe.adapter, plan, inputs.tokenizer)
    if isinstance(recipe.adapter, Lora):
        _finish_lora(model, recipe.adapter, inputs)
    start_from(model, recipe)
    _introduce(network, model, inputs)
    return model, tiled


def _finish_lora(model: PeftModel, adapter: Lora, inputs: Inputs) -> None:
    recipe = inputs.recipe
    if adapter.initialization == "eva":
        assert inputs.tokenizer.pad_token_id is not None
        start_from_activations(
            model, inputs.prepared.train, int(inputs.tokenizer.pad_token_id), inputs.plan.micro_batch_size
        )
    elif adapter.initialization == "loftq":
        start_from_residual(model, base_folder(recipe.model), recipe.model.revision)


def _introduce(network: PreTrainedModel, model: PeftModel, inputs: Inputs) -> None:
    """What is about to be trained, in three lines."""
    plan, count = inputs.plan, count_parameters(model)
    base = count.total - count.trainable
    console.say(
        f"{type(network).__name__}, {base / 1e6:,.1f} M parameters, {count.quantized_share:.0%} of them in "
        f"{inputs.recipe.quantization.kind}; {inputs.recipe.adapter.kind} trains {count.trainable / 1e6:,.2f} M "
        f"({count.trainable / base:.2%})"
    )
    reason = plan.reasons.get(("quantization", "compute_dtype"), "as the recipe says")
    console.say(f"computing in {plan.compute_dtype}: {reason}")
    console.say(
        f"{len(inputs.prepared.train):,} training rows, {plan.micro_batch_size * plan.accumulation_steps} per step "
        f"in micro-batches of {plan.micro_batch_size}"
    )
    if (time := inputs.time) is not None and time.run_seconds is not None:
        console.say(
            f"{time.step_seconds:.2f} s a step and {clock(time.run_seconds)} in all are predicted, from "
            f"{'measured rates' if time.kind == 'measured' else 'a data sheet'}"
        )


def _make_trainer(
    inputs: Inputs,
    run_dir: RunDir,
    model: PeftModel,
    tiled: bool,
    metrics: Metrics,
    stop: StopOnSignal,
    *,
    evaluate_first: bool,
) -> QloraTrainer:
    recipe, plan, prepared = inputs.recipe, inputs.plan, inputs.prepared
    training = recipe.training
    has_validation = prepared.validation is not None
    config = sft_config(training, plan, run_dir, has_validation=has_validation, evaluate_first=evaluate_first)
    # One process drives one card; with several visible, transformers would wrap the model in DataParallel.
    config._n_gpu = min(config.n_gpu, 1)
    clock = [CheckpointClock(training.checkpoint_minutes)] if training.checkpoint_minutes else []
    pad_id = inputs.tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    trainer = QloraTrainer(
        model=model,
        config=config,
        plan=plan,
        training=training,
        meter=metrics.meter,
        tokenizer=inputs.tokenizer,
        train=prepared.train,
        validation=prepared.validation,
        collator=collator_for(prepared.packed, pad_id, plan.attention),
        lengths=prepared.lengths.tolist(),
        callbacks=[Intervals(), metrics, stop, OptimizerPhase(metrics.meter), *clock],
        tiled_loss=tiled,
        note=metrics.note,
        comparison=Comparison(inputs.time.model.seconds) if inputs.time else None,
        rates_source=inputs.time.source if inputs.time else "",
    )
    # transformers' own: it prints a dictionary for every record.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    return trainer


def _write_lock(inputs: Inputs, run_dir: RunDir, model: PeftModel) -> None:
    data = inputs.recipe.data
    given = [data.train, data.validation, data.test]
    sources = [
        source
        for value in given
        if value is not None and not isinstance(value, float)
        for source in find_sources(value, data, inputs.resolved.folder)
    ]
    commit = getattr(model.get_base_model().config, "_commit_hash", None)
    base, template = base_folder(inputs.recipe.model), inputs.prepared.template.text
    lock = lock_of(inputs.recipe, inputs.plan, base, commit, sources, rows_hash(inputs.prepared), template)
    run_dir.write_json(run_dir.lock_file, lock)


def _is_pissa(recipe: Recipe) -> bool:
    return isinstance(recipe.adapter, Lora) and recipe.adapter.initialization == "pissa"


def _initial_adapter(run_dir: RunDir) -> Path:
    """PiSSA's start, the same in every process of a run: it depends on the base's weights alone."""
    return run_dir.checkpoints / "initial"


def _save(model: PeftModel, inputs: Inputs, run_dir: RunDir) -> None:
    """The adapter appears whole: its folder is renamed last, and its presence is what makes a run finished."""
    temporary = run_dir.path / ".adapter"
    save_adapter(model, temporary, _initial_adapter(run_dir) if _is_pissa(inputs.recipe) else None)
    inputs.tokenizer.save_pretrained(temporary)
    temporary.rename(run_dir.adapter)
