"""Judging a top-k result by the float64 truth, ties and rounding allowed for, nothing else."""

import torch
from tolerances import dot_error_bound

from realm_fast.types import NO_BLOCK, TopK


def assert_is_top_k(
    result: TopK,
    queries: torch.Tensor,  # [B, D]
    blocks: torch.Tensor,  # [N, D]
    k: int,
    exclude_ids: torch.Tensor | None = None,  # [B, E]
) -> None:
    """Asserts shapes, padding, order, tie rule, distinct ids, exclusions, scores and that nothing better is
    missing.

    Two float32 sums of the same products may differ by the classical bound; a row whose true score is
    within it of the k-th may stand on either side.
    """
    scores, ids = result.scores.double(), result.ids
    num_queries, num_blocks = len(queries), len(blocks)
    assert scores.shape == ids.shape == (num_queries, k)
    assert result.scores.dtype == torch.float32
    assert ids.dtype == torch.int64
    truth = queries.double() @ blocks.double().T  # [B, N]
    bound = dot_error_bound(queries, blocks)  # [B, N]
    possible = torch.where(truth.isnan(), -torch.inf, truth)
    if exclude_ids is not None:
        for b in range(num_queries):
            possible[b, exclude_ids[b][exclude_ids[b] >= 0]] = -torch.inf
    remaining = (possible > -torch.inf).sum(1)  # [B]
    for b in range(num_queries):
        count = min(int(remaining[b]), k)
        found = ids[b, :count]
        assert (found >= 0).all()
        assert (ids[b, count:] == NO_BLOCK).all()
        assert (scores[b, count:] == -torch.inf).all()
        assert len(found.unique()) == count, "an id stands twice"
        if count == 0:
            continue
        assert (possible[b, found] > -torch.inf).all(), "an excluded or impossible block was returned"
        difference = scores[b, :count] - truth[b, found]
        assert (difference.nan_to_num(0.0).abs() <= bound[b, found]).all(), "a score is wrong"
        later, earlier = scores[b, 1:count], scores[b, : count - 1]
        assert (earlier >= later).all(), "scores do not descend"
        assert ((earlier > later) | (found[:-1] < found[1:])).all(), "a tie does not go to the lower id"
        others = torch.ones(num_blocks, dtype=torch.bool)
        others[found] = False
        if count == k:
            missed = possible[b] - bound[b] > scores[b, k - 1]
            assert not (missed & others).any(), "a better block is missing"
        else:
            assert not (others & (possible[b] > -torch.inf)).any()


def same(a: TopK, b: TopK) -> bool:
    """Bit for bit."""
    return torch.equal(a.ids, b.ids) and torch.equal(a.scores.view(torch.int32), b.scores.view(torch.int32))
