"""Which run a file belongs to: a run gets an identity when it begins, and everything that it writes carries it.

The checksum of a file says that it is what was written, and not for which run: a file that was copied from another
folder is whole too. lock.json has the identity; folders may be renamed, moved and copied. Runs of older versions have
none, and nothing of them is compared.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qtune.errors import InputError, Problem, RunError
from qtune.manifest import NAME as MANIFEST
from qtune.manifest import Manifest, SavedBy, is_ours
from qtune.records import CHECKSUM, read_record, run_id_in, write_record
from qtune.run.folder import RunDir

Record = TypeVar("Record")

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Part:
    """One resumption of a run."""

    from_step: int


@dataclass(frozen=True)
class Identity:
    """What lock.json says of who a run is."""

    run_id: str | None = None
    ancestors: tuple[str, ...] = ()
    """The runs whose records and checkpoints it goes on from, the first one first (`resumption.begin_branch`)."""
    resumed: tuple[Part, ...] = ()

    @property
    def own(self) -> tuple[str, ...]:
        """Identities under which the beginning of its records, and checkpoints, may have been written."""
        return (*self.ancestors, *(() if self.run_id is None else (self.run_id,)))

    def has_left(self, saved: SavedBy, step: int | None) -> bool:
        """Whether the run has gone on from before a checkpoint since it was saved.

        step: the checkpoint's; None: it is the adapter, which comes last.
        """
        return any(step is None or part.from_step < step for part in self.resumed[saved.part :])


def new_run_id() -> str:
    """An identity that no other run has."""
    return uuid.uuid4().hex


def is_run_id(text: object) -> bool:
    """Whether a value is an identity, and no checksum of a line."""
    return isinstance(text, str) and _RUN_ID.fullmatch(text) is not None


def identity_of(folder: Path) -> Identity | None:
    """The identity of the run in a folder; None where it has none, and where its lock is damaged, which is for those to
    say who read it."""
    try:
        return identity_to_write(folder)
    except OSError:
        return None


def identity_to_write(folder: Path) -> Identity | None:
    """`identity_of` for what is written now, which says it from then on.

    Raises:
        OSError: the lock is there and cannot be read.
    """
    try:
        found = read_record(folder / "lock.json", Identity)
    except RunError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return None
    return None if found is None or found.run_id is None else found


def refuse_one_twice(runs: Sequence[RunDir]) -> None:
    """Runs that are compared are different ones: one has no spread with itself, nor with a copy of its folder.

    Raises:
        InputError: with both names of the run that is named twice.
    """
    seen: dict[Path | Identity, RunDir] = {}
    for run_dir in runs:
        identity = identity_of(run_dir.path)
        folder = run_dir.path.resolve()
        for key, what in ((folder, "is"), (identity, "is a copy of")):
            if key is not None and (first := seen.setdefault(key, run_dir)) is not run_dir:
                named = "is named twice" if run_dir.path == first.path else f"{what} {first.path}, named before"
                raise InputError(Problem(str(run_dir.path), f"{named}; name two or more runs, each once"))


def saved_by(folder: Path) -> SavedBy | None:
    """For the manifest of what the run in `folder` saves now.

    Raises:
        OSError: as `identity_to_write`.
    """
    identity = identity_to_write(folder)
    return None if identity is None else SavedBy(str(identity.run_id), len(identity.resumed))


def write_of_run(run_dir: RunDir, file: Path, record: object) -> None:
    """`write_record` of one of a run's own records.

    Raises:
        OSError: it cannot be written, or as `identity_to_write`.
    """
    identity = identity_to_write(run_dir.path)
    write_record(file, record, None if identity is None else identity.run_id)


def read_of_run(run_dir: RunDir, file: Path, kind: type[Record]) -> Record | None:
    """`read_record` of one of a run's own records.

    Raises:
        RunError: it is another run's, or damaged.
    """
    if (said := foreign_record(run_dir, file)) is not None:
        raise RunError(Problem(str(file), said))
    return read_record(file, kind)


def foreign_record(run_dir: RunDir, file: Path) -> str | None:
    """Why a record in a run's folder is not the run's own, in words that follow its name; None where it is, and where
    that cannot be told."""
    identity = identity_of(run_dir.path)
    if identity is None or not file.is_file():
        return None
    try:
        found = run_id_in(file)
    except RunError:  # which its reader says
        return None
    if found == identity.run_id:
        return None
    return f"{of_another(found, identity)}: put the run's own back, or remove it"


def foreign_folder(run: Path, folder: Path) -> str | None:
    """Why a checkpoint or an adapter in the folder of a run is not the run's own, in words that follow its name."""
    identity = identity_of(run)
    manifest = manifest_in(folder)
    if identity is None or manifest is None:
        return None
    found = None if manifest.by is None else manifest.by.run_id
    if found in identity.own:
        return None
    way_out = f'write "by": {{"run_id": "{identity.run_id}", "part": 0}} into {folder / MANIFEST}'
    return f"{of_another(found, identity)} (if it is right as it is, {way_out}, and remove {CHECKSUM} from it)"


def manifest_in(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where it cannot be read, which is for who uses the folder to say."""
    try:
        return read_record(folder / MANIFEST, Manifest) if is_ours(folder) else None
    except RunError:
        return None


def of_another(found: str | None, identity: Identity) -> str:
    """The sentence's beginning."""
    if found is None:
        return f"does not say of which run it is, and this one, {_short(identity.run_id)}, has written that everywhere"
    return f"is of another run, {_short(found)}; this one is {_short(identity.run_id)}"


def _short(run_id: str | None) -> str:
    return str(run_id)[:8]
