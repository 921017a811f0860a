"""Benchmarks of lm-evaluation-harness: both models in one table; a missing harness or task is one sentence at once."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from export_models import tiny_run
from typer.testing import CliRunner

from qtune import cli
from qtune.comparing.tasks import task_lines
from qtune.errors import InputError
from qtune.records import write_record
from qtune.report.page import write_report
from qtune.run.folder import RunDir
from qtune.tuned import tasks as stage
from qtune.tuned.load import load_run, load_untuned
from qtune.tuned.task_scores import TaskScore, TaskScores, read_tasks
from qtune.tuned.tasks import evaluate_tasks
from qtune.verdicts.tasks import change, task_table

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CHOICES = ("the quick brown fox", "a lazy dog")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return tiny_run(tmp_path_factory.mktemp("run"))


def own_task(folder: Path) -> Path:
    """Twelve questions with two answers each, in the harness's own words."""
    questions = [{"question": f"What is {number}?", "choices": CHOICES, "answer": number % 2} for number in range(12)]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in questions))
    file = folder / "own.yaml"
    file.write_text(
        "task: own_choices\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'questions.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n"
    )
    return file


def test_without_the_harness_one_sentence_says_so_before_anything_is_loaded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    monkeypatch.setattr(stage, "load_untuned", None)
    with pytest.raises(InputError) as caught:
        evaluate_tasks(run, ["hellaswag"])
    assert str(caught.value) == (
        "--tasks: needs lm-evaluation-harness, which is not installed: pip install 'qtune[tasks]' (or lm-eval)"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "arc", "--rows", "5"], "--rows: --tasks asks benchmarks, not rows"),
        (["--limit", "5", "--fewshot", "2"], "--fewshot, --limit: only --tasks has them"),
        (["--tasks", " , "], "--tasks names no task"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run: RunDir, options: list[str], said: str) -> None:
    shown = CliRunner().invoke(cli.app, ["eval", str(run.path), *options], env={"COLUMNS": "200"})
    assert shown.exit_code == 2
    assert said in shown.output


def test_a_change_has_an_interval_over_the_questions_where_they_are_known() -> None:
    base, tuned = (0.0, 1.0) * 5, (1.0, 1.0) * 5
    told = change(TaskScore("arc", "acc", 0.5, 1.0, base, tuned))
    # Ten differences, five of 1 and five of 0: mean 0.5, standard error 0.527 / √10, t(9) = 2.262.
    assert told == "+0.500 (+0.123 to +0.877)"
    assert change(TaskScore("wikitext", "word_perplexity", 20.0, 15.0)) == "−5.00"


def test_questions_that_both_models_answer_alike_leave_open_what_so_many_do() -> None:
    """0.0303 of 120: scipy.stats.binomtest(0, 120).proportion_ci()."""
    right, losses = (1.0,) * 120, (2.5,) * 120
    assert change(TaskScore("arc", "acc", 1.0, 1.0, right, right)) == "+0.00 (−0.0303 to +0.0303)"
    assert change(TaskScore("arc", "word_perplexity", 2.5, 2.5, losses, losses)) == "+0.00 (+0.00 to +0.00)"


def test_a_task_that_is_not_there_is_named_before_a_model_is_loaded(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(stage, "load_untuned", None)
    with pytest.raises(InputError, match="--tasks: no_such_task: cannot be had: "):
        evaluate_tasks(run, ["no_such_task"])
    with pytest.raises(InputError, match=r"gone\.yaml: no such file"):
        evaluate_tasks(run, [str(tmp_path / "gone.yaml")])


@pytest.mark.parametrize("adapter", ['kind = "lora"\nrank = 4', 'kind = "p-tuning"\nvirtual_tokens = 3'])
def test_both_models_are_scored_as_their_own_likelihoods_say(adapter: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tuned_run = tiny_run(tmp_path, adapter)
    [score] = evaluate_tasks(tuned_run, [str(own_task(tmp_path))]).scores
    assert (score.task, score.metric) == ("own_choices", "acc")
    base, tuned = load_untuned(tuned_run), load_run(tuned_run)
    assert score.base_rows == tuple(_right(base, number) for number in range(12))
    assert score.tuned_rows == tuple(_right(tuned, number) for number in range(12))
    kept = read_tasks(tuned_run)
    assert kept is not None
    assert kept.scores == (score,)


@torch.no_grad()
def _right(run: object, number: int) -> float:
    """Whether the likelier of the two answers is the right one, by the sum of its tokens' log-likelihoods."""
    sums = []
    for choice in CHOICES:
        asked = run.tokenizer(f"What is {number}?")["input_ids"]  # type: ignore[attr-defined]
        whole = run.tokenizer(f"What is {number}? {choice}")["input_ids"]  # type: ignore[attr-defined]
        ids = torch.tensor([whole])
        logits = run.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[attr-defined]
        scores = logits[0, -len(whole) :].log_softmax(dim=-1)[len(asked) - 1 : -1]
        sums.append(float(scores.gather(1, ids[0, len(asked) :, None]).sum()))
    return float(sums.index(max(sums)) == number % 2)


@pytest.mark.parametrize(
    ("limit", "tasks", "said"),
    [
        (20, ("arc", "gsm8k"), " had arc, gsm8k (50 questions of each), and has arc, gsm8k (20 questions of each)"),
        (None, ("arc",), " had arc, gsm8k (50 questions of each), and has arc (all questions)"),
        (None, ("arc", "gsm8k"), None),
        (50, ("arc", "gsm8k", "mmlu"), None),
    ],
)
def test_an_earlier_answer_that_is_replaced_by_less_is_named(
    limit: int | None,
    tasks: tuple[str, ...],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    found = tiny_run(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(__version__="0.4.9"))
    for name in ("require_harness", "load_untuned", "with_adapter", "_loaded_tasks"):
        monkeypatch.setattr(stage, name, lambda *_, **__: SimpleNamespace(model=None))
    answers = {"limit": 50, "tasks": ("arc", "gsm8k")}
    monkeypatch.setattr(stage, "_asked", lambda *_: {"results": {task: {"acc,none": 0.5} for task in answers["tasks"]}})
    evaluate_tasks(found, ["arc"], limit=50)
    assert "from now on" not in capsys.readouterr().err
    answers["tasks"] = tasks
    evaluate_tasks(found, ["arc"], limit=limit)
    told = capsys.readouterr().err
    assert (f"{found.tasks_file}{said} from now on" in told) if said else ("from now on" not in told)


SCORES = TaskScores(
    "0.4.9",
    2,
    None,
    (TaskScore("arc", "acc", 0.5, 0.75, (0.0, 1.0), (1.0, 0.5)), TaskScore("wikitext", "word_perplexity", 20.0, 15.0)),
)


def test_what_benchmarks_said_stands_in_the_report_with_how_they_were_asked(run: RunDir) -> None:
    write_record(run.tasks_file, SCORES)
    page = write_report(run).read_text(encoding="utf-8")
    assert "lm-evaluation-harness 0.4.9, 2 solved examples before each, without a chat template" in page
    part = page.partition("<h2>Benchmarks</h2>")[2].partition("</section>")[0]
    shown = re.findall(r"<td[^>]*>([^<]*)</td>", part)
    assert shown == [cell for row in task_table(SCORES) for cell in row]
    assert shown[:4] == ["arc", "acc", "0.500", "0.750"]


def test_benchmarks_are_compared_where_all_runs_were_asked_alike() -> None:
    def of(tuned: float, **changes: object) -> SimpleNamespace:
        scores = tuple(replace(one, tuned=tuned) for one in SCORES.scores)
        return SimpleNamespace(tasks=replace(SCORES, scores=scores, **changes))

    lines, said = task_lines([[of(0.5), of(0.7)], [of(0.9)]])
    assert said is None
    assert [(one.task, one.base) for one in lines] == [("arc", 0.5), ("wikitext", 20.0)]
    assert lines[0].tuned == pytest.approx((0.6, 0.9))
    assert task_lines([[SimpleNamespace(tasks=None)]]) == ((), None)
    _, missing = task_lines([[of(0.5)], [SimpleNamespace(tasks=None)]])
    assert missing is not None
    assert missing.startswith("benchmarks are not compared: not all of these runs were asked them; ask each with")
    _, other = task_lines([[of(0.5)], [of(0.5, fewshot=None)]])
    assert other is not None
    assert "they were not asked alike" in other
