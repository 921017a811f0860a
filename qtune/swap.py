"""`qtune swap`: a recipe whose training rows come with copies of themselves that have other words."""

import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation
from qtune.data.files import data_files
from qtune.data.order import unmerged
from qtune.data.prepare import Prepared, prepare
from qtune.data.sources import HUB
from qtune.data.swapped import (
    Copy,
    Incoming,
    answer_of,
    english_words,
    exchangeable,
    request_of,
    spelled_words,
    swapped,
    usual_words,
)
from qtune.errors import DataError, Problem, RecipeError
from qtune.model.load import load_tokenizer
from qtune.recipe.file import Resolved, check_recipe
from qtune.recipe.schema import Data, FileSource, HubSource, KeyPath
from qtune.recipe.text import rewritten
from qtune.run.resolved import text_for
from qtune.whole import write_text

LEAST_WORDS = 100
"""Fewer that may come in would be one more list to be learned by heart."""


@dataclass(frozen=True)
class Files:
    """What is written, beside each other."""

    recipe: Path

    @property
    def rows(self) -> Path:
        """The training rows and their copies."""
        return self.recipe.with_suffix(".rows.jsonl")

    @property
    def held_out(self) -> Path:
        """The rows that a share of the training rows was, of which nothing is copied."""
        return self.recipe.with_suffix(".held-out.jsonl")


@dataclass(frozen=True)
class Chosen:
    """Words that come in, none of which is asked, and what they are."""

    words: Incoming
    kind: str


@dataclass(frozen=True)
class Swapped:
    """What was written, and what is to be seen of it."""

    files: Files
    rows: int
    copies: int
    held_out: int
    """Rows in a file of their own; 0 where the recipe names them itself, or wants none."""
    chosen: Chosen
    exchanged: Counter[str]
    """Of each word that has become another one, how often."""
    examples: tuple[tuple[Conversation, Copy], ...]
    """A few rows beside what has become of them."""


def require_free(resolved: Resolved, recipe: Path, *, force: bool) -> None:
    """Refuses a name under which something would be replaced, and with `force` what the new rows are made of.

    Raises:
        RecipeError: one of the files is there.
    """
    files = Files(recipe)
    there = [file for file in (files.recipe, files.rows, files.held_out) if file.exists()]
    read = {file.resolve() for file in (resolved.file, *_files_of(resolved))}
    if own := [str(file) for file in there if file.resolve() in read]:
        said = "is what the new rows would be made of; choose another --output"
        raise RecipeError(Problem(", ".join(own), said))
    if there and not force:
        said = f"{'is' if len(there) == 1 else 'are'} there already; choose another --output, or replace with --force"
        raise RecipeError(Problem(", ".join(map(str, there)), said))


def _files_of(resolved: Resolved) -> Iterator[Path]:
    """Every file of rows that the recipe names."""
    data = resolved.recipe.data
    for split in ("train", "validation", "test"):
        given = getattr(data, split)
        if given is not None and not isinstance(given, float):
            for source in given if isinstance(given, tuple) else (given,):
                path = source if isinstance(source, str) else getattr(source, "path", HUB)
                if not path.startswith(HUB):
                    yield from (file.path for file in data_files(path, resolved.folder, split))


def swap(resolved: Resolved, recipe: Path, copies: int, words: Path | None, keep: Collection[str] = ()) -> Swapped:
    """Writes the recipe `recipe`, and the rows that it trains on: those of `resolved`, each with so many copies. Rows
    that `resolved` sets aside stay aside: they come into a file of their own, and nothing is made of them.

    words: a text whose words come in; None: words of the vocabulary that the model has to spell. Words of rows that are
    held out or asked in the end never come in.

    Raises:
        DataError: the rows cannot be used, or no word of theirs can be exchanged.
        RecipeError: fewer than LEAST_WORDS may come in; sources have weights.
    """
    data = resolved.recipe.data
    _refuse_weights(data)
    given = None if words is None else _given(words)
    whole = data.model_copy(update={"packing": False, "streaming": False})
    seed = resolved.recipe.training.seed
    tokenizer = load_tokenizer(resolved.recipe.model)
    prepared = prepare(whole, tokenizer, resolved.folder, seed=seed)
    talks = _talks(prepared.examples["train"], data)
    _refuse_documents(talks)
    if not any(exchangeable(talks, keep)):
        raise DataError(
            Problem(
                "data.train",
                "no word stands in a request and in its answer that is no part of their form (a tenth of the requests "
                "or answers has it); rows with other words are for answers that copy from their requests",
            )
        )
    asked = [talk for split, rows in prepared.examples.items() if split != "train" for talk in _talks(rows, data)]
    chosen = _words_for(talks, asked, tokenizer) if given is None else _enough(given, asked, f"--words {words}")
    made = list(swapped(talks, chosen.words, copies, keep))
    exchanged = Counter(word for one in made for word in one.exchanged)
    if not exchanged:
        raise DataError(
            Problem("data.train", "of the few words that could be exchanged none was drawn; raise --copies")
        )
    files = Files(recipe)
    held_out = _held_out(prepared, data)
    text = _recipe_text(resolved, files, has_held_out=bool(held_out))
    check_recipe(text, recipe, need_rows=False)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    _write_rows(files.rows, [*talks, *(one.talk for one in made)])
    if held_out:
        _write_rows(files.held_out, held_out)
    write_text(recipe, text)
    pairs = zip(talks, made, strict=False)
    examples = tuple((talk, one) for talk, one in pairs if one.exchanged)[:3]
    return Swapped(files, len(talks), len(made), len(held_out), chosen, exchanged, examples)


def _refuse_weights(data: Data) -> None:
    sources = data.train if isinstance(data.train, tuple) else (data.train,)
    if any(not isinstance(source, str) and source.weight != 1 for source in sources):
        raise RecipeError(
            Problem("data.train", "has sources with weights, which one file of all their rows would lose; remove them")
        )


def _words_for(
    talks: Sequence[Conversation], asked: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Chosen:
    """Words that the model has to spell; English prose where its vocabulary has few. Both in letters that the rows
    have.

    Raises:
        RecipeError: there are few of both.
    """
    letters = {letter for talk in talks for letter in f"{request_of(talk)}{answer_of(talk)}"}
    found = spelled_words(tokenizer).of_letters(letters).without(asked)
    if found.choice >= LEAST_WORDS:
        return Chosen(found, "words that the model has as one token behind a space and spells elsewhere")
    prose = english_words().of_letters(letters).without(asked)
    if prose.choice >= LEAST_WORDS:
        return Chosen(prose, "words of English prose (the model's vocabulary has too few that it must spell)")
    raise RecipeError(
        Problem(
            "data.train",
            f"at least {LEAST_WORDS} words must come in, and in letters that its rows have the model's vocabulary has "
            f"{found.choice} that it must spell, and English prose {prose.choice}; name a text in the language of the "
            "rows with --words FILE",
        )
    )


def _enough(given: Incoming, asked: Sequence[Conversation], name: str) -> Chosen:
    """Words of a text without those that are asked.

    Raises:
        RecipeError: there are few of them.
    """
    left = given.without(asked)
    if left.choice >= LEAST_WORDS:
        return Chosen(left, f"words of {name}")
    gone = given.choice - left.choice
    without = f" ({gone} more stand in rows that are held out or asked in the end, and may not)" if gone else ""
    said = f"has {left.choice} different words of 3 to 11 small letters{without}; at least {LEAST_WORDS} must come in"
    raise RecipeError(Problem(name, f"{said}, so name a longer text"))


def _given(words: Path) -> Incoming:
    """The words of a text.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        found = usual_words([words.read_text(encoding="utf-8-sig")])
    except OSError as error:
        raise RecipeError(Problem(f"--words {words}", f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(f"--words {words}", f"is not UTF-8 text (byte {error.start})")) from error
    return Incoming(found)


def _talks(examples: Dataset, data: Data) -> list[Conversation]:
    """The conversations that examples are of, as the new recipe reads them to the same examples: its system prompt,
    which is merged into questions then, stands apart from them. Where a row was made into several, up to each of its
    answers, the whole one.

    A row that is read twice, of a file that the recipe names twice, is there twice.
    """
    talks: list[Conversation] = []
    for place, text in zip(examples["place"], examples["conversation"], strict=True):
        talk = Conversation.from_json(text, place)
        if talks and talks[-1].place == place and len(talks[-1].messages) < len(talk.messages):
            talks.pop()
        talks.append(talk)
    prompt = data.system_prompt
    if data.system != "merge" or prompt is None:
        return talks
    return [
        talk if talk.is_document else replace(talk, messages=tuple(unmerged(talk.messages, prompt))) for talk in talks
    ]


def _refuse_documents(talks: Iterable[Conversation]) -> None:
    for talk in talks:
        if talk.is_document:
            raise DataError(Problem(talk.place, "is raw text, in which no answer copies from a request"))


def _held_out(prepared: Prepared, data: Data) -> list[Conversation]:
    """Those that are a share of the training rows."""
    if not isinstance(data.validation, float) or "validation" not in prepared.examples:
        return []
    return _talks(prepared.examples["validation"], data)


def _recipe_text(resolved: Resolved, files: Files, *, has_held_out: bool) -> str:
    """The recipe with the rows that were written, which have a shape of their own, in the place of its own rows."""
    data = resolved.recipe.data
    changes: dict[KeyPath, Any] = {("data", "train"): files.rows.name, ("data", "columns"): None}
    changes["data", "format"] = None
    if has_held_out:
        changes |= {("data", "validation"): files.held_out.name, ("data", "validation_seed"): None}
    text = rewritten(text_for(resolved, files.recipe), changes, "")
    if not data.columns and data.format == "auto":
        return text
    others = check_recipe(text, files.recipe, need_rows=False).recipe.data
    named = {"test": others.test} | ({} if has_held_out else {"validation": others.validation})
    shaped: dict[KeyPath, Any] = {
        ("data", split): _with_shape(value, data)
        for split, value in named.items()
        if value is not None and not isinstance(value, float)
    }
    return rewritten(text, shaped, "")


def _with_shape(given: Any, data: Data) -> list[dict[str, Any]]:
    """Sources with the shape that [data] gave to all of them."""
    return [_shaped(source, data) for source in (given if isinstance(given, tuple) else (given,))]


def _shaped(source: str | FileSource | HubSource, data: Data) -> dict[str, Any]:
    if isinstance(source, str):
        is_hub = source.startswith(HUB)
        source = HubSource(hub=source.removeprefix(HUB)) if is_hub else FileSource(path=source)
    shape = {"columns": {**data.columns, **source.columns}, "format": source.format}
    if source.format == "auto":
        shape["format"] = data.format
    return source.model_copy(update=shape).model_dump(exclude_defaults=True)


def _write_rows(file: Path, talks: Sequence[Conversation]) -> None:
    write_text(file, "".join(f"{talk.to_json()}\n" for talk in talks))


def said_of(made: Swapped, resolved: Resolved) -> list[str]:
    """What there is to know of what was written, in sentences."""
    often = ", ".join(f"{word} {count:,}" for word, count in made.exchanged.most_common(12))
    more = f", and {len(made.exchanged) - 12:,} more" if len(made.exchanged) > 12 else ""
    said = [
        f"{made.files.rows}: {made.rows:,} rows and {made.copies:,} copies with other words",
        f"words that were exchanged, how often: {often}{more}; what must stay is named with --keep WORD",
        f"what came in: {made.chosen.words.choice:,} or more {made.chosen.kind}, as {_some_of(made)}",
    ]
    if made.held_out:
        said.append(f"{made.files.held_out}: the {made.held_out:,} rows that are held out; nothing is made of them")
    training = resolved.recipe.training
    if training.steps is None:
        times = 1 + made.copies // made.rows
        fewer = f"{training.epochs / times:.4g}"
        command = shlex.join(["qtune", "run", str(made.files.recipe), "--set", f"training.epochs={fewer}"])
        said.append(f"an epoch has {times} times as many steps now; as many as before: {command}")
    return said


def _some_of(made: Swapped) -> str:
    """A few of the words that came in."""
    came = dict.fromkeys(new for _, copy in made.examples for new in copy.exchanged.values())
    return ", ".join(list(came)[:3])
