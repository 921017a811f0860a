"""The three tasks that soft prompts are searched on: rows to train on, to choose by, and to open once at the end."""

import dataclasses
import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_quickstart_data as quickstart
import make_triage_data as triage

from qtune.data.swapped import Incoming, usual_words

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Rows in the "messages" form. Choices are made on `validation`; `test` is for the chosen ones alone."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    instruction: str
    """What is wanted, in a sentence, for starts from a text."""
    known: dict[str, int] = field(default_factory=dict)
    """Of each split that is asked, how many rows, the first ones, have values that stand in training rows; none: they
    are not told apart."""


@functools.cache
def tasks() -> Mapping[str, Task]:
    """By name; made once, since the words of one are read off a vocabulary."""
    quickstart = quickstart_task()
    others = (
        docstring_task(),
        triage_task(),
        swapped_task(quickstart),
        swapped_task(triage_task()),
        spelled_task(quickstart),
    )
    return {task.name: task for task in (quickstart, *others)}


def read(file: Path) -> list[Row]:
    """Of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def quickstart_task() -> Task:
    """Requests to commands. Of the rows that are held out half have values that stand in training rows, in other
    combinations, and half, the second, have names, rooms, events and messages that stand in none."""
    rows = read(DATA / "quickstart_train.jsonl")
    new, more = new_quickstart_rows(quickstart.NEW_VALUES, 200), new_quickstart_rows(quickstart.MORE_NEW_VALUES, 100)
    return Task(
        "quickstart",
        tuple(rows[80:]),
        tuple(rows[:80] + new[:80] + more),
        tuple(read(DATA / "quickstart_test.jsonl")[:120] + new[80:]),
        "Turn the request into one JSON command.",
        {"validation": 80, "test": 120},
    )


def new_quickstart_rows(values: dict[str, Any], count: int) -> list[Row]:
    """Commands of the four kinds whose values are words, in the quickstart's phrasings, with values of their own."""
    draw = random.Random(77)
    kept = {name: getattr(quickstart, name) for name in values}
    for name, own in values.items():
        setattr(quickstart, name, own)
    try:
        named = ("send_message", "add_event", "set_temperature", "convert_units")
        commands = [command for command in quickstart.COMMANDS if command.name in named]
        pairs = [quickstart.rows_of(dataclasses.replace(command), draw) for command in commands]
        return [quickstart.conversation(*next(pairs[place % len(pairs)])) for place in range(count)]
    finally:
        for name, own in kept.items():
            setattr(quickstart, name, own)


def docstring_task() -> Task:
    """Questions about the standard library. Few answers can be known, so that the loss counts, not the exact match."""
    rows = read(DATA / "docstrings.jsonl")
    return Task(
        "docstrings",
        tuple(rows[:440]),
        tuple(rows[440:520]),
        tuple(rows[520:]),
        "Answer the question about Python's standard library as its documentation does.",
    )


def triage_task() -> Task:
    rows = {split: tuple(made) for split, made in triage.make_rows().items()}
    instruction = "Name the topic, the product and the order number of the letter."
    return Task("triage", rows["train"], rows["validation"], rows["test"], instruction)


def swapped_task(task: Task) -> Task:
    """The same with more training rows, which have other words in request and answer. What is asked is as it was."""
    words = Incoming(usual_words([row["messages"][-1]["content"] for row in docstring_task().train], least=3))
    more = quickstart.swapped_rows(task.train, words, COPIES)
    return dataclasses.replace(task, name=f"{task.name}_swapped", train=(*task.train, *more))


def spelled_task(task: Task) -> Task:
    """The same with words that the built-in model has to spell. None of them stands in rows that are asked."""
    words = quickstart.words_for((*task.validation, *task.test))
    more = quickstart.swapped_rows(task.train, words, COPIES)
    return dataclasses.replace(task, name=f"{task.name}_spelled", train=(*task.train, *more))


COPIES = 3
