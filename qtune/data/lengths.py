"""Rows longer than max_length: refused, dropped or cut, and never without a note."""

import sys
from dataclasses import replace

from qtune.data.masks import IGNORED, Encoded
from qtune.recipe.schema import Data


def most_tokens(data: Data) -> int:
    """Tokens of the longest row that would be trained on: those beyond it stop a run, unless they are allowed."""
    return sys.maxsize if "too-long" in data.allow else data.max_length


def shortened(example: Encoded, max_length: int, on_long_row: str, bos: int | None) -> Encoded | None:
    """The example under the policy; None when it is dropped.

    "error" leaves a long row as it is with the note "too-long". The cuts note "cut-prompt", and "cut-answer" where
    scored tokens are lost. Cutting from the left keeps BOS, without which a model reads everything else differently.
    """
    if len(example.input_ids) <= max_length:
        return example
    match on_long_row:
        case "drop":
            return None
        case "cut-right":
            ids, labels = example.input_ids[:max_length], example.labels[:max_length]
        case "cut-left":
            kept = max_length
            head = [bos] if bos is not None and example.input_ids[0] == bos else []
            kept -= len(head)
            ids = head + example.input_ids[len(example.input_ids) - kept :]
            labels = [IGNORED] * len(head) + example.labels[len(example.labels) - kept :]
        case _:
            return replace(example, notes=example.notes | {"too-long"})
    lost = _scored(example.labels) - _scored(labels)
    return replace(
        example, input_ids=ids, labels=labels, notes=example.notes | {"cut-answer" if lost else "cut-prompt"}
    )


def windows(example: Encoded, max_length: int) -> list[Encoded]:
    """A document as consecutive pieces of at most max_length tokens: nothing of it is lost."""
    ids, text = example.input_ids, example.conversation
    if len(ids) <= max_length:
        return [example]
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    # A piece of one token has nothing to predict.
    return [
        Encoded(replace(text, place=f"{text.place} (part {number})"), piece, list(piece), example.notes)
        for number, piece in enumerate(pieces, 1)
        if len(piece) > 1
    ]


def _scored(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)
