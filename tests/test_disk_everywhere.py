"""A disk that fails at any operation of any verb, whoever writes: Python, Rust, C++. What must hold then stands in
`failing_disk.py`; here some of the operations are refused, by hand all of them (the counts are in FAULTS.md)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler, and Linux's loader"),
]

SOME = (
    *("run:EIO:61", "run:ENOSPC:97:5", "resume:EIO:83:3", "export:EIO:47", "adapter:EIO:9", "gguf:ENOSPC:83:7"),
    *("report:EIO:59", "eval:EIO:29", "check:EIO:61:2", "init:EIO:3", "fit:ENOSPC:61:9", "profile:EIO:61:4"),
)
ONLY_LOOK = ("list:EIO:1", "chat:EIO:1")
NEEDS_ROWS = ("run", "resume", "export", "gguf", "eval", "check", "compare")
VERBS = (*NEEDS_ROWS, "adapter", "report", "init", "fit", "profile", "chat", "list", "doctor")
MOUNTED = tuple(f"{verb}:MOUNT:{place}" for place in ("cache", "home") for verb in VERBS)
AS_NOBODY = tuple(f"{verb}:NOBODY:." for verb in VERBS)

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NAMESPACE = ("unshare", "--mount", *([] if IS_ROOT else ["--user", "--map-root-user"]))
"""Before a command: it may mount, and nobody else sees it."""


def can_mount() -> bool:
    """Whether this system lets its users have mounts of their own."""
    if shutil.which("unshare") is None:
        return False
    mount = "mount -t tmpfs none /tmp && mount -o remount,bind,ro /tmp && ! touch /tmp/written 2>/dev/null"
    return subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True, check=False).returncode == 0


def nobody_can_read() -> bool:
    """Whether a user without rights reaches this code and its libraries."""
    if not IS_ROOT or shutil.which("setpriv") is None:
        return False
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", "import rich"]
    is_open = subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0
    return is_open and os.access(TESTS, os.R_OK)


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
        [*(NAMESPACE if can_mount() else ()), sys.executable, str(TESTS / "failing_disk.py"), str(folder), *cases],
        env={**environment, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def results(library: Path) -> dict[str, dict]:
    """What has come of every case here, asked in one process."""
    cases = (*SOME, *ONLY_LOOK, *(MOUNTED if can_mount() else ()), *(AS_NOBODY if nobody_can_read() else ()))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # pytest's own folders are closed to other users
        return dict(zip(cases, asked(library, Path(folder), *cases), strict=True))


def test_whatever_operation_fails_it_is_one_sentence_nothing_is_lost_and_the_work_can_go_on(
    results: dict[str, dict],
) -> None:
    assert all(results[case]["operations"] >= 5 and results[case]["tried"] for case in SOME), results
    assert [(case, bad) for case in SOME for bad in results[case]["bad"]] == []


def test_verbs_that_only_look_write_nothing(results: dict[str, dict]) -> None:
    assert [(results[case]["operations"], results[case]["bad"]) for case in ONLY_LOOK] == [(0, []), (0, [])]


@pytest.mark.skipif(not can_mount(), reason="this system gives nobody a mount of his own")
def test_where_the_cache_or_the_home_can_only_be_read_verbs_go_on_or_say_it(results: dict[str, dict]) -> None:
    """Encoded rows are mapped from the cache, so what needs them says where else it could be; the rest goes on."""
    assert [(case, bad) for case in MOUNTED for bad in results[case]["bad"]] == []
    needs = "/cache/examples: the cache cannot be written: Read-only file system; QTUNE_CACHE can name another folder"
    said = {case: (results[case]["code"], results[case]["said"]) for case in MOUNTED}
    stopped = {case: told for case, told in said.items() if told != (0, "")}
    shown = {f"doctor:MOUNT:{place}": (1, "") for place in ("cache", "home")}
    assert stopped == {f"{verb}:MOUNT:cache": (2, needs) for verb in NEEDS_ROWS} | shown


@pytest.mark.skipif(not nobody_can_read(), reason="needs root, and a checkout that other users can read")
def test_a_user_who_may_write_nowhere_gets_what_can_be_had_or_one_sentence(results: dict[str, dict]) -> None:
    assert [(case, bad) for case in AS_NOBODY for bad in results[case]["bad"]] == []
    well = [case.partition(":")[0] for case in AS_NOBODY if results[case]["code"] == 0]
    assert well == ["chat", "list"]
