"""What the GPU benchmark compares: our calls and other libraries', each as a function without arguments.

A library that is not installed, has no GPU support or refuses the shape is a line in the result, with its
reason.
"""

from collections.abc import Callable
from typing import Any

import torch

Method = Callable[[], Any] | str  # the call, or why there is none
L2 = " (L2)"  # in the name of a method that ranks by another metric: timed, its answer not compared


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _attempt(make: Callable[[], Callable[[], Any]]) -> Method:
    """What `make` returns, or what keeps it from doing so: absent, too large, or not for this shape."""
    try:
        return make()
    except Exception as error:
        return f"not available: {first_line(error)}"


def torch_topk(queries: torch.Tensor, blocks: torch.Tensor, k: int, chunk: int = 1 << 20):
    """mm + topk over chunks of the index, merged: scores are written and read once."""
    best = None
    for begin in range(0, len(blocks), chunk):
        part = blocks[begin : begin + chunk]
        scores, ids = (queries @ part.T).topk(min(k, len(part)), dim=1)
        ids = ids + begin
        if best is not None:
            scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids], 1)
            scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
            ids = ids.gather(1, order)
        best = scores, ids
    return best


def search_methods(dtype: str, queries: torch.Tensor, blocks: torch.Tensor, k: int) -> dict[str, Method]:
    """Name -> a call that returns (scores [B, k], ids [B, k]); ours comes first."""
    from realm_fast import mips_topk
    from realm_fast.device_index import DeviceIndex

    def ours():
        if dtype != "int8":
            return lambda: mips_topk(queries, blocks, k, impl="cuda")
        index = DeviceIndex.from_embeddings(blocks, "int8")
        return lambda: index.search(queries, k)

    def faiss_knn():
        import faiss

        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError("this faiss has no GPU support")
        import faiss.contrib.torch_utils  # only now: it changes what faiss returns in the whole process

        resources = faiss.StandardGpuResources()
        whole, rows = queries.float(), blocks.float()
        return lambda: faiss.knn_gpu(resources, whole, rows, k, metric=faiss.METRIC_INNER_PRODUCT)

    def cuvs():
        from cuvs.neighbors import brute_force

        half, built = queries.half(), brute_force.build(blocks.half(), metric="inner_product")
        return lambda: brute_force.search(built, half, k)

    def flashlib():
        from flashlib import flash_knn

        return lambda: flash_knn(queries, blocks, k)

    return {
        "realm_fast" + (" int8, certified" if dtype == "int8" else ""): _attempt(ours),
        "torch mm + topk": lambda: torch_topk(queries, blocks, k),
        "faiss knn_gpu": _attempt(faiss_knn),
        "cuVS brute_force": _attempt(cuvs),
        "FlashLib flash_knn" + L2: _attempt(flashlib),
    }


def loss_methods(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor
) -> dict[str, Method]:
    """Name -> a call that returns (loss, d hidden, d weight); ours comes first.

    Args:
        hidden: [B, K, M, H]; weight: [V, H]; labels: [B, M]; scores: [B, K]. With K = 1 the marginal is the
            cross-entropy, which is what Liger and cut-cross-entropy compute: there they are compared.
    """
    from realm_fast import linear_marginal_cross_entropy as marginal
    from realm_fast.ops.linear_marginal_ce import linear_marginal_cross_entropy_reference as reference

    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    rows, targets = hidden.flatten(0, 2), labels.flatten()

    def with_gradients(loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        def call():
            value = loss()
            return value.detach(), *torch.autograd.grad(value, (hidden, weight))

        return call

    def of_one_candidate() -> None:
        if hidden.shape[1] != 1:
            raise ValueError("it computes the cross-entropy, not a marginal over candidates")

    def liger():
        of_one_candidate()
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return with_gradients(lambda: loss(weight, rows, targets))

    def cut_cross_entropy():
        of_one_candidate()
        from cut_cross_entropy import linear_cross_entropy

        return with_gradients(lambda: linear_cross_entropy(rows, weight, targets))

    return {
        "realm_fast": with_gradients(lambda: marginal(hidden, weight, None, labels, scores, impl="cuda")),
        "torch": with_gradients(lambda: reference(hidden, weight, None, labels, scores)),
        "Liger": _attempt(liger),
        "cut-cross-entropy": _attempt(cut_cross_entropy),
    }
