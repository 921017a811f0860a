"""A model of the hub: what of it is kept on this computer, and what to do where the hub cannot be asked for it."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from qtune.errors import ModelError, Problem, first_line
from qtune.model.builtin import BUILTIN_MODELS, PREFIX
from qtune.network import is_reachable
from qtune.recipe.schema import Model


def is_hub_id(base: str) -> bool:
    """Whether a name means a model on the hub, as "owner/name"."""
    named_otherwise = base.startswith((PREFIX, ".", "/", "~")) or base.endswith(".gguf")
    if named_otherwise or base.count("/") > 1 or Path(base).exists():
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def is_kept(model: Model, file: str) -> bool:
    """Whether a file of a hub model is in the hub's cache on this computer."""
    if not is_hub_id(model.base):
        return False
    return isinstance(try_to_load_from_cache(model.base, file, revision=model.revision), str)


GATED = ("meta-llama/", "google/gemma")
"""How the names of models begin that are known to have a licence to accept, where the hub cannot be asked."""
LICENCE = "is given only to who accepts its licence: accept it on the model's page, and log in with hf auth login"


def is_local_only(base: str) -> bool:
    """Whether a hub model can only come from this computer, so that libraries must not ask the network first."""
    return is_hub_id(base) and not is_reachable()


def require_reachable(model: Model, file: str) -> None:
    """A hub model is kept here, or the hub can be asked for it.

    Raises:
        ModelError: neither, with the ways that are left.
    """
    if not is_hub_id(model.base) or is_kept(model, file) or is_reachable():
        return
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    if model.base.lower() in BUILTIN_MODELS:
        said = f'is not on this computer, and {why}; did you mean "{PREFIX}{model.base.lower()}"?'
        raise ModelError(Problem(model.base, said))
    gated = f"with a network it {LICENCE}; else " if model.base.lower().startswith(GATED) else ""
    raise ModelError(Problem(model.base, f"is not on this computer, and {why}; {gated}{_other_ways()}"))


def hub_refusal(model: Model, error: BaseException) -> ModelError | None:
    """What the hub said against giving a model, with what to do; None where it was something else."""
    causes = list(_causes(error))
    if any(isinstance(one, GatedRepoError) for one in causes):
        return ModelError(Problem(model.base, f"{LICENCE}; else {_other_ways()}"))
    if any(isinstance(one, RevisionNotFoundError) for one in causes):
        return ModelError(Problem(model.base, f"has no revision {model.revision!r} on the hub"))
    if any(isinstance(one, RepositoryNotFoundError) for one in causes):
        message = (
            f"there is no such model on the hub, or it is private: check the name, or hf auth login; {_other_ways()}"
        )
        return ModelError(Problem(model.base, message))
    if any(isinstance(one, HFValidationError) for one in causes):
        return ModelError(Problem(model.base, f"cannot be the name of a model on the hub; {_other_ways()}"))
    if is_hub_id(model.base) and any(isinstance(one, (ConnectionError, TimeoutError)) for one in causes):
        return ModelError(Problem(model.base, f"the hub cannot be reached ({first_line(error)}); {_other_ways()}"))
    return None


def _other_ways() -> str:
    builtin = ", ".join(f'"{PREFIX}{name}"' for name in BUILTIN_MODELS)
    return f"model.base can also be a local folder, a GGUF file or {builtin}"


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
