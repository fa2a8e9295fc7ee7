"""Question sets, answer matching and the reachable subset."""

import gzip
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realm_fast import packaged, questions
from realm_fast.errors import DataError, MissingDependencyError
from realm_fast.questions import (
    AnswerMatcher,
    Bm25Index,
    Question,
    Questions,
    load_questions,
    mark_reachable,
    save_questions,
)
from realm_fast.tokenizer import Tokenizer
from realm_fast.types import TopK


def matcher(tokenizer, *answers, kind="string") -> AnswerMatcher:
    return AnswerMatcher(Question("test/0", "?", list(answers), kind), tokenizer)


# ---------------------------------------------------------------- reading


@pytest.fixture
def packaged_sets(tmp_path, monkeypatch):
    """Files in the forms the packaged sets have, in the place of the download."""
    folder = tmp_path / "packaged"
    folder.mkdir()
    (folder / "topics.dpr.nq.dev.txt").write_text(
        "who sings does he love me\t['Linda Davis']\n"
        "when does it end\t['July 5 , 2018', \"don't\"]\n"
        'which sport\t"[\'Prize fight\', ""Boxers\' ring"", \'🚁\']"\n',
        encoding="utf-8",
    )
    (folder / "topics.dpr.wq.test.txt").write_text(
        '{"question": "what do jamaicans speak?", "answer": ["Jamaican English"]}\n', encoding="utf-8"
    )
    (folder / "topics.dpr.curated.test.txt").write_text(
        '{"question": "How high is Jerusalem?", "answer": ["\\\\b2,?[4567][0-9][0-9]\\\\b"]}\n'
        '{"question": "Bad?", "answer": ["(unclosed"]}\n'
        '{"question": "Half bad?", "answer": ["(unclosed", "fine"]}\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(packaged, "fetch", lambda name: {"dpr-questions": folder}[name])
    return folder


def test_packaged_sets_of_both_formats(packaged_sets):
    loaded = load_questions("nq.dev,wq.test")
    assert loaded == [
        Question("nq.dev/0", "who sings does he love me", ["Linda Davis"]),
        Question("nq.dev/1", "when does it end", ["July 5 , 2018", "don't"]),
        Question("nq.dev/2", "which sport", ["Prize fight", "Boxers' ring", "🚁"]),
        Question("wq.test/0", "what do jamaicans speak?", ["Jamaican English"]),
    ]
    assert loaded.notes == []
    assert {name: len(qs) for name, qs in loaded.by_set().items()} == {"nq.dev": 3, "wq.test": 1}
    assert [q.id for q in load_questions("nq.dev,wq.test", limit=1)] == ["nq.dev/0", "wq.test/0"]


def test_curated_answers_are_patterns_and_invalid_ones_are_named(packaged_sets, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_questions("curated.test")
    assert [(q.id, q.answers, q.answer_kind) for q in loaded] == [
        ("curated.test/0", [r"\b2,?[4567][0-9][0-9]\b"], "regex"),
        ("curated.test/2", ["fine"], "regex"),
    ]
    assert len(loaded.notes) == 2
    assert "1 (curated.test/1) left out: no question text or no usable answer" in loaded.notes[0]
    assert "2 (curated.test/1 ('(unclosed': missing )" in loaded.notes[1]
    assert caplog.messages == loaded.notes


def test_users_files(tmp_path):
    records = [
        {"question": " who? ", "answer": ["me", "me", " I "]},
        {"question": "one text", "answer": "alone"},
        {"question": "plural", "answers": ["x"], "id": 77},
        {"question": "none", "answer": []},
        {"question": "blank", "answer": [" "]},
        {"question": "pattern", "answer": ["a+"], "answer_kind": "regex", "reachable": True, "id": "other/5"},
    ]
    text = "\n".join(json.dumps(r) for r in records) + "\n"
    (tmp_path / "mine.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    zipped = "\n".join(json.dumps(r) for r in records[:3])
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(zipped.encode()))
    loaded = load_questions(f"{tmp_path / 'mine.jsonl'}, {tmp_path / 'zipped.jsonl.gz'}")
    assert loaded[:4] == [
        Question("mine/0", "who?", ["me", "I"]),
        Question("mine/1", "one text", ["alone"]),
        Question("mine/77", "plural", ["x"]),
        Question("other/5", "pattern", ["a+"], "regex", True),
    ]
    assert [q.id for q in loaded[4:]] == ["zipped/0", "zipped/1", "zipped/77"]
    assert loaded.notes[0] == "mine: 2 (mine/3, mine/4) left out: no question text or no usable answer."


def test_dpr_tsv(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text('who?\t["me", "I"]\n"a ""quoted"" one"\t"[""x""]"\n', encoding="utf-8")
    assert load_questions(str(path)) == [
        Question("mine/0", "who?", ["me", "I"]),
        Question("mine/1", 'a "quoted" one', ["x"]),
    ]


def test_saving_and_loading_is_the_identity(tmp_path, data_dir):
    loaded = load_questions(str(data_dir / "questions.jsonl"))
    assert len(loaded) == 150
    assert set(loaded.by_set()) == {"nq.dev", "nq.test", "wq.test", "squad.test"}
    marked = [
        Question("a/1", "é?", ["x", "y"], "regex", False),
        Question("a/2", "plain", ["z"], reachable=True),
        *loaded,
    ]
    save_questions(tmp_path / "out.jsonl", marked)
    assert load_questions(str(tmp_path / "out.jsonl")) == marked


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", '{"question": "a", "answer": ["b"]}\n{"question": ', r"q\.jsonl:2: not valid JSON"),
        ("q.jsonl", '{"q": "a"}', r'q\.jsonl:1: expected \{"question": text'),
        ("q.jsonl", '{"question": "a", "answer": [3]}', r'q\.jsonl:1: "answer": expected a list of texts'),
        ("q.jsonl", '{"question": "a", "answer": {"x": 1}}', r'q\.jsonl:1: "answer": expected a list'),
        (
            "q.jsonl",
            '{"question": "a", "answer": ["b"], "answer_kind": "glob"}',
            'expected "string" or "regex"',
        ),
        ("q.jsonl", '{"question": "a", "answer": ["b"], "reachable": 1}', "expected true or false, got 1"),
        ("q.tsv", "a\t['b']\nno tab", r"q\.tsv:2: expected question<TAB>.* got 1 column"),
        ("q.tsv", "a\t['b'", r"q\.tsv:1: expected a list of answers, got \['b'"),
        ("q.tsv", "a\t__import__('os')", r"q\.tsv:1: expected a list of answers"),
        ("q.tsv", "a\t[1]", r"q\.tsv:1: expected a list of texts"),
        ("q.jsonl", '{"question": "a", "answer": []}', r"hold no question with an answer.* 1 \(q/0\)"),
        ("q.jsonl", "", "hold no question with an answer"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_questions(str(tmp_path / name))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "a", "answer": ["b"]}\n{"question": "\xff"}')
    with pytest.raises(DataError, match=r"q\.jsonl:2: byte 49 of the file \(0xff\) is not UTF-8"):
        load_questions(str(tmp_path / "q.jsonl"))
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(DataError, match=r"q\.jsonl\.gz: cannot be read"):
        load_questions(str(tmp_path / "q.jsonl.gz"))


def test_unknown_and_repeated_names(tmp_path):
    with pytest.raises(DataError, match=r"nq\.tset: no such file, and not a packaged question set"):
        load_questions("nq.tset")
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": ["b"]}', encoding="utf-8")
    with pytest.raises(DataError, match="q is named twice"):
        load_questions(f"{tmp_path / 'q.jsonl'},{tmp_path / 'q.jsonl'}")
    (tmp_path / "r.jsonl").write_text('{"question": "a", "answer": ["b"], "id": 1}\n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match=r"every id must be there once: 1 \(r/1 \(3 times\)\)"):
        load_questions(str(tmp_path / "r.jsonl"))
    with pytest.raises(DataError, match="no question set is named"):
        load_questions(" , ")


# ---------------------------------------------------------------- matching

SENTENCE = (
    "In 1,907 the steamers' crew left Port Ansel for Hull-on-Sea; the Éclair (U.S.) did not. Don’t ask why."
)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Port Ansel", True),
        ("port ansel", True),
        ("the Port Ansel", True),  # a leading article does not count
        ('"Port Ansel".', True),  # nor do quotes and stops around it
        ("Port  Ansel ,", True),
        ("ort Ansel", False),
        ("Port Ans", False),  # whole words only
        ("steamer", False),
        ("steamers", True),
        ("1 , 907", True),
        ("1,907", True),
        ("907", True),  # the tokenizer's words: a number is cut at its comma
        ("90", False),
        ("eclair", True),
        ("Éclair", True),
        ("U.S.", True),
        ("Hull", True),
        ("Hull–on–Sea", True),
        ("don't", True),
        ("why", True),  # the last word
        ("In 1,907", True),  # the first
        ("left Hull", False),
        ("🚁", False),
        ("…", False),
    ],
)
def test_answers_match_whole_words_in_tokens_and_in_text(tokenizer, answer, found):
    m = matcher(tokenizer, answer)
    tokens = tokenizer.encode(SENTENCE).ids
    assert m.in_tokens(tokens) is found
    assert m.in_text(SENTENCE) is found
    assert bool(m.spans(tokens)) is found


def test_unknown_tokens_match_nothing(tokenizer):
    tokens = tokenizer.encode("a 🚁 and a 🛥 here").ids
    assert tokenizer.unk_id in tokens
    m = matcher(tokenizer, "🚁")
    assert not m.in_tokens(tokens)
    assert m.in_text("a 🚁 here")
    assert not m.in_text("a 🛥 here")


def test_spans_are_every_occurrence_of_every_answer(tokenizer):
    text = "the harbour of the town, the town harbour, the harbours"
    tokens = tokenizer.encode(text).ids
    m = matcher(tokenizer, "harbour", "town harbour", "harbour")
    words = [tokenizer.decode(tokens[a:b]) for a, b in m.spans(tokens)]
    assert words == ["harbour", "town harbour", "harbour"]
    assert m.spans(tokens) == sorted(m.spans(tokens))
    assert matcher(tokenizer, "mill").spans(tokens) == []
    assert m.spans(tokens[:0]) == []
    assert not m.in_tokens(tokens[:0])


def test_a_short_article_and_word_are_kept_together(tokenizer):
    m = matcher(tokenizer, "The Who")
    assert not m.in_text("people who came")
    assert m.in_text("songs by the Who")


def test_a_cased_vocabulary_finds_the_usual_ways_to_write(data_dir, tmp_path):
    vocabulary = (data_dir / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary, "Port", "Town", "PORT"]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    cased = Tokenizer.load(tmp_path)
    m = matcher(cased, "port town")
    for text in ("the port town", "the Port Town", "the PORT TOWN"):
        assert m.in_text(text)
        assert m.in_tokens(cased.encode(text).ids) is (
            text != "the PORT TOWN" or bool(cased.token_id("TOWN"))
        )


PATTERNS = [
    (r"\b2,?[4567][0-9][0-9]\b", "it lies at 2,400 feet", "2,400"),
    (r"6,194-meter|20,?237\s*f(oo|ee)?t", "a height of 20,237 feet", "20,237 feet"),
    (r"Ansel", "Port Ansel's wall", "Ansel"),
    (r"harbou?rs?\b", "the Harbours of", "Harbours"),
    (r"Velmor", "a Velmoran town", "Velmoran"),  # widened to whole words
    (r"U\.?S\.?", "in the U.S. of", "U.S."),
    (r"Hull-on-Sea", "to Hull-on-Sea, by", "Hull-on-Sea"),
    (r"\(1990\)", "the year (1990) was", "(1990)"),
    (r"don't", "they don't go", "don't"),
    (r"\$\s?100", "paid $100 for", "$100"),
    (r"\d+%", "about 45% of", "45%"),
    (r"Björn", "by Björn himself", "Björn"),
    (r"Bjorn", "by Björn himself", "Björn"),
]


@pytest.mark.parametrize(("pattern", "text", "expected"), PATTERNS)
def test_patterns_match_in_text_and_in_tokens(tokenizer, pattern, text, expected):
    m = matcher(tokenizer, pattern, kind="regex")
    assert m.in_text(text)
    tokens = tokenizer.encode(text)
    if "ö" not in pattern:  # an uncased vocabulary has dropped the accent
        assert m.in_tokens(tokens.ids)
        (first, last), *_ = m.spans(tokens.ids)
        assert text[tokens.offsets[first, 0] : tokens.offsets[last - 1, 1]] == expected


def test_patterns_begin_where_a_word_begins(tokenizer):
    m = matcher(tokenizer, "china|7", kind="regex")
    for text in ("in Indochina", "in 1907"):
        assert not m.in_text(text)
        assert not m.in_tokens(tokenizer.encode(text).ids)
    assert m.in_text("in China")
    assert m.in_text("with 7 sails")


def test_patterns_that_match_nothing_visible_are_no_answer(tokenizer):
    m = matcher(tokenizer, r"x*", r"^", kind="regex")
    assert not m.in_text("the harbour")
    assert not m.in_tokens(tokenizer.encode("the harbour").ids)


def test_blocks_are_matched_in_one_pass_as_one_by_one(wiki_store, data_dir):
    tokenizer = wiki_store.tokenizer()
    ids = np.array([5, -1, *range(len(wiki_store)), -1, 3, 3])
    hits = 0
    for question in load_questions(str(data_dir / "questions.jsonl"))[:60]:
        m = AnswerMatcher(question, tokenizer)
        expected = [i >= 0 and m.in_tokens(wiki_store.body_tokens(i)) for i in ids]
        assert m.in_blocks(wiki_store, ids).tolist() == expected
        assert expected == [i >= 0 and m.in_text(wiki_store.text(i)) for i in ids]
        hits += sum(expected)
    assert hits > 50
    assert m.in_blocks(wiki_store, []).shape == (0,)
    assert m.in_blocks(wiki_store, [-1, -1]).tolist() == [False, False]


def test_answers_do_not_run_from_one_block_into_the_next(wiki_store):
    tokenizer = wiki_store.tokenizer()
    last = tokenizer.decode(wiki_store.body_tokens(0)[-3:-1])
    first = tokenizer.decode(wiki_store.body_tokens(1)[:2])
    m = matcher(tokenizer, f"{last} . {first}")
    assert not m.in_blocks(wiki_store, [0, 1]).any()


def test_block_spans_of_patterns_see_the_text_itself(user_store):
    m = matcher(user_store.tokenizer(), r"1,127\s+metres|mount\s+hollin", kind="regex")
    block = next(i for i in range(50) if user_store.title(i) == "Mount Hollin")
    decode = user_store.tokenizer().decode
    body = user_store.body_tokens(block)
    assert [decode(body[a:b]) for a, b in m.block_spans(user_store, block)] == [
        "mount hollin",
        "1, 127 metres",
    ]
    assert m.in_block(user_store, block)
    assert m.spans(body) == m.block_spans(user_store, block)


@given(st.text("ab é.,'-[]0", max_size=30), st.text("ab é.,'-[]0", min_size=1, max_size=6))
def test_every_span_is_an_answer(tokenizer, text, answer):
    tokens = tokenizer.encode(text).ids
    m = matcher(tokenizer, answer)
    assert m.in_tokens(tokens) == bool(m.spans(tokens))
    for first, last in m.spans(tokens):
        assert 0 <= first < last <= len(tokens)
        assert m.in_tokens(tokens[first:last])
    if m.in_tokens(tokens):
        assert m.in_tokens(np.concatenate([tokens, tokens]))


# ---------------------------------------------------------------- reach


def test_bm25_finds_what_words_can_find(user_store):
    index = Bm25Index(user_store)
    scores, ids = index.search(["who designed gannet point lighthouse", "zzzz qqqq", "the of"], 5)
    assert scores.shape == ids.shape == (3, 5)
    assert user_store.title(int(ids[0, 0])) in ("Gannet Point Lighthouse", "Ida Marchetti")
    assert (np.diff(scores[0]) <= 0).all()
    assert (ids[1:] == -1).all()
    assert np.isneginf(scores[1:]).all()
    more, _ = index.search(["lighthouse"], 500), None
    assert more[1].shape == (1, 500)
    assert index.search([], 3)[1].shape == (0, 3)
    with pytest.raises(ValueError, match="k: expected >= 1"):
        index.search(["x"], 0)


def test_reachable_questions(user_store, data_dir):
    loaded = load_questions(str(data_dir / "user" / "questions.jsonl"))
    loaded.append(Question("user/none", "who designed the lighthouse", ["Nobody Atall"]))
    loaded.notes.append("a note")
    marked = mark_reachable(loaded, user_store, user_store.tokenizer(), top_k=5)
    assert [q.id for q in marked] == [q.id for q in loaded]
    assert [q.reachable for q in marked] == [True] * 10 + [False]
    assert len(marked.reachable) == 10
    assert marked.notes == ["a note"]
    assert loaded[0].reachable is None


def test_the_dense_part_adds_to_the_reach(user_store):
    class Index:
        def __len__(self):
            return 50

        def search(self, queries, k):
            ids = torch.full((len(queries), k), -1)
            ids[0, 0] = target
            return TopK(ids.float(), ids)

    tokenizer = user_store.tokenizer()
    target = next(i for i in range(50) if user_store.title(i) == "Otto Lind")
    asked = Questions([Question("q/0", "zzzz", ["brewer"]), Question("q/1", "zzzz", ["brewer"])])
    emb = np.zeros((2, 4), dtype=np.float32)
    marked = mark_reachable(asked, user_store, tokenizer, top_k=5, dense=(emb, Index()))
    assert [q.reachable for q in marked] == [True, False]
    with pytest.raises(ValueError, match="expected 2 question embeddings, got 1"):
        mark_reachable(asked, user_store, tokenizer, top_k=5, dense=(emb[:1], Index()))


def test_without_bm25s_the_extra_is_named(user_store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(MissingDependencyError, match=r"realm_fast\[eval\]"):
        questions.Bm25Index(user_store)
