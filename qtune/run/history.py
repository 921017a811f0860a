"""Everything that a run has told, none of it missing."""

from pathlib import Path

from qtune.errors import RunError
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.identity import Identity, identity_of, manifest_in, new_run_id
from qtune.run.metrics import Metric, first_run_id, read_metrics, require_records_of


def history_of(run_dir: RunDir) -> tuple[Metric, ...]:
    """Every record of a run so far: at least those that were there when it ended, or was last saved.

    Raises:
        RunError: metrics.jsonl is damaged or another run's, or records are missing; or the adapter is another run's.
    """
    file, identity = run_dir.metrics_file, identity_of(run_dir.path)
    records = read_metrics(file)
    # Records are on the disk before what is saved with them is sealed, and are taken away again only where a run goes
    # on from an earlier step, which its lock has first. Where older versions have gone on from is not known.
    if identity is None or not _is_left(run_dir.adapter, identity):
        require_records_of(file, len(records), run_dir.adapter)
    checkpoints = [] if identity is None else complete_checkpoints(run_dir.checkpoints)
    for checkpoint in reversed(checkpoints):
        if identity is not None and _is_own(checkpoint, identity) and not _is_left(checkpoint, identity):
            require_records_of(file, len(records), checkpoint)
            break
    return records


def said_of_records(run_dir: RunDir) -> str | None:
    """What is wrong with a run's records, for whoever needs none of them and goes on; None where they are whole."""
    try:
        history_of(run_dir)
    except RunError as error:
        return str(error)
    return None


def _is_own(folder: Path, identity: Identity) -> bool:
    """Whether a checkpoint says that the run has saved it; what to do with others is for a resumption to say."""
    manifest = manifest_in(folder)
    return manifest is not None and manifest.by is not None and manifest.by.run_id in identity.own


def _is_left(folder: Path, identity: Identity) -> bool:
    """Whether the run has gone on from before a checkpoint, or the adapter, since that was saved."""
    manifest = manifest_in(folder)
    return manifest is not None and manifest.by is not None and identity.has_left(manifest.by, manifest.step)


def identity_to_begin_with(run_dir: RunDir) -> tuple[str | None, tuple[str, ...]]:
    """(run_id, ancestors) for the lock of a run that has none yet.

    A run that has lost its lock is who its files say; None where those are of an older version.
    """
    folders = (run_dir.adapter, *reversed(complete_checkpoints(run_dir.checkpoints)))
    saved = [manifest for folder in folders if (manifest := manifest_in(folder)) is not None]
    begun = first_run_id(run_dir.metrics_file)
    if saved:
        run_id = None if saved[0].by is None else saved[0].by.run_id
    elif run_dir.metrics_file.is_file() and run_dir.metrics_file.stat().st_size:
        run_id = begun
    else:
        run_id = new_run_id()
    return run_id, () if begun in (None, run_id) else (begun,)
