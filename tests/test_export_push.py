"""A folder that is uploaded goes to a private repository, whole and alone."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from qtune.errors import ExportError
from qtune.export.push import push


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
                "ignore_patterns": ["*.unverified"],
                "commit_message": "Export by qtune",
            },
        ),
    ]


def test_the_hub_s_reason_is_told(tmp_path: Path) -> None:
    class Refusing(Recorder):
        def create_repo(self, repo_id: str, **settings: Any) -> str:  # type: ignore[override]
            raise OSError("no connection\ndetails")

    with pytest.raises(ExportError, match=r"^someone/model: could not be uploaded: no connection$"):
        push(tmp_path, "someone/model", Refusing())
