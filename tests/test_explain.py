"""An illustration's numbers: probabilities, the marginal, and the gradient that autograd finds."""

import json

import pytest
import torch
from model_world import (
    make_embedder,
    make_queries,
    make_reader,
    make_store,
    one_thread,  # noqa: F401
    real_documents,
)

from realm_fast.embedding import embed_blocks
from realm_fast.explain import illustrate
from realm_fast.index import MipsIndex
from realm_fast.model import RealmModel
from realm_fast.ops.linear_marginal_ce import linear_marginal_cross_entropy_reference
from realm_fast.retriever import retrieve_candidates


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("explain"), real_documents(20))
    embedder = make_embedder(store)
    return store, MipsIndex.from_embeddings(embed_blocks(embedder, store)), embedder


def illustrated(
    world, *, level="token", use_null_block=True, num_candidates=4, temperature=1.0, top_tokens=5
):
    store, index, embedder = world
    model = RealmModel(embedder, make_reader(store), level=level, temperature=temperature).train()
    query = next(q for q in make_queries(store, 20) if len(q.labels) >= 2)
    candidates = retrieve_candidates(
        index, store, model.search_emb([query]), [query],
        num_candidates=num_candidates, use_null_block=use_null_block,
    )  # fmt: skip
    shown = illustrate(
        model, store, store.tokenizer(), query, candidates, title="A title", step=7, top_tokens=top_tokens
    )
    return model, query, candidates, shown


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_autograd_finds(world, level, temperature):
    store = world[0]
    model, query, candidates, shown = illustrated(world, level=level, temperature=temperature)
    assert model.training  # left as it was
    model.eval()
    with torch.no_grad():
        scores, _ = model.fresh_scores(store, [query], candidates)
        hidden, _ = model.reader_hidden(store, [query], candidates, len(query.labels))
        weight, bias = model.reader.vocab_weight.double(), model.reader.vocab_bias.double()
    scores = scores.double().requires_grad_()
    labels = torch.from_numpy(query.labels.astype("int64"))[None]
    loss = linear_marginal_cross_entropy_reference(hidden.double(), weight, bias, labels, scores, level=level)
    loss.backward()
    found = torch.tensor([candidate["gradient"] for candidate in shown["candidates"]], dtype=torch.float64)
    torch.testing.assert_close(found, scores.grad[0], rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-6
    assert abs(float(found.sum())) < 1e-12
    gold = torch.tensor(shown["gold_marginal_p"], dtype=torch.float64)
    if level == "token":
        assert float(-gold.log().mean()) == pytest.approx(float(loss.detach()), rel=1e-10)
    assert [c["score"] for c in shown["candidates"]] == pytest.approx(scores[0].tolist())


def test_probabilities_sum_to_one(world):
    store = world[0]
    _, query, _, shown = illustrated(world, top_tokens=store.vocab_size)
    p_z = [candidate["p_z"] for candidate in shown["candidates"]]
    assert abs(sum(p_z) - 1) < 1e-12
    assert abs(sum(candidate["responsibility"] for candidate in shown["candidates"]) - 1) < 1e-12
    for m in range(len(query.labels)):
        per_candidate = [
            {prediction["token"]: prediction["p"] for prediction in candidate["predictions"][m]}
            for candidate in shown["candidates"]
        ]
        marginal = {prediction["token"]: prediction["p"] for prediction in shown["marginal"][m]}
        assert all(abs(sum(p.values()) - 1) < 1e-12 for p in [*per_candidate, marginal])
        gold = shown["gold"][m]
        assert shown["gold_marginal_p"][m] == pytest.approx(marginal[gold], rel=1e-12)
        mixture = sum(p * of[gold] for p, of in zip(p_z, per_candidate, strict=True))
        assert marginal[gold] == pytest.approx(mixture, rel=1e-12)
        for candidate, of in zip(shown["candidates"], per_candidate, strict=True):
            assert candidate["gold_p"][m] == pytest.approx(of[gold], rel=1e-12)


def test_what_an_illustration_says(world):
    store = world[0]
    _, query, candidates, shown = illustrated(world)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert (shown["title"], shown["step"], shown["level"]) == ("A title", 7, "token")
    assert shown["origin_block_id"] == query.origin_block_id
    assert shown["query_tokens"] == store.tokenizer().tokens(query.tokens)
    assert [shown["query_tokens"][p] for p in shown["positions"]] == ["[MASK]"] * len(query.positions)
    assert "[MASK]" in shown["query"]
    assert shown["gold"] == store.tokenizer().tokens(query.labels)
    assert [c["block_id"] for c in shown["candidates"]] == candidates.block_ids[0].tolist()
    assert [c["slot"] for c in shown["candidates"]] == [0, 1, 2, 3]
    null, first = shown["candidates"][:2]
    assert (null["block_id"], null["title"], null["text"]) == (-1, "", "")
    assert (first["title"], first["text"]) == (store.title(first["block_id"]), store.text(first["block_id"]))
    assert shown["null_gold_p"] == null["gold_p"]
    for candidate in shown["candidates"]:
        assert candidate["gradient"] == pytest.approx(candidate["p_z"] - candidate["responsibility"])
        assert len(candidate["predictions"]) == len(query.labels)
        for top in candidate["predictions"]:
            assert len(top) == 5
            assert [t["p"] for t in top] == sorted((t["p"] for t in top), reverse=True)


def test_absent_slots_are_not_shown(world):
    store = world[0]
    _, _, candidates, shown = illustrated(world, num_candidates=len(store) + 5)
    assert len(shown["candidates"]) == int(candidates.present.sum()) < len(store) + 5
    assert sum(candidate["p_z"] for candidate in shown["candidates"]) == pytest.approx(1, abs=1e-12)
    json.dumps(shown, allow_nan=False)


def test_without_the_null_block(world):
    _, _, _, shown = illustrated(world, use_null_block=False)
    assert shown["null_gold_p"] is None
    assert all(candidate["block_id"] >= 0 for candidate in shown["candidates"])


def test_candidates_of_several_queries_are_refused(world):
    store, index, embedder = world
    model = RealmModel(embedder, make_reader(store))
    queries = make_queries(store, 2)
    candidates = retrieve_candidates(index, store, model.search_emb(queries), queries, num_candidates=2)
    with pytest.raises(ValueError, match="expected those of one query, got those of 2"):
        illustrate(model, store, store.tokenizer(), queries[0], candidates, title="", step=0)
