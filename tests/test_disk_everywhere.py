"""A disk that fails at any operation of any verb, whoever writes: Python, Rust, C++. What must hold then stands in
`failing_disk.py`; here some of the operations are refused, by hand all of them (the counts are in FAULTS.md)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler, and Linux's loader"),
]

SOME = (
    *("run:EIO:31", "run:ENOSPC:47:5", "resume:EIO:41:3", "export:EIO:23", "adapter:EIO:5", "gguf:ENOSPC:41:7"),
    *("report:EIO:29", "eval:EIO:19", "check:EIO:31:2", "init:EIO:2", "fit:ENOSPC:31:9", "profile:EIO:31:4"),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk that fails."""
    file = tmp_path_factory.mktemp("library") / "failing_disk.so"
    command = [str(COMPILER), "-O1", "-shared", "-fPIC", "-o", str(file), str(TESTS / "failing_disk.c"), "-ldl"]
    subprocess.run(command, check=True)
    return file


def asked(library: Path, folder: Path, *cases: str) -> list[dict]:
    """What has come of each case."""
    world = folder / "world"
    places = {"HOME": "home", "XDG_CACHE_HOME": "home/.cache", "XDG_CONFIG_HOME": "home/.config", "HF_HOME": "home/hf"}
    places |= {"QTUNE_CACHE": "cache", "TMPDIR": "tmp"}
    for place in places.values():
        (world / place).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **{name: str(world / place) for name, place in places.items()}}
    ended = subprocess.run(
        [sys.executable, str(TESTS / "failing_disk.py"), str(folder), *cases],
        env={**environment, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_whatever_operation_fails_it_is_one_sentence_nothing_is_lost_and_the_work_can_go_on(
    library: Path, tmp_path: Path
) -> None:
    results = asked(library, tmp_path, *SOME)
    assert [one["verb"] for one in results] == [case.partition(":")[0] for case in SOME]
    assert all(one["operations"] >= 5 and one["tried"] for one in results), results
    assert [(one["verb"], bad) for one in results for bad in one["bad"]] == []


NEEDS_ROWS = ("run", "resume", "export", "gguf", "eval", "check")


def test_where_the_cache_or_the_home_can_only_be_read_verbs_go_on_or_say_it(library: Path, tmp_path: Path) -> None:
    """Encoded rows are mapped from the cache, so what needs them says where else it could be; the rest goes on."""
    verbs = (*NEEDS_ROWS, "adapter", "report", "init", "fit", "profile", "chat", "list")
    cases = [f"{verb}:EROFS:{place}" for place in ("cache", "home") for verb in verbs]
    results = asked(library, tmp_path, *cases)
    assert [(one["verb"], one["place"], bad) for one in results for bad in one["bad"]] == []
    needs = "/cache/examples: the cache cannot be written: Read-only file system; QTUNE_CACHE can name another folder"
    said = {(one["place"], one["verb"]): (one["code"], one["said"]) for one in results}
    stopped = {key: told for key, told in said.items() if told != (0, "")}
    assert stopped == {("cache", verb): (2, needs) for verb in NEEDS_ROWS}


def test_verbs_that_only_look_write_nothing(library: Path, tmp_path: Path) -> None:
    results = asked(library, tmp_path, "list:EIO:1", "chat:EIO:1")
    assert [(one["verb"], one["operations"], one["bad"]) for one in results] == [("list", 0, []), ("chat", 0, [])]
