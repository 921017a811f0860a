"""How near an answer is to the expected one, without a model: word overlap, word order, length, repetition.

Which of them means something depends on the rows. Labels, short answers and JSON are right or wrong; a paragraph is
never equal to another one, and is compared by ROUGE-L instead.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

# Scripts that are written without spaces: each character is a word of its own.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

SHORT = 5
"""Words of a median answer up to which it can be expected to be given to the letter: names, labels, numbers."""
JSON_SHARE = 0.9
NGRAM = 4


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return _WORD.findall(text.lower())


def is_free_text(expected: Sequence[str]) -> bool:
    """Whether these answers cannot be asked for to the letter: longer than a few words, and no JSON."""
    if not expected or median(len(words_of(one)) for one in expected) <= SHORT:
        return False
    return sum(map(is_json, expected)) < JSON_SHARE * len(expected)


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, as bags (SQuAD, arXiv:1606.05250, section 6.1).

    SQuAD drops English articles first; here no language is favoured.
    """
    given, wanted = Counter(words_of(answer)), Counter(words_of(expected))
    return _f1((given & wanted).total(), given.total(), wanted.total())


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, ROUGE, 2004, section 3, beta = 1)."""
    given, wanted = words_of(answer), words_of(expected)
    return _f1(common_subsequence(given, wanted), len(given), len(wanted))


def _f1(common: int, given: int, wanted: int) -> float:
    """2 common / (given + wanted), which is 2 P R / (P + R); two empty texts are equal."""
    return 2 * common / (given + wanted) if given + wanted else 1.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of an integer.

    Source: Crochemore et al., A fast and practical bit-vector algorithm for the longest common subsequence, 2001.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(one)) - 1
    row = everything
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(one) - row.bit_count()


def repetition(text: str) -> float:
    """Share of the runs of four words that have come before: seq-rep-4 of Welleck et al., arXiv:1908.04319."""
    words = words_of(text)
    runs = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
