"""The prediction: one training step executed on tensors without storage, from a configuration alone."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from qtune.memory import categories
from qtune.memory.as_cuda import CudaKernels, workspace
from qtune.memory.history import History, history_of, join
from qtune.memory.ledger import Ledger, backbone_of, follow_modules
from qtune.memory.skeleton import give_storage
from qtune.memory.step import evaluate, forward_backward, give_gradients, parameter_groups, prepare, trained, update
from qtune.memory.stretch import depth_for, is_worth_it, stretch
from qtune.memory.values import Values

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qtune.memory.step import Step

log = logging.getLogger(__name__)

Build = Callable[["PretrainedConfig"], torch.nn.Module]
"""Configuration -> the model on the meta device, adapter attached."""


@dataclass(frozen=True)
class Traced:
    """What a trace found."""

    history: History
    layers: int
    layers_executed: int
    """Fewer than `layers` where the rest was proved to repeat."""
    seconds: float


def trace(
    config: PretrainedConfig, build: Build, step: Step, *, cuda: bool = True, every_layer: bool = False
) -> Traced:
    """Executes `step` for the model that `build` makes of `config`, without weights and without a GPU.

    cuda: count as CUDA kernels do; otherwise as the CPU's. every_layer: never shorten a model of repeated layers.
    """
    began = time.perf_counter()
    text = config.get_text_config()
    layers, period = int(text.num_hidden_layers), layer_period(text)
    optimizer_part = _Tracer(build(config), step, cuda).optimizer() if _updates(step) else None
    body: History | None = None
    executed = 0
    if not every_layer and is_worth_it(layers, period):
        shallow = depth_for(layers, period)
        tracers = [_Tracer(build(shortened(config, depth)), step, cuda) for depth in (shallow, shallow + period)]
        short, longer = (tracer.body() for tracer in tracers)
        body = stretch(short, longer, period, layers, tracers[0].container)
        executed = 2 * shallow + period
        if body is not None and optimizer_part is not None and _static(body) != _static(optimizer_part):
            log.debug("layers hold unequal parameters: tracing each of them")
            body = None
    if body is None:
        body, executed = _Tracer(build(config), step, cuda).body(), layers
    history = body if optimizer_part is None else join([body, optimizer_part])
    return Traced(history, layers, executed, time.perf_counter() - began)


def _updates(step: Step) -> bool:
    return step.optimizer is not None and step.ends_after == "step"


def _static(history: History) -> dict[str, int]:
    """Bytes of the loaded model by category: the history's first tick."""
    return {name: int(size) for name, size in zip(history.names, history.bytes[:, 0], strict=True) if size}


class _Tracer:
    """One model under one ledger."""

    def __init__(self, model: torch.nn.Module, step: Step, cuda: bool) -> None:
        self.model, self.step, self.cuda = model, step, cuda
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        give_storage(model, self.mode)
        prepare(model, step)
        self.container = layer_container(model)
        self.ledger = Ledger(workspace=lambda func, args: workspace(func, args, cuda))
        categories.adopt_model(self.ledger, model, cuda=cuda)

    def optimizer(self) -> History:
        """The optimizer's phase of the second step, when its state exists."""
        with self._counting():
            optimizer = self._with_state()
            give_gradients(trained(self.model))
            update(self.model, self.step, optimizer, self.ledger)
        return self._history({"optimizer"})

    def body(self) -> History:
        """Forward, backward and evaluation of the second step."""
        optimizer: Any = None
        with self._counting() as values:
            if _updates(self.step):
                optimizer = self._with_state()
            if self.step.accumulates:
                self.ledger.enter("first micro-batch")
                give_gradients(trained(self.model))
                self._adopt_gradients()
            handles = follow_modules(self.ledger, self.model)
            kept = forward_backward(self.model, self.step, self.ledger, backward=self.step.ends_after == "step")
            self._adopt_gradients()
            for parameter in trained(self.model):
                parameter.grad = None
            if self.step.eval_batch is not None:
                values.batch = self.step.eval_batch
                evaluate(self.model, self.step, self.ledger)
            for handle in handles:
                handle.remove()
        history = self._history({"forward", "backward", "eval"})
        del kept, optimizer
        return history

    def _adopt_gradients(self) -> None:
        for parameter in trained(self.model):
            if parameter.grad is not None:
                self.ledger.adopt(parameter.grad, categories.GRADIENTS)

    def _with_state(self) -> Any:
        """An optimizer after its first step."""
        assert self.step.optimizer is not None
        optimizer = self.step.optimizer(parameter_groups(self.model))
        self.ledger.enter("first step")
        give_gradients(trained(self.model))
        optimizer.step()
        categories.adopt_optimizer(self.ledger, optimizer, paged=self.step.paged)
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    @contextlib.contextmanager
    def _counting(self) -> Iterator[Values]:
        values = Values(self.step.batch)
        kernels = CudaKernels() if self.cuda else contextlib.nullcontext()
        with self.mode, self.ledger, values, kernels, _rows_are_whole():
            yield values

    def _history(self, phases: set[str]) -> History:
        """These phases; of the loading only its last tick, when everything static is there."""
        whole = history_of(self.ledger, self.step.checkpointing != "none")
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


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers; lists with one entry for each layer are cut."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    full = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == full:
            setattr(text, name, type(value)(value[:layers]))
    text.num_hidden_layers = layers
    return config


def layer_period(text: PretrainedConfig) -> int:
    """After how many layers the configuration's per-layer lists repeat (Gemma 3: five sliding, one full: 6)."""
    layers = int(text.num_hidden_layers)
    lists = [list(v) for v in vars(text).values() if isinstance(v, (list, tuple)) and len(v) == layers]
    for period in range(1, layers + 1):
        if all(items[i] == items[i % period] for items in lists for i in range(layers)):
            return period
    return layers


def layer_container(model: torch.nn.Module) -> str:
    """Dotted name, inside the backbone, of the list that holds the layers: the longest one; empty if there is none."""
    backbone = backbone_of(model) or model
    lists = [(len(m), name) for name, m in backbone.named_modules() if isinstance(m, torch.nn.ModuleList) and name]
    return max(lists, default=(0, ""))[1]
