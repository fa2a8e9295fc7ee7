"""Sentence splitting: the cases that trip simple splitters, and that no word is ever lost."""

import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_fast.sentences import split_sentences

# "|" marks the expected cuts. Most are of the kind of the "golden rules" that splitters are compared by.
CASES = """
Hello World.|My name is Jonas.
What is your name?|My name is Jonas.
There it is!|I found it.
My name is Jonas E. Smith.
Please turn to p. 55.
Were Jane and co. at the party?
They closed the deal with Pitt, Briggs & Co. at noon.
They closed the deal with Pitt, Briggs & Co.|It closed yesterday.
I can see Mt. Fuji from here.
St. Michael's Church is on 5th st. near the light.
I live in the E.U.|How about you?
I work for the U.S. Government in Virginia.
I have lived in the U.S. for 20 years.
At 5 a.m. Mr. Smith went to the bank.|He left the bank at 6.
She has $100.00 in her bag.|It is all there.
He teaches science (He previously worked for 5 years as an engineer.) at the local University.
Her email is Jane.Doe@example.com.|I sent her an email.
The site is https://www.example.50.com/new-site/content.html.|Please check it out.
She turned to him, "This is great."|She held the book out to show him.
Hello!!|Long time no see.
She works at Yahoo! in the accounting department.
The lead is by Dr. J. R. R. Tolkien, Esq. of Oxford.
Thutmose III ruled from c. 1479 to c. 1425 BC.|He fought many wars.
Her scent, Chanel No. 5, is an icon.|It was made in 1921.
The Nutcracker, Op. 71, is a ballet by P. I. Tchaikovsky.|It has two acts.
It was fought in World War II.|Having won, they left.
The summit is at 3,776.24 m.|It is the highest.
E. T. A. Hoffmann's story appeared in 1816.
The chemical formula is N2O.|At room temperature it is a gas.
George W. Bush met Samuel L. Jackson Jr. in Washington, D.C. on Jan. 3.
He said no.|Nobody agreed.
Paris was taken.[3]|The king fled.
彼は来た。|彼女も来た！|そう。
""".strip().splitlines()


@pytest.mark.parametrize("case", CASES)
def test_cuts_where_a_reader_would(case):
    sentences = case.split("|")
    text = "".join(sentences) if "。" in case else " ".join(sentences)
    assert split_sentences(text) == sentences


def test_a_blank_line_ends_a_sentence_and_a_single_break_does_not():
    assert split_sentences("History\n\nThe town was\nfounded early") == [
        "History",
        "The town was founded early",
    ]


def test_empty_and_blank_texts_have_no_sentences():
    assert split_sentences("") == []
    assert split_sentences(" \n\n\t ") == []


@pytest.mark.parametrize("piece", [".", " ", "\n", "\n ", ". ", "。", '."', "[1]", ".[", "a"])
def test_time_is_linear_in_odd_texts(piece):
    def seconds(count):
        text = piece * count
        return min(timeit.repeat(lambda: split_sentences(text), number=1, repeat=3))

    # Quadratic time would be 64 times as long; 2 ms is for the noise.
    assert seconds(64_000) < 30 * seconds(8_000) + 2e-3


TEXTS = st.text(st.sampled_from("aB.!?…\"'”)] \n\t0。é​ [1]"), max_size=60) | st.text(max_size=60)


@given(TEXTS)
def test_no_character_is_lost_or_moved(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@given(TEXTS)
def test_sentences_are_single_spaced_and_not_empty(text):
    for sentence in split_sentences(text):
        assert sentence
        assert sentence == " ".join(sentence.split())
