"""Sample answers: at each evaluation, kept beside the losses, and without any trace in what is trained."""

import contextlib
import json
import random
import re
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file
from test_training_train import Killed, assert_same_run, course, killed
from transformers import TrainerControl, TrainerState

from qtune.adapter.state import STATE_FILE
from qtune.data.conversation import Conversation
from qtune.recipe.file import load_recipe
from qtune.report.over_time import answers_over_time
from qtune.run.folder import RunDir
from qtune.run.metrics import AnswersRecord, NoteRecord, SampleAnswer, read_metrics
from qtune.training import sample_answers, train
from qtune.training.display import answers_text
from qtune.training.sample_answers import MOST_TOKENS, SampleAnswers
from qtune.training.trainer import QloraTrainer
from qtune.tuned.asked import AskedTurn, answered_turn, other_turns
from qtune.tuned.evaluate import evaluate
from qtune.tuned.generate import Ends, answers_to, generate

pytestmark = pytest.mark.slow

# Dropout draws a random number in each step: one that an answer drew would change all that follow.
LORA = 'kind = "lora"\nrank = 4\ndropout = 0.1'
SOFT = 'kind = "p-tuning"\nvirtual_tokens = 4\nencoder = "lstm"\nencoder_hidden_size = 32\nencoder_dropout = 0.1'
STEPS = "steps = 6\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 3\neval_every = 2"


@pytest.fixture(autouse=True)
def answers_are_as_long_as_a_users(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' are short."""
    monkeypatch.setattr(sample_answers, "MOST_TOKENS", MOST_TOKENS)


def answers_in(run_dir: RunDir) -> list[AnswersRecord]:
    return [one for one in read_metrics(run_dir.metrics_file) if isinstance(one, AnswersRecord)]


def said_in(run_dir: RunDir) -> list[list[tuple[str, str]]]:
    """Questions and answers of each evaluation; places are named from another folder after a resumption."""
    return [[(one.request, one.answer) for one in record.answers] for record in answers_in(run_dir)]


def notes_in(run_dir: RunDir) -> list[str]:
    return [one.message for one in read_metrics(run_dir.metrics_file) if isinstance(one, NoteRecord)]


def test_what_several_rows_ask_is_asked_once() -> None:
    """Whatever each of them wants as its answer."""
    asked = ("A?", "B?", "A?", "A?", "C?", "A?")
    rows = [
        {
            "conversation": Conversation(
                ({"role": "user", "content": text}, {"role": "assistant", "content": str(n)})
            ).to_json()
        }
        for n, text in enumerate(asked)
    ]
    given = SimpleNamespace(
        prepared=SimpleNamespace(examples={"validation": rows}),
        recipe=SimpleNamespace(training=SimpleNamespace(sample_answers=3)),
    )
    found = [Conversation.from_json(row["conversation"]) for row in sample_answers.sampled_rows(given)]  # type: ignore[arg-type]
    assert sorted(one.prompt[0]["content"] for one in found) == ["A?", "B?", "C?"]


@pytest.mark.parametrize("adapter", [LORA, SOFT], ids=["lora", "p-tuning"])
def test_answers_change_no_bit_of_what_is_trained(
    write_recipe: WriteRecipe, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter=adapter, training=STEPS)
    asked = train.run(load_recipe(recipe, ["training.sample_answers=2"]))
    silent = train.run(load_recipe(recipe, ["training.sample_answers=0"]))
    assert [(one.step, len(one.answers)) for one in answers_in(asked)] == [(2, 2), (4, 2), (6, 2)]
    assert capsys.readouterr().err.count(": asking 2 validation rows …\n") == 3
    assert answers_in(silent) == []
    assert [one for one in course(asked) if one[0] != "answers"] == course(silent)
    ours, theirs = (load_file(one.adapter / STATE_FILE) for one in (asked, silent))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_goes_on_has_the_answers_of_one_that_never_stopped(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(adapter=LORA, training=STEPS)
    unbroken = train.run(load_recipe(recipe))
    original = QloraTrainer.training_step

    def until_step_5(self, *args, **kwargs):
        return killed() if self.state.global_step == 4 else original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(QloraTrainer, "training_step", until_step_5)
        with pytest.raises(Killed):
            train.run(load_recipe(recipe))
    broken = train.resume(RunDir(recipe.parent / "runs" / "tiny-2"))
    assert_same_run(broken, unbroken)
    assert said_in(broken) == said_in(unbroken)
    assert [one.step for one in answers_in(broken)] == [2, 4, 6]


def test_the_last_answers_are_those_that_eval_gets_from_the_finished_adapter(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training=f'{STEPS}\nresult = "last"')
    finished = train.run(load_recipe(recipe, ["training.sample_answers=2"]))
    of_eval = {(one.request, one.expected): one.tuned for one in evaluate(finished).comparisons}
    last = answers_in(finished)[-1].answers
    assert len(last) == 2
    for one in last:
        assert of_eval[one.request, one.expected].removesuffix("…") == one.answer.removesuffix("…")


def test_without_validation_rows_nothing_is_asked(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 2")
    recipe.write_text(recipe.read_text().replace("validation = 0.1", "validation = 0"))
    assert answers_in(train.run(load_recipe(recipe))) == []


def test_raw_text_has_no_question_and_so_no_answers(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training="steps = 1\nbatch_size = 2\neval_every = 1")
    rows = [{"text": f"A page about the number {number} and nothing else."} for number in range(20)]
    (recipe.parent / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    finished = train.run(load_recipe(recipe))
    # Where the processor's rates are known, a run of one step says that its time cannot be compared.
    notes = [note for note in notes_in(finished) if "time with the prediction" not in note]
    assert (answers_in(finished), notes) == ([], [])


def test_an_answer_that_fails_is_said_once_and_ends_no_run(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the cache is of another kind")

    monkeypatch.setattr(sample_answers, "answers_to", fails)
    finished = train.run(load_recipe(write_recipe(training=STEPS)))
    assert finished.is_finished
    said = [note for note in notes_in(finished) if "sample answers" in note]
    assert said == [
        "no sample answers from here on, which changes nothing of the training: the cache is of another kind"
    ]


def test_what_a_model_draws_while_it_answers_or_fails_changes_no_number_that_training_draws() -> None:
    def state() -> tuple[object, list[int], list[int]]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    before = state()
    with contextlib.suppress(RuntimeError), sample_answers._numbers_kept(torch.device("cpu")):
        random.random(), np.random.rand(), torch.rand(1)
        assert state() != before
        raise RuntimeError
    assert state() == before


def test_the_time_of_all_answers_is_bounded_and_a_stopped_one_says_so(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts, endless = [[5, 6], [7, 8, 9]], Ends((), 0)
    # No token of this random model ends an answer here, so that only the limit and the clock do.
    cut = answers_to(model, prompts, [9, 9], endless)
    assert [(len(one.ids), one.is_whole, one.is_late) for one in cut] == [(9, False, False), (9, False, False)]
    assert [list(one.ids) for one in cut] == generate(model, prompts, [9, 9], endless)
    over = answers_to(model, prompts, [9, 9], endless, seconds=1e-9)
    assert all(len(one.ids) <= 1 and not one.is_whole and one.is_late for one in over)
    # Those that come later are begun as well, however little time is left.
    apart = answers_to(model, prompts, [9, 9], endless, seconds=1e-9, batch_tokens=1)
    assert [len(one.ids) for one in apart] == [1, 1]
    at_its_end, late = answers_to(model, prompts, [1, 9], endless, seconds=1e-9, batch_tokens=1)
    assert (at_its_end.is_late, late.is_late) == (False, True)
    first = cut[0].ids[0]
    ended = answers_to(model, prompts[:1], [9], Ends((first,), 0))
    assert [(one.ids, one.is_whole, one.is_late) for one in ended] == [((), True, False)]


def test_an_answer_is_at_most_twice_as_long_as_expected_and_never_longer_than_its_bound(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def note_limits(model, prompts, given, ends, **_):
        limits.extend(given)
        return answers_to(model, prompts, [1] * len(prompts), ends)

    monkeypatch.setattr(sample_answers, "answers_to", note_limits)
    recipe = write_recipe(training="steps = 1\nbatch_size = 2\neval_every = 1", data="")
    recipe.write_text(recipe.read_text().replace("max_length = 128", "max_length = 512"))
    rows = [
        {"prompt": f"Say {number}", "completion": f"{number} " * (2 if number % 2 else 150)} for number in range(40)
    ]
    (recipe.parent / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train.run(load_recipe(recipe, ["training.sample_answers=4", "data.validation=0.3"]))
    assert max(limits) == MOST_TOKENS
    assert min(limits) < MOST_TOKENS // 2


RECORDS = (
    AnswersRecord(2, 9, 0.2, 1.0, (SampleAnswer("rows:1", "What is\nit?", "Tea", "the the…"),)),
    AnswersRecord(4, 9, 0.4, 2.0, (SampleAnswer("rows:1", "What is\nit?", "Tea", "<b>Tee</b>"),)),
    AnswersRecord(6, 9, 0.6, 3.0, (SampleAnswer("rows:1", "What is\nit?", "Tea", "Tea"),)),
    AnswersRecord(9, 9, 0.9, 4.0, (SampleAnswer("rows:1", "What is\nit?", "Tea", "Tea"),)),
)


def test_the_screen_shows_question_and_answer_and_what_was_wanted_where_it_differs() -> None:
    assert answers_text(RECORDS[0]) == (
        "step 2: what it answers now; 1 of 1 was cut at the limit\n"
        "  asked   What is it?\n  says    the the…\n  wanted  Tea"
    )
    assert answers_text(RECORDS[2]) == "step 6: what it answers now\n  asked   What is it?\n✓ says    Tea"


def test_the_screen_says_questions_once_and_afterwards_the_answers_that_are_new() -> None:
    assert answers_text(RECORDS[2], RECORDS[1]) == "step 6: what it answers now\n✓ says    Tea"
    assert answers_text(RECORDS[3], RECORDS[2]) == "step 9: the same answers as at step 6"
    (one,) = RECORDS[0].answers
    two = replace(RECORDS[0], answers=(one, replace(one, request="And this?")))
    later = replace(two, step=5, answers=(one, replace(one, request="And this?", answer="Milk")))
    assert answers_text(later, two) == (
        "step 5: what it answers now; 1 of 2 was cut at the limit\n  says    (the same as at step 2)\n  says    Milk"
    )
    assert answers_text(two, RECORDS[0]).count("asked") == 2  # other questions are shown


def test_the_report_shows_the_answers_over_time_and_equal_ones_once() -> None:
    page = answers_over_time(RECORDS)
    assert "<h3>What is\nit?</h3>" in page
    rows = page[page.index("<tbody>") :]
    assert rows.index("the the…") < rows.index("&lt;b&gt;Tee&lt;/b&gt;") < rows.index("✓ Tea")
    assert re.search(r"<td[^>]*>6 to 9</td><td[^>]*>✓ Tea</td>", rows)
    assert rows.count("✓ Tea") == 1


def test_that_a_question_has_other_turns_around_it_is_said_on_screen_and_page() -> None:
    (one,) = RECORDS[0].answers
    record = replace(RECORDS[0], answers=(replace(one, turns_before=3, turns_after=1),))
    assert "  asked   What is it? (with 3 earlier turns and 1 later turn)\n" in answers_text(record)
    page = answers_over_time([record])
    assert '<p class="dim">Asked with 3 earlier turns and 1 later turn of the conversation.</p>' in page
    assert "turn" not in answers_text(RECORDS[0]) + answers_over_time(RECORDS)
    of_a_tool = replace(record, answers=(replace(record.answers[0], last_turn="tool: 4 <racks>"),))
    assert "later turn)\n  then    tool: 4 <racks>\n" in answers_text(of_a_tool)
    said = "1 later turn of the conversation; what it answers is tool: 4 &lt;racks&gt;.</p>"
    assert said in answers_over_time([of_a_tool])


@pytest.mark.parametrize(
    ("role", "said"), [("tool", "tool: 4"), ("assistant", "assistant: 4"), ("user", ""), ("system", "")]
)
def test_what_is_answered_is_shown_where_it_is_not_the_user_s(role: str, said: str) -> None:
    assert answered_turn((AskedTurn("user", "how many?"), AskedTurn(role, "4"))) == said


@pytest.mark.parametrize(
    ("roles", "counted"),
    [
        ("system tools user", (0, 0)),
        ("user assistant user assistant user", (4, 0)),
        ("system user assistant user assistant tool", (2, 2)),
        ("assistant", (1, 0)),
        ("", (0, 0)),
    ],
)
def test_turns_are_counted_before_and_after_the_last_words_of_the_user(roles: str, counted: tuple[int, int]) -> None:
    assert other_turns([AskedTurn(role, "…") for role in roles.split()]) == counted


def test_the_turns_around_a_question_are_counted(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training="steps = 1\nbatch_size = 2\neval_every = 1", data="")
    talk = [("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D.")]
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in talk]} for n in range(20)]
    (recipe.parent / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (record,) = answers_in(train.run(load_recipe(recipe, ["data.validation=0.3"])))
    assert {(one.request[:2], one.turns_before, one.turns_after) for one in record.answers} == {("C?", 2, 0)}


def test_nothing_is_asked_again_after_a_failure() -> None:
    notes: list[str] = []
    asking = SampleAnswers(SimpleNamespace(tokenizer=None), lambda *_: None, notes.append, lambda *_: None)  # type: ignore[arg-type]
    for _ in range(2):
        asking.on_evaluate(None, TrainerState(), TrainerControl(), model=None)  # type: ignore[arg-type]
    assert len(notes) == 1


def test_a_row_whose_prompt_leaves_no_position_is_not_asked_and_others_end_where_positions_do(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(training=STEPS), ["training.sample_answers=2"])
    seen: list[tuple[int, int]] = []
    original = sample_answers.answers_to

    def note(model, prompts, limits, *rest, **named):
        seen.extend(zip(map(len, prompts), limits, strict=True))
        return original(model, prompts, limits, *rest, **named)

    monkeypatch.setattr(sample_answers, "answers_to", note)
    train.run(recipe)
    shorter, longer = sorted({length for length, _ in seen})
    seen.clear()
    monkeypatch.setattr(sample_answers, "positions_left", lambda model: longer)
    train.run(recipe)
    assert seen
    assert all(length == shorter and limit <= longer - shorter for length, limit in seen)


@pytest.mark.parametrize("fails", [False, True])
def test_numbers_are_as_before_also_when_an_answer_fails(fails: bool) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with suppress(ValueError), sample_answers._numbers_kept(torch.device("cpu")):
        random.random()
        np.random.rand()
        torch.rand(1)
        if fails:
            raise ValueError
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_only_the_model_s_own_card_is_asked_for_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns where it takes all of several cards."""
    given: list[list[torch.device]] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: given.append(devices) or nullcontext())
    for device in ("cuda:1", "cpu"):
        with sample_answers._numbers_kept(torch.device(device)):
            pass
    assert given == [[torch.device("cuda:1")], []]


def test_rows_that_ask_the_same_stay_apart_in_the_report() -> None:
    same = [SampleAnswer(f"rows:{row}", "Go on", "Yes", f"answer of row {row}") for row in (1, 2)]
    page = answers_over_time([AnswersRecord(step, 4, 0.5, 1.0, tuple(same)) for step in (2, 4)])
    assert page.count("<h3>") == 2
    assert len(re.findall(r"<td[^>]*>2 to 4</td>", page)) == 2


def test_an_answer_that_ends_with_an_ellipsis_of_itself_was_not_cut() -> None:
    def heading(is_cut: bool | None) -> str:
        return answers_text(AnswersRecord(2, 9, 0.2, 1.0, (SampleAnswer("r", "Q", "A", "So …", is_cut),))).splitlines()[
            0
        ]

    cut = "step 2: what it answers now; 1 of 1 was cut at the limit"
    assert [heading(told) for told in (None, True, False)] == [cut, cut, "step 2: what it answers now"]


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ([True, True], "2 of 2 were cut when the time for answers was over"),
        ([False, False], "2 of 2 were cut at the limit of tokens"),
        ([True, False], "2 of 2 were cut, 1 of them when the time for answers was over"),
        ([None, None], "2 of 2 were cut at the limit"),  # of an older version
    ],
)
def test_which_limit_has_cut_answers_is_said(late: list[bool | None], said: str) -> None:
    answers = tuple(SampleAnswer("r", "Q", "A", "So…", is_cut=True, is_late=one) for one in late)
    assert answers_text(AnswersRecord(2, 9, 0.2, 1.0, answers)).splitlines()[0] == (
        f"step 2: what it answers now; {said}"
    )


def test_an_answer_that_took_too_long_is_kept_as_such(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample_answers.SampleAnswers.__init__, "__kwdefaults__", {"seconds": 1e-9})
    monkeypatch.setattr(sample_answers, "find_ends", lambda *_: Ends((), 0))  # nothing ends an answer
    run_dir = train.run(load_recipe(write_recipe(training=STEPS), ["training.sample_answers=2"]))
    kept = [
        one
        for record in read_metrics(run_dir.metrics_file)
        if isinstance(record, AnswersRecord)
        for one in record.answers
    ]
    assert kept
    assert all(one.was_cut and one.is_late for one in kept)
    assert "were cut when the time for answers was over" in capsys.readouterr().err


def test_a_long_question_is_shown_with_its_end() -> None:
    long = f"Here is a text: {'word ' * 200}What is its last word?"
    record = AnswersRecord(2, 9, 0.2, 1.0, (SampleAnswer("rows:1", long, "word", "word"),))
    asked = answers_text(record).splitlines()[1]
    assert "Here is a text" in asked
    assert asked.endswith("What is its last word?")
    assert len(asked) == len("  asked   ") + 100


def test_what_may_take_long_between_two_steps_is_said_as_it_begins(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first evaluation, of which nobody knows how long it will take; quick ones after it are not spoken of."""
    train.run(load_recipe(write_recipe(training="steps = 2\nbatch_size = 2\neval_every = 1\nrehearse = true")))
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" …")]
    asking = [f"step {step}: asking 2 validation rows …" for step in (1, 2)]
    assert said[-4:] == [
        "rehearsing once what the run will do …",
        "step 1: measuring the validation loss …",
        *asking,
    ]
