"""Several micro-batches through a model, all of them through one layer before the next.

Where layers have to be fetched, one that is here serves every micro-batch of an optimizer step: loads for a token fall
with accumulation. The backward needs no more than that order of the forward: autograd takes what was computed last
first, so it goes back through all micro-batches of a layer before the layer below (torch/csrc/autograd/engine.cpp,
`ReadyQueue`, sorted by sequence number), and checkpointing, hooks and hidden states on the host are as ever.

A model's own forward does all of it, twice: up to the layers, whose places are taken by stand-ins that note what they
were called with, and from the last layer on, whose stand-in returns what was computed in between.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from qtune.device.present import is_out_of_memory
from qtune.model.checkpointed import switched_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Result = TypeVar("Result")


class _ReachedError(Exception):
    """The last stand-in was reached: what comes after has nothing to work on yet."""


class _StandIn(nn.Module):
    """In a layer's place, with the layer's attributes."""

    def __init__(self, layer: nn.Module, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        vars(self)["of"] = layer  # no child: nothing of it is this module's
        vars(self)["answer"] = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["of"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = vars(self)["answer"](hidden, args, kwargs)
        return answer


@contextmanager
def _standing_in(
    model: nn.Module, layers: Sequence[nn.Module], answers: Sequence[Callable[..., Tensor]]
) -> Iterator[None]:
    stand_ins = {id(layer): _StandIn(layer, answer) for layer, answer in zip(layers, answers, strict=True)}
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if id(child) in stand_ins
    ]
    try:
        for module, name, child in places:
            setattr(module, name, stand_ins[id(child)])
        yield
    finally:
        for module, name, child in places:
            setattr(module, name, child)


class _Calls:
    """What each layer is called with for one micro-batch, and the hidden states on their way through."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.hidden: Tensor | None = None
        self.rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A stand-in's answer on the way to the layers."""
        if not self.rest:
            self.hidden = hidden
        self.rest.append((args, kwargs))
        if len(self.rest) == self.count:
            raise _ReachedError
        return hidden

    def through(self, number: int, layer: nn.Module) -> None:
        """One layer."""
        args, kwargs = self.rest[number]
        self.hidden = layer(self.hidden, *args, **kwargs)

    def end(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The last stand-in's answer on the way from the layers."""
        assert self.hidden is not None
        found, self.hidden = self.hidden, None
        return found


def _passed(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What is thrown away may be anything of the right shape."""
    return hidden


def layer_by_layer(model: nn.Module, forwards: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each of `forwards` returns, every one of which calls the model once.

    Exact where a layer is a function of its hidden states and of what the model computes before all layers;
    `layers_stand_alone` finds out.
    """
    layers = switched_layers(model)
    calls = [_Calls(len(layers)) for _ in forwards]
    for forward, call in zip(forwards, calls, strict=True):
        with _standing_in(model, layers, [call.note] * len(layers)):
            try:
                forward()
            except _ReachedError:
                continue
        raise RuntimeError("a forward did not go through every layer of the model")
    for number, layer in enumerate(layers):
        for call in calls:
            call.through(number, layer)
    results: list[Result] = []
    for forward, call in zip(forwards, calls, strict=True):
        with _standing_in(model, layers, [*[_passed] * (len(layers) - 1), call.end]):
            results.append(forward())
    return results


@torch.no_grad()
def layers_stand_alone(model: nn.Module, ids: Tensor) -> bool:
    """Whether `layer_by_layer` computes what the model does: the same logits [rows, length, vocab], to the bit.

    ids: [rows, length]. A layer that reads what another one has left (shared keys, for example) shows here, and so does
    a model that takes a layer's answer apart, which the stand-in's is not made for.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: memory ran out, which says nothing of the model.
    """
    was_training = model.training
    model.eval()

    def logits() -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    try:
        expected = logits()
        found = layer_by_layer(model, [logits, logits])
    except Exception as error:  # each family's code meets the stand-ins in its own way: unpacks, indexes, asserts
        if is_out_of_memory(error):
            raise
        return False
    finally:
        model.train(was_training)
    return all(_is_same(one, expected) for one in found)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether all numbers are equal; one that is no number is equal to another such."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
