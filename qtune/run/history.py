"""Everything that a run has told, none of it missing."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qtune.errors import Problem, RunError
from qtune.records import CHECKSUM, RUN_ID, run_id_in
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.identity import Identity, identity_of, manifest_in, new_run_id, of_another
from qtune.run.metrics import Metric, first_run_id, read_metrics, require_records_of


def history_of(run_dir: RunDir) -> tuple[Metric, ...]:
    """Every record of a run so far: at least those that were there when it ended, or was last saved.

    Raises:
        RunError: metrics.jsonl is damaged or another run's, or records are missing; or the adapter is another run's.
    """
    require_own_lock(run_dir)
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


def require_own_lock(run_dir: RunDir) -> None:
    """The lock is not another run's: then everything else would seem to be. Nor is it an earlier one of this run.

    Raises:
        RunError: several files of the run say that they are of one run, and none that it is the lock's; or one was
            saved in a part of the run that the lock does not know.
    """
    identity = identity_of(run_dir.path)
    if identity is None:
        return
    told = [run_id for run_id in _told(run_dir) if run_id is not None]
    if len(told) > 1 and len(set(told)) == 1 and told[0] not in identity.own:
        message = f"{of_another(identity.run_id, replace(identity, run_id=told[0]))}: put the run's own back"
        raise RunError(Problem(str(run_dir.lock_file), message))
    for folder in _saved(run_dir):
        manifest = manifest_in(folder)
        by = None if manifest is None else manifest.by
        if by is not None and by.run_id in identity.own and by.part > len(identity.resumed):
            known = f"knows of {len(identity.resumed)} resumptions, and {folder} was saved after {by.part}"
            message = f"is an earlier one of this run: it {known}; put the later one back"
            way_out = f"if it is right as it is, remove {RUN_ID} and {CHECKSUM} from it"
            raise RunError(Problem(str(run_dir.lock_file), f"{message}; {way_out}"))


def _saved(run_dir: RunDir) -> tuple[Path, ...]:
    """What was saved last."""
    return (run_dir.adapter, *complete_checkpoints(run_dir.checkpoints)[-1:])


def _told(run_dir: RunDir) -> Iterator[str | None]:
    """Of which run the other files say that they are."""
    yield first_run_id(run_dir.metrics_file)
    for folder in _saved(run_dir):
        manifest = manifest_in(folder)
        yield None if manifest is None or manifest.by is None else manifest.by.run_id
    for file in (run_dir.memory_file, run_dir.rows_file):
        with suppress(RunError):
            yield run_id_in(file)


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
