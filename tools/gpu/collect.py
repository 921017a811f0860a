"""What the runs of this card measured, beside what was predicted: collect.py RUNS_FOLDER LOGS_FOLDER > FILE.json

RUNS_FOLDER: runs of runs.py. LOGS_FOLDER: NAME.trl files with the line that trl_script.py printed. One line a run goes
to stderr.
"""

import datetime
import importlib.metadata
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
BYTES = ("allocated_peak_bytes", "reserved_peak_bytes", "device_used_bytes", "tensor_peak_bytes")


def collect(runs: Path, logs: Path) -> dict[str, Any]:
    """The whole record: the card, the libraries, every run and script."""
    memory = [found for folder in sorted(runs.iterdir()) if (found := run_of(folder)) is not None]
    scripts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(logs.glob("*.trl"))]
    return {
        "card": memory[0]["device"] if memory else None,
        "date": datetime.date.today().isoformat(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "memory": memory,
        "scripts": scripts,
    }


def run_of(folder: Path) -> dict[str, Any] | None:
    """One run's measurement; None where there is none."""
    try:
        kept = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    measured, predicted = kept["measured"], kept.get("predicted") or {}
    phases = {name: {key: peaks[key] for key in BYTES if peaks.get(key)} for name, peaks in measured["phases"].items()}
    found = {
        "run": folder.name,
        "device": measured["device"],
        "largest_batch": measured["largest_batch"],
        "measured_by_phase": phases,
        "device_used_bytes": max(peaks.get("device_used_bytes", 0) for peaks in phases.values()),
        "at_peak": measured.get("at_peak"),
        "predicted_peak_bytes": (predicted.get("peak") or {}).get("bytes"),
        "predicted_needed_bytes": predicted.get("needed_bytes"),
        "predicted_by_phase": {name: at["bytes"] for name, at in predicted.get("by_phase", {}).items()},
        "predicted_batch": [predicted.get("micro_batch_size"), (predicted.get("longest") or {}).get("length")],
    }
    if times := step_seconds(folder / "metrics.jsonl"):
        found["seconds_per_step"] = round(statistics.median(times), 4)
    tell(found)
    return found


def step_seconds(file: Path) -> list[float]:
    """Seconds between the records of a run's steps, without the first two steps."""
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    at = [record["seconds"] for record in records if record["kind"] == "train"]
    return [after - before for before, after in itertools.pairwise(at[1:])]


def tell(found: dict[str, Any]) -> None:
    """One line: allocated against traced, used against needed."""
    phases = found["measured_by_phase"]
    allocated = max(peaks.get("allocated_peak_bytes", 0) for name, peaks in phases.items() if name != "load")
    traced, needed = found["predicted_peak_bytes"], found["predicted_needed_bytes"]
    parts = [f"{found['run']:20s} allocated {allocated / GIB:7.3f} GiB, used {found['device_used_bytes'] / GIB:7.3f}"]
    if traced and needed:
        parts.append(f"traced {traced / GIB:7.3f}, needed {needed / GIB:7.3f}")
    print("; ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    print(json.dumps(collect(Path(sys.argv[1]), Path(sys.argv[2])), indent=1))
