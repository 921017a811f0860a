"""SFTTrainer and what is ours in the step: the loss, phases of memory, exact state, micro-batches that shrink."""

import contextlib
import functools
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

from qtune.adapter.attach import cast_adapter
from qtune.adapter.lean import copies_of, install_lean_step
from qtune.adapter.state import load_trained_state, save_trained_state, without_card
from qtune.data.batches import StepSampler
from qtune.data.shares import ShareSampler, with_blanks
from qtune.data.stream import RowStream
from qtune.data.stream_order import WindowSampler
from qtune.device.freed_memory import freed_memory_stays
from qtune.device.present import is_out_of_memory
from qtune.disk import refusal_of
from qtune.errors import Failure, OutOfMemory, Problem, RunError, TrainingError, first_line
from qtune.kernels.ops import without_kernels
from qtune.manifest import fault, is_sealed, seal, skipped_until
from qtune.memory.measured.meter import Meter
from qtune.model.checkpointed import checkpoint_all
from qtune.model.host import activations_on_host
from qtune.model.kept_weights import keep_weights, kept_weights
from qtune.model.layer_major import layer_by_layer, layers_stand_alone
from qtune.model.loss import install_loss
from qtune.plan import Plan
from qtune.recipe.schema import Training
from qtune.run.checkpoints import OPTIMIZER, usable_checkpoints
from qtune.run.folder import RunDir
from qtune.run.identity import saved_by
from qtune.run.metrics import records_then
from qtune.training.callbacks import Beside, CheckpointedLayers
from qtune.training.checkpoints import begin_saving, end_saving, make_room, remove_older, require_finite
from qtune.training.outliers import Outliers
from qtune.training.pace import ExpectedPace, Pace
from qtune.training.ranks import ALONE, Ranks, in_turn
from qtune.training.saved_state import (
    RANDOM,
    SCALER,
    SCHEDULE,
    load_state,
    random_file,
    random_of,
    random_state,
    save_tree,
    set_random_state,
)
from qtune.training.schedule import schedule_of
from qtune.training.walks import forget_gradients_of, switch_once

GROUP = "micro_batches"
"""Under this key stand micro-batches that pass the layers together."""

CANNOT_SPLIT = (
    "with memory.layers sharded the processes wait for one another at every layer, so that none can take it apart and "
    "try again; lower training.micro_batch_size, or have layers computed twice (training.gradient_checkpointing)"
)

DEQUANTIZED_ANEW = "out of memory: weights are now dequantized for every product; the results are the same"

CHECKED_TOKENS = 64
"""Length of the row that tells whether a model's layers can be computed one by one."""

WORTH_A_LINE = 3.0
"""Seconds that an evaluation took, from which on the next one is said before it begins."""


class QloraTrainer(SFTTrainer):
    """One training run. Built for a PeftModel on one device per process.

    Differs from SFTTrainer in five places: the loss is `qtune.loss`; the adapter keeps its dtype; evaluation is the
    exact mean over tokens; a checkpoint holds the whole trained state and counts only when it is complete; a
    micro-batch that does not fit is split, with the same gradient as a result, and so is a batch of the evaluation.
    Beside other processes it computes its share of each step and of each evaluation (`training.ranks`).
    """

    def __init__(
        self,
        model: PeftModel,
        config: SFTConfig,
        plan: Plan,
        training: Training,
        meter: Meter,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        validation: Dataset | None,
        collator: Any,
        lengths: list[int],
        callbacks: list[TrainerCallback],
        tiled_loss: bool,
        note: Callable[[str], None],
        beside: Beside,
        comparison: ExpectedPace | None = None,
        take_rows: Callable[[list[float], list[int]], None] = lambda losses, tokens: None,
        take_norm: Callable[[Tensor, int], None] = lambda norm, step: None,
        outliers: Outliers | None = None,
        ranks: Ranks = ALONE,
        stream: RowStream | None = None,
    ) -> None:
        """`note` hears, in a sentence, what the user should know of a step, `beside` what is done between two of them.

        take_rows: is given the validation rows' summed losses and scored tokens before their means are logged.
        take_norm: is given the gradient norm of every step before its update, and the number of the step.
        comparison: with the time that was predicted for each step.
        outliers: those of which no update is taken. ranks: the processes that share the steps. stream: rows that are
        read from their files, of which `train` then holds the first one alone, and `lengths` nothing.
        """
        super().__init__(
            model=model,
            args=config,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[CheckpointedLayers(plan.gradient_checkpointing), *callbacks],
        )
        self.first_row = train[0]
        if stream is not None:
            self.train_dataset = stream  # SFTTrainer's constructor takes no other map-style dataset than datasets' own
        # Both of these undo what SFTTrainer's constructor has just done to a 4-bit model (trl 1.16, sft_trainer.py).
        cast_adapter(model, getattr(torch, plan.adapter_dtype))
        install_loss(model.get_base_model(), tiled=tiled_loss, tile_bytes=plan.loss_tile_bytes)
        _install_lean_step(model, plan, note)
        self.keep_dequantized, self.compute_dtype = plan.keep_dequantized, getattr(torch, plan.compute_dtype)
        keep_weights(model, self.keep_dequantized, self.compute_dtype)
        ranks.begin_alike(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        switch_once(model)
        forget_gradients_of(model, self.trained)
        self.ranks = ranks
        self.activations = plan.activations
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by num_items_in_batch itself
        self.schedule = training.schedule
        self.meter = meter
        self.keep_checkpoints = training.keep_checkpoints
        self.effective_batch = training.batch_size
        self.row_lengths = lengths
        self.stream = stream
        self.note = note
        self.beside = beside
        self.take_rows = take_rows
        self.take_norm = take_norm
        self.pieces = self.eval_pieces = 1
        self.evaluation_seconds = math.inf
        """What the last evaluation took; of the first nobody knows."""
        self.micro_batches_together = plan.together
        self.together = plan.together > 1
        """Whether a step's micro-batches pass each layer one behind the other, until it is known that they cannot, or
        have no room. The latter holds for as long as the process lives, like `pieces`: a resumed run tries again."""
        self.expected = 1
        """Micro-batches of the step that is being taken."""
        self.in_lockstep = plan.layers == "sharded"
        """Whether all processes have to go through the layers as often as each other."""
        self._stand_alone: bool | None = None
        self._done_in_step: list[dict[str, Any]] = []
        self._losses_of_step: list[float] = []
        self.outliers = outliers
        self.skipped: list[int] = []
        self._saved: Path | None = None
        """The checkpoint that this process has saved last, or goes on from; others may be anybody's."""
        self._failure: Failure | None = None
        self._correct: Tensor | None = None
        self._scored = 0
        self.pace = Pace(_wait_for_device)
        self.comparison = comparison
        if not ranks.is_leader:  # dropout is drawn anew for each process's rows
            set_seed(random_of(config.seed, ranks.rank, 0))
        self._random_states: list[dict[str, Any]] = []
        """Of every process, when a checkpoint is being written."""

    # --- order of rows ---------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler | WindowSampler:
        if self.stream is not None:
            return self.stream.order(self.effective_batch, self.args.seed)
        return StepSampler(self.row_lengths, self.effective_batch, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """transformers', or of this process's share alone."""
        if not self.ranks.are_several:
            return super().get_train_dataloader()
        rows = self._get_train_sampler()
        share = ShareSampler(rows, self.args.per_device_train_batch_size, self.ranks.rank, self.ranks.processes)
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=share,
            collate_fn=with_blanks(self.data_collator, self.first_row),
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers', which tells the lean step that it has changed the adapter."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        optimizer.register_step_post_hook(self._adapter_changed)
        return optimizer

    def _adapter_changed(self, *_: Any) -> None:
        for copies in copies_of(self.model):
            copies.forget()

    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our schedule in torch's words, which a checkpoint keeps and brings back like transformers' own."""
        if self.lr_scheduler is None:
            factor = schedule_of(self.schedule, self.args.warmup_steps, num_training_steps)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's; no weight stays dequantized afterwards."""
        with freed_memory_stays(self.args.device):
            try:
                return super().train(*args, **kwargs)
            finally:
                self._let_go_of_weights()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers', but where an evaluation before it has ended the run: it would take a step before it looks."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    # --- the step --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Counts the tokens of a step while they are still on the CPU, where counting costs no synchronization."""
        batches, scored = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [batch.get("attention_mask") for batch in batches]
        tokens = [
            batch["input_ids"].numel() if mask is None else int(mask.sum())
            for batch, mask in zip(batches, masks, strict=True)
        ]
        total = sum(tokens)
        if self.ranks.are_several:
            total, everybodys = map(int, self.ranks.sum_of([total, float(scored or 0)]))
            scored = torch.tensor(everybodys, device=device)
        self.pace.takes(total, [batch["input_ids"].shape[1] for batch in batches])
        self._done_in_step, self._losses_of_step = [], []
        self.expected = len(batches)
        return batches, scored

    def compute_loss_context_manager(self) -> Any:
        """Autocast, also where `train` has not prepared the model for it: in a rehearsal, in an evaluation before it.

        Inside accelerate's own, which it nests with, it changes nothing.
        """
        return self.accelerator.autocast()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed NLL / number of scored tokens of the whole effective batch: the mean that one big batch would have.

        inputs: a micro-batch, or under GROUP several that pass the layers together.
        """
        batches: list[dict[str, Any]] = inputs.get(GROUP, [inputs])
        for batch in batches:
            self.meter.enter("forward", batch["input_ids"], batch.get("attention_mask"))
        is_offloading = self.activations == "host" and model.training
        with activations_on_host(model) if is_offloading else contextlib.nullcontext():
            forwards = [functools.partial(model, **batch | {"use_cache": False}) for batch in batches]
            outputs = [forwards[0]()] if len(forwards) == 1 else layer_by_layer(model, forwards)
        scored = sum(output.scored for output in outputs)
        self.meter.scored(scored)
        if model.training:
            self._scored += scored
            if self.meter.is_counting:
                self.pace.disturb()
            correct = _sum([output.correct for output in outputs])
            self._correct = correct if self._correct is None else self._correct + correct
        summed = _sum([output.loss for output in outputs])
        count = scored if num_items_in_batch is None else num_items_in_batch
        loss = summed / torch.as_tensor(count, device=summed.device).clamp(min=1)
        self.meter.enter("backward")
        return (loss, outputs[0]) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping. Where the recipe says so, a step that stands out gets no gradient: no update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            self.take_norm(norm, self.state.global_step + 1)
        if self.outliers is not None and norm is not None:
            (loss,) = self.ranks.sum_of([sum(self._losses_of_step)])
            found = self.ranks.told(self.outliers.found(loss, float(norm)))
            if found is not None:
                self.skipped.append(self.state.global_step + 1)
                if self.ranks.is_leader:
                    self.note(f"step {self.state.global_step + 1} is skipped: {found}")
                model.zero_grad(set_to_none=True)
        return norm

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, in as many pieces as memory needs.

        When a piece does not fit, the gradient of the step so far is dropped and its micro-batches are run again:
        without weights that stay dequantized, where some do; then in smaller pieces; where there are none, with every
        layer computed twice. The gradient is a sum over rows, so the optimization does not change.

        Where layers wait elsewhere, the micro-batches of a step are kept until the last one is there, and then pass
        each layer one behind the other; the first ones return nothing, the last one the loss of all.

        Raises:
            OutOfMemory: a single row does not fit; where layers are sharded, a micro-batch.
        """
        self._done_in_step.append(inputs)
        group = self._done_in_step if self.goes_together(model, inputs) else [inputs]
        if len(group) < self.expected and self.together:
            return torch.zeros((), device=self.args.device)
        sums = False
        loss = self._try_pieces(model, group, num_items_in_batch)
        while loss is None:
            if self.in_lockstep:
                raise OutOfMemory(f"a micro-batch does not fit: {CANNOT_SPLIT}", self._failure)
            if self.together:
                self.together, sums = False, True
                self._release_memory(model)
                loss = self._try_pieces(model, group, num_items_in_batch, sums=sums)
                if loss is not None:
                    self.note("out of memory: each micro-batch now sends for all layers anew; the gradient is the same")
                continue
            if self._let_go_of_weights():
                self._release_memory(model)
                loss = self._try_pieces(model, self._done_in_step, num_items_in_batch, sums=sums)
                if loss is not None:
                    self.note(DEQUANTIZED_ANEW)
                continue
            rows = max(len(batch["input_ids"]) for batch in self._done_in_step)
            if self.pieces >= rows and checkpoint_all(self.model):
                self._release_memory(model)
                loss = self._try_pieces(model, self._done_in_step, num_items_in_batch, sums=sums)
                if loss is not None:
                    self.note("out of memory: every layer is now computed twice; the gradient stays the same")
                continue
            if self.pieces >= rows:
                longest = max(batch["input_ids"].shape[1] for batch in self._done_in_step)
                raise OutOfMemory(
                    f"one row of {longest} tokens does not fit the memory of {self.args.device}", self._failure
                )
            self.pieces = min(2 * self.pieces, rows)
            self._release_memory(model)
            # The losses of earlier micro-batches of this step are already counted; only the last one's is returned.
            loss = self._try_pieces(model, self._done_in_step, num_items_in_batch, sums=sums)
            if loss is not None:
                self.note(f"out of memory: micro-batches are now split into {self.pieces}; the batch stays the same")
        if self.outliers is not None:
            self._losses_of_step.append(float(loss))
        if len(self._done_in_step) >= self.expected:
            self.ranks.add_gradients(model)
        return loss

    def goes_together(self, model: nn.Module, batch: dict[str, Any]) -> bool:
        """Whether this step's micro-batches do; found out once, with a part of `batch`, whether this model's can."""
        if self.together and self.expected > 1 and self._stand_alone is None:
            ids = batch["input_ids"][:1, :CHECKED_TOKENS].to(self.args.device)
            try:
                with self.compute_loss_context_manager():
                    self._stand_alone = self.together = layers_stand_alone(model, ids)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._failure = self.meter.failure(error)
                self.together = False
            if self._stand_alone is None:
                release_cached_memory()
                self.note("out of memory: each micro-batch sends for all layers anew; the gradient is the same")
            elif not self.together:
                self.note("this model's layers depend on one another: each micro-batch sends for all of them anew")
        return self.together

    def _try_pieces(
        self, model: nn.Module, batches: list[dict[str, Any]], num_items_in_batch: Any, *, sums: bool = False
    ) -> Tensor | None:
        """The loss of the last of `batches`, all of them backpropagated; None when memory ran out. sums: of all."""
        loss: Tensor | None = None
        try:
            if self.together and len(batches) > 1:
                pieces = [piece for batch in batches for piece in _split(batch, self.pieces)]
                together: Tensor = super().training_step(model, {GROUP: pieces}, num_items_in_batch)
                return together
            for batch in batches:
                loss = loss if sums else None
                for piece in _split(batch, self.pieces):
                    part = super().training_step(model, piece, num_items_in_batch)
                    loss = part if loss is None else loss + part
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._failure = self.meter.failure(error)
            return None
        return loss

    def forget_step(self) -> None:
        """Drops what was counted of a step that does not count."""
        self._done_in_step, self._losses_of_step = [], []
        self._correct, self._scored = None, 0
        self.pieces = self.eval_pieces = 1
        # What was found out about the model stays; that memory ran out is undone with the step.
        self.together = self.micro_batches_together > 1 and self._stand_alone is not False
        keep_weights(self.model, self.keep_dequantized, self.compute_dtype)
        self.skipped = []

    def _let_go_of_weights(self) -> bool:
        """Whether there were any that stayed dequantized; from now on none does, as long as the process lives."""
        return keep_weights(self.model, False, self.compute_dtype)

    def _release_memory(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        release_cached_memory()

    # --- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss and accuracy over the scored tokens of the validation rows, whatever their batches."""
        if self.evaluation_seconds > WORTH_A_LINE:
            self.beside(f"step {self.state.global_step}: measuring the validation loss")
        began = time.monotonic()
        with self.pace.stopped():
            measured = self._evaluate_all(eval_dataset, metric_key_prefix)
        self.evaluation_seconds = time.monotonic() - began
        return measured

    def _evaluate_all(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        self.model.eval()
        own: list[tuple[Tensor, list[tuple[float, int]]]] = []
        # A data loader draws a seed when it starts; measuring must not change what training draws next.
        with torch.random.fork_rng(devices=[]):
            number = 0
            for number, inputs in enumerate(self.get_eval_dataloader(eval_dataset), 1):
                if self.ranks.has(number - 1):
                    own.append(self.evaluated(inputs))
            if self.in_lockstep and len(own) < -(-number // self.ranks.processes):
                self.evaluated(inputs)  # with the others, for nothing
        self.meter.enter("idle")
        # One after the other, as one process adds them.
        batches = in_turn(self.ranks.all_of(own))
        totals = sum((sums for sums, _ in batches), start=torch.zeros(3, dtype=torch.float64))
        rows = [row for _, of_rows in batches for row in of_rows]
        self.take_rows([loss for loss, _ in rows], [tokens for _, tokens in rows])
        loss, correct, scored = totals.float().tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(1, scored),
            f"{metric_key_prefix}_accuracy": correct / max(1, scored),
        }
        self.model.train()
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluated(self, batch: dict[str, Any]) -> tuple[Tensor, list[tuple[float, int]]]:
        """(summed loss, right tokens, scored tokens) of a batch, [3], in as many pieces as memory needs; each row's
        summed loss and scored tokens."""
        pieces: list[tuple[Tensor, list[tuple[float, int]]]] | None = None
        while pieces is None:
            try:
                pieces = [self._sums(piece) for piece in _split(batch, self.eval_pieces)]
            except (RuntimeError, MemoryError) as error:
                is_last = self.eval_pieces >= len(batch["input_ids"]) and not kept_weights(self.model)
                if not is_out_of_memory(error) or is_last or self.in_lockstep:
                    raise
            if pieces is None and self._let_go_of_weights():
                release_cached_memory()
                self.meter.tries_evaluation_again()
                self.note(DEQUANTIZED_ANEW)
            elif pieces is None:
                self.eval_pieces = min(2 * self.eval_pieces, len(batch["input_ids"]))
                release_cached_memory()
                self.note(f"out of memory: batches of the evaluation are now split into {self.eval_pieces}")
        return torch.stack([sums for sums, _ in pieces]).sum(dim=0), [row for _, rows in pieces for row in rows]

    def _sums(self, batch: dict[str, Any]) -> tuple[Tensor, list[tuple[float, int]]]:
        self.meter.enter("eval", batch["input_ids"], batch.get("attention_mask"))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.model_wrapped(**self._prepare_inputs(batch) | {"use_cache": False})
        self.meter.scored(outputs.scored)
        rows = list(zip(outputs.row_losses.tolist(), outputs.row_scored.tolist(), strict=True))
        return torch.tensor([float(outputs.loss), float(outputs.correct), outputs.scored], dtype=torch.float64), rows

    # --- what is said ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training record what only the step knows: accuracy, tokens per second, seconds of a step."""
        warning = None
        if "loss" in logs:
            # Reading the count waits for the card; the loss was read just before, which did the same.
            correct = None if self._correct is None else float(self._correct)
            scored = self._scored
            if self.ranks.are_several:
                logs["loss"], correct, scored = self._everybodys(logs["loss"], correct)
            lap = self.pace.lap()
            logs["tokens_per_second"], logs["step_seconds"] = lap.tokens_per_second, lap.step_seconds
            if self.comparison is not None:
                logs["predicted_step_seconds"] = self.comparison.add(lap)
                warning = self.comparison.warning()
            if self.state.global_step in self.skipped[-1:]:
                logs["skipped"] = 1.0
            if scored and correct is not None:
                logs["accuracy"] = correct / scored
            self._correct, self._scored = None, 0
        super().log(logs, start_time)
        if warning is not None:
            self.note(warning)

    def _everybodys(self, loss: float, correct: float | None) -> tuple[float, float, int]:
        """(loss, right tokens, scored tokens) of all processes; each has divided by the number of all tokens."""
        loss, right, scored = self.ranks.sum_of([loss, correct or 0.0, self._scored])
        return loss, right, int(scored)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint with the whole trained state, and its manifest last: without that it is not complete."""
        self._random_states = self.ranks.all_of(random_state())
        if self.ranks.is_leader:
            with self.pace.stopped():
                self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self.model, self.state.global_step, Path(self._get_output_dir(trial)))
        self.meter.enter("save")
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        RunDir(folder.parents[1]).require_there()
        if folder.resolve() == self._saved and is_sealed(folder) and fault(folder, self.state.global_step) is None:
            self.meter.enter("idle")  # two reasons to save in one step: it is saved already
            return
        has_room = False
        # peft computes the vectors of a prompt encoder: without its dropout, and without drawing random numbers.
        self.model.eval()
        try:
            make_room(folder)
            has_room = True
            begin_saving(folder)
            super()._save_checkpoint(model, trial)
            save_trained_state(self.model, folder)
            run = RunDir(folder.parents[1])
            then, by = records_then(run.metrics_file), saved_by(run.path)
            seal(folder, self.state.global_step, skipped=self.skipped, records=then, by=by)
            end_saving(folder)
            self._saved = folder.resolve()
        # A full disk: the writers of Python, safetensors, tokenizers and torch each say it in their own way.
        except Exception as error:
            if has_room:  # else what has the name is an older one
                shutil.rmtree(folder, ignore_errors=True)
            if refusal_of(error) is None and not isinstance(error, SafetensorError):
                raise
            kept = usable_checkpoints(folder.parent)
            where = f"the last complete one is {kept[-1]}" if kept else "there is no earlier one"
            raise TrainingError(
                f"the checkpoint of step {self.state.global_step} could not be written: "
                f"{refusal_of(error) or first_line(error)}; {where}"
            ) from error
        self.model.train()
        remove_older(folder, self.keep_checkpoints)
        self.meter.enter("idle")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter in peft's format and its tokenizer: no card, no pickle of the arguments, which nobody reads."""
        assert output_dir is not None
        with without_card(self.model):
            self.model.save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As safetensors, not as pickles."""
        save_tree(Path(output_dir) / OPTIMIZER, self.optimizer.state_dict())
        save_tree(Path(output_dir) / SCHEDULE, _plain_schedule(self.lr_scheduler.state_dict()))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            save_tree(Path(output_dir) / SCALER, scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        save_tree(Path(output_dir) / RANDOM, random_state())
        for rank, state in enumerate(self._random_states[1:], 1):
            save_tree(Path(output_dir) / random_file(rank), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Both of them: a run that went on with one alone would be another one.

        Raises:
            RunError: one is missing or cannot be read.
        """
        if checkpoint is not None:
            self.optimizer.load_state_dict(_required(checkpoint, OPTIMIZER))
            self.lr_scheduler.load_state_dict(_required(checkpoint, SCHEDULE))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(_required(checkpoint, SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each process's own; one that was not there when the checkpoint was made begins to draw from its number."""
        if checkpoint is None:
            return
        if self.ranks.is_leader:
            set_random_state(_required(checkpoint, RANDOM))
        elif (state := load_state(Path(checkpoint), random_file(self.ranks.rank))) is not None:
            set_random_state(state)
        else:
            set_seed(random_of(self.args.seed, self.ranks.rank, self.state.global_step))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: nobody reads their sum, for which the Trainer would count all parameters anew for every micro-batch."""
        return 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: SFTTrainer would write one into every checkpoint, which is no model to publish."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Bit for bit what was trained. peft alone would lose the encoder of p-tuning without a word (peft 0.21)."""
        load_trained_state(self.model, Path(resume_from_checkpoint))
        self.skipped = list(skipped_until(Path(resume_from_checkpoint)))
        self._saved = Path(resume_from_checkpoint).resolve()

    def take_state_of(self, checkpoint: Path) -> None:
        """Stands where a run's last checkpoint stands, where there is no step left to take."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._load_from_checkpoint(str(checkpoint))
        if self.args.eval_on_start:
            self.evaluate()


def _required(checkpoint: str, name: str) -> Any:
    state = load_state(Path(checkpoint), name)
    if state is None:
        raise RunError(Problem(checkpoint, f"has no {name}, without which the run would go on as another one"))
    return state


def _plain_schedule(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's factors are functions, which torch leaves out of its state as None."""
    return {key: value for key, value in state.items() if not callable(value)}


def _install_lean_step(model: PeftModel, plan: Plan, note: Callable[[str], None]) -> None:
    """qtune's functions in place of peft's and transformers' own, as the plan says; on a card it is said which of its
    kernels did not give there what PyTorch's operations give, and is left out."""
    if not plan.lean_step:
        return
    if plan.device.kind == "cuda":
        for name, reason in without_kernels().items():
            note(f"PyTorch's own operations compute {name} here, not Triton's kernel: {reason}")
    install_lean_step(model, getattr(torch, plan.compute_dtype))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release_cached_memory() -> None:
    """Gives back what the allocator keeps and nothing lives in."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sum(tensors: list[Tensor]) -> Tensor:
    """As one number, of scalars."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum()


def _split(batch: dict[str, Any], pieces: int) -> list[dict[str, Any]]:
    """A micro-batch as up to `pieces` smaller ones, each cut to its own longest row; what is no tensor stays."""
    rows = len(batch["input_ids"])
    if pieces == 1 or rows == 1:
        return [batch]
    size = -(-rows // pieces)
    return [_trimmed(batch, slice(start, start + size)) for start in range(0, rows, size)]


def _trimmed(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    mask = batch.get("attention_mask")
    length = int(mask[rows].sum(dim=1).max()) if mask is not None else batch["input_ids"].shape[1]
    return {key: value[rows, :length] if isinstance(value, Tensor) else value for key, value in batch.items()}
