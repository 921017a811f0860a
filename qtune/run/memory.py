"""memory.json: what was predicted of a run's memory, measured in it, and traced for it afterwards."""

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from qtune.errors import Problem, RunError
from qtune.run.folder import RunDir
from qtune.run.identity import read_of_run, write_of_run


@dataclass(frozen=True)
class RunMemory:
    """The file's sections, each the JSON of the value that made it; sizes in bytes, and no float that is none."""

    predicted: dict[str, Any] | None = None
    """`memory.forecast.Forecast`: before the run, where something was decided by it."""
    measured: dict[str, Any] | None = None
    """`memory.measured.meter.Meter.result`."""
    failure: dict[str, Any] | None = None
    """`memory.measured.out_of_memory.Report`, where memory ran out."""
    traced: dict[str, Any] | None = None
    """`memory.predict.Prediction` of the largest batch that was measured."""
    ways: tuple[dict[str, Any], ...] | None = None
    """`memory.savings.Variant`: the usual ways of training the same model on that batch."""
    attribution: tuple[dict[str, Any], ...] | None = None
    """The step without each technique."""
    earlier: tuple[dict[str, Any], ...] | None = None
    """Of a run that was resumed: what `measured` was of the parts before the last, the first one first, without what
    is of single steps. A part that was killed has left none."""

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """What was measured of each part of the run, in their order."""
        return (*(self.earlier or ()), *(() if self.measured is None else (self.measured,)))

    @property
    def parts_on_last_device(self) -> tuple[dict[str, Any], ...]:
        """Those of which the peaks can be compared: a run may have gone on on another device."""
        device = (self.measured or {}).get("device")
        return tuple(part for part in self.parts if part.get("device") == device)

    @property
    def is_traced(self) -> bool:
        """Whether nothing is left to trace for a report; what each technique saves is traced where it is asked for."""
        return self.traced is not None and self.ways is not None

    def figures(self) -> dict[str, Any]:
        """For other programs: without what is there for pictures."""
        known = asdict(self)
        for part in ("predicted", "traced"):
            if known[part] is not None:
                known[part] = {name: value for name, value in known[part].items() if name not in PICTURED}
        return known


PICTURED = ("phases", "timeline")
"""Of a prediction what is long and drawn."""


def write_memory(run_dir: RunDir, memory: RunMemory) -> None:
    """Writes RUN/memory.json."""
    write_of_run(run_dir, run_dir.memory_file, memory)


def read_memory(run_dir: RunDir) -> RunMemory | None:
    """RUN/memory.json; None where the run was killed before it was written.

    Raises:
        RunError: it is damaged, or another run's.
    """
    return read_of_run(run_dir, run_dir.memory_file, RunMemory)


def measured_memory(run_dir: RunDir) -> RunMemory:
    """RUN/memory.json with a measurement in it.

    Raises:
        RunError: there is none, or the file is damaged.
    """
    memory = read_memory(run_dir)
    if memory is None or memory.measured is None or "device" not in memory.measured:
        other = shlex.join(["qtune", "profile", str(run_dir.resolved_file)])
        message = f"has no measurement: the run did not reach its end; what its recipe needs is traced with: {other}"
        raise RunError(Problem(str(run_dir.memory_file), message))
    return memory
