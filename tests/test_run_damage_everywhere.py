"""Every file of a finished and of a stopped run, damaged in every way: refused in a sentence, or the same result.

Nothing may end in a traceback, and nothing may come out that differs without a word.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_run_drift import World, kept, world  # noqa: F401  fixtures

from qtune.adapter.state import STATE_FILE
from qtune.errors import QtuneError
from qtune.export.export import Options, export_run
from qtune.report.page import write_report
from qtune.run.folder import RunDir
from qtune.training import train
from qtune.tuned.evaluate import evaluate

pytestmark = pytest.mark.slow

SEED = 20261127


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


def damages(run: RunDir) -> Iterator[tuple[Path, str, random.Random]]:
    for file in files_of(run):
        for way in WAYS:
            yield file, way, random.Random(f"{SEED} {file.relative_to(run.path)} {way}")


def outcome(verb: Callable[[], Any]) -> tuple[str, Any]:
    """("said", sentence), ("done", result) or ("traceback", error)."""
    try:
        return "done", verb()
    except QtuneError as error:
        return "said", str(error)
    except Exception as error:
        return "traceback", error


def restored(kept: tuple[Path, Path]) -> World:  # noqa: F811
    home, copy = kept
    shutil.rmtree(home)
    shutil.copytree(copy, home, symlinks=True)
    return World(home)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_run_goes_on_exactly_or_says_why_not(kept: tuple[Path, Path]) -> None:  # noqa: F811
    whole = load_file(restored(kept).finished.adapter / STATE_FILE)
    stopped = World(kept[0]).home / "runs" / "stopped"
    bad = []
    tried = list(damages(RunDir(stopped)))
    for file, way, chance in tried:
        restored(kept)
        WAYS[way](file, chance)
        kind, result = outcome(lambda: train.resume(RunDir.open(stopped)))
        if kind == "traceback":
            bad.append(f"{file.relative_to(stopped)} {way}: {type(result).__name__}: {result}")
        elif kind == "done" and not same_tensors(load_file(result.adapter / STATE_FILE), whole):
            bad.append(f"{file.relative_to(stopped)} {way}: another adapter, without a word")
    assert bad == [], f"{len(bad)} of {len(tried)}"


def result_of(run: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    evaluation = evaluate(RunDir.open(run))
    folder = export_run(RunDir.open(run), Options(adapter_only=True))
    write_report(RunDir.open(run))
    return evaluation.base, evaluation.tuned, load_file(folder / "adapter_model.safetensors")


def test_a_finished_run_is_used_as_it_was_or_says_why_not(kept: tuple[Path, Path]) -> None:  # noqa: F811
    finished = restored(kept).finished.path
    base, tuned, weights = result_of(finished)
    bad = []
    tried = list(damages(RunDir(restored(kept).finished.path)))
    for file, way, _ in tried:
        place = f"{file.relative_to(finished)} {way}"
        if file.is_relative_to(finished / "checkpoints") and way != "deleted":
            continue  # nothing of a finished run reads them
        for name, verb in {
            "eval": lambda: evaluate(RunDir.open(finished)),
            "export": lambda: export_run(RunDir.open(finished), Options(adapter_only=True)),
            "report": lambda: write_report(RunDir.open(finished)),
            "resume": lambda: train.resume(RunDir.open(finished)),
        }.items():
            restored(kept)
            WAYS[way](file, random.Random(f"{SEED} {place}"))  # the same bit for every verb
            kind, result = outcome(verb)
            if kind == "traceback":
                bad.append(f"{place}, {name}: {type(result).__name__}: {result}")
            elif kind == "done" and name == "eval" and (result.base, result.tuned) != (base, tuned):
                bad.append(f"{place}, eval: other figures, without a word")
            elif (
                kind == "done"
                and name == "export"
                and not same_tensors(load_file(result / "adapter_model.safetensors"), weights)
            ):
                bad.append(f"{place}, export: another adapter, without a word")
            elif (
                kind == "done"
                and name == "resume"
                and not same_tensors(load_file(result.adapter / "adapter_model.safetensors"), weights)
            ):
                bad.append(f"{place}, resume: another adapter, without a word")
    assert bad == [], f"{len(bad)} of {len(tried)}"
