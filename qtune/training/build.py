"""Base, adapter and loss -> the trainer of a run."""

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from qtune import console
from qtune.adapter.attach import attach_adapter
from qtune.adapter.starts import EVA_ROWS, Material, start
from qtune.data.collate import collator_for
from qtune.data.prepare import TRAINED, Prepared
from qtune.model.layer_stream import stream_of
from qtune.model.load import load_base
from qtune.model.loss import loss_agrees
from qtune.model.quantization import count_parameters
from qtune.plan import Plan
from qtune.run.folder import RunDir
from qtune.training.arguments import sft_config
from qtune.training.best import KeepBest
from qtune.training.callbacks import CheckpointClock, Intervals, Metrics, OptimizerPhase, PeakRate, StopOnSignal
from qtune.training.inputs import Inputs
from qtune.training.pace import ExpectedPace
from qtune.training.ranks import ALONE, Agree, Ranks
from qtune.training.sample_answers import SampleAnswers
from qtune.training.trainer import QloraTrainer

CHECKED_TOKENS = 64
"""Length of the row on which the tiled loss is compared with the model's own, before training."""


def build_model(inputs: Inputs, after: int = 0) -> tuple[PeftModel, bool]:
    """The 4-bit base with a fresh adapter, and whether the tiled loss is exact for this family. after: the
    step of the checkpoint that is loaded next; 0: of none."""
    recipe, plan = inputs.recipe, inputs.plan
    network = load_base(recipe.model, recipe.quantization, plan)
    if plan.layers == "sharded":
        console.say(f"{stream_of(network)}")
    row = inputs.prepared.row(0)["input_ids"][:CHECKED_TOKENS]
    tiled = loss_agrees(network, torch.tensor([row], device=network.device))
    if not tiled:
        console.say(
            f"{type(network).__name__} computes its logits in its own way: they are kept whole, which costs memory"
        )
    set_seed(recipe.training.seed)
    model = attach_adapter(network, recipe.adapter, plan)
    reads_rows = getattr(recipe.adapter, "initialization", None) in ("rows", "eva")
    train = rows_at_hand(inputs.prepared, EVA_ROWS if reads_rows else 1)
    start(model, recipe, Material(inputs.tokenizer, train, plan.micro_batch_size), goes_on=after > 0)
    introduce(network, model, inputs, after)
    return model, tiled


def introduce(network: PreTrainedModel, model: PeftModel, inputs: Inputs, after: int = 0) -> None:
    """What is about to be trained, in three lines, and how long it is predicted to take; after: the step that a run
    goes on from."""
    plan, count = inputs.plan, count_parameters(model)
    base = count.total - count.trainable
    console.say(
        f"{type(network).__name__}, {base / 1e6:,.1f} M parameters, {count.quantized_share:.0%} of them in "
        f"{inputs.recipe.quantization.kind}; {inputs.recipe.adapter.kind} trains {count.trainable / 1e6:,.2f} M "
        f"({count.trainable / base:.2%})"
    )
    console.say(f"computing in {plan.compute_dtype}: {_why_computed_in(inputs)}")
    rows, packed = f"{len(inputs.prepared.train):,}", inputs.prepared.packed_rows
    console.say(
        f"{f'{packed:,} training rows packed into {rows}' if packed else f'{rows} training rows'}, "
        f"{inputs.recipe.training.batch_size} per step in micro-batches of {plan.micro_batch_size}{_shared(plan)}"
    )
    if inputs.prepared.stream is not None:
        console.say(f"rows are streamed: {inputs.prepared.stream.in_words}")
    if (time := inputs.time) is not None and (left := time.seconds_after(after)) is not None:
        what = f"for what is left after step {after:,}" if after else "in all"
        console.say(
            f"{time.step_seconds:.2f} s a step and {console.clock(left)} {what} are predicted, from "
            f"{'measured rates' if time.kind == 'measured' else 'a data sheet'}"
        )


def _why_computed_in(inputs: Inputs) -> str:
    """Who has decided the compute dtype. What a rule has settled stands in the recipe of a run that goes on as a value,
    and its origin is the rule all the same."""
    path = ("quantization", "compute_dtype")
    if path in inputs.plan.reasons:
        return inputs.plan.reasons[path]
    origin = inputs.resolved.origins[path]
    match origin.source:
        case "rule":
            return f"as this run began ({origin.reason})" if origin.reason else "as this run began"
        case "--set":
            return "as --set says"
        case _:
            return "as the recipe says"


def _expected_pace(inputs: Inputs) -> ExpectedPace | None:
    time = inputs.time
    return ExpectedPace(time.model.seconds, time.source, inputs.plan.device.kind == "cuda") if time else None


def _shared(plan: Plan) -> str:
    processes = plan.device.processes
    return f", shared out among {processes} processes" if processes > 1 else ""


def rows_at_hand(prepared: Prepared, count: int) -> Dataset:
    """The training rows; of a stream so many, spread over it."""
    stream = prepared.stream
    if stream is None:
        return prepared.train
    rows = [stream.example(int(row)) for row in stream.some(count)]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in TRAINED})


def make_trainer(
    inputs: Inputs,
    run_dir: RunDir,
    model: PeftModel,
    tiled: bool,
    metrics: Metrics,
    stop: StopOnSignal,
    *,
    evaluate_first: bool,
    best: KeepBest | None = None,
    answers: SampleAnswers | None = None,
    ranks: Ranks = ALONE,
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
        train=rows_at_hand(prepared, 1),
        stream=prepared.stream,
        validation=prepared.validation,
        collator=collator_for(prepared.packed, pad_id, plan.attention),
        lengths=prepared.lengths.tolist() if prepared.stream is None else [],
        callbacks=[
            Intervals(),
            PeakRate(plan.learning_rate),
            metrics,
            *([best] if best else []),
            *([answers] if answers else []),
            stop,
            OptimizerPhase(metrics.meter),
            *clock,
            *([Agree(ranks, stop)] if ranks.are_several else []),
        ],
        tiled_loss=tiled,
        note=metrics.note,
        beside=metrics.beside,
        take_rows=metrics.take_rows,
        take_norm=metrics.take_norm,
        comparison=_expected_pace(inputs),
        outliers=metrics.outliers if training.skip_outlier_steps else None,
        ranks=ranks,
    )
    # transformers' own: it prints a dictionary for every record.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    return trainer
