"""Memory that runs out outside of training is one sentence, exit code 1, and loses nothing that was done."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from export_models import tiny_run
from safetensors import SafetensorError

from qtune import cli
from qtune.device.present import present_device
from qtune.errors import ModelError
from qtune.export.verification import read_proof
from qtune.run.folder import RunDir
from qtune.tuned.chat import chat, open_session

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SAID = "CUDA out of memory. Tried to allocate 64.00 KiB"
CHAT = ("chat", "{run}", "--max-new-tokens", "4", "-p", "Hi")
ERRORS = [torch.OutOfMemoryError(f"{SAID}\nand much more"), MemoryError()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return tiny_run(tmp_path_factory.mktemp("run"))


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says on stderr as it ends, after its exit code was seen to be 1."""
    monkeypatch.setattr(sys, "argv", ["qtune", *map(str, arguments)])
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    monkeypatch.setattr(cli, "use_expandable_segments", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def fails_with(error: Exception) -> Any:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=["card", "host"])
@pytest.mark.parametrize(
    ("verb", "place", "way_out"),
    [
        (("eval", "{run}"), "qtune.tuned.evaluate.row_losses", "A smaller --max-new-tokens leaves more room"),
        (("eval", "{run}"), "qtune.tuned.generate._generate_batch", "A smaller --max-new-tokens leaves more room"),
        (
            ("chat", "{run}", "--max-new-tokens", "4", "-p", "Hi"),
            "qtune.tuned.generate._generate_batch",
            "/reset forgets the conversation",
        ),
        (("export", "{run}", "--force"), "qtune.export.merged_folder.write_merge", "A merge holds the largest tensor"),
        (("export", "{run}", "--force"), "qtune.export.verify.verify.load_exported", "{run}/model is whole, and not"),
        (
            ("export", "{run}", "--force"),
            "qtune.export.verify.verify.measure",
            "{run}/model is whole, and not compared",
        ),
        (("report", "{run}"), "qtune.report.page.read_record", "Close what else takes memory, or use a larger device"),
    ],
)
def test_each_verb_says_where_what_is_free_and_a_way_out(
    verb: tuple[str, ...],
    place: str,
    way_out: str,
    error: Exception,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, fails_with(error))
    line = ended(monkeypatch, capsys, *(part.format(run=run.path) for part in verb))
    reason = SAID if str(error) else "MemoryError"
    assert line.startswith(f"error: memory ran out on {present_device().name}: {reason}; ")
    assert " GiB are free now. " in line
    assert way_out.format(run=run.path) in line


def test_an_export_that_could_not_be_compared_is_not_called_broken(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtune.export.verify.verify.load_exported", fails_with(ERRORS[0]))
    line = ended(monkeypatch, capsys, "export", run.path, "--force")
    assert f"qtune export {run.path} --verify-only {run.path}/model" in line
    assert read_proof(run.path / "model").failures == ("not compared with the trained model",)


def test_a_conversation_goes_on_after_an_answer_that_did_not_fit(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_session(str(run.path))
    session.max_new_tokens = 4
    with monkeypatch.context() as patch:
        patch.setattr("qtune.tuned.generate._generate_batch", fails_with(ERRORS[0]))
        chat(session, iter(["Hi"]))
    assert "error: memory ran out on " in capsys.readouterr().err
    assert session.turns == []
    chat(session, iter(["Hi"]))
    assert len(session.turns) == 2


def test_a_timing_that_runs_out_says_that_a_run_would_not_fit_either(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "not asked")
    monkeypatch.setattr("qtune.check.build_model", fails_with(ERRORS[0]))
    recipe = write_recipe()
    line = ended(monkeypatch, capsys, "check", recipe, "--time")
    assert f"A run would not fit either; qtune fit {recipe} shows what would help" in line


def test_an_error_of_another_kind_keeps_its_traceback(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.tuned.evaluate.row_losses", fails_with(RuntimeError("no such kernel")))
    monkeypatch.setattr(sys, "argv", ["qtune", "eval", str(run.path)])
    with pytest.raises(RuntimeError, match="no such kernel"):
        cli.main()


@pytest.mark.parametrize("error", [SafetensorError("header too small"), ImportError("no kernels"), OSError("gone")])
def test_a_model_that_cannot_be_loaded_is_named_in_a_chat_too(
    error: Exception, tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.model.load.AutoModelForCausalLM.from_pretrained", fails_with(error))
    base = run.path.parent / "base"
    with pytest.raises(ModelError, match=f"cannot be loaded: {error}"):
        open_session(str(base))
