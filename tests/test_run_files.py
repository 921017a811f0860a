"""The files of a run: what was written is what is read, whatever the figures; damage is one clear error."""

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qtune
from qtune.errors import RunError
from qtune.export.verification import (
    VERIFICATION,
    Answer,
    Closeness,
    GgufProof,
    Limits,
    Proof,
    Verification,
    add_gguf,
    mark_unverified,
    read_proof,
    write_verification,
)
from qtune.records import read_record, write_record
from qtune.run.folder import RunDir
from qtune.run.lock import Continued, Lock, LockedBase, LockedDevice, LockedSource, read_lock, write_lock
from qtune.run.memory import RunMemory, measured_memory, read_memory, write_memory
from qtune.run.metrics import (
    EvalRecord,
    NoteRecord,
    TrainRecord,
    append_metric,
    forget_after,
    has_evaluation,
    read_metrics,
)
from qtune.tuned.evaluation import Comparison, Evaluation, Score, read_evaluation

FEW = settings(max_examples=25, deadline=None)
"""Each example is written to the disk."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
COUNT = st.integers(0, 2**53)

WHERE = {"step": COUNT, "steps": COUNT, "epoch": NUMBER, "seconds": NUMBER, "loss": NUMBER, "accuracy": NUMBER}
METRICS = st.one_of(
    st.builds(
        TrainRecord,
        **WHERE,
        learning_rate=NUMBER,
        gradient_norm=NUMBER,
        tokens_per_second=NUMBER,
        memory_bytes=COUNT,
        memory_peak_bytes=COUNT,
        kind=st.just("train"),
    ),
    st.builds(EvalRecord, **WHERE, kind=st.just("eval")),
    st.builds(NoteRecord, message=TEXT, seconds=NUMBER, kind=st.just("note")),
)
DEVICES = st.builds(
    LockedDevice,
    TEXT,
    st.sampled_from(["cuda", "cpu", None]),
    st.none() | COUNT,
    st.none() | st.booleans(),
    st.none() | st.tuples(st.integers(0, 12), st.integers(0, 9)),
)
PACKAGES = st.dictionaries(TEXT, st.none() | TEXT, max_size=3)
LOCKS = st.builds(
    Lock,
    qtune=TEXT,
    python=TEXT,
    packages=PACKAGES,
    base=st.builds(LockedBase, TEXT, st.none() | TEXT, st.none() | TEXT),
    data=st.lists(st.builds(LockedSource, TEXT, TEXT), max_size=2).map(tuple),
    training_rows_blake2b=st.none() | TEXT,
    chat_template_sha256=st.none() | TEXT,
    seed=st.none() | COUNT,
    device=DEVICES,
    resumed=st.lists(st.builds(Continued, COUNT, TEXT, TEXT, PACKAGES, DEVICES), max_size=2).map(tuple),
)
JSON = st.dictionaries(
    TEXT, st.recursive(st.none() | st.booleans() | COUNT | TEXT, lambda inner: st.lists(inner, max_size=2)), max_size=3
)
MEMORIES = st.builds(
    RunMemory, *(st.none() | JSON for _ in range(4)), *(st.none() | st.lists(JSON, max_size=2).map(tuple),) * 2
)
SCORES = st.builds(Score, NUMBER, NUMBER, st.none() | NUMBER)
EVALUATIONS = st.builds(
    Evaluation,
    run=TEXT,
    source=TEXT,
    rows=COUNT,
    rows_held_out=COUNT,
    scored_tokens=COUNT,
    answers_cut=COUNT,
    base=SCORES,
    tuned=SCORES,
    comparisons=st.lists(st.builds(Comparison, *(TEXT,) * 5), max_size=2).map(tuple),
)
CLOSE = st.builds(Closeness, COUNT, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER)
FIGURES = st.builds(
    Verification,
    verified=st.booleans(),
    failures=st.lists(TEXT, max_size=2).map(tuple),
    weights=st.sampled_from(["dequantized", "original"]),
    rows=COUNT,
    rows_from=TEXT,
    exported=CLOSE,
    bare_base=CLOSE,
    cost=st.dictionaries(TEXT, CLOSE, max_size=2),
    limits=st.builds(Limits, NUMBER, NUMBER, TEXT),
    perplexity=st.dictionaries(TEXT, NUMBER, max_size=2),
    answers=st.lists(st.builds(Answer, TEXT, TEXT, TEXT), max_size=2).map(tuple),
    answers_equal=COUNT,
    compute_dtype=TEXT,
    streamed=st.booleans(),
    seconds=NUMBER,
)
GGUFS = st.builds(
    GgufProof, TEXT, st.sampled_from(["f16", "bf16", "q8_0"]), CLOSE, st.booleans(), st.lists(TEXT).map(tuple)
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return RunDir.create(tmp_path_factory.mktemp("runs"), "run", "")


def is_json(file: Path) -> None:
    """Python's reader takes NaN for JSON; others do not."""
    for line in file.read_text(encoding="utf-8").split("\n") if file.suffix == ".jsonl" else [file.read_text("utf-8")]:
        if line:
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def same(one: Any, other: Any) -> bool:
    """Equal, NaN equal to itself."""
    return type(one) is type(other) and repr(one) == repr(other)


# --- what was written is what is read ------------------------------------------------------------------------------


@FEW
@given(records=st.lists(METRICS, max_size=4))
def test_metrics_come_back_as_they_were_told(run_dir, records) -> None:
    run_dir.metrics_file.unlink(missing_ok=True)
    for record in records:
        append_metric(run_dir.metrics_file, record)
    assert same(read_metrics(run_dir.metrics_file), tuple(records))
    if records:
        is_json(run_dir.metrics_file)


@FEW
@given(lock=LOCKS)
def test_a_lock_comes_back(run_dir, lock) -> None:
    write_lock(run_dir, lock)
    assert read_lock(run_dir) == lock


@FEW
@given(memory=MEMORIES)
def test_the_memory_comes_back(run_dir, memory) -> None:
    write_memory(run_dir, memory)
    assert read_memory(run_dir) == memory


@FEW
@given(evaluation=EVALUATIONS)
def test_an_evaluation_comes_back(run_dir, evaluation) -> None:
    write_record(run_dir.eval_file, evaluation)
    assert same(read_evaluation(run_dir), evaluation)
    is_json(run_dir.eval_file)


@FEW
@given(figures=FIGURES, ggufs=st.lists(GGUFS, max_size=2))
def test_a_verification_comes_back_with_every_gguf_that_was_proven_before_or_after(run_dir, figures, ggufs) -> None:
    (run_dir.path / VERIFICATION).unlink(missing_ok=True)
    mark_unverified(run_dir.path, "not compared", "original")
    assert read_proof(run_dir.path) == Proof(False, ("not compared",), "original")
    for gguf in ggufs:
        add_gguf(run_dir.path, gguf)
    expected = {gguf.kind: gguf for gguf in ggufs}
    write_verification(run_dir.path, figures)
    proof = read_proof(run_dir.path)
    assert same(proof.figures, figures)
    assert same(proof.gguf, expected)
    assert (proof.verified, proof.failures, proof.weights) == (figures.verified, figures.failures, figures.weights)
    is_json(run_dir.path / VERIFICATION)
    # An export that cannot be loaded any more keeps what it was merged into, and the proof of its GGUF files.
    mark_unverified(run_dir.path, "cannot be loaded")
    proof = read_proof(run_dir.path)
    assert (proof.verified, proof.failures, proof.figures) == (False, ("cannot be loaded",), None)
    assert proof.weights == figures.weights
    assert same(proof.gguf, expected)


# --- older versions ------------------------------------------------------------------------------------------------


def test_an_older_version_wrote_null_for_what_is_no_number(run_dir) -> None:
    run_dir.metrics_file.write_text(
        '{"kind": "train", "step": 1, "steps": 2, "epoch": 0.5, "loss": null, "accuracy": 0.1, "learning_rate": 0.1, '
        '"gradient_norm": null, "tokens_per_second": 9.0, "memory_bytes": 1, "memory_peak_bytes": 2, "seconds": 1.5}\n'
        '{"kind": "note", "message": "stopping", "seconds": 2.5}\n'
        '{"kind": "eval", "step": 1, "steps": 2, "epoch": 0.5, "loss": 0.5, "accuracy": 0.5, "seconds": 3}\n'
    )
    train, note, evaluation = read_metrics(run_dir.metrics_file)
    assert isinstance(train, TrainRecord)
    assert math.isnan(train.loss)
    assert math.isnan(train.gradient_norm)
    assert note == NoteRecord("stopping", 2.5)
    assert evaluation == EvalRecord(1, 2, 0.5, 3.0, 0.5, 0.5)


def test_an_older_lock_knows_less_and_is_read_all_the_same(run_dir) -> None:
    run_dir.lock_file.write_text('{"qtune": "0.0.9", "device": {"name": "RTX 3060", "kind": "cuda"}, "extra": [1]}')
    lock = read_lock(run_dir)
    assert lock == Lock(qtune="0.0.9", device=LockedDevice("RTX 3060", "cuda"))


def test_an_older_verification_is_read_all_the_same(run_dir) -> None:
    file = run_dir.path / VERIFICATION
    file.write_text('{"verified": false, "failures": ["not compared with the trained model"]}\n')
    assert read_proof(run_dir.path) == Proof(False, ("not compared with the trained model",))
    file.unlink()
    assert read_proof(run_dir.path) == Proof(False, ())


# --- what is not there, or damaged ---------------------------------------------------------------------------------


def test_what_is_not_there_yet_is_none(tmp_path) -> None:
    run = RunDir.create(tmp_path, "begun", "")
    assert (read_lock(run), read_memory(run), read_evaluation(run), read_metrics(run.metrics_file)) == (
        None,
        None,
        None,
        (),
    )
    with pytest.raises(RunError) as caught:
        measured_memory(run)
    assert str(caught.value) == (
        f"{run.memory_file}: has no measurement: the run did not reach its end; what its recipe needs is traced with: "
        f"qtune profile {run.resolved_file}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "cannot be read: Lock: is [], not an object"),
        ('{"seed": "x"}', "cannot be read: seed: is 'x'"),
        ('{"data": [{"source": 3, "blake2b": "x"}]}', "cannot be read: data[0].source: is 3"),
        ('{"data": [{"source": "a"}]}', "cannot be read: data[0].blake2b: is missing"),
        ('{"device": {"kind": "tpu"}}', "cannot be read: device.kind: is 'tpu'"),
        ("\xff", "cannot be read: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_damaged_file_is_one_clear_error(run_dir, text, said) -> None:
    run_dir.lock_file.write_text(text, encoding="utf-8")
    with pytest.raises(RunError) as caught:
        read_lock(run_dir)
    assert str(caught.value) == f"{run_dir.lock_file}: {said}"


def test_a_damaged_line_is_named_by_its_number(run_dir) -> None:
    append_metric(run_dir.metrics_file, NoteRecord("one"))
    run_dir.metrics_file.write_text('{"kind": "note", "message": "one"}\n{"kind": "nte"}\n{"kind": "note"}\n')
    with pytest.raises(RunError) as caught:
        read_metrics(run_dir.metrics_file)
    told = f"{run_dir.metrics_file}:2: is no record of a run; remove the line, and after and crc32 from the next one"
    assert str(caught.value) == told


def test_a_run_that_goes_on_takes_the_later_steps_again(run_dir) -> None:
    run_dir.metrics_file.unlink(missing_ok=True)
    records = [EvalRecord(step, 9, 0.1, 1.0, 0.5, 0.5) for step in (1, 2, 3)]
    for record in (records[0], NoteRecord("kept"), *records[1:]):
        append_metric(run_dir.metrics_file, record)
    with run_dir.metrics_file.open("a") as stream:
        stream.write('{"kind": "eval", "step": 4, "ste')  # the process was killed here
    assert has_evaluation(run_dir.metrics_file, 3)
    forget_after(run_dir.metrics_file, 2)
    assert read_metrics(run_dir.metrics_file) == (records[0], NoteRecord("kept"), records[1])
    assert not has_evaluation(run_dir.metrics_file, 3)


def test_nobody_else_parses_the_files_of_a_run() -> None:
    """Their names stand in `run/folder.py`, their readers in `run/`, and verify.json's beside its writer."""
    package = Path(qtune.__file__).parent
    names = {"resolved_file", "lock_file", "metrics_file", "memory_file", "eval_file"}
    names_of_files = re.compile(r'"(resolved\.toml|lock\.json|metrics\.jsonl|memory\.json|eval\.json|verify\.json)"')
    found = []
    for file in package.rglob("*.py"):
        place = file.relative_to(package).as_posix()
        if place.startswith("run/") or place == "export/verification.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            # Only a path is handed on: nobody opens, reads or parses it.
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr in names:
                if node.attr in ("read_text", "read_bytes", "open"):
                    found.append(f"{place}:{node.lineno}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load", "tomllib.loads"):
                text = ast.unparse(node)
                if any(name in text for name in names) or names_of_files.search(text):
                    found.append(f"{place}:{node.lineno}")
    assert found == []


def test_a_record_of_another_kind_is_refused(tmp_path) -> None:
    write_record(tmp_path / "x.json", Score(0.5, 0.5, None))
    assert read_record(tmp_path / "x.json", Score) is not None
    with pytest.raises(RunError, match="run: is missing"):
        read_record(tmp_path / "x.json", Evaluation)
