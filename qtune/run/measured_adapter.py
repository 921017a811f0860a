"""What was measured of a run's adapter and kept beside it: figures of another adapter are none of this run's."""

from pathlib import Path
from typing import Protocol, TypeVar

from qtune import console
from qtune.errors import RunError
from qtune.manifest import NAME, Manifest, is_ours
from qtune.records import read_record
from qtune.run.folder import RunDir
from qtune.run.identity import foreign_record

WEIGHTS = "adapter_model.safetensors"


class OfAdapter(Protocol):
    """A record of figures."""

    @property
    def adapter(self) -> str | None:
        """As `adapter_name` was when they were measured; None: an older version did not say."""


Figures = TypeVar("Figures", bound=OfAdapter)


def adapter_name(run_dir: RunDir) -> str | None:
    """Which adapter a run has: the start of its weights' SHA-256, as its manifest says; None where that does not."""
    try:
        manifest = read_record(run_dir.adapter / NAME, Manifest) if is_ours(run_dir.adapter) else None
    except RunError:  # which whoever uses the adapter says
        return None
    saved = None if manifest is None else manifest.files.get(WEIGHTS)
    return None if saved is None else saved.sha256[:16]


def read_figures(run_dir: RunDir, file: Path, kind: type[Figures]) -> Figures | None:
    """The figures in a file of the run; None where there are none, or those of another adapter or run, which is said.

    Raises:
        RunError: the file is damaged.
    """
    if (said := foreign_record(run_dir, file)) is not None:
        console.say(f"{file} is left out: it {said}")
        return None
    found, name = read_record(file, kind), adapter_name(run_dir)
    if found is not None and None not in (found.adapter, name) and found.adapter != name:
        console.say(f"{file} is left out: it was measured of another adapter than the one that is here")
        return None
    return found
