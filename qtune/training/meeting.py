"""The processes of a run meet: each says what it is about to do, and whether it can; all go on, or all end.

They meet before anything is decided, so that what is wrong with one of them ends all with one sentence: the leader's
own fault is said by the leader alone, another's by that process, with its number.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from qtune import __version__, console
from qtune.device.peers import PATIENCE
from qtune.errors import InputError, Problem, QtuneError, SaidElsewhere, TrainingError, first_line
from qtune.recipe.schema import Recipe
from qtune.run.lock import versions
from qtune.startup.launched import RENDEZVOUS, Launched, forget_launcher, launched, said_in
from qtune.training.ranks import ALONE, Ranks

COMING = timedelta(minutes=10)
"""How long a process waits for the others to come."""


@dataclass(frozen=True)
class Hello:
    """What a process says of itself."""

    fault: str | None = None
    """What is wrong, in the words of its error; None: nothing so far."""
    exit_code: int = 0
    card: str | None = None
    """The identity of its card; None on a processor."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe, by keys."""


@contextmanager
def joined(recipe: Recipe | None = None, accepted: Sequence[str] = ()) -> Iterator[Ranks]:
    """Meets the other processes that the launcher has started, for as long as the block runs.

    Afterwards accelerate and transformers see one process on one device, which is all that they have to do with.
    recipe: what is to be trained; None where a run goes on, whose own recipe all read. accepted: kinds of drift.

    Raises:
        InputError: the launcher's variables cannot be used, two processes have one card, or they were not given the
            same to do with the same libraries.
        TrainingError: they did not meet.
        SaidElsewhere: another process says what is wrong.
    """
    said = said_in(os.environ)
    if isinstance(said, str):
        raise InputError(Problem("", said))
    started = launched()
    if started.processes == 1:
        yield ALONE
        return
    card = str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else None
    known = {} if "versions" in accepted else {"qtune": __version__, **versions()}
    with _together(started) as ranks:
        _require_one_run(ranks, Hello(card=card, versions=known, settings=settings_of(recipe)))
        yield ranks


def end_together(error: QtuneError) -> QtuneError:
    """What a process with an error that came before it has met the others is to raise, having met them: its error, or
    nothing to say where the leader has the same. The others end with it."""
    with _together(launched()) as ranks:
        hellos = ranks.all_of(Hello(str(error), error.exit_code))
    is_leaders = not ranks.is_leader and hellos[0].fault == str(error)
    return SaidElsewhere(error.exit_code) if is_leaders else error


def settings_of(recipe: Recipe | None) -> dict[str, Any]:
    """A recipe by its keys: "training.steps" -> 60."""
    tables = {} if recipe is None else recipe.model_dump(mode="json")
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}


@contextmanager
def _together(started: Launched) -> Iterator[Ranks]:
    forget_launcher(os.environ)
    _meet(started)
    try:
        yield Ranks(started.rank, started.processes)
    finally:
        distributed.destroy_process_group()


def _meet(started: Launched) -> None:
    """Waits for the others; says where, for one that never comes is waited for long.

    They meet at the store, where one that does not come is given up soon; only then connections are made, on which all
    wait with patience: those of a group that has little would end a run whose leader fetches a base for an hour.
    """
    where = ":".join(os.environ[name] for name in RENDEZVOUS)
    others = started.processes - 1
    console.say(f"meeting the other {others} of {started.processes} processes at {where}")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", started.rank, started.processes, timeout=COMING))
        store.set(f"qtune/{started.rank}", "here")
        store.wait([f"qtune/{rank}" for rank in range(started.processes)], COMING)
        distributed.init_process_group(
            backend, store=store, rank=started.rank, world_size=started.processes, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes of this run did not meet at {where}: {first_line(error)}") from error


def _require_one_run(ranks: Ranks, own: Hello) -> None:
    """Lets processes through that can all begin, each on a card of its own, with the same to do."""
    hellos = ranks.all_of(own)
    if (faulty := next((one for one in hellos if one.fault is not None), None)) is not None:
        raise SaidElsewhere(faulty.exit_code)
    cards = [one.card for one in hellos]
    shared = next((one for one in cards if one is not None and cards.count(one) > 1), None)
    if shared is not None:
        both = " and ".join(str(rank) for rank, one in enumerate(cards) if one == shared)
        message = f"processes {both} have one card ({shared}); start as many as there are cards, or name more of them"
        ranks.refuse(InputError(Problem("CUDA_VISIBLE_DEVICES", message)))
    if found := list(_differences(hellos)):
        ranks.refuse(InputError(found))


def _differences(hellos: Sequence[Hello]) -> Iterator[Problem]:
    """What processes were given otherwise than the leader."""
    first = hellos[0]
    for rank, other in enumerate(hellos):
        for name, version in first.versions.items():
            if other.versions.get(name) != version:
                found = other.versions.get(name) or "none"
                message = f"process 0 has {version or 'none'} and process {rank} {found}; install the same for all"
                yield Problem(name, message)
        for key in first.settings.keys() | other.settings.keys():
            here, there = first.settings.get(key), other.settings.get(key)
            if here != there:
                message = f"{here!r} in process 0 and {there!r} in process {rank}; start all with the same recipe"
                yield Problem(key, message)
