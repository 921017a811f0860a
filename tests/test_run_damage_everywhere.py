"""Every file of a finished and of a stopped run, damaged in every way: refused in a sentence, or the same result.

Nothing may end in a traceback, and nothing may come out that differs without a word.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERYTHING
from kept_folder import KeptFolder
from safetensors.torch import load_file
from test_run_drift import World, make_world

from qtune.adapter.state import STATE_FILE
from qtune.errors import QtuneError
from qtune.export.export import Options, export_run
from qtune.report.page import write_report
from qtune.run.folder import RunDir
from qtune.training import train
from qtune.tuned.evaluate import evaluate

pytestmark = pytest.mark.slow

SEED = 20261127
# Every file in three of the nine ways; all of them are three times the work.
SHARE = 1 if EVERYTHING else 3


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeptFolder]:
    """Where the world is, with a copy of it as it was: one step is left to do."""
    with pytest.MonkeyPatch.context() as patch:
        yield make_world(tmp_path_factory, patch, steps=3)


def flipped(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def swapped(file: Path, chance: random.Random) -> None:
    """With the file of the same name of another step, or of another run."""
    others = [other for other in file.parents[1].glob(f"*/{file.name}") if other != file and other.is_file()]
    if not others:
        others = [other for other in file.parents[2].glob(f"*/*/{file.name}") if other != file and other.is_file()]
    if others:
        other = chance.choice(sorted(others))
        ours, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(ours)


def encoded(file: Path, chance: random.Random) -> None:
    """As UTF-16, as some editors save; a file that is no text gets a byte order mark."""
    content = file.read_bytes()
    try:
        file.write_bytes(content.decode().encode("utf-16"))
    except UnicodeDecodeError:
        file.write_bytes(b"\xef\xbb\xbf" + content)


def to_folder(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


WAYS: dict[str, Callable[[Path, random.Random], object]] = {
    "deleted": lambda file, chance: file.unlink(),
    "empty": lambda file, chance: file.write_bytes(b""),
    "cut": lambda file, chance: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flipped,
    "flipped elsewhere": flipped,
    "swapped": swapped,
    "other encoding": encoded,
    "folder": to_folder,
    "dangling link": dangling,
}


def files_of(run: RunDir) -> list[Path]:
    return sorted(file for file in run.path.rglob("*") if file.is_file())


def chance_of(run: Path, file: Path, way: str) -> random.Random:
    """The same draws whenever the same file is damaged in the same way."""
    return random.Random(f"{SEED} {file.relative_to(run)} {way}")


def some_of(files: list[Path], way: str) -> list[Path]:
    return files[list(WAYS).index(way) % SHARE :: SHARE]


def outcome(verb: Callable[[], Any]) -> tuple[str, Any]:
    """("said", sentence), ("done", result) or ("traceback", error)."""
    try:
        return "done", verb()
    except QtuneError as error:
        return "said", str(error)
    except Exception as error:
        return "traceback", error


def restored(kept: KeptFolder) -> World:
    kept.put_back()
    return World(kept.folder)


def is_same(result: Any, expected: Any) -> bool:
    return same_tensors(result, expected) if isinstance(result, dict) else bool(result == expected)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_exactly_or_says_why_not(way: str, kept: KeptFolder) -> None:
    home = restored(kept)
    whole, stopped = load_file(home.finished.adapter / STATE_FILE), home.stopped.path
    bad = []
    tried = some_of(files_of(home.stopped), way)
    for file in tried:
        restored(kept)
        WAYS[way](file, chance_of(stopped, file, way))
        kind, result = outcome(lambda: train.resume(RunDir.open(stopped)))
        if kind == "traceback":
            bad.append(f"{file.relative_to(stopped)}: {type(result).__name__}: {result}")
        elif kind == "done" and not same_tensors(load_file(result.adapter / STATE_FILE), whole):
            bad.append(f"{file.relative_to(stopped)}: another adapter, without a word")
    assert bad == [], f"{len(bad)} of {len(tried)}"


def figures(run: Path) -> tuple[Any, Any]:
    evaluation = evaluate(RunDir.open(run), max_new_tokens=2)  # the losses tell models apart
    return evaluation.base, evaluation.tuned


def exported(run: Path) -> dict[str, torch.Tensor]:
    folder = export_run(RunDir.open(run), Options(adapter_only=True))
    return load_file(folder / "adapter_model.safetensors")


def resumed(run: Path) -> dict[str, torch.Tensor]:
    return load_file(train.resume(RunDir.open(run)).adapter / "adapter_model.safetensors")


def reported(run: Path) -> bool:
    return write_report(RunDir.open(run)).is_file()


@pytest.mark.parametrize("way", WAYS)
def test_a_finished_run_is_used_as_it_was_or_says_why_not(way: str, kept: KeptFolder) -> None:
    finished = restored(kept).finished.path
    weights = exported(finished)
    verbs = {"eval": (figures, figures(finished)), "export": (exported, weights), "report": (reported, True)}
    bad = []
    # Nothing but a resumption, which the other test looks at, reads the checkpoints of a run.
    every = [file for file in files_of(restored(kept).finished) if "checkpoints" not in file.parts]
    tried = some_of(every, way)
    for file in tried:
        for name, (verb, expected) in {**verbs, "resume": (resumed, weights)}.items():
            restored(kept)
            WAYS[way](file, chance_of(finished, file, way))
            kind, result = outcome(lambda verb=verb: verb(finished))
            place = f"{file.relative_to(finished)}, {name}"
            if kind == "traceback":
                bad.append(f"{place}: {type(result).__name__}: {result}")
            elif kind == "done" and not is_same(result, expected):
                bad.append(f"{place}: something else, without a word")
    assert bad == [], f"{len(bad)} of {len(tried)}"
