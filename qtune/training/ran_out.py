"""Memory ran out: seen at that moment, explained, and kept with what was measured."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from qtune import console
from qtune.device.present import is_out_of_memory
from qtune.device.processes import other_holders
from qtune.disk import refusal_of
from qtune.errors import Failure, OutOfMemory, RunError, first_line
from qtune.memory.longest import longest_of
from qtune.memory.measured.meter import Meter
from qtune.memory.measured.out_of_memory import Report, first_report, with_offers
from qtune.run.checkpoints import usable_checkpoints
from qtune.run.folder import RunDir
from qtune.run.memory import RunMemory, read_memory, write_memory
from qtune.training.inputs import Inputs


def explained(failure: Failure, inputs: Inputs, run_dir: RunDir) -> Report:
    """The report of a run whose memory ran out, kept in memory.json before and after what would have fit is traced."""
    gc.collect()
    others = None
    if inputs.plan.device.kind == "cuda":
        torch.cuda.empty_cache()
        others = other_holders(str(torch.cuda.get_device_properties(0).uuid))
    saved = usable_checkpoints(run_dir.checkpoints)
    name = saved[-1].name if saved else None
    plan = inputs.plan
    if plan.keep_dequantized and failure.phase in ("forward", "backward", "eval"):
        plan = plan.with_dequantized_kept(False, "given up when memory ran out")  # before anything else (`trainer.py`)
    report = first_report(failure, inputs.recipe, plan, run_dir, name, others)
    kept = read_memory(run_dir) or RunMemory()
    _keep(run_dir, replace(kept, failure=report.to_json()))
    with console.progress("memory ran out; tracing what would have fit (Ctrl-C leaves it out)") as bar:
        rows = longest_of(inputs.prepared, inputs.recipe.data)
        report = with_offers(
            report, inputs.recipe, plan, rows, run_dir, lambda words: bar.update(bar.done + 1, description=words)
        )
    _keep(run_dir, replace(kept, failure=report.to_json()))
    return report


@contextmanager
def seeing_out_of_memory(meter: Meter) -> Iterator[None]:
    """Looks at what is alive as soon as memory has run out, wherever no micro-batch can be split.

    Raises:
        OutOfMemory: with what was seen.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) and error.failure is not None:
            raise
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error), meter.failure(error.__cause__ or error)) from error


@contextmanager
def measured(meter: Meter, inputs: Inputs, run_dir: RunDir) -> Iterator[None]:
    """Keeps what was predicted and measured, however training ends."""
    try:
        yield
    finally:
        measured = meter.result()
        meter.close()
        if meter.snapshot.said:
            console.say(f"allocator snapshot: {meter.snapshot.said}")
        predicted = inputs.forecast.to_json() if inputs.forecast else None
        _keep(run_dir, RunMemory(predicted, measured, earlier=_earlier(run_dir)))


def _earlier(run_dir: RunDir) -> tuple[dict[str, Any], ...] | None:
    """What was measured of the run before it was resumed; None where nothing was, or where that cannot be read."""
    try:
        kept = read_memory(run_dir)
    except RunError:
        return None
    parts = () if kept is None else kept.parts
    return tuple({name: part[name] for name in ("device", "phases") if name in part} for part in parts) or None


def _keep(run_dir: RunDir, memory: RunMemory) -> None:
    """Writes memory.json where that is possible: neither the end of a run nor its reason is lost for these figures."""
    try:
        if run_dir.path.is_dir():  # a folder that somebody has removed does not come back for them
            write_memory(run_dir, memory)
    except OSError as error:
        console.say(f"{run_dir.memory_file} was not written: {refusal_of(error) or first_line(error)}")
