"""Training objectives over retrieved candidates: pure functions of log-probabilities and scores.

| function | loss | source |
|---|---|---|
| realm_loss | -log sum_z p(z) p(y_m given z), mean over m | REALM, Guu et al. 2020, released code |
| retrieval_utility | mean of log p(y) - log p(y given null) | REALM, section 4.4 |
| orqa_mml_loss | logsumexp(all scores) - logsumexp(correct scores) | ORQA, Lee et al. 2019, section 4 |
"""

import torch
from torch import Tensor

from realm_fast.ops.marginal_lse import Level, marginal_log_likelihood


def realm_loss(
    gold_log_prob: Tensor, retrieval_scores: Tensor, mask: Tensor | None = None, *, level: Level = "token"
) -> Tensor:
    """The REALM loss from gold_log_prob [B, K, M] and retrieval_scores [B, K]; 0 if nothing is masked."""
    candidate = torch.log_softmax(retrieval_scores.to(gold_log_prob.dtype), -1)
    marginal = marginal_log_likelihood(gold_log_prob, candidate, mask, level=level)
    if mask is None:
        return -marginal.mean()
    counted = mask.sum() if level == "token" else mask.any(-1).sum()
    return -marginal.sum() / counted.clamp(min=1)


def retrieval_utility(marginal: Tensor, null_log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of marginal - null_log_prob over the counted entries: what retrieval adds; 0 if there are none.

    Args:
        marginal: [B, M] (or [B]) marginal log-likelihoods.
        null_log_prob: the same shape, log p(y | x, null block).
        mask: the same shape, bool, True where the entry counts; None: everywhere.
    """
    gain = (marginal - null_log_prob).detach()
    if mask is None:
        return gain.mean() if gain.numel() else gain.sum()
    return gain.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def orqa_mml_loss(scores: Tensor, correct: Tensor) -> Tensor:
    """Maximum marginal likelihood over the alternatives that are correct.

    loss[b] = logsumexp_j(scores[b, j]) - logsumexp_{j correct}(scores[b, j]); queries without a correct
    alternative count nothing.

    Args:
        scores: [B, J], -inf where there is no alternative.
        correct: [B, J] bool.

    Returns:
        The mean over the queries that have a correct alternative; 0 if there are none.
    """
    correct = correct & ~torch.isneginf(scores)
    answerable = correct.any(-1)  # [B]
    allowed = torch.where(answerable[:, None], scores, 0)
    hits = torch.where(answerable[:, None], scores.masked_fill(~correct, -torch.inf), 0)
    loss = torch.logsumexp(allowed, -1) - torch.logsumexp(hits, -1)
    return loss.masked_fill(~answerable, 0).sum() / answerable.sum().clamp(min=1)
