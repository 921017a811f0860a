"""metrics.jsonl: what a run tells while it trains, one record a line; appended, read, and cut where it is resumed."""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qtune.errors import Problem, RunError
from qtune.records import NotARecord, plain, record_of, require_intact, sealed
from qtune.whole import write_text


@dataclass(frozen=True)
class TrainRecord:
    """What `training.log_every` steps have learned and cost."""

    step: int
    """Of the optimizer, from 1; `steps` is the last one."""
    steps: int
    epoch: float
    seconds: float
    """Since training began, or was resumed; `seconds_of` adds the parts."""
    loss: float
    """Mean negative log-likelihood of a scored token, in nats."""
    accuracy: float
    """Share of scored tokens that were the likeliest."""
    learning_rate: float
    gradient_norm: float
    """Before clipping; infinite in a step that loss scaling skips."""
    tokens_per_second: float
    """Of rows: padding is not counted."""
    memory_bytes: int
    memory_peak_bytes: int
    step_seconds: float | None = None
    """The mean step since the last record; None: an older run did not tell."""
    predicted_step_seconds: float | None = None
    """What was predicted for these steps, where the device's rates are known."""
    outlier: str | None = None
    """What stands out of the steps before, in words."""
    skipped: bool = False
    """Whether its update was left out for that."""
    kind: Literal["train"] = "train"

    @property
    def is_finite(self) -> bool:
        """Whether training is still going somewhere."""
        return math.isfinite(self.loss)


@dataclass(frozen=True)
class EvalRecord:
    """How the validation rows do after a step."""

    step: int
    steps: int
    epoch: float
    seconds: float
    loss: float
    accuracy: float
    group_losses: tuple[float, ...] = ()
    """The rows' losses, so that two evaluations can be compared row by row: of each row, or of each group of rows
    where there are more than GROUPS (the same rows in each evaluation), per scored token, in nats."""
    group_tokens: tuple[int, ...] = ()
    """The scored tokens of each group."""
    kind: Literal["eval"] = "eval"


@dataclass(frozen=True)
class SampleAnswer:
    """A held-out question, and what the model in training says to it."""

    place: str
    request: str
    """The last words of the user, cut where they are long."""
    expected: str
    answer: str
    """An ellipsis ends one that was stopped."""


@dataclass(frozen=True)
class AnswersRecord:
    """What the model answers to a few validation rows after a step; the same rows each time."""

    step: int
    steps: int
    epoch: float
    seconds: float
    answers: tuple[SampleAnswer, ...]
    kind: Literal["answers"] = "answers"


@dataclass(frozen=True)
class NoteRecord:
    """Something that happened, in a sentence."""

    message: str
    seconds: float = 0.0
    adapter_step: int | None = None
    """Where it says that the adapter is the state of a step before the last: which step."""
    kind: Literal["note"] = "note"


GROUPS = 64
"""How many groups of rows a record of an evaluation tells apart: enough for an interval, and a line of a kilobyte."""


def grouped(losses: Sequence[float], tokens: Sequence[int]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Rows' summed losses and scored tokens -> `EvalRecord.group_losses` and `group_tokens`.

    Row n is in group n modulo GROUPS; a group without a scored token is left out.
    """
    groups = range(min(GROUPS, len(losses)))
    sums = [(sum(losses[at::GROUPS]), sum(tokens[at::GROUPS])) for at in groups]
    scored = [(loss / count, count) for loss, count in sums if count]
    return tuple(round(loss, 6) for loss, _ in scored), tuple(count for _, count in scored)


Metric = TrainRecord | EvalRecord | AnswersRecord | NoteRecord
KINDS: dict[str, type[Metric]] = {
    "train": TrainRecord,
    "eval": EvalRecord,
    "answers": AnswersRecord,
    "note": NoteRecord,
}


def append_metric(file: Path, record: Metric) -> None:
    """Adds a record to the end of the file.

    Raises:
        OSError: it could not be written; nothing of it is in the file.
    """
    values = plain(record)
    record_values = sealed({"kind": values.pop("kind"), **values})
    line = json.dumps(record_values, ensure_ascii=False, allow_nan=False) + "\n"
    left = memoryview(line.encode(errors="backslashreplace"))
    with file.open("ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[stream.write(left) :]
        except OSError:
            with suppress(OSError):
                stream.truncate(before)
            raise


def read_metrics(file: Path) -> tuple[Metric, ...]:
    """Every record; none where the file is not there yet. A last line that a kill has cut short is left out.

    Raises:
        RunError: the file cannot be read, or a line in it is no record.
    """
    return tuple(record for _, record in _numbered(file))


def forget_after(file: Path, step: int) -> None:
    """Removes the records of later steps, which a resumed run will take again, and what it was to end with.

    Raises:
        RunError: as `read_metrics`.
    """
    if not file.exists():
        return
    kept = [
        line
        for line, record in _numbered(file)
        if (record.adapter_step is None if isinstance(record, NoteRecord) else record.step <= step)
    ]
    write_text(file, "".join(f"{line}\n" for line in kept))


def has_evaluation(file: Path, step: int) -> bool:
    """Whether the validation rows were looked at after a step.

    Raises:
        RunError: as `read_metrics`.
    """
    return any(isinstance(record, EvalRecord) and record.step == step for record in read_metrics(file))


def adapter_step(records: Sequence[Metric]) -> int | None:
    """The step whose state became the adapter of a run, where that is not the last one."""
    told = [one.adapter_step for one in records if isinstance(one, NoteRecord) and one.adapter_step is not None]
    return told[-1] if told else None


def seconds_of(records: tuple[Metric, ...]) -> float:
    """How long training took, the parts before a resumption included: each part counts its seconds from 0."""
    total = last = 0.0
    for record in records:
        if record.seconds < last:
            total += last
        last = record.seconds
    return total + last


def _numbered(file: Path) -> list[tuple[str, Metric]]:
    """Each line with its record."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(Problem(str(file), f"cannot be read: {error.strerror}")) from error
    whole, _, cut = text.rpartition("\n")
    records = [(line, _record_in(line, f"{file}:{number}")) for number, line in enumerate(whole.split("\n"), 1) if line]
    if cut:
        with suppress(RunError):  # the process was killed while it wrote
            records.append((cut, _record_in(cut, str(file))))
    return records


def _record_in(line: str, place: str) -> Metric:
    try:
        values: Any = json.loads(line)
        require_intact(values)
        kind = KINDS[values["kind"]]
        return record_of(kind, {key: value for key, value in values.items() if key != "kind"})
    except NotARecord as error:
        raise RunError(Problem(place, f"is no record of a run: {error}, or remove the line")) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(Problem(place, "is no record of a run; remove the line")) from error
