"""The marginal log-likelihood: the log of a mixture over K candidates, with analytic gradients.

    token level     marginal[b, m] = logsumexp_k(candidate_log_prob[b, k] + gold_log_prob[b, k, m])
    sequence level  marginal[b]    = logsumexp_k(candidate_log_prob[b, k] + sum_m gold_log_prob[b, k, m])
    responsibility  r = softmax_k of the same sums: the posterior p(z | x, y)
    gradients       d marginal / d gold = r;   d marginal / d candidate_log_prob = r (summed over m)

Edge cases, the same for every implementation:

    masked position       token: 0, zero gradient; its values are never looked at, NaN included
    everything masked     sequence: 0, zero gradient
    absent slot           candidate_log_prob = -inf: probability 0, zero gradient, its gold never looked at
    all candidates -inf   marginal -inf, zero gradient (the limit has none)
    NaN, or +inf          marginal NaN (or +inf); the gradients of that position are NaN
"""

from typing import Literal, overload

import torch
from torch import Tensor

from realm_fast import _native
from realm_fast.ops._checks import check_choice, check_tensor
from realm_fast.ops._cuda import cuda_reason
from realm_fast.ops._dispatch import choose_impl

Level = Literal["token", "sequence"]
LEVELS = ("token", "sequence")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def marginal_log_likelihood_reference(
    gold_log_prob: Tensor, candidate_log_prob: Tensor, mask: Tensor | None = None, *, level: Level = "token"
) -> Tensor:
    """`marginal_log_likelihood` in plain torch: what every implementation is compared with."""
    absent = torch.isneginf(candidate_log_prob)[..., None]  # [B, K, 1]
    active = torch.ones_like(gold_log_prob[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
    gold = torch.where(active & ~absent, gold_log_prob, 0).to(accumulation_dtype(gold_log_prob))  # [B, K, M]
    candidate = candidate_log_prob[..., None].to(gold.dtype)  # [B, K, 1]
    if level == "sequence":
        gold, active = gold.sum(-1, keepdim=True), active.any(-1, keepdim=True)
    joint = (candidate + gold).masked_fill(absent, -torch.inf)
    impossible = torch.isneginf(joint).all(1, keepdim=True)  # logsumexp of only -inf has a NaN gradient
    marginal = torch.logsumexp(joint.masked_fill(impossible | ~active, 0), 1)
    marginal = marginal.masked_fill(impossible[:, 0], -torch.inf).masked_fill(~active[:, 0], 0)
    return marginal if level == "token" else marginal[:, 0]


def accumulation_dtype(value: Tensor | torch.dtype) -> torch.dtype:
    """What sums of this tensor, or of tensors of this dtype, are held in."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return torch.float64 if dtype == torch.float64 else torch.float32


@overload
def marginal_log_likelihood(
    gold_log_prob: Tensor,
    candidate_log_prob: Tensor,
    mask: Tensor | None = None,
    *,
    level: Level = "token",
    impl: str = "auto",
) -> Tensor: ...
@overload
def marginal_log_likelihood(
    gold_log_prob: Tensor,
    candidate_log_prob: Tensor,
    mask: Tensor | None = None,
    *,
    level: Level = "token",
    impl: str = "auto",
    return_responsibility: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def marginal_log_likelihood(
    gold_log_prob,
    candidate_log_prob,
    mask=None,
    *,
    level="token",
    impl="auto",
    return_responsibility=False,
):
    """log p(y|x) = log sum_z p(z|x) p(y|x,z), marginalised over the K candidates of each query.

    Args:
        gold_log_prob: [B, K, M] float32/bfloat16/float16/float64, log p(y_m | x, z) of the true token.
        candidate_log_prob: [B, K] of the same dtype, log p(z | x); -inf marks an absent slot.
        mask: [B, M] bool, True where the position counts; None: everywhere.
        level: "token" marginalises every position by itself (RAG-Token, REALM's released code);
            "sequence" marginalises the product over the positions (RAG-Sequence, REALM's paper).
        impl: "auto", "cpu" (native), "cuda" (native) or "reference" (plain torch).
        return_responsibility: also return the posterior p(z | x, y), detached, from the same pass.

    Returns:
        [B, M] ("token") or [B] ("sequence") float32 (float64 for float64); 0 where masked.
        With `return_responsibility`: that, and [B, K, M] or [B, K, 1]; 0 where masked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or K is 0.

    Source: REALM (Guu et al. 2020) section 3; RAG (Lewis et al. 2020) section 2.1.
    """
    check_choice("level", level, LEVELS)
    check_tensor("gold_log_prob", gold_log_prob, shape=("B", "K", "M"), dtypes=FLOAT_DTYPES)
    batch, candidates, positions = gold_log_prob.shape
    same = {"dtypes": (gold_log_prob.dtype,), "device": gold_log_prob.device}
    check_tensor("candidate_log_prob", candidate_log_prob, shape=(batch, candidates), **same)
    if candidates == 0:
        raise ValueError("gold_log_prob: expected at least one candidate, got K = 0")
    if mask is not None:
        same["dtypes"] = (torch.bool,)
        check_tensor("mask", mask, shape=(batch, positions), **same)
    chosen = choose_impl(
        "marginal_log_likelihood",
        impl,
        {
            "cuda": lambda: cuda_reason(gold_log_prob),
            "cpu": lambda: None if gold_log_prob.is_cpu else f"the tensors are on {gold_log_prob.device}",
            "reference": lambda: None,
        },
    )
    if chosen == "reference":
        marginal = marginal_log_likelihood_reference(gold_log_prob, candidate_log_prob, mask, level=level)
        if not return_responsibility:
            return marginal
        with torch.no_grad():
            return marginal, responsibility_reference(gold_log_prob, candidate_log_prob, mask, level=level)
    marginal, responsibility = marginal_lse_op(gold_log_prob, candidate_log_prob, mask, level)
    return (marginal, responsibility) if return_responsibility else marginal


def responsibility_reference(
    gold_log_prob: Tensor, candidate_log_prob: Tensor, mask: Tensor | None = None, *, level: Level = "token"
) -> Tensor:
    """The posterior over the candidates in plain torch: [B, K, M], or [B, K, 1] for "sequence"."""
    absent = torch.isneginf(candidate_log_prob)[..., None]
    active = torch.ones_like(gold_log_prob[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
    gold = torch.where(active & ~absent, gold_log_prob, 0).to(accumulation_dtype(gold_log_prob))
    if level == "sequence":
        gold, active = gold.sum(-1, keepdim=True), active.any(-1, keepdim=True)
    joint = (candidate_log_prob[..., None].to(gold.dtype) + gold).masked_fill(absent, -torch.inf)
    unused = torch.isneginf(joint).all(1, keepdim=True) | ~active
    return torch.softmax(joint.masked_fill(unused, 0), 1).masked_fill(unused | absent, 0)


def cuda_stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


@torch.library.custom_op("realm_fast::marginal_lse", mutates_args=())
def marginal_lse_op(
    gold_log_prob: Tensor, candidate_log_prob: Tensor, mask: Tensor | None, level: str
) -> tuple[Tensor, Tensor]:
    gold, candidate = gold_log_prob.contiguous(), candidate_log_prob.contiguous()
    mask = None if mask is None else mask.contiguous()
    marginal, responsibility = _empty_outputs(gold, level)
    batch, candidates, positions = gold.shape
    native = _native.marginal_lse_cuda if gold.is_cuda else _native.marginal_lse_cpu
    arguments = (
        gold.data_ptr(),
        candidate.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        marginal.data_ptr(),
        responsibility.data_ptr(),
        (batch, candidates, positions),
        level == "sequence",
        DTYPE_CODES[gold.dtype],
    )
    if gold.is_cuda:
        with torch.cuda.device(gold.device):
            native(*arguments, cuda_stream(gold))
    else:
        native(*arguments, torch.get_num_threads())
    return marginal, responsibility


def _empty_outputs(gold: Tensor, level: str) -> tuple[Tensor, Tensor]:
    batch, candidates, positions = gold.shape
    dtype = accumulation_dtype(gold)
    if level == "sequence":
        return gold.new_empty(batch, dtype=dtype), gold.new_empty(batch, candidates, 1, dtype=dtype)
    return (
        gold.new_empty(batch, positions, dtype=dtype),
        gold.new_empty(batch, candidates, positions, dtype=dtype),
    )


@marginal_lse_op.register_fake
def _(gold_log_prob, candidate_log_prob, mask, level):
    return _empty_outputs(gold_log_prob, level)


@torch.library.custom_op("realm_fast::marginal_lse_backward", mutates_args=())
def marginal_lse_backward_op(
    grad_marginal: Tensor,
    responsibility: Tensor,
    gold_log_prob: Tensor,
    candidate_log_prob: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d loss / d gold [B, K, M] and d loss / d candidate [B, K], from the responsibilities.

    The values of gold and candidate are not used: they are here so that a second derivative, which depends on
    them, meets the error below and is not taken for zero.
    """
    grad, responsibility = grad_marginal.contiguous(), responsibility.contiguous()
    mask = None if mask is None else mask.contiguous()
    d_gold = torch.empty_like(gold_log_prob, memory_format=torch.contiguous_format)
    d_candidate = torch.empty_like(candidate_log_prob, memory_format=torch.contiguous_format)
    arguments = (
        grad.data_ptr(),
        responsibility.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        d_gold.data_ptr(),
        d_candidate.data_ptr(),
        tuple(gold_log_prob.shape),
        grad.dim() == 1,
        DTYPE_CODES[gold_log_prob.dtype],
    )
    if grad.is_cuda:
        with torch.cuda.device(grad.device):
            _native.marginal_lse_backward_cuda(*arguments, cuda_stream(grad))
    else:
        _native.marginal_lse_backward_cpu(*arguments, torch.get_num_threads())
    return d_gold, d_candidate


@marginal_lse_backward_op.register_fake
def _(grad_marginal, responsibility, gold_log_prob, candidate_log_prob, mask):
    return (
        torch.empty_like(gold_log_prob, memory_format=torch.contiguous_format),
        torch.empty_like(candidate_log_prob, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output):
    gold_log_prob, candidate_log_prob, mask, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], gold_log_prob, candidate_log_prob, mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_marginal, _):
    if grad_marginal is None:
        return None, None, None, None
    return *marginal_lse_backward_op(grad_marginal, *ctx.saved_tensors), None, None


def double_backward_error(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: double backward is not supported; for second derivatives use impl='reference'."
    )


def no_double_backward(op, name: str) -> None:
    """Makes differentiating through `op` (a backward op) an error that says what to do."""

    def raise_error(ctx, *grads):
        raise double_backward_error(name)

    op.register_autograd(raise_error)


marginal_lse_op.register_autograd(_backward, setup_context=_setup_context)
no_double_backward(marginal_lse_backward_op, "marginal_log_likelihood")
