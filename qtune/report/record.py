"""A run's folder -> what its report shows. Whatever is not there yet is None: a run may be reported while it trains."""

from dataclasses import dataclass

from qtune.run.folder import RunDir
from qtune.run.history import history_of
from qtune.run.metrics import AnswersRecord, seconds_of
from qtune.run.resolved import WrittenValue, read_values
from qtune.verdicts.facts import Facts, read_facts


@dataclass(frozen=True)
class Record:
    """Everything a run has written so far."""

    run_dir: RunDir
    values: tuple[WrittenValue, ...]
    seconds: float
    """Of training, all parts together."""
    facts: Facts
    """What it has come to; the verdicts are made of it."""
    answers: tuple[AnswersRecord, ...] = ()
    """What it said to the sampled rows while it trained."""

    @property
    def adapter_bytes(self) -> int | None:
        """Size of the adapter's files as peft loads them."""
        files = [file for file in self.run_dir.adapter.glob("adapter_model*") if file.is_file()]
        return sum(file.stat().st_size for file in files) if files else None

    def value(self, table: str, key: str) -> str | None:
        """A resolved value without the quotes of TOML."""
        return next((one.plain_text for one in self.values if one.path == (table, key)), None)


def read_record(run_dir: RunDir) -> Record:
    """Reads the files of a run.

    Raises:
        RunError: one of them is damaged.
    """
    metrics = history_of(run_dir)
    return Record(
        run_dir=run_dir,
        values=read_values(run_dir),
        seconds=seconds_of(metrics),
        facts=read_facts(run_dir),
        answers=tuple(one for one in metrics if isinstance(one, AnswersRecord)),
    )
