"""More training rows for answers that copy from their request: the same rows with other words in both.

    python tools/swap_words.py rows.jsonl swapped.jsonl --copies 3

A model that is trained on twelve names and ten rooms learns to choose among them; one that has never seen a value twice
has to learn to copy it. Rows are in the "messages" form. A word is exchanged where it stands in the last request and in
its answer and is no part of the form of answers (which a word in a tenth of them is); case stays. Rows in which nothing
is exchanged are written too, so that the shares of kinds of rows stay. Which words come in: those that stand three or
more times in the answers of `--words`, English prose by default.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PROSE = Path(__file__).resolve().parent.parent / "recipes" / "data" / "docstrings.jsonl"
SHARE = 0.6
"""Of the words that could be exchanged, those that are."""
COMMON = 0.1
"""A word in so large a share of the answers belongs to their form."""
SEED = 5


def swapped_rows(rows: Sequence[Row], words: Sequence[str], copies: int, seed: int = SEED) -> list[Row]:
    """`copies` times as many rows as `rows`, in their order."""
    draw, own = random.Random(seed), own_words(rows)
    return [swapped(row, own, words, draw) for _ in range(copies) for row in rows]


def contents(row: Row) -> tuple[str, str]:
    """(last request, its answer)."""
    request, answer = (message["content"] for message in row["messages"][-2:])
    return request, answer


def own_words(rows: Sequence[Row]) -> set[str]:
    """Words of answers that are no part of their form."""
    counts = Counter(word for row in rows for word in set(re.findall(r"\w+", contents(row)[1])))
    return {
        word for word, count in counts.items() if count < COMMON * len(rows) and re.fullmatch(r"[A-Za-z]{3,}", word)
    }


def usual_words(rows: Sequence[Row]) -> list[str]:
    """Words in small letters, of three to eleven of them, that stand in three or more places of the answers."""
    said = Counter(word for row in rows for word in re.findall(r"\b[a-z]{3,11}\b", contents(row)[1]))
    return sorted(word for word, count in said.items() if count > 2)


def swapped(row: Row, own: set[str], words: Sequence[str], draw: random.Random) -> Row:
    """The row with other words where its request and its answer share one of `own`."""
    request, answer = contents(row)
    shared = sorted(set(re.findall(r"\w+", request)) & set(re.findall(r"\w+", answer)) & own)
    for word in shared:
        if draw.random() < SHARE:
            other = draw.choice(words)
            other = other.capitalize() if word[0].isupper() else other
            request, answer = (re.sub(rf"\b{word}\b", other, text) for text in (request, answer))
    *before, asked, answered = row["messages"]
    return row | {"messages": [*before, asked | {"content": request}, answered | {"content": answer}]}


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--copies", type=int, default=3, help="of each row (default 3)")
    parser.add_argument("--words", type=Path, default=PROSE, help="rows whose answers the words come from")
    given = parser.parse_args()
    made = swapped_rows(read(given.rows), usual_words(read(given.words)), given.copies)
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")


if __name__ == "__main__":
    main()
