"""forgetting.json: what was measured of a run's forgetting, as a value and as a file. Reading it needs no library that
computes."""

from dataclasses import dataclass

from qtune.run.folder import RunDir
from qtune.run.measured_adapter import read_figures


@dataclass(frozen=True)
class PieceLoss:
    """One piece of the text under both models: its scored tokens, and their mean negative log-likelihood in nats."""

    tokens: int
    base: float
    tuned: float


@dataclass(frozen=True)
class Forgetting:
    """The loss of base and tuned model on the neutral text; kept as RUN/forgetting.json."""

    text: str
    """Which text: the start of its SHA-256."""
    pieces: tuple[PieceLoss, ...]
    adapter: str | None = None
    """`run.measured_adapter.adapter_name` of what was asked; None in files of older versions."""

    @property
    def base(self) -> float:
        """Mean over the scored tokens, in nats."""
        return self._mean([piece.base for piece in self.pieces])

    @property
    def tuned(self) -> float:
        """Mean over the scored tokens, in nats."""
        return self._mean([piece.tuned for piece in self.pieces])

    def _mean(self, losses: list[float]) -> float:
        tokens = [piece.tokens for piece in self.pieces]
        return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def read_forgetting(run_dir: RunDir) -> Forgetting | None:
    """RUN/forgetting.json; None where nothing was measured of this adapter.

    Raises:
        RunError: it is damaged.
    """
    return read_figures(run_dir, run_dir.forgetting_file, Forgetting)
