"""What is asked in a row, as hashes: rows that ask the same stay together, and are found on both sides of a split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from qtune.data.conversation import Conversation, Message


@dataclass(frozen=True)
class Prompts:
    """What stands before the answers of an example, and of the row that it was made of.

    A row that ends in one answer and scores no other has the same hash as `first` and as `whole`.
    """

    first: int
    """Before the first answer of the row that is scored: logs that grow turn by turn have it in common."""
    whole: int
    """Before the last answer of the row."""
    asked: tuple[int, ...]
    """Of each scored answer of the example two: what stands before it, and that without system messages beside the
    answer; of both, white space and case do not count."""


def prompts_of(row: Conversation, answers: Sequence[int], scored: Sequence[int]) -> Prompts:
    """Of an example of a row; `answers` are the messages of the row that are to be learned, and `scored` those of the
    example, which has the row's first messages."""
    if row.is_document:
        text = text_hash(row.answer)
        plain = text_hash(_plain(row.answer))
        return Prompts(text, text, (plain, plain))
    first = _hash_of(row.messages[: answers[0]])
    return Prompts(first, prompt_hash(row), _asked(row.messages, scored))


def prompt_hash(conversation: Conversation) -> int:
    """Of everything that stands before the last answer; of raw text, which has no prompt, of all of it."""
    return text_hash(conversation.answer) if conversation.is_document else _hash_of(conversation.prompt)


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b as a signed integer, the same in every process and version."""
    return _number(hashlib.blake2b(text.encode(), digest_size=8))


def _hash_of(messages: Sequence[Message]) -> int:
    return text_hash(json.dumps(messages, ensure_ascii=False))


def _asked(messages: Sequence[Message], scored: Sequence[int]) -> tuple[int, ...]:
    """Read once from the first message to the last: each prompt goes on where the one before it ends."""
    everything, unguided = (hashlib.blake2b(digest_size=8) for _ in range(2))
    found: list[int] = []
    for index, message in enumerate(messages[: max(scored) + 1]):
        said = _said(message)
        if index in scored:
            answered = unguided.copy()
            answered.update(said)
            found += _number(everything), _number(answered)
        everything.update(said)
        if message["role"] != "system":
            unguided.update(said)
    return tuple(found)


def _said(message: Message) -> bytes:
    text = _plain(str(message.get("content") or ""))
    return json.dumps([message["role"], text, message.get("tool_calls") or []]).encode()


def _plain(text: str) -> str:
    """A text without what its white space and its case say."""
    return " ".join(text.split()).casefold()


def _number(digest: "hashlib.blake2b") -> int:
    return int.from_bytes(digest.digest(), "big", signed=True)
