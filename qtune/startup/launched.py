"""The process that a launcher has started: which one it is, of how many; before torch is imported.

torchrun, `accelerate launch`, Slurm's and Ray's torch launchers and `qtune run --processes` all say it in the same
variables (PyTorch docs, "torchrun", Environment Variables).
"""

import functools
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

SAID_BY_A_LAUNCHER = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
"""What accelerate takes for a launcher's word (accelerate 1.15, state.py): the first four, or one of MPI's."""
_INSTEAD = "start without it: with --set memory.layers=sharded each process has a part of every 4-bit layer"
SHARDING = {
    "ACCELERATE_USE_FSDP": "accelerate 1.15 leaves 4-bit weights out of FSDP's shards (accelerate#3983), and stored as "
    f"bfloat16 FSDP2 changes NF4 bytes that look like no number (bitsandbytes#1945); {_INSTEAD}",
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed shards what is trained, and an adapter is small; {_INSTEAD}",
}
"""What `accelerate launch` says where it is to shard a model, and why that is refused."""
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """One of `processes`, the `rank`th from 0; the `local_rank`th on its computer."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    local_processes: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.processes}, counted from 0"


def said_in(environment: Mapping[str, str]) -> Launched | str:
    """What a launcher has said; in words what is wrong with it. One process is one, however it was started."""
    for name, engine in SHARDING.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "on"):
            return f"{name}: {engine}"
    said = environment.get("WORLD_SIZE", "1")
    try:
        processes = int(said)
        if processes <= 1:
            return Launched()
        missing = [name for name in ("RANK", *RENDEZVOUS) if name not in environment]
        if missing:
            names = " and ".join(missing)
            return (
                f"WORLD_SIZE: {processes} processes, and no {names}: start them with qtune run RECIPE --processes "
                f"{processes}, torchrun or accelerate launch, which set all of them; or unset WORLD_SIZE"
            )
        rank, local = int(environment["RANK"]), int(environment.get("LOCAL_RANK", environment["RANK"]))
        here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        return f"WORLD_SIZE, RANK, LOCAL_RANK: {error}; a launcher sets them to whole numbers"
    if not 0 <= rank < processes or local < 0:
        return f"RANK: {rank} of WORLD_SIZE = {processes}; ranks are counted from 0"
    return Launched(rank, processes, local, here)


@functools.cache
def launched() -> Launched:
    """What this process was started as; read once, for `join` takes the words away that others would obey."""
    said = said_in(os.environ)
    return said if isinstance(said, Launched) else Launched()


def is_to_meet() -> bool:
    """Whether this is one of several processes that have not met yet (`forget_launcher`)."""
    said = said_in(os.environ)
    return isinstance(said, Launched) and said.processes > 1


def forget_launcher(environment: MutableMapping[str, str]) -> None:
    """Takes the launcher's words out of the environment, so that accelerate and transformers see one process."""
    for name in SAID_BY_A_LAUNCHER:
        environment.pop(name, None)


def own_card(environment: Mapping[str, str], local_rank: int, cards: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a process: its own card of those that are visible, so that it is cuda:0 to everything.

    cards: on this computer, where the variable does not say which are visible. None: there is none to choose.
    A launcher that gives each process one card alone (Slurm's --gpus-per-task) has chosen already.
    """
    said = environment.get("CUDA_VISIBLE_DEVICES")
    named = [str(card) for card in range(cards)] if said is None else said.split(",")
    visible = [one.strip() for one in named if one.strip()]
    return visible[local_rank % len(visible)] if visible else None


def use_own_card() -> None:
    """Leaves this process its own card; does nothing for one that is alone."""
    if launched().processes > 1:
        cards = len(list(Path("/dev").glob("nvidia[0-9]*")))
        chosen = own_card(os.environ, launched().local_rank, cards)
        if chosen is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = chosen
