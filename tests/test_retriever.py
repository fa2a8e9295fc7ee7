"""Candidates: what is left out, in which order, and what happens when too little is left."""

import numpy as np
import pytest
import torch
from model_world import make_store, one_thread, query_of, real_documents  # noqa: F401

from realm_fast.errors import ProvenanceError
from realm_fast.index import MipsIndex, Provenance
from realm_fast.masking import MaskedQuery
from realm_fast.retriever import NEAR_COPY_CONTAINMENT, containment, ngram_keys, retrieve_candidates
from realm_fast.types import NO_BLOCK

RIVER = "The old river runs slowly through the green valley and the quiet town before it meets the cold sea."
CHANGED = (
    "The old river runs quickly through the green valley and the quiet town before it meets the cold lake."
)
DOCUMENTS = [
    ("River", RIVER),  # 0: the origin
    ("Moon", "The moon is the only natural satellite of the earth."),  # 1
    ("Copy", RIVER.upper()),  # 2: the same text but for case
    ("Edited", "Some say that. " + CHANGED),  # 3: the sentence with two words changed, inside more text
    ("Iron", "Iron is a metal that people have used for a long time."),  # 4
    ("Iron again", "Iron is a metal that people have used for a long time."),  # 5: a duplicate of 4
    ("Valley", "The green valley lies between the hills, and a river runs through it."),  # 6: same topic
    ("Music", "Music is an art form that consists of sound and silence."),  # 7
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("retriever"), DOCUMENTS)
    assert len(store) == len(DOCUMENTS)
    assert store.content_hash(0) == store.content_hash(2)
    assert store.content_hash(4) == store.content_hash(5)
    return store


def index_with_scores(*scores: float, **options) -> MipsIndex:
    """An index whose block i scores scores[i] for the query embedding [1]."""
    return MipsIndex.from_embeddings(torch.tensor(scores)[:, None], **options)


ONE = torch.ones(1, 1)
DESCENDING = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)


def test_origin_copies_and_duplicates_are_left_out_and_made_up_for(store):
    query = query_of(store, 0, [2])
    found = retrieve_candidates(index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=5)
    assert found.block_ids.tolist() == [[NO_BLOCK, 1, 4, 6, 7]]
    assert found.is_null.tolist() == [[True, False, False, False, False]]
    assert found.present.all()
    assert found.stale_scores.tolist() == [[-torch.inf, 7.0, 4.0, 2.0, 1.0]]
    assert (found.dropped_near_copies, found.dropped_duplicates, found.absent_slots) == (2, 1, 0)
    assert (found.block_ids.dtype, found.stale_scores.dtype) == (torch.int64, torch.float32)


def test_only_what_was_passed_over_is_counted(store):
    query = query_of(store, 0, [2])
    found = retrieve_candidates(index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=2)
    assert found.block_ids.tolist() == [[NO_BLOCK, 1]]
    assert (found.dropped_near_copies, found.dropped_duplicates) == (0, 0)


def test_the_runners_up_are_what_the_search_found_after_the_last_candidate(store):
    query = query_of(store, 0, [2])
    index = index_with_scores(*DESCENDING)
    found = retrieve_candidates(index, store, ONE.expand(2, 1), [query, query], num_candidates=3)
    assert found.block_ids.tolist() == [[NO_BLOCK, 1, 4]] * 2  # 0 is the origin, 2 and 3 give it away
    assert found.runner_up_ids.tolist() == [[5, 6, 7] + [NO_BLOCK] * 3] * 2
    # a query for which nothing comes after the last candidate, and one without candidates to search for
    assert set(retrieve(index, store, query, 7).runner_up_ids.ravel().tolist()) <= {NO_BLOCK}
    assert set(retrieve(index, store, query, 1).runner_up_ids.ravel().tolist()) <= {NO_BLOCK}


def retrieve(index, store, query, num_candidates):
    return retrieve_candidates(index, store, ONE, [query], num_candidates=num_candidates)


def test_absent_slots_when_too_few_remain(store):
    query = query_of(store, 0, [2])
    found = retrieve_candidates(index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=7)
    assert found.block_ids.tolist() == [[NO_BLOCK, 1, 4, 6, 7, NO_BLOCK, NO_BLOCK]]
    assert found.present.tolist() == [[True] * 5 + [False] * 2]
    assert found.is_null.tolist() == [[True] + [False] * 6]
    assert found.stale_scores[0, 5:].tolist() == [-torch.inf] * 2
    assert found.absent_slots == 2


def test_without_exclusion_only_duplicates_go(store):
    query = query_of(store, 0, [2])
    found = retrieve_candidates(
        index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=4, exclude_trivial=False
    )
    assert found.block_ids.tolist() == [[NO_BLOCK, 0, 1, 3]]
    assert (found.dropped_near_copies, found.dropped_duplicates) == (0, 1)


def test_of_duplicates_the_better_scored_stays(store):
    scores = (0.0, 1.0, 0.0, 0.0, 5.0, 6.0, 0.0, 2.0)
    query = query_of(store, 1, [2])
    found = retrieve_candidates(index_with_scores(*scores), store, ONE, [query], num_candidates=3)
    assert found.block_ids.tolist() == [[NO_BLOCK, 5, 7]]


def test_without_the_null_block_all_slots_are_blocks(store):
    query = query_of(store, 0, [2])
    found = retrieve_candidates(
        index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=2, use_null_block=False
    )
    assert found.block_ids.tolist() == [[1, 4]]
    assert not found.is_null.any()


@pytest.mark.parametrize(("use_null_block", "ids"), [(True, [[NO_BLOCK]]), (False, [[1]])])
def test_a_single_candidate(store, use_null_block, ids):
    query = query_of(store, 0, [2])
    found = retrieve_candidates(
        index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=1, use_null_block=use_null_block
    )
    assert found.block_ids.tolist() == ids
    assert found.present.tolist() == [[True]]


def test_a_query_from_no_block_excludes_nothing(store):
    tokens = store.body_tokens(0)[:6].astype(np.int32)
    query = MaskedQuery(NO_BLOCK, tokens, np.array([1], np.int32), tokens[1:2], (0, 0))
    found = retrieve_candidates(index_with_scores(*DESCENDING), store, ONE, [query], num_candidates=3)
    assert found.block_ids.tolist() == [[NO_BLOCK, 0, 1]]


def test_an_empty_index_leaves_the_null_block(store):
    query = query_of(store, 0, [2])
    index = MipsIndex.from_embeddings(torch.empty(0, 1))
    found = retrieve_candidates(index, store, ONE, [query], num_candidates=3)
    assert found.block_ids.tolist() == [[NO_BLOCK] * 3]
    assert found.present.tolist() == [[True, False, False]]


def test_no_queries(store):
    found = retrieve_candidates(index_with_scores(*DESCENDING), store, torch.ones(0, 1), [], num_candidates=3)
    assert found.block_ids.shape == (0, 3)


def test_each_query_gets_what_it_would_get_alone(store):
    torch.manual_seed(0)
    index = MipsIndex.from_embeddings(torch.randn(len(store), 4))
    queries = [query_of(store, i, [1]) for i in range(len(store))]
    emb = torch.randn(len(queries), 4)
    together = retrieve_candidates(index, store, emb, queries, num_candidates=4)
    for b, query in enumerate(queries):
        alone = retrieve_candidates(index, store, emb[b : b + 1], [query], num_candidates=4)
        assert torch.equal(alone.block_ids[0], together.block_ids[b])
        torch.testing.assert_close(alone.stale_scores[0], together.stale_scores[b])
        assert b not in together.block_ids[b]


class CountingIndex:
    """A real index that notes what it is asked for."""

    def __init__(self, index):
        self.index, self.calls = index, []

    def __len__(self):
        return len(self.index)

    @property
    def provenance(self):
        return self.index.provenance

    def search(self, queries, k, *, exclude_ids=None):
        self.calls.append((len(queries), k))
        return self.index.search(queries, k, exclude_ids=exclude_ids)


def test_more_is_retrieved_only_for_queries_that_fell_short(tmp_path):
    """60 copies of the origin score best for query 0: it needs two more rounds, query 1 none."""
    others = real_documents(6)
    store = make_store(tmp_path, [("River", RIVER), *[(f"Copy {i}", RIVER) for i in range(60)], *others], 288)
    assert len(store) == 67
    scores = torch.stack([torch.arange(67.0, 0, -1), torch.arange(1.0, 68)], dim=1)  # [N, 2]
    index = CountingIndex(MipsIndex.from_embeddings(scores))
    queries = [query_of(store, 0, [2]), query_of(store, 61, [2])]
    found = retrieve_candidates(index, store, torch.eye(2), queries, num_candidates=5)
    assert found.block_ids.tolist() == [[NO_BLOCK, 61, 62, 63, 64], [NO_BLOCK, 66, 65, 64, 63]]
    assert index.calls == [(2, 12), (1, 24), (1, 48), (1, 67)]
    assert found.dropped_near_copies == 60


def test_an_index_of_another_corpus_is_refused(store):
    index = index_with_scores(*DESCENDING, provenance=Provenance("e" * 64, "c" * 64, 0))
    with pytest.raises(ProvenanceError, match=f"corpus cccccccccccc, .*{store.corpus_hash[:12]}"):
        retrieve_candidates(index, store, ONE, [query_of(store, 0, [2])], num_candidates=2)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5])
def test_fewer_than_one_candidate_is_refused(store, wrong):
    with pytest.raises((ValueError, TypeError), match="num_candidates: expected an int >= 1"):
        retrieve_candidates(
            index_with_scores(1.0), store, ONE, [query_of(store, 0, [2])], num_candidates=wrong
        )


def test_an_embedding_for_each_query(store):
    queries = [query_of(store, 0, [2])]
    with pytest.raises(ValueError, match=r"query_emb: expected \[1, D\]"):
        retrieve_candidates(index_with_scores(1.0), store, torch.ones(2, 1), queries, num_candidates=2)


# --- containment -----------------------------------------------------------------------------------------


def shares(sentence, bodies, n):
    """Containment by its definition, with sets of tuples."""
    grams = {tuple(sentence[i : i + n]) for i in range(len(sentence) - n + 1)}
    held = [{tuple(b[i : i + n]) for i in range(len(b) - n + 1)} for b in bodies]
    return [len(grams & h) / len(grams) if grams else 0.0 for h in held]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_containment_equals_its_definition(n):
    random = np.random.default_rng(n)
    for _ in range(30):
        sentence = random.integers(0, 6, random.integers(0, 12)).astype(np.uint16)
        bodies = [random.integers(0, 6, random.integers(0, 25)).astype(np.uint16) for _ in range(5)]
        keys = np.unique(ngram_keys(sentence, n))
        expected = shares(sentence.tolist(), [b.tolist() for b in bodies], n)
        np.testing.assert_allclose(containment(keys, bodies, n), expected, atol=1e-12)


def test_an_ngram_does_not_run_from_one_body_into_the_next():
    sentence = np.unique(ngram_keys(np.array([1, 2, 3]), 3))
    assert containment(sentence, [np.array([1, 2]), np.array([3]), np.array([1, 2, 3])], 3).tolist() == [
        0,
        0,
        1,
    ]


def test_trigram_keys_are_exact_for_any_vocabulary_in_use():
    random = np.random.default_rng(0)
    grams = random.integers(0, 1 << 21, (2000, 3))
    keys = [int(ngram_keys(gram, 3)[0]) for gram in grams]
    assert len(set(keys)) == len({tuple(g) for g in grams.tolist()})
    assert keys[0] == (int(grams[0, 0]) << 42) + (int(grams[0, 1]) << 21) + int(grams[0, 2])


def test_the_threshold_tells_an_edited_sentence_from_one_of_the_same_topic(store):
    start, stop = store.sentences(0)[:2]
    keys = np.unique(ngram_keys(store.body_tokens(0)[start:stop], 3))
    edited, topic = containment(keys, [store.body_tokens(3), store.body_tokens(6)], 3)
    assert edited >= NEAR_COPY_CONTAINMENT > 2 * topic


@pytest.mark.parametrize(("threshold", "kept"), [(1.01, True), (0.6, False)])
def test_the_threshold_decides(store, threshold, kept):
    found = retrieve_candidates(
        index_with_scores(*DESCENDING), store, ONE, [query_of(store, 0, [2])],
        num_candidates=4, near_copy_containment=threshold,
    )  # fmt: skip
    assert (3 in found.block_ids) is kept
    assert 2 not in found.block_ids  # the exact copy goes in any case
