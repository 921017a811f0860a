"""The report: one page that shows what a run wrote, escapes all of it, needs nothing else, and works half way too."""

import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtune.data.prepare import prepare
from qtune.data.samples import pieces_of
from qtune.device.present import Device
from qtune.errors import RunError
from qtune.export.verification import Answer, Closeness, Limits, Verification, write_verification
from qtune.model.builtin import builtin_folder
from qtune.model.load import load_tokenizer
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model
from qtune.records import write_record
from qtune.report import style
from qtune.report.charts import Series, axis_texts, line_chart, thinned, ticks
from qtune.report.html import element, joined, table
from qtune.report.page import attempt_report, page, write_report
from qtune.report.record import read_record
from qtune.run.folder import RunDir
from qtune.run.lock import Continued, Lock, LockedDevice, rows_hash, write_lock
from qtune.run.memory import RunMemory, write_memory
from qtune.run.metrics import (
    AnswersRecord,
    EvalRecord,
    Metric,
    NoteRecord,
    SampleAnswer,
    TrainRecord,
    append_metric,
    seconds_of,
)
from qtune.run.resolved import resolved_text
from qtune.run.shown_rows import RowPiece, ShownRow, ShownRows, keep_rows
from qtune.training.shown_rows import rows_of
from qtune.tuned.asked import AskedTurn
from qtune.tuned.evaluation import Comparison, Evaluation, Score
from qtune.tuned.forgotten import Forgetting, PieceLoss

CPU = Device("cpu", "CPU, 2 threads", 16 << 30, 12 << 30, bf16=False)
ATTACK = "<script>alert('in')</script><img src=x onerror=alert(1)> & \"quotes\""
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page taken apart: its elements (each closed), attributes, and the texts inside each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.elements}

    @property
    def text(self) -> str:
        return " ".join(" ".join(texts) for name, texts in self.texts.items() if name != "style")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def rows_file(folder: Path, count: int = 30, odd: str = "Hi") -> Path:
    file = folder / "rows.jsonl"
    rows = [(f"Question {number}?", f"Answer {number}.") for number in range(count)]
    # Several, so that whatever is set aside for validation, one is trained on, and it is the longest.
    rows += [(f"{odd} {number}", f"{odd} " * 5) for number in range(3)]
    lines = (
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in rows
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def make_run(folder: Path, adapter: str = 'kind = "lora"', odd: str = "Hi") -> RunDir:
    """A run that has just begun: its recipe, its rows, nothing measured yet."""
    rows_file(folder, odd=odd)
    recipe = folder / "mine.toml"
    recipe.write_text(
        '# A recipe.\n[model]\nbase = "builtin:smollm2-135m-instruct"\n'
        f'[adapter]\n{adapter}\n[data]\ntrain = "rows.jsonl"\nvalidation = 0.2\nmax_length = 256\n'
    )
    resolved = load_recipe(recipe, ["training.batch_size=8"])
    run_dir = RunDir.create(folder / "runs", "mine", resolved.text)
    run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CPU)))
    return run_dir


def train_record(step: int, **others: float) -> TrainRecord:
    figures = {"loss": 2.0 / step, "accuracy": 0.5, "learning_rate": 1e-4, "gradient_norm": 1.0}
    memory = {"memory_bytes": 1 << 30, "memory_peak_bytes": 2 << 30, "tokens_per_second": 50.0, "seconds": float(step)}
    return TrainRecord(step=step, steps=10, epoch=0.1 * step, **{**figures, **memory, **others})


MEASURED = {
    "device": "cpu",
    "method": "tensor bytes by the ledger",
    "peak_bytes": 3 << 30,
    "phases": {
        "forward": {"visits": 2, "seconds": 1.5, "tensor_peak_bytes": 3 << 30, "resident_peak_bytes": 0},
        "eval": {"visits": 1, "seconds": 0.5, "tensor_peak_bytes": 0, "resident_peak_bytes": 0},
    },
    "static": {"adapter": 5 << 20},
    "at_peak": {"bytes": 3 << 30, "phase": "forward", "module": "loss", "op": "", "alive": {"activations": 2 << 30}},
}
EVALUATION = Evaluation(
    run="runs/mine",
    source="test rows",
    rows=2,
    rows_held_out=9,
    scored_tokens=12,
    answers_cut=0,
    base=Score(2.5, 0.5, 0.0),
    tuned=Score(0.5, 0.9, 0.5),
    comparisons=(
        Comparison("rows:1", "right one", "yes", "no", "yes"),
        Comparison("rows:2", "wrong one", "yes", "no", ATTACK),
    ),
)
PROOF = Verification(
    verified=False,
    failures=("same likeliest token at 52.00 % of positions",),
    weights="dequantized",
    rows=32,
    rows_from="test rows",
    exported=Closeness(90, 1.5, 3.0, 0.52, 9.0),
    bare_base=Closeness(90, 1.6, 3.0, 0.5, 9.0),
    cost={},
    limits=Limits(1e-4, 0.99, "float16"),
    perplexity={"trained": 1.5, "exported": 4.0, "bare base": 5.0},
    answers=(Answer("Hi", "Hello.", "Hm."),),
    answers_equal=0,
    compute_dtype="float32",
    streamed=False,
    seconds=1.0,
)


def tell(run_dir: RunDir, *records: Metric) -> None:
    """What a training process adds to the run's metrics."""
    for record in records:
        append_metric(run_dir.metrics_file, record)


def finish(run_dir: RunDir) -> None:
    """Everything that verbs write into a run."""
    validation = EvalRecord(step=10, steps=10, epoch=1.0, loss=0.75, accuracy=0.8, seconds=11.0)
    long = "a" * 300  # a word that is wider than any screen
    said = SampleAnswer("rows:7", f"What is {long}?", "yes", ATTACK)
    answers = (AnswersRecord(step, 10, 0.1 * step, 11.0, (said,)) for step in (5, 10))
    tell(run_dir, *map(train_record, range(1, 11)), NoteRecord("stopped and resumed", 10.0), validation, *answers)
    write_memory(run_dir, RunMemory(measured=MEASURED))
    write_record(run_dir.eval_file, EVALUATION)
    write_lock(run_dir, Lock(packages={"torch": "2.13.0"}, device=LockedDevice("CPU, 2 threads")))
    (run_dir.path / "model").mkdir()
    write_verification(run_dir.path / "model", PROOF)
    run_dir.adapter.mkdir()
    (run_dir.adapter / "adapter_config.json").write_text("{}")
    (run_dir.adapter / "adapter_model.safetensors").write_bytes(bytes(3 << 20))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDir:
    """A finished run with an attack in its rows, and its report."""
    run_dir = make_run(tmp_path_factory.mktemp("finished"), odd=ATTACK)
    finish(run_dir)
    assert write_report(run_dir) == run_dir.report
    return run_dir


@pytest.fixture(scope="module")
def drawn(finished) -> Page:
    return Page(finished.report.read_text(encoding="utf-8"))


def test_text_is_escaped_wherever_it_stands():
    assert element("p", ATTACK, title=ATTACK) == (
        '<p title="&lt;script&gt;alert(&#x27;in&#x27;)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; &amp; '
        '&quot;quotes&quot;">&lt;script&gt;alert(&#x27;in&#x27;)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; '
        "&amp; &quot;quotes&quot;</p>"
    )
    assert Page(table((ATTACK,), ((ATTACK,),))).names == {"div", "table", "thead", "tbody", "tr", "th", "td"}


def test_html_is_escaped_once_only_and_text_made_from_it_again():
    bold = element("b", "1 < 2")
    assert joined((bold, " & ", bold)) == "<b>1 &lt; 2</b> &amp; <b>1 &lt; 2</b>"
    assert element("i", bold.upper()) == "<i>&lt;B&gt;1 &amp;LT; 2&lt;/B&gt;</i>"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 2.5, [0, 0.5, 1, 1.5, 2, 2.5]),
        (0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
        (0, 75, [0, 20, 40, 60, 80]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_axes_have_round_numbers_that_enclose_the_data(low, high, expected):
    assert ticks(low, high) == expected


@pytest.mark.parametrize(
    ("values", "percent", "shown"),
    [
        ([0, 5e-05, 1e-04, 1.5e-04, 2e-04], False, ["0", "5.0e-05", "1.0e-04", "1.5e-04", "2.0e-04"]),
        ([0, 2e-06, 4e-06], False, ["0", "2e-06", "4e-06"]),
        ([0, 0.0002, 0.0004], False, ["0", "0.0002", "0.0004"]),
        ([0, 0.5, 1, 1.5], False, ["0", "0.5", "1.0", "1.5"]),
        ([0, 500, 1000, 1500], False, ["0", "500", "1,000", "1,500"]),
        ([0, 500_000, 1_000_000], False, ["0", "5e+05", "1e+06"]),
        ([0, 0.2, 0.4], True, ["0%", "20%", "40%"]),
        ([0, 0.005, 0.01], True, ["0%", "0.5%", "1.0%"]),
    ],
)
def test_an_axis_has_one_form_for_all_its_values(values, percent, shown):
    assert axis_texts(values, percent=percent) == shown


def test_a_chart_has_the_axis_of_its_values_whatever_the_form_of_a_point():
    rates = [(1.0, 1e-4), (2.0, 2e-4)]
    texts = [
        one.text for one in ElementTree.fromstring(line_chart("", [Series("", rates)], "{:.2g}".format)).iter("text")
    ]
    assert texts[:5] == ["0", "5.0e-05", "1.0e-04", "1.5e-04", "2.0e-04"]


def test_steps_have_whole_numbers():
    assert ticks(0, 3, whole=True) == [0, 1, 2, 3]


def test_a_long_series_is_drawn_as_means_that_end_where_it_ends():
    points = [(float(step), float(step % 2)) for step in range(1, 10_001)]
    short = thinned(points, 400)
    assert len(short) == 400
    assert short[-1][0] == 10_000
    assert {y for _, y in short} == {0.48, 0.52}


def test_a_chart_is_an_svg_with_a_point_for_each_value_and_none_for_nan():
    points = [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 1.0)]
    chart = line_chart("Loss", [Series("a", points), Series("b", [(4.0, 1.5)], style="marked")], str)
    figure = ElementTree.fromstring(chart)
    lines = [line.get("points") for line in figure.iter("polyline")]
    assert [len(line.split()) for line in lines] == [2, 1]
    assert [title.text for title in figure.iter("title")] == ["Loss", "b 1.5 at 4"]
    assert "nan" not in chart


def test_the_higher_value_is_higher_in_the_picture_and_zero_is_at_the_foot():
    chart = ElementTree.fromstring(line_chart("", [Series("", [(0.0, 0.0), (5.0, 3.0), (10.0, 4.0)])], str))
    (line,) = [line.get("points").split() for line in chart.iter("polyline")]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, place.split(","))) for place in line]
    assert (x2 - x1) == pytest.approx(x1 - x0)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(3 / 4)
    grid = [float(one.get("y1")) for one in chart.iter("line") if one.get("class") == "grid"]
    assert y0 == max(grid)


def test_there_is_no_chart_without_points():
    assert line_chart("Loss", [Series("training", []), Series("validation", [(1.0, math.nan)])], str) is None


def test_the_page_is_whole_and_has_no_scripts_and_nothing_from_elsewhere(finished, drawn):
    """Page() has already checked that every element is closed."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & drawn.names
    attributes = {name for _, given in drawn.elements for name in given}
    assert not {name for name in attributes if name.startswith("on")} | ({"src", "href", "action"} & attributes)
    assert not re.search(r"https?://|url\((?!#)|@import", finished.report.read_text(encoding="utf-8"))


def test_a_policy_forbids_whatever_might_slip_through(drawn):
    metas = [given for name, given in drawn.elements if name == "meta"]
    policy = next(given["content"] for given in metas if given.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_an_attack_in_a_row_or_in_an_answer_is_shown_as_the_text_it_is(drawn):
    assert any(ATTACK in shown for shown in drawn.texts["pre"])
    assert ATTACK in drawn.texts["td"]


def test_three_verdicts_stand_before_everything_and_the_others_below_them(finished, drawn):
    """Of this made-up run: no interval was kept, the memory was measured, the export was not proven."""
    text = finished.report.read_text(encoding="utf-8")
    body = text[text.index("<h1>") :]
    tiles = re.findall(r'<p class="answer">(.*?)</p>', body)
    assert tiles == ["? Not certain", "✓ Fits", "✗ Not proven"]
    places = [body.index(one) for one in ("Not proven", "Does it overfit?", "<dl", "<h2")]
    assert places == sorted(places)


def test_what_the_terminal_said_in_between_is_no_part_of_the_report(drawn):
    assert "stopped and resumed" not in drawn.text


@pytest.mark.parametrize(("size", "shown"), [(300, "300 B"), (40 << 10, "40.0 KiB"), (50 << 20, "50.0 MiB")])
def test_an_adapters_size_has_the_unit_that_fits_it(tmp_path, size, shown):
    run_dir = make_run(tmp_path)
    run_dir.adapter.mkdir()
    (run_dir.adapter / "adapter_model.safetensors").write_bytes(bytes(size))
    assert shown in Page(write_report(run_dir).read_text(encoding="utf-8")).texts["dd"]


def test_the_figures_that_one_looks_for_first_are_at_the_top(drawn):
    tiles = dict(zip(drawn.texts["dt"], drawn.texts["dd"], strict=True))
    assert tiles == {
        "state": "finished",
        "trained for": "0:11",
        "steps": "10 of 10",
        "training loss": "0.913 -> 0.258 (means of the first and the last 5 logged steps)",
        "validation loss": "0.750",
        "adapter": "3.0 MiB",
    }


def test_every_part_has_its_heading(drawn):
    assert drawn.texts["h2"] == [
        "Base against tuned",
        "Training",
        "What it answered while it trained",
        "Rows as the model sees them",
        "Memory",
        "Exported models",
        "What was decided, and by whom",
        "What it depended on",
    ]


def test_what_was_forgotten_stands_behind_the_evaluation(finished, tmp_path):
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    pieces = tuple(PieceLoss(100, 3.001 + 0.01 * number, 3.5015 + 0.011 * number) for number in range(16))
    write_record(copy.forgetting_file, Forgetting("a text", pieces))
    shown = Page(write_report(copy).read_text(encoding="utf-8"))
    assert shown.texts["h2"][:3] == ["Base against tuned", "What it has forgotten", "Training"]
    assert any("about none of the rows, 16 pieces and 1,600 scored tokens" in text for text in shown.texts["p"])
    cells = shown.texts["td"]
    at = [place for place, cell in enumerate(cells) if cell == "loss, nats per token"][1]
    assert cells[at + 1 : at + 3] == ["3.08", "3.58"]
    assert re.fullmatch(r"\+0\.508 \(\+0\.50\d to \+0\.51\d\)", cells[at + 3])


def test_wrong_answers_come_first(drawn):
    cells = drawn.texts["td"]
    assert cells.index("wrong one") < cells.index("right one")
    assert (cells[cells.index("wrong one") - 1], cells[cells.index("right one") - 1]) == ("✗", "✓")


def test_an_export_that_was_not_verified_says_so_and_why(drawn):
    assert "model: ✗ not verified" in drawn.texts["h3"]
    assert list(PROOF.failures) == drawn.texts["li"]


def test_an_exports_answers_are_shown_with_the_turns_before_them(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir.path / "model").mkdir()
    turns = tuple(AskedTurn(*one) for one in (("user", "Who?"), ("assistant", "Me."), ("user", "Why?")))
    write_verification(run_dir.path / "model", replace(PROOF, answers=(Answer("Why?", "So.", "Thus.", turns),)))
    shown = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "user: Who?\nassistant: Me.\nuser: Why?" in shown.texts["td"]


def test_every_resolved_value_is_there_with_its_origin(finished, drawn):
    values = tomllib.loads(finished.resolved_file.read_text())
    cells = drawn.texts["td"]
    for table_name, keys in values.items():
        for key, value in keys.items():
            at = cells.index(f"{table_name}.{key}")
            assert tomllib.loads(f"value = {cells[at + 1]}")["value"] == value
    assert cells[cells.index("training.batch_size") + 2] == "--set"
    assert cells[cells.index("data.max_length") + 2] == "recipe: mine.toml:9"
    assert cells[cells.index("adapter.dtype") + 2] == "rule: small updates are not rounded away"


def test_what_is_marked_is_what_was_trained(finished):
    tokenizer = load_tokenizer(Model(base=str(builtin_folder("smollm2-135m-instruct"))))
    resolved = load_recipe(finished.resolved_file)
    examples = prepare(resolved.recipe.data, tokenizer, resolved.folder, seed=42).examples
    shown = rows_of(finished)
    assert [row.title for row in shown.rows] == ["first row", "middle length", "longest", "held out for validation"]
    assert (shown.train_rows, shown.validation_rows) == (len(examples["train"]), len(examples["validation"]))
    first, longest = shown.rows[0], shown.rows[2]
    number = int(re.search(r"Question (\d+)", "".join(piece.text for piece in first.pieces))[1])
    assert [piece.text for piece in first.pieces if piece.scored] == [f"Answer {number}.<|im_end|>"]
    assert "".join(piece.text for piece in first.pieces) == tokenizer.decode(examples["train"][0]["input_ids"])
    assert ATTACK in "".join(piece.text for piece in longest.pieces if piece.scored)


def test_the_marks_of_the_page_are_the_scored_pieces(finished, drawn):
    scored = [piece.text for row in rows_of(finished).rows for piece in row.pieces if piece.scored]
    assert drawn.texts["mark"] == ["marked", *scored]


def test_pieces_keep_the_spaces_that_a_tokenizer_writes_into_its_tokens():
    vocabulary = {word: number for number, word in enumerate(["▁Say", "▁hello", "▁to", "▁me"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="▁Say"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    assert tokenizer.decode([2, 3]) == "to me"
    pieces = list(pieces_of([0, 1, 2, 3], [False, False, True, True], tokenizer))
    assert pieces == [("Say hello", False), (" to me", True)]


def test_virtual_tokens_are_spoken_of_because_they_cannot_be_shown(tmp_path):
    run_dir = make_run(tmp_path, adapter='kind = "p-tuning"\nvirtual_tokens = 7')
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert "Before each row the model also sees 7 virtual tokens" in text


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    begun = Page(write_report(make_run(tmp_path)).read_text(encoding="utf-8"))
    assert begun.texts["dd"][0].startswith("not finished")
    assert "No step has been taken yet." in begun.text
    assert begun.texts["h2"] == ["Training", "Rows as the model sees them", "What was decided, and by whom"]


def test_rows_that_are_gone_are_a_note_and_no_failure(tmp_path):
    run_dir = make_run(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert f"They cannot be shown: {run_dir.resolved_file}:" in text
    assert "no such file or folder" in text


@pytest.mark.slow
def test_rows_that_have_changed_since_are_not_passed_off_as_those_trained_on(tmp_path):
    run_dir = make_run(tmp_path)
    tokenizer = load_tokenizer(Model(base=str(builtin_folder("smollm2-135m-instruct"))))
    resolved = load_recipe(run_dir.resolved_file)
    prepared = prepare(resolved.recipe.data, tokenizer, resolved.folder, seed=resolved.recipe.training.seed)
    write_lock(run_dir, Lock(training_rows_blake2b=rows_hash(prepared)))
    assert "The files have changed since" not in write_report(run_dir).read_text(encoding="utf-8")
    rows_file(tmp_path, odd="Something else")
    assert "The files have changed since" in write_report(run_dir).read_text(encoding="utf-8")


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    run_dir = make_run(tmp_path)
    tell(run_dir, train_record(1), train_record(2))
    run_dir.metrics_file.write_text(run_dir.metrics_file.read_text()[:-60])
    record = read_record(run_dir)
    assert [one.step for one in record.facts.train] == [1]
    assert "step 1 of 10" in page(record, "not asked for")


def test_the_time_of_every_part_of_a_resumed_run_counts():
    assert seconds_of(tuple(NoteRecord("", seconds) for seconds in (1, 5, 2, 4))) == 9
    assert seconds_of(()) == 0


ODD = [math.nan, math.inf, -math.inf]


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("key", ["loss", "gradient_norm", "accuracy", "learning_rate"])
def test_a_figure_that_is_no_number_is_no_obstacle(tmp_path, key, odd):
    """fp16 with loss scaling has an infinite norm in each step that the scaler skips."""
    run_dir = make_run(tmp_path)
    tell(run_dir, train_record(1), train_record(2, **{key: odd}))
    shown = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert any("no number" in text for text in shown.texts["dd"]) == (key == "loss")


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_a_validation_that_is_no_number_is_not_the_best_one(tmp_path, odd):
    run_dir = make_run(tmp_path)
    where = {"steps": 10, "epoch": 0.5, "seconds": 1.0, "accuracy": 0.5}
    losses = {5: abs(odd), 6: 0.5, 7: 0.75}
    tell(run_dir, *(EvalRecord(step=step, loss=loss, **where) for step, loss in losses.items()))
    assert "0.500 at step 6" in Page(write_report(run_dir).read_text(encoding="utf-8")).texts["dd"]


def test_the_pages_validation_loss_is_of_the_rows_that_training_has_not_seen(tmp_path):
    run_dir = make_run(tmp_path)
    where = {"steps": 10, "epoch": 0.5, "seconds": 1.0, "accuracy": 0.5, "group_tokens": (10,) * 5, "left_out": 2}
    losses = {5: (0.7, 0.5), 10: (0.6, 0.9)}
    tell(run_dir, train_record(1))
    tell(
        run_dir,
        *(EvalRecord(step=step, loss=all_, group_losses=(rest,) * 5, **where) for step, (all_, rest) in losses.items()),
    )
    shown = Page(write_report(run_dir).read_text(encoding="utf-8"))
    figures = dict(zip(shown.texts["dt"], shown.texts["dd"], strict=True))
    assert figures["validation loss"] == "0.900 (2 validation rows left out, for training saw their prompts)"
    assert figures["best validation loss"] == "0.500 at step 5"
    assert {"validation, rows not seen", "validation, all rows"} <= set(shown.texts["span"])
    assert "validation, rows not seen 0.9 at 10" in shown.texts["title"]


def test_the_peak_so_far_does_not_fall_where_a_run_was_resumed(tmp_path):
    run_dir = make_run(tmp_path)
    tell(run_dir, *(train_record(step, memory_peak_bytes=peak << 30) for step, peak in enumerate((2, 4, 1, 3), 1)))
    figures = re.findall(r"<figure>.*?</figure>", write_report(run_dir).read_text(encoding="utf-8"))
    (peaks,) = [re.search(r'points="([^"]*)" class="dashed"', one) for one in figures if "peak so far" in one]
    heights = [float(place.split(",")[1]) for place in peaks[1].split()]
    assert heights[0] > heights[1] == heights[2] == heights[3]


def test_the_page_says_of_how_many_parts_the_figures_of_memory_are(tmp_path):
    run_dir = make_run(tmp_path)
    finish(run_dir)
    write_lock(run_dir, Lock(resumed=(Continued(3, "0.1.0", "3.11", {}, LockedDevice("CPU, 2 threads")),)))
    assert "The run was trained in 2 parts, and 1 of them has left figures" in write_report(run_dir).read_text("utf-8")


def test_the_metrics_of_an_older_version_are_drawn_too(tmp_path):
    """It wrote null for what is no number."""
    run_dir = make_run(tmp_path)
    tell(run_dir, train_record(1))
    written = json.loads(run_dir.metrics_file.read_text()) | {"gradient_norm": None}
    del written["crc32"]
    run_dir.metrics_file.write_text("".join(json.dumps(written) + "\n" for _ in range(2)))
    assert "step 1 of 10" in write_report(run_dir).read_text(encoding="utf-8")


@pytest.mark.parametrize("skipped", [False, True])
def test_steps_that_stand_out_are_marked_in_both_charts_and_named_in_their_legends(tmp_path, skipped):
    run_dir = make_run(tmp_path)
    for step in range(1, 1001):  # more than a chart has room for: the line is of means, the mark where the step was
        outlier = "the loss 90 is 9.0 standard deviations above" if step == 501 else None
        left_out = skipped and outlier is not None
        tell(run_dir, train_record(step, loss=90.0 if outlier else 2.0, outlier=outlier, skipped=left_out))
    page = write_report(run_dir).read_text(encoding="utf-8")
    name = "stands out, 6 σ above the last 128" + ", and is skipped" * skipped
    assert page.count(f"</svg>{name}</span>") == 2
    assert f"<title>{name}: 90 at 501</title>" in page
    assert f"<title>{name}: 1 at 501</title>" in page
    assert page.count('class="cross"') == 4


def test_a_run_without_such_a_step_has_no_such_legend(tmp_path):
    run_dir = make_run(tmp_path)
    tell(run_dir, train_record(1))
    tell(run_dir, train_record(2))
    assert "stands out" not in write_report(run_dir).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["eval.json", "forgetting.json", "lock.json", "memory.json", "metrics.jsonl", "model/verify.json"]
)
@pytest.mark.parametrize(
    "damage",
    ["{", "[1]", '{"rows": "many", "exported": 1, "measured": 7, "seed": "x"}', "\x00\n", "[" * 100_000],
    ids=["cut", "a list", "other types", "no text", "a nest"],
)
def test_a_damaged_file_of_the_run_is_named(tmp_path, name, damage):
    run_dir = make_run(tmp_path)
    file = run_dir.path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(damage + "\n")
    with pytest.raises(RunError, match=rf"^{re.escape(str(file))}:") as caught:
        write_report(run_dir)
    assert len(str(caught.value).splitlines()) == 1


def test_a_report_that_fails_does_not_fail_the_run_that_it_is_of(tmp_path, capsys, monkeypatch):
    run_dir = make_run(tmp_path)

    def fails(_):
        raise TypeError("unsupported format string\nand more")

    monkeypatch.setattr("qtune.report.page.read_record", fails)
    attempt_report(run_dir)
    said = f"the report was not written (unsupported format string); try again with: qtune report {run_dir.path}\n"
    assert capsys.readouterr().err == said
    assert not run_dir.report.exists()


def test_a_new_report_replaces_the_old_one_whole(finished, tmp_path):
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    copy.report.write_text("old")
    before = set(copy.path.iterdir())
    write_report(copy)
    assert copy.report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert set(copy.path.iterdir()) == before


@pytest.mark.slow
def test_the_command_says_where_the_page_is(tmp_path):
    run_dir = make_run(tmp_path)
    command = [sys.executable, "-m", "qtune", "report"]
    done = subprocess.run([*command, str(run_dir.path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{run_dir.report}\n")
    assert run_dir.report.is_file()
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"error: {tmp_path / 'none'}: no such folder")


def test_the_page_says_which_state_the_adapter_is(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    finish(run_dir)
    tell(run_dir, NoteRecord("the adapter is that of step 4", 12.0, adapter_step=4))
    assert "3.0 MiB, the state of step 4" in write_report(run_dir).read_text(encoding="utf-8")


def test_on_paper_no_cell_of_answers_or_values_has_a_least_width_but_the_steps() -> None:
    printed = style.STYLE[style.STYLE.index("@media print") :]
    rules = dict(re.findall(r"^ *([^{}@]+?) \{ ([^{}]*) \}$", printed, re.MULTILINE))
    assert "min-width: 0" in rules["td, .answers td, .values td"]
    assert "min-width: 6rem" in rules[".steps td:first-child"]


def test_a_report_with_nothing_to_trace_or_tokenize_waits_for_no_library(tmp_path):
    run_dir = make_run(tmp_path)
    tell(run_dir, train_record(1), train_record(2))
    write_lock(run_dir, Lock())
    keep_rows(
        run_dir,
        ShownRows((ShownRow("first row", "rows.jsonl:1", 3, 1, (RowPiece("kept apart", True),)),), 7, 0, 0, "chatml"),
    )
    (tmp_path / "rows.jsonl").unlink()
    script = (
        "import sys\nfrom pathlib import Path\nfrom typer.testing import CliRunner\nfrom qtune import cli\n"
        f"done = CliRunner().invoke(cli.app, ['report', {str(run_dir.path)!r}])\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "print(done.exit_code, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n", done.stderr
    page = Page(run_dir.report.read_text(encoding="utf-8"))
    assert page.texts["mark"] == ["marked", "kept apart"]
    assert "7 rows to train on" in page.text
