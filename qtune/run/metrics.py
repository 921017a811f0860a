"""metrics.jsonl: what a run tells while it trains, one record a line; appended, read, and cut where it is resumed.

Each line has a checksum of itself, and that of the line before it: one that is taken out, doubled or moved is noticed.
The first line has the run's identity in its place.
"""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from qtune.errors import Problem, RunError
from qtune.manifest import NAME as MANIFEST
from qtune.manifest import RecordsThen
from qtune.records import CHECKSUM, RUN_ID, NotARecord, plain, record_of, require_intact, sealed
from qtune.run.identity import foreign_folder, identity_of, identity_to_write, is_run_id, manifest_in, of_another
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
    where there are more than GROUPS (the same rows in each evaluation), per scored token, in nats. Of rows that
    training has not seen, but for `are_seen`."""
    group_tokens: tuple[int, ...] = ()
    """The scored tokens of each group."""
    left_out: int = 0
    """Rows that are in `loss` and in no group, for training saw their prompts."""
    are_seen: bool = False
    """Whether training saw the prompts of some rows that are in the groups, for hardly any others are left."""
    is_seen_unknown: bool = False
    """Whether training may have seen more of them: what it saw could not be read."""
    kind: Literal["eval"] = "eval"

    @property
    def judged_loss(self) -> float:
        """The loss of the rows that training has not seen, where that is another one."""
        if not self.left_out:
            return self.loss
        total = sum(loss * count for loss, count in zip(self.group_losses, self.group_tokens, strict=True))
        return total / sum(self.group_tokens)

    @property
    def about_rows(self) -> str:
        """What is to be said of the rows of `judged_loss`, in words that follow it: which were left out."""
        rows = f"{self.left_out} validation row{'' if self.left_out == 1 else 's'} left out"
        said = f" ({rows}, for training saw their prompts)" if self.left_out else ""
        return f"{said} (whether training saw others is not known)" if self.is_seen_unknown else said

    @property
    def accuracy_text(self) -> str:
        """The accuracy, and of which rows it is where these are others than those of `judged_loss`."""
        return f"accuracy {self.accuracy:.1%}{' of all rows' if self.left_out else ''}"


CUT = "…"
"""What an answer ends with that was stopped at its limit."""


def was_cut(answer: str, told: bool | None) -> bool:
    """Whether an answer was stopped at its limit. told: what its record says; None in those of older versions, which
    have the ellipsis alone."""
    return answer.endswith(CUT) if told is None else told


def other_turns_text(before: int, after: int) -> str:
    """That a request is not all that a model was asked, in words; empty where it is."""
    counts = ((before, "earlier"), (after, "later"))
    told = [f"{count} {which} turn{'' if count == 1 else 's'}" for count, which in counts if count]
    return f"with {' and '.join(told)}" if told else ""


@dataclass(frozen=True)
class SampleAnswer:
    """A held-out question, and what the model in training says to it."""

    place: str
    request: str
    """The last words of the user, cut where they are long."""
    expected: str
    answer: str
    """An ellipsis ends one that was stopped."""
    is_cut: bool | None = None
    """Whether it was stopped at its limit; None: an older version did not tell."""
    is_late: bool | None = None
    """Whether it was stopped for its time was over, and not for its length; None: an older version did not tell."""
    turns_before: int = 0
    """Turns of the conversation before `request`, the system message not counted; none in older versions."""
    turns_after: int = 0
    """Turns between `request` and the answer, as a tool's call and its result."""
    last_turn: str = ""
    """What was answered where that is not `request`: "tool: 4 in stock"; none in older versions."""

    @property
    def other_turns(self) -> str:
        """`other_turns_text` of it."""
        return other_turns_text(self.turns_before, self.turns_after)

    @property
    def was_cut(self) -> bool:
        """Whether it was stopped, as far as an older version tells."""
        return was_cut(self.answer, self.is_cut)


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
    ended_step: int | None = None
    """Where it says that the run has ended before all its steps were taken: after which step."""
    diverged: bool = False
    """Whether it says that the run ended no better than guessing."""
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


AFTER = "after"
"""The key of a line with the checksum of the line before it. In the first one it is the run's identity, empty where it
has none; lines of older versions have no such key, and are not compared."""

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
    with file.open("a+b", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        follows = _last_checksum(stream, before) if before else _beginning(file)
        left = memoryview(_line({"kind": values.pop("kind"), **values}, follows).encode(errors="backslashreplace"))
        try:
            while left:
                left = left[stream.write(left) :]
        except OSError:
            with suppress(OSError):
                stream.truncate(before)
            raise


def _line(values: Mapping[str, Any], follows: str | None) -> str:
    """A record as its line; `follows` is the checksum of the line before it."""
    linked = values if follows is None else {**values, AFTER: follows}
    return json.dumps(sealed(linked), ensure_ascii=False, allow_nan=False) + "\n"


def _beginning(file: Path) -> str:
    """What the first line follows."""
    identity = identity_to_write(file.parent)
    return "" if identity is None else str(identity.run_id)


def _last_checksum(stream: IO[bytes], end: int) -> str | None:
    """The checksum of the last whole line before `end`; empty where there is no line, None where it has none."""
    read, begin = b"", end
    while begin and b"\n" not in read[:-1]:
        begin = max(0, begin - 8192)
        stream.seek(begin)
        read = stream.read(end - begin)
    lines = [line for line in read.split(b"\n") if line.strip()]
    return _checksum_in(lines[-1].decode(errors="replace")) if lines else ""


def _checksum_in(line: str) -> str | None:
    """What a line says is its checksum."""
    try:
        found = json.loads(line)[CHECKSUM]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def read_metrics(file: Path) -> tuple[Metric, ...]:
    """Every record; none where the file is not there yet. A last line that a kill has cut short is left out.

    Raises:
        RunError: the file cannot be read, or a line in it is no record.
    """
    return tuple(record for _, record in _numbered(file))


def kept_before(file: Path) -> Path | None:
    """Copies the records of a run whose steps are taken again from the first one, to a name beside them that nothing
    has; None where no step was logged.

    Raises:
        RunError: as `read_metrics`.
    """
    if not any(isinstance(record, TrainRecord) for record in read_metrics(file)):
        return None
    names = (file.with_name(f"{file.stem}.before-{number}{file.suffix}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    write_text(aside, file.read_text(encoding="utf-8-sig", errors="replace"))
    return aside


def forget_after(file: Path, step: int) -> None:
    """Removes the records of later steps, which a resumed run will take again, all that was noted from then on, whose
    seconds and words would be of steps that were never taken, and what it was to end with.

    Raises:
        RunError: as `read_metrics`.
    """
    if not file.exists():
        return
    kept: list[str] = []
    numbered = _numbered(file)
    follows = first_run_id(file) or ""
    for line, record in numbered:
        if not isinstance(record, NoteRecord) and record.step > step:
            break
        if _is_kept(record, step):
            kept.append(_moved(line, follows))
            follows = _checksum_in(kept[-1]) or ""
    write_text(file, "".join(f"{line}\n" for line in kept))


def _is_kept(record: Metric, step: int) -> bool:
    """Whether a record before all later steps is of a run that goes on from a step."""
    if not isinstance(record, NoteRecord):
        return True
    is_of_end = record.adapter_step is not None or record.diverged
    return not is_of_end and (record.ended_step is None or record.ended_step <= step)


def _moved(line: str, follows: str) -> str:
    """A line that stands after another one from here on; one that is not compared stays as it is."""
    values = json.loads(line)
    if AFTER not in values or CHECKSUM not in values or values[AFTER] == follows:
        return line
    return _line({name: value for name, value in values.items() if name not in (AFTER, CHECKSUM)}, follows).rstrip()


def first_run_id(file: Path) -> str | None:
    """The run whose records they were when they began; None where they do not say."""
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            found = json.loads(stream.readline()).get(AFTER)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if is_run_id(found) else None


def records_then(file: Path) -> RecordsThen | None:
    """The records so far, once they are on the disk; None where there are none.

    Raises:
        OSError: they cannot be read.
    """
    try:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            lines = [line for line in stream.read().decode(errors="replace").split("\n")[:-1] if line]
    except FileNotFoundError:
        return None
    return RecordsThen(len(lines), _checksum_in(lines[0]), _checksum_in(lines[-1])) if lines else None


def require_records_of(file: Path, count: int, folder: Path) -> None:
    """What a run had told when a checkpoint or the adapter was saved is still there; an older manifest does not say.

    count: the records that are in the file now.

    Raises:
        RunError: a line is missing, or is another.
    """
    then = _said_in(folder)
    if then is not None and count < then.lines:
        message = f"has {count:,} records, and had {then.lines:,} when {folder} was saved; put the file back"
        raise RunError(Problem(str(file), f"{message}; {_if_right(folder)}"))
    if (said := foreign(file, folder)) is not None:
        raise RunError(Problem(str(folder), said))


def foreign(file: Path, folder: Path) -> str | None:
    """Why a checkpoint or an adapter is none of the run with these records, which were others when it was saved, and
    what to do if it is all the same. None where it is, and where they cannot be read or are not all there, for then
    nothing is compared."""
    if (said := foreign_folder(file.parent, folder)) is not None:
        return f"it {said}"
    if not _begins_as_its_run(file):  # and the folder is this run's, so that it is not its fault
        return None
    then = _said_in(folder)
    if then is None or not file.is_file():
        return None
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig", errors="replace").split("\n") if line.strip()]
    except OSError:
        return None
    for number, checksum in ((1, then.first), (then.lines, then.last)):
        found = _checksum_in(lines[number - 1]) if 0 < number <= len(lines) else None
        if None not in (found, checksum) and found != checksum:
            said = f"it is not of this run: when it was saved, record {number:,} of {file.name} was another"
            return f"{said} ({_if_right(folder)})"
    return None


def _begins_as_its_run(file: Path) -> bool:
    """Whether the first record is one of this run; also where that is not known."""
    identity = identity_of(file.parent)
    return identity is None or first_run_id(file) in identity.own


def _if_right(folder: Path) -> str:
    return f"if it is right as it is, remove records and {CHECKSUM} from {folder / MANIFEST}"


def _said_in(folder: Path) -> RecordsThen | None:
    """What a manifest says of the records; None where it cannot be read, which is for who uses the folder to say."""
    manifest = manifest_in(folder)
    return None if manifest is None else manifest.records


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


def ended_step(records: Sequence[Metric]) -> int | None:
    """The step after which a run has ended, where that is not the last of its steps."""
    told = [one.ended_step for one in records if isinstance(one, NoteRecord) and one.ended_step is not None]
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
    found = [
        (number, line, *_parsed(line, f"{file}:{number}"))
        for number, line in enumerate(whole.split("\n"), 1)
        if line.strip()
    ]
    if cut:
        with suppress(RunError):  # the process was killed while it wrote
            found.append((whole.count("\n") + 2, cut, *_parsed(cut, str(file))))
    if not found:
        return []
    follows: str | None = _first_follows(found[0][2].get(AFTER), file)
    for number, _, values, _ in found:
        if None not in (values.get(AFTER), follows) and values[AFTER] != follows:
            message = (
                "does not follow what stands before it: lines are missing, doubled or in another order; put them back; "
                f"if it is right as it is, remove {AFTER} and {CHECKSUM} from the line"
            )
            raise RunError(Problem(f"{file}:{number}", message))
        follows = values.get(CHECKSUM)
    return [(line, record) for _, line, _, record in found]


def _first_follows(said: Any, file: Path) -> str | None:
    """What the first line has to follow; `said` is what it says.

    Raises:
        RunError: it is of another run than the lock beside it.
    """
    identity = identity_of(file.parent)
    is_beginning = said in (None, "") or is_run_id(said)
    if identity is None or not is_beginning:  # in the second case the lines before it are missing
        return said if is_run_id(said) else ""
    if said not in identity.own:
        way_out = f"put it back; if it is right as it is, remove {RUN_ID} and {CHECKSUM} from lock.json"
        raise RunError(Problem(str(file), f"{of_another(said or None, identity)}: {way_out}"))
    return str(said)


def _parsed(line: str, place: str) -> tuple[dict[str, Any], Metric]:
    """A line's values, and the record that they are."""
    try:
        values: dict[str, Any] = json.loads(line)
        require_intact(values)
        kind = KINDS[values["kind"]]
        return values, record_of(kind, {key: value for key, value in values.items() if key != "kind"})
    except NotARecord as error:
        raise RunError(Problem(place, f"is no record of a run: {error}, or {WITHOUT}")) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(Problem(place, f"is no record of a run; {WITHOUT}")) from error


WITHOUT = f"remove the line, and {AFTER} and {CHECKSUM} from the next one"
"""How records go on without one of them, whose neighbour names it."""
