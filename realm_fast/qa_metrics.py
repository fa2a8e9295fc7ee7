"""Exact match and F1 of short answers: pure functions over text.

    normalise_answer("The  Eiffel Tower!")                              -> "eiffel tower"
    score_answer("in 1889", ["1889"], "string")                         -> AnswerScore(0.0, 0.667)
    score_answer("Mt. Everest", [r"(Mt\\.?|Mount) Everest"], "regex")    -> AnswerScore(1.0, 1.0)

The rules are SQuAD's (lower-case, no punctuation, no articles, single spaces), with three refinements for
text beyond ASCII. Unicode composition is normalised first, so that two spellings of the same "é" are equal
and an accent never turns a letter into an article. Punctuation is every Unicode punctuation mark. An answer
that consists of nothing else ("The The", "!!!") is kept instead of becoming empty and equal to its like.

A regular expression must match the whole prediction, ignoring case. DrQA, where the TREC patterns come from,
has `re.match`, which takes any prediction that *begins* with the pattern; the full match is stricter.
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from realm_fast.errors import DataError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ASCII_PUNCTUATION = frozenset(string.punctuation)  # SQuAD's list: holds symbols as well ($ + < = > ^ ` | ~)


class AnswerScore(NamedTuple):
    """How right one prediction is; the best over the accepted answers."""

    exact_match: float  # 0.0 or 1.0
    f1: float  # 0..1


def normalise_answer(text: str) -> str:
    """Lower-case, without punctuation and English articles, in single spaces."""
    folded = " ".join(_fold(text).split())
    plain = "".join(c for c in folded if not _is_punctuation(c))
    plain = " ".join(
        unicodedata.normalize("NFKC", plain).split()
    )  # an accent may have met its letter only now
    without_articles = " ".join(_ARTICLES.sub(" ", plain).split())
    return without_articles or plain or folded


def token_f1(prediction: str, answer: str) -> float:
    """2PR/(P+R) over the normalised words of both, counted with multiplicity; 0 where they share none."""
    predicted, expected = normalise_answer(prediction).split(), normalise_answer(answer).split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def matches_regex(prediction: str, pattern: str) -> bool:
    """Whether `pattern` matches the whole of `prediction`, ignoring case and surrounding white space.

    Raises:
        DataError: the pattern is not a regular expression.
    """
    return compile_answer(pattern).fullmatch(unicodedata.normalize("NFC", prediction).strip()) is not None


def score_answer(
    prediction: str, answers: Sequence[str], answer_kind: Literal["string", "regex"]
) -> AnswerScore:
    """Exact match and F1 of `prediction`, each the best over `answers`; no prediction ("") scores 0.

    A pattern has no words to overlap with, so for "regex" the F1 is the exact match.
    """
    if not prediction.strip() or not answers:
        return AnswerScore(0.0, 0.0)
    if answer_kind == "regex":
        matched = float(any(matches_regex(prediction, pattern) for pattern in answers))
        return AnswerScore(matched, matched)
    exact = float(any(normalise_answer(prediction) == normalise_answer(answer) for answer in answers))
    return AnswerScore(exact, max(token_f1(prediction, answer) for answer in answers))


@functools.lru_cache(maxsize=4096)
def compile_answer(pattern: str) -> re.Pattern[str]:
    """The compiled pattern of a regex answer. Raises DataError with the pattern and the reason."""
    try:
        return re.compile(unicodedata.normalize("NFC", pattern.strip()), re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"answer pattern {pattern!r}: not a regular expression ({error}).") from error


def _fold(text: str) -> str:
    """Unicode's NFKC_Casefold, less the removal of ignorable characters."""
    for form in ("NFD", "NFKC"):
        text = unicodedata.normalize(form, text).casefold()
    return unicodedata.normalize("NFKC", text)


def _is_punctuation(character: str) -> bool:
    return character in _ASCII_PUNCTUATION or unicodedata.category(character).startswith("P")
