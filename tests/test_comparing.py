"""Runs beside each other: seeds of one recipe are one line, intervals cover rows and seeds, all on the same rows."""

import csv
import importlib
import json
import shutil
import tracemalloc
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from export_models import tiny_run
from typer.testing import CliRunner

from qtune.cli import app
from qtune.comparing.bootstrap import drawn, weighted_mean
from qtune.comparing.runs import ComparedRun, compared_runs
from qtune.comparing.table import ANSWERS_CHANGE, cells, compare, explanation
from qtune.errors import InputError
from qtune.report.comparison import comparison_page
from qtune.run.folder import RunDir
from qtune.run.identity import refuse_one_twice
from qtune.run.metrics import TrainRecord, append_metric
from qtune.run.resolved import resolved_recipe
from qtune.tuned.evaluate import evaluate
from qtune.tuned.free_text import TextScore
from qtune.verdicts.interval import paired_fall
from qtune.verdicts.scores import score_table

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PLAIN = 'kind = "none"\ncompute_dtype = "float32"'


# --- intervals -----------------------------------------------------------------------------------------------------


def test_an_interval_over_rows_is_the_normal_one_of_their_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    found = drawn([values], [1.0] * 400, 0).interval()
    error = values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_a_difference_on_the_same_rows_leaves_out_how_hard_they_are() -> None:
    random = np.random.default_rng(2)
    hard = random.normal(2.0, 2.0, 200)
    one, other = hard + random.normal(0.3, 0.1, 200), hard
    weights = [int(count) for count in random.integers(1, 30, 200)]
    change = drawn([one], weights, 1).less(drawn([other], weights, 0))
    normal = paired_fall(list(one), list(other), weights)
    assert normal is not None
    assert change.is_clear
    assert (change.low, change.high) == pytest.approx((normal.low, normal.high), abs=0.005)


def test_seeds_that_differ_more_than_rows_make_the_interval_wide() -> None:
    rows = np.random.default_rng(3).normal(0.0, 0.1, 100)
    alike = drawn([rows, rows, rows], [1.0] * 100, 0).interval()
    apart = drawn([rows - 1, rows, rows + 1], [1.0] * 100, 0).interval()
    assert apart.mean == pytest.approx(alike.mean)
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


@pytest.mark.parametrize("runs", [1, 3])
def test_answers_that_are_all_right_leave_open_what_so_many_rows_do(runs: int) -> None:
    """Of 120, 3.03 % may be wrong: scipy.stats.binomtest(120, 120).proportion_ci() begins at 0.9697."""
    all_right, all_wrong = (
        drawn([[value] * 120] * runs, [1.0] * 120, salt, are_answers=True) for value, salt in ((1.0, 0), (0.0, 1))
    )
    low = 0.9697
    assert (all_right.interval().low, all_right.interval().high) == pytest.approx((low, 1.0), abs=5e-5)
    assert (all_wrong.interval().low, all_wrong.interval().high) == pytest.approx((0.0, 1 - low), abs=5e-5)
    same = all_right.less(all_right)
    assert (same.low, same.high) == pytest.approx((low - 1, 1 - low), abs=5e-5)
    assert not same.is_clear
    worse = all_wrong.less(all_right)
    assert (worse.low, worse.high) == pytest.approx((-1.0, -low), abs=5e-5)
    losses = drawn([[2.0] * 120], [1.0] * 120, 0).interval()
    assert (losses.low, losses.high) == (2.0, 2.0)


def test_many_rows_are_drawn_in_the_same_memory_and_to_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = np.random.default_rng(1).normal(size=(2, 60)).tolist(), [1.0, 3.0] * 30
    whole = drawn(values, weights, 0)
    monkeypatch.setattr("qtune.comparing.bootstrap.NUMBERS_AT_ONCE", 60 * 7)
    np.testing.assert_allclose(drawn(values, weights, 0).draws, whole.draws, rtol=1e-12)
    monkeypatch.undo()
    assert whole.mean == pytest.approx(np.mean([weighted_mean(one, weights) for one in values]))
    tracemalloc.start()
    try:
        drawn([[0.0, 1.0] * 10_000], [1.0] * 20_000, 0)
        assert tracemalloc.get_traced_memory()[1] < 200e6, "all draws at once are 640 MB"
    finally:
        tracemalloc.stop()


def test_few_rows_have_no_interval() -> None:
    assert drawn([[1.0, 0.0, 1.0]], [1.0] * 3, 0).interval().low is None


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A LoRA, the same with another seed, and a soft prompt on the same base and rows."""
    root = tmp_path_factory.mktemp("compared")
    first = tiny_run(root, quantization=PLAIN)
    second = RunDir(root / "second")
    shutil.copytree(first.path, second.path)
    for run, seed in ((first, 1), (second, 2)):
        text = run.resolved_file.read_text().replace("[training]\n", f"[training]\nseed = {seed}\n")
        text = text.replace("[data]\n", "[data]\nvalidation_seed = 42\n")
        run.resolved_file.write_text(text)
    soft = tiny_run(tmp_path_factory.mktemp("other"), 'kind = "prompt-tuning"\nvirtual_tokens = 3', quantization=PLAIN)
    for run in (first, second, soft):
        (run.path / "metrics.jsonl").touch()
    for step, loss in enumerate((3.0, 1.25), 1):
        taken = TrainRecord(step, 2, step / 2, step, loss, 0.5, 1e-4, 1.0, 100.0, 1, 1)
        append_metric(soft.metrics_file, taken)
    return [first.path, second.path, soft.path]


@pytest.fixture
def enough(folders: list[Path]) -> list[Path]:
    return folders


@pytest.mark.slow
def test_runs_that_differ_by_their_seed_are_one_line_and_others_are_compared_with_the_first(enough: list[Path]) -> None:
    found = compare(compared_runs(enough, rows=8))
    assert [(line.adapter, line.seeds) for line in found.lines] == [("lora", (1, 2)), ("prompt-tuning", (42,))]
    lora, soft = found.lines
    assert lora.loss.change is None
    assert soft.loss.change is not None
    assert soft.loss.change.mean == pytest.approx(soft.loss.interval.mean - lora.loss.interval.mean)
    assert lora.loss.deviation == 0.0, "a copy has the same losses"
    assert soft.parameters == 3 * 64
    assert (lora.training_losses, soft.training_losses) == ((None, None), (1.25,))
    assert "training loss at the end, as each run says it: run 1.25" in explanation(found)


@pytest.mark.slow
def test_a_line_of_several_runs_names_their_seeds_and_only_several_lines_differ_from_the_first(
    enough: list[Path], tmp_path: Path
) -> None:
    named = [tmp_path / "mine-seed1", tmp_path / "mine-seed2"]
    for run, name in zip(enough[:2], named, strict=True):
        shutil.copytree(run, name)
    runs = compared_runs([*named, enough[2]], rows=8)
    one, several = compare(runs[:2]), compare(runs)
    assert [line.name for line in several.lines] == ["mine, seeds 1 and 2", enough[2].name]
    head, rows = cells(one)
    assert not [name for name in head if "the first" in name]
    assert "loss against the first" in cells(several)[0]
    assert all(len(row) == len(head) for row in rows)
    assert "~" not in "".join(explanation(one))
    assert "<h1>1 configuration, 2 runs</h1>" in comparison_page(one)
    other = compare([replace(runs[0], run="first"), runs[1]])
    assert [line.name for line in other.lines] == ["first and mine-seed2"]


@pytest.mark.slow
def test_what_was_measured_is_kept_and_asked_again_only_where_rows_differ(
    enough: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared_runs(enough, rows=8)
    monkeypatch.setattr("qtune.comparing.runs.evaluate", lambda *args, **kwargs: pytest.fail("asked again"))
    compared_runs(enough, rows=8)
    assert [run.evaluation.rows for run in compared_runs(enough)] == [8, 8, 8], "as many as were asked"
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        compared_runs(enough, rows=3)


def test_a_run_that_is_named_twice_is_refused_however_it_is_spelled(
    enough: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*runs: Path | str) -> str:
        result = CliRunner().invoke(app, ["compare", *map(str, runs)])
        with pytest.raises(InputError) as refused:
            raise result.exception
        return str(refused.value)

    first, second, _ = enough
    assert said(first, second, first) == f"{first}: is named twice; name two or more runs, each once"
    monkeypatch.chdir(first.parent)
    link = tmp_path / "link"
    link.symlink_to(first)
    for other in (first.name, link, f"{second}/../{first.name}"):
        assert said(first, other) == f"{other}: is {first}, named before; name two or more runs, each once"


def test_a_copy_of_a_run_is_no_second_run_but_one_that_went_on_from_it_is(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("first", "copy", "gone-on")]
    parts = ([], [], [{"from_step": 3}])
    for run_dir, resumed in zip(runs, parts, strict=True):
        run_dir.path.mkdir()
        run_dir.lock_file.write_text(json.dumps({"run_id": "a" * 32, "resumed": resumed}))
    refuse_one_twice([runs[0], runs[2]])
    with pytest.raises(InputError, match=r"copy: is a copy of .*first, named before"):
        refuse_one_twice(runs)


@pytest.fixture
def copied(enough: list[Path], tmp_path: Path) -> Path:
    """A copy of the first run, evaluated on eight of its rows."""
    compared_runs(enough, rows=8)
    copy = tmp_path / "copy"
    shutil.copytree(enough[0], copy)
    return copy


def with_evaluation(run: Path, **changes) -> None:
    kept = json.loads((run / "eval.json").read_text())
    kept.pop("crc32", None)
    (run / "eval.json").write_text(json.dumps(kept | changes))


@pytest.mark.slow
def test_a_base_is_asked_the_same_once_for_all_runs_on_it(
    enough: list[Path], copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of each run are those that it has alone."""
    alone = [evaluate(RunDir(run), rows=5).to_json() for run in (copied, enough[1])]
    for run in (copied, enough[1]):
        (run / "eval.json").unlink()
    (copied / "forgetting.json").unlink(missing_ok=True)
    (enough[1] / "forgetting.json").unlink(missing_ok=True)
    asked = []
    for module in ("evaluate", "forgetting"):
        original = importlib.import_module(f"qtune.tuned.{module}").row_losses

        def counted(model, *rest, module=module, original=original):
            asked.append((module, hasattr(model, "peft_config")))
            return original(model, *rest)

        monkeypatch.setattr(f"qtune.tuned.{module}.row_losses", counted)
    capsys.readouterr()
    found = compared_runs([copied, enough[1]], rows=5)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("base model", "tuned model"))]
    base = resolved_recipe(RunDir(copied)).model.base
    assert [line for line in said if not line.endswith("%")] == [
        f"base model of {copied}, 5 rows to score, 5 to answer …",
        f"tuned model of {copied}, 5 rows to score, 5 to answer …",
        "base model, text about none of the rows …",
        f"tuned model, what {copied} has forgotten …",
        f"base model: {base} was asked the same before",
        f"tuned model of {enough[1]}, 5 rows to score, 5 to answer …",
        f"base model: {base} was asked the same before",
        f"tuned model, what {enough[1]} has forgotten …",
    ]
    assert sorted(asked) == sorted(
        [(module, tuned) for module in ("evaluate", "forgetting") for tuned in (False, True, True)]
    )
    assert [run.evaluation.base for run in found] == [found[0].evaluation.base] * 2
    assert [run.evaluation.to_json() for run in found] == alone


@pytest.mark.slow
def test_an_evaluation_of_another_files_rows_is_not_taken_for_the_recipes_own(enough: list[Path], copied: Path) -> None:
    with_evaluation(copied, source="some/other.jsonl", rows=2)
    found = compared_runs([copied, enough[1]])
    own = json.loads((enough[1] / "eval.json").read_text())["source"]
    assert [run.evaluation.source for run in found] == [own, own]
    assert [run.evaluation.rows for run in found] == [8, 8], "as many as the first was asked of its own rows"
    assert json.loads((copied / "eval.json").read_text())["source"] == own


def test_runs_that_spent_memory_and_spoke_otherwise_differ_by_chance_alone(enough: list[Path], copied: Path) -> None:
    resolved = RunDir(copied).resolved_file
    text = resolved.read_text()
    for table, line in (
        ("training", "lean_step = false"), ("training", "log_every = 7"), ("training", "sample_answers = 3"),
        ("training", "keep_checkpoints = 2"), ("training", "gradient_checkpointing = 1"),
        ("memory", 'activations = "host"'), ("memory", 'loss_tile = "32MiB"'),
    ):  # fmt: skip
        key = line.partition(" ")[0]
        kept = [one for one in text.splitlines() if not one.startswith(f"{key} =")]
        if f"[{table}]" not in kept:
            kept.append(f"[{table}]")
        kept.insert(kept.index(f"[{table}]") + 1, line)
        text = "\n".join(kept) + "\n"
    resolved.write_text(text)
    found = compare(compared_runs([enough[0], copied], rows=8))
    assert [len(line.runs) for line in found.lines] == [2]


def test_held_out_rows_that_are_drawn_by_the_seed_and_by_a_key_are_one_setting(
    enough: list[Path], copied: Path
) -> None:
    """Without data.validation_seed it is training.seed: the same rows, said twice."""
    resolved = RunDir(copied).resolved_file
    assert "validation_seed = 42" in resolved.read_text()
    resolved.write_text(resolved.read_text().replace("validation_seed = 42\n", "").replace("seed = 1", "seed = 42"))
    (copied / "eval.json").unlink(missing_ok=True)
    [line] = compare(compared_runs([enough[0], copied], rows=8)).lines
    assert line.seeds == (1, 42)


def test_one_run_twice_says_nothing_about_chance(enough: list[Path]) -> None:
    first, second, _ = compared_runs(enough, rows=8)
    twice = compare([first, replace(first, run="runs/again")])
    assert twice.lines[0].loss.deviation is None
    said = "\n".join(explanation(twice))
    assert f"{first.run} and runs/again have one recipe and one seed: the same run over again" in said
    assert "SD" not in said + "".join("".join(row) for row in cells(twice)[1])
    of_both = "time is the mean of a line's runs, memory the largest of their peaks"
    assert of_both in said
    assert of_both not in "\n".join(explanation(compare([first])))
    losses = [replace(row, tuned=row.tuned + 1) for row in second.evaluation.row_losses]
    worse = replace(second, evaluation=replace(second.evaluation, row_losses=tuple(losses)))
    three = compare([first, replace(first, run="runs/again"), worse])
    assert three.lines[0].loss.deviation == pytest.approx(stdev([0, 1]))
    assert "SD: the standard deviation between seeds" in "\n".join(explanation(three))
    assert cells(three)[1][1][4].endswith(f", SD {stdev([0, 1]):.3f}")


def seen_by(run: ComparedRun, seen: Collection[int], **changes: object) -> ComparedRun:
    """The run as if its training had seen the prompts of these rows."""
    kept = run.evaluation
    rows = tuple(replace(row, is_seen=at in seen) for at, row in enumerate(kept.row_losses))
    answers = tuple(replace(row, is_seen=at in seen) for at, row in enumerate(kept.comparisons))
    return replace(
        run,
        evaluation=replace(kept, row_losses=rows, comparisons=answers, rows_trained_on=len(seen), **changes),
    )


def test_figures_are_about_the_rows_that_training_of_none_of_the_runs_has_seen(enough: list[Path]) -> None:
    first, _, soft = compared_runs(enough, rows=8)
    found = compare([seen_by(first, {0, 1}), seen_by(soft, {1, 7})])
    assert (found.rows, found.left_out, found.rows_trained_on) == (5, 3, {first.run: 2, soft.run: 2})
    none = "loss and answers have none: an interval takes 5 rows, and these are 4"
    assert none not in explanation(found)
    assert none in explanation(replace(found, rows=4))
    for run, line in zip((first, soft), found.lines, strict=True):
        left = run.evaluation.row_losses[2:7]
        tokens = sum(row.tokens for row in left)
        assert line.loss.interval.mean == pytest.approx(sum(row.tokens * row.tuned for row in left) / tokens)
        assert found.bases[0].loss == pytest.approx(sum(row.tokens * row.base for row in left) / tokens)
        assert found.scored_tokens == tokens
        assert line.answers is not None
        assert line.answers.interval.mean == pytest.approx(
            sum(row.is_right for row in run.evaluation.comparisons[2:7]) / 5
        )
    said = f"3 more rows were asked and left out for all runs: training saw their prompts (of {first.run} 2, {soft.run}"
    assert said in "\n".join(explanation(found))


def test_where_hardly_any_row_is_new_figures_are_about_all_and_that_is_said(enough: list[Path]) -> None:
    first, _, soft = compared_runs(enough, rows=8)
    alone = compare([first, soft])
    found = compare([seen_by(first, {0, 1}), seen_by(soft, {6, 7})])
    assert (found.rows, found.left_out) == (8, 0)
    assert found.lines[0].loss == alone.lines[0].loss
    assert found.bases == alone.bases
    said = "\n".join(explanation(found))
    assert f"{first.run}: training saw the prompts of 2 of the 8 rows, on which its figures say nothing of new" in said
    unknown = compare([seen_by(first, set(), seen_unknown="gone"), soft])
    assert f"{first.run}: whether training saw the rows is not known: gone" in "\n".join(explanation(unknown))


def test_an_evaluation_that_does_not_say_which_rows_training_saw_is_made_anew(
    enough: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = compared_runs(enough, rows=8)
    older = [
        replace(run.evaluation, row_losses=tuple(replace(row, is_seen=None) for row in run.evaluation.row_losses))
        for run in runs
    ]
    kept = iter(older)
    monkeypatch.setattr("qtune.comparing.runs.read_evaluation", lambda run_dir: next(kept))
    monkeypatch.setattr("qtune.comparing.runs.evaluate", lambda *args, **kwargs: pytest.fail("asked again"))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        compared_runs(enough, rows=8)


@pytest.mark.slow
def test_answers_that_were_cut_sooner_than_the_others_are_asked_for_again(
    enough: list[Path], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "eval.json").unlink(missing_ok=True)
    compared_runs(enough, rows=8)
    short = evaluate(RunDir(copied), rows=8, max_new_tokens=1)
    assert (short.max_new_tokens, short.is_limited) == (1, True)
    asked = compared_runs([copied, enough[0]], rows=8)
    assert [run.evaluation.max_new_tokens for run in asked] == [512, 512]
    assert [run.evaluation.answers_cut for run in asked] == [0, 0]
    # What is asked for is asked of all.
    cut = compare(compared_runs([copied, enough[0]], rows=8, max_new_tokens=1))
    assert cut.answers_cut == 8
    assert "8 expected answers are longer than --max-new-tokens and cannot match" in explanation(cut)
    # An evaluation whose limit cut nothing stands for every longer one; a longer one is the limit of all.
    evaluate(RunDir(copied), rows=8, max_new_tokens=500)
    evaluate(RunDir(enough[0]), rows=8, max_new_tokens=700)
    with monkeypatch.context() as patched:
        patched.setattr("qtune.comparing.runs.evaluate", lambda *args, **kwargs: pytest.fail("asked again"))
        compared_runs([copied, enough[0]])
    # Of an older version's it is known what it cut.
    kept = replace(short, max_new_tokens=None, is_limited=False)
    assert not kept.would_be_the_same(512)
    assert replace(kept, answers_cut=0).would_be_the_same(512)


def other_tokens(run: ComparedRun) -> ComparedRun:
    """As another tokenizer would have it: twice the tokens, with half of the loss each."""
    rows = tuple(
        replace(row, tokens=2 * row.tokens, base=row.base / 2, tuned=row.tuned / 2) for row in run.evaluation.row_losses
    )
    base = replace(run.evaluation.base, loss=run.evaluation.base.loss / 2)
    return replace(run, evaluation=replace(run.evaluation, row_losses=rows, base=base))


def test_runs_that_make_other_tokens_of_the_same_rows_are_compared_by_whole_rows(enough: list[Path]) -> None:
    first, _, soft = compared_runs(enough, rows=8)
    found, by_token = compare([first, other_tokens(soft)]), compare([first, soft])
    assert (found.loss_per, by_token.loss_per) == ("row", "token")
    assert "scored tokens" not in found.asked
    one, other = found.lines
    rows = first.evaluation.row_losses
    assert one.loss.interval.mean == pytest.approx(sum(row.tokens * row.tuned for row in rows) / len(rows))
    whole = compare([other_tokens(first), soft]).lines
    assert one.loss.interval.mean == pytest.approx(whole[0].loss.interval.mean)
    assert other.loss.interval.mean == pytest.approx(whole[1].loss.interval.mean)
    assert found.bases[0].loss == pytest.approx(sum(row.tokens * row.base for row in rows) / len(rows))
    assert len(found.bases) == 1, "one model in two templates says the same of a row"
    assert cells(found)[0][4] == "loss of a row, nats"
    assert [said for said in explanation(found) if "another tokenizer or template" in said]
    assert found.to_json()["loss_per"] == "row"
    assert comparison_page(found)


@pytest.mark.slow
def test_templates_that_make_other_tokens_of_a_row_are_no_reason_to_refuse(
    enough: list[Path], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = evaluate(RunDir(copied), rows=8)
    twice = replace(kept, row_losses=tuple(replace(row, tokens=2 * row.tokens) for row in kept.row_losses))
    of_first = evaluate(RunDir(enough[0]), rows=8)
    found = {copied: twice, enough[0]: of_first}
    monkeypatch.setattr("qtune.comparing.runs.read_evaluation", lambda run_dir: found[run_dir.path])
    assert compare(compared_runs([copied, enough[0]], rows=8)).loss_per == "row"


def test_figures_are_written_as_eval_writes_them_and_it_is_said_which_sign_is_bad(enough: list[Path]) -> None:
    first, _, soft = compared_runs(enough, rows=8)
    right = replace(soft.evaluation.comparisons[0], tuned=soft.evaluation.comparisons[0].expected)
    better = replace(soft.evaluation, comparisons=(right, *soft.evaluation.comparisons[1:]))
    head, rows = cells(compare([first, replace(soft, evaluation=better)]))
    base, _, line = (dict(zip(head, row, strict=True)) for row in rows)
    assert base["answers exactly right"] == "0.0 %"
    assert line["answers exactly right"].startswith("12.5 % (0.0 % to ")
    assert "+12.5 (+0.0 to " in line[ANSWERS_CHANGE]
    assert base["forgotten, nats"] == f"from {first.forgetting.base:.3f}"
    assert line["forgotten, nats"][0] in "+−"
    said = explanation(compare([first, soft]))
    assert "against the first: of the loss, − is better; of answers, in points, + is better; ~: the interval" in said[1]
    assert said[-1].endswith("about none of the rows: + is worse than the base, − is better")
    assert "; those of an evaluation, of one run, are computed without drawing and differ" in said[0]
    alone = explanation(compare([first, replace(first, seed=2)]))
    assert not [one for one in alone if one.startswith("against the first")]


def test_free_text_is_scored_in_the_units_of_eval(enough: list[Path]) -> None:
    text = TextScore(0.25, 0.25, 1.0, 0.0)

    def free(run: ComparedRun) -> ComparedRun:
        kept = run.evaluation
        half = replace(kept.comparisons[0], expected="a b", tuned="a c")
        scores = {"base": replace(kept.base, text=text), "tuned": replace(kept.tuned, text=text)}
        return replace(run, evaluation=replace(kept, comparisons=(half,) * len(kept.comparisons), **scores))

    first, _, soft = map(free, compared_runs(enough, rows=8))
    head, rows = cells(compare([first, soft]))
    assert dict(zip(head, rows[2], strict=True))["ROUGE-L"] == "0.500 (0.500 to 0.500)"
    ((_, _, eval_text, _),) = [line for line in score_table(first.evaluation) if "ROUGE-L" in line[0]]
    assert len(eval_text) == len("0.500")
    assert "ROUGE-L: how like the expected answer it is, from 0 to 1, as in qtune eval" in explanation(
        compare([first, soft])
    )


def test_why_rows_of_raw_text_have_no_score_of_answers_is_said(enough: list[Path]) -> None:
    asked = compared_runs(enough, rows=8)
    mute = [replace(run, evaluation=replace(run.evaluation, comparisons=())) for run in asked]
    said = "raw text has no question, so that no answers are scored (no ROUGE-L, no F1): loss and perplexity tell"
    assert said in explanation(compare(mute))
    assert said not in explanation(compare(asked))


def test_runs_on_two_bases_have_a_line_for_each_of_them(enough: list[Path]) -> None:
    runs = compared_runs(enough, rows=8)
    other = replace(
        runs[2],
        base="another/base",
        evaluation=replace(runs[2].evaluation, base=replace(runs[2].evaluation.base, loss=9.125)),
        forgetting=replace(
            runs[2].forgetting, pieces=tuple(replace(piece, base=7.25) for piece in runs[2].forgetting.pieces)
        ),
    )
    found = compare([*runs[:2], other])
    second = found.bases[1]
    assert (second.name, second.loss, second.neutral_loss) == ("another/base", 9.125, pytest.approx(7.25))
    assert found.bases[0].loss == runs[0].evaluation.base.loss
    _, rows = cells(found)
    assert [row[0] for row in rows[:2]] == [f"base {runs[0].base} (none)", "base another/base (none)"]
    assert any("not of one base" in sentence for sentence in explanation(found))
    assert len(compare(runs).bases) == 1


def test_a_base_that_is_quantized_otherwise_is_another_base(enough: list[Path]) -> None:
    first, second, _ = compared_runs(enough, rows=8)
    settings = second.settings | {"quantization": second.settings["quantization"] | {"kind": "nf4"}}
    evaluation = replace(second.evaluation, base=replace(second.evaluation.base, loss=9.125))
    bases = compare([first, replace(second, settings=settings, evaluation=evaluation)]).bases
    assert [(base.name, base.quantization) for base in bases] == [(first.base, "none"), (first.base, "nf4")]


def test_the_same_rows_in_two_files_are_the_same_rows(enough: list[Path], copied: Path, tmp_path: Path) -> None:
    resolved = RunDir(copied).resolved_file
    rows = Path(resolved_recipe(RunDir(copied)).data.train)
    table = tmp_path / "elsewhere.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer"])
        for line in rows.read_text().splitlines():
            writer.writerow(message["content"] for message in json.loads(line)["messages"])
    resolved.write_text(resolved.read_text().replace(str(rows), str(table)))
    (copied / "eval.json").unlink(missing_ok=True)
    first, second = compared_runs([enough[0], copied], rows=8)
    places = [{Path(row.place.rpartition(":")[0]).name for row in run.evaluation.row_losses} for run in (first, second)]
    assert places == [{"rows.jsonl"}, {"elsewhere.csv"}]
    assert [row.tuned for row in first.evaluation.row_losses] == [row.tuned for row in second.evaluation.row_losses]


def test_other_rows_are_refused_before_anything_is_measured(
    enough: list[Path], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = RunDir(copied).resolved_file
    rows = Path(resolved_recipe(RunDir(copied)).data.train)
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("It is ", "That is "))
    resolved.write_text(resolved.read_text().replace(str(rows), str(other)))
    (copied / "eval.json").unlink(missing_ok=True)
    for work in ("evaluate", "measure_forgetting"):
        monkeypatch.setattr(f"qtune.comparing.runs.{work}", lambda *args, **kwargs: pytest.fail("began to work"))
    with pytest.raises(InputError, match=r"its 8 held-out rows are not those of .*/run "):
        compared_runs([enough[0], copied], rows=8)


def test_a_comparison_on_fewer_rows_leaves_an_evaluation_of_more_as_it_is(enough: list[Path]) -> None:
    compared_runs(enough[:2], rows=8)
    before = [(folder / "eval.json").read_bytes() for folder in enough[:2]]
    assert [run.evaluation.rows for run in compared_runs(enough[:2], rows=3)] == [3, 3]
    assert [(folder / "eval.json").read_bytes() for folder in enough[:2]] == before


def test_a_run_that_was_asked_fewer_rows_is_asked_as_many_as_the_others(enough: list[Path], copied: Path) -> None:
    (copied / "eval.json").unlink()
    evaluate(RunDir(copied), rows=2)
    assert [run.evaluation.rows for run in compared_runs([copied, enough[0]])] == [8, 8]
    assert json.loads((copied / "eval.json").read_text())["rows"] == 8


def test_runs_that_were_asked_other_rows_are_refused_with_the_way_out(enough: list[Path], tmp_path: Path) -> None:
    compared_runs(enough, rows=8)
    other = tmp_path / "other"
    shutil.copytree(enough[1], other)
    kept = json.loads((other / "eval.json").read_text())
    kept.pop("crc32", None)
    kept["comparisons"][0]["expected"] = "something else"
    (other / "eval.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"rows ask and expect is not .* plain and short with --data FILE$"):
        compared_runs([enough[0], other], rows=8)


def test_the_table_and_the_page_have_the_same_figures(enough: list[Path]) -> None:
    found = compare(compared_runs(enough, rows=8))
    head, rows = cells(found)
    assert [row[0] for row in rows] == ["base", "run and second", "run"]
    assert all(len(row) == len(head) for row in rows)
    page = comparison_page(found)
    for row in rows:
        for cell in row:
            assert cell in page
    assert "default-src" in page


def test_more_rows_than_were_held_out_are_said_to_be_all_of_them(enough: list[Path]) -> None:
    said = CliRunner().invoke(app, ["eval", str(enough[0]), "--rows", "99", "--json"])
    held_out = json.loads(said.stdout)["rows_held_out"]
    assert held_out < 99
    assert f"--rows 99: there are {held_out} " in said.stderr
    assert "all of them were asked" not in CliRunner().invoke(app, ["eval", str(enough[0]), "--json"]).stderr


def test_the_verb_prints_json_and_wants_two_runs(enough: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ["compare", *map(str, enough), "--rows", "8", "--json", "--page", str(page)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [len(line["runs"]) for line in values["lines"]] == [2, 1]
    assert page.read_text().startswith("<!doctype html>")
    alone = CliRunner().invoke(app, ["compare", str(enough[0])])
    assert alone.exit_code == 2
