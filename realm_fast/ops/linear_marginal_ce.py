"""The reader's loss from its hidden states: projection, log-softmax and marginal, without the logits in memory.

logits[b, k, m, :]     = hidden[b, k, m] @ weight.T + bias
gold_log_prob[b, k, m] = log_softmax(logits)[labels[b, m]]
loss                   = -marginal_log_likelihood(gold_log_prob, log_softmax(retrieval_scores))
"""

from typing import NamedTuple

import torch
from torch import Tensor

from realm_fast.ops._checks import check_choice, check_tensor
from realm_fast.ops._dispatch import choose_impl
from realm_fast.ops.marginal_lse import FLOAT_DTYPES, LEVELS, Level, marginal_log_likelihood

REDUCTIONS = ("mean", "sum", "none")


class MarginalStats(NamedTuple):
    """By-products of the loss, detached."""

    gold_log_prob: Tensor  # [B, K, M] log p(y_m | x, z); 0 where ignored
    candidate_log_prob: Tensor  # [B, K] log p(z | x); -inf in an absent slot
    marginal: Tensor  # [B, M] or [B] log p(y | x); 0 where ignored
    responsibility: Tensor  # [B, K, M] or [B, K, 1] p(z | x, y); 0 where ignored
    retrieval_utility: Tensor  # scalar: mean of (marginal - gold_log_prob of slot 0)
    dropped_mass: Tensor  # scalar: mean responsibility of the rows dropped from the backward pass


def linear_marginal_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    retrieval_scores: Tensor,
    *,
    level: Level = "token",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`linear_marginal_cross_entropy` in plain torch: what every implementation is compared with."""
    gold, candidate, mask = reference_terms(hidden, weight, bias, labels, retrieval_scores, ignore_index)
    marginal = marginal_log_likelihood(gold, candidate, mask, level=level, impl="reference")
    return reduce_loss(-marginal, mask, level, reduction)


def reference_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    retrieval_scores: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gold_log_prob [B, K, M], candidate_log_prob [B, K], mask [B, M]) in plain torch."""
    mask = labels != ignore_index
    present = ~torch.isneginf(retrieval_scores)[..., None, None]  # [B, K, 1, 1]
    logits = torch.nn.functional.linear(torch.where(present, hidden, 0), weight, bias)  # [B, K, M, V]
    target = labels.masked_fill(~mask, 0)[:, None, :, None].expand(-1, hidden.shape[1], -1, -1)
    gold = torch.log_softmax(logits.to(accumulate_dtype(logits)), -1).gather(-1, target)[..., 0]
    gold = gold.masked_fill(~(mask[:, None] & present[..., 0]), 0)
    return gold, torch.log_softmax(retrieval_scores.to(gold.dtype), -1), mask


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def reduce_loss(loss: Tensor, mask: Tensor, level: Level, reduction: str) -> Tensor:
    """mean: over the counted positions ("token") or the queries that have one ("sequence"); 0 if there are none."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counted = mask.sum() if level == "token" else mask.any(-1).sum()
    return loss.sum() / counted.clamp(min=1)


def linear_marginal_cross_entropy(
    hidden,
    weight,
    bias,
    labels,
    retrieval_scores,
    *,
    level="token",
    ignore_index=-100,
    reduction="mean",
    impl="auto",
    chunk_bytes=16 << 20,
    return_stats=False,
):
    """The negative marginal log-likelihood of masked words under K candidate blocks.

    Args:
        hidden: [B, K, M, H], the reader's states at the masked positions.
        weight: [V, H]; bias: [V] or None: the (tied) output embedding.
        labels: [B, M] int64 in [0, V), or `ignore_index`.
        retrieval_scores: [B, K]; -inf marks an absent slot, whose hidden rows are never looked at.
        level, impl: as in `marginal_log_likelihood`.
        reduction: "mean" over counted positions (or queries, for "sequence"), "sum" or "none".
        return_stats: also return `MarginalStats`.
    """
    check_choice("level", level, LEVELS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_tensor("hidden", hidden, shape=("B", "K", "M", "H"), dtypes=FLOAT_DTYPES)
    batch, candidates, positions, width = hidden.shape
    check_tensor("weight", weight, shape=("V", width), device=hidden.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), device=hidden.device)
    check_tensor("labels", labels, shape=(batch, positions), dtypes=(torch.int64,), device=hidden.device)
    check_tensor("retrieval_scores", retrieval_scores, shape=(batch, candidates), device=hidden.device)
    choose_impl("linear_marginal_cross_entropy", impl, {"reference": lambda: None})
    gold, candidate, mask = reference_terms(hidden, weight, bias, labels, retrieval_scores, ignore_index)
    marginal, responsibility = marginal_log_likelihood(
        gold, candidate, mask, level=level, return_responsibility=True
    )
    loss = reduce_loss(-marginal, mask, level, reduction)
    if not return_stats:
        return loss
    with torch.no_grad():
        null = gold[:, 0] if level == "token" else gold[:, 0].sum(-1)
        utility = reduce_loss(marginal - null, mask, level, "mean")
    return loss, MarginalStats(
        gold.detach(), candidate.detach(), marginal.detach(), responsibility, utility, utility.new_zeros(())
    )
