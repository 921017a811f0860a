"""A folder that is uploaded goes to a private repository, whole and alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from export_models import tiny_run
from huggingface_hub import HfApi

from qtune.errors import ExportError
from qtune.export.export import Options, export_run
from qtune.export.push import push, require_repository
from qtune.export.verification import read_proof
from qtune.run.folder import RunDir


class Recorder(HfApi):
    """Takes down what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **settings: Any) -> str:  # type: ignore[override]
        self.calls.append(("create", {"repo_id": repo_id, **settings}))
        return f"https://hub/{repo_id}"

    def upload_folder(self, **settings: Any) -> None:  # type: ignore[override]
        self.calls.append(("upload", settings))

    def upload_file(self, **settings: Any) -> None:  # type: ignore[override]
        self.calls.append(("file", settings))


def test_the_folder_goes_to_a_private_repository(tmp_path: Path) -> None:
    api = Recorder()
    assert push(tmp_path, "someone/model", api) == "https://hub/someone/model"
    assert api.calls == [
        ("create", {"repo_id": "someone/model", "private": True, "exist_ok": True}),
        (
            "upload",
            {
                "repo_id": "someone/model",
                "folder_path": tmp_path,
                "ignore_patterns": ["*.unverified", "verify.json"],
                "commit_message": "Export by qtune",
            },
        ),
    ]


@pytest.mark.slow
def test_no_row_of_the_run_is_uploaded(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path), Options())
    kept = read_proof(folder)
    assert kept.figures is not None
    assert kept.figures.answers
    api = Recorder()
    push(folder, "someone/model", api)
    *_, (kind, sent) = api.calls
    assert (kind, sent["path_in_repo"]) == ("file", "verify.json")
    there = tmp_path / "there"
    there.mkdir()
    (there / "verify.json").write_bytes(sent["path_or_fileobj"])
    assert read_proof(there) == replace(kept, figures=replace(kept.figures, answers=()))
    assert not [answer for answer in kept.figures.answers if answer.request in sent["path_or_fileobj"].decode()]


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_everybody_reads_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], private: bool
) -> None:
    monkeypatch.setattr(HfApi, "whoami", lambda self: {})
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name: SimpleNamespace(private=private))
    require_repository("someone/model", HfApi())
    assert ("someone/model is public" in capsys.readouterr().err) != private


def test_the_hub_s_reason_is_told(tmp_path: Path) -> None:
    class Refusing(Recorder):
        def create_repo(self, repo_id: str, **settings: Any) -> str:  # type: ignore[override]
            raise OSError("no connection\ndetails")

    with pytest.raises(ExportError, match=r"^someone/model: could not be uploaded: no connection\n") as refused:
        push(tmp_path, "someone/model", Refusing())
    assert str(refused.value).endswith(f"  hf upload someone/model {tmp_path}")


class UnreachableError(Exception):
    """As the client's transport raises it, which is neither an OSError nor the hub's own."""


@pytest.mark.parametrize("upload", ["create_repo", "upload_folder"])
def test_a_network_that_fails_is_a_sentence_with_the_way_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload: str
) -> None:
    def fails(*args: Any, **settings: Any) -> Any:
        raise UnreachableError("Connection refused")

    monkeypatch.setattr(Recorder, upload, fails)
    with pytest.raises(ExportError, match="could not be uploaded: Connection refused"):
        push(tmp_path, "someone/model", Recorder())


@pytest.mark.parametrize(("repository", "said"), [("a b", "Repo id must"), ("someone/model", "Connection refused")])
def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str, said: str
) -> None:
    def fails(*args: Any, **settings: Any) -> Any:
        raise UnreachableError("Connection refused")

    monkeypatch.setattr(HfApi, "whoami", fails)
    monkeypatch.setattr("qtune.export.export.write_export", lambda *args: pytest.fail("began to write"))
    with pytest.raises(ExportError, match=rf"^--push-to-hub {repository}: could not be uploaded: .*{said}") as refused:
        export_run(RunDir(tmp_path), Options(push_to=repository))
    assert "nothing was written" in str(refused.value)
