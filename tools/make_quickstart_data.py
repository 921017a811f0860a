"""Writes the quickstart's data: English requests and the one JSON command that each of them means.

    python tools/make_quickstart_data.py            # writes recipes/data/quickstart_{train,test,swapped}.jsonl

The same seed always gives the same files. Both files use the same slot values (a room, a time, a name), but no
command with the same combination of arguments is in both, and no request is. A model that only memorised the training
rows answers none of the test rows. The third file has the training rows twice with other words in request and answer,
as `qtune swap` makes them.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qtune.data.conversation import Conversation
from qtune.data.swapped import Incoming, spelled_words, swapped
from qtune.model.load import load_tokenizer
from qtune.recipe.schema import Model

SEED = 20
TRAIN_ROWS_PER_COMMAND = 112
TEST_ROWS_PER_COMMAND = 20
COPIES = 2
"""Of each row, with other words."""

Slots: TypeAlias = dict[str, tuple[str, str | int]]
"""What is said and what is meant: {"day": ("on Monday", "Monday")}."""


@dataclass(frozen=True)
class Command:
    """One kind of command: its phrasings ("{slot}" is what is said) and a draw of its slots."""

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random], Slots]


ROOMS = (
    "kitchen", "bedroom", "bathroom", "living room", "hallway", "office", "garage", "nursery", "attic", "basement",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow")
PEOPLE = ("Maria", "Tom", "Anna", "David", "Sarah", "Peter", "Olga", "Lucas", "Paul", "Sam", "Elena", "Laura")
EVENTS = (
    "dentist", "team meeting", "yoga class", "piano lesson", "lunch with Olga", "parents' evening", "haircut",
    "car service", "book club", "job interview", "football practice", "dinner with Sam", "vet appointment",
    "budget review", "birthday party", "flu shot",
)  # fmt: skip
MESSAGES = (
    "I'm running late", "dinner is ready", "the train is delayed", "I'm waiting at the station", "I left early",
    "the keys are under the mat", "I'll call after lunch", "the meeting has moved", "I'll bring the cake",
    "I love the flowers", "we won the match", "I'm on my way", "I have the tickets", "the car is fixed",
    "I passed the exam", "I can't make it tonight", "the parcel has arrived", "the cat is fed", "I got the job",
    "we are out of milk",
)  # fmt: skip
UNITS = (
    ("miles", "kilometers"), ("pounds", "kilograms"), ("inches", "centimeters"), ("liters", "gallons"),
    ("feet", "meters"), ("ounces", "grams"),
)  # fmt: skip


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


MORE_NEW_VALUES = {
    "ROOMS": ("pantry", "balcony", "studio", "gym", "dining room", "greenhouse", "loft", "waiting room"),
    "PEOPLE": ("Bjorn", "Fatima", "Kenji", "Rosa", "Liam", "Nadia", "Oscar", "Greta"),
    "EVENTS": (
        "piano tuning", "blood test", "dance class", "bank visit", "wine tasting", "riding lesson", "staff training",
        "breakfast with Rosa",
    ),
    "MESSAGES": (
        "the taxi is here", "I lost my wallet", "the door is locked", "we have no water", "I'm in the queue",
        "the baby is awake", "I'll wait at the gate", "the lights are on",
    ),
    "UNITS": (("furlongs", "feet"), ("tons", "pounds"), ("cups", "milliliters"), ("knots", "miles")),
}  # fmt: skip
"""Two draws of values that stand in no training row, for `soft_prompt_tasks.py`."""


def number(value: int) -> tuple[str, int]:
    return str(value), value


def clock_time(random_: random.Random) -> tuple[str, str]:
    """A time on the 24-hour clock with two digits for the hour.

    Times with am and pm are left out: a 135M model would need more rows for that arithmetic than for all else.
    """
    time = f"{random_.randrange(10, 24)}:{random_.choice(('00', '00', '15', '30', '45'))}"
    return time, time


def weekday(random_: random.Random) -> tuple[str, str]:
    day = random_.choice(DAYS)
    return (f"on {day}" if day.endswith("day") and day[0].isupper() else day), day


def word(random_: random.Random, words: tuple[str, ...]) -> tuple[str, str]:
    chosen = random_.choice(words)
    return chosen, chosen


def timer_slots(random_: random.Random) -> Slots:
    unit = random_.choice(("seconds", "minutes", "minutes", "hours"))
    return {"amount": number(random_.randrange(2, 13 if unit == "hours" else 100)), "unit": (unit, unit)}


def alarm_slots(random_: random.Random) -> Slots:
    return {"day": weekday(random_), "time": clock_time(random_)}


def event_slots(random_: random.Random) -> Slots:
    return {"title": word(random_, EVENTS), "day": weekday(random_), "time": clock_time(random_)}


def message_slots(random_: random.Random) -> Slots:
    return {"to": word(random_, PEOPLE), "text": word(random_, MESSAGES)}


def temperature_slots(random_: random.Random) -> Slots:
    return {"room": word(random_, ROOMS), "degrees": number(random_.randrange(12, 31))}


def convert_slots(random_: random.Random) -> Slots:
    source, target = random_.sample(random_.choice(UNITS), 2)
    return {"value": number(random_.randrange(2, 500)), "from": (source, source), "to": (target, target)}


COMMANDS = (
    Command("set_timer", (
        "Set a timer for {amount} {unit}", "Start a timer of {amount} {unit}", "Count down {amount} {unit}",
        "Timer for {amount} {unit}", "Let me know when {amount} {unit} are over", "I need a timer for {amount} {unit}",
        "Give me {amount} {unit} on the clock", "Start a countdown of {amount} {unit}", "Ring in {amount} {unit}",
        "Tell me when {amount} {unit} have passed",
    ), timer_slots),
    Command("set_alarm", (
        "Wake me up at {time} {day}", "Set an alarm for {time} {day}", "Alarm {day} at {time}",
        "I have to get up at {time} {day}", "Make sure I'm awake by {time} {day}", "I want to be woken at {time} {day}",
        "Get me out of bed at {time} {day}", "Set the alarm clock to {time} {day}",
        "Don't let me sleep past {time} {day}", "The alarm should go off at {time} {day}",
    ), alarm_slots),
    Command("add_event", (
        "Add {title} to my calendar {day} at {time}", "Schedule {title} {day} at {time}",
        "Put {title} in the calendar for {time} {day}", "I have {title} {day} at {time}",
        "Book {title} for {time} {day}", "Calendar entry: {title}, {day} at {time}",
        "Create an event {day} at {time} called {title}", "Remember {title} {day} at {time}",
        "New appointment {day} at {time}: {title}", "Plan {title} at {time} {day}",
    ), event_slots),
    Command("send_message", (
        "Tell {to} that {text}", "Text {to}: {text}", "Send {to} a message saying {text}",
        "Let {to} know that {text}", "Write to {to} that {text}", "Message {to} that {text}",
        "Send a text to {to}: {text}", "Drop {to} a line saying {text}", "Say to {to} that {text}",
        "I want to text {to} that {text}",
    ), message_slots),
    Command("set_temperature", (
        "Set the {room} to {degrees} degrees", "Make the {room} {degrees} degrees",
        "Heat the {room} to {degrees} degrees", "Bring the {room} to {degrees} degrees",
        "I want {degrees} degrees in the {room}", "Change the {room} to {degrees} degrees",
        "The {room} should be {degrees} degrees", "Turn the thermostat in the {room} to {degrees}",
        "Adjust the {room} temperature to {degrees}", "Keep the {room} at {degrees} degrees",
    ), temperature_slots),
    Command("convert_units", (
        "Convert {value} {from} to {to}", "What is {value} {from} in {to}?", "How many {to} are {value} {from}?",
        "{value} {from} in {to}", "Change {value} {from} into {to}", "Give me {value} {from} in {to}",
        "How much is {value} {from} in {to}?", "I need {value} {from} as {to}", "Work out {value} {from} in {to}",
        "Express {value} {from} in {to}",
    ), convert_slots),
)  # fmt: skip


def request_text(random_: random.Random, phrasing: str, slots: Slots) -> str:
    """The request as typed: now and then with a greeting, a please, a full stop or no capital."""
    text = phrasing.format(**{slot: said for slot, (said, _) in slots.items()})
    # A slot's own first letter is part of the answer ("Maria …"), and "I" is never small.
    lower = text if phrasing.startswith(("{", "I ")) else text[0].lower() + text[1:]
    match random_.randrange(7):
        case 0:
            return f"Hey, {lower}"
        case 1:
            return lower
        case 2:
            return text if phrasing.endswith(("?", "{text}")) else f"{text}."
        case 3 if not phrasing.endswith(("?", "{text}")):  # what stands behind a message would be part of it
            return f"{text}, please"
        case _:
            return text


def rows_of(command: Command, random_: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (request, answer) pairs: the phrasings in turn, every answer and every request only once."""
    seen = set[str]()
    for phrasing in itertools.cycle(command.phrasings):
        slots = command.draw(random_)
        meant = {"command": command.name} | {slot: value for slot, (_, value) in slots.items()}
        request, answer = request_text(random_, phrasing, slots), json.dumps(meant, ensure_ascii=False)
        if not seen & {request, answer}:
            seen |= {request, answer}
            yield request, answer


def make_rows(seed: int = SEED) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training rows and test rows, each a conversation in the "messages" form, shuffled."""
    random_ = random.Random(seed)
    train: list[dict[str, object]] = []
    test: list[dict[str, object]] = []
    for command in COMMANDS:
        pairs = itertools.islice(rows_of(command, random_), TRAIN_ROWS_PER_COMMAND + TEST_ROWS_PER_COMMAND)
        rows = [conversation(request, answer) for request, answer in pairs]
        random_.shuffle(rows)
        train += rows[:TRAIN_ROWS_PER_COMMAND]
        test += rows[TRAIN_ROWS_PER_COMMAND:]
    random_.shuffle(train)
    random_.shuffle(test)
    return train, test


def conversation(request: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def words_for(asked: Sequence[dict[str, Any]]) -> Incoming:
    """Words that the quickstart's model has to spell, but those of rows that are asked."""
    talks = [Conversation(tuple(row["messages"])) for row in asked]
    return spelled_words(load_tokenizer(Model(base="builtin:smollm2-135m-instruct"))).without(talks)


def swapped_rows(rows: Sequence[dict[str, Any]], words: Incoming, copies: int) -> list[dict[str, Any]]:
    """`copies` times as many rows, with other words, which come from `words`."""
    talks = [Conversation(tuple(row["messages"])) for row in rows]
    return [{"messages": list(copy.talk.messages)} for copy in swapped(talks, words, copies)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parent.parent / "recipes" / "data"
    parser.add_argument("--output", type=Path, default=data, help="folder to write to (default: recipes/data)")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make_rows()
    values = [text for drawn in (NEW_VALUES, MORE_NEW_VALUES) for kind in drawn.values() for text in kind]
    new = [conversation(str(text), "") for text in values]
    made = {"train": train, "test": test, "swapped": swapped_rows(train, words_for([*test, *new]), COPIES)}
    for name, rows in made.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"quickstart_{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
