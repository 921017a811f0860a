"""A checkpoint folder of safetensors files, read one tensor at a time."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qtune.errors import ModelError, Problem
from qtune.model.folder import INDEX, weight_map
from qtune.model.safetensors_file import require_whole

SINGLE = "model.safetensors"

# The names of the safetensors header and what torch calls them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it looks like."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name; nothing is held in memory."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads the headers of all shards.

        Raises ModelError when the folder holds no safetensors weights, when a shard is missing or cannot be read
        (a truncated file is noticed here), or when the index names a tensor that its shard does not have.
        """
        tensors: dict[str, StoredTensor] = {}
        for file in weight_files(folder):
            tensors |= _header(file)
        if (named := weight_map(folder)) is not None and (missing := sorted(set(named) - set(tensors))):
            raise ModelError(
                Problem(str(folder / INDEX), f"names tensors that no shard holds: {', '.join(missing[:3])}")
            )
        return cls(folder, tensors)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, on the CPU.

        The file is mapped for this one tensor only: a mapping kept open counts every page that was ever read
        as memory of the process.
        """
        with safe_open(self.tensors[name].file, framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(stored.nbytes for stored in self.tensors.values())


def weight_files(folder: Path) -> list[Path]:
    """The shards of a model folder in the order of their names.

    Raises ModelError when there are none or when the index names a file that is not there.
    """
    if (named := weight_map(folder)) is not None:
        names = sorted(set(named.values()))
        files = [folder / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise ModelError(Problem(str(folder), f"shards named in {INDEX} are missing: {', '.join(missing)}"))
        return files
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")):
        raise ModelError(
            Problem(
                str(folder), "the weights are pickle files (.bin); convert them to safetensors, qtune reads no pickle"
            )
        )
    raise ModelError(Problem(str(folder), f"no {SINGLE} and no {INDEX}: not a model folder"))


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard, by name."""
    require_whole(file)
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  not a dict
            return {
                name: StoredTensor(file, DTYPES[part.get_dtype()], tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except KeyError as error:
        raise ModelError(Problem(str(file), f"has tensors of the type {error}, which is not read")) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(Problem(str(file), f"cannot be read as safetensors: {error}")) from error
