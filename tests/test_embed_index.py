"""A range of blocks embedded straight into an index: equal to embedding first and storing then."""

import numpy as np
import pytest
import torch
from model_world import make_embedder, make_store, one_thread, real_documents  # noqa: F401

import realm_fast.embedding as embedding_module
from realm_fast.embedding import EmbeddingStats, EmbeddingStopped, embed_blocks, embed_index
from realm_fast.errors import DataError, ProvenanceError, TrainingDivergedError
from realm_fast.index import MipsIndex, Provenance
from realm_fast.index_builder import IndexBuilder

BUDGET = 512
DTYPES = ["float32", "bfloat16", "int8"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("embed_index"), real_documents(60))


@pytest.fixture(scope="module")
def embedder(store):
    return make_embedder(store)


@pytest.fixture(scope="module")
def queries():
    return torch.randn(9, 8, generator=torch.Generator().manual_seed(3))


def two_steps(embedder, store, first, count, dtype):
    """What embed_index must equal."""
    ids = torch.arange(first, first + count)
    values = embed_blocks(embedder, store, block_ids=ids.numpy(), token_budget=BUDGET)
    return MipsIndex.from_embeddings(values, dtype=dtype, ids=ids)


def assert_same_answers(index, expected, queries, k=7):
    for exact in (True, False):
        got, want = (i.search(queries, k, exact=exact) for i in (index, expected))
        assert torch.equal(got.ids, want.ids)
        assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("first", "count"), [(0, None), (0, 1), (5, 1), (3, 47), (0, 48), (1, 49), (30, 33), (-5, 5)]
)
def test_it_answers_as_embedding_and_storing_does(store, embedder, queries, dtype, first, count):
    first = first % len(store)
    count = len(store) if count is None else count
    index = embed_index(embedder, store, first, count, dtype=dtype, token_budget=BUDGET)
    expected = two_steps(embedder, store, first, count, dtype)
    assert (len(index), index.dim, index.dtype) == (count, 8, dtype)
    assert torch.equal(index.ids, expected.ids)
    assert torch.equal(index.reconstruct(index.ids), expected.reconstruct(index.ids))
    assert_same_answers(index, expected, queries)
    assert index.stats()["irregular_rows"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_width_that_fills_no_group_of_the_layout(store, pooling, dtype):
    embedder = make_embedder(store, embedding_dim=7, pooling=pooling)
    index = embed_index(embedder, store, 0, 50, dtype=dtype, token_budget=BUDGET)
    queries = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert_same_answers(index, two_steps(embedder, store, 0, 50, dtype), queries)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_lives_on_as_any_index(store, embedder, queries, dtype, tmp_path):
    """Saved, loaded and changed: nothing of how it was built is left."""
    provenance = Provenance("encoder", store.corpus_hash, 7)
    index = embed_index(
        embedder, store, 10, 50, dtype=dtype, token_budget=BUDGET, provenance=provenance
    )  # fmt: skip
    index.save(tmp_path / "index.safetensors")
    loaded = MipsIndex.load(tmp_path / "index.safetensors", expect=provenance, verify=True)
    assert loaded.provenance == provenance
    expected = two_steps(embedder, store, 10, 50, dtype)
    assert_same_answers(loaded, expected, queries)
    extra = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    for changed in (loaded, expected):
        changed.add(extra)  # ids count on from the range's end
        changed.delete(torch.tensor([12, 59, 61]))
        changed.update(torch.tensor([20]), extra[:1])
    assert torch.equal(loaded.ids, expected.ids)
    assert_same_answers(loaded, expected, queries)


def test_the_same_call_gives_the_same_bits(store, embedder, tmp_path):
    for name in ("one", "two"):
        index = embed_index(embedder, store, 0, len(store), dtype="int8", token_budget=BUDGET)
        index.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_ranges_together_are_the_corpus(store, embedder):
    """Packs differ with the range, so values do in the order of their sums: 1e-5 of the norm."""
    whole = embed_blocks(embedder, store)
    for first in range(0, len(store), 17):
        count = min(17, len(store) - first)
        index = embed_index(embedder, store, first, count, dtype="float32", token_budget=BUDGET)
        part, expected = index.reconstruct(index.ids), whole[first : first + count]
        assert (part - expected).norm(dim=1).max() <= 1e-5 * expected.norm(dim=1).min()


def test_stats_are_complete_and_add_up_over_ranges(store, embedder):
    stats = EmbeddingStats()
    for first in (0, 20):
        embed_index(embedder, store, first, 20, dtype="int8", token_budget=BUDGET, stats=stats)
    assert stats.blocks == 40
    assert stats.tokens == int(store.block_lengths()[:40].sum())
    assert 0 < stats.encoder_seconds < stats.seconds
    assert 0 < stats.epilogue_seconds < stats.seconds
    assert stats.encoder_seconds + stats.epilogue_seconds + stats.wait_seconds <= stats.seconds
    assert 0 <= stats.encoder_idle < 1
    assert stats.epilogue_share == stats.epilogue_seconds / stats.encoder_seconds


@pytest.mark.parametrize(("first", "count"), [(0, 0), (-1, 3), (0, 10**6), (10**6, 1)])
def test_a_range_outside_of_the_corpus_is_refused(store, embedder, first, count):
    with pytest.raises(DataError, match=rf"blocks {first} to .* which has {len(store)} blocks"):
        embed_index(embedder, store, first, count, dtype="float32", token_budget=BUDGET)


def test_a_foreign_tokenizer_long_blocks_and_unknown_types_are_refused(store):
    small = make_embedder(store, trunk="fresh:layers=1,hidden=16,heads=2,positions=32")
    with pytest.raises(DataError, match="the embedder takes 32 at most"):
        embed_index(small, store, 0, 1, dtype="float32", token_budget=BUDGET)
    foreign = make_embedder(store)
    foreign.tokenizer_hash = "0" * 64
    with pytest.raises(ProvenanceError, match="the embedder was made for 0000"):
        embed_index(foreign, store, 0, 1, dtype="float32", token_budget=BUDGET)
    with pytest.raises(ValueError, match="dtype"):
        embed_index(make_embedder(store), store, 0, 1, dtype="int4", token_budget=BUDGET)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_reported_with_its_block(store, dtype):
    embedder = make_embedder(store)
    token = int(store.body_tokens(25)[0])
    with torch.no_grad():
        embedder.block_side.trunk.token_embedding[token] = torch.nan
    with pytest.raises(TrainingDivergedError, match=r"the embedding of block 25 is NaN"):
        embed_index(embedder, store, 25, 1, dtype=dtype, token_budget=BUDGET)


def test_should_stop_is_asked_before_every_pack(store, embedder):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == 3

    stats = EmbeddingStats()
    with pytest.raises(EmbeddingStopped, match=rf"stopped after \d+ of {len(store)} blocks"):
        embed_index(
            embedder, store, 0, len(store), dtype="int8", token_budget=256, should_stop=should_stop,
            stats=stats,
        )  # fmt: skip
    assert stats.packs == 2


def test_an_error_of_the_gathering_thread_surfaces(store, embedder, monkeypatch):
    calls = []
    gather = embedding_module.pack_blocks

    def failing(*arguments):
        calls.append(True)
        if len(calls) == 3:
            raise OSError("the token store went away")
        return gather(*arguments)

    monkeypatch.setattr(embedding_module, "pack_blocks", failing)
    with pytest.raises(OSError, match="the token store went away"):
        embed_index(embedder, store, 0, len(store), dtype="int8", token_budget=256)
    assert len(calls) <= 4  # what had been asked for already, no more


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e15, 1e25, 1e32])
def test_rows_too_large_for_the_epilogues_norms_are_stored_as_an_index_stores_them(dtype, size):
    from realm_fast.ops.embed_epilogue import embed_epilogue

    values = torch.randn(50, 1, 6, generator=torch.Generator().manual_seed(0))
    values[[3, 49]] *= size
    built = IndexBuilder(50, 6, dtype)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    where = {"scale": built.scale, "residual_norm": built.residual_norm, "norm": built.norm}
    embed_epilogue(values[rows], out=built.panels, row_ids=rows, **where)
    if built.originals is not None:
        embed_epilogue(values[rows], out=built.originals, row_ids=rows)
    assert len(built.check(rows.numpy())) == 0
    index = built.finish()
    expected = MipsIndex.from_embeddings(values[:, 0], dtype=dtype)
    assert index.stats()["irregular_rows"] == expected.stats()["irregular_rows"]
    assert_same_answers(index, expected, torch.randn(5, 6), k=50)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_from_elsewhere_and_rows_that_are_not_finite(dtype):
    values = np.random.default_rng(0).standard_normal((5, 6), dtype=np.float32)
    built = IndexBuilder(5, 6, dtype, first_id=100)
    built.store(np.array([4, 0, 1, 3, 2]), values)
    index = built.finish()
    assert index.ids.tolist() == [100, 101, 102, 103, 104]
    expected = torch.from_numpy(values[[1, 2, 4, 3, 0]])
    assert torch.equal(index.reconstruct(index.ids), expected)
