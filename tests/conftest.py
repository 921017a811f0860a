"""What all tests share: no network, one thread, and a tiny random model folder made once."""

import functools
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm
from ctrl_c import CTRL_C

from qtune.startup.allocator import VARIABLES
from qtune.startup.imports import no_collection

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


os.fsync = warm.without_waiting

EVERYTHING = os.environ.get("QTUNE_EVERYTHING") == "1"
"""Whether products of many kinds are tried whole, of which one of each kind is enough day by day."""
FUZZED = int(os.environ.get("QTUNE_FUZZED", "1"))
"""How many times as many random inputs as usual the fuzzers try; by hand 12 makes more than 100,000 in all."""
FUZZ_SEED = int(os.environ.get("QTUNE_FUZZ_SEED", "15"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports the libraries as the command does, and takes them out of all later looks for reference cycles.

    Every run of a trainer looks through everything, which takes half a second with what the libraries leave behind.
    """
    with no_collection():
        result = yield
    gc.collect()
    gc.freeze()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Takes out what the tests of a file have left, too: caches, modules that only they import. After the quick
    selection in one process a tiny run took 0.89 s of processor without it and 0.74 with it, 0.69 at its beginning."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends the suite after a test that has met a Ctrl-C, though a trainer has taken it for its own."""
    result = yield
    if CTRL_C.was_pressed():
        raise KeyboardInterrupt
    return result


@pytest.fixture(autouse=True)
def the_allocators_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets them for its process; a test that calls it in this one leaves them as they were."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that are not there yet, one after the other. pytest would look for each number through all of them."""
    folder = tmp_path_factory.mktemp("configurations")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def nobody_has_agreed_to_any_code(configurations: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person has decided on this computer is no part of a test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(next(configurations)))


@pytest.fixture(scope="session", autouse=True)
def the_folder_is_empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What stands where pytest was started, the demo's runs/ above all, is no part of a test."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    yield
    os.chdir(before)


ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} and {number + 1}{'?' * (1 + number % 7)}"},
            {"role": "assistant", "content": f"It is {2 * number + 1}.{' Really.' * (number % 3)}"},
        ]
    }
    for number in range(22)
]
"""Rows of different lengths: the order in which they are grouped by length matters."""


def qtune_process(*arguments: str | Path) -> subprocess.Popen[str]:
    """The `qtune` command in a process of its own; stdout and stderr are pipes."""
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "qtune", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_qtune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the `qtune` command to its end."""
    process = qtune_process(*arguments)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


WARM = warm.Server()


def warm_qtune_process(*arguments: str | Path) -> warm.Warm:
    """As `qtune_process`, for a test that is not about the start: the libraries are there already (`warm.py`)."""
    return WARM.start(warm.COMMAND, *arguments)


def run_warm_qtune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As `run_qtune`, for a test that is not about the start."""
    return run_warm(warm.COMMAND, *arguments)


def run_warm(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a Python program, given as text, to its end in a process that has the libraries."""
    process = WARM.start(program, *arguments)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, hidden 64, vocabulary 320, with a real tokenizer and ChatML's template."""
    from export_models import tiny_base, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_base(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for prepared rows that no other run of the tests has touched."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """`ROWS` as a JSONL file."""
    return rows_in(tmp_path)


def rows_in(folder: Path) -> Path:
    """`ROWS` as a JSONL file."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def short_answers(patch: pytest.MonkeyPatch) -> None:
    """Ends each answer of a run's evaluations after a few tokens."""
    patch.setattr("qtune.training.sample_answers.MOST_TOKENS", warm.SHORT_ANSWER)


WriteRecipe = Callable[..., Path]


@pytest.fixture
def write_recipe(tiny_model: Path, rows_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRecipe:
    """A function that writes a recipe for the tiny model; runs go to `tmp_path`/runs.

    Arguments: the name, and the texts of the tables adapter, training, data and quantization. It computes in float32
    unless its quantization says otherwise, so that figures are the same on every processor.
    """
    monkeypatch.setenv("QTUNE_CACHE", str(own_cache))
    short_answers(monkeypatch)

    return functools.partial(recipe_for, tiny_model, rows_file)


def recipe_for(
    base: Path,
    rows: Path,
    name: str = "tiny",
    *,
    adapter: str = 'kind = "lora"\nrank = 4',
    training: str = "",
    data: str = "",
    quantization: str = "minimum_share = 0.0",
) -> Path:
    """Writes a recipe beside its rows; `write_recipe` says the rest."""
    file = rows.with_name(f"{name}.toml")
    pinned = "" if "compute_dtype" in quantization else 'compute_dtype = "float32"\n'
    file.write_text(
        f'[model]\nbase = "{base}"\n'
        f"[quantization]\n{pinned}{quantization}\n"
        f"[adapter]\n{adapter}\n"
        f'[data]\ntrain = "{rows.name}"\nvalidation = 0.1\nmax_length = 128\n{data}\n'
        f"[training]\n{training}\n"
        f'[output]\ndirectory = "{rows.parent / "runs"}"\n'
    )
    return file
