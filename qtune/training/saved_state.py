"""The state of an optimizer, a schedule and of random numbers as safetensors: no pickles, bit for bit.

A state is a tree of dictionaries, lists and tuples. Its tensors are the file's tensors; its shape, its numbers and its
texts are JSON in the file's metadata. A key or a value that JSON would change (a number as a key, a tuple) is written
out, so that what is read is equal to what was saved.

Checkpoints of older versions hold pickles; they are read as PyTorch reads untrusted ones, which runs no code.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

from qtune.errors import Problem, RunError, first_line
from qtune.run.checkpoints import OPTIMIZER
from qtune.whole import whole

SCHEDULE, RANDOM, SCALER = "schedule.safetensors", "random.safetensors", "scaler.safetensors"


def random_file(rank: int) -> str:
    """The file of a process's random state; the leader's is the one that a run of one process has."""
    return RANDOM if rank == 0 else RANDOM.replace(".", f"-{rank}.")


def random_of(seed: int, rank: int, step: int) -> int:
    """A seed of its own for a process that begins to draw after a step."""
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0])


OLDER = {OPTIMIZER: "optimizer.pt", SCHEDULE: "scheduler.pt", RANDOM: "rng_state.pth", SCALER: "scaler.pt"}
"""What versions before this one wrote instead."""

TREE = "tree"


def save_tree(file: Path, tree: Any) -> None:
    """Writes a state whole or not at all.

    Raises:
        TypeError: something in it is neither a tensor nor plain.
    """
    tensors: dict[str, Tensor] = {}
    described = _described(tree, tensors)
    with whole(file) as partial:
        save_file(tensors, partial, metadata={TREE: json.dumps(described)})


def load_tree(file: Path) -> Any:
    """The state in a file, its tensors on the CPU.

    Raises:
        RunError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            described = json.loads((stored.metadata() or {})[TREE])
            return _restored(described, stored)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise RunError(Problem(str(file), f"holds no state that can be read: {first_line(error)}")) from error


def load_state(folder: Path, name: str) -> Any:
    """A state of a checkpoint by the name that this version gives it; None where it has none.

    Raises:
        RunError: it cannot be read.
    """
    if (folder / name).is_file():
        return load_tree(folder / name)
    older = folder / OLDER.get(name, name)
    if not older.is_file():
        return None
    try:
        with safe_globals():  # numpy's arrays, which the random state of older versions holds
            return torch.load(older, map_location="cpu", weights_only=True)
    # torch's unpickler, its zip reader and a file that is cut raise each their own.
    except Exception as error:
        raise RunError(Problem(str(older), f"holds no state that can be read: {first_line(error)}")) from error


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Goes on drawing where `random_state` was asked."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.random.set_rng_state(state["cuda"])


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go to `tensors`, under the numbers that stand in their places."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}  # every bit, infinities included
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        name = str(len(tensors))
        # No two of them may share memory, which safetensors refuses.
        tensors[name] = tensor.to("cpu", copy=True).contiguous()
        return {kind: name}
    if isinstance(value, Mapping):
        return {"pairs": [[_described(key, tensors), _described(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_described(inner, tensors) for inner in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return _described(value.item(), tensors)
    raise TypeError(f"a {type(value).__name__} cannot be part of a state that is saved")


def _restored(value: Any, stored: Any) -> Any:
    if isinstance(value, list):
        return [_restored(inner, stored) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "float":
            return float.fromhex(inner)
        case "tensor":
            return stored.get_tensor(inner)
        case "array":
            return stored.get_tensor(inner).numpy()
        case "tuple":
            return tuple(_restored(one, stored) for one in inner)
        case "pairs":
            return {_restored(key, stored): _restored(one, stored) for key, one in inner}
    raise ValueError(f"{kind!r} is no part of a state")
