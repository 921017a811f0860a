"""Every verb on a disk that fails at its k-th operation, for every k: what it says, what it leaves, how it goes on.

    cc -O1 -shared -fPIC -o failing_disk.so tests/failing_disk.c -ldl
    LD_PRELOAD=./failing_disk.so python tests/failing_disk.py FOLDER run:EIO:1 export:ENOSPC:7:3

VERB:ERROR:EVERY:START refuses every operation in turn, or every seventh from the third on. VERB:MOUNT:cache mounts
FOLDER/world/cache read-only, which the process must be allowed to do (`unshare --mount`), and VERB:NOBODY:. runs as a
user who may write nowhere in FOLDER/world, which only root can. A process of its own, for
`failing_disk.c` must be there before every other library; its caches and temporary files must be in FOLDER/world
(`test_disk_everywhere.py` sets them). A line of JSON for each: the number of operations, how many were refused in turn,
and a sentence for each that did not end as it should. "EIO" refuses one operation; "ENOSPC" that one and all after it,
for a disk that is full stays full.
"""

import ctypes
import errno
import functools
import gc
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from kept_folder import KeptFolder  # noqa: E402  found where the line above looks

TRAINING = "steps = 4\nbatch_size = 4\ncheckpoint_every = 2\neval_every = 2\nkeep_checkpoints = 2"
NEVER = 2**62
WARM: set[str] = set()
"""Verbs that this process has called."""


@dataclass(frozen=True)
class Ended:
    """How a command has ended: `code` None where an exception reached the user."""

    code: int | None
    said: str
    operations: int


@contextmanager
def refusing(folder: Path, first: int, last: int, number: int, listing: int = -1) -> Iterator[Callable[[], int]]:
    """Refuses operations below a folder; what it gives counts them."""
    library = ctypes.CDLL(None)
    library.disk_refuse.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.disk_count.restype = ctypes.c_long
    library.disk_refuse(os.fsencode(folder), first, last, number, listing)
    try:
        yield library.disk_count
    finally:
        library.disk_refuse(b"", 0, 0, 0, -1)


def qtune(
    world: Path, *arguments: str, first: int = NEVER, last: int = NEVER, number: int = 0, listing: int = -1
) -> Ended:
    """The command in this process, whose libraries are loaded already."""
    from qtune.cli import main

    streams = sys.stdout, sys.stderr, sys.argv
    output, sys.argv = io.StringIO(), ["qtune", *arguments]
    code: int | None = None
    with refusing(world, first, last, number, listing) as count:
        try:
            with redirect_stdout(output), redirect_stderr(output):
                try:
                    main()
                    code = 0
                finally:
                    operations = count()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        except BaseException:
            output.write(traceback.format_exc())
        finally:
            sys.stdout, sys.stderr, sys.argv = streams
    return Ended(code, output.getvalue(), operations)


# --- the world: a base, rows, a recipe, a finished run, a stopped one ------------------------------------------------


def make_world(world: Path) -> None:
    """Fills a folder; everything that a verb writes to is inside, its caches and its temporary files too."""
    from conftest import ROWS
    from export_models import tiny_base, tiny_tokenizer

    for name in ("home", "tmp", "cache"):
        (world / name).mkdir(parents=True, exist_ok=True)
    tiny_base(world / "base")
    tiny_tokenizer(world / "base")
    (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (world / "tiny.toml").write_text(
        f'[model]\nbase = "{world / "base"}"\n[quantization]\ncompute_dtype = "float32"\nminimum_share = 0.0\n'
        '[adapter]\nkind = "lora"\nrank = 4\n[data]\ntrain = "rows.jsonl"\nvalidation = 0.1\nmax_length = 128\n'
        f'[training]\n{TRAINING}\n[output]\ndirectory = "{world / "runs"}"\n'
    )
    for name in ("done", "twin", "stopped"):
        ended = qtune(world, "run", str(world / "tiny.toml"), "--set", f"output.name={name}")
        assert ended.code == 0, ended.said
    stopped = world / "runs" / "stopped"
    shutil.rmtree(stopped / "adapter")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    for folder in ("cache", "tmp"):  # what is kept there is made anew each time
        shutil.rmtree(world / folder)
        (world / folder).mkdir()


def restore(world: Path, kept: Path) -> None:
    """Puts everything back, without touching what need not be."""
    for name in ("cache", "tmp", "made"):
        shutil.rmtree(world / name, ignore_errors=True)
    for name in ("cache", "tmp"):
        (world / name).mkdir()
    _runs(world / "runs", kept / "runs").put_back()


@functools.cache
def _runs(folder: Path, copy: Path) -> KeptFolder:
    return KeptFolder(folder, copy)


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def adapter_of(run: Path) -> str:
    """A hash of what was trained."""
    return contents(run / "adapter")["trained_state.safetensors"]


def is_finished(run: Path) -> bool:
    return (run / "adapter" / "adapter_config.json").is_file()


# --- what must be true afterwards ----------------------------------------------------------------------------------


def after_training(world: Path, run: Path) -> str | None:
    """What is wrong with a run that may have been broken off; it is finished first, where it is one."""
    if not (run / "resolved.toml").is_file():
        return None
    if not is_finished(run):
        again = qtune(world, "run", "--resume", str(run))
        if again.code != 0:
            return f"cannot be resumed: {again.said[-1500:]}"
    if adapter_of(run) != adapter_of(world / "runs" / "done"):
        return "another adapter than the undisturbed run's"
    return None if course(run) == course(world / "runs" / "done") else "other records than the undisturbed run's"


def course(run: Path) -> list[tuple[object, ...]]:
    """What was measured, and does not depend on the clock."""
    kept = ("kind", "step", "loss", "accuracy", "learning_rate", "gradient_norm")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(one.get(key) for key in kept) for one in records if one["kind"] != "note"]


def unchanged(world: Path, kept: Path, *but: str) -> str | None:
    """What has become of a finished run, files apart that the verb is there to write."""
    before, after = contents(kept / "runs" / "done"), contents(world / "runs" / "done")
    lost = [name for name in before if before[name] != after.get(name) and name not in but]
    left = [name for name in after if name not in before and not name.startswith(but)]
    page = world / "runs" / "done" / "report.html"
    if page.is_file() and not page.read_text(encoding="utf-8").endswith("</html>\n"):
        lost.append("the end of report.html")
    return f"lost or changed: {lost}; left: {left}" if lost or left else None


@dataclass(frozen=True)
class Case:
    """A command, and what must hold after it; `again` is whether it must do its work once the disk is well, `shows`
    whether it says what is wrong in a table, instead of an error."""

    arguments: Callable[[Path], tuple[str, ...]]
    holds: Callable[[Path, Path, Ended], str | None]
    again: bool = True
    shows: bool = False


def _trained(name: str) -> Callable[[Path, Path, Ended], str | None]:
    return lambda world, kept, ended: after_training(world, world / "runs" / name)


def _kept(*but: str) -> Callable[[Path, Path, Ended], str | None]:
    return lambda world, kept, ended: unchanged(world, kept, *but)


def _exported(name: str) -> Callable[[Path, Path, Ended], str | None]:
    """Whole, or not there: what stands there under its name can be read and says what is proven of it."""

    def holds(world: Path, kept: Path, ended: Ended) -> str | None:
        from qtune import manifest

        folder = world / "runs" / "done" / name
        if ended.code == 0 and not folder.is_dir():
            return "no export, and no word of it"
        if ended.code == 0 and name == "model" and not json.loads((folder / "verify.json").read_text())["verified"]:
            return "not verified, and no word of it"
        if ended.code == 0 and name == "model" and (said := manifest.fault(folder)) is not None:
            return f"another folder than its manifest says: {said}"
        return unchanged(world, kept, name, "report.html")

    return holds


def _written(name: str) -> Callable[[Path, Path, Ended], str | None]:
    def holds(world: Path, kept: Path, ended: Ended) -> str | None:
        if ended.code == 0 and not (world / name).is_file():
            return "nothing was written, and no word of it"
        left = [path.name for path in (world / name).parent.glob("*") if path.name != Path(name).name]
        return f"left behind: {left}" if left and name.startswith("made") else unchanged(world, kept, "report.html")

    return holds


def _done(world: Path) -> str:
    return str(world / "runs" / "done")


CASES: Mapping[str, Case] = {
    "run": Case(lambda world: ("run", str(world / "tiny.toml")), _trained("tiny"), again=False),
    "resume": Case(
        lambda world: ("run", "--resume", str(world / "runs" / "stopped")), _trained("stopped"), again=False
    ),
    "export": Case(lambda world: ("export", _done(world), "--force"), _exported("model")),
    "adapter": Case(lambda world: ("export", _done(world), "--adapter-only", "--force"), _exported("adapter-export")),
    "gguf": Case(lambda world: ("export", _done(world), "--gguf", "f16", "--force"), _exported("model")),
    "report": Case(lambda world: ("report", _done(world)), _kept("report.html", "memory.json")),
    "eval": Case(
        lambda world: ("eval", _done(world), "--rows", "2", "--max-new-tokens", "2"), _kept("eval.json", "report.html")
    ),
    "check": Case(lambda world: ("check", str(world / "tiny.toml"), "--rehearse"), _kept()),
    "init": Case(
        lambda world: (
            *("init", "--base", str(world / "base"), "--data", str(world / "rows.jsonl")),
            *("--output", str(world / "made" / "new.toml")),
        ),
        _written("made/new.toml"),
    ),
    "fit": Case(
        lambda world: (
            *("fit", str(world / "tiny.toml"), "--vram", "4GiB", "--output", str(world / "made" / "fit.toml")),
            "--force",
        ),
        _written("made/fit.toml"),
    ),
    "profile": Case(lambda world: ("profile", _done(world)), _kept("memory.json", "report.html")),
    "chat": Case(lambda world: ("chat", _done(world), "-p", "What is 1", "--max-new-tokens", "2"), _kept()),
    "list": Case(lambda world: ("list", str(world / "runs")), _kept()),
    "compare": Case(
        lambda world: ("compare", _done(world), str(world / "runs" / "twin"), "--rows", "2"),
        _kept("eval.json", "forgetting.json", "report.html"),
    ),
    "doctor": Case(lambda world: ("doctor",), _kept(), shows=True),
}


def fault_of(ended: Ended, reason: str) -> str | None:
    """What is wrong with how a command has ended: a traceback, no reason, no way out."""
    if ended.code is None or "Traceback (most recent call last)" in ended.said:
        return f"traceback: {ended.said[-1500:]}"
    if ended.code == 0:
        return None
    if ended.said.count("error: ") != 1:
        return f"{ended.said.count('error: ')} errors: {ended.said[-1500:]}"
    message = ended.said.partition("error: ")[2]
    if reason not in message and "the disk is full" not in message and "the disk may be full" not in message:
        return f"another reason: {message}"
    return None


def tried(folder: Path, name: str, number_name: str, every: int, start: int) -> dict[str, object]:
    """Refuses every `every`-th operation of a verb in turn, from `start` on; what has come of it."""
    world, kept, case = folder / "world", folder / "kept", CASES[name]
    number, listed = getattr(errno, number_name), folder / "operations.txt"
    # Twice where it is the first time: what is loaded or remembered by that call is not written by the next.
    for _ in range(1 if name in WARM else 2):
        WARM.add(name)
        restore(world, kept)
        listed.unlink(missing_ok=True)
        listing = os.open(listed, os.O_WRONLY | os.O_CREAT)
        whole = qtune(world, *case.arguments(world), listing=listing)
        os.close(listing)
        assert whole.code == 0, whole.said
    operations = [line.replace(str(world), "") for line in listed.read_text().splitlines()]
    bad, places = [], range(start, whole.operations + 1, every)
    for at in places:
        restore(world, kept)
        last = at if number_name == "EIO" else NEVER
        ended = qtune(world, *case.arguments(world), first=at, last=last, number=number)
        said = fault_of(ended, os.strerror(number)) or case.holds(world, kept, ended)
        if said is None and ended.code != 0 and case.again:
            again = qtune(world, *case.arguments(world))
            said = None if again.code == 0 else f"not possible afterwards: {again.said[-1500:]}"
        print(f"{name} {operations[at - 1]}: {ended.code} {'BAD' if said else ''}", file=sys.stderr, flush=True)
        if said is not None:
            bad.append(f"{operations[at - 1]}, exit code {ended.code}: {said}")
    return {"verb": name, "error": number_name, "operations": whole.operations, "tried": len(places), "bad": bad}


def read_only(folder: Path, name: str, how: str, place: str) -> dict[str, object]:
    """A verb where nothing can be written below a place of the world, its cache or its home: what has come of it."""
    world, kept, case = folder / "world", folder / "kept", CASES[name]
    restore(world, kept)
    if how == "NOBODY":  # what may not be read is another case: safetensors gives its files to their owner alone
        for file in world.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    before = contents(world / place)
    with mounted_read_only(world / place) if how == "MOUNT" else as_nobody():
        ended = qtune(world, *case.arguments(world))
    wrote = contents(world / place) != before
    shown = case.shows and ended.code == 1 and "cannot be written" in ended.said
    said = "something was written all the same" if wrote else None if shown else fault_of(ended, REASONS[how])
    said = said or case.holds(world, kept, ended)
    bad = [] if said is None else [f"exit code {ended.code}: {said}"]
    message = ended.said.partition("error: ")[2].replace(str(world), "").strip()
    return {"verb": name, "place": place, "code": ended.code, "said": message, "bad": bad}


REASONS = {"MOUNT": os.strerror(errno.EROFS), "NOBODY": os.strerror(errno.EACCES)}
BIND, REMOUNT, READ_ONLY = 4096, 32, 1
"""Flags of mount(2)."""
SAME_FLAGS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
"""Flags of a file system that a mount of a part of it must have as well, and that mount(2) writes as statvfs does."""
NOBODY = 65534


@contextmanager
def mounted_read_only(folder: Path) -> Iterator[None]:
    """A folder as a file system of its own that can only be read."""
    library, name = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    flags = os.statvfs(folder).f_flag & SAME_FLAGS
    for asked in (BIND, BIND | REMOUNT | READ_ONLY | flags):
        if library.mount(name, name, None, ctypes.c_ulong(asked), None):
            raise OSError(ctypes.get_errno(), "mount")
    try:
        yield
    finally:
        if library.umount2(name, 2):  # MNT_DETACH: rows may still be mapped
            raise OSError(ctypes.get_errno(), "umount2")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Every thread of the process has the rights of a user who owns nothing."""
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def remember_traces() -> None:
    """The same step is traced once, whatever has become of its file in the cache: a trace itself asks no disk, and is
    a third of the time here."""
    from qtune.memory import cached as keeping
    from qtune.memory import savings

    own, known = keeping.cached, {}

    def cached(config: Any, recipe: Any, plan: Any, longest: Any, traced: Callable[[], Any], way: str = "") -> Any:
        step = keeping._key(config, recipe, plan, longest, way)

        def remembered() -> Any:
            if step not in known:
                known[step] = traced()
            return known[step]

        return own(config, recipe, plan, longest, remembered, way)

    keeping.cached = savings.cached = cached


def main() -> None:
    import warm

    warm.import_everything()
    gc.freeze()
    remember_traces()
    folder = Path(sys.argv[1])
    world, kept = folder / "world", folder / "kept"
    if not kept.is_dir():
        make_world(world)
        shutil.copytree(world, kept, symlinks=True)
    for asked in sys.argv[2:]:
        name, number_name, every, *start = asked.split(":")
        if not every.isdigit():
            print(json.dumps(read_only(folder, name, number_name, every)), flush=True)
            continue
        print(json.dumps(tried(folder, name, number_name, int(every), int(start[0]) if start else 1)), flush=True)


if __name__ == "__main__":
    main()
