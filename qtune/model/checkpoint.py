"""A checkpoint folder of safetensors files, read one tensor at a time."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qtune.errors import ModelError, Problem, first_line
from qtune.model.folder import INDEX, weight_files, weight_map
from qtune.model.safetensors_file import require_whole

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
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(Problem(str(file), f"{name} cannot be read: {error}")) from error
        return tensor

    def read_finite(self, name: str) -> torch.Tensor:
        """`read`, of a weight that is going to be used.

        Raises:
            ModelError: some of its numbers are infinite or none.
        """
        tensor = self.read(name)
        if (problem := not_finite(name, tensor, self.tensors[name].file)) is not None:
            raise ModelError(problem)
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(stored.nbytes for stored in self.tensors.values())


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a small file, an adapter's, by name.

    Raises:
        ModelError: it is damaged.
    """
    require_whole(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(Problem(str(file), f"cannot be read as safetensors: {first_line(error)}")) from error


def not_finite(name: str, tensor: torch.Tensor, file: Path) -> Problem | None:
    """What is wrong with a tensor's numbers; None where all of them are numbers."""
    if is_finite(tensor):
        return None
    bad = ~torch.isfinite(tensor.float())
    first = [int(index) for index in bad.nonzero()[0]]
    value = float(tensor[tuple(first)].float()) if first else float(tensor.float())
    message = f"{int(bad.sum()):,} of the {tensor.numel():,} numbers of {name} are not finite, the first {value} at "
    return Problem(str(file), f"{message}{first}; every result would be NaN; fetch the model again")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is one; whole numbers always are.

    A sum is infinite or none where any of its terms is, and takes no memory; one that only overflowed is looked at
    again.
    """
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # there is no arithmetic in 8 bits
    return bool(torch.isfinite(wide.sum(dtype=torch.float32))) or bool(torch.isfinite(wide).all())


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard, by name."""
    require_whole(file)
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  not a dict
            if odd := sorted({part.get_dtype() for part in slices.values()} - DTYPES.keys()):
                raise ModelError(Problem(str(file), f"holds numbers of type {odd[0]}, which qtune does not read"))
            return {
                name: StoredTensor(file, DTYPES[part.get_dtype()], tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except KeyError as error:
        raise ModelError(Problem(str(file), f"has tensors of the type {error}, which is not read")) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(Problem(str(file), f"cannot be read as safetensors: {error}")) from error
