"""Salient spans and masked queries: alignment, provenance, purity of draws, splits, skips."""

import json
import os
import pickle
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_fast import masking
from realm_fast.config import CorpusConfig, MaskingConfig
from realm_fast.corpus import build_corpus
from realm_fast.errors import (
    CorruptArtifactError,
    DataError,
    MissingDependencyError,
    ProvenanceError,
    UserError,
)
from realm_fast.masking import (
    CharSpan,
    Masker,
    RulesTagger,
    SalientSpans,
    align_span,
    build_salient_spans,
    spans_path,
)


def same(a, b) -> bool:
    return (
        a.origin_block_id == b.origin_block_id
        and a.sentence == b.sentence
        and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "positions", "labels"))
    )


def small_store(tmp_path, data_dir, texts, **changes):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    config = CorpusConfig(source=str(source), tokenizer=str(data_dir / "tokenizer"), num_workers=1, **changes)
    return build_corpus(config, tmp_path / "corpus", progress=False)


# ---------------------------------------------------------------- taggers


def rules(text, starts=(0,)) -> list[tuple[str, str]]:
    (spans,) = RulesTagger()([text], [np.array(starts)])
    return [(text[s.start : s.stop], s.label) for s in spans]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was signed on 4 June 1923 here.", ["4 June 1923"]),
        ("It sank on November 12, 1907 in a gale.", ["November 12, 1907"]),
        ("They left in July 1839, in 1841 and in the 1850s.", ["July 1839", "1841", "1850s"]),
        ("Built in the 5th century BC and in 44 BC.", ["5th century BC", "44 BC"]),
        (
            "The bell of the Corvina hung in the Harbour Museum of Port Ansel.",
            ["Corvina", "Harbour Museum of Port Ansel"],
        ),
        ("Port Ansel was founded by Tobias Ansel.", ["Tobias Ansel"]),
        ("In winter, J. R. Holt met the E.U. envoy O'Neill.", ["J. R. Holt", "E.U.", "O'Neill"]),
        ("Nothing of note happened here in 12 days.", []),
    ],
)
def test_the_rules_find_dates_and_names_inside_sentences(text, expected):
    found = rules(text)
    assert [part for part, _ in found] == expected
    for part, label in found:
        assert label == ("DATE" if part[0].isdigit() or re.match("Nov|July", part) else "NAME")


def test_the_rules_leave_out_the_first_word_of_every_sentence():
    text = "The Corvina sank. Magnus came. “Gannets fly.”"
    assert rules(text, [0, 18, 31]) == []
    assert rules(text, [0]) == [("Magnus", "NAME"), ("Gannets", "NAME")]


def test_spacy_tagger_leaves_out_quantities_and_durations(tmp_path):
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns(
        [
            {"label": "PERSON", "pattern": "Ida Marchetti"},
            {"label": "DATE", "pattern": "1864"},
            {"label": "DATE", "pattern": "ten years"},
            {"label": "DATE", "pattern": "today"},
            {"label": "CARDINAL", "pattern": "nineteen"},
        ]
    )
    nlp.add_pipe("sentencizer")
    nlp.to_disk(tmp_path / "pipeline")
    tagger = masking.load_tagger(str(tmp_path / "pipeline"))
    text = "Ida Marchetti came in 1864 for ten years with nineteen men; today nobody does."
    (spans,) = tagger([text], [np.array([0])])
    assert [(text[s.start : s.stop], s.label) for s in spans] == [
        ("Ida Marchetti", "PERSON"),
        ("1864", "DATE"),
    ]
    assert tagger._nlp.pipe_names == ["entity_ruler"], "pipes it does not need are left out"
    assert re.fullmatch(r"spacy-en_pipeline-[\d.]+", tagger.identity)


def test_a_pipeline_without_entities_is_refused(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "pipeline")
    with pytest.raises(DataError, match="has no entity recogniser"):
        masking.load_tagger(str(tmp_path / "pipeline"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="spaCy cannot load it"):
        masking.load_tagger(str(tmp_path / "empty"))


def test_without_spacy_the_error_names_the_extra_and_the_rules(user_store, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(MissingDependencyError, match=r"realm_fast\[ner\].*masking.entity_tagger=rules"):
        build_salient_spans(user_store, "en-core-web-sm", out=tmp_path / "spans", progress=False)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- alignment


def aligned(tokenizer, text, part, label="PERSON"):
    encoding = tokenizer.encode(text)
    start = text.index(part)
    span = align_span(CharSpan(start, start + len(part), label), text, encoding.offsets, encoding.word_starts)
    return None if span is None else text[encoding.offsets[span[0], 0] : encoding.offsets[span[1] - 1, 1]]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("Magnus Oday", "Magnus Oday"),
        ("the Velmoran", "Velmoran"),
        ("Oday's", "Oday"),
        ("agnus Od", "Magnus Oday"),  # never part of a word
        ("“Customs House”", "Customs House"),
        ("’s", None),
        ("The", "The"),
    ],
)
def test_spans_are_whole_words_without_articles_and_possessives(tokenizer, part, expected):
    text = "The president Magnus Oday's room: Magnus Oday, the Velmoran in the “Customs House” of Oday’s."
    assert aligned(tokenizer, text, part) == expected


def test_titles_of_works_keep_their_article(tokenizer):
    text = "She wrote The Salt Ledger."
    assert aligned(tokenizer, text, "The Salt Ledger", "WORK_OF_ART") == "The Salt Ledger"
    assert aligned(tokenizer, text, "The Salt Ledger", "ORG") == "Salt Ledger"


@given(st.text(max_size=60), st.integers(0, 60), st.integers(0, 60))
def test_aligned_spans_begin_and_end_with_words(tokenizer, text, a, b):
    encoding = tokenizer.encode(text)
    start, stop = sorted((min(a, len(text)), min(b, len(text))))
    span = align_span(CharSpan(start, stop, "ORG"), text, encoding.offsets, encoding.word_starts)
    if span is not None:
        first, last = span
        assert 0 <= first < last <= len(encoding.ids)
        assert encoding.word_starts[first]
        assert last == len(encoding.ids) or encoding.word_starts[last]


# ---------------------------------------------------------------- the spans of a corpus


def test_spans_are_whole_words_inside_one_sentence(wiki_store, wiki_spans):
    tokenizer = wiki_store.tokenizer()
    assert len(wiki_spans) == len(wiki_store)
    total = 0
    for i in range(len(wiki_store)):
        spans = wiki_spans.spans(i)
        assert spans.dtype == np.int32
        assert len(wiki_spans.labels(i)) == len(spans)
        bounds = wiki_store.sentences(i)
        body = wiki_store.body_tokens(i)
        starts = np.append(tokenizer.word_starts(body), True)
        for first, last in spans:
            total += 1
            sentence = np.searchsorted(bounds, first, side="right") - 1
            assert bounds[sentence] <= first < last <= bounds[sentence + 1]
            assert starts[first]
            assert starts[last]
        assert (spans[1:, 0] >= spans[:-1, 1]).all(), "in order, not overlapping"
    assert total == wiki_spans.num_spans > 1000


def test_spans_are_kept_beside_the_store_and_found_again(user_store, tmp_path):
    copy = type(user_store).open(shutil.copytree(user_store.path, tmp_path / "corpus"))
    spans = build_salient_spans(copy, "rules", progress=False)
    assert spans.path == spans_path(copy, "rules") == tmp_path / "corpus.spans-rules"
    assert sorted(os.listdir(tmp_path)) == ["corpus", "corpus.spans-rules"]
    stamp = (spans.path / "manifest.json").stat().st_mtime_ns
    again = build_salient_spans(copy, "rules", progress=False)
    assert (again.path / "manifest.json").stat().st_mtime_ns == stamp
    assert again.manifest["corpus_hash"] == user_store.corpus_hash
    assert again.tagger == "rules-1"
    assert pickle.loads(pickle.dumps(again)).num_spans == spans.num_spans
    text = copy.text(3)
    tokens = copy.tokenizer().decode(copy.body_tokens(3)[slice(*spans.spans(3)[0])])
    assert tokens.lower() in text.lower()


def test_several_processes_find_the_same_spans(wiki_store, tmp_path, monkeypatch):
    monkeypatch.setattr(masking, "_TASK_BLOCKS", 64)
    one = build_salient_spans(wiki_store, "rules", out=tmp_path / "one", progress=False, num_workers=1)
    two = build_salient_spans(wiki_store, "rules", out=tmp_path / "two", progress=False, num_workers=2)
    for file in one.path.iterdir():
        assert file.read_bytes() == (two.path / file.name).read_bytes(), file.name


def test_interrupted_tagging_goes_on(wiki_store, tmp_path, monkeypatch):
    monkeypatch.setattr(masking, "_TASK_BLOCKS", 64)
    reference = build_salient_spans(
        wiki_store, "rules", out=tmp_path / "reference", progress=False, num_workers=1
    )
    tag = RulesTagger.__call__
    calls = []

    def interrupted(self, texts, starts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tag(self, texts, starts)

    monkeypatch.setattr(RulesTagger, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_salient_spans(wiki_store, "rules", out=tmp_path / "out", progress=False, num_workers=1)
    assert not (tmp_path / "out").exists()
    build_salient_spans(wiki_store, "rules", out=tmp_path / "out", progress=False, num_workers=1)
    assert sum(calls) == len(wiki_store) + calls[2], "finished parts are taken up"
    for file in reference.path.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert sorted(os.listdir(tmp_path)) == ["out", "reference"]


def test_spans_of_another_corpus_are_refused(wiki_store, user_store, wiki_spans):
    with pytest.raises(
        ProvenanceError, match=f"{wiki_store.corpus_hash[:16]}.*{user_store.corpus_hash[:16]}"
    ):
        SalientSpans.open(wiki_spans.path, user_store)
    with pytest.raises(ProvenanceError, match="salient spans of corpus"):
        Masker(user_store, MaskingConfig(), 0, wiki_spans)


def test_truncated_spans_are_named(wiki_spans, tmp_path):
    copy = shutil.copytree(wiki_spans.path, tmp_path / "spans")
    path = copy / "spans.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptArtifactError, match=r"spans\.bin: truncated or altered"):
        SalientSpans.open(copy)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match=r"spans\.bin: missing"):
        SalientSpans.open(copy)


# ---------------------------------------------------------------- queries

STRATEGIES = ("salient_span", "random_span", "random_token")


@pytest.fixture(params=STRATEGIES)
def masker(request, wiki_store, wiki_spans) -> Masker:
    return Masker(wiki_store, MaskingConfig(strategy=request.param), 3, wiki_spans)


def test_queries_are_masked_sentences(masker):
    store, mask_id = masker.store, masker.store.tokenizer().mask_id
    for slot in range(300):
        query = masker.query(5, slot)
        start, stop = query.sentence
        bounds = store.sentences(query.origin_block_id)
        assert start in bounds
        assert stop in bounds
        original = store.body_tokens(query.origin_block_id)[start:stop][: len(query.tokens)].astype(np.int32)
        masked = np.flatnonzero(query.tokens == mask_id)
        assert 1 <= len(query.positions) <= masker.config.max_masks
        assert np.array_equal(query.positions, masked[: masker.config.max_masks])
        assert np.array_equal(query.labels, original[query.positions])
        visible = query.tokens != mask_id
        assert np.array_equal(query.tokens[visible], original[visible])
        assert visible.sum() >= 3
        assert len(query.tokens) <= masker.config.max_query_tokens - 2
        assert query.tokens.dtype == query.positions.dtype == query.labels.dtype == np.int32


def test_salient_queries_mask_exactly_one_span(wiki_store, wiki_spans):
    masker = Masker(wiki_store, MaskingConfig(max_masks=64), 0, wiki_spans)
    for slot in range(200):
        query = masker.query(0, slot)
        span = [query.sentence[0] + int(query.positions[0]), query.sentence[0] + int(query.positions[-1]) + 1]
        assert span in wiki_spans.spans(query.origin_block_id).tolist()
        assert len(query.positions) == span[1] - span[0]


def test_random_spans_are_whole_words(wiki_store):
    masker = Masker(wiki_store, MaskingConfig(strategy="random_span", max_masks=200), 0)
    lengths = Counter()
    for slot in range(400):
        query = masker.query(0, slot)
        assert (np.diff(query.positions) == 1).all()
        start = query.sentence[0]
        body = wiki_store.body_tokens(query.origin_block_id)
        starts = wiki_store.tokenizer().word_starts(body)
        first, last = start + int(query.positions[0]), start + int(query.positions[-1]) + 1
        assert starts[first]
        assert last == start + len(query.tokens) or last == len(body) or starts[last]
        lengths[int(starts[first:last].sum())] += 1
    assert max(lengths) <= 10
    assert len(lengths) > 5


def test_random_tokens_are_masked_at_the_rate_asked(wiki_store):
    config = MaskingConfig(strategy="random_token", random_token_rate=0.25, max_masks=200)
    queries = [Masker(wiki_store, config, 0).query(0, slot) for slot in range(400)]
    share = sum(len(q.positions) for q in queries) / sum(len(q.tokens) for q in queries)
    assert share == pytest.approx(0.25, abs=0.02)


def test_a_query_is_a_function_of_seed_step_rank_and_slot(masker, wiki_store, wiki_spans):
    cells = [(step, slot, rank) for step in (0, 1, 900_000) for slot in (0, 1) for rank in (0, 1)]
    queries = {cell: masker.query(*cell) for cell in cells}
    fresh = Masker(wiki_store, masker.config, 3, wiki_spans)
    for cell in reversed(cells):
        assert same(fresh.query(*cell), queries[cell])
    distinct = {(q.origin_block_id, q.sentence, q.positions.tobytes()) for q in queries.values()}
    assert len(distinct) >= len(cells) - 1
    other_seed = Masker(wiki_store, masker.config, 4, wiki_spans)
    assert sum(same(other_seed.query(*cell), queries[cell]) for cell in cells) <= 1


def test_draws_cover_the_corpus_evenly(wiki_store):
    masker = Masker(wiki_store, MaskingConfig(strategy="random_span"), 1)
    counts = np.bincount(
        [masker.query(step, slot).origin_block_id for step in range(100) for slot in range(40)],
        minlength=len(wiki_store),
    )
    assert (counts > 0).mean() > 0.98
    assert counts.max() < 6 * counts.mean()


def test_skips_are_counted_by_reason(wiki_store, wiki_spans):
    masker = Masker(wiki_store, MaskingConfig(max_query_tokens=12), 0, wiki_spans)
    for slot in range(200):
        masker.query(0, slot)
    assert masker.skipped["beyond_query"] > 50
    once = Masker(wiki_store, MaskingConfig(max_query_tokens=12), 0, wiki_spans)
    for slot in range(200):
        once.query(0, slot)
    assert once.skipped == masker.skipped


def test_a_span_of_more_than_max_masks_stays_masked_whole(tmp_path, data_dir):
    text = "The bell was given by the Honourable Company Of Port Ansel Harbour Wall Whalers And Weavers."
    store = small_store(tmp_path, data_dir, [text])
    spans = build_salient_spans(store, "rules", progress=False)
    query = Masker(store, MaskingConfig(max_masks=3), 0, spans).query(0, 0)
    assert len(query.positions) == len(query.labels) == 3
    assert (query.tokens == store.tokenizer().mask_id).sum() > 8


def test_held_out_documents_are_whole_disjoint_and_fixed(wiki_store, wiki_spans):
    train = Masker(wiki_store, MaskingConfig(), 0, wiki_spans, split="train")
    held = train.with_split("heldout")
    document = wiki_store.array("block_document")
    train_documents = set(document[train._blocks].tolist())
    held_documents = set(document[held._blocks].tolist())
    assert not train_documents & held_documents
    assert len(held_documents) == 8  # 2% of 400
    assert train.num_blocks + held.num_blocks == len(wiki_store)
    assert np.array_equal(
        Masker(wiki_store, MaskingConfig(), 99, wiki_spans, split="heldout")._blocks, held._blocks
    )
    assert {held.query(0, slot).origin_block_id for slot in range(50)} <= set(held._blocks.tolist())


@settings(max_examples=20)
@given(st.integers(2, 400))
def test_small_corpora_hold_something_out_too(documents):
    class Store:
        num_documents = documents

        def __len__(self):
            return documents

        def array(self, name):
            return np.arange(documents)

    held = masking.split_blocks(Store(), "heldout")
    train = masking.split_blocks(Store(), "train")
    assert len(held) == max(1, round(documents * 0.02))
    assert sorted([*held, *train]) == list(range(documents))


def test_what_cannot_work_is_said(tmp_path, data_dir, wiki_store, wiki_spans):
    with pytest.raises(UserError, match="needs the corpus' salient spans"):
        Masker(wiki_store, MaskingConfig(), 0)
    with pytest.raises(ValueError, match="expected >= 0"):
        Masker(wiki_store, MaskingConfig(), 0, wiki_spans).query(-1, 0)
    with pytest.raises(ValueError, match="split"):
        Masker(wiki_store, MaskingConfig(), 0, wiki_spans, split="test")
    store = small_store(tmp_path, data_dir, ["the harbour is deep and old."])
    spans = build_salient_spans(store, "rules", progress=False)
    with pytest.raises(DataError, match="rules-1 found no salient span in 1 blocks"):
        Masker(store, MaskingConfig(), 0, spans)
    with pytest.raises(DataError, match="too small for a heldout split"):
        Masker(store, MaskingConfig(strategy="random_span"), 0, split="heldout")
    with pytest.raises(DataError, match=r"no usable query in 10000 draws \(nothing_masked: 10000\)"):
        Masker(store, MaskingConfig(strategy="random_token", random_token_rate=0.0), 0).query(0, 0)
