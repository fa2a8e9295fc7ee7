"""One step of REALM: loss, gradients and statistics against the formulas, row by row and in float64."""

import numpy as np
import pytest
import torch
from model_world import (
    make_embedder,
    make_queries,
    make_reader,
    make_store,
    one_thread,  # noqa: F401
    query_of,
    real_documents,
)

from realm_fast.embedding import embed_blocks
from realm_fast.errors import ConfigError, ProvenanceError
from realm_fast.index import MipsIndex
from realm_fast.masking import MaskedQuery
from realm_fast.model import IGNORE_INDEX, RealmModel, masked_accuracy, realm_step
from realm_fast.packing import NO_TOKENS, block_input, null_block_input, query_input
from realm_fast.retriever import retrieve_candidates
from realm_fast.types import NO_BLOCK


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("model"), real_documents(30))


@pytest.fixture(scope="module")
def index(store):
    return MipsIndex.from_embeddings(embed_blocks(make_embedder(store), store))


def make_model(store, **settings):
    """In float64 and evaluation mode, so that gradients can be compared closely."""
    embedder_settings = {"shared": settings.pop("shared", True)}
    model = RealmModel(make_embedder(store, **embedder_settings), make_reader(store), **settings)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().eval()


def candidates_of(model, index, store, queries, **settings):
    settings = {"num_candidates": 4, **settings}
    return retrieve_candidates(index, store, model.search_emb(queries).float(), queries, **settings)


def by_the_formula(model, store, queries, candidates):
    """(loss, scores, marginals, null log-likelihoods), one row at a time, with whole logits."""
    embedder, reader = model.embedder, model.reader
    scores = torch.full(candidates.block_ids.shape, -torch.inf, dtype=torch.float64)
    losses, marginals, nulls, right, null_right = [], [], [], [], []
    for b, query in enumerate(queries):
        row = []
        log_p = []
        for k in range(candidates.num_candidates):
            if not candidates.present[b, k]:
                continue
            block = int(candidates.block_ids[b, k])
            if candidates.is_null[b, k]:
                block_row, body = null_block_input(embedder.special), NO_TOKENS
            else:
                body = store.body_tokens(block)
                block_row = block_input(store.title_tokens(block), body, embedder.special)
            q = embedder.query_emb(embedder.pad([query_input(query.tokens, embedder.special)]))[0]
            d = embedder.block_emb(embedder.pad([block_row]))[0]
            row.append((q * d).sum() / model.temperature)
            scores[b, k] = row[-1].detach()
            positions = torch.from_numpy(query.positions.astype(np.int64) + 1)[None]
            hidden = reader.masked_hidden(reader.pad([reader.joint_row(query.tokens, body)]), positions)[0]
            logits = hidden @ reader.vocab_weight.T + reader.vocab_bias
            log_p.append(logits.log_softmax(dim=-1))  # [M, V]
        if not row:
            continue
        log_p_z = torch.stack(row).log_softmax(dim=0)  # [k]
        labels = torch.from_numpy(query.labels.astype(np.int64))
        gold = torch.stack(log_p)[:, torch.arange(len(labels)), labels]  # [k, M]
        if model.level == "sequence":
            gold = gold.sum(dim=1, keepdim=True)
        marginal = torch.logsumexp(log_p_z[:, None] + gold, dim=0)
        losses.append(-marginal)
        marginals.append(marginal.detach())
        nulls.append(gold[0].detach())
        mixture = torch.logsumexp(log_p_z[:, None, None] + torch.stack(log_p), dim=0)
        right.append(mixture.argmax(dim=-1) == labels)
        null_right.append(log_p[0].argmax(dim=-1) == labels)
    loss = torch.cat(losses).mean()
    return loss, scores, torch.cat(marginals), torch.cat(nulls), torch.cat(right), torch.cat(null_right)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "token level": ({}, {}),
    "sequence level": ({"level": "sequence"}, {}),
    "temperature": ({"temperature": 2.5}, {}),
    "separate sides": ({"shared": False}, {}),
    "null block alone": ({}, {"num_candidates": 1}),
    "one block alone": ({}, {"num_candidates": 1, "use_null_block": False}),
    "without null block": ({}, {"use_null_block": False}),
    "absent slots": ({}, {"num_candidates": 200}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_formula(store, index, case):
    model_settings, retrieval = CASES[case]
    model = make_model(store, **model_settings)
    queries = make_queries(store, 2 if case == "absent slots" else 5)
    candidates = candidates_of(model, index, store, queries, **retrieval)
    assert candidates.present.all() == (case != "absent slots")
    output = model(store, queries, candidates)
    expected, scores, *_ = by_the_formula(model, store, queries, candidates)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.retrieval_scores, scores, rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(model, output.loss), gradients(model, expected)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    zero = torch.zeros(())
    assert len(theirs) > 60
    for name, gradient in theirs.items():
        ours_here = ours.get(name, zero.expand_as(gradient))
        torch.testing.assert_close(ours_here, gradient, rtol=1e-7, atol=1e-12 * largest, msg=name)
    moved = [
        name
        for name, gradient in theirs.items()
        if name.startswith("embedder") and gradient.abs().max() > 1e-9
    ]
    assert bool(moved) == (candidates.num_candidates > 1)  # with one slot p(z | x) is 1 whatever the score


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_statistics_equal_the_formula(store, index, level):
    model = make_model(store, level=level)
    queries = make_queries(store, 6)
    # An embedding that predicts something, so that accuracies are neither 0 nor 1.
    with torch.no_grad():
        model.reader.vocab_bias.zero_()
        for query in queries[:3]:
            model.reader.vocab_bias[torch.from_numpy(query.labels.astype(np.int64))] = 40.0
    candidates = candidates_of(model, index, store, queries)
    stats = model(store, queries, candidates).stats
    _, scores, marginal, null, right, null_right = by_the_formula(model, store, queries, candidates)
    assert stats.masked_positions == sum(len(query.labels) for query in queries)
    assert stats.queries == 6
    torch.testing.assert_close(stats.null_probability, scores.softmax(dim=1)[:, 0].mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(stats.marginal_log_likelihood, marginal.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(stats.null_log_likelihood, null.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(stats.retrieval_utility, (marginal - null).mean(), rtol=1e-6, atol=1e-12)
    assert float(stats.masked_accuracy) == pytest.approx(float(right.double().mean()))
    assert float(stats.masked_accuracy_null) == pytest.approx(float(null_right.double().mean()))
    assert 0 < float(stats.masked_accuracy) < 1


def test_equal_blocks_are_embedded_once(store, index):
    model = make_model(store)
    query = query_of(store, 3, [1])
    candidates = candidates_of(model, index, store, [query] * 4)
    stats = model(store, [query] * 4, candidates).stats
    assert stats.block_slots == 16
    assert stats.embedded_blocks == 4  # the null block and three blocks, for all four queries


def test_the_null_block_absent_leaves_its_statistics_out(store, index):
    model = make_model(store)
    queries = make_queries(store, 2)
    candidates = candidates_of(model, index, store, queries, use_null_block=False)
    stats = model(store, queries, candidates).stats
    assert stats.null_probability is None
    assert stats.retrieval_utility is None
    assert stats.null_log_likelihood is None
    assert stats.masked_accuracy_null is None


def test_accuracy_can_be_left_out(store, index):
    model = make_model(store)
    queries = make_queries(store, 2)
    candidates = candidates_of(model, index, store, queries)
    assert model(store, queries, candidates, with_accuracy=False).stats.masked_accuracy is None


def test_with_the_retriever_frozen_nothing_flows_into_it(store, index):
    model, free = make_model(store, train_retriever=False), make_model(store)
    assert not model.train().embedder.training
    assert model.reader.training
    model.eval()
    queries = make_queries(store, 4)
    candidates = candidates_of(model, index, store, queries)
    scores, _ = model.fresh_scores(store, queries, candidates)
    assert scores.grad_fn is None
    output, expected = model(store, queries, candidates), free(store, queries, candidates)
    assert torch.equal(output.loss, expected.loss)
    ours, theirs = gradients(model, output.loss), gradients(free, expected.loss)
    assert not [name for name in ours if name.startswith("embedder")]
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-12, atol=0)


def test_a_query_without_candidates_counts_nothing(store):
    """No index and no null block: the loss is 0, gradients are 0, nothing is NaN."""
    model = make_model(store)
    queries = make_queries(store, 2)
    empty = MipsIndex.from_embeddings(torch.empty(0, 8))
    candidates = candidates_of(model, empty, store, queries, use_null_block=False)
    output = model(store, queries, candidates)
    assert float(output.loss.detach()) == 0
    assert (output.stats.masked_positions, output.stats.queries) == (0, 0)
    assert all(not gradient.any() for gradient in gradients(model, output.loss).values())


def test_a_query_without_candidates_does_not_disturb_the_others(store, tmp_path):
    """Query 0 was cut from the only block there is; query 1 from none."""
    single = make_store(tmp_path, real_documents(1), 128)
    model = make_model(single)
    tokens = single.body_tokens(0)[2:12].astype(np.int32)
    loose = MaskedQuery(NO_BLOCK, tokens, np.array([1, 4], np.int32), tokens[[1, 4]], (0, 0))
    queries = [query_of(single, 0, [2]), loose]
    index = MipsIndex.from_embeddings(torch.ones(1, 8))
    candidates = candidates_of(model, index, single, queries, use_null_block=False, num_candidates=1)
    assert candidates.present.tolist() == [[False], [True]]
    output = model(single, queries, candidates)
    expected, *_ = by_the_formula(model, single, queries, candidates)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    assert all(g.isfinite().all() for g in gradients(model, output.loss).values())


def test_bfloat16_autocast(store, index):
    torch.manual_seed(0)
    model = RealmModel(make_embedder(store), make_reader(store)).eval()
    queries = make_queries(store, 4)
    candidates = candidates_of(model, index, store, queries)
    exact = model(store, queries, candidates)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(store, queries, candidates)
    assert rough.loss.dtype == torch.float32
    assert 0 < abs(float(rough.loss.detach() - exact.loss.detach())) < 0.05
    ours, theirs = gradients(model, rough.loss), gradients(model, exact.loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in ours.values())
    flat = [torch.cat([g[name].flatten() for name in theirs]) for g in (ours, theirs)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_training_is_a_function_of_the_seed_and_search_ignores_dropout(store, index):
    model = RealmModel(make_embedder(store, dropout=0.5), make_reader(store)).train()
    queries = make_queries(store, 3)
    settings = {"num_candidates": 4}

    def step(seed):
        torch.manual_seed(seed)
        output, candidates = realm_step(model, index, store, queries, **settings)
        return float(output.loss.detach()), candidates.block_ids

    (one, ids), (same, ids_again), (other, other_ids) = step(1), step(1), step(2)
    assert one == same != other
    assert torch.equal(ids, ids_again)
    assert torch.equal(ids, other_ids)
    assert torch.equal(model.search_emb(queries), model.search_emb(queries))
    assert model.embedder.training
    assert not model.search_emb(queries).requires_grad


def test_a_few_steps_of_training_lower_the_loss_and_move_both_parts(store, index):
    torch.manual_seed(0)
    model = RealmModel(make_embedder(store, dropout=0.0), make_reader(store)).train()
    queries = make_queries(store, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(12):
        output, _ = realm_step(model, index, store, queries, num_candidates=4)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 1
    for part in ("embedder.block_side.projection.weight", "reader.trunk.mlm_head.dense.weight"):
        assert not torch.equal(dict(model.named_parameters())[part], before[part])


def test_the_null_blocks_score_can_be_raised(store, index):
    queries = make_queries(store, 3)
    plain, raised = make_model(store), make_model(store, null_score_offset=3.0)
    candidates = candidates_of(plain, index, store, queries)
    scores, _ = plain.fresh_scores(store, queries, candidates)
    shifted, _ = raised.fresh_scores(store, queries, candidates)
    assert candidates.is_null[:, 0].all()
    torch.testing.assert_close(shifted[:, 0], scores[:, 0] + 3)
    assert torch.equal(shifted[:, 1:], scores[:, 1:])
    probability = raised(store, queries, candidates).stats.null_probability
    torch.testing.assert_close(probability, torch.softmax(shifted, 1)[:, 0].mean(), check_dtype=False)


def test_parts_for_different_tokenizers_are_refused(store):
    reader = make_reader(store)
    reader.tokenizer_hash = "1" * 64
    with pytest.raises(ProvenanceError, match=r"made for tokenizer .* and the reader for 111111111111"):
        RealmModel(make_embedder(store), reader)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(store, temperature):
    with pytest.raises(ConfigError, match=r"pretrain\.score_temperature: expected a value > 0"):
        RealmModel(make_embedder(store), make_reader(store), temperature=temperature)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_masked_accuracy_by_hand(monkeypatch, chunk_bytes):
    """Two candidates: the null block says token 0, the block token 2; the prior decides."""
    monkeypatch.setattr("realm_fast.model._ARGMAX_LOGITS_BYTES", chunk_bytes)
    weight, bias = torch.eye(3) * 5, torch.zeros(3)
    says_0, says_2 = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    hidden = torch.stack([says_0, says_2])[None, :, None].expand(3, 2, 2, 3)  # [B, K, M, H]
    labels = torch.tensor([[0, 2], [2, IGNORE_INDEX], [2, 1]])
    prior = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]).log()
    marginal, null = masked_accuracy(hidden, weight, bias, labels, prior)
    # The marginal says 0, 2 and 2: right at (0, 0), (1, 0) and (2, 0) of 5; the null block only at (0, 0).
    assert float(marginal) == pytest.approx(3 / 5)
    assert float(null) == pytest.approx(1 / 5)
    nothing = torch.full_like(labels, IGNORE_INDEX)
    assert [float(x) for x in masked_accuracy(hidden, weight, bias, nothing, prior)] == [0, 0]
