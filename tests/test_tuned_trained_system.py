"""`qtune chat` offers the system message that training used."""

import json
from pathlib import Path

import pytest
from chat_families import TEMPLATES
from conftest import run_warm_qtune
from export_models import tiny_run

from qtune.recipe.schema import Data, HubSource
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe
from qtune.tuned.chat import command, open_session
from qtune.tuned.trained_system import usual_system

TALK = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "Stop."}]


def rows_with(folder: Path, *systems: str | None) -> Data:
    rows = [
        {"messages": TALK} if text is None else {"messages": [{"role": "system", "content": text}, *TALK]}
        for text in systems
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(train="rows.jsonl")


@pytest.mark.parametrize(
    ("systems", "usual"),
    [
        (("Be brief.",) * 3, "Be brief."),
        (("Be brief.", "Be brief.", "Be kind."), "Be brief."),
        (("Be brief.", "Be kind."), ""),
        (("Be brief.", None, None), ""),
        ((None,), ""),
    ],
)
def test_what_most_rows_have_is_usual(tmp_path: Path, systems: tuple[str | None, ...], usual: str) -> None:
    assert usual_system(rows_with(tmp_path, *systems), tmp_path) == usual


def test_the_policy_of_the_recipe_counts_and_rows_that_are_gone_say_nothing(tmp_path: Path) -> None:
    data = rows_with(tmp_path, "Be brief.")
    assert usual_system(data.model_copy(update={"system": "drop"}), tmp_path) == ""
    assert usual_system(data.model_copy(update={"train": "gone.jsonl"}), tmp_path) is None


def test_no_data_set_is_fetched_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[object] = []
    monkeypatch.setattr("qtune.data.sources.load_dataset", lambda *names, **options: fetched.append(names) or [])
    data = rows_with(tmp_path, "Be brief.")
    for train in ("hub:owner/rows", HubSource(hub="owner/rows"), ("rows.jsonl", "hub:owner/rows")):
        assert usual_system(data.model_copy(update={"train": train}), tmp_path) is None
    assert fetched == []


def test_columns_and_other_shapes_are_read_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Red?", "a": "Stop.", "system": "Be brief."}\n')
    data = Data(train="rows.jsonl", columns={"question": "q", "answer": "a"})
    assert usual_system(data, tmp_path) == "Be brief."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("told")
    made = tiny_run(folder, data='chat_template = "chatml"')
    rows_with(folder, *["Be brief."] * 4)
    return made


def test_it_is_set_when_it_is_asked_for(run: RunDir) -> None:
    session = open_session(str(run.path))
    assert (session.system, session.trained_system) == (None, "Be brief.")
    session.turns = [{"role": "user", "content": "x"}]
    assert command(session, "/trained").startswith("the training rows' system message is set")
    assert (session.system, session.turns) == ("Be brief.", [])
    session.trained_system = None
    gone = "no training rows can be read from here, so that their system message is not known"
    assert command(session, "/trained") == gone
    session.trained_system = ""
    none = "the training rows have no system message that most of them share"
    assert command(session, "/trained") == none
    assert command(session, "/system") == "no system message, conversation forgotten"
    session.tokenizer.chat_template = (TEMPLATES / "smollm2.jinja").read_text()
    writes = (
        "; where none is set, the chat template writes: "
        '"You are a helpful AI assistant named SmolLM, trained by Hugging Face"'
    )
    assert command(session, "/trained") == none + writes
    assert command(session, "/system") == f"no system message, conversation forgotten{writes}"


@pytest.mark.slow
def test_chat_says_that_it_loads_and_what_it_offers(run: RunDir) -> None:
    process = run_warm_qtune("chat", run.path, "--prompt", "Hi", "--max-new-tokens", "2")
    assert process.returncode == 0
    base = resolved_recipe(run).model.base
    assert f"loading {base} …\n" in process.stderr
