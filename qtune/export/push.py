"""An exported folder -> a repository on the hub, when the user names one."""

import shlex
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from qtune import console
from qtune.errors import ExportError, first_line
from qtune.export.output import UNVERIFIED
from qtune.export.verification import VERIFICATION, proof_in_public


def require_repository(repository: str, api: HfApi) -> None:
    """Asked before a merge of minutes: whether the name is one, the hub answers, and it knows who asks.

    Raises:
        ExportError: it would not be uploaded.
    """
    try:
        validate_repo_id(repository)
        api.whoami()
    except Exception as error:  # whatever the hub's client, and the network below it, has to say
        message = f"{first_line(error)}; nothing was written. hf auth login says who you are"
        raise ExportError(f"--push-to-hub {repository}: could not be uploaded: {message}") from error
    with suppress(Exception):  # one that is not there yet is made, and is private
        if api.repo_info(repository).private is False:
            console.say(f"{repository} is public: whoever finds it can read what is uploaded")


def push(folder: Path, repository: str, api: HfApi) -> str:
    """Uploads a folder with its model card and returns the address.

    A repository that is not there is made, and is private. Nothing of the run but this folder leaves, no file of it
    that was not proven, and no answer to a held-out row, of which verify.json keeps some here.

    Raises:
        ExportError: it could not be uploaded, with the hub's reason.
    """
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[f"*{UNVERIFIED}", VERIFICATION],
            commit_message="Export by qtune",
        )
        if (proof := proof_in_public(folder)) is not None:
            api.upload_file(
                path_or_fileobj=proof.encode(),
                path_in_repo=VERIFICATION,
                repo_id=repository,
                commit_message="Its comparison with the trained model",
            )
    except Exception as error:  # whatever the hub's client, and the network below it, has to say
        again = shlex.join(["hf", "upload", repository, str(folder)])
        message = f"could not be uploaded: {first_line(error)}\nthe export is there; to upload it as it is:\n  {again}"
        raise ExportError(f"{repository}: {message}") from error
    return str(address)
