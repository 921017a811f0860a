"""Rows once more with other words in request and answer, so that a model learns to copy, not a list of names.

A model that is trained on twelve names and ten rooms learns to choose among them; one that seldom sees a value twice
has to learn to copy it. A word is exchanged where it stands in what is asked and in what is answered, everywhere in its
row by the same other one. Words that belong to the form of rows stay, and so does a word that its row has in another
form as well, as a name in an address: that would still say the old one.
"""

import functools
import json
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qtune.data.conversation import Conversation, Message
from qtune.recipe.shipped import shipped_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.6
"""Of the words that could be exchanged, those that are: names come beside names that stay."""
COMMON = 0.1
"""A word in so large a share of the requests, or of the answers, belongs to their form."""
SEED = 5
TRIES = 100
"""To draw a word that a row has not; of as many words as may come in a row has few."""
SHORT = 3
"""Letters that may stand for a whole word in an address: "k.lange"."""
TEXTS = ("content", "reasoning_content")
"""Of a message."""
OWN = r"[^\W\d_]{3,}"
"""What can be exchanged: a word of letters alone; numbers and marks mean what they say."""
USUAL_LETTERS = r"[^\W\d_]{3,11}"
"""What comes in."""


@dataclass(frozen=True)
class Incoming:
    """Words that may take the place of others."""

    small: Sequence[str]
    capital: Sequence[str] = ()
    """Those with a capital, for words that have one; empty: small ones with one."""

    @property
    def choice(self) -> int:
        """How many may come in, of the case that has the fewest."""
        return min(len(self.small), len(self.capital)) if self.capital else len(self.small)

    def other(self, word: str, draw: random.Random) -> str:
        """A word in the case of `word`."""
        if not word[0].isupper():
            return draw.choice(self.small)
        other = draw.choice(self.capital or self.small)
        return other.upper() if word.isupper() else other.capitalize()

    def of_letters(self, letters: Collection[str]) -> "Incoming":
        """Those that are made of these letters, small or capital."""
        known = {letter.casefold() for letter in letters}
        left = ([word for word in words if known.issuperset(word.casefold())] for words in (self.small, self.capital))
        return Incoming(*left)

    def without(self, talks: Iterable[Conversation]) -> "Incoming":
        """Those that stand in none of the rows, in any case."""
        asked = {word.casefold() for talk in talks for word in words_of(f"{request_of(talk)} {answer_of(talk)}")}
        left = ([word for word in words if word.casefold() not in asked] for words in (self.small, self.capital))
        return Incoming(*left)


def spelled_words(tokenizer: "PreTrainedTokenizerBase") -> Incoming:
    """Words that a model reads behind a space as one token, and has to write as several behind any other character.

    A model that has learned a list of names by heart spells others wrong there: it must learn the pieces of a token.
    """
    mark = tokenizer('"', add_special_tokens=False)["input_ids"]
    # Behind a mark: decoders of SentencePiece's kind take the space of a text's first token away.
    opening = f"{tokenizer.decode(mark)} "
    texts = tokenizer.batch_decode([[*mark, number] for number in range(len(tokenizer))])
    behind = {text.removeprefix(opening) for text in texts if text.startswith(opening)}
    words = sorted(word for word in behind if re.fullmatch(USUAL_LETTERS, word))
    if not words:
        return Incoming(())
    pieces = tokenizer([f'"{word}' for word in words], add_special_tokens=False)["input_ids"]
    spelled = [word for word, ids in zip(words, pieces, strict=True) if len(ids) > len(mark) + 1]
    return Incoming([word for word in spelled if word.islower()], [word for word in spelled if word.istitle()])


@dataclass(frozen=True)
class Copy:
    """A row with other words, and which ones: those that it had before to those that it has now."""

    talk: Conversation
    exchanged: Mapping[str, str]


def swapped(
    talks: Sequence[Conversation], words: Incoming, copies: int, keep: Collection[str] = (), seed: int = SEED
) -> Iterator[Copy]:
    """`copies` times as many rows as `talks`, in their order; those in which nothing is exchanged too, so that the
    shares of kinds of rows stay.

    keep: what stays beside the form of rows, in any case.
    """
    return with_other_words(talks, exchangeable(talks, keep), words, copies, seed=seed, least=0)


def with_other_words(
    talks: Sequence[Conversation],
    shared: Sequence[Sequence[str]],
    words: Incoming,
    copies: int,
    *,
    seed: int = SEED,
    least: int = 1,
) -> Iterator[Copy]:
    """`copies` times as many rows as `talks`, in their order.

    shared: of each the words that could be other ones. least: how many are, where there are so many; with 0 some copies
    are the row itself, or one another.
    """
    draw = random.Random(seed)
    seen: set[str] = set()
    for _ in range(copies):
        for talk, candidates in zip(talks, shared, strict=True):
            copy = _swapped(talk, candidates, words, draw, least)
            for _ in range(TRIES if least else 0):
                if copy.talk.to_json() not in seen:
                    break
                copy = _swapped(talk, candidates, words, draw, least)
            seen.add(copy.talk.to_json())
            yield copy


def exchangeable(talks: Sequence[Conversation], keep: Collection[str] = ()) -> list[list[str]]:
    """Of each row the words that could be other ones."""
    kept = {word.casefold() for word in keep}
    own = {word for word in own_words(talks) if word.casefold() not in kept}
    shared = (shared_words(talk) & own for talk in talks)
    return [sorted(words - written_otherwise(words, talk)) for words, talk in zip(shared, talks, strict=True)]


def own_words(talks: Sequence[Conversation]) -> set[str]:
    """Words of answers that are no part of the form of rows, and are copied.

    A tenth of the answers or of the requests has what is form, keys of JSON are made of it, and tools describe
    themselves with it. What answers say more often without being asked ("The", "with", a label) is the model's own to
    say. A word with a capital that the rows rather have without ("Printer" where a sentence begins) is no name.
    """
    answers = Counter(word for talk in talks for word in words_of(answer_of(talk)))
    requests = Counter(word for talk in talks for word in words_of(request_of(talk)))
    most = COMMON * len(talks)
    copied = Counter(word for talk in talks for word in shared_words(talk))
    form = {word for talk in talks for word in _form_of(talk)}
    return {
        word
        for word, count in answers.items()
        if count < most
        and requests[word] < most
        and word not in form
        and 2 * copied[word] >= count
        and not (word.istitle() and requests[word.lower()] + answers[word.lower()] > requests[word] + count)
        and re.fullmatch(OWN, word)
    }


def shared_words(talk: Conversation) -> set[str]:
    """Words that stand in what is asked and in what is answered, in the same case."""
    return words_of(request_of(talk)) & words_of(answer_of(talk))


def written_otherwise(words: Collection[str], talk: Conversation) -> set[str]:
    """Those of some words that stand in their row in another form as well, which would still say the old word.

    That is another case, letters without their accents, a figure or "_" behind it; in the answer also a longer word
    that the request has not ("Langes", "karllange"), and beside one of these the letters that a word begins with ("Karl
    Lange", "klange@firm"). A capital that begins a sentence of the request ("Book a book club") is no other form.
    """
    request, answer = request_of(talk), answer_of(talk)
    asked, said = words_of(request), words_of(answer)
    parts = {word: _parts_of(word) for word in asked | said}
    forms = {word: _forms_of(word) for word in words}
    own = {part for word in said - asked for part in parts[word]}
    found = {
        word
        for word in words
        if any(_is_made_of(form, part) for form in forms[word] for part in own)
        or any(
            other != word and not forms[word].isdisjoint(of_other) and (other in said or not _begins(other, request))
            for other, of_other in parts.items()
        )
    }
    gone = sorted((form for word in found for form in forms[word]), key=len, reverse=True)
    for chunk in answer.split() if found else ():
        short = _left_beside(gone, chunk)
        found |= {word for word in words for form in forms[word] if any(map(form.startswith, short))}
    return found


def _forms_of(word: str) -> set[str]:
    """A word in small letters: with its accents, without them, and as German writes them where it cannot."""
    small = word.casefold()
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", small) if not unicodedata.combining(letter))
    return {small, plain, small.translate({ord("ä"): "ae", ord("ö"): "oe", ord("ü"): "ue"})}


def _parts_of(word: str) -> list[str]:
    """The runs of letters in a word, small."""
    return [part for part in re.split(r"[\d_]+", word.casefold()) if part]


def _is_made_of(form: str, part: str) -> bool:
    """Whether a longer run of letters has a word in it; one of three letters stands inside of many by chance."""
    return part != form and (form in part if len(form) > SHORT else part.startswith(form) or part.endswith(form))


def _begins(word: str, text: str) -> bool:
    """Whether a word has its capital only where a sentence begins."""
    places = places_of([word], text)
    return word.istitle() and all(re.search(r"(^|[.!?:\n])\W*$", text[:start]) for start, _ in places)


def _left_beside(forms: Iterable[str], chunk: str) -> list[str]:
    """The short runs of letters beside some words in a text without spaces; none where it has none of these words."""
    parts = [part for word in words_of(chunk) for part in _parts_of(word)]
    if not any(form in part for form in forms for part in parts):
        return []
    for form in forms:
        parts = [rest for part in parts for rest in part.split(form) if rest]
    return [part for part in parts if len(part) <= SHORT]


def words_of(text: str) -> set[str]:
    """Every different word."""
    return set(_word().findall(text))


def places_of(words: Collection[str], text: str) -> list[tuple[int, int]]:
    """Where some words stand in a text, (start, end) each, as they follow there."""
    return [found.span() for found in _word().finditer(text) if found[0] in words]


@functools.cache
def _word() -> re.Pattern[str]:
    """A word with the marks on its letters: many scripts, and accents that are written apart, have some of them so."""
    marks = (chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"[\w{re.escape(''.join(marks))}]+")


def usual_words(texts: Sequence[str], least: int = 1) -> list[str]:
    """Words in small letters, of three to eleven of them, that stand in `least` places of the texts or more."""

    def is_usual(word: str) -> bool:
        return word == word.lower() and re.fullmatch(USUAL_LETTERS, word) is not None

    said = Counter(word for text in texts for word in _word().findall(text) if is_usual(word))
    return sorted(word for word, count in said.items() if count >= least)


def english_words() -> Incoming:
    """Words of English prose that come in where no others are given: those that stand in three places or more of the
    answers of rows that come with qtune."""
    lines = shipped_rows("docstrings").read_text(encoding="utf-8").splitlines()
    return Incoming(usual_words([json.loads(line)["messages"][-1]["content"] for line in lines], least=3))


def request_of(talk: Conversation) -> str:
    """All that is not the model's to say."""
    return "\n".join(_said(message) for message in talk.messages if message["role"] != "assistant")


def answer_of(talk: Conversation) -> str:
    """All that the model says, the values of its calls' arguments included."""
    said = [message for message in talk.messages if message["role"] == "assistant"]
    return "\n".join(text for message in said for text in (_said(message), *_arguments_of(message)))


def _said(message: Message) -> str:
    return "\n".join(str(message.get(key) or "") for key in TEXTS)


def _calls_of(message: Message) -> list[Any]:
    return list(message.get("tool_calls") or ())


def _arguments_of(message: Message) -> Iterator[str]:
    for call in _calls_of(message):
        yield from _texts_in(call["function"]["arguments"])


def _texts_in(value: Any) -> Iterator[str]:
    """The texts in a value as JSON has them, without the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts_in(inner)


def _form_of(talk: Conversation) -> Iterator[str]:
    """Words that a row must not have otherwise: keys, names of functions, what tools describe; and words behind an
    escape, which begin with its letter ("\\nAnna"), so that not all of them would be found."""
    for message in talk.messages:
        text = _said(message)
        for key in re.findall(r'"((?:[^"\\]|\\.)*)"\s*:', text):
            yield from words_of(key)
        yield from re.findall(r"\\[bfnrt](\w+)", text)
        for call in _calls_of(message):
            yield from words_of(json.dumps(call["function"]["name"], ensure_ascii=False))
            yield from words_of(" ".join(_keys_in(call["function"]["arguments"])))
    for tool in talk.tools:
        yield from words_of(json.dumps(tool, ensure_ascii=False))


def _keys_in(value: Any) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _keys_in(inner)
    elif isinstance(value, dict):
        yield from map(str, value)
        for inner in value.values():
            yield from _keys_in(inner)


def _swapped(talk: Conversation, candidates: Sequence[str], words: Incoming, draw: random.Random, least: int) -> Copy:
    taken = {word.casefold() for word in words_of(f"{request_of(talk)} {answer_of(talk)}")}
    exchanged: dict[str, str] = {}
    for word in candidates:
        if draw.random() < SHARE:
            _exchange(word, exchanged, words, taken, draw)
    left = [word for word in candidates if word not in exchanged]
    while left and len(exchanged) < least:
        _exchange(left.pop(draw.randrange(len(left))), exchanged, words, taken, draw)
    if not exchanged:
        return Copy(talk, {})

    def change(text: str) -> str:
        return _word().sub(lambda found: exchanged.get(found[0], found[0]), text)

    return Copy(replace(talk, messages=tuple(_with(message, change) for message in talk.messages)), exchanged)


def _exchange(word: str, exchanged: dict[str, str], words: Incoming, taken: set[str], draw: random.Random) -> None:
    """Puts a word in the place of another: one that the row has not, or two that were different would be the same. In a
    row that has nearly all that may come in, it stays."""
    for _ in range(TRIES):
        other = words.other(word, draw)
        if other.casefold() not in taken:
            taken.add(other.casefold())
            exchanged[word] = other
            return


def _with(message: Message, change: Callable[[str], str]) -> Message:
    changed = message | {key: change(message[key]) for key in TEXTS if isinstance(message.get(key), str)}
    if calls := _calls_of(message):
        changed["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _changed(call["function"]["arguments"], change)}}
            for call in calls
        ]
    return changed


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A value as JSON has it, with its texts changed and the keys of its objects as they were."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [_changed(inner, change) for inner in value]
    if isinstance(value, dict):
        return {key: _changed(inner, change) for key, inner in value.items()}
    return value
