"""Compare traced memory with published measurements.

    python tools/validate_memory.py [RECORDS.json | RUN/memory.json] [--json] [--only ID,ID] [--length TOKENS]

Each record is built as that run was: its model, precision, adapter, loss, optimizer and what was measured, with what
the versions of the libraries it names held in memory. Records that cannot be built are listed with the reason. No
constant here is fitted to a measurement.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from memory_record import GIB, Build, CannotBuildError, build_of, measured_gib  # noqa: E402
from old_transformers import as_in  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.memory.profile import trace_run  # noqa: E402
from qtune.memory.tracing import categories  # noqa: E402
from qtune.memory.tracing.bare_model import bare_model  # noqa: E402
from qtune.memory.tracing.caching_allocator import FixedSegments  # noqa: E402
from qtune.memory.tracing.cuda import TODAYS_CARD, workspace_bytes  # noqa: E402
from qtune.memory.tracing.reserved import STEPS, reserved_bytes  # noqa: E402
from qtune.memory.tracing.trace import lives, trace  # noqa: E402
from qtune.run.folder import RunDir  # noqa: E402


@dataclass(frozen=True)
class Result:
    """One line of the comparison."""

    id: str
    predicted: float | None
    """GiB"""
    measured: float | None
    """GiB"""
    exact: bool
    """Whether the length of the measured batch is known, and not only an upper bound of it."""
    skipped: str | None = None
    where: str = ""
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """Relative, signed: +0.02 is 2 % too much."""
        return None if self.predicted is None or not self.measured else self.predicted / self.measured - 1


def require_same_parameters(record: dict[str, Any], build: Build) -> None:
    """A model of another size than the measured one would be compared with nothing.

    Raises:
        CannotBuildError: the record's parameter counts are not those of the model that its fields describe.
    """
    size = (record.get("geometry") or {}).get("params")
    if size:
        found = sum(p.numel() for p in bare_model(build.config, build.dtype, None, "eager").parameters())
        if abs(found / size - 1) > (0.001 if size % 10**6 else 0.1):  # 7e9 is a name, 7241732096 a count
            raise CannotBuildError(f"the geometry makes {found:,} parameters, the record says {size:,}")
    size = record.get("trainable_params")
    if size:
        found = sum(p.numel() for p in build.model(build.config).parameters() if p.requires_grad)
        if abs(found / size - 1) > (0.001 if size % 10**5 else 0.1):
            raise CannotBuildError(f"the adapter makes {found:,} trainable parameters, the record says {size:,}")


def predict(record: dict[str, Any]) -> tuple[float, str]:
    """Predicted GiB of the record's measured quantity, and where in the step that is."""
    build = build_of(record)
    with as_in(build.version, build.config, build.attention):
        require_same_parameters(record, build)
        if build.quantity == "peak reserved":  # no figure of tensors, but of what the allocator has taken for them
            return reserved(build) / GIB, "the allocator, played"
        traced = trace(build.config, build.model, build.step)
    history = traced.history
    match build.quantity:
        case "after forward":
            moment = history.last()
        case "peak":
            moment = history.peak()
        case "after backward":  # the gradients are there, and nothing of the step any more
            last = max(tick for tick, label in enumerate(history.labels) if label.phase == "backward")
            moment = history.at(last)
        case "after load":
            alive = history.at(0).alive
            return (sum(alive.values()) - alive.get(categories.ADAPTER, 0)) / GIB, "at rest"
        case "after step":
            state = history.peak("optimizer").alive.get(categories.OPTIMIZER, 0)
            return (history.at(0).bytes + state) / GIB, "at rest"
    return moment.bytes / GIB, f"{moment.phase} {moment.module}".strip()


def reserved(build: Build) -> int:
    """Bytes that the allocator takes for the first two steps, of ordinary batches, and one of the largest batch."""
    largest = lives(build.config, build.model, build.step)
    steps = [largest] * STEPS
    if build.mean_length is not None:
        ordinary = replace(build.step, batch=replace(build.step.batch, length=build.mean_length))
        steps[:2] = [lives(build.config, build.model, ordinary)] * 2
    return reserved_bytes(steps, workspace_bytes(TODAYS_CARD), FixedSegments(), empties_cache=build.empties_cache)


def compare(record: dict[str, Any]) -> Result:
    """Traces one record; whatever stops it is the reason why it is skipped."""
    began = time.perf_counter()
    name, exact = str(record.get("id")), bool(record.get("sequence_length_exact"))
    measured: float | None = None
    try:
        measured = measured_gib(record)
        if measured is None:
            raise CannotBuildError("no measured value in a unit of bytes")
        predicted, where = predict(record)
    except CannotBuildError as reason:
        return Result(name, None, measured, exact, str(reason))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Result(name, None, measured, exact, f"{type(error).__name__}: {lines[0][:200]}")
    return Result(name, predicted, measured, exact, None, where, time.perf_counter() - began)


def of_run(folder: Path) -> list[Result]:
    """A run's own measurement as a record: each phase beside the trace of the largest batch that was measured."""
    run = trace_run(RunDir.open(folder), savings=False)
    if run.prediction is None:
        return [Result(folder.name, None, None, False, "its device is not known here")]
    is_card = run.measured["device"] != "cpu"
    inside = run.prediction.need.workspace_bytes if is_card else 0
    results = []
    for phase, expected in run.prediction.by_phase.items():
        peaks = run.measured["phases"].get(phase, {})
        counted = peaks.get("allocated_peak_bytes" if is_card else "tensor_peak_bytes", 0) - inside
        if counted > 0:
            name = f"{folder.name} {phase}"
            results.append(Result(name, expected.bytes / GIB, counted / GIB, True, None, expected.module))
    return results


def read(file: Path, only: str) -> list[dict[str, Any]]:
    """The records of a file, or those that `only` names; a message and exit 2 where there are none."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file}: not a JSON list of records: {error}") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) and r.get("id") for r in records):
        raise SystemExit(f'{file}: a list of objects, each with an "id", is wanted')
    wanted = list(filter(None, (name.strip() for name in only.split(","))))
    known = {record["id"] for record in records}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"--only: {file} has no record {', '.join(unknown)}. It has: {', '.join(sorted(known))}")
    return [record for record in records if not wanted or record["id"] in wanted]


def line(result: Result) -> str:
    if result.skipped is not None:
        return f"{result.id:60s} skipped: {result.skipped}"
    note = "" if result.exact else "  (length is an upper bound)"
    error = "" if result.error is None else f"{100 * result.error:+6.1f} %"
    return (
        f"{result.id:60s} predicted {result.predicted:7.3f}  measured {result.measured or 0:7.3f} GiB {error}"
        f"  {result.seconds:3.0f} s  {result.where}{note}"
    )


def as_json(result: Result) -> dict[str, Any]:
    return {
        "id": result.id,
        "predicted_gib": result.predicted,
        "measured_gib": result.measured,
        "error": result.error,
        "skipped": result.skipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="?", type=Path, default=ROOT / "tools" / "memory_records.json")
    parser.add_argument("--json", action="store_true", help="print a list of results as JSON")
    parser.add_argument("--only", default="", help="comma-separated ids")
    parser.add_argument("--length", type=int, help="of the longest batch, where a record has only an upper bound of it")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    results = []
    if arguments.records.name == "memory.json":
        results = of_run(arguments.records.parent)
        if not arguments.json:
            print("\n".join(map(line, results)))
    else:
        for record in read(arguments.records, arguments.only):
            if arguments.length and not record.get("sequence_length_exact"):
                record["sequence_length"] = arguments.length
            results.append(compare(record))
            if not arguments.json:
                print(line(results[-1]), flush=True)
    if arguments.json:
        print(json.dumps([as_json(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
