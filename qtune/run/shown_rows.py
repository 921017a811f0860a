"""rows.json: a few training rows as the model saw them, kept by the run so that its report needs no tokenizer."""

from dataclasses import dataclass

from qtune.run.folder import RunDir
from qtune.run.identity import read_of_run, write_of_run


@dataclass(frozen=True)
class RowPiece:
    """Text of a row whose tokens are all scored, or all not."""

    text: str
    scored: bool


@dataclass(frozen=True)
class ShownRow:
    """One row: why it was chosen, where it stands, and its text in pieces that are scored or not."""

    title: str
    place: str
    tokens: int
    scored: int
    pieces: tuple[RowPiece, ...]


@dataclass(frozen=True)
class ShownRows:
    """The chosen rows, how many there are, and what stands before each of them without being text."""

    rows: tuple[ShownRow, ...]
    train_rows: int
    validation_rows: int
    virtual_tokens: int
    template: str
    changed: bool = False
    """Whether the files hold other rows now than those that were trained on."""


def keep_rows(run_dir: RunDir, rows: ShownRows) -> None:
    """Writes RUN/rows.json.

    Raises:
        OSError: it cannot be written.
    """
    run_dir.require_there()
    write_of_run(run_dir, run_dir.rows_file, rows)


def kept_rows(run_dir: RunDir) -> ShownRows | None:
    """RUN/rows.json; None where the run has kept none: it is of an older version, or stopped before its first step.

    Raises:
        RunError: it is damaged, or another run's.
    """
    return read_of_run(run_dir, run_dir.rows_file, ShownRows)
