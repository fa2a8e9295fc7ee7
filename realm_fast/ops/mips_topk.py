"""Exact top-k maximum inner-product search.

    scores[b, j], ids[b, j] = the j-th largest of <queries[b], blocks[n]> over n, ties to the lower n

Edge cases, the same for every implementation:

    special values    a block is a result when its score is greater than -inf: NaN and -inf scores are never
                      returned, +inf comes first
    fewer than k      the rest is -inf and NO_BLOCK (k > N, exclusions, special values)
    -0.0 and 0.0      are equal: the lower id comes first
    bfloat16, float16 are converted to float32, which holds them exactly; scores are float32

The CPU kernels sum each score in the order of the dimensions, so that a score's bits depend on the two
vectors and
the CPU level alone: not on threads, batch, k, or where the block is stored.
"""

import torch
from torch import Tensor

from realm_fast import _native
from realm_fast.ops._checks import check_int, check_tensor
from realm_fast.ops._cuda import cuda_reason
from realm_fast.ops._dispatch import choose_impl
from realm_fast.types import NO_BLOCK, TopK

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)
_ROW_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def mips_topk_reference(
    queries: Tensor,  # [B, D]
    blocks: Tensor,  # [N, D]
    k: int,
    *,
    exclude_ids: Tensor | None = None,  # [B] or [B, E]
) -> TopK:
    """Plain torch, in the dtype given (float64 gives the truth that tests compare with)."""
    scores = queries @ blocks.T  # [B, N]
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if exclude_ids is not None:
        excluded = (exclude_ids[:, None] if exclude_ids.dim() == 1 else exclude_ids).long()  # [B, E]
        one_more = torch.nn.functional.pad(scores, (0, 1))  # -1 marks the column that is cut off again
        scores = one_more.scatter(1, excluded.remainder(scores.shape[1] + 1), -torch.inf)[:, :-1]
    scores, ids = scores.sort(dim=1, descending=True, stable=True)  # stable: ties to the lower id
    missing = max(k - scores.shape[1], 0)
    scores = torch.nn.functional.pad(scores[:, :k], (0, missing), value=-torch.inf)  # [B, k]
    ids = torch.nn.functional.pad(ids[:, :k], (0, missing), value=NO_BLOCK)  # [B, k]
    return TopK(scores, torch.where(scores == -torch.inf, NO_BLOCK, ids))


def mips_topk(
    queries: Tensor,
    blocks: Tensor,
    k: int,
    *,
    exclude_ids: Tensor | None = None,
    impl: str = "auto",
) -> TopK:
    """The k blocks with the largest inner product with each query, exactly.

    Gradients of the scores flow to the queries and to the blocks that were returned.

    Args:
        queries: [B, D] float32, bfloat16 or float16.
        blocks: [N, D], of the same dtype and device.
        k: how many, at least 0.
        exclude_ids: [B] or [B, E] int64 or int32; per query the blocks that may not be returned (-1: none).
        impl: "cuda" or "cpu" (fused: the scores are never held), "reference" (plain torch, any device), or
            "auto". "cuda" takes k <= 2048 and, as every CUDA call here, never waits for the device: ids
            outside [-1, N) in `exclude_ids` are ignored there instead of refused.

    Returns:
        TopK(scores [B, k] float32, ids [B, k] int64), by descending score, ties to the lower id; -inf and
        NO_BLOCK where fewer than k blocks remain.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range, or `impl` cannot
            take this call.
    """
    check_tensor("queries", queries, shape=["B", "D"], dtypes=FLOAT_DTYPES)
    check_tensor(
        "blocks", blocks, shape=["N", queries.shape[1]], dtypes=[queries.dtype], device=queries.device
    )
    if not isinstance(k, torch.SymInt):
        check_int("k", k, minimum=0)
    if exclude_ids is not None:
        exclude_ids = check_exclude_ids(exclude_ids, queries)
    chosen = choose_impl(
        "mips_topk",
        impl,
        {
            "cuda": lambda: topk_cuda_reason(queries, k),
            "cpu": lambda: None if queries.is_cpu else f"the tensors are on {queries.device}",
            "reference": lambda: None,
        },
    )
    if chosen == "reference":
        if exclude_ids is not None and not torch.compiler.is_compiling():
            _check_range(exclude_ids, len(blocks))
        return mips_topk_reference(queries.float(), blocks.float(), k, exclude_ids=exclude_ids)
    return TopK(*mips_topk_op(queries, blocks, k, exclude_ids))


def topk_cuda_reason(queries: Tensor, k: int) -> str | None:
    """Why the CUDA kernels cannot take this call, or None."""
    reason = cuda_reason(queries)
    if reason is None and not isinstance(k, torch.SymInt) and k > _native.MAX_CUDA_K:
        return f"the kernels take k <= {_native.MAX_CUDA_K}, got {k}"
    return reason


def check_exclude_ids(exclude_ids: Tensor, queries: Tensor) -> Tensor:
    """Returns [B, E], or raises by name."""
    if isinstance(exclude_ids, Tensor) and exclude_ids.dim() == 1:
        exclude_ids = exclude_ids[:, None]
    return check_tensor(
        "exclude_ids", exclude_ids, shape=(queries.shape[0], "E"), dtypes=ID_DTYPES, device=queries.device
    )


def _check_range(exclude_ids: Tensor, num_blocks: int) -> None:
    if exclude_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in exclude_ids.aminmax())
    if low < NO_BLOCK or high >= num_blocks:
        wrong = low if low < NO_BLOCK else high
        raise ValueError(f"exclude_ids: expected ids of the {num_blocks} blocks, or -1 for none; got {wrong}")


@torch.library.custom_op("realm_fast::mips_topk", mutates_args=(), device_types="cpu")
def mips_topk_op(
    queries: Tensor, blocks: Tensor, k: int, exclude_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    if exclude_ids is not None:
        _check_range(exclude_ids, len(blocks))
        exclude_ids = exclude_ids.long().contiguous()
    queries, blocks = _at_least_one_column(queries, blocks)
    (num_queries, dim), num_blocks = queries.shape, blocks.shape[0]
    values = queries.float().contiguous()
    rows = blocks if blocks.stride(1) == 1 else blocks.contiguous()
    scores = torch.empty(num_queries, k)
    ids = torch.empty(num_queries, k, dtype=torch.int64)
    _native.mips_topk_rows(
        dim,
        values.data_ptr(),
        num_queries,
        rows.data_ptr(),
        num_blocks,
        rows.stride(0),
        _ROW_TYPES[rows.dtype],
        k,
        0 if exclude_ids is None else exclude_ids.data_ptr(),
        0 if exclude_ids is None else exclude_ids.shape[1],
        torch.get_num_threads(),
        scores.data_ptr(),
        ids.data_ptr(),
    )
    return scores, ids


@mips_topk_op.register_kernel("cuda")
def _(queries: Tensor, blocks: Tensor, k: int, exclude_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    queries, blocks = _at_least_one_column(queries, blocks)
    (num_queries, dim), num_blocks = queries.shape, blocks.shape[0]
    queries, blocks = dense_rows(queries), dense_rows(blocks)
    call = _native.MipsTopkCuda(
        dtype=_ROW_TYPES[queries.dtype],
        queries=queries.data_ptr(),
        num_queries=num_queries,
        query_stride=queries.stride(0),
        blocks=blocks.data_ptr(),
        num_blocks=num_blocks,
        block_stride=blocks.stride(0),
        dim=dim,
        k=k,
    )
    return run_cuda(call, queries, k, exclude_ids)


def _at_least_one_column(queries: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels want a column; without any, every score is 0."""
    if queries.shape[1]:
        return queries, blocks
    return torch.nn.functional.pad(queries, (0, 1)), torch.nn.functional.pad(blocks, (0, 1))


def dense_rows(rows: Tensor) -> Tensor:
    """The same values with each row contiguous; copies only if they are not already."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def run_cuda(call, queries: Tensor, k: int, exclude_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs and workspace from torch's allocator, on the caller's stream; nothing waits for the device."""
    with torch.cuda.device(queries.device):
        if exclude_ids is not None:
            exclude_ids = exclude_ids.long().contiguous()
            call.exclude(exclude_ids.data_ptr(), exclude_ids.shape[1])
        workspace_bytes = call.workspace_bytes
        try:
            scores = queries.new_empty((len(queries), k), dtype=torch.float32)
            ids = queries.new_empty((len(queries), k), dtype=torch.int64)
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=queries.device)
        except torch.OutOfMemoryError as error:  # nothing was launched
            raise torch.OutOfMemoryError(
                f"mips_topk: no memory for the workspace of {workspace_bytes} bytes ({len(queries)} queries, "
                f"k={k}): {error}"
            ) from error
        stream = torch.cuda.current_stream().cuda_stream
        call.run(scores.data_ptr(), ids.data_ptr(), workspace.data_ptr(), workspace_bytes, stream)
    return scores, ids


@mips_topk_op.register_fake
def _(queries: Tensor, blocks: Tensor, k: int, exclude_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = queries.new_empty((queries.shape[0], k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    queries, blocks, _, _ = inputs
    _, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(queries, blocks, ids)


def _backward(ctx, grad_scores: Tensor, _grad_ids: Tensor):
    """d scores[b, j] / d queries[b] = blocks[ids[b, j]], and the other way round."""
    queries, blocks, ids = ctx.saved_tensors
    found = ids >= 0  # [B, k]
    rows = ids.clamp(min=0)
    grad = torch.where(found, grad_scores, 0)  # [B, k]
    grad_queries = grad_blocks = None
    if ctx.needs_input_grad[0]:
        gathered = (
            blocks[rows].float() if len(blocks) else blocks.new_zeros(*ids.shape, blocks.shape[1]).float()
        )
        gathered = torch.where(found[..., None], gathered, 0)  # [B, k, D]
        grad_queries = torch.einsum("bk,bkd->bd", grad, gathered).to(queries.dtype)
    if ctx.needs_input_grad[1]:
        grad_blocks = torch.zeros_like(blocks, dtype=torch.float32)  # [N, D]
        if len(blocks):
            outer = (
                grad[..., None] * torch.where(found.any(1)[:, None], queries.float(), 0)[:, None]
            )  # [B, k, D]
            grad_blocks = grad_blocks.index_add(0, rows.flatten(), outer.flatten(0, 1))
        grad_blocks = grad_blocks.to(blocks.dtype)
    return grad_queries, grad_blocks, None, None


mips_topk_op.register_autograd(_backward, setup_context=_setup_context)
