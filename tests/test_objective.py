"""The objectives against their formulas written out, entry by entry, in float64."""

import math

import pytest
import torch
from tolerances import assert_as_good_as_torch

from realm_fast import objective
from realm_fast.objective import (
    emdr2_retriever_loss,
    in_batch_contrastive_loss,
    loop_loss,
    orqa_mml_loss,
    perplexity_distillation_loss,
    rag_loss,
    realm_loss,
    retrieval_utility,
)

INF, NAN = float("inf"), float("nan")
SHAPE = (4, 5, 6)


@pytest.fixture
def batch():
    """gold, scores, mask: an absent slot in query 0, nothing masked in query 1, a rugged rest."""
    g = torch.Generator().manual_seed(0)
    gold = (torch.randn(SHAPE, generator=g, dtype=torch.float64) * 2 - 5).requires_grad_()
    scores = torch.randn(SHAPE[:2], generator=g, dtype=torch.float64)
    scores[0, 3] = -INF
    mask = torch.rand(SHAPE[0], SHAPE[2], generator=g) > 0.4
    mask[1] = False
    assert mask[0].any()
    return gold, scores.requires_grad_(), mask


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def present(scores, b):
    return [k for k in range(scores.shape[1]) if scores[b, k] != -INF]


def marginals(gold, scores, mask):
    """{b: ([log sum_z p_z exp(g_zm) for counted m], log sum_z p_z exp(sum_m g_zm))}, by scalar arithmetic."""
    result = {}
    for b in range(gold.shape[0]):
        counted = mask[b].nonzero()[:, 0].tolist()
        if not counted:
            continue
        slots = present(scores, b)
        prior = softmax([scores[b, k].item() for k in slots])
        token = [
            math.log(sum(p * math.exp(gold[b, k, m].item()) for p, k in zip(prior, slots, strict=True)))
            for m in counted
        ]
        whole = [math.exp(sum(gold[b, k, m].item() for m in counted)) for k in slots]
        result[b] = token, math.log(sum(p * w for p, w in zip(prior, whole, strict=True)))
    return result


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_realm_and_rag(batch, impl):
    expected = marginals(*batch)
    tokens = [value for token, _ in expected.values() for value in token]
    sequences = [sequence for _, sequence in expected.values()]
    assert realm_loss(*batch, impl=impl).item() == pytest.approx(-sum(tokens) / len(tokens))
    assert rag_loss(*batch, impl=impl).item() == pytest.approx(-sum(tokens) / len(sequences))
    for function in (realm_loss, rag_loss):
        loss = function(*batch, level="sequence", impl=impl)
        assert loss.item() == pytest.approx(-sum(sequences) / len(sequences))


def test_emdr2_trains_the_retriever_only(batch):
    gold, scores, mask = batch
    expected = marginals(gold, scores, mask)
    tokens = [value for token, _ in expected.values() for value in token]
    sequences = [sequence for _, sequence in expected.values()]
    for level, values in (("token", tokens), ("sequence", sequences)):
        loss = emdr2_retriever_loss(gold, scores, mask, level=level)
        assert loss.item() == pytest.approx(-sum(values) / len(values))
        d_gold, d_scores = torch.autograd.grad(loss, (gold, scores), allow_unused=True)
        assert d_gold is None
        whole = realm_loss(gold, scores, mask, level=level)  # in which the reader learns, too
        torch.testing.assert_close(d_scores, torch.autograd.grad(whole, scores)[0])


@pytest.mark.parametrize(
    ("function", "sign"), [(perplexity_distillation_loss, 1), (loop_loss, -1)], ids=["pdist", "loop"]
)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_distillation(batch, function, sign, temperature):
    gold, scores, mask = batch
    losses = []
    for b in range(SHAPE[0]):
        counted = mask[b].nonzero()[:, 0].tolist()
        if not counted:
            continue
        slots = present(scores, b)
        mean = [sum(gold[b, k, m].item() for m in counted) / len(counted) for k in slots]
        target = softmax([sign * value / temperature for value in mean])
        prior = softmax([scores[b, k].item() for k in slots])
        losses.append(sum(t * math.log(t / p) for t, p in zip(target, prior, strict=True) if t > 0))
    loss = function(gold, scores, mask, temperature=temperature)
    assert loss.item() == pytest.approx(sum(losses) / len(losses))
    d_gold, d_scores = torch.autograd.grad(loss, (gold, scores), allow_unused=True)
    assert d_gold is None
    assert torch.isfinite(d_scores).all()
    assert d_scores[0, 3] == 0
    # d KL / d s = (p - t) / queries that count: descent moves the retriever towards the reader's preference.
    torch.testing.assert_close(d_scores.sum(-1), torch.zeros(SHAPE[0], dtype=torch.float64))


def test_distillation_is_zero_at_agreement_and_safe_where_the_target_underflows():
    gold = torch.tensor([[[0.0], [-1.0], [-1e6]]], dtype=torch.float64)
    scores = torch.tensor([[0.0, -1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss = perplexity_distillation_loss(gold, scores, temperature=1.0)
    p = torch.softmax(scores.detach(), -1)[0]
    t = torch.softmax(gold[0, :, 0], -1)
    assert t[2] == 0
    assert loss.item() == pytest.approx((t[:2] * (t[:2] / p[:2]).log()).sum().item())
    (d_scores,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(d_scores[0], p - t)
    agreed = perplexity_distillation_loss(gold[:, :2], scores[:, :2], temperature=1.0)
    assert agreed.item() == pytest.approx(0.0, abs=1e-12)


def test_in_batch_contrastive():
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 8, generator=g, dtype=torch.float64, requires_grad=True)
    blocks = torch.randn(7, 8, generator=g, dtype=torch.float64, requires_grad=True)
    positives = torch.tensor([4, -1, 0])
    losses = []
    for b in (0, 2):
        scores = [(queries[b] @ blocks[j]).item() / 0.5 for j in range(7)]
        losses.append(-math.log(softmax(scores)[positives[b]]))
    loss = in_batch_contrastive_loss(queries, blocks, positives, temperature=0.5)
    assert loss.item() == pytest.approx(sum(losses) / 2)
    d_queries, _ = torch.autograd.grad(loss, (queries, blocks))
    assert (d_queries[1] == 0).all()
    own = torch.tensor([0, 1, 2])
    assert torch.equal(
        in_batch_contrastive_loss(queries, blocks), in_batch_contrastive_loss(queries, blocks, own)
    )
    assert torch.autograd.gradcheck(
        lambda q, d: in_batch_contrastive_loss(q, d, positives), (queries, blocks)
    )
    poisoned = queries.detach().clone()
    poisoned[1] = NAN  # a query that does not count is never looked at
    again = in_batch_contrastive_loss(poisoned.requires_grad_(), blocks, positives, temperature=0.5)
    assert torch.equal(again, loss)
    for gradient in torch.autograd.grad(again, (poisoned, blocks)):
        assert gradient.isfinite().all()
    assert in_batch_contrastive_loss(poisoned, blocks).isnan()
    assert in_batch_contrastive_loss(queries, blocks, torch.full((3,), -1)) == 0
    assert in_batch_contrastive_loss(queries[:0], blocks) == 0


def test_orqa_mml():
    scores = torch.tensor(
        [[1.0, 2.0, 3.0, -INF], [0.5, 0.1, -1.0, 0.0], [1.0, 1.0, -INF, -INF]],
        dtype=torch.float64,
        requires_grad=True,
    )
    correct = torch.tensor([[True, False, True, True], [False] * 4, [False, False, True, False]])
    expected = -math.log(sum(softmax([1.0, 2.0, 3.0])[i] for i in (0, 2)))  # only query 0 is answerable
    loss = orqa_mml_loss(scores, correct)
    assert loss.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(gradient).all()
    assert (gradient[1:] == 0).all()
    assert gradient[0, 3] == 0
    assert gradient[0, 1] > 0 > gradient[0, 2]
    poisoned = scores.detach().clone()
    poisoned[1, 2] = NAN  # a query without a correct alternative is never looked at
    again = orqa_mml_loss(poisoned.requires_grad_(), correct)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, poisoned)[0], gradient)
    poisoned.data[0, 1] = NAN
    assert orqa_mml_loss(poisoned, correct).isnan()
    assert torch.autograd.gradcheck(lambda s: orqa_mml_loss(s, correct[:2, :3]), (scores[:2, :3],))
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert orqa_mml_loss(scores, everything).item() == pytest.approx(0.0)
    assert orqa_mml_loss(scores, ~everything) == 0
    assert orqa_mml_loss(scores[:, :0], everything[:, :0]) == 0


def test_retrieval_utility():
    marginal = torch.tensor([[-1.0, -2.0], [0.0, -4.0]], requires_grad=True)
    null = torch.tensor([[-1.5, NAN], [NAN, -3.0]])
    mask = torch.tensor([[True, False], [False, True]])
    utility = retrieval_utility(marginal, null, mask)
    assert utility.item() == pytest.approx((0.5 - 1.0) / 2)
    assert not utility.requires_grad
    assert retrieval_utility(marginal, null, ~mask).isnan()
    assert retrieval_utility(marginal, null, torch.zeros_like(mask)) == 0


ON_CANDIDATES = [realm_loss, rag_loss, emdr2_retriever_loss, perplexity_distillation_loss, loop_loss]


@pytest.mark.parametrize("function", ON_CANDIDATES)
def test_gradients(batch, function):
    gold, _, mask = batch
    scores = torch.randn(SHAPE[:2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: function(gold.detach(), s, mask), (scores,))
    if function in (realm_loss, rag_loss):
        assert torch.autograd.gradcheck(lambda g: function(g, scores.detach(), mask), (gold,))


@pytest.mark.parametrize("function", ON_CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(batch, function, dtype):
    gold, scores, mask = (t.detach() for t in batch)
    gold = gold.to(dtype)
    truth = function(gold.double(), scores.float().double(), mask)
    eager = truth.float()  # one rounding of the truth: the strictest torch there could be
    assert_as_good_as_torch(function(gold, scores.float(), mask), truth, eager, what=function.__name__)


@pytest.mark.parametrize("function", ON_CANDIDATES)
def test_what_does_not_count_is_never_looked_at(batch, function):
    gold, scores, mask = batch
    ignored = ~mask[:, None] | torch.isneginf(scores)[..., None]
    poisoned = gold.detach().masked_fill(ignored, NAN).requires_grad_()
    expected = function(gold, scores, mask)
    actual = function(poisoned, scores, mask)
    assert torch.equal(actual, expected)
    (d_scores,) = torch.autograd.grad(actual, scores)
    assert torch.isfinite(d_scores).all()
    assert (d_scores[1] == 0).all()
    assert d_scores[0, 3] == 0
    counted = gold.detach().masked_fill(~ignored, NAN)
    assert function(counted, scores, mask).isnan()


@pytest.mark.parametrize("function", ON_CANDIDATES)
def test_nothing_counts(batch, function):
    gold, scores, mask = batch
    loss = function(gold, scores, torch.zeros_like(mask))
    assert loss == 0
    (d_scores,) = torch.autograd.grad(loss, scores)
    assert (d_scores == 0).all()
    assert function(gold[:0], scores[:0], mask[:0]) == 0


@pytest.mark.parametrize("function", ON_CANDIDATES)
def test_bad_input_is_named(batch, function):
    gold, scores, mask = (t.detach() for t in batch)
    with pytest.raises(ValueError, match=r"gold_log_prob: expected \[B, K, M\]"):
        function(gold[0], scores, mask)
    with pytest.raises(ValueError, match=r"scores: expected \[4, 5\]"):
        function(gold, scores[:, :2], mask)
    with pytest.raises(TypeError, match=r"mask: expected \[4, 6\] bool"):
        function(gold, scores, mask.int())


def test_more_bad_input():
    emb = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"block_emb: expected \[J, 4\]"):
        in_batch_contrastive_loss(emb, torch.randn(3, 5))
    with pytest.raises(ValueError, match="block_emb: expected at least 3 rows"):
        in_batch_contrastive_loss(emb, emb[:2])
    with pytest.raises(ValueError, match=r"positives: expected values in \[-1, 3\)"):
        in_batch_contrastive_loss(emb, emb, torch.tensor([0, 1, 3]))
    for function in (in_batch_contrastive_loss, perplexity_distillation_loss, loop_loss):
        first = emb if function is in_batch_contrastive_loss else torch.zeros(2, 3, 4)
        second = emb if function is in_batch_contrastive_loss else torch.zeros(2, 3)
        with pytest.raises(ValueError, match="temperature: expected > 0, got 0"):
            function(first, second, temperature=0)
    with pytest.raises(TypeError, match=r"correct: expected \[3, 4\] bool"):
        orqa_mml_loss(emb, emb)


def test_the_table_names_every_function():
    for name in (
        "realm_loss",
        "rag_loss",
        "emdr2_retriever_loss",
        "perplexity_distillation_loss",
        "loop_loss",
        "in_batch_contrastive_loss",
        "orqa_mml_loss",
        "retrieval_utility",
    ):
        assert f"`{name}`" in objective.__doc__
