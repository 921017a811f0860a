"""Every error that qtune raises on purpose, and the exit code of each.

    QtuneError                  a message for the user, an exit code for the shell
    ├── InputError        (2)   the input is wrong: one line for each problem, all of them at once
    │   ├── RecipeError         recipe file, --set
    │   ├── DataError           data files and rows
    │   ├── ModelError          base model: not found, not readable, not quantizable as asked
    │   └── RunError            run folder: missing, incomplete, of another version
    ├── WorkError         (1)   the input was fine, the work failed
    │   ├── GateError           the data would train on wrong labels
    │   ├── OutOfMemory         does not fit the device
    │   ├── TrainingError       training stopped
    │   │   └── PeerLostError   another process of the run has gone
    │   ├── ExportError         the exported model could not be written
    │   ├── VerificationError   the exported model is not the trained one
    │   └── LibraryError        a library that we need is missing or broken
    ├── Interrupted     (130)   Ctrl-C; the state is saved
    └── SaidElsewhere           another process of the run says why, and has the exit code

Anything else that reaches the user is a bug of ours and keeps its traceback.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    `place` is what the user can open or type: "recipe.toml:14", "data/train.jsonl:208", "--set"; it may be empty.
    `message` says the key or row, what was found, and what would be right.
    """

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first line that is not empty, else the name of its class."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """`first_line` of libraries that say where they failed before they say how."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


class QtuneError(Exception):
    """A failure with a message that is meant for the user."""

    exit_code = 1


class InputError(QtuneError):
    """One or more problems in what the user gave, reported together."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[Any, ...]:
        """An error of a process that works beside this one arrives as it was raised there."""
        return type(self), (self.problems,)


class RecipeError(InputError):
    """The recipe, or a `--set` that changes it, cannot be used."""


class DataError(InputError):
    """A data source or some of its rows cannot be used."""


class ModelError(InputError):
    """The base model cannot be found, read or quantized as the recipe says."""


class RunError(InputError):
    """A run folder is missing, incomplete or not ours."""


class WorkError(QtuneError):
    """The input was acceptable and the work failed."""

    exit_code = 1


class GateError(WorkError):
    """The gate found labels that would train the wrong thing."""


Phase = Literal["load", "forward", "backward", "optimizer", "eval", "save", "idle"]
"""Where a run is, as its meter is told."""


@dataclass(frozen=True)
class Failure:
    """What could be seen at the moment when memory ran out."""

    phase: Phase
    step: int
    """The optimizer step at work or just done, from 1; 0 before the first."""
    batch: dict[str, int] | None
    """rows, length and, once the loss has seen them, scored of the batch at work; None outside a step."""
    said: str
    """The allocator's own words, up to the request."""
    wanted_bytes: int
    """The request that was refused; 0 if the allocator did not say."""
    alive: dict[str, int]
    """Bytes by category, as far as they can be told apart."""
    counted: str
    """How `alive` is known: by the ledger, by walking over the model and the optimizer, by the allocator."""
    own_bytes: int
    """What this process held: reserved by the allocator (CUDA), or resident (CPU)."""
    free_bytes: int
    total_bytes: int


class OutOfMemory(WorkError):  # noqa: N818  named as its users say it
    """The work does not fit the device's memory. `failure`: what a meter saw when it ran out, if one was running."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        self.failure = failure
        super().__init__(message)


class TrainingError(WorkError):
    """Training stopped before its end."""


class PeerLostError(TrainingError):
    """Another process of the run has gone."""


class ExportError(WorkError):
    """The export could not be written."""


class VerificationError(WorkError):
    """The exported model does not match the one that was trained."""


class LibraryError(WorkError):
    """A library that we need is not installed, or cannot be imported.

    library: its name. found: what is the matter with it. way_out: the command that puts it right.
    """

    def __init__(self, library: str, found: str, way_out: str) -> None:
        self.library, self.found, self.way_out = library, found, way_out
        super().__init__(f"{library}: {found}; {way_out}")


class Interrupted(QtuneError):  # noqa: N818  not an error, an answer to Ctrl-C
    """The user stopped the work; what was done is saved."""

    exit_code = 130


class SaidElsewhere(QtuneError):  # noqa: N818  not an error of its own
    """The run has ended; another of its processes has said why, and there is nothing to add."""

    def __init__(self, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__()
