"""How near free text comes to the expected one, where exact match says nothing: words in common, length, repetition."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

SHORT_WORDS = 5
"""Answers of so many words, by the median, are labels, names or numbers: right or wrong."""
FEW_ANSWERS = 0.5
"""Where fewer than this share of the expected answers are different ones, rows ask for one of several labels."""
REPEATED_WORDS = 4
"""Words in a row that count as a repetition when they come again."""

# Words and signs; of scripts without spaces every character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+|[^\w\s]")


@dataclass(frozen=True)
class TextScore:
    """How one model's answers compare with the expected ones, each a mean over the answers.

    rouge_l: F1 of the longest common subsequence of words (Lin 2004, "ROUGE", section 3). word_f1: F1 of the words
    whatever their order (Rajpurkar et al. 2016, arXiv:1606.05250). length: words of an answer by those expected, the
    median. repeated: share of an answer's runs of four words that stood in it before.
    """

    rouge_l: float
    word_f1: float
    length: float
    repeated: float


def text_score(expected: Sequence[str], answers: Sequence[str]) -> TextScore | None:
    """The score of answers; None where there are none."""
    if not answers:
        return None
    pairs = [(words(one), words(other)) for one, other in zip(expected, answers, strict=True)]
    return TextScore(
        fmean(rouge_l(one, other) for one, other in pairs),
        fmean(word_f1(one, other) for one, other in pairs),
        median(len(other) / max(1, len(one)) for one, other in pairs),
        fmean(repeated(other) for _, other in pairs),
    )


def is_free_text(expected: Sequence[str]) -> bool:
    """Whether answers can be good without being equal to the expected ones: long ones in words of their own."""
    if not expected or median(len(words(one)) for one in expected) <= SHORT_WORDS:
        return False
    if len(set(expected)) < FEW_ANSWERS * len(expected):
        return False
    return sum(map(_is_json, expected)) <= len(expected) / 2


def words(text: str) -> list[str]:
    """The words and signs of a text in small letters."""
    return _WORD.findall(text.lower())


def rouge_l(expected: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the longest common subsequence."""
    return _f1(common_subsequence(expected, answer), len(expected), len(answer))


def word_f1(expected: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the words in common, each as often as it stands in both."""
    return _f1((Counter(expected) & Counter(answer)).total(), len(expected), len(answer))


def repeated(answer: Sequence[str]) -> float:
    """Share of the runs of four words that stood in the answer before; 0 for an answer without any."""
    runs = [tuple(answer[start : start + REPEATED_WORDS]) for start in range(len(answer) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table at a time as the bits of one number.

    Source: Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004.
    """
    places: dict[str, int] = {}
    for number, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << number
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & whole
    return len(one) - row.bit_count()


def _f1(common: int, expected: int, answered: int) -> float:
    """The harmonic mean of precision and recall; two empty texts are equal."""
    return 2 * common / (expected + answered) if expected + answered else 1.0


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False
