"""A micro-batch of a run, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class SeenBatch:
    """A micro-batch of the run. Whether it is padded stays on its device until it is asked for, which waits for it."""

    rows: int
    length: int
    padding: torch.Tensor | None
    """Scalar: whether any position is padding; None: there is no mask."""
    scored: int | None = None
    """Labelled tokens, once the loss has counted them."""

    @property
    def positions(self) -> int:
        """What memory grows with."""
        return self.rows * self.length

    def joined(self, other: SeenBatch | None) -> SeenBatch:
        """The larger of two; of two as large, what the larger memory needs of each."""
        if other is None or other.positions < self.positions:
            return self
        if other.positions > self.positions:
            return other
        both = [one.padding for one in (self, other) if one.padding is not None]
        counts = [one.scored for one in (self, other) if one.scored is not None]
        return SeenBatch(self.rows, self.length, torch.stack(both).any() if both else None, max(counts, default=None))

    def to_json(self) -> dict[str, int]:
        """rows, length, padded (0 or 1) and, once it is known, scored."""
        report = {
            "rows": self.rows,
            "length": self.length,
            "padded": int(self.padding is not None and bool(self.padding)),
        }
        return report if self.scored is None else report | {"scored": self.scored}
