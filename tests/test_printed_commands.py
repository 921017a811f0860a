"""Every command of ours that is printed can be pasted: verb and options are there, and a run would begin."""

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main
from conftest import WriteRecipe
from test_training_train import TWO_EPOCHS, run, stopped_run

from qtune import cli
from qtune.errors import QtuneError
from qtune.preflight import examine
from qtune.recipe.file import load_recipe
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.resumption import nothing_to_resume, resumed_recipe
from qtune.training.callbacks import after_divergence
from qtune.training.train import _branched

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qtune"
GROUP = typer.main.get_command(cli.app)
VALUE = "1"
"""Stands for what is put into a text when it is printed: a number passes for a file, a name and a number."""
VERBS_OF_SENTENCES = (
    "and or begins goes writes shows measures says traces predicts loads finds is it shares would settles on without"
)
END = re.compile(r"[;,:)`’”\"\n]|\.(?=\s|$)| {2}| \(|(?<= )(" + "|".join(VERBS_OF_SENTENCES.split()) + r")\b")
"""Where a command ends and the sentence goes on."""


def _text(node: ast.expr) -> str | None:
    """A text of the source, with a value for everything that is put into it; None for what is none."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or VALUE for part in parts)
        case ast.List(elts=[ast.Constant(value="qtune"), *rest]):
            words = ("" if isinstance(one, ast.Starred) else _text(one) or VALUE for one in rest)
            return " ".join(["qtune", *words]).strip()
    return None


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    nodes = list(ast.walk(tree))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    left_out = docstrings | {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.expr) and id(node) not in left_out and (text := _text(node)) is not None:
            yield node.lineno, text


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command in a text: from "qtune VERB" to the end of the command."""
    for found in re.finditer(r"\bqtune (" + "|".join(GROUP.commands) + r")\b", text):
        rest = text[found.end() :]
        end = END.search(rest)
        yield [found[1], *shlex.split(rest[: end.start()] if end else rest)]


def _sources() -> Iterator[tuple[str, list[str]]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        source = file.read_text()
        for line, text in _texts(ast.parse(source)) if "qtune" in source.replace("from qtune", "") else ():
            for words in commands_in(text):
                yield f"{file.relative_to(PACKAGE)}:{line}", words


SOURCES = list(_sources())


def test_commands_are_found_in_the_sources() -> None:
    assert len(SOURCES) > 35
    assert {"run", "eval", "export", "fit", "profile", "init", "check", "report"} <= {words[0] for _, words in SOURCES}


def _documented() -> Iterator[tuple[str, list[str]]]:
    """Commands of the documents: in code spans, and on lines of code."""
    for file in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]):
        text = re.sub(r"<!--.*?-->", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        spans = re.findall(r"`(qtune [a-z][^`]*)`", text)
        lines = re.findall(r"^ {4}(?:\$ )?(qtune [a-z].*)$", text, re.MULTILINE)
        for code in [*spans, *lines]:
            words = shlex.split(code.replace("\n", " ").replace("…", VALUE).replace("|", "\\|"), comments=True)
            if words[1:2] and words[1] in GROUP.commands:
                yield file.name, words[1:]


DOCUMENTED = list(_documented())


def test_commands_are_found_in_the_documents() -> None:
    assert len(DOCUMENTED) > 60
    assert {words[0] for _, words in DOCUMENTED} == set(GROUP.commands)


@pytest.mark.parametrize(("place", "words"), DOCUMENTED, ids=[f"{place} {' '.join(one)}" for place, one in DOCUMENTED])
def test_what_the_documents_show_has_a_verb_s_own_options_and_as_many_arguments(place: str, words: list[str]) -> None:
    require_parsed(place, words)


@pytest.mark.parametrize(("place", "words"), SOURCES, ids=[f"{place} {' '.join(words)}" for place, words in SOURCES])
def test_what_is_printed_has_a_verb_s_own_options_and_as_many_arguments(place: str, words: list[str]) -> None:
    require_parsed(place, words)


def require_parsed(place: str, words: list[str]) -> None:
    verb, *rest = words
    command = GROUP.commands[verb]
    arguments = sum(
        abs(param.nargs) * (99 if param.nargs < 0 else 1)
        for param in command.params
        if param.param_type_name == "argument"
    )
    context = typer.Context(command, info_name=verb, resilient_parsing=True)
    _, left, _ = command.make_parser(context).parse_args(args=list(rest))
    assert not [word for word in left if word.startswith("-")], place
    assert len(left) <= arguments, place
    assert "…" not in rest, place


def changes_of(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option == "--set"]


def require_right(command: str) -> None:
    """What a command would do before it reads a weight."""
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("qtune", "run")
    target = next(Path(word) for word in words if Path(word).exists())
    resolved = resumed_recipe(RunDir.open(target), changes_of(words)) if "--resume" in words else None
    examine(resolved or load_recipe(target, changes_of(words))).require()


def told(error: QtuneError) -> str:
    """The command at the end of what is said."""
    return re.findall(r"with: (qtune [^(\n]*)", str(error))[0].strip()


@pytest.mark.slow
def test_a_run_that_has_ended_goes_on_as_another_with_the_values_that_were_asked_for(write_recipe: WriteRecipe) -> None:
    """Six rows are no whole number of the micro-batches of four that the first run has settled."""
    ended = run(write_recipe(training="steps = 1\nbatch_size = 4"))
    said = nothing_to_resume(ended, ["training.steps=2", "training.batch_size=6"])
    command = said.message.rpartition("with: ")[2]
    assert "output.name" not in command  # which is taken
    require_right(command)


@pytest.mark.slow
def test_what_a_stopped_run_prints_can_be_pasted(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = stopped_run(write_recipe(training=TWO_EPOCHS), monkeypatch, step=5)
    with pytest.raises(QtuneError) as refused:
        resumed_recipe(stopped, ["training.steps=6"])
    assert [problem.place for problem in refused.value.problems] == ["--set training.steps"]  # and not epochs
    with pytest.raises(QtuneError) as refused:
        resumed_recipe(stopped, ["training.batch_size=6", "training.seed=3"])
    assert changes_of(shlex.split(told(refused.value)))[-2:] == ["training.batch_size=6", "training.seed=3"]
    require_right(told(refused.value))
    require_right(after_divergence(complete_checkpoints(stopped.checkpoints)).rpartition("with: ")[2])
    shutil.rmtree(stopped.checkpoints)
    with pytest.raises(QtuneError) as nowhere:
        _branched(stopped, ["training.learning_rate=1e-5"])
    require_right(told(nowhere.value))
