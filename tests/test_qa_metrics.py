import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_fast.errors import DataError
from realm_fast.qa_metrics import AnswerScore, matches_regex, normalise_answer, score_answer, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("an apple a day, the doctor", "apple day doctor"),
        ("theory of Another Aardvark", "theory of another aardvark"),  # articles only as whole words
        ("U.S.A.", "usa"),
        ("O'Neill", "oneill"),
        ("O’Neill", "oneill"),  # a curly apostrophe
        ("1914–1918", "19141918"),  # an en dash goes like a hyphen does
        ("$5 + 10%", "5 10"),  # symbols of SQuAD's list
        ("20 °C", "20 °c"),  # a sign that is neither punctuation nor on that list
        ("«Guernica»", "guernica"),
        ("Straße", "strasse"),
        ("ﬁre", "fire"),  # a ligature
        ("Beyoncé", "beyoncé"),
        ("Beyonce\u0301", "beyoncé"),
        ("á la carte", "á la carte"),
        ("a\u0301 la carte", "á la carte"),  # decomposed: the bare "a" must not pass for an article
        ("東京", "東京"),
        ("¿Qué?", "qué"),
        ("The The", "the the"),  # nothing but articles: kept
        ("A", "a"),
        ("!!!", "!!!"),
        ("  ", ""),
        ("", ""),
        ("A.", "a"),
    ],
)
def test_normalise_by_hand(text, expected):
    assert normalise_answer(text) == expected


@given(st.text(max_size=30))
def test_normalise_twice_is_once_and_composition_does_not_matter(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert normalise_answer(unicodedata.normalize("NFD", text)) == normalise_answer(
        unicodedata.normalize("NFC", text)
    )


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("in 1889", "1889", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("the cat sat", "a cat stood", 0.5),  # cat sat / cat stood
        ("new new york", "new york city", 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # multiplicity: one "new" counts
        ("Paris", "paris!", 1.0),
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("", "", 0.0),
    ],
)
def test_f1_by_hand(prediction, answer, expected):
    assert token_f1(prediction, answer) == pytest.approx(expected, abs=1e-12)
    assert token_f1(answer, prediction) == pytest.approx(expected, abs=1e-12)


def test_scores_are_the_best_over_the_answers():
    assert score_answer("Mount Everest", ["K2", "the mount everest."], "string") == AnswerScore(1.0, 1.0)
    exact, f1 = score_answer("Everest peak", ["K2", "Mount Everest", "Everest"], "string")
    assert exact == 0.0
    assert f1 == pytest.approx(2 / 3)
    assert score_answer("", ["x"], "string") == AnswerScore(0.0, 0.0)
    assert score_answer("x", [], "string") == AnswerScore(0.0, 0.0)
    assert score_answer("The", ["!!!"], "string") == AnswerScore(0.0, 0.0)


@pytest.mark.parametrize(
    ("prediction", "pattern", "expected"),
    [
        ("Mt. Everest", r"(Mt\.?|Mount) Everest", True),
        ("mount everest", r"(Mt\.?|Mount) Everest", True),
        ("Mount Everest in Nepal", r"(Mt\.?|Mount) Everest", False),  # DrQA's prefix match would say True
        ("the Mount Everest", r"Mount Everest", False),
        (" 1,000 ", r"1,?000", True),
        ("Sao", "São|Sao", True),
        ("Sa\u0303o", "São", True),  # composition is normalised on both sides
        ("São", "Sa\u0303o", True),
        ("a.b", r"a\.b", True),
        ("axb", r"a\.b", False),
    ],
)
def test_regex_by_hand(prediction, pattern, expected):
    assert matches_regex(prediction, pattern) is expected
    assert score_answer(prediction, [pattern], "regex") == AnswerScore(float(expected), float(expected))


def test_a_malformed_pattern_is_named():
    with pytest.raises(DataError, match=r"answer pattern '\(unclosed': not a regular expression"):
        score_answer("x", ["(unclosed"], "regex")
    assert score_answer("(unclosed", ["(unclosed"], "string").exact_match == 1.0


@given(st.text(max_size=20), st.text(max_size=20))
def test_exact_match_implies_full_f1_and_both_are_bounded(prediction, answer):
    exact, f1 = score_answer(prediction, [answer], "string")
    assert 0.0 <= f1 <= 1.0
    if exact:
        assert f1 == pytest.approx(1.0)
