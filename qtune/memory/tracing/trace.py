"""The prediction: one training step executed on tensors without storage, from a configuration alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import masking_utils

from qtune.errors import ModelError
from qtune.memory.tracing import adoption
from qtune.memory.tracing.answers import Values
from qtune.memory.tracing.bare_model import give_storage
from qtune.memory.tracing.caching_allocator import ExpandableSegments, FixedSegments
from qtune.memory.tracing.categories import HOST
from qtune.memory.tracing.cuda import TODAYS_CARD, CudaKernels, workspace, workspace_bytes
from qtune.memory.tracing.device_state import answered_as_on_a_card
from qtune.memory.tracing.fake_tensors import RememberingMode
from qtune.memory.tracing.history import History, history_of, join
from qtune.memory.tracing.layers import depth_for, layer_container, repetition, shortened, signatures
from qtune.memory.tracing.ledger import Ledger, follow_modules
from qtune.memory.tracing.repeated_layers import stretch
from qtune.memory.tracing.reserved import STEPS, StepLives, reserved_bytes
from qtune.memory.tracing.step import (
    evaluate,
    forward_backward,
    give_gradients,
    goes_together,
    parameter_groups,
    prepare,
    trained,
    update,
)
from qtune.memory.tracing.work import Work, crossing, of_one_micro_batch, place_of, stretched, work_of
from qtune.model.kept_weights import kept_weights
from qtune.model.layer_stream import stream_of
from qtune.startup.allocator import has_expandable_segments
from qtune.startup.imports import freeze_once, no_collection

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qtune.memory.tracing.cuda import Capability
    from qtune.memory.tracing.fake_tensors import Remembered
    from qtune.memory.tracing.layers import Repetition, Signature
    from qtune.memory.tracing.ledger import Life
    from qtune.memory.tracing.step import Step
    from qtune.memory.tracing.work import Kernel

log = logging.getLogger(__name__)

Build = Callable[["PretrainedConfig"], torch.nn.Module]
"""Configuration -> the model on the meta device, adapter attached."""


@dataclass(frozen=True)
class Traced:
    """What a trace found."""

    history: History
    work: Work
    """What one micro-batch, one step of the optimizer and one batch of an evaluation give the device to do."""
    layers: int
    layers_executed: int
    """Fewer than `layers` where the rest was proved to repeat."""
    seconds: float
    card: Capability | None
    """As whose it was counted; None: the CPU's."""
    reserved_bytes: int
    """The most that the allocator takes from the card; 0 where it was not played."""
    scratch_bytes: int = 0
    """What operations may take beside their results where a card leaves the kernel out that they were counted as."""


def trace(
    config: PretrainedConfig,
    build: Build,
    step: Step,
    *,
    card: Capability | None = TODAYS_CARD,
    every_layer: bool = False,
    plays_allocator: bool = True,
    same_model: str | None = None,
) -> Traced:
    """Executes `step` for the model that `build` makes of `config`, without weights and without a GPU.

    card: count as a card of this capability does; None: as the CPU. every_layer: never shorten a model of repeated
    layers. plays_allocator: find out what a card's allocator takes, for which every layer is executed; work alone does
    not need it. same_model: a key of everything but the batches; what the last trace with that key built is used again.
    """
    began = time.perf_counter()
    freeze_once()
    try:
        with no_collection():
            found = _traced(config, build, step, card, every_layer, plays_allocator and card is not None, same_model)
    finally:
        gc.collect()  # modules and their hooks are cycles, and a fit traces dozens of models
    return replace(found, seconds=time.perf_counter() - began)


def _traced(
    config: PretrainedConfig,
    build: Build,
    step: Step,
    card: Capability | None,
    every_layer: bool,
    plays_allocator: bool,
    same_model: str | None,
) -> Traced:
    built = _built.get(same_model) if same_model is not None else None
    if built is None:
        _built.clear()
        built = _Built(config, build, step, card, every_layer or plays_allocator)
        if same_model is not None:
            _built[same_model] = built
    step = built.possible(step)
    body, work, executed = built.body(step)
    work = of_one_micro_batch(work, step.micro_batches)
    history = body
    if built.optimizer_part is not None:
        update_history, update_work = built.optimizer_part
        history, work = join([body, update_history]), work + update_work
    # The allocator is played with every single tensor.
    reserved = built.reserved(card) if card is not None and plays_allocator else 0
    return Traced(history, work, built.layers, executed, 0.0, card, reserved)


class _Built:
    """The models of a trace: the whole one, and two shallow ones where its layers repeat; the optimizer's phase."""

    def __init__(
        self, config: PretrainedConfig, build: Build, step: Step, card: Capability | None, every_layer: bool
    ) -> None:
        self.layers = int(config.get_text_config().num_hidden_layers)
        self.whole = _Tracer(build(config), step, card)
        real = [] if every_layer else signatures(self.whole.model)
        self.shape = repetition(real, config.get_text_config())
        self.optimizer_part = self.whole.optimizer() if _updates(step) else None
        self.optimizer_lives = self.whole.ledger.lives if _updates(step) else []
        self.goes_together: bool | None = None
        self.shallow = [] if self.shape is None else _shallow(config, build, step, card, real, self.shape)

    def possible(self, step: Step) -> Step:
        """The step as a run takes it: its micro-batches one by one where these layers do not stand alone."""
        if step.micro_batches == 1:
            return step
        if self.goes_together is None:
            self.goes_together = (self.shallow[0] if self.shallow else self.whole).goes_together(step)
        return step if self.goes_together else step.one_by_one()

    def body(self, step: Step) -> tuple[History, Work, int]:
        """Forward, backward and evaluation with the batches of `step`, and how many layers were executed for them.

        The shallow traces count where it can be shown that they are the same: what the stretched model holds at rest
        must be what the whole one holds.
        """
        if self.shape is not None and self.shallow:
            (short, work), (longer, more) = (tracer.body(step) for tracer in self.shallow)
            body = stretch(short, longer, self.shape, self.layers, self.whole.container)
            if body is not None and _static(body) == self.whole.at_rest:
                depth = depth_for(self.layers, self.shape)
                groups = (self.layers - depth) // self.shape.period
                return body, stretched(work, more, groups), 2 * depth + self.shape.period
            log.debug("layers hold unequal parameters")
        return *self.whole.body(step), self.layers

    def reserved(self, card: Capability) -> int:
        """What a card's allocator takes for the step whose body was traced last, of every layer."""
        allocator = ExpandableSegments() if has_expandable_segments() else FixedSegments()
        steps = [StepLives(self.whole.ledger.lives, self.optimizer_lives)] * STEPS
        return reserved_bytes(steps, workspace_bytes(card), allocator)


_built: dict[str, _Built] = {}
"""The last models that were built, by key: a search for the largest batch asks for the same ones again."""


def _shallow(
    config: PretrainedConfig,
    build: Build,
    step: Step,
    card: Capability | None,
    real: list[Signature],
    shape: Repetition,
) -> list[_Tracer]:
    """Two models with fewer layers, made of the same as the front of the whole one; none where that cannot be.

    real: what the layers of the whole one are made of.
    """
    layers = len(real)
    tracers: list[_Tracer] = []
    for depth in (depth_for(layers, shape), depth_for(layers, shape) + shape.period):
        try:
            shallow = _Tracer(build(shortened(config, depth)), step, card)
        except ModelError:
            log.debug("no model with %d layers can be built", depth, exc_info=True)
            return []
        if signatures(shallow.model) != real[:depth]:
            log.debug("with %d layers the model is made of others", depth)
            return []
        tracers.append(shallow)
    return tracers


def lives(config: PretrainedConfig, build: Build, step: Step, *, card: Capability | None = TODAYS_CARD) -> StepLives:
    """What an allocator is asked for by the second step, every layer of it, and by its update."""
    tracer = _Tracer(build(config), step, card)
    update: list[Life] = []
    if _updates(step):
        tracer.optimizer()
        update = tracer.ledger.lives
    tracer.body(step if step.micro_batches == 1 or tracer.goes_together(step) else step.one_by_one())
    return StepLives(tracer.ledger.lives, update)


def _updates(step: Step) -> bool:
    return step.optimizer is not None and step.ends_after == "step"


def _static(history: History) -> dict[str, int]:
    """Bytes of the loaded model by category: the history's first tick."""
    return {name: int(size) for name, size in zip(history.names, history.bytes[:, 0], strict=True) if size}


def _by_category(ledger: Ledger) -> dict[str, int]:
    """Bytes of a loaded model by category, from a ledger that knows nothing else."""
    found: dict[str, int] = {}
    for life in ledger.lives:
        found[life.category] = found.get(life.category, 0) + life.size
    return found


_kernels: dict[tuple[Remembered, bool], list[Kernel]] = {}
"""What the operations that are remembered give a device to do, by whether it is a card: a matter of the same shapes."""


class _Tracer:
    """One model under one ledger."""

    def __init__(self, model: torch.nn.Module, step: Step, card: Capability | None) -> None:
        self.model, self.step, self.card = model, step, card
        self.mode = RememberingMode()
        give_storage(model, self.mode)
        prepare(model, step)
        self.container = layer_container(model)
        self.trained = trained(model)
        self.groups = parameter_groups(model)
        with self.mode:  # what is made for the model now has no storage either
            for kept in kept_weights(model):
                kept.make()
            self.held = list(adoption.loaded_tensors(model, cuda=card is not None))
        self.ledger = self._loaded()
        self.at_rest = _by_category(self.ledger)

    def _loaded(self) -> Ledger:
        """A ledger that knows the loaded model, and nothing else yet; no work is done."""
        self.work: Work = Counter()
        ledger = Ledger(workspace=lambda func, args: workspace(func, args, self.card is not None))
        for tensor, category in self.held:
            ledger.adopt(tensor, category)
        return ledger

    def optimizer(self) -> tuple[History, Work]:
        """The optimizer's phase of the second step, when its state exists."""
        self.ledger = self._loaded()
        with self._counting():
            optimizer = self._with_state()
            give_gradients(self.trained)
            update(self.model, self.step, optimizer, self.ledger, foreach=True if self.card is not None else None)
        return self._history({"optimizer"}), self._work({"optimizer"})

    def body(self, step: Step) -> tuple[History, Work]:
        """Forward, backward and evaluation of the second step, which differs from the built one only in its batches."""
        self.step = step
        self.ledger = self._loaded()
        if (stream := stream_of(self.model)) is not None:
            stream.rest()
        optimizer: Any = None
        with self._counting() as values:
            if _updates(self.step):
                optimizer = self._with_state()
            if self.step.accumulates:
                self.ledger.enter("first micro-batch")
                give_gradients(self.trained)
                adoption.adopt_gradients(self.ledger, self.trained)
            handles = follow_modules(self.ledger, self.model)
            kept = forward_backward(self.model, self.step, self.ledger, backward=self.step.ends_after == "step")
            adoption.adopt_gradients(self.ledger, self.trained)
            for parameter in self.trained:
                parameter.grad = None
            if self.step.eval_batch is not None:
                values.batch = self.step.eval_batch
                evaluate(self.model, self.step, self.ledger)
            for handle in handles:
                handle.remove()
        phases = {"forward", "backward", "eval"}
        history = self._history(phases)
        del kept, optimizer
        return history, self._work(phases)

    def goes_together(self, step: Step) -> bool:
        """Whether micro-batches can pass each layer one behind the other."""
        self.step, self.ledger = step, self._loaded()
        with self._counting():
            return goes_together(self.model, step)

    def _with_state(self) -> Any:
        """An optimizer after its first step."""
        assert self.step.optimizer is not None
        self.ledger.enter("first step")
        optimizer = self.step.optimizer([dict(group) for group in self.groups])
        give_gradients(self.trained)
        optimizer.step()
        adoption.adopt_optimizer(self.ledger, optimizer, paged=self.step.paged)
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    @contextlib.contextmanager
    def _counting(self) -> Iterator[Values]:
        values = Values(self.step.batch, self.mode)
        with self.mode.watched(values.answer, self._record), _rows_are_whole(), contextlib.ExitStack() as stack:
            if self.card is not None:
                stack.enter_context(CudaKernels(self.card))
                stack.enter_context(answered_as_on_a_card(self.card))
            yield values

    def _record(self, func: Any, args: Sequence[Any], out: Any, remembered: Remembered | None) -> None:
        self.ledger.record(func, args, out)
        cuda = self.card is not None
        kernels = _kernels.get((remembered, cuda)) if remembered is not None else None
        if kernels is None:
            kernels = work_of(func, args, out, cuda=cuda)
            if remembered is not None:
                _kernels[remembered, cuda] = kernels
        if not kernels:
            return
        place = place_of(self.ledger)
        for kernel in kernels:
            if kernel.kind == "copies" and cuda:
                kernel = self._across(kernel, args, out)
            self.work[place, kernel] += 1

    def _across(self, kernel: Kernel, args: Sequence[Any], out: Any) -> Kernel:
        """A copy whose one side is in host memory crosses the bus."""
        touched = [tensor for tensor in (*args, out) if isinstance(tensor, torch.Tensor)]
        if any(self.ledger.category(tensor) == HOST for tensor in touched):
            return crossing(kernel, [out])
        return kernel

    def _work(self, phases: set[str]) -> Work:
        return Counter({key: count for key, count in self.work.items() if key[0].phase in phases})

    def _history(self, phases: set[str]) -> History:
        """These phases; of the loading only its last tick, when everything static is there."""
        whole = history_of(self.ledger, self.step.checkpoints_all)
        loading = [tick for tick, label in enumerate(whole.labels) if label.phase == "static"]
        return whole.ticks([loading[-1], *(t for t, label in enumerate(whole.labels) if label.phase in phases)])


@contextlib.contextmanager
def _rows_are_whole() -> Iterator[None]:
    """Without an attention mask, transformers looks into the position ids for packed rows, and takes ids that it cannot
    see into for packed ones (5.23, masking_utils.py, `find_packed_sequence_indices`). A step that has packed rows is
    traced with a mask, so here there are none."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
