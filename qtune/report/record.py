"""A run's folder -> what its report shows. Whatever is not there yet is None: a run may be reported while it trains."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Table as TomlTable

from qtune.run.folder import RunDir

Json = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """One key of resolved.toml: its value as TOML writes it, and where it came from."""

    table: str
    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class Record:
    """Everything a run has written so far; `train`, `validation` and `notes` are the records of metrics.jsonl."""

    run_dir: RunDir
    values: tuple[Value, ...]
    train: tuple[Json, ...]
    validation: tuple[Json, ...]
    notes: tuple[Json, ...]
    seconds: float
    memory: Json | None
    evaluation: Json | None
    lock: Json | None
    exports: tuple[tuple[str, Json], ...]
    """Name of each exported folder inside the run, and its verify.json."""

    @property
    def adapter_bytes(self) -> int | None:
        """Size of the adapter's files as peft loads them."""
        files = [file for file in self.run_dir.adapter.glob("adapter_model*") if file.is_file()]
        return sum(file.stat().st_size for file in files) if files else None

    def value(self, table: str, key: str) -> str | None:
        """A resolved value without the quotes of TOML."""
        found = next((one.value for one in self.values if (one.table, one.key) == (table, key)), None)
        return None if found is None else found.strip('"')


def read_record(run_dir: RunDir) -> Record:
    """Reads the files of a run.

    Raises:
        RunError: one of its JSON files is broken.
    """
    metrics = read_metrics(run_dir.metrics_file)
    folders = sorted(file.parent for file in run_dir.path.glob("*/verify.json"))

    def optional(file: Path) -> Json | None:
        found: Json | None = run_dir.read_json(file) if file.is_file() else None
        return found

    return Record(
        run_dir=run_dir,
        values=tuple(read_values(run_dir.resolved_file.read_text(encoding="utf-8"))),
        train=tuple(one for one in metrics if one.get("kind") == "train"),
        validation=tuple(one for one in metrics if one.get("kind") == "eval"),
        notes=tuple(one for one in metrics if one.get("kind") == "note"),
        seconds=seconds_of(metrics),
        memory=optional(run_dir.memory_file),
        evaluation=optional(run_dir.eval_file),
        lock=optional(run_dir.lock_file),
        exports=tuple((folder.name, run_dir.read_json(folder / "verify.json")) for folder in folders),
    )


def read_metrics(file: Path) -> list[Json]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def read_values(resolved: str) -> list[Value]:
    """The keys of resolved.toml in their order, with the comments that say where each came from."""
    values = []
    for table, keys in tomlkit.parse(resolved).items():
        assert isinstance(keys, TomlTable), table
        # The body, not items(), which hands out plain booleans without their comments.
        for key, item in keys.value.body:
            if key is not None:
                values.append(Value(table, key.key, item.as_string(), item.trivia.comment.lstrip("# ")))
    return values


def seconds_of(metrics: list[Json]) -> float:
    """How long training took, the parts before a resumption included: each part counts its seconds from 0."""
    total = last = 0.0
    for record in metrics:
        now = float(record.get("seconds", last))
        if now < last:
            total += last
        last = now
    return total + last
