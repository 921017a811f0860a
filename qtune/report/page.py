"""The page itself: all parts in one file, with a policy that forbids it to load or run anything."""

import logging
from collections.abc import Sequence
from pathlib import Path

from qtune import console
from qtune.errors import InputError, QtuneError, first_line
from qtune.memory.profile import is_traced, read_run
from qtune.report import results, sections
from qtune.report.html import Html, element, joined
from qtune.report.memory import memory
from qtune.report.record import Record, read_record
from qtune.report.rows import ShownRows, rows_of
from qtune.run.drift import said_of
from qtune.run.folder import RunDir
from qtune.run.owner import owner_of
from qtune.startup.quiet import quiet_loading

log = logging.getLogger(__name__)

# The second wall behind escaping: even if a row's text became markup, a browser would neither run nor fetch it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6570; --faint: #d9dee4; --paper: #fff; --sheet: #f5f7f9;
  --one: #1f5fbf; --two: #b4460f; --mark: #ffe58a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa5b1; --faint: #353c45; --paper: #14171b;
  --sheet: #1d2127; --one: #7fb0ff; --two: #ffab70; --mark: #5b4a00; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 74rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } p { margin: .4rem 0; max-width: 60rem; }
.dim, figcaption span, dt, th { color: var(--dim); } .note { border-left: 4px solid var(--two); padding-left: .7rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--sheet); border: 1px solid var(--faint); border-radius: 6px; padding: .4rem .8rem; }
dt { font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
figure { margin: .6rem 0; } figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
figure > svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--dim); }
svg .grid { stroke: var(--faint); } svg .solid, svg .dashed, svg .marked { fill: none; stroke-width: 1.8; }
svg .solid { stroke: var(--one); } svg .dashed { stroke: var(--dim); stroke-dasharray: 2 3; }
svg .marked { stroke: var(--two); stroke-dasharray: 6 4; } svg .dot { fill: var(--two); }
svg.key { width: 30px; height: 12px; margin-right: .3rem; } .bar svg { width: 100%; height: 12px; display: block; }
.name { white-space: nowrap; } .bar { width: 100%; min-width: 8rem; } svg rect { fill: var(--one); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--faint); }
th { font-weight: 400; } .figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 1rem; max-width: 22rem; }
pre { background: var(--sheet); border: 1px solid var(--faint); border-radius: 6px; padding: .7rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 28rem; overflow-y: auto; font-size: .85rem; }
mark { background: var(--mark); color: inherit; font-weight: 600; border-bottom: 1.5px solid; }
code { font-size: .9em; overflow-wrap: anywhere; } details { margin: .6rem 0; } summary { cursor: pointer; }
@media print { pre { max-height: none; } body { max-width: none; } }
"""


def trace_memory(run_dir: RunDir) -> None:
    """Adds to the run's memory.json what is not there yet: the predicted step, the usual ways, each technique.

    A trace that fails, or a base model that is gone, is said and stops no report.
    """
    if is_traced(run_dir):
        return
    quiet_loading()
    try:
        with console.progress("tracing the run's step, the usual ways of training and the step without each technique"):
            read_run(run_dir, explain=True)
    except Exception as error:
        log.debug("the run's memory could not be traced", exc_info=True)
        reason = str(error) if isinstance(error, QtuneError) else f"{type(error).__name__}: {error}"
        console.say(f"memory is not predicted: {reason}")


def attempt_report(run_dir: RunDir) -> None:
    """`write_report` after something that has succeeded, which a report that fails must not turn into a failure."""
    try:
        write_report(run_dir)
    except Exception as error:
        log.debug("the report could not be written", exc_info=True)
        console.say(f"the report was not written ({first_line(error)}); try again with: qtune report {run_dir.path}")


def write_report(run_dir: RunDir) -> Path:
    """Writes RUN/report.html, finished run or not, and returns its path.

    Raises:
        RunError: the run's files cannot be read.
    """
    quiet_loading()
    record = read_record(run_dir)
    rows: ShownRows | str
    try:
        rows = rows_of(run_dir, record.lock.training_rows_blake2b if record.lock else None)
    except InputError as error:
        rows = str(error)
    owner = owner_of(run_dir)
    busy = [] if owner is None else [f"belongs to {owner}; this page has what it had written until then"]
    run_dir.write_text(run_dir.report, page(record, rows, [*busy, *said_of(run_dir)]))
    return run_dir.report


def page(record: Record, rows: ShownRows | str, drifts: Sequence[str] = ()) -> Html:
    """The whole page; `rows` may be the reason why there are none to show. `drifts` are sentences of `run.drift`."""
    name = record.run_dir.name
    what = f"{record.value('adapter', 'kind')} on {record.value('model', 'base')}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{name}: {what}"),
        element("style", Html(STYLE)),
    )
    device = record.lock.last_device.name if record.lock else ""
    where = f"{record.value('quantization', 'kind')} base, computed in {record.value('quantization', 'compute_dtype')}"
    body = element(
        "body",
        element("h1", name),
        element("p", f"{what}; {where}{f', on {device}' if device else ''}", class_="dim"),
        *(sections.note(f"This run {said}") for said in drifts),
        sections.summary(record),
        *_parts(record, rows),
    )
    return joined([Html("<!doctype html>\n"), element("html", head, body, lang="en"), "\n"])


def _parts(record: Record, rows: ShownRows | str) -> list[Html]:
    parts = []
    if record.evaluation:
        parts.append(results.evaluation(record.evaluation))
    parts.append(sections.curves(record))
    if isinstance(rows, str):
        parts.append(sections.section("Rows as the model sees them", sections.note(f"They cannot be shown: {rows}")))
    else:
        parts.append(sections.training_rows(rows))
    if record.memory:
        parts.append(memory(record.memory, str(record.run_dir.path)))
    if record.exports:
        parts.append(results.exports(record.exports))
    parts.append(sections.values(record))
    if record.lock:
        parts.append(sections.versions(record.lock))
    return parts
