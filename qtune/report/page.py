"""The page itself: all parts in one file, with a policy that forbids it to load or run anything."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qtune import console
from qtune.disk import told
from qtune.errors import InputError, QtuneError, RunError, WorkError, first_line
from qtune.export.verification import VERIFICATION
from qtune.report import results, sections
from qtune.report.answers import answers
from qtune.report.html import Html, element, joined
from qtune.report.memory import memory
from qtune.report.over_time import answers_over_time
from qtune.report.record import Record, read_record
from qtune.report.style import STYLE
from qtune.run.drift import said_of
from qtune.run.folder import RunDir
from qtune.run.memory import measured_memory
from qtune.run.owner import owner_of
from qtune.run.shown_rows import ShownRows, kept_rows
from qtune.startup.imports import import_libraries
from qtune.startup.quiet import quiet_loading
from qtune.verdicts.of_run import verdicts

log = logging.getLogger(__name__)

# The second wall behind escaping: even if a row's text became markup, a browser would neither run nor fetch it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def trace_memory(run_dir: RunDir) -> None:
    """Adds to the run's memory.json what is not there yet: the predicted step and the usual ways of training.

    A trace that fails, or a base model that is gone, is said and stops no report.
    """
    try:
        if measured_memory(run_dir).is_traced:
            return
    except RunError:  # there is no measurement to compare with
        return
    import_libraries(console.waiting)
    from qtune.memory.profile import is_traced, trace_run  # seconds, for which what is traced already need not wait

    if is_traced(run_dir):
        return
    quiet_loading()
    try:
        with console.progress("tracing the run's step and the usual ways of training") as bar:
            trace_run(run_dir, tell=bar.tell)
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
        again = ["qtune", "report", str(run_dir.path)]
        console.say(f"the report was not written ({first_line(error)}); try again with: {shlex.join(again)}")


@contextmanager
def renewed_reports(*run_dirs: RunDir) -> Iterator[None]:
    """What the block adds to the records of runs stands on their pages as well, where they have one; also what a block
    that fails has added before, as an export that is kept unproven. A page that cannot be written is said."""
    before = [_records(run_dir) for run_dir in run_dirs]
    try:
        yield
    finally:
        for run_dir, known in zip(run_dirs, before, strict=True):
            if run_dir.report.is_file() and _records(run_dir) != known:
                attempt_report(run_dir)


def _records(run_dir: RunDir) -> dict[Path, tuple[int, int]]:
    """The records of a run as they are: each is written anew, as another file."""
    found: dict[Path, tuple[int, int]] = {}
    for file in (*run_dir.path.glob("*.json*"), *run_dir.path.glob(f"*/{VERIFICATION}")):
        with suppress(OSError):  # gone meanwhile
            told_of = file.stat()
            found[file] = told_of.st_ino, told_of.st_mtime_ns
    return found


def write_report(run_dir: RunDir) -> Path:
    """Writes RUN/report.html, finished run or not, and returns its path.

    Raises:
        RunError: the run's files cannot be read. WorkError: the page cannot be written.
    """
    record = read_record(run_dir)
    rows: ShownRows | str
    try:
        rows = kept_rows(run_dir) or _rows_now(run_dir, record)
    except InputError as error:
        rows = str(error)
    owner = owner_of(run_dir)
    busy = [] if owner is None else [f"belongs to {owner}; this page has what it had written until then"]
    with told(WorkError):
        run_dir.write_text(run_dir.report, page(record, rows, [*busy, *said_of(run_dir)]))
    return run_dir.report


def _rows_now(run_dir: RunDir, record: Record) -> ShownRows:
    """Of a run that has kept no rows."""
    import_libraries(console.waiting)
    from qtune.training.shown_rows import rows_of  # seconds of libraries and, at times, of tokenizing

    quiet_loading()
    return rows_of(run_dir, record.facts.lock.training_rows_blake2b if record.facts.lock else None)


def page(record: Record, rows: ShownRows | str, drifts: Sequence[str] = ()) -> Html:
    """The whole page; `rows` may be the reason why there are none to show. `drifts` are sentences of `run.drift`."""
    name = record.run_dir.name
    what = f"{record.value('adapter', 'kind')} on {record.value('model', 'base')}"
    device = record.facts.lock.last_device.name if record.facts.lock else ""
    where = f"{record.value('quantization', 'kind')} base, computed in {record.value('quantization', 'compute_dtype')}"
    return document(
        f"{name}: {what}",
        element("h1", name),
        element("p", f"{what}; {where}{f', on {device}' if device else ''}", class_="dim"),
        *(sections.note(f"This run {said}") for said in drifts),
        *answers(verdicts(record.facts)),
        sections.summary(record),
        *_parts(record, rows),
    )


def document(title: str, *parts: Html) -> Html:
    """A page of these parts that loads and runs nothing."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    return joined([Html("<!doctype html>\n"), element("html", head, element("body", *parts), lang="en"), "\n"])


def _parts(record: Record, rows: ShownRows | str) -> list[Html]:
    parts, facts = [], record.facts
    if facts.evaluation:
        parts.append(results.evaluation(facts.evaluation))
    if facts.forgetting:
        parts.append(results.forgetting(facts.forgetting))
    if facts.tasks:
        parts.append(results.tasks(facts.tasks))
    parts.append(sections.curves(record))
    if record.answers:
        parts.append(answers_over_time(record.answers))
    if isinstance(rows, str):
        parts.append(sections.section("Rows as the model sees them", sections.note(f"They cannot be shown: {rows}")))
    else:
        parts.append(sections.training_rows(rows))
    if facts.memory:
        settled = record.value("training", "gradient_checkpointing"), record.value("memory", "keep_dequantized")
        resumed = len(facts.lock.resumed) if facts.lock else 0
        parts.append(memory(facts.memory, shlex.quote(str(record.run_dir.path)), *settled, resumed))
    if facts.exports:
        parts.append(results.exports(facts.exports))
    parts.append(sections.values(record))
    if facts.lock:
        parts.append(sections.versions(facts.lock))
    return parts
