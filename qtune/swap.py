"""`qtune swap`: a recipe whose training rows come with copies of themselves that have other words."""

import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation
from qtune.data.order import unmerged
from qtune.data.prepare import Prepared, prepare
from qtune.data.sources import HUB
from qtune.data.swap_files import MADE_BY, Files, GivenWords, files_made_before
from qtune.data.swapped import (
    Copy,
    Incoming,
    answer_of,
    english_words,
    exchangeable,
    request_of,
    spelled_words,
    with_other_words,
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
class Chosen:
    """Words that come in, none of which is asked, and what they are."""

    words: Incoming
    kind: str


@dataclass(frozen=True)
class Swapped:
    """What was written, and what is to be seen of it."""

    files: Files
    rows: int
    """With a word to exchange."""
    unchanged: int
    """Without one."""
    have_own_file: bool
    """Whether the rows without a word to exchange are in a file of their own, where they have a weight."""
    times: int
    """How often each of those counts, so that kinds of rows keep their shares."""
    copies: int
    held_out: int
    """Rows in a file of their own; 0 where the recipe names them itself, or wants none."""
    chosen: Chosen
    exchanged: Counter[str]
    """Of each word that has become another one, how often."""
    examples: tuple[tuple[Conversation, Copy], ...]
    """A few rows beside what has become of them."""
    came_in: tuple[str, ...]
    """The different words that came in."""
    removed: tuple[Path, ...] = ()
    """Of the swap that was replaced, which the new one has none of."""
    strange: tuple[Path, ...] = ()
    """Files by such names that no swap is known to have written."""


def swap(
    resolved: Resolved, recipe: Path, copies: int, words: GivenWords | None, keep: Collection[str] = ()
) -> Swapped:
    """Writes the recipe `recipe`, and the rows that it trains on: those of `resolved`, each with so many copies. Rows
    without a word to exchange count as often as the others are there. Rows that `resolved` sets aside stay aside: they
    come into a file of their own, and nothing is made of them.

    words: those of a text, which come in; None: words of the vocabulary that the model has to spell. Words of rows that
    are held out or asked in the end never come in.

    Raises:
        DataError: the rows cannot be used, or no word of theirs can be exchanged.
        RecipeError: fewer than LEAST_WORDS may come in.
    """
    data = resolved.recipe.data
    whole = data.model_copy(update={"packing": False, "streaming": False})
    seed = resolved.recipe.training.seed
    tokenizer = load_tokenizer(resolved.recipe.model)
    prepared = prepare(whole, tokenizer, resolved.folder, seed=seed)
    talks = _talks(prepared.examples["train"], data)
    _refuse_documents(talks)
    shared = exchangeable(talks, keep)
    changing = [(talk, own) for talk, own in zip(talks, shared, strict=True) if own]
    if not changing:
        raise DataError(
            Problem(
                "data.train",
                "no word stands in a request and in its answer that is no part of their form (a tenth of the requests "
                "or answers has it) and in no other form as well (another case, a part of an address); rows with other "
                "words are for answers that copy from their requests",
            )
        )
    asked = [talk for split, rows in prepared.examples.items() if split != "train" for talk in _talks(rows, data)]
    chosen = _words_for(talks, asked, tokenizer) if words is None else _enough(words, asked)
    originals = [talk for talk, _ in changing]
    made = list(with_other_words(originals, [own for _, own in changing], chosen.words, copies))
    unchanged = [talk for talk, own in zip(talks, shared, strict=True) if not own]
    files = Files(recipe)
    held_out = _held_out(prepared, data)
    rows = [*originals, *(one.talk for one in made)]
    # A stream gives each row of its files once an epoch.
    weighs = bool(unchanged) and data.streaming is not True
    weight = 1 + copies if weighs else None
    text = _recipe_text(resolved, files, has_held_out=bool(held_out), weight=weight)
    check_recipe(text, recipe, need_rows=False)
    others = [
        file
        for file, is_made in ((files.unchanged, weighs), (files.held_out, held_out))
        if not is_made and file.is_file()
    ]
    earlier = files_made_before(recipe)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    _write_rows(files.rows, rows if weighs else [*rows, *unchanged * (1 + copies)])
    if weighs:
        _write_rows(files.unchanged, unchanged)
    if held_out:
        _write_rows(files.held_out, held_out)
    write_text(recipe, text)
    removed = tuple(file for file in others if file in earlier)
    for file in removed:  # after the recipe that named them is gone
        file.unlink()
    exchanged = Counter(word for one in made for word in one.exchanged)
    examples = tuple(zip(originals[:3], made, strict=False))
    counts = len(originals), len(unchanged), weighs, 1 + copies, len(made), len(held_out)
    strange = tuple(file for file in others if file not in removed)
    return Swapped(files, *counts, chosen, exchanged, examples, _words_in(made), removed, strange)


def _words_in(made: Sequence[Copy]) -> tuple[str, ...]:
    """The different words that came in, in their order."""
    return tuple(dict.fromkeys(new for copy in made for new in copy.exchanged.values()))


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
        return Chosen(found, "words that the model's vocabulary has behind a space alone, so that it must spell them")
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


def _enough(given: GivenWords, asked: Sequence[Conversation]) -> Chosen:
    """Words of a text without those that are asked.

    Raises:
        RecipeError: there are few of them.
    """
    left, name = given.words.without(asked), f"--words {given.file}"
    if left.choice >= LEAST_WORDS:
        return Chosen(left, f"words of {name}")
    gone = given.words.choice - left.choice
    without = f" ({gone} more stand in rows that are held out or asked in the end, and may not)" if gone else ""
    said = f"has {left.choice} different words of 3 to 11 small letters{without}; at least {LEAST_WORDS} must come in"
    raise RecipeError(Problem(name, f"{said}, so name a longer text"))


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


def _recipe_text(resolved: Resolved, files: Files, *, has_held_out: bool, weight: int | None) -> str:
    """The recipe with the rows that were written, which have a shape of their own, in the place of its own rows.

    weight: of those without a word to exchange; None: there are none, or they are in one file with the others.
    """
    data = resolved.recipe.data
    train: Any = files.rows.name
    if weight is not None:
        train = [{"path": files.rows.name}, {"path": files.unchanged.name, "weight": float(weight)}]
    gone = ["columns", "format", *(["validation", "validation_seed"] if has_held_out else [])]
    text = rewritten(text_for(resolved, files.recipe), {("data", key): None for key in gone}, "")
    changes: dict[KeyPath, Any] = {("data", "train"): train}
    text = rewritten(text, changes, f"{MADE_BY}, of the rows of {resolved.file.name}", replaced=changes)
    if has_held_out:
        changes = {("data", "validation"): files.held_out.name}
        text = rewritten(text, changes, "those that were set aside of them; nothing is made of these")
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
    said = [f"{made.files.rows}: {made.rows:,} rows and {made.copies:,} copies with other words"]
    if made.unchanged:
        one = made.unchanged == 1
        where = f"{made.files.unchanged}: " if made.have_own_file else ""
        said.append(
            f"{where}{made.unchanged:,} {'row has' if one else 'rows have'} no word to exchange; nothing is made of "
            f"{'it, and it counts' if one else 'them, and they count'} {made.times} times, so that kinds of rows keep "
            f"their shares{'' if made.have_own_file else f' (in {made.files.rows} they stand so often)'}"
        )
    if made.held_out:
        said.append(f"{made.files.held_out}: the {made.held_out:,} rows that are held out; nothing is made of them")
    said += [f"{file}: removed, for only the swap that was replaced had such rows" for file in made.removed]
    said += [f"{file}: stays, and the new recipe does not read it" for file in made.strange]
    said += [
        f"words that were exchanged, how often: {often}{more}; what must stay is named with --keep WORD",
        f"what came in: {len(made.came_in):,} different words, as {', '.join(made.came_in[:3])}; drawn from "
        f"{made.chosen.words.choice:,} {made.chosen.kind}",
    ]
    training = resolved.recipe.training
    if training.steps is None:
        fewer = f"{training.epochs / made.times:.4g}"
        command = shlex.join(["qtune", "run", str(made.files.recipe), "--set", f"training.epochs={fewer}"])
        said.append(f"an epoch has {made.times} times as many steps now; as many as before: {command}")
    return said
