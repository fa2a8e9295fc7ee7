"""The reader's loss from its hidden states: projection, log-softmax, marginal; never the logits in memory.

    logits[b, k, m, :]     = hidden[b, k, m] @ weight.T + bias
    gold_log_prob[b, k, m] = log_softmax(logits)[labels[b, m]]
    loss                   = -marginal_log_likelihood(gold_log_prob, log_softmax(retrieval_scores))

    d loss / d gold[b, k, m]       = -w[b, m] r[b, k, m]    r: the responsibility; w: the reduction's
    d loss / d logits[b, k, m, v]  = w r (softmax_v - onehot_v)
    d loss / d scores[b, k]        = sum_m w (p(z_k) - r)

The work is in `linear_gold` (gold_log_prob from hidden, forward and backward); the marginal over it is
small and an op of its own, so any upstream gradient, and so any reduction or objective, is exact. Rows
whose position is ignored or whose slot is absent, and in the backward pass rows with a zero gradient, are
left out before anything is multiplied. A scalar loss on the CPU runs the same kernels over chunks of rows,
forward and backward while the logits of a chunk are there (docs/adr/0010-one-pass-for-a-scalar-loss.md).
"""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from realm_fast import _native
from realm_fast.ops._checks import check_choice, check_int, check_tensor, describe
from realm_fast.ops._cuda import cuda_reason
from realm_fast.ops._dispatch import choose_impl
from realm_fast.ops.marginal_lse import (
    DTYPE_CODES,
    FLOAT_DTYPES,
    LEVELS,
    Level,
    accumulation_dtype,
    cuda_stream,
    double_backward_error,
    marginal_log_likelihood,
    marginal_lse_backward_op,
    marginal_lse_op,
    no_double_backward,
)

REDUCTIONS = ("mean", "sum", "none")
CPU_CHUNK_BYTES = 8 << 20  # the chunk stays in a shared cache of common size
CUDA_CHUNK_BYTES = 256 << 20
NOT_COUNTED = -(2**63)  # the label of a row that does not count, whatever ignore_index is
_VOCAB_GROUP = 8  # csrc/linear_marginal_ce/linear_gold.h: kVocabGroup
_ROW_PADDING = 16  # the longest vector: rows and columns are rounded up to whole ones
_KEEP_SHARE = 0.75  # recomputing costs a quarter of the whole: worth it for a quarter fewer rows
_COMPUTE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


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
    gold = torch.log_softmax(logits.to(accumulation_dtype(logits)), -1).gather(-1, target)[..., 0]
    gold = gold.masked_fill(~(mask[:, None] & present[..., 0]), 0)
    return gold, torch.log_softmax(retrieval_scores.to(gold.dtype), -1), mask


def reduce_loss(loss: Tensor, mask: Tensor, level: Level, reduction: str) -> Tensor:
    """mean: over the counted positions ("token") or queries ("sequence"); 0 if there are none."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / _num_counted(mask, level)


def _num_counted(mask: Tensor, level: Level) -> Tensor:
    """Positions ("token") or queries with one ("sequence"); 1 if there are none."""
    return (mask.sum() if level == "token" else mask.any(-1).sum()).clamp(min=1)


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
    chunk_bytes=None,
    keep_logits_bytes=0,
    drop_responsibility_below=0.0,
    return_stats=False,
):
    """The negative marginal log-likelihood of masked words under K candidate blocks.

    loss[b, m] = -logsumexp_k(log_softmax(retrieval_scores)[b, k] + gold_log_prob[b, k, m])
    gold_log_prob[b, k, m] = log_softmax(hidden[b, k, m] @ weight.T + bias)[labels[b, m]]

    Under autocast the multiplications use autocast's dtype, read the parameters as they are (no cast copy of
    weight), and give float32 parameters float32 gradients.

    Args:
        hidden: [B, K, M, H] float32/bfloat16/float16/float64, the reader's states at the masked positions.
        weight: [V, H], the (tied) output embedding; of hidden's dtype, except under autocast.
        bias: [V] or None; of weight's dtype.
        labels: [B, M] int64 in [0, V), or `ignore_index`.
        retrieval_scores: [B, K], any float dtype; -inf marks an absent slot, whose hidden rows are never
            looked at.
        level: "token" marginalises every position by itself, "sequence" the product over the positions.
        reduction: "mean" over counted positions (over queries that have one, for "sequence"; 0 if there are
            none), "sum", or "none" ([B, M] or [B]; 0 where ignored).
        impl: "auto", "cpu" (native, fused), "cuda" (cuBLAS and native kernels), "blas" (torch's products by
            chunks) or "reference" (plain torch, holds the logits).
        chunk_bytes: memory for a chunk of logits and what goes with it; None: 256 MiB on CUDA, 8 MiB on the
            CPU; where gradients are made along with a scalar loss (see below), 2 MiB and the logits of an
            eighth of the rows that count, or of 8 MiB if that is more. Packed rows of hidden come on top.
        keep_logits_bytes: memory for logits that the forward pass leaves to the backward pass, which
            recomputes the others ("cpu" only; the same results). Of two passes over R rows that count, 0
            costs 8 R H V FLOPs and the least memory; 4 R V bytes and a little more, 6 R H V FLOPs.
        drop_responsibility_below: rows with a smaller responsibility get no gradient through hidden, weight
            and bias, and cost nothing in the backward pass; the mass dropped is in the stats. 0 drops none.
        return_stats: also return `MarginalStats`: detached by-products of the same pass.

    Returns:
        The loss, float32 (float64 for float64): a scalar, or [B, M] / [B] for reduction="none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range, K is 0, a label
            is out of range (on CUDA: a device-side assertion), or chunk_bytes is less than a chunk needs.
        RuntimeError: on differentiating twice (use impl="reference" for that).

    NaN or Inf in a row of hidden that counts, in weight or in bias, and NaN, +inf or nothing but -inf in a
    query's retrieval_scores, make the losses they enter NaN, and the gradients of these; they never become
    a number. (-inf in bias is a word of probability 0.)

    On the CPU, outside torch.compile, a scalar loss of float32 or float64 tensors makes its gradients in
    the forward pass, while the logits are there: 6 R H V FLOPs. The budget must hold the largest group: a
    position ("token") or a query ("sequence") with all its candidates; neither keep_logits_bytes nor
    drop_responsibility_below may be set. The backward pass scales the gradients. So evaluation should run
    under torch.no_grad(): else it pays for gradients that nobody asks for.

    Source: REALM (Guu et al. 2020) section 3; the gradients in docs/ops/linear_marginal_ce.md.
    """
    compute = _check_arguments(hidden, weight, bias, labels, retrieval_scores, level, reduction, chunk_bytes)
    check_int("keep_logits_bytes", keep_logits_bytes, minimum=0)
    if not 0.0 <= drop_responsibility_below < 1.0:
        raise ValueError(f"drop_responsibility_below: expected 0 <= x < 1, got {drop_responsibility_below}")
    on_cpu = None if hidden.is_cpu else f"the tensors are on {hidden.device}"
    chosen = choose_impl(
        "linear_marginal_cross_entropy",
        impl,
        {
            "cuda": lambda: cuda_reason(hidden),
            "cpu": lambda: on_cpu,
            "blas": lambda: None,
            "reference": lambda: None,
        },
    )
    mask = labels != ignore_index  # [B, M]
    dropped_mass = hidden.new_zeros((), dtype=accumulation_dtype(compute))
    present = ~torch.isneginf(retrieval_scores)[..., None]  # [B, K, 1]
    given = labels.clamp(min=NOT_COUNTED + 1)  # NOT_COUNTED given as a label is out of range like others
    row_labels = torch.where(mask[:, None] & present, given[:, None], NOT_COUNTED)  # [B, K, M]
    plan = None
    if chosen == "cpu" and reduction != "none" and keep_logits_bytes == 0 and drop_responsibility_below == 0:
        plan = _plan_one_pass(hidden, weight, bias, row_labels, level, reduction, compute, chunk_bytes)
    if plan is not None:
        candidate = torch.log_softmax(retrieval_scores.to(dropped_mass.dtype), -1)
        loss, gold, marginal, responsibility = _LossInOnePass.apply(
            hidden.flatten(0, 2), weight, bias, candidate, row_labels, mask, plan
        )
    else:
        if chosen == "reference":
            _check_labels(torch.where(mask, given, NOT_COUNTED), weight.shape[0])
            gold, candidate, _ = reference_terms(hidden, weight, bias, labels, retrieval_scores, ignore_index)
        else:
            learns = any(t is not None and t.requires_grad for t in (hidden, weight, bias))
            keeps = learns and torch.is_grad_enabled() and chosen == "cpu"
            gold, _, _, _ = linear_gold_op(
                hidden.flatten(0, 2),
                weight,
                bias,
                row_labels.flatten(),
                compute,
                chunk_bytes or (CPU_CHUNK_BYTES if hidden.is_cpu else CUDA_CHUNK_BYTES),
                keep_logits_bytes if keeps else 0,
                chosen,
            )
            gold = gold.view(row_labels.shape)
            candidate = torch.log_softmax(retrieval_scores.to(gold.dtype), -1)
        if drop_responsibility_below > 0:
            gold, dropped_mass = _drop_rows(gold, candidate, mask, level, drop_responsibility_below)
        marginal, responsibility = marginal_log_likelihood(
            gold,
            candidate,
            mask,
            level=level,
            impl={"blas": "auto"}.get(chosen, chosen),
            return_responsibility=True,
        )
        loss = reduce_loss(-marginal, mask, level, reduction)
    if not return_stats:
        return loss
    gold, candidate, marginal = gold.detach(), candidate.detach(), marginal.detach()
    null = gold[:, 0] if level == "token" else gold[:, 0].sum(-1)
    utility = reduce_loss(marginal - null, mask, level, "mean")
    return loss, MarginalStats(gold, candidate, marginal, responsibility, utility, dropped_mass)


def _check_arguments(hidden, weight, bias, labels, retrieval_scores, level, reduction, chunk_bytes):
    """Checks everything that needs no look at values; returns the compute dtype."""
    check_choice("level", level, LEVELS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_tensor("hidden", hidden, shape=("B", "K", "M", "H"), dtypes=FLOAT_DTYPES)
    batch, candidates, positions, width = hidden.shape
    device = hidden.device
    if candidates == 0 or width == 0:
        raise ValueError(f"hidden: expected at least one candidate and one column, got {describe(hidden)}")
    autocast = torch.is_autocast_enabled(device.type)
    dtypes = FLOAT_DTYPES if autocast else (hidden.dtype,)
    check_tensor("weight", weight, shape=("V", width), dtypes=dtypes, device=device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one vocabulary entry, got {describe(weight)}")
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=dtypes, device=device)
    check_tensor("labels", labels, shape=(batch, positions), dtypes=(torch.int64,), device=device)
    check_tensor(
        "retrieval_scores", retrieval_scores, shape=(batch, candidates), dtypes=FLOAT_DTYPES, device=device
    )
    if chunk_bytes is not None:
        check_int("chunk_bytes", chunk_bytes, minimum=1)
    compute = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
    if torch.float64 in (hidden.dtype, weight.dtype):
        compute = torch.float64
    elif compute == torch.float16 and hidden.is_cpu:
        compute = torch.float32  # CPUs multiply no float16; float32 loses nothing
    return compute


def _drop_rows(gold, candidate, mask, level, threshold) -> tuple[Tensor, Tensor]:
    """gold without gradient where the responsibility is below threshold, and the mean mass of those rows."""
    with torch.no_grad():
        _, responsibility = marginal_log_likelihood(
            gold, candidate, mask, level=level, return_responsibility=True
        )
        dropped = responsibility < threshold  # [B, K, M] or [B, K, 1]
        mass = (responsibility * dropped).sum(1)  # [B, M] or [B, 1]
        counted = mask if level == "token" else mask.any(-1, keepdim=True)
        mass = mass.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
    return torch.where(dropped, gold.detach(), gold), mass


# ---- linear_gold: log p(label) of a linear layer and a softmax ----


@torch.library.custom_op("realm_fast::linear_gold", mutates_args=())
def linear_gold_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    compute: torch.dtype,
    chunk_bytes: int,
    keep_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], labels [N] (NOT_COUNTED: left out) -> gold, row_max, row_logsum [N], kept logits.

    gold = logit of the label - (row_max + row_logsum), 0 in rows that do not count.
    """
    counted = _check_labels(labels, weight.shape[0])  # [N]
    if fixed := fixed_shapes(labels):
        hidden, labels, rows = _every_row(hidden, labels)
    else:
        rows = counted.nonzero()[:, 0]  # [R]; on CUDA the host waits to learn R
    acc = accumulation_dtype(compute)
    gold, row_max, row_logsum = (hidden.new_zeros(labels.shape[0], dtype=acc) for _ in range(3))
    kept = _huge_pages(_empty_kept(hidden, weight, compute, keep_bytes))
    if len(rows):
        if impl == "cpu":
            values = _native_forward(hidden, weight, bias, rows, labels[rows], compute, kept)
        else:
            values = _blas_forward(hidden, weight, bias, rows, labels[rows], compute, chunk_bytes, impl)
        for output, value in zip((gold, row_max, row_logsum), values, strict=True):
            output[rows] = value
    if fixed:
        gold.masked_fill_(~counted, 0)
    return gold, row_max, row_logsum, kept


def fixed_shapes(labels: Tensor) -> bool:
    """Whether a CUDA graph is being captured: no shape may depend on values then, and the host may not wait.

    Then every row is computed, also those that do not count.
    """
    return labels.is_cuda and torch.cuda.is_current_stream_capturing()


def _every_row(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and labels such that every row can be computed, and all row numbers."""
    hidden = torch.where((labels >= 0)[:, None], hidden, 0)  # whatever stands in rows that do not count
    return hidden, labels.clamp(min=0), torch.arange(len(labels), device=labels.device)


def _empty_kept(hidden: Tensor, weight: Tensor, compute: torch.dtype, keep_bytes: int) -> Tensor:
    """Room for the logits that are kept, as bytes: keep_bytes, or what all of them need."""
    everything = _kept_bytes(hidden.shape[0], weight.shape[0], accumulation_dtype(compute))
    return hidden.new_empty(min(keep_bytes, everything), dtype=torch.uint8)


def _kept_bytes(rows: int, vocab: int, acc: torch.dtype) -> int:
    """What all logits of so many rows need."""
    return _padded(rows) * -(-vocab // _VOCAB_GROUP) * _VOCAB_GROUP * acc.itemsize


def _padded(count: int) -> int:
    """Rows, or columns, as the native kernels may round them up."""
    return -(-count // _ROW_PADDING) * _ROW_PADDING


def _huge_pages(fresh: Tensor) -> Tensor:
    """Asks for huge pages in a new tensor of the CPU: faults in small ones cost more than filling it."""
    if fresh.is_cpu:
        _native.advise_huge_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())
    return fresh


@linear_gold_op.register_fake
def _(hidden, weight, bias, labels, compute, chunk_bytes, keep_bytes, impl):
    acc = accumulation_dtype(compute)
    rows = tuple(hidden.new_empty(labels.shape[0], dtype=acc) for _ in range(3))
    return *rows, _empty_kept(hidden, weight, compute, keep_bytes)


@torch.library.custom_op("realm_fast::linear_gold_backward", mutates_args=())
def linear_gold_backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_logsum: Tensor,
    kept: Tensor,
    kept_panel_rows: int,
    compute: torch.dtype,
    chunk_bytes: int,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden, d weight and d bias for an upstream gradient [N] of gold; empty where `needs` says no."""
    needs_hidden, needs_weight, needs_bias = needs
    counted = labels >= 0
    if fixed_shapes(labels):
        grad = torch.where(counted, grad, 0)
        hidden, labels, rows = _every_row(hidden, labels)
    else:
        rows = (counted & (grad != 0)).nonzero()[:, 0]  # a NaN gradient is not 0: it goes on
    if kept.numel():
        # Kept logits are of all rows that count: take these, unless leaving out rows saves more.
        all_rows = counted.nonzero()[:, 0]
        readable = impl == "cpu" and kept_panel_rows == _panel_rows(compute)
        if readable and len(rows) > _KEEP_SHARE * len(all_rows):
            rows = all_rows
        else:
            kept = kept[:0]
    acc = accumulation_dtype(compute)
    d_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    make = torch.empty_like if len(rows) else torch.zeros_like
    d_weight = (
        _huge_pages(make(weight, memory_format=torch.contiguous_format))
        if needs_weight
        else hidden.new_empty(0)
    )
    d_bias = make(bias, dtype=acc) if needs_bias and bias is not None else hidden.new_empty(0)
    if len(rows) and any(needs):
        row_values = (labels[rows], row_max[rows], row_logsum[rows], grad[rows].to(acc))
        outputs = (
            d_hidden if needs_hidden else None,
            d_weight if needs_weight else None,
            d_bias if needs_bias and bias is not None else None,
        )
        if impl == "cpu":
            _native_backward(hidden, weight, bias, rows, row_values, outputs, compute, chunk_bytes, kept)
        else:
            _blas_backward(hidden, weight, bias, rows, row_values, outputs, compute, chunk_bytes, impl)
    return d_hidden, d_weight, d_bias if bias is None else d_bias.to(bias.dtype)


@linear_gold_backward_op.register_fake
def _(
    grad,
    hidden,
    weight,
    bias,
    labels,
    row_max,
    row_logsum,
    kept,
    kept_panel_rows,
    compute,
    chunk_bytes,
    impl,
    needs,
):
    d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    d_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else hidden.new_empty(0)
    )
    d_bias = torch.empty_like(bias) if needs[2] and bias is not None else hidden.new_empty(0)
    return d_hidden, d_weight, d_bias if bias is None else d_bias.to(bias.dtype)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, ctx.compute, ctx.chunk_bytes, _, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, labels, *output[1:])
    ctx.kept_panel_rows = _panel_rows(ctx.compute) if ctx.impl == "cpu" else 0
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_gold, *_):
    if grad_gold is None:
        return (None,) * 8
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_gold_backward_op(
        grad_gold, *ctx.saved_tensors, ctx.kept_panel_rows, ctx.compute, ctx.chunk_bytes, ctx.impl, needs
    )
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None, None, None)


linear_gold_op.register_autograd(_backward, setup_context=_setup_context)
no_double_backward(linear_gold_backward_op, "linear_marginal_cross_entropy")


def _check_labels(labels: Tensor, vocab: int) -> Tensor:
    """[N] bool: the rows that count; raises (on CUDA: asserts on the device) if a label is out of range."""
    wrong = ((labels < 0) & (labels != NOT_COUNTED)) | (labels >= vocab)
    if labels.is_cuda:
        torch._assert_async(~wrong.any(), f"labels: expected values in [0, {vocab}) or ignore_index")
    elif wrong.any():
        _raise_labels(labels, wrong, vocab)
    return labels >= 0


def _raise_labels(labels: Tensor, wrong: Tensor, vocab: int) -> NoReturn:
    raise ValueError(
        f"labels: expected values in [0, {vocab}) or ignore_index, got {labels[wrong][0].item()}"
        f" (and {int(wrong.sum()) - 1} more out of range)"
    )


# ---- native CPU ----


def _native_arguments(hidden, weight, bias, rows, labels, acc):
    """The tensors the native call reads (which must outlive it) and their description."""
    tensors = {
        "hidden": hidden.contiguous(),
        "weight": weight.contiguous(),
        "rows": rows,
        "labels": labels.to(torch.int32),
    }
    if bias is not None:
        tensors["bias"] = bias.to(acc).contiguous()
    arguments = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    arguments |= {
        "hidden_dtype": DTYPE_CODES[hidden.dtype],
        "weight_dtype": DTYPE_CODES[weight.dtype],
        "num_rows": len(rows),
        "vocab": weight.shape[0],
        "width": weight.shape[1],
    }
    return tensors, arguments


def _with_workspace(arguments, compute, backward: bool, threads: int) -> Tensor:
    size = _native.linear_gold_workspace_bytes(arguments, _COMPUTE_CODES[compute], backward, threads)
    workspace = _huge_pages(torch.empty(size + 63, dtype=torch.uint8))
    arguments["workspace"] = (workspace.data_ptr() + 63) // 64 * 64
    return workspace


def _native_forward(hidden, weight, bias, rows, labels, compute, kept):
    acc = accumulation_dtype(compute)
    tensors, arguments = _native_arguments(hidden, weight, bias, rows, labels, acc)
    values = hidden.new_empty(3, len(rows), dtype=acc)  # gold, row_max, row_logsum
    for name, value in zip(("gold", "row_max", "row_logsum"), values, strict=True):
        arguments[name] = value.data_ptr()
    _add_kept(arguments, kept, compute)
    threads = torch.get_num_threads()
    workspace = _with_workspace(arguments, compute, False, threads)
    _native.linear_gold_forward(arguments, _COMPUTE_CODES[compute], threads)
    del tensors, workspace
    return values


def _panel_rows(compute) -> int:
    """How the native kernels of the present CPU level lay rows out in kept logits."""
    return _native.linear_gold_panel_rows(_COMPUTE_CODES[compute])


def _add_kept(arguments, kept: Tensor, compute) -> None:
    """How much of the vocabulary the kept logits cover: whole groups of it."""
    one_group = _kept_bytes(arguments["num_rows"], _VOCAB_GROUP, accumulation_dtype(compute))
    groups = min(kept.numel() // one_group, -(-arguments["vocab"] // _VOCAB_GROUP))
    arguments |= {"kept": kept.data_ptr() if groups else 0, "keep_vocab": groups * _VOCAB_GROUP}


def _native_backward(
    hidden, weight, bias, rows, row_values, outputs, compute, chunk_bytes, kept, accumulate=False
):
    labels, row_max, row_logsum, grad = row_values
    acc = accumulation_dtype(compute)
    tensors, arguments = _native_arguments(hidden, weight, bias, rows, labels, acc)
    arguments |= {"row_max": row_max.data_ptr(), "row_logsum": row_logsum.data_ptr(), "grad": grad.data_ptr()}
    for name, output in zip(("d_hidden", "d_weight", "d_bias"), outputs, strict=True):
        if output is not None:
            arguments |= {name: output.data_ptr(), f"{name}_dtype": DTYPE_CODES[output.dtype]}
    arguments["accumulate"] = int(accumulate)
    _add_kept(arguments, kept, compute)
    vocab, width = weight.shape
    arguments["chunk_vocab"] = chunk_vocab(chunk_bytes, _entry_bytes(len(rows), width, compute), vocab)
    threads = torch.get_num_threads()
    workspace = _with_workspace(arguments, compute, True, threads)
    _native.linear_gold_backward(arguments, _COMPUTE_CODES[compute], threads)
    del tensors, workspace


def _entry_bytes(rows: int, width: int, compute: torch.dtype) -> int:
    """One vocabulary entry of a chunk: its d logits (bfloat16: in two layouts), its packed row of weight."""
    acc = accumulation_dtype(compute)
    item = 2 if compute == torch.bfloat16 else acc.itemsize
    return _padded(rows) * acc.itemsize + _padded(width) * item


def chunk_vocab(chunk_bytes: int, row_bytes: int, vocab: int) -> int:
    """Vocabulary entries in a chunk of at most chunk_bytes, when one entry needs row_bytes."""
    entries = chunk_bytes // row_bytes // _VOCAB_GROUP * _VOCAB_GROUP
    if entries == 0:
        raise ValueError(
            f"chunk_bytes: expected at least {row_bytes * _VOCAB_GROUP} for these rows, got {chunk_bytes}"
        )
    block = 96  # what one task takes: whole tasks keep the threads evenly busy
    entries = entries // block * block if entries > block else entries
    return min(entries, -(-vocab // _VOCAB_GROUP) * _VOCAB_GROUP)


# ---- native CPU, a scalar loss: its gradients while the logits are there ----


class _OnePass(NamedTuple):
    """How a loss and its gradients are computed together."""

    level: Level
    reduction: str
    compute: torch.dtype
    rows: int  # at most so many rows of logits at once
    chunk_bytes: int  # for a chunk of the vocabulary in the backward products
    needs: tuple[bool, bool, bool]  # d hidden, d weight, d bias


def _plan_one_pass(hidden, weight, bias, row_labels, level, reduction, compute, chunk_bytes):
    """The plan, or None where two passes are right or leaner.

    The upstream gradient scales finished gradients, so they must be of the accumulation dtype; and the budget
    must hold the logits of the largest group: three quarters of `chunk_bytes`, or else those of an eighth of
    the rows, a sixteenth of what plain torch holds.
    """
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    needs = tuple(t is not None and t.requires_grad for t in (hidden, weight, bias))
    acc = accumulation_dtype(compute)
    if (
        not any(needs)
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)  # theirs go through the ops
        or any(t.dtype != acc for t in tensors)
        or (compute == torch.bfloat16 and _native.linear_gold_has_bf16())
    ):
        return None
    sizes = _group_sizes(row_labels != NOT_COUNTED, level)
    largest, total = (int(sizes.max()), int(sizes.sum())) if sizes.numel() else (0, 0)
    vocab, width = weight.shape
    row_bytes = _kept_bytes(_ROW_PADDING, vocab, acc) // _ROW_PADDING  # of logits
    if chunk_bytes is None:
        rows, vocab_bytes = max(total // 8, CPU_CHUNK_BYTES // row_bytes), CPU_CHUNK_BYTES // 4
    else:
        rows, vocab_bytes = chunk_bytes * 3 // 4 // row_bytes, chunk_bytes // 4
    rows = min(total, rows // _ROW_PADDING * _ROW_PADDING)
    if not 0 < largest <= rows or vocab_bytes < _VOCAB_GROUP * _entry_bytes(rows, width, compute):
        return None
    # Whole panels multiply fastest; many more chunks, each of which reads all of weight, would cost more.
    panels = rows // _panel_rows(compute) * _panel_rows(compute)
    if rows < total and panels >= max(largest, rows * 3 / 4):
        rows = panels
    return _OnePass(level, reduction, compute, rows, vocab_bytes, needs)


def _group_sizes(counted: Tensor, level: Level) -> Tensor:
    """Of counted [B, K, M], the rows that share a marginal: [B, M] for "token", [B] for "sequence"."""
    return counted.sum(1) if level == "token" else counted.sum((1, 2))


def _whole_groups(sizes: Tensor, most: int) -> list[tuple[int, int]]:
    """[begin, end) of chunks of rows, each of whole groups and at most `most` rows."""
    chunks, begin, end = [], 0, 0
    for size in sizes.flatten().tolist():
        if end + size - begin > most:
            chunks.append((begin, end))
            begin = end
        end += size
    return [*chunks, (begin, end)]


def _loss_and_gradients(hidden, weight, bias, candidate, row_labels, mask, plan: _OnePass):
    """(loss, gold, marginal, responsibility) and (d hidden, d weight, d bias, d candidate) of the loss.

    A chunk is some groups of rows with all their candidates, and the whole vocabulary: its logits, its
    responsibilities, its share of the gradients, and the logits are gone.
    """
    acc = accumulation_dtype(plan.compute)
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), row_labels.flatten()
    counted = _check_labels(labels, weight.shape[0]).view(row_labels.shape)
    group_order = torch.arange(len(labels)).view(row_labels.shape).transpose(1, 2)  # [B, M, K]
    rows = group_order[counted.transpose(1, 2)]  # [R]
    needs_hidden, needs_weight, needs_bias = plan.needs
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
    d_weight, d_bias = (
        _huge_pages(torch.empty_like(t, memory_format=torch.contiguous_format)) if needed else None
        for t, needed in ((weight, needs_weight), (bias, needs_bias))
    )
    kept_bytes = _kept_bytes(plan.rows, weight.shape[0], acc)
    kept = _huge_pages(hidden.new_empty(kept_bytes, dtype=torch.uint8))
    gold = hidden.new_zeros(row_labels.shape, dtype=acc)
    d_marginal: Tensor | None = None
    for begin, end in _whole_groups(_group_sizes(counted, plan.level), plan.rows):
        chunk = rows[begin:end]
        gold_rows, row_max, row_logsum = _native_forward(
            hidden, weight, bias, chunk, labels[chunk], plan.compute, kept
        )
        gold.view(-1)[chunk] = gold_rows
        # All of it every time: it is small, and what the chunks to come will change is not read before.
        marginal, responsibility = marginal_lse_op(gold, candidate, mask, plan.level)
        if d_marginal is None:
            d_marginal = torch.full_like(marginal, -1.0)
            if plan.reduction == "mean":
                d_marginal /= _num_counted(mask, plan.level)
        d_gold, d_candidate = marginal_lse_backward_op(d_marginal, responsibility, gold, candidate, mask)
        _native_backward(
            hidden,
            weight,
            bias,
            chunk,
            (labels[chunk], row_max, row_logsum, d_gold.view(-1)[chunk]),
            (d_hidden, d_weight, d_bias),
            plan.compute,
            plan.chunk_bytes,
            kept,
            accumulate=begin > 0,
        )
    loss = reduce_loss(-marginal, mask, plan.level, plan.reduction)
    return (loss, gold, marginal, responsibility), (d_hidden, d_weight, d_bias, d_candidate)


class _LossInOnePass(torch.autograd.Function):
    """The scalar loss whose gradients are there before they are asked for; the backward pass scales them.

    Whoever asks a second time (a retained graph) has them computed again, to the same bits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, candidate, row_labels, mask, plan):
        inputs = (hidden, weight, bias, candidate, row_labels, mask)
        values, ctx.gradients = _loss_and_gradients(*inputs, plan)
        ctx.save_for_backward(*inputs)
        ctx.plan = plan
        ctx.mark_non_differentiable(*values[1:])
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        gradients = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            with torch.no_grad():
                _, gradients = _loss_and_gradients(*saved, ctx.plan)
        if grad_loss != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss.detach())
        if torch.is_grad_enabled():  # create_graph
            gradients = _FirstDerivative.apply(gradients, grad_loss, *saved[:4])
        return *gradients, None, None, None


class _FirstDerivative(torch.autograd.Function):
    """Gradients, bound to what they depend on: a second derivative is an error, not zero."""

    @staticmethod
    def forward(ctx, gradients, *depends_on):
        return tuple(gradients)

    @staticmethod
    def backward(ctx, *_):
        raise double_backward_error("linear_marginal_cross_entropy")


# ---- torch's products by chunks, with native kernels between them on CUDA ----


def _blas_chunks(rows, weight, chunk_bytes):
    """[begin, end) of each chunk of the vocabulary: [R, end - begin] logits in float32 and their gradient."""
    vocab = weight.shape[0]
    step = chunk_vocab(chunk_bytes, 8 * len(rows), vocab)
    return [(begin, min(vocab, begin + step)) for begin in range(0, vocab, step)]


def _wide_mm(a, b, acc):
    """a @ b with the result in the accumulation dtype, never rounded to a half type on the way."""
    if a.dtype == acc:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=acc) if a.is_cuda else torch.mm(a.to(acc), b.to(acc))


def _chunk_logits(hidden, weight, bias, acc):
    """[R, v] logits in the accumulation dtype from [R, H] and [v, H] in the compute dtype."""
    try:
        logits = _wide_mm(hidden, weight.t(), acc)
    except torch.OutOfMemoryError as error:
        name = str(acc).removeprefix("torch.")
        raise torch.OutOfMemoryError(
            f"linear_marginal_cross_entropy: no memory for logits [{len(hidden)}, {len(weight)}] in {name} "
            f"(chunk_bytes bounds them): {error}"
        ) from error
    return logits if bias is None else logits.add_(bias.to(acc))


def _blas_forward(hidden, weight, bias, rows, labels, compute, chunk_bytes, impl):
    acc = accumulation_dtype(compute)
    row_max, row_sum, gold = (
        torch.full((len(rows),), start, dtype=acc, device=hidden.device) for start in (-1e38, 0.0, 0.0)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden[rows].to(compute)  # [R, H]
        for begin, end in _blas_chunks(rows, weight, chunk_bytes):
            part = None if bias is None else bias[begin:end]
            logits = _chunk_logits(hidden, weight[begin:end].to(compute), part, acc)
            update = _cuda_lse_update if impl == "cuda" else _torch_lse_update
            update(logits, labels, begin, row_max, row_sum, gold)
    row_logsum = row_sum.log()
    return (gold - row_max) - row_logsum, row_max, row_logsum


def _blas_backward(hidden, weight, bias, rows, row_values, outputs, compute, chunk_bytes, impl):
    labels, row_max, row_logsum, grad = row_values
    d_hidden, d_weight, d_bias = outputs
    acc = accumulation_dtype(compute)
    with torch.autocast(hidden.device.type, enabled=False):
        row_hidden = hidden[rows].to(compute)  # [R, H]
        total = row_hidden.new_zeros(row_hidden.shape, dtype=acc)
        for begin, end in _blas_chunks(rows, weight, chunk_bytes):
            part = weight[begin:end].to(compute)
            logits = _chunk_logits(row_hidden, part, None if bias is None else bias[begin:end], acc)
            make = _cuda_dlogits if impl == "cuda" else _torch_dlogits
            d_logits = make(logits, labels, begin, row_max, row_logsum, grad, compute)
            if d_bias is not None:
                d_bias[begin:end] = d_logits.sum(0, dtype=acc)
            if d_weight is not None:
                d_weight[begin:end] = torch.mm(d_logits.t(), row_hidden)
            if d_hidden is not None:
                total += _wide_mm(d_logits, part, acc)
    if d_hidden is not None:
        d_hidden[rows] = total.to(d_hidden.dtype)


def _torch_lse_update(logits, labels, begin, row_max, row_sum, gold) -> None:
    """Takes a chunk [R, v] of logits into the running maximum, sum of exponentials and true-class logit."""
    raised = torch.maximum(row_max, logits.amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-1e38))
    row_sum.mul_((row_max - raised).exp())
    local = labels - begin
    here = (local >= 0) & (local < logits.shape[1])
    picked = logits.gather(1, torch.where(here, local, 0)[:, None])[:, 0]
    gold.copy_(torch.where(here, picked, gold))
    row_sum.add_(logits.sub_(raised[:, None]).exp_().sum(-1))
    row_max.copy_(raised)


def _torch_dlogits(logits, labels, begin, row_max, row_logsum, grad, compute) -> Tensor:
    """grad * (onehot - softmax) of a chunk, in place, in the compute dtype."""
    softmax = logits.sub_(row_max[:, None]).sub_(row_logsum[:, None]).exp_()
    local = labels - begin
    here = (local >= 0) & (local < logits.shape[1])
    softmax.scatter_add_(1, torch.where(here, local, 0)[:, None], -here.to(softmax.dtype)[:, None])
    return softmax.mul_(-grad[:, None]).to(compute)


def _cuda_lse_update(logits, labels, begin, row_max, row_sum, gold) -> None:
    with torch.cuda.device(logits.device):
        _native.chunk_lse_update_cuda(
            logits.data_ptr(),
            labels.data_ptr(),
            row_max.data_ptr(),
            row_sum.data_ptr(),
            gold.data_ptr(),
            tuple(logits.shape),
            begin,
            DTYPE_CODES[logits.dtype],
            cuda_stream(logits),
        )


def _cuda_dlogits(logits, labels, begin, row_max, row_logsum, grad, compute) -> Tensor:
    d_logits = logits if compute == logits.dtype else torch.empty_like(logits, dtype=compute)
    with torch.cuda.device(logits.device):
        _native.chunk_dlogits_cuda(
            logits.data_ptr(),
            labels.data_ptr(),
            row_max.data_ptr(),
            row_logsum.data_ptr(),
            grad.data_ptr(),
            d_logits.data_ptr(),
            tuple(logits.shape),
            begin,
            DTYPE_CODES[logits.dtype],
            DTYPE_CODES[compute],
            cuda_stream(logits),
        )
    return d_logits
