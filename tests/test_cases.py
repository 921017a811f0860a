"""Inputs from public reports that other trainers get wrong in silence; each is `tests/cases/NAME`, and what is right.

They are looked at with the built-in model's tokenizer and template, as a user's `qtune check` would.
"""

import io
import json
from pathlib import Path

import pytest
import torch
from conftest import run_qtune, run_warm_qtune
from export_models import tiny_base
from rich.console import Console
from transformers import AutoTokenizer

from qtune.check import Check, check
from qtune.errors import DataError, GateError, ModelError
from qtune.export.export import Options, export_run
from qtune.lfs import ADVICE
from qtune.model.builtin import builtin_folder
from qtune.recipe.file import load_recipe
from qtune.screens.check import draw_check
from qtune.training import train
from qtune.training.trainer import QloraTrainer
from qtune.tuned.chat import open_session

CASES = Path(__file__).parent / "cases"
CHAT = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOLS = (
    "{{ '<|im_start|>system\\nSignatures: ' }}"
    "{%- for t in tools or [] %}{{ t | tojson }}{%- endfor %}{{ '<|im_end|>\\n' }}"
)


@pytest.fixture(autouse=True)
def untraced(monkeypatch):
    """Nothing here is about memory."""
    monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "not asked")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random Llama with the built-in model's tokenizer and template."""
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder: Path, change=lambda tokenizer: None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("smollm2-135m-instruct"))
    known = len(tokenizer)
    change(tokenizer)
    tiny_base(folder, vocab_size=known, intermediate_size=192)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(folder: Path, base: Path, rows: str, data: str = "", extra: str = "") -> Path:
    file = folder / "recipe.toml"
    file.write_text(
        f'[model]\nbase = "{base}"\n[quantization]\nminimum_share = 0\ncompute_dtype = "float32"\n'
        f'[data]\ntrain = "{CASES / rows}"\nvalidation = 0\nmax_length = 256\n{data}\n'
        f'[training]\nsteps = 4\nbatch_size = 4\neval_every = "never"\n{extra}\n'
        f'[output]\ndirectory = "{folder / "runs"}"\n'
    )
    return file


def examined(folder: Path, base: Path, rows: str, data: str = "", **keys) -> Check:
    return check(load_recipe(recipe_for(folder, base, rows, data)), **keys)


def found(result: Check) -> set[str]:
    return {finding.kind for finding in result.findings} - {"few-rows"}


def texts(result: Check) -> list[str]:
    """The rows as they are learned, what is scored between ⟦ and ⟧."""
    return [
        "".join(f"⟦{piece.text}⟧" if piece.scored else piece.text for piece in row.pieces) for row in result.samples
    ]


def screen(result: Check) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, soft_wrap=True, highlight=False).print(draw_check(result))
    return stream.getvalue()


def test_a_system_message_between_turns_stays_where_it_is(tmp_path, base):
    result = examined(tmp_path, base, "midsystem.jsonl")
    result.require()
    assert found(result) == set()
    (first, *_) = texts(result)
    assert first.index("It means stop.") < first.index("The clock now says 0:00.") < first.index("What time is it?")
    assert first.startswith("<|im_start|>system\nYou are a helpful AI assistant")


@pytest.mark.slow
def test_reasoning_that_the_template_does_not_print_is_an_error_with_a_template_that_does(tmp_path, base):
    result = examined(tmp_path, base, "reasoning.jsonl")
    with pytest.raises(GateError) as caught:
        result.require()
    assert "reasoning-lost: 2 of 2 train rows" in str(caught.value)
    assert '[data] chat_template = "chatml" would print it' in str(caught.value)
    learned = examined(tmp_path, base, "reasoning.jsonl", 'chat_template = "chatml"')
    learned.require()
    assert "I recall it.\n</think>\n\n" in texts(learned)[0].partition("⟦")[2]


def test_calls_and_tools_that_the_template_does_not_print_are_errors(tmp_path, base):
    result = examined(tmp_path, base, "toolcalls.jsonl")
    assert {finding.kind for finding in result.stopping} == {"tool-call-lost", "tools-lost"}
    with pytest.raises(GateError, match="would learn to end its turn instead"):
        result.require()


def test_the_built_in_chatml_prints_calls_and_tools(tmp_path, base):
    result = examined(tmp_path, base, "toolcalls_chatml.jsonl", 'chat_template = "chatml"')
    result.require()
    (first, *_) = texts(result)
    assert '"description": "Current weather"' in first
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "red"}}\n</tool_call>'
    assert f"⟦One moment.\n{call}⟧" in first
    assert found(result) == set()


def test_a_loss_of_false_is_heeded(tmp_path, base):
    result = examined(tmp_path, base, "lossfalse.jsonl")
    result.require()
    (first, *_) = texts(result)
    assert "\nI refuse to say." in first
    assert "⟦It means stop.⟧" in first


def test_a_rendered_chat_is_recognized_and_not_closed_twice(tmp_path, base):
    result = examined(tmp_path, base, "text.jsonl")
    result.require()
    assert found(result) == {"rendered-chat"}
    ids = result.prepared.train[0]["input_ids"]
    tokenizer = result.prepared.tokenizer
    assert tokenizer.decode(ids) == json.loads((CASES / "text.jsonl").read_text().splitlines()[0])["text"]


@pytest.mark.slow
def test_indentation_that_a_template_trims_is_a_changed_answer(tmp_path, base):
    result = examined(tmp_path, base, "indent.jsonl", f'chat_template = "{CASES / "trims.jinja"}"')
    with pytest.raises(GateError, match="answer-changed: 2 of 2 train rows"):
        result.require()
    kept = examined(tmp_path, base, "indent.jsonl")
    kept.require()
    assert "⟦    if x:\n        return 'stop'\n    return None⟧" in texts(kept)[0]


def test_turns_out_of_order_are_refused_with_their_place_and_two_other_ways(tmp_path, base):
    with pytest.raises(DataError) as caught:
        examined(tmp_path, base, "consecutive.jsonl").require()
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(":1: turns out of order: messages[1] is user after user; expected assistant")
    assert lines[1].endswith(":2: turns out of order: messages[0] is assistant first; expected system or user")
    assert lines[2].endswith(":3: the last turn (conversations[2]) is user's; expected an assistant turn to learn")
    assert 'on_turn_order = "merge" joins turns of one role and keeps such rows, "drop" leaves them out' in lines[3]


@pytest.mark.slow
def test_turns_out_of_order_are_merged_or_dropped_with_counts(tmp_path, base):
    merged = examined(tmp_path, base, "consecutive.jsonl", 'on_turn_order = "merge"')
    merged.require()
    assert found(merged) == {"merged-turns", "opening-answer", "unanswered-turn"}
    assert all("1 of 3 train rows" in finding.sentence for finding in merged.findings if finding.kind != "few-rows")
    dropped = examined(tmp_path, base, "consecutive.jsonl", 'on_turn_order = "drop"')
    (finding,) = [finding for finding in dropped.findings if finding.kind == "out-of-order"]
    assert (finding.count, finding.total) == (3, 3)


def test_a_table_with_semicolons_is_read(tmp_path, base):
    result = examined(tmp_path, base, "semicolon.csv", samples=6)
    result.require()
    assert len(result.prepared.train) == 6
    assert sum("What does red mean?" in text and "⟦stop⟧" in text for text in texts(result)) == 1


@pytest.fixture(scope="module")
def two_templates(tmp_path_factory) -> Path:
    def change(tokenizer):
        tokenizer.chat_template = {"default": CHAT, "tool_use": TOOLS + CHAT}

    return make_base(tmp_path_factory.mktemp("multi"), change)


@pytest.mark.slow
def test_rows_without_tools_use_the_default_of_several_templates(tmp_path, two_templates):
    result = examined(tmp_path, two_templates, "colours.jsonl")
    result.require()
    assert all(text.startswith("<|im_start|>user\n") for text in texts(result))
    assert 'Chat template: the tokenizer\'s "default", "tool_use" for rows with tools' in screen(result)


@pytest.mark.slow
def test_all_templates_of_a_tokenizer_are_exported(tmp_path, two_templates):
    finished = train.run(load_recipe(recipe_for(tmp_path, two_templates, "colours.jsonl")))
    folder = export_run(finished, Options())
    exported = AutoTokenizer.from_pretrained(folder).chat_template
    assert exported == {"default": CHAT, "tool_use": TOOLS + CHAT}


def test_a_name_of_a_module_that_matches_nothing_is_refused_with_the_nearest(tmp_path, base):
    file = recipe_for(tmp_path, base, "colours.jsonl", extra='[adapter]\ntarget_modules = ["q_proj", "v_porj"]')
    with pytest.raises(ModelError, match=r"'v_porj': no module of .* is called so; did you mean 'v_proj'\?"):
        check(load_recipe(file)).require()
    with pytest.raises(ModelError, match="'v_porj'"):
        train.run(load_recipe(file))
    assert not (tmp_path / "runs").exists()  # it is said before a folder is made


@pytest.mark.slow
def test_more_tokens_than_embeddings_are_noticed_and_a_typed_one_is_one_error(tmp_path, tmp_path_factory):
    def change(tokenizer):
        tokenizer.add_tokens(["<|coef|>", "<|/coef|>"], special_tokens=True)

    added = make_base(tmp_path_factory.mktemp("added"), change)
    result = examined(tmp_path, added, "colours.jsonl")
    result.require()
    (finding,) = [finding for finding in result.findings if finding.kind == "tokens-without-embedding"]
    assert finding.detail == "49154 against 49152; <|coef|>, <|/coef|> have none"
    session = open_session(str(added))
    session.max_new_tokens = 12
    with pytest.raises(DataError) as caught:
        session.ask("Encode <|coef|>x", lambda text: None)
    assert str(caught.value).startswith("the message: holds <|coef|> (49152), and the model has embeddings for 49152")


@pytest.mark.slow
def test_the_system_prompt_of_a_run_is_the_default_of_its_export(tmp_path, base):
    prompt = "Answer in one word, in capital letters."
    file = recipe_for(tmp_path, base, "colours.jsonl", f'system_prompt = "{prompt}"')
    folder = export_run(train.run(load_recipe(file)), Options())
    question = [{"role": "user", "content": "What does red mean?"}]
    asked = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    )
    assert asked == (
        f"<|im_start|>system\n{prompt}<|im_end|>\n"
        "<|im_start|>user\nWhat does red mean?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt in (folder / "README.md").read_text()


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.slow
def test_a_folder_of_splits_trains_its_train_split(tmp_path, base, bad_rows):
    result = examined(tmp_path, base, "datasetdict", f'on_bad_row = "{bad_rows}"', samples=6)
    result.require()
    assert len(result.prepared.train) == 6
    assert not any("SECRET TEST" in text for text in texts(result))
    assert "datasetdict (train split)" in screen(result)


@pytest.mark.slow
def test_weights_that_are_a_pointer_are_said(tmp_path, tmp_path_factory):
    pointer = make_base(tmp_path_factory.mktemp("lfs"))
    file = pointer / "model.safetensors"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060280\n")
    with pytest.raises(ModelError) as caught:
        examined(tmp_path, pointer, "colours.jsonl").require()
    assert str(caught.value) == f"{file}: {ADVICE}"


@pytest.mark.slow
def test_steps_are_those_that_the_run_will_take(tmp_path, base):
    file = recipe_for(tmp_path, base, "say.jsonl")
    file.write_text(file.read_text().replace("steps = 4", "epochs = 0.05"))
    resolved = load_recipe(file)
    assert check(resolved).batches.steps == 1
    finished = train.run(resolved)
    (record,) = [
        one for one in map(json.loads, finished.metrics_file.read_text().splitlines()) if one["kind"] == "train"
    ]
    assert (record["steps"], record["learning_rate"] > 0) == (1, True)


@pytest.mark.slow
def test_a_run_whose_loss_becomes_no_number_names_no_checkpoint_that_is_not_there(tmp_path, base, monkeypatch):
    file = recipe_for(tmp_path, base, "say.jsonl")
    real = QloraTrainer.compute_loss

    def diverging(self, *args, **kwargs):
        return real(self, *args, **kwargs) * (float("nan") if self.state.global_step else 1.0)

    monkeypatch.setattr(QloraTrainer, "compute_loss", diverging)
    with pytest.raises(Exception, match=r"training has diverged\. Lower training\.learning_rate .*, and begin again$"):
        train.run(load_recipe(file))


def test_control_characters_of_a_row_do_not_reach_the_terminal_and_markup_stays(tmp_path, base, capsys):
    from qtune import console

    result = examined(tmp_path, base, "markup.jsonl", 'on_bad_row = "skip"')
    result.require()
    console.out(draw_check(result))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[/INST] stop [red] [link=x] \\x1b[31m esc" in shown
    assert "[INST] [bold]red[/bold] [/INST] <script>alert(1)</script>" in shown


def test_an_answer_of_nothing_but_invisible_characters_is_empty(tmp_path, base):
    with pytest.raises(DataError) as caught:
        examined(tmp_path, base, "invisible.jsonl").require()
    message = "completion is empty: nothing but characters that cannot be seen (U+200B, U+FEFF)"
    assert [problem.message for problem in caught.value.problems[:2]] == [message, message]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_right_merge_verifies_in_whatever_dtype_training_computed(tmp_path, base, dtype):
    file = recipe_for(tmp_path, base, "colours.jsonl")
    file.write_text(file.read_text().replace('compute_dtype = "float32"', f'compute_dtype = "{dtype}"'))
    runs = tmp_path / "runs" / "recipe"
    assert run_warm_qtune("run", file).returncode == 0
    export = run_qtune if dtype == "float32" else run_warm_qtune
    assert export("export", runs).returncode == 0
    proof = json.loads((runs / "model" / "verify.json").read_text())
    assert (proof["verified"], proof["compute_dtype"]) == (True, dtype)
    # Compared in float32: what bfloat16 alone changes stands beside it, and is far more than what the merge does.
    assert proof["exported"]["kl"] < 1e-4
    if dtype == "bfloat16":
        assert proof["live"]["kl"] > 10 * proof["exported"]["kl"]


# --- the same kinds in other words -----------------------------------------------------------------------------------


def named_base(tmp_path_factory, **templates) -> Path:
    def change(tokenizer):
        tokenizer.chat_template = templates

    return make_base(tmp_path_factory.mktemp("named"), change)


@pytest.mark.slow
def test_a_template_for_documents_beside_the_default_is_kept_and_may_be_named(tmp_path, tmp_path_factory):
    rag = "{{ '<|im_start|>system\\nSources:<|im_end|>\\n' }}" + CHAT
    named = named_base(tmp_path_factory, default=CHAT, rag=rag)
    assert all("Sources:" not in text for text in texts(examined(tmp_path, named, "colours.jsonl")))
    # Rows with tools have no template of their own here, and the default prints no tools.
    with_tools = examined(tmp_path, named, "toolcalls_chatml.jsonl")
    assert "tools-lost" in {finding.kind for finding in with_tools.stopping}
    chosen = examined(tmp_path, named, "colours.jsonl", 'chat_template = "rag"')
    assert all("Sources:" in text for text in texts(chosen))
    assert 'Chat template: the tokenizer\'s "rag"' in screen(chosen)


@pytest.mark.slow
def test_several_templates_without_a_default_are_asked_about(tmp_path, tmp_path_factory):
    named = named_base(tmp_path_factory, rag=CHAT, tool_use=TOOLS + CHAT)
    with pytest.raises(DataError) as caught:
        examined(tmp_path, named, "colours.jsonl").require()
    assert str(caught.value) == (
        "data.chat_template: is not set, and the tokenizer has the templates rag, tool_use but no default; "
        "name one of them"
    )
    examined(tmp_path, named, "colours.jsonl", 'chat_template = "rag"').require()


@pytest.mark.slow
def test_padding_and_rows_outside_of_the_embedding_stop_a_run(tmp_path, tmp_path_factory):
    def change(tokenizer):
        tokenizer.add_tokens(["<|extra|>"])
        tokenizer.pad_token = "<|extra|>"

    added = make_base(tmp_path_factory.mktemp("padding"), change)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is <|extra|>?", "completion": "A token."}\n')
    result = examined(tmp_path, added, str(rows))
    findings = [finding for finding in result.stopping if finding.kind == "out-of-vocabulary"]
    assert findings[0].detail == "the padding, <|extra|>, is token 49152; the model has 49152"
    assert findings[1].places == (f"{rows}:1",)


def test_a_generated_token_that_the_tokenizer_does_not_know_is_one_error(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roomy")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("smollm2-135m-instruct"))
    tiny_base(folder, vocab_size=len(tokenizer) + 64, intermediate_size=192, tie_word_embeddings=False)
    tokenizer.save_pretrained(folder)
    session = open_session(str(folder))
    head = session.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        session.model.get_input_embeddings().weight.abs_()
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features, dtype=head.weight.dtype))
        head.bias[len(tokenizer) + 7] = 9
    session.max_new_tokens = 3
    with pytest.raises(DataError) as caught:
        session.ask("Hello", lambda text: None)
    assert str(caught.value).startswith(f"the answer: holds token {len(tokenizer) + 7}, which the tokenizer does not")
    assert not session.turns


@pytest.mark.parametrize(
    ("mapped", "advice"), [("anwser", "did you mean 'answer'?"), ("xyz", "found answer, question")]
)
@pytest.mark.slow
def test_a_mapping_to_a_column_that_no_row_has_is_refused_with_the_nearest(tmp_path, base, mapped, advice):
    rows = tmp_path / "qa.jsonl"
    rows.write_text('{"question": "What does red mean?", "answer": "stop"}\n' * 3)
    with pytest.raises(DataError) as caught:
        examined(tmp_path, base, str(rows), f'columns = {{ prompt = "question", completion = "{mapped}" }}').require()
    # Alone: that the columns "fit no known shape" is the same mistake once more.
    assert str(caught.value) == f"data.columns.completion: no row of {rows} has a column {mapped!r}; {advice}"
    # Also where the rows are usable without it.
    with pytest.raises(DataError, match=f"data.columns.system: no row of {rows} has a column '{mapped}'"):
        examined(tmp_path, base, str(rows), f'columns = {{ system = "{mapped}" }}').require()
