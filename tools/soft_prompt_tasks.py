"""The three tasks that soft prompts are searched on: rows to train on, to choose by, and to open once at the end."""

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_quickstart_data as quickstart
import make_triage_data as triage

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


def tasks() -> dict[str, Task]:
    """By name."""
    return {task.name: task for task in (quickstart_task(), docstring_task(), triage_task())}


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def quickstart_task() -> Task:
    """Requests to commands. Of the rows that are held out half have values that stand in training rows, in other
    combinations, and half, the second, have names, rooms, events and messages that stand in none."""
    rows = read(DATA / "quickstart_train.jsonl")
    new = new_quickstart_rows(200)
    return Task(
        "quickstart",
        tuple(rows[80:]),
        tuple(rows[:80] + new[:80]),
        tuple(read(DATA / "quickstart_test.jsonl")[:120] + new[80:]),
        "Turn the request into one JSON command.",
    )


NEW_VALUES = {
    "ROOMS": ("cellar", "library", "sauna", "guest room", "laundry", "conservatory", "workshop", "playroom"),
    "PEOPLE": ("Ingrid", "Hassan", "Yuki", "Marcel", "Priya", "Dmitri", "Chloe", "Ahmed"),
    "EVENTS": (
        "chess club", "eye test", "choir practice", "tax advice", "house viewing", "swimming lesson", "board meeting",
        "tea with Ingrid",
    ),
    "MESSAGES": (
        "the bus has left", "I found your scarf", "the oven is hot", "we need more bread", "I'm at the airport",
        "the dog is asleep", "I'll be back at noon", "the window is open",
    ),
    "UNITS": (("yards", "meters"), ("stones", "kilograms"), ("pints", "liters"), ("acres", "hectares")),
}  # fmt: skip


def new_quickstart_rows(count: int) -> list[Row]:
    """Commands of the three kinds whose values are words, in the quickstart's phrasings, with values of their own."""
    draw = random.Random(77)
    kept = {name: getattr(quickstart, name) for name in NEW_VALUES}
    for name, values in NEW_VALUES.items():
        setattr(quickstart, name, values)
    try:
        named = ("send_message", "add_event", "set_temperature", "convert_units")
        commands = [command for command in quickstart.COMMANDS if command.name in named]
        pairs = [quickstart.rows_of(dataclasses.replace(command), draw) for command in commands]
        return [quickstart.conversation(*next(pairs[place % len(pairs)])) for place in range(count)]
    finally:
        for name, values in kept.items():
            setattr(quickstart, name, values)


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
