"""A whole corpus through the embedder: order, tolerance, modes, interruption, and what is refused."""

import numpy as np
import pytest
import torch
from model_world import make_embedder, make_store, one_thread, real_documents  # noqa: F401

from realm_fast.embedding import EmbeddingStats, EmbeddingStopped, embed_blocks, embed_null_block
from realm_fast.errors import ConfigError, DataError, ProvenanceError, TrainingDivergedError
from realm_fast.packing import block_input, null_block_input


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("embedding"), real_documents(40))


@pytest.fixture
def embedder(store):
    return make_embedder(store)


def one_by_one(embedder, store, ids):
    embedder.eval()
    with torch.no_grad():
        rows = [block_input(store.title_tokens(i), store.body_tokens(i), embedder.special) for i in ids]
        return torch.cat([embedder.block_emb(embedder.pad([row])) for row in rows])


@pytest.mark.parametrize("token_budget", [1, 64, 700, 1 << 20])
def test_every_block_in_its_place_whatever_the_budget(store, embedder, token_budget):
    """The documented tolerance: 1e-5 of the norm in float32."""
    embeddings = embed_blocks(embedder, store, token_budget=token_budget)
    expected = one_by_one(embedder, store, range(len(store)))
    assert embeddings.dtype == torch.float32
    assert embeddings.device.type == "cpu"
    assert (embeddings - expected).norm(dim=1).max() <= 1e-5 * expected.norm(dim=1).min()


def test_the_same_call_gives_the_same_bits(store, embedder):
    assert torch.equal(embed_blocks(embedder, store), embed_blocks(embedder, store))


def test_chosen_blocks_in_the_order_asked_for(store, embedder):
    ids = [7, 3, 3, 21, 0]
    expected = one_by_one(embedder, store, ids)
    torch.testing.assert_close(embed_blocks(embedder, store, block_ids=ids), expected, rtol=1e-5, atol=1e-5)
    assert embed_blocks(embedder, store, block_ids=np.zeros(0, np.int64)).shape == (0, 8)


def test_stats_count_tokens_and_padding(store, embedder):
    stats = EmbeddingStats()
    embed_blocks(embedder, store, token_budget=2048, stats=stats)
    assert stats.blocks == len(store)
    assert stats.tokens == int(store.block_lengths().sum())
    assert stats.padded_tokens >= stats.tokens
    assert stats.padding_waste == pytest.approx(1 - stats.tokens / stats.padded_tokens)
    assert stats.padding_waste < 0.2  # of a hundred blocks in three packs
    assert 1 < stats.packs < len(store)
    assert stats.blocks_per_s > 0


def test_writes_into_a_memory_map(store, embedder, tmp_path):
    out = np.memmap(tmp_path / "emb.bin", np.float32, "w+", shape=(len(store), 8))
    result = embed_blocks(embedder, store, out=out)
    out.flush()
    stored = np.fromfile(tmp_path / "emb.bin", np.float32).reshape(len(store), 8)
    assert np.array_equal(stored, embed_blocks(embedder, store).numpy())
    assert result.data_ptr() == out.ctypes.data


@pytest.mark.parametrize(
    "out", [torch.empty(3, 8), torch.empty(0, 8), np.empty((64, 8)), torch.empty(64, 8, dtype=torch.bfloat16)]
)
def test_an_out_of_another_shape_or_type_is_refused(store, embedder, out):
    with pytest.raises(ValueError, match=rf"out: expected \[{len(store)}, 8\] float32"):
        embed_blocks(embedder, store, out=out)


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_state_are_left_alone(store, embedder, training):
    embedder.train(training)
    state = torch.get_rng_state()
    embeddings = embed_blocks(embedder, store)
    assert embedder.training is training
    assert all(module.training is training for module in embedder.modules())
    assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn
    assert not embeddings.requires_grad
    assert not embeddings.is_inference()


def test_should_stop_stops_between_packs_and_restores_the_mode(store, embedder):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == 3

    stats = EmbeddingStats()
    with pytest.raises(EmbeddingStopped, match=rf"stopped after \d+ of {len(store)} blocks"):
        embed_blocks(embedder.train(), store, token_budget=256, should_stop=should_stop, stats=stats)
    assert stats.packs == 2
    assert embedder.training


def test_bfloat16_is_near_and_float32(store, embedder):
    exact = embed_blocks(embedder, store)
    rough = embed_blocks(embedder, store, precision="bfloat16")
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.15
    with pytest.raises(ConfigError, match="precision: expected auto, float32 or bfloat16, got 'int8'"):
        embed_blocks(embedder, store, precision="int8")


def test_the_null_block(store, embedder):
    null = embed_null_block(embedder.train())
    assert embedder.training
    embedder.eval()
    expected = embedder.block_emb(embedder.pad([null_block_input(embedder.special)]))[0]
    torch.testing.assert_close(null, expected, rtol=1e-5, atol=1e-6)
    (null * torch.ones(8, requires_grad=True)).sum().backward()  # may enter a graph


def test_a_foreign_tokenizer_is_refused(store, embedder):
    embedder.tokenizer_hash = "0" * 64
    with pytest.raises(
        ProvenanceError, match=f"tokenizer {store.tokenizer_hash[:12]}, the embedder was made for 0000"
    ):
        embed_blocks(embedder, store)


def test_blocks_beyond_the_positions_are_refused(store):
    small = make_embedder(store, trunk="fresh:layers=1,hidden=16,heads=2,positions=32")
    with pytest.raises(
        DataError, match=r"the embedder takes 32 at most: build the corpus with corpus\.max_block_tokens=32"
    ):
        embed_blocks(small, store)


@pytest.mark.parametrize("wrong", [[-1], [0, 10**6]])
def test_a_block_that_does_not_exist_is_named(store, embedder, wrong):
    with pytest.raises(
        DataError, match=rf"block {wrong[-1]} does not exist: the corpus has blocks 0 to {len(store) - 1}"
    ):
        embed_blocks(embedder, store, block_ids=wrong)


def test_nan_is_reported_with_its_block(store, embedder):
    token = int(store.body_tokens(5)[0])
    holders = [
        i for i in range(len(store)) if token in store.body_tokens(i) or token in store.title_tokens(i)
    ]
    with torch.no_grad():
        embedder.block_side.trunk.token_embedding[token] = torch.nan
    with pytest.raises(TrainingDivergedError, match=r"the embedding of block (\d+) is NaN") as caught:
        embed_blocks(embedder, store)
    assert int(str(caught.value).split("block ")[1].split()[0]) in holders


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("layers", [{}, {"layer_norm": False}, {"projection": "none", "embedding_dim": 16}])
def test_the_fused_epilogue_gives_what_the_layers_give(store, pooling, layers):
    embedder = make_embedder(store, pooling=pooling, **layers).eval()
    for parameter in embedder.block_side.parameters():  # LayerNorm's ones and zeros would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    rows = [block_input(store.title_tokens(i), store.body_tokens(i), embedder.special) for i in range(12)]
    batch = embedder.pad(rows)
    with torch.no_grad():
        states = embedder.block_side.pooled_states(batch)
        expected, got = embedder.block_emb(batch), embedder.block_side.epilogue(**states).out
    assert got.shape == expected.shape
    assert (got - expected).norm(dim=1).max() <= 1e-5 * expected.norm(dim=1).min()
    with pytest.raises(RuntimeError, match="inference only"):
        embedder.block_side.epilogue(**states)
