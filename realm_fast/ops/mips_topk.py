"""Exact top-k maximum inner-product search.

    scores[b, j], ids[b, j] = the j-th largest of <queries[b], blocks[n]> over n, ties to the lower n

The one rule for special values: a block is a result when its score is greater than -inf. So NaN and -inf
scores are never returned, +inf comes first.
"""

import torch

from realm_fast.ops._checks import check_choice, check_int, check_tensor
from realm_fast.types import NO_BLOCK, TopK

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def mips_topk_reference(
    queries: torch.Tensor,  # [B, D]
    blocks: torch.Tensor,  # [N, D]
    k: int,
    *,
    exclude_ids: torch.Tensor | None = None,  # [B] or [B, E]
) -> TopK:
    """Plain torch, in the dtype given (float64 gives the truth that tests compare with)."""
    scores = queries @ blocks.T  # [B, N]
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if exclude_ids is not None:
        excluded = exclude_ids.reshape(len(queries), -1)  # [B, E]
        row, column = torch.nonzero((excluded >= 0) & (excluded < len(blocks)), as_tuple=True)
        scores[row, excluded[row, column]] = -torch.inf
    scores, ids = scores.sort(dim=1, descending=True, stable=True)  # stable: ties to the lower id
    missing = max(k - scores.shape[1], 0)
    scores = torch.nn.functional.pad(scores[:, :k], (0, missing), value=-torch.inf)  # [B, k]
    ids = torch.nn.functional.pad(ids[:, :k], (0, missing), value=NO_BLOCK)  # [B, k]
    return TopK(scores, torch.where(scores == -torch.inf, NO_BLOCK, ids))


def mips_topk(
    queries: torch.Tensor,
    blocks: torch.Tensor,
    k: int,
    *,
    exclude_ids: torch.Tensor | None = None,
    impl: str = "auto",
) -> TopK:
    """The k blocks with the largest inner product with each query, exactly.

    Args:
        queries: [B, D] float32, bfloat16 or float16.
        blocks: [N, D], same dtype and device.
        k: how many, >= 0; where fewer remain the rest is -inf and NO_BLOCK.
        exclude_ids: [B] or [B, E] int64, per query the blocks that may not be returned (-1: none).
        impl: "auto" or "torch".

    Returns:
        TopK(scores [B, k] float32, ids [B, k] int64), by descending score, ties to the lower id.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or range.
    """
    check_tensor("queries", queries, shape=["B", "D"], dtypes=_FLOATS)
    check_tensor(
        "blocks", blocks, shape=["N", queries.shape[1]], dtypes=[queries.dtype], device=queries.device
    )
    check_int("k", k, minimum=0)
    check_choice("impl", impl, ["auto", "torch"])
    if exclude_ids is not None:
        exclude_ids = check_exclude_ids(exclude_ids, len(queries), queries.device)
    scores, ids = mips_topk_reference(queries.float(), blocks.float(), k, exclude_ids=exclude_ids)
    return TopK(scores, ids)


def check_exclude_ids(exclude_ids: torch.Tensor, num_queries: int, device: torch.device) -> torch.Tensor:
    """Returns [B, E] int64, or raises by name."""
    if isinstance(exclude_ids, torch.Tensor) and exclude_ids.dim() == 1:
        exclude_ids = exclude_ids[:, None]
    check_tensor(
        "exclude_ids",
        exclude_ids,
        shape=[num_queries, "E"],
        dtypes=[torch.int64, torch.int32],
        device=device,
    )
    if exclude_ids.numel() and int(exclude_ids.min()) < NO_BLOCK:
        raise ValueError(f"exclude_ids: expected block ids >= -1 (-1: none), got {int(exclude_ids.min())}")
    return exclude_ids.long()
