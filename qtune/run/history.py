"""Everything that a run has told, none of it missing."""

from qtune.run.folder import RunDir
from qtune.run.metrics import Metric, read_metrics, require_records_of


def history_of(run_dir: RunDir) -> tuple[Metric, ...]:
    """Every record of a run so far; of one that has ended, at least those that were there when it did.

    Raises:
        RunError: metrics.jsonl is damaged, or records are missing.
    """
    require_records_of(run_dir.metrics_file, run_dir.adapter)
    return read_metrics(run_dir.metrics_file)
