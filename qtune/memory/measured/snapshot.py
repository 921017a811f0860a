"""The CUDA allocator's history of a run's first steps, as a file that PyTorch's viewer draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

SNAPSHOT_STEPS = 2
"""The optimizer's state exists from the second step on."""
SNAPSHOT_ENTRIES = 200_000
"""Allocator events that are kept; two steps of a 7B model make fewer."""


class Snapshot:
    """Records from now on, and writes once: at the end of `SNAPSHOT_STEPS` steps, or of the run.

    https://pytorch.org/memory_viz draws it (PyTorch docs, "Understanding CUDA Memory Usage").
    """

    def __init__(self, file: Path | None) -> None:
        """file: None for none."""
        self._file = file
        self.said = ""
        """In words, where it is or why it is not; empty until then."""
        if file is not None:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_ENTRIES)

    def write(self) -> None:
        """Does nothing the second time."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            torch.cuda.memory._dump_snapshot(str(file))
            self.said = f"{file}; https://pytorch.org/memory_viz draws it"
        except (OSError, RuntimeError) as error:  # a full disk ends no training for the sake of a picture
            self.said = f"could not be written: {error}"
        torch.cuda.memory._record_memory_history(enabled=None)
