"""The lines of an examination, and what is found without importing a large library: our version and theirs."""

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement

from qtune import __version__
from qtune.errors import LibraryError


@dataclass(frozen=True)
class Diagnosis:
    """One line of the examination; a problem stops training, a note only slows or limits it."""

    topic: str
    name: str
    value: str
    verdict: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""


def version_findings() -> Iterator[Diagnosis]:
    """Our version, Python's, and each library that we depend on, against the bounds that we were tested with."""
    yield Diagnosis("versions", "qtune", __version__)
    yield Diagnosis("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("qtune") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Diagnosis("versions", "qtune", "run from a checkout", "note", "pip install . records the library bounds")
        return
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield version_finding(requirement)


def version_finding(requirement: Requirement) -> Diagnosis:
    """Whether a library is there in a version within our bounds."""
    install = f"pip install '{requirement}'"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Diagnosis("versions", requirement.name, "not installed", "problem", install)
    if requirement.specifier.contains(installed, prereleases=True):
        return Diagnosis("versions", requirement.name, installed)
    return Diagnosis("versions", requirement.name, f"{installed}, tested: {requirement.specifier}", "note", install)


def without_libraries(error: LibraryError) -> list[Diagnosis]:
    """What can be told where a library cannot be imported: the versions, and that it is what stands in the way."""
    broken = Diagnosis("versions", error.library, error.found, "problem", error.way_out)
    own = [broken if one.name == error.library else one for one in version_findings()]
    return own if broken in own else [*own, broken]


def to_json(findings: Sequence[Diagnosis]) -> list[dict[str, Any]]:
    """The findings as plain values."""
    return [asdict(finding) for finding in findings]


def has_problems(findings: Sequence[Diagnosis]) -> bool:
    """Whether something stands in the way of training."""
    return any(finding.verdict == "problem" for finding in findings)
