"""A run's folder: one name for every file in it, and writes that a crash cannot leave half done."""

import errno
import os
import re
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qtune import whole
from qtune.disk import NO_FILE, no_file_in, refusal_of
from qtune.errors import InputError, Problem, RecipeError, RunError, first_line
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Output
from qtune.recipe.shipped import find_recipe
from qtune.spelling import meant_file

OUTPUT = "output.directory"
"""The place of what is wrong with it."""
EXPORTED = "model"
"""What an export is called inside of its run."""
RUNS = Path(Output.model_fields["directory"].default)


@dataclass(frozen=True)
class RunDir:
    """`runs/NAME/`, readable by anyone with a text editor; the screen is drawn from these files."""

    path: Path

    @classmethod
    def create(cls, directory: Path, name: str, recipe_text: str) -> "RunDir":
        """Makes `directory/name`, or name-2, name-3, … if that is taken, with the recipe as it was given.

        Raises:
            RunError: it cannot be made.
        """
        try:
            return cls._made(directory, name, recipe_text)
        except OSError as error:
            message = f"the run's folder cannot be made: {refusal_of(error) or first_line(error)}"
            raise RunError(Problem(str(directory), message)) from error

    @classmethod
    def _made(cls, directory: Path, name: str, recipe_text: str) -> "RunDir":
        directory.mkdir(parents=True, exist_ok=True)
        for path in _folders(directory, name):
            try:
                path.mkdir()
            except FileExistsError:
                continue
            run_dir = cls(path)
            try:
                run_dir.write_text(run_dir.recipe_file, recipe_text)
            except OSError:
                with suppress(OSError):
                    path.rmdir()  # a folder without a recipe would only take a name
                raise
            return run_dir
        raise RunError(Problem(str(directory), f"no free name for a run {name!r}"))

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run.

        Raises:
            RunError: `path` is not a run's folder.
        """
        run_dir = cls(path)
        if not path.is_dir() and (said := _of_recipe(path)) is not None:
            raise RunError(Problem(str(path), said))
        if path.is_file():
            raise RunError(Problem(str(path), "is a file; a run is a folder, as runs/quickstart"))
        if not path.is_dir():
            raise RunError(Problem(str(path), f"no such folder{runs_beside(path)}"))
        if not run_dir.resolved_file.is_file():
            raise RunError(Problem(str(path), f"is not a run: it has no resolved.toml{runs_beside(path / 'any')}"))
        run_dir.require_files()
        return run_dir

    @property
    def name(self) -> str:
        """The folder's name, also where the path is "." or ends in ".."."""
        return self.path.resolve().name

    @property
    def recipe_file(self) -> Path:
        """The recipe as it was given."""
        return self.path / "recipe.toml"

    @property
    def resolved_file(self) -> Path:
        """The recipe with every value that was used, and where each came from; a recipe itself."""
        return self.path / "resolved.toml"

    @property
    def exported(self) -> Path:
        """Where its model is exported to, where nothing else is said."""
        return self.path / EXPORTED

    @property
    def lock_file(self) -> Path:
        """Versions, base revision, data and template hashes, seed, device."""
        return self.path / "lock.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line: what the training display shows."""
        return self.path / "metrics.jsonl"

    @property
    def rows_file(self) -> Path:
        """A few training rows as the model saw them."""
        return self.path / "rows.json"

    @property
    def memory_file(self) -> Path:
        """Memory by phase and category."""
        return self.path / "memory.json"

    @property
    def snapshot_file(self) -> Path:
        """The CUDA allocator's history of the first steps, where it was asked for; PyTorch's viewer reads it."""
        return self.path / "memory_snapshot.pickle"

    @property
    def eval_file(self) -> Path:
        """Base against tuned on held-out rows."""
        return self.path / "eval.json"

    @property
    def forgetting_file(self) -> Path:
        """Base against tuned on text that has nothing to do with the rows."""
        return self.path / "forgetting.json"

    @property
    def tasks_file(self) -> Path:
        """Base against tuned on benchmarks."""
        return self.path / "tasks.json"

    @property
    def checkpoints(self) -> Path:
        """Folders checkpoint-STEP."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in peft's format; there when training has ended."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def has_begun(self) -> bool:
        """Whether its model was ever loaded: otherwise there is nothing in it to go on with."""
        return self.lock_file.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether training has ended and the adapter is saved."""
        return (self.adapter / "adapter_config.json").is_file()

    def finished_adapter(self) -> Path:
        """The adapter's folder.

        Raises:
            RunError: training has not ended.
        """
        if not self.is_finished:
            command = shlex.join(["qtune", "run", "--resume", str(self.path)])
            raise RunError(Problem(str(self.path), f"has no adapter yet; finish it with: {command}"))
        return self.adapter

    def require_files(self) -> None:
        """What is in a run's folder can be read to its end.

        Raises:
            RunError: something in it is a pipe or a device.
        """
        if (found := no_file_in(self.path)) is not None:
            raise RunError(Problem(str(found), NO_FILE))

    def require_there(self) -> None:
        """What is written where a folder was would make another, which is no run.

        Raises:
            FileNotFoundError: somebody has moved or removed the folder.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def clear_leftovers(self) -> None:
        """Removes what killed processes have left of files that they wrote: for whoever has the folder (`run.owner`),
        for a process of another computer would be taken for a dead one."""
        for folder in (self.path, self.checkpoints, *self.checkpoints.glob("*/")):
            whole.clear_all_leftovers(folder)

    def write_text(self, file: Path, text: str) -> None:
        """Writes a file of the run whole or not at all.

        Raises:
            OSError: it cannot be written, or the run's folder is gone.
        """
        self.require_there()
        whole.write_text(file, text)


def _folders(directory: Path, name: str) -> Iterator[Path]:
    """The folders that a run may get, the first one that is free."""
    yield directory / name
    yield from (directory / f"{name}-{number}" for number in range(2, 10_000))


def next_folder(directory: Path, name: str) -> Path | None:
    """The folder that a run which begins now would get; None where no name is free."""
    return next((path for path in _folders(directory, name) if not os.path.lexists(path)), None)


def _of_recipe(path: Path) -> str | None:
    """What is said of a recipe in the place of a run: which its runs are; None where it is no recipe either."""
    try:
        resolved = load_recipe(find_recipe(str(path)), need_rows=False, need_start=False)
    except RecipeError:
        return None
    pattern = re.compile(re.escape(resolved.run_name) + r"(-\d+)?")
    found = Path(resolved.recipe.output.directory).glob("*/resolved.toml")
    runs = sorted(
        (file for file in found if pattern.fullmatch(file.parent.name)), key=lambda file: file.stat().st_mtime
    )
    names = [str(file.parent) for file in runs]
    if not names:
        return f"is a recipe, and has no run yet: {shlex.join(['qtune', 'run', str(path)])}"
    return f"is a recipe; its run is {names[0]}" if len(names) == 1 else f"is a recipe; its runs: {', '.join(names)}"


def refuse_missing_run(target: str) -> None:
    """Where a verb takes other things than runs as well: a name that can only be meant as a run's, and is none.

    Raises:
        RunError: with the runs that there are.
    """
    path = Path(target)
    if not path.exists() and ((len(path.parts) > 1 and _runs_in(path.parent)) or _is_run(RUNS / path)):
        RunDir.open(path)


def runs_beside(path: Path) -> str:
    """What is said of a run that is not there: the one that is meant, else those beside it or around it, else those
    in RUNS."""
    if len(path.parts) == 1 and _is_run(RUNS / path):
        return f"; did you mean {RUNS / path}?"
    if _is_run(path.parent) and (meant := meant_file(str(path)) or _models_in(path.parent)):
        return meant
    for folder in (path.parent, path.parent.parent):
        if names := _runs_in(folder):
            return f"; runs there: {', '.join(names)}"
    return runs_here()


def runs_here() -> str:
    """What is said of the runs in RUNS where none was named; empty where there are none."""
    names = _runs_in(RUNS)
    return f"; there {'is' if len(names) == 1 else 'are'} {', '.join(names)}" if names else ""


def _models_in(run: Path) -> str:
    """What is said of the models that were exported into a run's folder; empty where there are none."""
    names = sorted(str(file.parent) for file in run.glob("*/config.json"))
    return f"; {run} holds {', '.join(names)}" if names else ""


def _runs_in(folder: Path) -> list[str]:
    return sorted(str(file.parent) for file in folder.glob("*/resolved.toml")) if folder.is_dir() else []


def _is_run(path: Path) -> bool:
    return (path / "resolved.toml").is_file()


def require_writable(folder: Path) -> None:
    """Asks by writing into it, or where it would be made: permissions alone do not tell of read-only file systems.

    Raises:
        InputError: the system refuses.
    """
    existing = existing_folder(folder)
    try:
        with passing_folder(folder):
            pass
    except OSError as error:
        where = "" if existing == folder.absolute() else f" ({existing})"
        message = f"{folder} cannot be written{where}: {error.strerror}; name another folder"
        raise InputError(Problem(OUTPUT, message)) from error


@contextmanager
def passing_folder(directory: Path) -> Iterator[Path]:
    """A folder where the runs of a directory are, or would be made, for as long as the block runs.

    What killed processes of this computer have left of theirs is removed first, also from the folder around: where
    nothing had been run yet, it was made there.

    Raises:
        OSError: it cannot be made.
    """
    existing = existing_folder(directory)
    name = f"qtune-{socket.gethostname()}"
    for folder in (existing, existing.parent):
        with suppress(OSError):
            whole.clear_leftovers(folder / name)
    with whole.passing(existing / name) as folder:
        yield folder


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there; a link to nowhere is, for nothing can take its place."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
