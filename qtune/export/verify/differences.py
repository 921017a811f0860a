"""Written tensors against the merge that they should be: which differ, and by how much."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qtune.errors import ModelError
from qtune.export.merge import Merge, merged_tensor
from qtune.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Difference:
    """One tensor that is not what the merge makes of it."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


def differing_tensors(merge: Merge, folder: Path) -> list[Difference]:
    """Makes every tensor of the merge again and compares it with the file, bit for bit.

    Needs the memory of one tensor, so this is also how pairs too large for the memory are proven.
    """
    try:
        written = Checkpoint.open(folder)
    except ModelError as error:
        return [Difference(problem.place, problem.message) for problem in error.problems]
    planned = {tensor.name: tensor for tensor in merge.tensors}
    differences = [Difference(name, "is not part of the merge") for name in sorted(written.tensors.keys() - planned)]
    for name, tensor in planned.items():
        if name not in written.tensors:
            differences.append(Difference(name, "is missing"))
            continue
        expected, stored = merged_tensor(merge, tensor), written.read(name)
        if expected.shape != stored.shape:
            differences.append(Difference(name, f"is {list(stored.shape)} instead of {list(expected.shape)}"))
        elif not torch.equal(expected, stored):
            gap = (expected.double() - stored.double()).abs().max().item()
            differences.append(Difference(name, f"differs by up to {gap:.3g}"))
    return differences
