"""An exported folder -> a repository on the hub, when the user names one."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from qtune.errors import ExportError, first_line
from qtune.export.output import UNVERIFIED


def push(folder: Path, repository: str, api: HfApi) -> str:
    """Uploads a folder with its model card and returns the address.

    A repository that is not there is made, and is private. Nothing of the run but this folder leaves, and no file of it
    that was not proven.

    Raises:
        ExportError: it could not be uploaded, with the hub's reason.
    """
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[f"*{UNVERIFIED}"],
            commit_message="Export by qtune",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExportError(f"{repository}: could not be uploaded: {first_line(error)}") from error
    return str(address)
