"""Training objectives over K candidate blocks: pure functions of log-probabilities and scores, one table.

Letters: B queries, K candidates, M target tokens. g = gold_log_prob [B, K, M] = log p(y_m | x, z); s = scores
[B, K]; p = softmax_z(s); c = the positions that count (mask); sg(.) stops the gradient.

| function | formula | mean over | trains | source |
|---|---|---|---|---|
| `realm_loss` token | -log sum_z p_z exp(g_zm) | m in c | both | REALM's released code |
| `realm_loss` sequence | -log sum_z p_z exp(sum_m g_zm) | b | both | REALM, Guu et al. 2020 |
| `rag_loss` token | -sum_m log sum_z p_z exp(g_zm) | b | both | RAG-Token, Lewis et al. 2020 |
| `rag_loss` sequence | -log sum_z p_z exp(sum_m g_zm) | b | both | RAG-Sequence, the same |
| `emdr2_retriever_loss` token | -log sum_z p_z exp(sg(g_zm)) | m in c | retriever | EMDR2, the code |
| `emdr2_retriever_loss` sequence | -log sum_z p_z exp(sum_m sg(g_zm)) | b | retriever | EMDR2 (Singh 2021) |
| `perplexity_distillation_loss` | KL(sg(softmax_z(mean_m g_zm / T)), p) | b | retriever | Atlas (2022) |
| `loop_loss` | KL(sg(softmax_z(-mean_m g_without_zm / T)), p) | b | retriever | LOOP: the same |
| `in_batch_contrastive_loss` | -log softmax_j(q_b . d_j / T)[positive] | b | embedder | DPR, ICT |
| `orqa_mml_loss` | logsumexp(s) - logsumexp(s of the correct) | b | both | ORQA, Lee et al. 2019 |
| `retrieval_utility` | a measure: log p(y, all) - log p(y, null block) | m or b | nothing | REALM |

Edge cases, shared: an absent slot (s = -inf) has probability 0, no gradient, and its g is never looked at; a
query without a counted position (a positive, a correct alternative) counts nothing and is never looked at;
if nothing counts, the loss is 0 with zero gradients; NaN in a value that counts makes the loss NaN.
"""

import torch
from torch import Tensor

from realm_fast.ops._checks import check_choice, check_tensor, describe
from realm_fast.ops.marginal_lse import (
    FLOAT_DTYPES,
    LEVELS,
    Level,
    accumulation_dtype,
    marginal_log_likelihood,
)


def realm_loss(
    gold_log_prob: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    level: Level = "token",
    impl: str = "auto",
) -> Tensor:
    """The negative marginal log-likelihood, a mean over what is marginalised.

    Args:
        gold_log_prob: [B, K, M] float, log p(y_m | x, z).
        scores: [B, K] float, retrieval scores; -inf marks an absent slot.
        mask: [B, M] bool, positions that count; None: all.
        level: "token" (each masked word by itself) or "sequence" (all of a query's words together).
        impl: as in `marginal_log_likelihood`.

    Returns:
        A scalar; 0 if nothing counts.
    """
    marginal, counted = _marginal(gold_log_prob, scores, mask, level, impl)
    return -_mean(marginal, counted)


def rag_loss(
    gold_log_prob: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    level: Level = "token",
    impl: str = "auto",
) -> Tensor:
    """RAG's negative log-likelihood of the whole answer, a mean over queries. Arguments as in `realm_loss`.

    At the token level it is REALM's with a sum over the positions of a query where REALM has a mean over all
    positions; at the sequence level the two are one.
    """
    marginal, counted = _marginal(gold_log_prob, scores, mask, level, impl)
    if level == "token":
        marginal, counted = marginal.sum(-1), counted.any(-1)  # ignored positions are 0
    return -_mean(marginal, counted)


def emdr2_retriever_loss(
    gold_log_prob: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    level: Level = "token",
    impl: str = "auto",
) -> Tensor:
    """EMDR2's loss of the retriever: REALM's under a frozen reader of single blocks.

    The reader learns from its own loss (all blocks together); here its likelihoods are constants. The paper
    writes it for whole answers ("sequence"), the released code computes it token by token. Arguments as in
    `realm_loss`.
    """
    return realm_loss(gold_log_prob.detach(), scores, mask, level=level, impl=impl)


def perplexity_distillation_loss(
    gold_log_prob: Tensor, scores: Tensor, mask: Tensor | None = None, *, temperature: float = 0.01
) -> Tensor:
    """Atlas's pdist: the retriever imitates how much each block helps the reader.

    loss[b] = KL(t, p), t = softmax_z(mean over counted m of g_zm / temperature), a constant.

    Args:
        gold_log_prob, scores, mask: as in `realm_loss`; no gradient reaches gold_log_prob.
        temperature: > 0; the default is that of Atlas's code.

    Returns:
        The mean over queries that have a counted position; 0 if there are none.
    """
    target, answered = _mean_over_positions(gold_log_prob, scores, mask)
    return _distill(target, scores, answered, temperature, "perplexity_distillation_loss")


def loop_loss(
    gold_log_prob_without: Tensor, scores: Tensor, mask: Tensor | None = None, *, temperature: float = 0.01
) -> Tensor:
    """Atlas's leave-one-out: a block matters as much as the reader is worse off without it.

    loss[b] = KL(t, p), t = softmax_z(-mean over counted m of g_without_zm / temperature), a constant.

    Args:
        gold_log_prob_without: [B, K, M], log p(y_m | x, every candidate but z).
        scores, mask, temperature: as in `perplexity_distillation_loss`.
    """
    target, answered = _mean_over_positions(gold_log_prob_without, scores, mask)
    return _distill(-target, scores, answered, temperature, "loop_loss")


def in_batch_contrastive_loss(
    query_emb: Tensor, block_emb: Tensor, positives: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """The other queries' blocks are the negatives: DPR, and ICT with the cut sentence as the query.

    loss[b] = -log softmax_j(q_b . d_j / temperature)[positives[b]]

    Args:
        query_emb: [B, D] float.
        block_emb: [J, D]: positives, hard negatives and, in a distributed job, those of the other ranks.
        positives: [B] int64 in [0, J), the row of each query's own block, -1 for a query that counts
            nothing; None: row b (needs J >= B).
        temperature: > 0.

    Returns:
        The mean over queries that count; 0 if there are none.
    """
    check_tensor("query_emb", query_emb, shape=("B", "D"), dtypes=FLOAT_DTYPES)
    batch, width = query_emb.shape
    check_tensor("block_emb", block_emb, shape=("J", width), device=query_emb.device)
    _check_temperature(temperature, "in_batch_contrastive_loss")
    blocks = block_emb.shape[0]
    if positives is None:
        if blocks < batch:
            raise ValueError(f"block_emb: expected at least {batch} rows, got {describe(block_emb)}")
        positives = torch.arange(batch, device=query_emb.device)
    check_tensor("positives", positives, shape=(batch,), dtypes=(torch.int64,), device=query_emb.device)
    if bool(((positives < -1) | (positives >= blocks)).any()):
        raise ValueError(f"positives: expected values in [-1, {blocks}), got {positives.tolist()}")
    counted = positives >= 0
    acc = accumulation_dtype(query_emb)
    query_emb = query_emb.masked_fill(~counted[:, None], 0)  # whatever stands in rows that do not count
    scores = (query_emb @ block_emb.t()).to(acc) / temperature  # [B, J]
    if blocks == 0:
        return scores.sum()  # no query can have a positive
    own = scores.gather(1, positives.clamp(min=0)[:, None])[:, 0]
    loss = torch.logsumexp(scores, -1) - own
    return _mean(loss, counted)


def orqa_mml_loss(scores: Tensor, correct: Tensor) -> Tensor:
    """Maximum marginal likelihood over the alternatives that are correct: blocks, or spans of many blocks.

    loss[b] = logsumexp_j(scores[b, j]) - logsumexp_{j correct}(scores[b, j])

    Args:
        scores: [B, J] float, -inf where there is no alternative.
        correct: [B, J] bool.

    Returns:
        The mean over the queries that have a correct alternative; 0 if there are none.
    """
    check_tensor("scores", scores, shape=("B", "J"), dtypes=FLOAT_DTYPES)
    check_tensor("correct", correct, shape=tuple(scores.shape), dtypes=(torch.bool,), device=scores.device)
    scores = scores.to(accumulation_dtype(scores))
    correct = correct & ~torch.isneginf(scores)
    answerable = correct.any(-1)  # [B]
    if scores.shape[1] == 0:
        return scores.sum()
    # A query without a correct alternative would be inf - inf: give it a harmless row, then leave it out.
    everything = torch.where(answerable[:, None], scores, 0)
    hits = torch.where(answerable[:, None], scores.masked_fill(~correct, -torch.inf), 0)
    return _mean(torch.logsumexp(everything, -1) - torch.logsumexp(hits, -1), answerable)


def retrieval_utility(marginal: Tensor, null_log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of marginal - null_log_prob over the entries that count: what retrieval adds, in nats.

    Args:
        marginal: [B, M] (token level) or [B] (sequence level) marginal log-likelihoods.
        null_log_prob: the same shape, log p(y | x, null block).
        mask: the same shape, bool; None: every entry counts.
    """
    check_tensor("null_log_prob", null_log_prob, shape=tuple(marginal.shape), device=marginal.device)
    if mask is None:
        mask = torch.ones_like(marginal, dtype=torch.bool)
    check_tensor("mask", mask, shape=tuple(marginal.shape), dtypes=(torch.bool,), device=marginal.device)
    return _mean((marginal - null_log_prob).detach(), mask)


def _marginal(
    gold_log_prob: Tensor, scores: Tensor, mask: Tensor | None, level: Level, impl: str
) -> tuple[Tensor, Tensor]:
    """The marginal and, of the same shape, which entries count."""
    check_choice("level", level, LEVELS)
    gold, scores, mask = _checked(gold_log_prob, scores, mask)
    candidate = torch.log_softmax(scores.to(gold.dtype), -1)
    marginal = marginal_log_likelihood(gold, candidate, mask, level=level, impl=impl)
    return marginal, mask if level == "token" else mask.any(-1)


def _checked(gold_log_prob: Tensor, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_tensor("gold_log_prob", gold_log_prob, shape=("B", "K", "M"), dtypes=FLOAT_DTYPES)
    batch, candidates, positions = gold_log_prob.shape
    device = gold_log_prob.device
    check_tensor("scores", scores, shape=(batch, candidates), dtypes=FLOAT_DTYPES, device=device)
    if mask is None:
        mask = torch.ones(batch, positions, dtype=torch.bool, device=device)
    check_tensor("mask", mask, shape=(batch, positions), dtypes=(torch.bool,), device=device)
    return gold_log_prob.to(accumulation_dtype(gold_log_prob)), scores, mask


def _mean_over_positions(gold_log_prob: Tensor, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, K] mean of the counted positions, without gradient, and [B] which queries have one."""
    gold, scores, mask = _checked(gold_log_prob.detach(), scores, mask)
    ignored = ~mask[:, None] | torch.isneginf(scores)[..., None]
    # In float64: the temperature is small, and what it divides is rounded before.
    total = gold.double().masked_fill(ignored, 0).sum(-1)
    return total / mask.sum(-1, keepdim=True).clamp(min=1), mask.any(-1)


def _distill(preference: Tensor, scores: Tensor, answered: Tensor, temperature: float, name: str) -> Tensor:
    """Mean over answered queries of KL(softmax(preference / temperature), softmax(scores)), present slots."""
    _check_temperature(temperature, name)
    absent = torch.isneginf(scores)  # [B, K]
    log_target = torch.log_softmax((preference / temperature).masked_fill(absent, -torch.inf), -1)
    log_prior = torch.log_softmax(scores.to(accumulation_dtype(scores)), -1)
    log_target = log_target.to(log_prior.dtype)
    # 0 log 0 = 0, in absent slots and where the target underflows; masked before the product, or the
    # gradient would be 0 * inf.
    possible = ~absent & ~torch.isneginf(log_target)
    difference = (log_target - log_prior).masked_fill(~possible, 0)
    return _mean((log_target.exp() * difference).sum(-1), answered)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def _check_temperature(temperature: float, name: str) -> None:
    if not temperature > 0:
        raise ValueError(f"{name}: temperature: expected > 0, got {temperature}")
