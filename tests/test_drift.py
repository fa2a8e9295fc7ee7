"""Drift of the index: what is measured is what the definitions say, against embedding the whole corpus."""

import numpy as np
import pytest
import torch

from realm_fast.config import MaskingConfig
from realm_fast.drift import DriftProbe, QueryCorrection, overlap_at_k, relative_score_drift
from realm_fast.embedding import embed_blocks
from realm_fast.index import MipsIndex
from realm_fast.masking import Masker
from realm_fast.model import RealmModel
from realm_fast.types import NO_BLOCK
from tests.model_world import make_embedder, make_reader, make_store, one_thread, real_documents

assert one_thread  # an autouse fixture
K, QUERIES = 5, 12


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("world"), real_documents(60))


@pytest.fixture(scope="module")
def queries(store):
    masker = Masker(store, MaskingConfig(strategy="random_span", max_query_tokens=32), seed=2)
    return [masker.query(0, slot) for slot in range(QUERIES)]


@pytest.fixture
def model(store):
    model = RealmModel(make_embedder(store, pooling="mean"), make_reader(store))
    with torch.no_grad():  # as initialised, all embeddings are nearly one
        model.embedder.block_side.trunk.model.embeddings.word_embeddings.weight.mul_(50)
    return model


def probe(store, queries, sample_blocks=0):
    return DriftProbe(store, queries, k=K, sample_blocks=sample_blocks, seed=1, token_budget=2048)


def index_of(model, store):
    return MipsIndex.from_embeddings(embed_blocks(model.embedder, store))


def train_a_bit(model, scale):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.embedder.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def true_overlap(model, store, queries, stale_index):
    query_emb = model.search_emb(queries)
    origins = torch.tensor([query.origin_block_id for query in queries])
    fresh_index = index_of(model, store)
    stale, fresh = (i.search(query_emb, K, exclude_ids=origins).ids for i in (stale_index, fresh_index))
    return np.mean([len(set(a) & set(b)) / K for a, b in zip(stale.tolist(), fresh.tolist(), strict=True)])


def test_an_index_of_the_present_weights_has_not_drifted(store, queries, model):
    drift = probe(store, queries).measure(model, index_of(model, store))[0]
    assert drift.overlap == 1.0
    assert drift.score_drift < 1e-4  # embeddings depend on their pack through rounding
    assert 0 < drift.blocks <= 4 * K * QUERIES


@pytest.mark.parametrize("scale", [0.003, 0.01, 0.03, 0.1])
def test_the_overlap_of_a_whole_pool_is_the_true_one_and_of_a_smaller_pool_not_below_it(
    store, queries, model, scale
):
    index = index_of(model, store)
    train_a_bit(model, scale)
    truth = true_overlap(model, store, queries, index)
    assert probe(store, queries, sample_blocks=len(store)).measure(model, index)[0].overlap == pytest.approx(
        truth
    )
    for sample_blocks in (0, 10):
        assert probe(store, queries, sample_blocks).measure(model, index)[0].overlap >= truth - 1e-9


def test_more_training_is_more_drift(store, queries, model):
    index = index_of(model, store)
    found = []
    for scale in (0.003, 0.03, 0.3):
        train_a_bit(model, scale)
        found.append(probe(store, queries, sample_blocks=len(store)).measure(model, index)[0])
    assert found[0].overlap > found[1].overlap > found[2].overlap
    assert found[0].score_drift < found[1].score_drift < found[2].score_drift


def test_measuring_changes_neither_model_nor_random_state(store, queries, model):
    index = index_of(model, store)
    model.train()
    torch.manual_seed(7)
    before, weights = torch.get_rng_state(), model.embedder.hash()
    first, correction = probe(store, queries, 10).measure(model, index)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.embedder.hash() == weights
    assert all(module.training for module in model.embedder.modules())
    again, same = probe(store, queries, 10).measure(model, index)
    assert torch.equal(same.matrix, correction.matrix)
    assert (again.overlap, again.score_drift, again.blocks) == (
        first.overlap,
        first.score_drift,
        first.blocks,
    )


def test_the_block_a_query_was_cut_from_does_not_count(store, queries, model):
    """With k = all other blocks, stale and fresh results are the same sets: only the origin could differ."""
    index = index_of(model, store)
    train_a_bit(model, 0.3)
    everything = DriftProbe(store, queries, k=len(store), sample_blocks=0, seed=1, token_budget=2048)
    assert everything.k == len(store) - 1
    assert everything.measure(model, index)[0].overlap == 1.0


def test_overlap_counts_shared_results_over_those_there_were():
    stale = torch.tensor([[1, 2, 3, 4], [5, 6, NO_BLOCK, NO_BLOCK]])
    fresh = torch.tensor([[4, 9, 1, 8], [6, NO_BLOCK, 7, NO_BLOCK]])
    assert overlap_at_k(stale, fresh) == pytest.approx(3 / 6)


def test_score_drift_by_hand():
    stale = torch.tensor([[4.0, 2.0, 0.0], [9.0, -torch.inf, -torch.inf]])  # a lone score has no spread
    fresh = stale + torch.tensor([[11.0, 10.0, 9.0], [5.0, 0.0, 0.0]])
    # differences 11, 10, 9: centred 1, 0, -1; of the first two |.| is 1/2 on average; the spread is 2
    assert relative_score_drift(stale, fresh, 2) == pytest.approx(0.25)
    assert relative_score_drift(stale, stale + 7, 2) == pytest.approx(0.0)
    assert relative_score_drift(stale[1:], fresh[1:], 2) == 0.0


def test_a_correction_is_the_affine_map_that_blocks_went_through():
    """q . (s A + b) = corrected q . s + a constant, for a map that the pool shows whole."""
    generator = torch.Generator().manual_seed(4)
    stale = torch.randn(500, 6, generator=generator)
    a, b = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator), torch.randn(6, generator=generator)
    fresh = stale @ a + b
    correction = QueryCorrection.fit(stale[:300], fresh[:300])
    query = torch.randn(7, 6, generator=generator)
    left = (query @ fresh.T - correction(query) @ stale.T).std(dim=1)  # [7]; 0 would be that constant
    was = (query @ fresh.T - query @ stale.T).std(dim=1)
    assert bool((left < 0.1 * was).all())  # the ridge leaves a trace


def test_nothing_is_corrected_where_nothing_moved_or_the_pool_says_nothing():
    stale = torch.randn(40, 6, generator=torch.Generator().manual_seed(5))
    query = torch.ones(1, 6)
    for old, new in ((stale, stale), (stale, stale + 3), (stale[:1], stale[1:2]), (0 * stale, stale)):
        torch.testing.assert_close(QueryCorrection.fit(old, new)(query), query)
    torch.testing.assert_close(QueryCorrection.none(6)(query), query, rtol=0, atol=0)


def test_a_saved_correction_comes_back(tmp_path):
    correction = QueryCorrection(torch.randn(5, 5))
    correction.save(tmp_path / "correction")
    assert torch.equal(QueryCorrection.load(tmp_path / "correction").matrix, correction.matrix)


def test_the_correction_a_probe_fits_brings_the_results_nearer(store, queries, model):
    index = index_of(model, store)
    train_a_bit(model, 0.03)
    before, correction = probe(store, queries, sample_blocks=len(store)).measure(model, index)
    after, _ = probe(store, queries, sample_blocks=len(store)).measure(model, index, correction)
    assert after.overlap > before.overlap
    assert after.score_drift < before.score_drift
