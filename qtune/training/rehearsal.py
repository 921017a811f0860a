"""A rehearsal before the first step: whatever a run will only do after hours is done once, and undone.

The heaviest micro-batch of the first epoch goes forward, backward and through the optimizer; the longest rows of the
validation are evaluated; a checkpoint is written, read back and weighed against the disk; the model gives an answer.
Parameters, gradients, the optimizer, random numbers and the order of rows are afterwards what they were, bit for bit.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers.training_args import OptimizerNames

from qtune.adapter.state import load_trained_state, save_adapter, save_trained_state, trained_state
from qtune.data.batches import StepSampler
from qtune.data.masks import IGNORED
from qtune.device.freed_memory import freed_memory_stays
from qtune.errors import TrainingError
from qtune.memory.measured import process
from qtune.memory.measured.meter import Meter
from qtune.model.checkpointed import checkpoint_first, free_inputs, switched_layers
from qtune.preflight import best_states
from qtune.recipe.steps import kept_checkpoints
from qtune.run.checkpoints import OPTIMIZER
from qtune.run.folder import RunDir
from qtune.sizes import size_text
from qtune.training.arguments import OPTIMIZERS
from qtune.training.inputs import Inputs
from qtune.training.saved_state import save_tree
from qtune.training.trainer import QloraTrainer, release_cached_memory
from qtune.tuned.generate import find_ends, stream
from qtune.whole import passing

WORTH_STEPS = 50
"""Steps of a run from which a rehearsal is taken unasked: it costs about two of them."""
ANSWER_TOKENS = 4
PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Rehearsal:
    """What was done, in figures."""

    rows: int
    length: int
    """Tokens of the longest row of the micro-batch."""
    validated: bool
    checkpoint_bytes: int
    answered: bool
    seconds: float

    def __str__(self) -> str:
        evaluation = "an evaluation, " if self.validated else ""
        return (
            f"rehearsed in {self.seconds:.1f} s: the heaviest micro-batch ({self.rows} x {self.length} tokens), "
            f"{evaluation}a checkpoint of {size_text(self.checkpoint_bytes)}{' and an answer' * self.answered}"
        )


def is_worth_it(inputs: Inputs) -> bool:
    """What `training.rehearse` means for this run."""
    training = inputs.recipe.training
    if isinstance(training.rehearse, bool):
        return training.rehearse
    per_epoch = math.ceil(len(inputs.prepared.train) / training.batch_size)
    return (training.steps or math.ceil(training.epochs * per_epoch)) >= WORTH_STEPS


def rehearse(trainer: QloraTrainer, inputs: Inputs, run_dir: RunDir, *, has_initial: bool = False) -> Rehearsal:
    """Does everything once; of several processes the leader alone writes and answers. `has_initial`: the adapter is
    saved as a difference, which is left out.

    Raises:
        OutOfMemory: one row of the batch does not fit.
        TrainingError: the loss is no number, a checkpoint reads back otherwise, or the disk will not hold them.
        OSError: a checkpoint cannot be written.
    """
    began = time.monotonic()
    model = trainer.model
    assert isinstance(model, PeftModel)
    rows = _heaviest(inputs)
    with freed_memory_stays(trainer.args.device), _undone(trainer, model):
        _checkpoint_as_planned(model, inputs.plan.gradient_checkpointing)
        optimizer = _step(trainer, model, rows, inputs.plan.optimizer)
        if inputs.prepared.validation is not None:
            _evaluate(trainer, inputs)
        leads, size = trainer.ranks.is_leader, 0
        answers = leads and not trainer.in_lockstep
        if leads:
            size = _save(model, optimizer, inputs, run_dir, has_initial=has_initial)
        del optimizer
        if answers:
            _answer(model, inputs)
    if leads:
        state = sum(tensor.nbytes for tensor in trained_state(model).values())
        _require_disk(size, best_states(inputs.recipe) * state, inputs, run_dir)
    longest = max(len(row["input_ids"]) for row in rows)
    validated = inputs.prepared.validation is not None
    return Rehearsal(len(rows), longest, validated, size, answers, time.monotonic() - began)


def _heaviest(inputs: Inputs) -> list[dict[str, Any]]:
    """The largest micro-batch of the first epoch; of a stream that of its longest row, for which no other step has to
    be looked at: only a short last one could be smaller than another."""
    prepared, size, training = inputs.prepared, inputs.plan.micro_batch_size, inputs.recipe.training
    if prepared.stream is None:
        return [prepared.row(row) for row in heaviest(prepared.lengths, size, inputs)]
    sampler = prepared.stream.order(training.batch_size, training.seed)
    longest = prepared.stream.longest()
    step = sampler.step(sampler.place_of(longest)).tolist()
    start = step.index(longest) // size * size
    return [prepared.row(row) for row in step[start : start + size]]


def heaviest(lengths: np.ndarray, micro_batch_size: int, inputs: Inputs) -> list[int]:
    """The rows of the micro-batch of the first epoch with the most positions, padding included."""
    training = inputs.recipe.training
    order = StepSampler(lengths, training.batch_size, training.seed).order()
    batches = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    return [int(row) for row in max(batches, key=lambda batch: len(batch) * int(lengths[batch].max()))]


@contextmanager
def _undone(trainer: QloraTrainer, model: PeftModel) -> Iterator[None]:
    """Puts everything back that the block changes."""
    before = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    numbers = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    was_training, meter, optim = model.training, trainer.meter, trainer.args.optim
    switches = [(layer, layer.gradient_checkpointing) for layer in switched_layers(model)]
    meter.enter("idle")
    trainer.meter = Meter(meter.device, names_tensors=False)
    try:
        yield
    finally:
        trainer.meter.close()
        trainer.meter = meter
        trainer.forget_step()
        trainer.optimizer, trainer.args.optim = None, optim
        for layer, switch in switches:
            layer.gradient_checkpointing = switch
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in trained_state(model).items():
                tensor.copy_(before[name])
        model.train(was_training)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if on_cards:
            torch.cuda.set_rng_state_all(on_cards)
        release_cached_memory()
        if on_cards:
            torch.cuda.reset_peak_memory_stats()
        process.reset_peak()


def _checkpoint_as_planned(model: PeftModel, layers: bool | int) -> None:
    """What `train` does about the plan's gradient checkpointing when it begins."""
    if layers:
        model.activation_checkpointing_enable({"use_reentrant": False})
        checkpoint_first(model, layers)
        free_inputs(model)


def _step(
    trainer: QloraTrainer, model: PeftModel, rows: list[dict[str, Any]], optimizer_name: str
) -> torch.optim.Optimizer:
    """A micro-batch through the model and the optimizer, which is returned.

    A paged optimizer's place is taken by AdamW with 8-bit state: bitsandbytes never gives paged memory back (0.50,
    `GlobalPageManager`), and the run would keep the rehearsal's beside its own. Two bytes a trained weight are the
    least that a card which needs paging can be asked for.
    """
    batch = trainer.data_collator(rows)
    scored = int((batch["labels"] != IGNORED).sum())
    # As many as a step's, where these wait for one another.
    trainer.expected = trainer.micro_batches_together
    if not trainer.goes_together(model, batch):
        trainer.expected = 1
    tokens = torch.tensor(max(1, trainer.expected * scored), device=model.device)
    for _ in range(trainer.expected):
        loss: Tensor = trainer.training_step(model, dict(batch), tokens)
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"the loss of the heaviest batch is {float(loss)} before any weight was changed: no learning rate has done "
            "that. Look at its rows, or compute in another type (quantization.compute_dtype)"
        )
    _unscale(model, trainer.accelerator.scaler)
    trainer.args.optim = OptimizerNames(
        OPTIMIZERS["adamw-8bit" if optimizer_name.startswith("paged-") else optimizer_name]
    )
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    optimizer.step()
    return optimizer


def _unscale(model: PeftModel, scaler: torch.amp.GradScaler | None) -> None:
    """The gradients of a scaled loss, in place, as they would be without it. The first scale is too large for many
    models, which is why a run leaves such a step out; here what is no number counts as no gradient."""
    if scaler is None:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1 / scaler.get_scale()).nan_to_num_(0.0, 0.0, 0.0)


def _evaluate(trainer: QloraTrainer, inputs: Inputs) -> None:
    validation = inputs.prepared.validation
    assert validation is not None
    lengths = np.asarray(inputs.prepared.examples["validation"].with_format("numpy")["length"][:])
    longest = np.argsort(-lengths, kind="stable")[: inputs.plan.micro_batch_size]
    trainer.model.eval()
    trainer.evaluated(trainer.data_collator([validation[int(row)] for row in longest]))


def _save(
    model: PeftModel, optimizer: torch.optim.Optimizer, inputs: Inputs, run_dir: RunDir, *, has_initial: bool
) -> int:
    """Writes and reads a checkpoint where the run's will be, and takes it away; its bytes."""
    run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
    with passing(run_dir.checkpoints / "rehearsal") as folder:
        save_trained_state(model, folder)
        if not has_initial:
            save_adapter(model, folder)
        inputs.tokenizer.save_pretrained(folder)
        save_tree(folder / OPTIMIZER, optimizer.state_dict())
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        written = {name: tensor.clone() for name, tensor in trained_state(model).items()}
        load_trained_state(model, folder)
        if not all(_is_same(written[name], tensor) for name, tensor in trained_state(model).items()):
            raise TrainingError(
                f"{folder}: a checkpoint reads back otherwise than it was written; the disk is at fault"
            )
        return size


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bytes: one that is no number is itself, and 0 is not -0."""
    first, second = (tensor.detach().contiguous().reshape(-1) for tensor in (one, other))
    return first.dtype is second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _answer(model: PeftModel, inputs: Inputs) -> None:
    row = inputs.prepared.row(0)
    scored = next((at for at, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
    prompt = row["input_ids"][: max(1, scored)][-PROMPT_TOKENS:]
    ends = find_ends(model, inputs.tokenizer)
    stream(model, inputs.tokenizer, prompt, ANSWER_TOKENS, ends, lambda text: None)


def _require_disk(checkpoint_bytes: int, best_bytes: int, inputs: Inputs, run_dir: RunDir) -> None:
    """A checkpoint is written before the oldest goes, so one more than is kept must fit; and the adapter at the end.

    best_bytes: of the states that the best evaluations keep, beside the checkpoints.
    """
    keep = kept_checkpoints(inputs.recipe.training, len(inputs.prepared.train))
    needed, free = (keep + 2) * checkpoint_bytes + best_bytes, shutil.disk_usage(run_dir.checkpoints).free
    if needed > free:
        best = f", the best states ({size_text(best_bytes)})" if best_bytes else ""
        raise TrainingError(
            f"{run_dir.path}: {size_text(free)} are free, and {keep} checkpoints of {size_text(checkpoint_bytes)}, one "
            f"more while it is written{best} and the adapter take {size_text(needed)}; free some, lower "
            "training.keep_checkpoints, or name another output.directory"
        )
