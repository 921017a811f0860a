"""`qtune chat`: streamed answers, a history that is kept and fitted, the adapter on and off."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtune.adapter.state import save_adapter
from qtune.errors import DataError, ModelError, RunError
from qtune.model.builtin import builtin_folder
from qtune.run.folder import RunDir
from qtune.tuned import chat as stage
from qtune.tuned.chat import Session, answered, chat, command, context_length, open_session, typed_lines
from qtune.tuned.generate import Ends, Generated, find_ends, generate


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A small random Llama with the real tokenizer and room for 200 positions."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("smollm2-135m-instruct"))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=0.4, eos_token_id=2, max_position_embeddings=200, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_model) -> RunDir:
    """A finished run with a p-tuning adapter, as `qtune run` leaves it; its training rows are gone."""
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    recipe = {
        "model": {"base": str(tiny_model)},
        "quantization": {"kind": "none"},
        "adapter": {"kind": "p-tuning", "virtual_tokens": 7},
        "data": {"train": "gone.jsonl", "system_prompt": "Be brief."},
    }
    lines = [
        f"[{table}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in keys.items()) for table, keys in recipe.items()
    ]
    run_dir.write_text(run_dir.resolved_file, "\n".join(lines))
    torch.manual_seed(1)
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=16)
    save_adapter(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).eval(), run_dir.adapter)
    return run_dir


@pytest.fixture
def session(tiny_model) -> Session:
    """A session with the tiny model and a LoRA adapter of random weights."""
    session = open_session(str(tiny_model))
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    session.model = get_peft_model(session.model, config).eval()
    session.max_new_tokens = 12
    return session


def answer_of(session: Session, messages: list[dict[str, str]]) -> str:
    """The greedy answer by way of the tokenizer's own chat template."""
    ids = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (made,) = generate(session.model, [ids], [session.max_new_tokens], session.ends)
    return session.tokenizer.decode(made, skip_special_tokens=True).strip()


def test_what_is_streamed_is_the_answer(session):
    pieces: list[str] = []
    answer = session.ask("Hello", pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer == answer_of(session, [{"role": "user", "content": "Hello"}])


def test_the_model_sees_the_whole_conversation(session):
    first = session.ask("Hello", lambda _: None)
    second = session.ask("And?", lambda _: None)
    said = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
    ]
    assert second == answer_of(session, said)
    assert session.turns == [*said, {"role": "assistant", "content": second}]


def test_the_system_message_leads_every_prompt(session):
    session.system = "Be rude."
    answer = session.ask("Hello", lambda _: None)
    said = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hello"}]
    assert answer == answer_of(session, said)


@pytest.mark.slow
def test_the_oldest_turns_are_forgotten_when_the_context_is_full(session):
    for number in range(20):
        session.ask(f"Question number {number}", lambda _: None)
    assert session.turns[0]["role"] == "user"
    assert 2 < len(session.turns) < 40
    assert session.turns[-2]["content"] == "Question number 19"
    ids = session.tokenizer.apply_chat_template(session.turns, return_dict=False)
    assert len(ids) <= 200


def test_a_question_longer_than_the_context_is_refused_and_forgotten(session):
    with pytest.raises(DataError) as caught:
        session.ask("word " * 300, lambda _: None)
    assert str(caught.value).startswith("the message: is ")
    assert str(caught.value).endswith(" tokens long; 188 are left beside 12 for the answer")
    assert session.turns == []


def test_a_soft_prompt_takes_its_part_of_the_context(run_dir):
    assert context_length(open_session(str(run_dir.path)).model) == 200 - 7


def test_a_run_is_opened_with_its_adapter_and_its_system_prompt(run_dir):
    tuned, base = open_session(str(run_dir.path)), open_session(str(run_dir.path), adapter=False)
    assert (tuned.has_adapter, base.has_adapter) == (True, False)
    assert tuned.system == base.system == "Be brief."
    tuned.max_new_tokens = base.max_new_tokens = 12
    with_adapter = tuned.ask("Hello", lambda _: None)
    without = base.ask("Hello", lambda _: None)
    assert with_adapter != without
    tuned.turns, tuned.adapter_is_on = [], False
    assert tuned.ask("Hello", lambda _: None) == without


def test_something_that_is_no_model_is_named(tmp_path):
    folder = tmp_path / "pictures" / "holidays"
    folder.mkdir(parents=True)
    with pytest.raises(ModelError) as caught:
        open_session(str(folder))
    assert str(caught.value) == f"{folder}: is neither a run (it has no resolved.toml) nor a model (no config.json)"


def test_a_mistyped_run_is_answered_with_the_runs_that_are_there(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.path.parent.parent)
    runs = run_dir.path.parent.name
    with pytest.raises(RunError) as caught:
        open_session(f"{runs}/rum")
    assert str(caught.value).startswith(f"{runs}/rum: no such folder; runs there: ")
    assert f"{runs}/{run_dir.path.name}" in str(caught.value)


def test_lines_are_answered_and_commands_obeyed(session, capsys):
    chat(session, iter(["Hello", "", "/adapter off", "Hello", "/reset", "/nonsense", "/exit", "never asked"]))
    printed = capsys.readouterr()
    with session.model.disable_adapter():
        assert session.turns == []
    first, second = printed.out.splitlines()[0], printed.out.splitlines()[-1]
    assert first
    assert second
    said = [line for line in printed.err.splitlines() if not line.startswith("cut at 12 tokens; ")]
    switched = "adapter off; it goes on from what was said so far, which /reset forgets"
    unknown = "/nonsense: no such command; /help lists all"
    assert said == [switched, "conversation forgotten", unknown]


def test_a_command_that_is_none_is_named_with_the_one_that_is_meant(session):
    assert command(session, "/rest") == "/rest: no such command; did you mean /reset? /help lists all"
    assert command(session, "/foo") == "/foo: no such command; /help lists all"
    assert command(session, "/help") == stage.HELP
    assert command(session, "/adapter") == "/adapter on, or /adapter off; it is on"
    session.turns = [{"role": "user", "content": "kept"}]
    assert command(session, "/reset all") == "/reset takes no text"
    assert session.turns


def test_the_adapter_command_changes_the_answer(session):
    on = session.ask("Hello", lambda _: None)
    session.turns = []
    assert command(session, "/adapter off") == "adapter off"
    off = session.ask("Hello", lambda _: None)
    with session.model.disable_adapter():
        assert off == answer_of(session, [{"role": "user", "content": "Hello"}]) != on


def test_a_model_without_adapter_says_so(tiny_model):
    assert command(open_session(str(tiny_model)), "/adapter on") == "there is no adapter to switch"


def test_a_new_system_message_starts_anew(session):
    session.ask("Hello", lambda _: None)
    assert command(session, "/system Be kind. Always.") == "system message set, conversation forgotten"
    assert (session.system, session.turns) == ("Be kind. Always.", [])
    # The base's own template writes one where none is given.
    assert command(session, "/system") == (
        "no system message, conversation forgotten; where none is set, the chat template writes: "
        '"You are a helpful AI assistant named SmolLM, trained by Hugging Face"'
    )
    assert session.system is None


def test_the_ends_of_an_answers_lines_are_ends_of_lines_and_commands_for_a_terminal_stay_harmless(
    session, monkeypatch, capsys
):
    pieces = ["one\r\ntwo", "\r", "\nthree\r", "four\n", "\n\x1b[2J five\tsix\x07", "\r"]
    monkeypatch.setattr(session, "ask", lambda text, emit: [emit(piece) for piece in pieces])
    answered(session, "say it")
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n\n\\x1b[2J five\tsix\\x07\n\n"


def test_stopping_an_answer_forgets_its_question_and_goes_on(session, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    ask = Session.ask
    monkeypatch.setattr(Session, "ask", lambda *given: stopped() if given[1] == "stop" else ask(*given))
    chat(session, iter(["stop", "Hello"]))
    assert [turn["content"] for turn in session.turns if turn["role"] == "user"] == ["Hello"]
    assert "this question is forgotten" in capsys.readouterr().err


def test_piped_lines_are_read_to_their_end_without_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert list(typed_lines()) == ["one", "two"]
    assert capsys.readouterr() == ("", "")


def test_who_types_is_told_what_can_be_typed_and_how_to_leave(monkeypatch, capsys):
    typed = io.StringIO("one\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    assert list(typed_lines()) == ["one"]
    assert capsys.readouterr().err == "ask something; /help lists what else can be typed, Ctrl-D leaves\n"


def test_an_answer_that_the_limit_cut_is_said_to_be_cut_and_what_allows_more(session, monkeypatch, capsys):
    session.max_new_tokens = 30
    monkeypatch.setattr(stage, "stream", lambda *given: Generated(tuple(range(50, 80)), is_whole=False))
    chat(session, iter(["Go on"]))
    assert capsys.readouterr().err == "cut at 30 tokens; --max-new-tokens allows more\n"
    again = tuple(session.tokenizer.encode(" and so on,")) * 10
    monkeypatch.setattr(stage, "stream", lambda *given: Generated(again, is_whole=False))
    chat(session, iter(["Go on"]))
    said = f'cut at {len(again)} tokens; it repeats itself and would go on so: "and so on,"\n'
    assert capsys.readouterr().err == said
    monkeypatch.setattr(stage, "stream", lambda *given: Generated(again, is_whole=True))
    chat(session, iter(["Go on"]))
    assert capsys.readouterr().err == ""


def test_an_answer_is_whole_only_where_its_end_was_said(session):
    session.ask("Hello", lambda _: None)
    assert session.cut is not None
    assert f"cut at {session.max_new_tokens} tokens" in session.cut
    session.ends = Ends(tuple(range(len(session.tokenizer))), session.ends.pad)  # whatever is said ends it
    session.ask("Hello", lambda _: None)
    assert session.cut is None


@pytest.mark.slow
def test_the_real_model_remembers_what_was_said(capsys):
    session = open_session("builtin:smollm2-135m-instruct")
    assert session.ends == find_ends(session.model, session.tokenizer)
    chat(session, iter(["What is the capital of France?"]))
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert "Paris" in session.ask("Name the city that you just mentioned.", lambda _: None)


@pytest.mark.slow
def test_one_shot_prints_the_answer_alone():
    command_line = [sys.executable, "-m", "qtune", "chat", "builtin:smollm2-135m-instruct"]
    done = subprocess.run(
        [*command_line, "--prompt", "What is the capital of France?"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "The capital of France is Paris.\n"
    # On a busy computer there is a line for each library as well.
    said = [line for line in done.stderr.splitlines() if not line.startswith("loading the libraries: ")]
    assert said == ["loading the libraries …", "loading builtin:smollm2-135m-instruct …"]
