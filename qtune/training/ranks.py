"""The processes of one run: what they tell each other, and the sum of their gradients.

Each holds the whole 4-bit base on its own device and computes some micro-batches of every step; the gradients of the
adapter, which alone are trained, are added once a step in one all-reduce. PyTorch's DistributedDataParallel would add
them during the last backward pass: a process whose memory runs out there could not take its micro-batch apart and try
again, for the others would wait for it in the middle of a bucket. It also averages, where this is a sum. So the model
is not wrapped; torch.distributed carries what is added.

The first process is the leader: it alone writes files, speaks and decides. The others follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune.device.peers import noticing_loss
from qtune.errors import InputError, Problem, SaidElsewhere
from qtune.training.callbacks import StopOnSignal

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. Every method is called by all of them at the same place."""

    rank: int = 0
    processes: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether it writes files, speaks and decides."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there is anybody else."""
        return self.processes > 1

    def has(self, number: int) -> bool:
        """Whether something that is shared out, counted from 0, is this process's."""
        return number % self.processes == self.rank

    def told(self, value: Value) -> Value:
        """The leader's value; that of the others is not looked at."""
        return self._broadcast(value) if self.are_several else value

    def heard(self) -> Any:
        """What the leader tells with `told`, where a follower has no value of its own."""
        return self._broadcast(None)

    def _broadcast(self, value: Any) -> Any:
        box = [value if self.is_leader else None]
        with noticing_loss():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_of(self, value: Value) -> list[Value]:
        """Everybody's value, in the order of the processes."""
        if not self.are_several:
            return [value]
        values: list[Any] = [None] * self.processes
        with noticing_loss():
            distributed.all_gather_object(values, value)
        return values

    def sum_of(self, values: Sequence[float]) -> list[float]:
        """The sums over the processes, in fp64: exact for counts below 2^53."""
        if not self.are_several:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with noticing_loss():
            distributed.all_reduce(total)
        return total.tolist()

    def add_gradients(self, model: nn.Module) -> None:
        """Puts the sum over the processes in the place of every gradient; one that has none counts as zero.

        The adapter's gradients go as one buffer for each type: one message, and memory of as many bytes.
        """
        if not self.are_several:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            group = [parameter for parameter in trained if parameter.dtype == dtype]
            parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in group]
            flat = torch.cat([part.reshape(-1) for part in parts])
            with noticing_loss():
                distributed.all_reduce(flat)
            for parameter, part in zip(group, flat.split([one.numel() for one in group]), strict=True):
                total = part.view_as(parameter)
                parameter.grad = total.clone() if parameter.grad is None else parameter.grad.copy_(total)

    def begin_alike(self, model: nn.Module) -> None:
        """Gives every process the leader's trained weights, whatever a start has drawn or rounded elsewhere."""
        for parameter in model.parameters() if self.are_several else ():
            if parameter.requires_grad:
                with noticing_loss():
                    distributed.broadcast(parameter.data, src=0)

    def require_alike(self, what: str, value: Any) -> None:
        """Refuses processes that do not see the same, on another computer for example; the leader says it.

        Raises:
            InputError: what `value` is here and on another one differs. SaidElsewhere: likewise, in the others.
        """
        values = self.all_of(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            message = f"{what} of process {others[0]} are not those of process 0; all must read the same files"
            self.refuse(InputError(Problem("", message)))

    def refuse(self, error: InputError) -> NoReturn:
        """Ends all processes for a reason that all of them know; the leader says it.

        Raises:
            InputError: in the leader. SaidElsewhere: in the others.
        """
        raise error if self.is_leader else SaidElsewhere(error.exit_code)


ALONE = Ranks()


class Agree(TrainerCallback):
    """The leader's decisions are everybody's: to save, to evaluate, to stop. A signal to any of them stops all.

    It has to be the last of the callbacks, for it tells what they have decided.
    """

    def __init__(self, ranks: Ranks, stop: StopOnSignal) -> None:
        self.ranks = ranks
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self._agree(control):
            control.should_save = control.should_training_stop = True
            self.stop.requested = True  # it may be another process that was asked
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._agree(control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._agree(control)
        return control

    def _agree(self, control: TrainerControl) -> bool:
        """Takes over what the leader's callbacks have decided; whether any process was asked to stop, up to here. One
        that is asked later says so at the end of the next step."""
        everybodys = self.ranks.all_of((self.stop.requested, [getattr(control, name) for name in DECISIONS]))
        for name, value in zip(DECISIONS, everybodys[0][1], strict=True):
            setattr(control, name, value)
        return any(requested for requested, _ in everybodys)


DECISIONS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def in_turn(shares: Sequence[Sequence[Value]]) -> list[Value]:
    """What the processes have, one of each after the other: the order in which one process would have had it."""
    longest = max(map(len, shares))
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]
