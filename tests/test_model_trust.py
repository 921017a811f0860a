"""Python code that comes with a model runs where somebody at this computer has agreed to it, and nowhere else."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_warm_qtune
from export_models import tiny_run

from qtune.check import check
from qtune.errors import InputError, ModelError, VerificationError
from qtune.export.export import Options, export_run
from qtune.memory.profile import profile
from qtune.model.load import load_config
from qtune.model.trust import FILE, code_hash, config_folder, grant_for
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model
from qtune.report.page import trace_memory, write_report
from qtune.run.folder import RunDir
from qtune.training import train
from qtune.tuned.chat import open_session
from qtune.tuned.evaluate import evaluate


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the code writes when it runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def run(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run from somebody else: its recipe trusts, and its base has code that writes a file."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = tiny_run(tmp_path)
    base = tmp_path / "base"
    marks = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    (base / "configuration_own.py").write_text(
        f"{marks}from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (base / "modeling_own.py").write_text(
        f"{marks}from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    text = made.resolved_file.read_text().replace("[model]", "[model]\ntrust_remote_code = true")
    made.write_text(made.resolved_file, text)
    return made


def trained(run: RunDir) -> object:
    return train.run(load_recipe(run.resolved_file, [f"output.directory={run.path.parent / 'runs'}"]))


VERBS: dict[str, Callable[[RunDir], object]] = {
    "config": lambda run: load_config(Model(base=str(run.path.parent / "base"), trust_remote_code=True)),
    "eval": evaluate,
    "chat": lambda run: open_session(str(run.path)),
    "chat with the base": lambda run: open_session(str(run.path), adapter=False),
    "export": lambda run: export_run(run, Options()),
    "the adapter alone": lambda run: export_run(run, Options(adapter_only=True)),
    "check": lambda run: check(load_recipe(run.resolved_file)).require(),
    "profile": lambda run: profile(load_recipe(run.resolved_file), None, None),
    "run": trained,
}


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_somebody_elses_recipe_does_not_run(verb: str, run: RunDir, ran: Path) -> None:
    with pytest.raises(InputError, match=r"a recipe cannot agree to it for you; .* say --trust-remote-code once"):
        VERBS[verb](run)
    assert not ran.exists()


def test_a_report_goes_on_without_running_it(run: RunDir, ran: Path) -> None:
    trace_memory(run)
    assert "a recipe cannot agree to it for you" in write_report(run).read_text()
    assert not ran.exists()


def test_code_runs_where_this_computer_has_agreed_to_it(run: RunDir, ran: Path) -> None:
    base = run.path.parent / "base"
    grant_for(str(base), None)
    load_config(Model(base=str(base), trust_remote_code=True))
    assert ran.exists()
    assert json.loads((config_folder() / FILE).read_text()) == {code_hash(base): str(base)}


def test_other_code_under_the_same_name_is_asked_again(run: RunDir, ran: Path) -> None:
    base = run.path.parent / "base"
    grant_for(str(base), None)
    with (base / "modeling_own.py").open("a") as file:
        file.write("\n# one more line\n")
    with pytest.raises(ModelError, match="a recipe cannot agree to it for you"):
        open_session(str(run.path))
    assert not ran.exists()


def test_the_same_code_in_another_folder_is_agreed_to(run: RunDir, tmp_path: Path) -> None:
    base = tmp_path / "base"
    grant_for(str(base), None)
    shutil.copytree(base, tmp_path / "moved")
    load_config(Model(base=str(tmp_path / "moved"), trust_remote_code=True))


def test_consent_is_not_read_from_a_runs_folder(run: RunDir, ran: Path) -> None:
    code = str(code_hash(run.path.parent / "base"))
    for folder in (run.path, run.adapter, run.path.parent / "base"):
        (folder / FILE).write_text(json.dumps({code: "anyone"}))
    with pytest.raises(ModelError, match="a recipe cannot agree to it for you"):
        open_session(str(run.path))
    assert not ran.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_a_damaged_list_of_consent_agrees_to_nothing(text: str, run: RunDir, ran: Path) -> None:
    config_folder().mkdir(parents=True)
    (config_folder() / FILE).write_text(text)
    with pytest.raises(ModelError, match="a recipe cannot agree to it for you"):
        open_session(str(run.path))
    assert not ran.exists()


def test_an_exported_folder_with_other_code_is_not_run_when_it_is_verified(run: RunDir, ran: Path) -> None:
    from qtune.export.export import verify_only

    grant_for(str(run.path.parent / "base"), None)
    folder = export_run(run, Options())
    ran.unlink()
    marker = ran.with_name("other-code-ran")
    (folder / "modeling_own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with pytest.raises(VerificationError, match="a recipe cannot agree to it for you"):
        verify_only(folder, run)
    assert not marker.exists()


@pytest.mark.parametrize(("answer", "agrees"), [("yes", True), ("", False), ("no", False), ("y", False)])
def test_a_person_at_a_terminal_is_asked(
    answer: str, agrees: bool, run: RunDir, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    model = Model(base=str(run.path.parent / "base"), trust_remote_code=True)
    if agrees:
        load_config(model)
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a second time"))
        load_config(model)
    else:
        with pytest.raises(ModelError, match="a recipe cannot agree to it for you"):
            load_config(model)
    assert ran.exists() == agrees
    assert sys.stdin is not None


@pytest.mark.slow
def test_the_command_agrees_once(run: RunDir, ran: Path) -> None:
    asked = ("chat", run.path, "-p", "Hello", "--max-new-tokens", "1")
    done = run_warm_qtune(*asked)
    assert (done.returncode, ran.exists()) == (2, False)
    assert "a recipe cannot agree to it for you" in done.stderr
    done = run_warm_qtune(*asked, "--trust-remote-code")
    assert (done.returncode, ran.exists()) == (0, True), done.stderr
    assert run_warm_qtune(*asked).returncode == 0


def test_a_model_that_is_talked_to_alone_needs_no_second_consent(run: RunDir, ran: Path) -> None:
    base = str(run.path.parent / "base")
    grant_for(base, None)
    open_session(base)
    assert ran.exists()


def test_a_model_that_is_talked_to_alone_runs_no_code_that_nobody_agreed_to(run: RunDir, ran: Path) -> None:
    with pytest.raises(ModelError):
        open_session(str(run.path.parent / "base"))
    assert not ran.exists()


def test_consent_to_a_hub_model_is_to_one_commit(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from qtune.model.trust import is_granted, trusted_revision

    hub = tmp_path / "hub" / "models--owner--name"
    old, new = "0" * 40, "1" * 40
    for commit in (old, new):
        shutil.copytree(tmp_path / "base", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(old)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match=rf"owner/name: brings Python code of its own \(commit {old}\)"):
        trusted_revision("owner/name", None)
    grant_for("owner/name", None)
    # Whatever "main" is when the weights are fetched: what was agreed to is what runs.
    assert trusted_revision("owner/name", None) == old
    assert is_granted("owner/name", None)
    assert not is_granted("owner/other", None)
    (hub / "refs" / "main").write_text(new)
    with pytest.raises(ModelError, match=rf"\(commit {new}\)"):
        trusted_revision("owner/name", None)
    assert not is_granted("owner/name", None)
    assert trusted_revision("owner/name", old) == old


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_that_names_code_of_another_repository_is_refused_by_name(
    run: RunDir, ran: Path, nested: bool
) -> None:
    """Such code can change at any time, and a consent to the folder would not notice."""
    base = run.path.parent / "base"
    file = base / ("tokenizer_config.json" if nested else "config.json")
    named = "owner/repository--modeling_own.OwnForCausalLM"
    auto_map = {"AutoTokenizer": [None, named]} if nested else {"AutoModelForCausalLM": named}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    said = f"{file.name}: its auto_map imports '{named}', code of another repository"
    with pytest.raises(ModelError, match=said):
        grant_for(str(base), None)
    with pytest.raises(ModelError, match=said):
        load_config(Model(base=str(base), trust_remote_code=True))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_hub_model_that_names_code_of_a_second_repository_is_refused_with_both_names(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Consent is to a commit of the first; the second would be taken as it is on that day."""
    from huggingface_hub import constants

    from qtune.model.trust import trusted_revision

    hub, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    shutil.copytree(tmp_path / "base", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = hub / "snapshots" / commit / name
    before = json.loads(file.read_text())

    def naming(reference: str) -> None:
        file.write_text(json.dumps(before | {"auto_map": {"AutoTokenizer": [None, reference]}}))

    naming("owner/name--modeling_own.OwnForCausalLM")  # its own, at its own commit
    grant_for("owner/name", None)
    assert trusted_revision("owner/name", None) == commit
    naming("other/code--modeling_own.OwnForCausalLM")
    said = rf"owner/name, {name}: its auto_map imports 'other/code--modeling_own.OwnForCausalLM', code of another"
    for ask in (trusted_revision, grant_for):
        with pytest.raises(ModelError, match=said):
            ask("owner/name", None)
