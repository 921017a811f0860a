"""`qtune eval`: held-out rows only, the right rows, the right loss, and both models' own answers."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from export_models import tiny_run
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtune.adapter.state import save_adapter
from qtune.data.held_out import held_out_rows, spread, spread_unlike
from qtune.errors import DataError, RunError
from qtune.model.builtin import builtin_folder
from qtune.report.results import evaluation as evaluation_part
from qtune.run.drift import locked_sources
from qtune.run.folder import RunDir
from qtune.run.lock import Lock, write_lock
from qtune.run.resolved import as_written, resolved_recipe
from qtune.screens.evaluation import show
from qtune.tuned import evaluate as stage
from qtune.tuned.asked import KEPT, SHOWN_TURNS, asked_text, asked_turns, shortened
from qtune.tuned.evaluate import evaluate
from qtune.tuned.evaluation import EXTRA_TOKENS, read_evaluation
from qtune.tuned.generate import Generated, generate
from qtune.tuned.load import load_run
from qtune.tuned.vocabulary import decoded
from qtune.verdicts.learning import learned_against_base

RECIPE = """\
[model]
base = "{model}"
[quantization]
kind = "none"
compute_dtype = "float32"
[adapter]
kind = "{adapter}"
[data]
train = "train.jsonl"
{held_out}
max_length = 128
"""


def row(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A small random Llama with the real tokenizer: every answer is nonsense, and always the same nonsense."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("smollm2-135m-instruct"))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, eos_token_id=2, pad_token_id=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ADAPTERS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, encoder_hidden_size=16),
}


def make_run(folder: Path, model: Path, adapter: str = "lora", held_out: str = 'test = "test.jsonl"') -> RunDir:
    """A finished run as `qtune run` leaves it, with an adapter of random weights."""
    write_rows(folder / "train.jsonl", [row(f"Name number {n}", f"It is {n}") for n in range(20)])
    write_rows(folder / "test.jsonl", [row(f"Name letter {c}", f"It is {c}") for c in "abcdefgh"])
    run_dir = RunDir(folder)
    text = RECIPE.format(model=model, adapter=adapter, held_out=held_out)
    run_dir.write_text(run_dir.resolved_file, text)
    torch.manual_seed(1)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), ADAPTERS[adapter]())
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_adapter(peft_model.eval(), run_dir.adapter)
    return run_dir


def by_hand(run_dir: RunDir, questions: list[str], answers: list[str], *, tuned: bool) -> tuple[float, list[str]]:
    """Loss and greedy answers, one row at a time, with the chat template and the plain model."""
    run = load_run(run_dir)
    model, tokenizer = run.model, run.tokenizer
    nll, count, made = 0.0, 0, []
    for question, answer in zip(questions, answers, strict=True):
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        given = tokenizer(prompt, add_special_tokens=False).input_ids
        wanted = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids
        ids = torch.tensor([given + wanted])
        with torch.no_grad():
            context = torch.no_grad() if tuned else model.disable_adapter()
            with context:
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
                made += generate(model, [given], [len(wanted) - 1 + EXTRA_TOKENS], stage.find_ends(model, tokenizer))
        scored = logits[-len(wanted) - 1 : -1]
        nll += float(cross_entropy(scored, torch.tensor(wanted), reduction="sum"))
        count += len(wanted)
    return nll / count, [tokenizer.decode(ids).strip() for ids in made]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_scores_and_answers_are_those_of_one_row_at_a_time(tmp_path, tiny_model, adapter):
    run_dir = make_run(tmp_path, tiny_model, adapter)
    evaluation = evaluate(run_dir)
    questions, answers = [f"Name letter {c}" for c in "abcdefgh"], [f"It is {c}" for c in "abcdefgh"]
    for tuned, score, column in ((False, evaluation.base, "base"), (True, evaluation.tuned, "tuned")):
        loss, made = by_hand(run_dir, questions, answers, tuned=tuned)
        assert score.loss == pytest.approx(loss, rel=1e-4)
        assert [getattr(one, column).removesuffix("…") for one in evaluation.comparisons] == made
    assert evaluation.base.loss != pytest.approx(evaluation.tuned.loss, rel=1e-2)
    for column in ("base", "tuned"):  # in which no answer ends so of itself
        ends = [getattr(one, column).endswith("…") for one in evaluation.comparisons]
        assert [getattr(one, f"is_{column}_cut") for one in evaluation.comparisons] == ends
    assert [one.expected for one in evaluation.comparisons] == answers
    assert [one.request for one in evaluation.comparisons] == questions


@pytest.mark.slow
def test_every_row_has_its_own_losses_and_their_mean_is_the_score(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model)
    evaluation = evaluate(run_dir)
    rows = evaluation.row_losses
    assert [one.place for one in rows] == [f"test.jsonl:{number}" for number in range(1, 9)]
    assert sum(one.tokens for one in rows) == evaluation.scored_tokens
    for name in ("base", "tuned"):
        mean = sum(one.tokens * getattr(one, name) for one in rows) / evaluation.scored_tokens
        assert getattr(evaluation, name).loss == pytest.approx(mean)
    alone, _ = by_hand(run_dir, ["Name letter c"], ["It is c"], tuned=True)
    assert rows[2].tuned == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_an_answer_is_right_when_it_is_the_expected_text_and_ended(tmp_path, tiny_model, monkeypatch):
    run_dir = make_run(tmp_path, tiny_model)
    texts = {"base": ["It is a", " It is b\n", "It is c.", "It is d, and so on and on for ever"] + ["It is"] * 4}
    texts["tuned"] = ["It is a", "It is b", "It is c", "It is d", "It is E", "", "It's g", "It is h"]

    def answer(model, prompts, limits, ends, on_rows):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        kind = "tuned" if hasattr(model, "peft_config") else "base"
        ids = [tokenizer(text).input_ids for text in texts[kind]]
        return [Generated(tuple(one[:limit]), len(one) < limit) for one, limit in zip(ids, limits, strict=True)]

    monkeypatch.setattr(stage, "answers_to", answer)
    evaluation = evaluate(run_dir)
    assert evaluation.base.exact_match == 2 / 8
    assert evaluation.tuned.exact_match == 5 / 8
    assert [one.is_right for one in evaluation.comparisons] == [True] * 4 + [False] * 3 + [True]
    assert evaluation.comparisons[1].base == "It is b"


def test_an_answer_that_was_stopped_says_so(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("It is what it is").input_ids
    assert stage.answer_text(tokenizer, ids, is_whole=True) == "It is what it is"
    assert stage.answer_text(tokenizer, ids, is_whole=False) == "It is what it is…"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_an_answer_that_ends_at_its_limit_is_whole(tmp_path, tiny_model, monkeypatch, limit):
    """A label of one token, and --max-new-tokens 1: it is right where the model ends behind it, and cut where it does
    not."""
    run_dir = make_run(tmp_path, tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    label = tokenizer.decode(tokenizer("abcdefg", add_special_tokens=False).input_ids[:limit])
    ids = tokenizer(label, add_special_tokens=False).input_ids
    assert len(ids) == limit
    write_rows(tmp_path / "test.jsonl", [row("Which?", label)])

    def says(model, prompts, limits, ends, *_, **__):
        """What the base goes on with behind the label is another token, and the tuned model ends there."""
        assert limits == [limit + 1]
        more = ids[-1] if not hasattr(model, "peft_config") else ends.stop[0]
        return [Generated(tuple(ids), True)] if more == ends.stop[0] else [Generated((*ids, more), False)]

    monkeypatch.setattr(stage, "answers_to", says)
    found = evaluate(run_dir, max_new_tokens=limit)
    assert (found.base.exact_match, found.tuned.exact_match) == (0.0, 1.0)
    assert (found.comparisons[0].base, found.comparisons[0].tuned) == (f"{label}…", label)
    assert (found.comparisons[0].is_base_cut, found.comparisons[0].is_tuned_cut) == (True, False)
    assert found.answers_cut == 0


def test_eval_json_holds_what_was_returned(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model)
    evaluation = evaluate(run_dir, rows=3)
    kept = json.loads(run_dir.eval_file.read_text())
    assert {**kept, "crc32": None} == {**json.loads(json.dumps(evaluation.to_json())), "crc32": None}
    assert evaluation.rows == len(evaluation.comparisons) == 3
    assert evaluation.rows_held_out == 8
    assert [one.place for one in evaluation.comparisons] == ["test.jsonl:1", "test.jsonl:3", "test.jsonl:6"]


def test_where_fewer_rows_take_the_place_of_more_that_is_said(tmp_path, tiny_model, capsys):
    run_dir = make_run(tmp_path, tiny_model)
    told = f"{run_dir.eval_file} had 3 rows, and has 2 from now on"
    for rows, is_told in ((3, False), (3, False), (2, True), (3, False)):
        evaluate(run_dir, rows=rows)
        assert (told in capsys.readouterr().err) is is_told
    assert json.loads(run_dir.eval_file.read_text())["rows"] == 3
    evaluate(run_dir, rows=2, replaces_larger=False)
    assert f"not kept: {run_dir.eval_file} has more rows, 3" in capsys.readouterr().err
    run_dir.eval_file.write_text("{")
    assert evaluate(run_dir, rows=2).rows == json.loads(run_dir.eval_file.read_text())["rows"] == 2


def test_rows_are_spread_evenly():
    assert spread(8, 3) == [0, 2, 5]
    assert spread(3, 100) == [0, 1, 2]
    assert spread(1000, 4) == [0, 250, 500, 750]


@pytest.mark.parametrize(
    ("rows", "wanted", "chosen"),
    [
        ("abcdef", 3, "ace"),
        ("aaabcd", 3, "abc"),
        ("abca", 4, "abc"),
        ("aabbaa", 3, "ab"),
        ("bbba", 2, "ab"),
        ("", 3, ""),
    ],
)
def test_rows_that_say_the_same_are_chosen_once_and_others_stand_in(rows: str, wanted: int, chosen: str) -> None:
    found = spread_unlike(len(rows), wanted, rows.__getitem__)
    assert found == sorted(found)
    assert sorted(rows[place] for place in found) == sorted(chosen)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_the_batches(tmp_path, tiny_model, monkeypatch):
    run_dir = make_run(tmp_path, tiny_model)
    together = evaluate(run_dir)
    monkeypatch.setattr("qtune.tuned.row_losses.TOKENS_PER_BATCH", 1)
    alone = evaluate(run_dir)
    for one, other in ((together.base, alone.base), (together.tuned, alone.tuned)):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert (one.token_accuracy, one.exact_match) == (other.token_accuracy, other.exact_match)


def test_the_validation_share_is_the_one_that_training_set_aside(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model, held_out="validation = 0.2")
    evaluation = evaluate(run_dir)
    assert (evaluation.source, evaluation.rows_held_out) == ("validation rows", 4)
    assert all(one.request.startswith("Name number") for one in evaluation.comparisons)


def test_separate_rows_are_evaluated_after_the_training_rows_are_gone(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model)
    (tmp_path / "train.jsonl").unlink()
    assert evaluate(run_dir, rows=1).rows_held_out == 8


SEEN = [row(f"Name number {n}", "It is another") for n in (3, 5)]
UNSEEN = [row(f"Name letter {c}", f"It is {c}") for c in "abcdef"]


def test_the_figures_are_about_the_rows_that_training_has_not_seen(tmp_path, tiny_model, capsys):
    run_dir = make_run(tmp_path, tiny_model, held_out='test = "test.jsonl"\nvalidation = 0.0')
    write_rows(tmp_path / "test.jsonl", UNSEEN)
    alone = evaluate(run_dir)
    assert alone.about_rows == "training saw none of these prompts"
    write_rows(tmp_path / "test.jsonl", [SEEN[0], *UNSEEN, SEEN[1]])
    found = evaluate(run_dir)
    assert (found.rows, found.rows_trained_on, found.left_out, found.rows_judged) == (8, 2, 2, 6)
    for one, other in ((found.base, alone.base), (found.tuned, alone.tuned)):
        assert (one.loss, one.token_accuracy) == pytest.approx((other.loss, other.token_accuracy))
        assert one.exact_match == other.exact_match
    assert found.scored_tokens == alone.scored_tokens
    assert [one.is_seen for one in found.row_losses] == [True, *[False] * 6, True]
    assert [one.request for one in found.judged_answers] == [one.request for one in alone.comparisons]
    told = "2 more were asked and left out: training saw their prompts"
    capsys.readouterr()
    show(alone)
    table = capsys.readouterr().out
    show(found)
    assert capsys.readouterr().out == table.replace("training saw none of these prompts", told).replace(
        "6 of 6 test rows", "6 of 8 test rows"
    )
    assert f"6 of 8 test rows; {told}." in str(evaluation_part(found))
    verdict, of_unseen = learned_against_base(found, "run"), learned_against_base(alone, "run")
    assert verdict.answer == of_unseen.answer
    assert verdict.sentence == of_unseen.sentence.replace("; 6 rows are few", f"; {told}; 6 rows are few")


@pytest.mark.parametrize(
    ("unseen", "told"),
    [
        (0, "training saw the prompts of all 2"),
        (4, "training saw the prompts of 2, and 4 others are too few to judge by"),
    ],
)
def test_where_hardly_any_row_is_new_it_cannot_be_told_what_was_learned(tmp_path, tiny_model, capsys, unseen, told):
    run_dir = make_run(tmp_path, tiny_model, held_out='test = "test.jsonl"\nvalidation = 0.0')
    write_rows(tmp_path / "test.jsonl", [*SEEN, *UNSEEN[:unseen]])
    found = evaluate(run_dir)
    assert (found.left_out, found.rows_judged, found.about_rows) == (0, 2 + unseen, told)
    verdict = learned_against_base(found, "run")
    assert (verdict.standing, verdict.answer) == ("unsure", "Cannot be told")
    assert verdict.sentence.startswith(f"{told}, and what training saw says nothing of new rows; on {2 + unseen} held-")
    assert verdict.command == "qtune eval run --data FILE  # rows that were not trained on"
    show(found)
    assert told in capsys.readouterr().out


def test_training_rows_that_are_gone_or_others_by_now_leave_it_unknown(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model, held_out='test = "test.jsonl"\nvalidation = 0.0')
    sources = locked_sources(resolved_recipe(run_dir), run_dir.path, ("train",))
    write_lock(run_dir, Lock(data=sources))
    assert evaluate(run_dir, accepted=("weights",)).rows_trained_on == 0
    write_rows(tmp_path / "train.jsonl", UNSEEN)
    for how in ("has other rows", "no such file"):
        found = evaluate(run_dir)
        assert (found.rows_trained_on, found.left_out, {one.is_seen for one in found.row_losses}) == (None, 0, {None})
        assert how in str(found.seen_unknown)
        assert found.about_rows == f"whether training saw them is not known: {found.seen_unknown}"
        assert found.about_rows in learned_against_base(found, "run").sentence
        assert found.about_rows in unescape(str(evaluation_part(found)))
        (tmp_path / "train.jsonl").unlink(missing_ok=True)


def going_on_from(earlier: RunDir, folder: Path, model: Path, held_out: str) -> RunDir:
    folder.mkdir()
    run_dir = make_run(folder, model, held_out=held_out)
    text = run_dir.resolved_file.read_text()
    run_dir.resolved_file.write_text(text.replace("[data]", f'start_from = "{earlier.path}"\n[data]'))
    return run_dir


@pytest.mark.parametrize("system", ["", 'system_prompt = "You name things."'])
def test_what_earlier_runs_were_trained_on_was_seen_by_those_that_start_from_them(tmp_path, tiny_model, system):
    """Three runs in a chain; what the first was trained on was seen by the last, under whatever system message."""
    (tmp_path / "first").mkdir()
    first = make_run(tmp_path / "first", tiny_model, held_out=f'test = "test.jsonl"\nvalidation = 0.0\n{system}')
    write_rows(first.path / "train.jsonl", [*UNSEEN[:2], row("Anything else?", "No")])
    second = going_on_from(first, tmp_path / "second", tiny_model, "validation = 0.0")
    third = going_on_from(second, tmp_path / "third", tiny_model, 'test = "test.jsonl"\nvalidation = 0.0')
    assert evaluate(third).about_rows == "2 more were asked and left out: training saw their prompts"
    (second.path / "resolved.toml").unlink()
    lost = evaluate(third)
    assert (lost.rows_trained_on, lost.left_out) == (None, 0)
    assert str(lost.seen_unknown).startswith(f"the run that it started from cannot be read ({second.path}")


def test_a_share_of_rows_that_the_earlier_run_was_trained_on_was_seen(tmp_path, tiny_model):
    """Both set a share of the same file aside, drawn by other seeds."""
    (tmp_path / "first").mkdir()
    first = make_run(tmp_path / "first", tiny_model, held_out="validation = 0.5")
    second = going_on_from(first, tmp_path / "second", tiny_model, "validation = 0.5\nvalidation_seed = 7")
    found = evaluate(second)
    assert found.rows == 10
    assert 0 < found.left_out == found.rows_trained_on <= 5
    (first.path / "train.jsonl").unlink()
    gone = evaluate(second)
    assert gone.about_rows.startswith("whether training saw them is not known: the training rows of ")


def test_other_rows_can_be_named(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "run").mkdir()
    run_dir = make_run(tmp_path / "run", tiny_model)
    write_rows(tmp_path / "other.jsonl", [{"prompt": "Who?", "completion": "Nobody"}])
    monkeypatch.chdir(tmp_path)
    evaluation = evaluate(run_dir, data_file=Path("other.jsonl"))
    assert evaluation.source == "other.jsonl"
    assert [(one.request, one.expected) for one in evaluation.comparisons] == [("Who?", "Nobody")]


def test_a_conversation_is_asked_for_its_last_answer(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model)
    two_turns = row("First?", "One")["messages"] + row("Second?", "Two")["messages"]
    write_rows(tmp_path / "test.jsonl", [{"messages": two_turns}])
    (comparison,) = evaluate(run_dir).comparisons
    assert (comparison.request, comparison.expected) == ("Second?", "Two")


def test_a_request_of_several_turns_is_shown_with_all_that_stands_before_the_answer(tmp_path, tiny_model, capsys):
    run_dir = make_run(tmp_path, tiny_model)
    system = [{"role": "system", "content": "You are brief."}]
    two_turns = [*system, *row("First?" + " and so on" * 40, "One")["messages"], *row("Second?", "Two")["messages"]]
    write_rows(tmp_path / "test.jsonl", [{"messages": two_turns}, {"messages": [*system, *row("A?", "B")["messages"]]}])
    found = evaluate(run_dir)
    assert [turn.role for turn in found.comparisons[0].turns] == ["system", "user", "assistant", "user"]
    show(found)
    said = capsys.readouterr().out
    assert "each request begins with the system message: You are brief." in said
    lines = [line.split("  ")[0] for line in said.splitlines()]
    assert "assistant: One" in lines
    assert "user: Second?" in lines
    assert "A?" in lines, "of a single turn the words of the user are all of it"
    assert "system: You are brief." not in said
    page = unescape(str(evaluation_part(found)))
    assert "Each request begins with the system message: You are brief." in page
    assert re.search(r"user: First\? and so on.{100,} … .* and so on\nassistant: One\nuser: Second\?<", page)
    alone = replace(found, comparisons=found.comparisons[:1])
    show(alone)
    assert "system: You are brief." in capsys.readouterr().out
    assert read_evaluation(run_dir) == found


def test_what_calls_tools_and_what_is_long_is_shown_by_its_kind() -> None:
    talk = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": {"city": "Graz"}}}]},
        {"role": "tool", "content": "rain"},
    ]
    turns = asked_turns(talk, [{"type": "function", "function": {"name": "get"}}])
    one = stage.Comparison("t:1", "Weather?", "It rains", "", "", turns=turns)
    assert asked_text(one.request, one.turns).splitlines() == [
        "tools: get",
        "user: Weather?",
        'assistant: get({"city": "Graz"})',
        "tool: rain",
    ]
    long = stage.Comparison(
        "t:1", "Last?", "", "", "", turns=asked_turns([*talk * 3, {"role": "user", "content": "Last?"}])
    )
    lines = asked_text(long.request, long.turns).splitlines()
    assert lines[:2] == ["user: Weather?", "… 5 turns …"]
    assert lines[-1] == "user: Last?"
    assert len(lines) == SHOWN_TURNS + 1
    assert len(shortened("x" * 900, KEPT)) == KEPT


def test_raw_text_is_scored_and_not_asked(tmp_path, tiny_model, capsys):
    run_dir = make_run(tmp_path, tiny_model)
    write_rows(tmp_path / "test.jsonl", [{"text": "Nothing is asked here."}])
    evaluation = evaluate(run_dir)
    assert evaluation.base.exact_match is None
    assert evaluation.comparisons == ()
    assert evaluation.base.loss > 0
    assert evaluation.about_rows == "training saw none of these texts"
    assert replace(evaluation, left_out=1).about_rows == "1 more was asked and left out: training saw its text"
    assert replace(evaluation, rows=9, rows_trained_on=9).about_rows == "training saw the texts of all 9"
    show(evaluation)
    said = capsys.readouterr().out
    assert "exactly" not in said
    assert (
        "\nraw text has no question, so that no answers are scored (no ROUGE-L, no F1): loss and perplexity tell\n"
        in said
    )
    asked = {"prompt": "What is asked here?", "completion": "Nothing."}
    write_rows(tmp_path / "test.jsonl", [{"text": "Nothing is asked here."}, asked, asked | {"prompt": "And here?"}])
    mixed = evaluate(run_dir)
    assert mixed.about_answers == "1 was not asked: raw text has no question, and counts in loss and perplexity alone"
    assert mixed.about_rows == "training saw none of these prompts and texts"
    write_rows(tmp_path / "test.jsonl", [asked])
    assert evaluate(run_dir).about_answers == ""


@pytest.mark.parametrize("adapter", ["lora", "p-tuning"])
def test_the_loss_of_raw_text_is_that_of_the_tokens_that_both_models_predict(tmp_path, tiny_model, adapter):
    """The first token has nothing before it in the base; dividing by it as well would make every loss too small."""
    run_dir = make_run(tmp_path, tiny_model, adapter)
    texts = ["Nothing is asked here.", "Yes, and no."]
    write_rows(tmp_path / "test.jsonl", [{"text": text} for text in texts])
    evaluation = evaluate(run_dir)
    run = load_run(run_dir)
    written, folder = as_written(run_dir, run.recipe)
    nll, count = {False: 0.0, True: 0.0}, 0
    for ids in held_out_rows(written, run.tokenizer, folder)[1]["input_ids"]:
        count += len(ids) - 1
        for tuned in nll:
            with torch.no_grad(), nullcontext() if tuned else run.model.disable_adapter():
                given = torch.tensor([ids])
                logits = run.model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -len(ids) :]
            nll[tuned] += float(cross_entropy(logits[:-1], given[0, 1:], reduction="sum"))
    assert evaluation.scored_tokens == count
    assert evaluation.base.loss == pytest.approx(nll[False] / count, rel=1e-4)
    assert evaluation.tuned.loss == pytest.approx(nll[True] / count, rel=1e-4)
    assert sum(one.tokens for one in evaluation.row_losses) == count


def test_answers_longer_than_the_limit_are_counted(tmp_path, tiny_model, capsys):
    run_dir = make_run(tmp_path, tiny_model)
    evaluation = evaluate(run_dir, rows=2, max_new_tokens=2)
    assert evaluation.answers_cut == 2
    show(evaluation)
    assert "2 expected answers are longer than --max-new-tokens and cannot match" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "times"), [("Blue.", 1), ("It is the colour of the sky on a clear day.", 2)])
@pytest.mark.slow
def test_free_text_has_room_to_go_on_and_an_exact_answer_has_none(tmp_path, tiny_model, monkeypatch, answer, times):
    run_dir = make_run(tmp_path, tiny_model)
    write_rows(tmp_path / "test.jsonl", [row("What is blue?", answer)])
    room = []

    def nothing(model, prompts, limits, ends, on_rows):
        room.extend(limits)
        return [Generated((), True) for _ in prompts]

    monkeypatch.setattr(stage, "answers_to", nothing)
    evaluate(run_dir)
    tokens = len(AutoTokenizer.from_pretrained(tiny_model)(answer).input_ids)
    assert room == [times * tokens + EXTRA_TOKENS + 1] * 2


def test_no_held_out_rows_is_an_error_with_a_way_out(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(stage, "load_untuned", lambda *_, **__: pytest.fail("loaded the base for it"))
    run_dir = make_run(tmp_path, tiny_model, held_out="validation = 0.0")
    with pytest.raises(DataError) as caught:
        evaluate(run_dir)
    assert str(caught.value) == "data.validation: the recipe sets no rows aside; name some with --data FILE"


@pytest.mark.parametrize("held_out", ['test = "test.jsonl"', "validation = 0.25"])
def test_rows_that_are_gone_are_named_with_the_way_to_ask_others(tmp_path, tiny_model, held_out):
    run_dir = make_run(tmp_path, tiny_model, held_out=held_out)
    file = tmp_path / ("test.jsonl" if "test" in held_out else "train.jsonl")
    file.rename(tmp_path / "moved.jsonl")
    for ask in (lambda: evaluate(run_dir), lambda: stage.asked_rows(run_dir, rows=2)):
        with pytest.raises(DataError) as caught:
            ask()
        lost, way = map(str, caught.value.problems)
        assert lost.endswith(f"{file.name}: no such file")
        assert way == (
            f"{tmp_path}: its held-out rows are read from there; put them back, or name others with --data FILE"
        )
    with pytest.raises(DataError) as caught:
        evaluate(run_dir, data_file=tmp_path / "none.jsonl")
    assert len(caught.value.problems) == 1


def test_an_unfinished_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "load_untuned", lambda _: pytest.fail("loaded"))
    with pytest.raises(RunError, match="has no adapter yet"):
        evaluate(RunDir(tmp_path))


def test_the_screen_shows_scores_and_the_wrong_answers_first(capsys):
    score = stage.Score
    evaluation = stage.Evaluation(
        run="runs/x",
        source="test rows",
        rows=2,
        rows_held_out=128,
        scored_tokens=50,
        answers_cut=0,
        base=score(2.5, 0.4, 0.0),
        tuned=score(0.0123, 0.996, 0.5),
        comparisons=(
            stage.Comparison("t:1", "Add milk", "[milk]", "Sure!", "[milk]"),
            stage.Comparison("t:2", "Add tea", "[tea]", "Hm…", "[bold]tee"),
        ),
    )
    show(evaluation)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "2 of 128 test rows, 50 scored tokens",
        "                              base   tuned  change, 95 % interval",
        "loss, nats per token          2.50  0.0123",
        "perplexity                    12.2  1.0124",
        "tokens right                 40.0%   99.6%",
        "answers exactly right         0.0%   50.0%",
        "answers cut at their limit  1 of 2  0 of 2",
        "changes are not told from noise: an interval takes 5 rows",
        "… behind an answer: the model was stopped before it had ended, at the length of the expected answer and "
        f"{EXTRA_TOKENS} tokens more, or at --max-new-tokens",
        "",
        "Answers, wrong ones first (1 of 2)",
        "request   expected  base   tuned",
        "Add tea   [tea]     Hm…    ✗ [bold]tee",
        "Add milk  [milk]    Sure!  ✓ [milk]",
    ]
    show(evaluation, 1)
    assert "Answers, wrong ones first (1 of 2); 1 of 2 shown, --show 2 shows all" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_what_it_writes(tmp_path, tiny_model):
    run_dir = make_run(tmp_path, tiny_model)
    command_line = [sys.executable, "-m", "qtune", "eval", str(tmp_path), "--rows", "2", "--json"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    kept = json.loads(run_dir.eval_file.read_text())
    assert {**json.loads(done.stdout), "crc32": None} == {**kept, "crc32": None}
    assert len(json.loads(done.stdout)["comparisons"]) == 2


def test_the_command_refuses_what_is_no_run(tmp_path):
    folder = tmp_path / "pictures" / "holidays"
    folder.mkdir(parents=True)
    command_line = [sys.executable, "-m", "qtune", "eval", str(folder)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {folder}: is not a run: it has no resolved.toml\n"


def test_a_row_whose_answer_was_cut_away_asks_nothing_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, data='on_long_row = "cut-right"')
    rows = [("word " * 200, "Lost."), ("Name a colour.", "Blue.")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
        for asked, answer in rows
    ]
    both, lost = tmp_path / "both.jsonl", tmp_path / "lost.jsonl"
    both.write_text("\n".join(lines))
    lost.write_text(lines[0])
    found = evaluate(run, data_file=both, max_new_tokens=4)
    assert (found.rows, len(found.comparisons)) == (2, 1)
    assert found.comparisons[0].request == "Name a colour."
    monkeypatch.setattr(stage, "load_untuned", lambda *_, **__: pytest.fail("loaded the base for it"))
    with pytest.raises(DataError, match="none of the rows that were taken has an answer left to measure on"):
        evaluate(run, data_file=lost)


def test_a_token_that_the_tokenizer_does_not_know_stays_to_be_seen_in_an_answer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("It is", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*ids, len(tokenizer) + 3]) == "It is"  # it would look exactly right
    assert decoded(tokenizer, [*ids, len(tokenizer) + 3]) == f"It is<unknown token {len(tokenizer) + 3}>"
    assert decoded(tokenizer, ids) == "It is"
