"""From token states to stored index rows, in one pass: pool, project, normalise, cast or quantise, scatter.

    x = pool(hidden)                          first token ("cls") or mean over the block's own tokens
    x = W x + b                               optional
    x = LayerNorm(x) * ln_weight + ln_bias    optional
    x = x / max(|x|, 1e-12)                   optional
    out[row_ids] = x                          float32, bfloat16, or int8, scale = max(max|x| / 127, 2^-100)
    residual_norm[row_ids] >= |x - stored|    for a certified low-precision scan; above it by rounding only
    norm[row_ids] >= |stored|                 likewise

In panels the stored bits are those of a MipsIndex (realm_fast/panels.py): bfloat16 without subnormals, int8
as uint8 around 128, the unused end of a last group 0.

Inference only. Edge cases, the same for every implementation:

    block without tokens, or tokens outside of hidden: an error on the CPU; on a GPU, where looking would stop
                           the stream, nothing is read and the row is NaN
    row id out of range    an error on the CPU; on a GPU the row is not written
    NaN or infinity        stays in float rows; in int8 rows residual_norm is not finite
    max|x| < 2^-94, int8   stored coarsely or as zeros; residual_norm covers it
"""

import itertools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from realm_fast import _native
from realm_fast.ops._checks import check_choice, check_tensor
from realm_fast.ops._cuda import capability_reason
from realm_fast.ops._dispatch import choose_impl

POOLINGS = ("cls", "mean")
HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
_INTEGERS = (torch.int8, torch.uint8)
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}


class StoredRows(NamedTuple):
    """What `embed_epilogue` wrote to."""

    out: Tensor  # [N, D], or [panels, groups, panel_rows, group]
    scale: Tensor | None  # [N] float32, int8 and uint8 only: row = int8 value * scale
    residual_norm: Tensor | None  # [N] float32: |row - stored row|, rounded up
    norm: Tensor | None  # [N] float32: |stored row|, rounded up


def embed_epilogue(
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    pooling: str = "cls",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ln_eps: float | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    row_ids: Tensor | None = None,
    scale: Tensor | None = None,
    residual_norm: Tensor | None = None,
    norm: Tensor | None = None,
    impl: str = "auto",
) -> StoredRows:
    """Turns the token states of a pack into rows of an index, written where the index keeps them.

    Args:
        hidden: token states, float32/bfloat16/float16, the last dimension contiguous: ragged [S, H] with
            `cu_seqlens`, or padded [R, T, H] with `lengths`.
        cu_seqlens: [R + 1] int32/int64; block r has the tokens cu_seqlens[r] <= s < cu_seqlens[r + 1].
        lengths: [R] int32/int64, 1 <= lengths <= T; None: every row has T tokens.
        pooling: "cls" (the block's first token) or "mean" (over its tokens, padding never read).
        weight: [D, H] float32/bfloat16/float16; None: no projection, D = H.
        bias: [D], only with `weight`.
        ln_eps: LayerNorm's eps; None: no LayerNorm.
        ln_weight, ln_bias: [D], only with `ln_eps`; None: ones, zeros.
        normalize: divide by the L2 norm.
        dtype: how rows are stored where `out` is not given: float32 (default), bfloat16, int8, or uint8 (int8
            plus 128).
        out: where rows are written: [N, D] row-major, or [panels, ceil(D / group), panel_rows, group], whose
            element [n // panel_rows, d // group, n % panel_rows, d % group] is dimension d of row n. None: a
            new [R, D].
        row_ids: [R] int64, all different, 0 <= row_ids < N: row of `out` for each block; None: 0, 1, ...
        scale: [N] float32, written; required for int8 and uint8 with `out`.
        residual_norm, norm: [N] float32, written where given; `residual_norm` is required for int8 and uint8
            with `out`. Without `out` low precision gets both.
        impl: "auto", "triton" (CUDA and ROCm tensors), "cpu" (native) or "reference" (plain torch).
            On a GPU a projection to D <= 256 is fused; a wider one is pool, GEMM, finish.

    Returns:
        StoredRows(out, scale, residual_norm, norm).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or values.
        RuntimeError: a gradient is asked for.
    """
    check_tensor("hidden", hidden, shape=("S", "H") if cu_seqlens is not None else ("R", "T", "H"))
    floats = (*HIDDEN_DTYPES, torch.float64)  # float64 is for the reference alone
    check_tensor("hidden", hidden, shape=tuple("STH"[3 - hidden.dim() :]), dtypes=floats)
    check_choice("pooling", pooling, POOLINGS)
    width, device = hidden.shape[-1], hidden.device
    if width == 0:
        raise ValueError(f"hidden: expected H >= 1, got {list(hidden.shape)}")
    if width > 1 and hidden.stride(-1) != 1:
        raise ValueError(f"hidden: expected a contiguous last dimension, got strides {list(hidden.stride())}")
    offsets, rows = _check_offsets(hidden, cu_seqlens, lengths)

    dim = width
    if weight is not None:
        check_tensor("weight", weight, shape=("D", width), dtypes=floats, device=device)
        dim = weight.shape[0]
        if dim == 0:
            raise ValueError(f"weight: expected D >= 1, got {list(weight.shape)}")
    _check_parameter("bias", bias, dim, device, "weight", weight is not None)
    _check_parameter("ln_weight", ln_weight, dim, device, "ln_eps", ln_eps is not None)
    _check_parameter("ln_bias", ln_bias, dim, device, "ln_eps", ln_eps is not None)
    if ln_eps is not None and not 0 <= ln_eps < float("inf"):
        raise ValueError(f"ln_eps: expected a finite number >= 0, got {ln_eps!r}")
    inputs = (hidden, weight, bias, ln_weight, ln_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise RuntimeError(
            "embed_epilogue: inference only, but an input requires a gradient. Call it under torch.no_grad() "
            "or torch.inference_mode(); for training use the embedder's own layers."
        )

    if out is None:
        if any(t is not None for t in (row_ids, scale, residual_norm, norm)):
            raise ValueError("out: expected a tensor beside row_ids, scale, residual_norm or norm, got None")
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in STORED_DTYPES:
            raise TypeError(f"dtype: expected float32/bfloat16/int8/uint8, got {dtype}")
        out = torch.empty(rows, dim, dtype=dtype, device=device)
        if dtype in _INTEGERS:
            scale = torch.empty(rows, dtype=torch.float32, device=device)
        if dtype != torch.float32:
            residual_norm, norm = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    elif dtype is not None and dtype != getattr(out, "dtype", dtype):
        raise TypeError(f"dtype: expected that of out, {out.dtype}, got {dtype}")
    stored = _check_out(out, dim, device)
    _check_per_row("scale", scale, stored, device, needed=out.dtype in _INTEGERS)
    _check_per_row("residual_norm", residual_norm, stored, device, needed=out.dtype in _INTEGERS)
    _check_per_row("norm", norm, stored, device, needed=False)
    if scale is not None and out.dtype not in _INTEGERS:
        raise ValueError(f"scale: only int8 and uint8 rows have one, out is {out.dtype}")
    if row_ids is None:
        if rows > stored:
            raise ValueError(f"out: expected room for {rows} rows, got {list(out.shape)}")
        row_ids = torch.arange(rows, device=device)
    check_tensor("row_ids", row_ids, shape=(rows,), dtypes=(torch.int64,), device=device)

    unsupported = {t.dtype for t in inputs if t is not None} - set(HIDDEN_DTYPES)
    chosen = choose_impl(
        "embed_epilogue",
        impl,
        {
            "cpu": lambda: (
                f"the tensors are on {device}"
                if not hidden.is_cpu
                else f"it takes no {next(iter(unsupported))}"
                if unsupported
                else None
            ),
            "triton": lambda: triton_reason(hidden, dim, projected=weight is not None),
            "reference": lambda: None,
        },
    )
    # Dispatching costs as much as a small pack: what nobody traces is called straight.
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    run = embed_epilogue_op if traced or type(hidden) is not Tensor else _run
    run(
        hidden, offsets, row_ids, weight, bias, ln_weight, ln_bias, out, scale, residual_norm, norm,
        cu_seqlens is not None, pooling == "mean", ln_eps, normalize, chosen,
    )  # fmt: skip
    return StoredRows(out, scale, residual_norm, norm)


def embed_rows_reference(
    hidden: Tensor,
    offsets: Tensor,
    ragged: bool,
    mean: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ln_eps: float | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """The rows before they are stored, [R, D] in float32 (float64 for float64), in plain torch."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bounds = offsets.tolist()
    blocks = [hidden[a:b] for a, b in itertools.pairwise(bounds)] if ragged else map(_cut, hidden, bounds)
    pooled = [states.to(wide).mean(0) if mean else states[0].to(wide) for states in blocks]
    dim = hidden.shape[-1]
    x = torch.stack(pooled) if pooled else hidden.new_empty(0, dim, dtype=wide)  # [R, H]
    w, b, g, c = (None if p is None else p.to(wide) for p in (weight, bias, ln_weight, ln_bias))
    if w is not None:
        x = torch.nn.functional.linear(x, w, b)
    if ln_eps is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], g, c, ln_eps)
    return torch.nn.functional.normalize(x, dim=-1) if normalize else x


def _cut(states: Tensor, length: int) -> Tensor:
    return states[:length]


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their scales: x is about rows * scale[:, None]."""
    scale = (x.abs().amax(-1) / 127).clamp(min=2.0**-100)  # keeps 1 / scale finite
    return (x * (1 / scale)[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def bfloat16_rows_reference(x: Tensor) -> Tensor:
    """bfloat16 rows, subnormals as 0: the CPU's bfloat16 products take them for 0."""
    rows = x.to(torch.bfloat16)
    return torch.where(rows.abs() < torch.finfo(torch.bfloat16).tiny, 0, rows)


def norm_bounds(x: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """|x - stored| and |stored| of each float32 row, rounded up past every error float32 makes in them."""
    slack = 1 + (x.shape[-1] + 8) * 6e-8
    lost, norm, kept = (torch.linalg.vector_norm(v, dim=-1) for v in (x - stored, x, stored))
    return lost * slack + norm * 1.2e-7 + 1e-17, kept * slack + 1e-17


def rows_of(out: Tensor, dim: int) -> Tensor:
    """Rows stored in either layout as [N, D]; a copy for panels."""
    return out if out.dim() == 2 else out.transpose(1, 2).flatten(2).flatten(0, 1)[:, :dim]


def triton_reason(hidden: Tensor, dim: int, *, projected: bool) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    from realm_fast.kernels import embed_epilogue as kernels

    if hidden.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernel there, slowly)"
    if kernels.UNAVAILABLE is not None:
        return kernels.UNAVAILABLE
    if hidden.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {hidden.device}"
    if hidden.dtype not in HIDDEN_DTYPES:
        return f"it takes no {hidden.dtype}"
    widest = dim if projected and dim <= kernels.MAX_FUSED_DIM else max(dim, hidden.shape[-1])
    if widest > kernels.MAX_DIM:
        return f"rows are {widest} wide and it takes {kernels.MAX_DIM} at most"
    return capability_reason(hidden.device) if hidden.is_cuda and torch.version.hip is None else None


def _run(
    hidden: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    residual_norm: Tensor | None,
    norm: Tensor | None,
    ragged: bool,
    mean: bool,
    ln_eps: float | None,
    normalize: bool,
    impl: str,
) -> None:
    dim = hidden.shape[-1] if weight is None else weight.shape[0]
    num_out_rows = out.shape[0] * (1 if out.dim() == 2 else out.shape[2])
    if hidden.is_cpu:  # on a GPU looking at values would stop the stream
        offsets, row_ids = offsets.to(torch.int64).contiguous(), row_ids.contiguous()
        _check_values(hidden, offsets, row_ids, num_out_rows, ragged)
    if row_ids.numel() == 0:
        return
    torch.autograd.graph.increment_version([t for t in (out, scale, residual_norm, norm) if t is not None])
    if impl == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            x = embed_rows_reference(
                hidden, offsets, ragged, mean, weight, bias, ln_eps, ln_weight, ln_bias, normalize
            )
        _store_reference(x, row_ids, out, scale, residual_norm, norm)
        return
    if impl == "triton":
        from realm_fast.kernels import embed_epilogue as kernels

        kernels.launch(
            hidden, offsets, row_ids, weight, bias, ln_weight, ln_bias, out, scale, residual_norm, norm,
            ragged=ragged, mean=mean, ln_eps=ln_eps, normalize=normalize, dim=dim, num_out_rows=num_out_rows,
        )  # fmt: skip
        return
    # Kept alive until the call returns; copies only where a parameter is not float32 already.
    parameters = [None if p is None else p.float().contiguous() for p in (weight, bias, ln_weight, ln_bias)]
    w, b, g, c = (0 if p is None else p.data_ptr() for p in parameters)
    _native.embed_epilogue_cpu(
        hidden=hidden.data_ptr(),
        hidden_type=_TYPE_CODES[hidden.dtype],
        offsets=offsets.data_ptr(),
        ragged=ragged,
        num_rows=row_ids.numel(),
        block_stride=0 if ragged else hidden.stride(0),
        token_stride=hidden.stride(-2),
        hidden_dim=hidden.shape[-1],
        dim=dim,
        mean=mean,
        weight=w,
        bias=b,
        layer_norm=ln_eps is not None,
        ln_weight=g,
        ln_bias=c,
        ln_eps=ln_eps or 0.0,
        normalize=normalize,
        out=out.data_ptr(),
        out_type=_TYPE_CODES[out.dtype],
        out_stride=out.stride(0),
        panel_rows=1 if out.dim() == 2 else out.shape[2],
        group=1 if out.dim() == 2 else out.shape[3],
        row_ids=row_ids.data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        residual_norm=0 if residual_norm is None else residual_norm.data_ptr(),
        norm=0 if norm is None else norm.data_ptr(),
        num_threads=torch.get_num_threads(),
    )


embed_epilogue_op = torch.library.custom_op(
    "realm_fast::embed_epilogue", _run, mutates_args=("out", "scale", "residual_norm", "norm")
)


@embed_epilogue_op.register_fake
def _(hidden, offsets, row_ids, weight, bias, ln_weight, ln_bias, out, scale, residual_norm, norm,
      ragged, mean, ln_eps, normalize, impl):  # fmt: skip
    return None


def _store_reference(
    x: Tensor,
    row_ids: Tensor,
    out: Tensor,
    scale: Tensor | None,
    residual_norm: Tensor | None,
    norm: Tensor | None,
) -> None:
    if out.dtype in _INTEGERS:
        assert scale is not None  # the caller's check
        stored, step = quantize_rows_reference(x)
        scale[row_ids] = step.to(scale.dtype)
        back = stored.to(x.dtype) * step[:, None]
        if out.dtype == torch.uint8:
            stored = (stored.to(torch.int16) + 128).to(torch.uint8)
    else:
        stored = bfloat16_rows_reference(x) if out.dtype == torch.bfloat16 else x.to(out.dtype)
        back = stored.to(x.dtype)
    for bound, value in zip((residual_norm, norm), norm_bounds(x, back)):
        if bound is not None:
            bound[row_ids] = value.to(bound.dtype)
    if out.dim() == 2:
        out[row_ids] = stored
        return
    _, groups, panel_rows, group = out.shape
    padding = 128 if out.dtype == torch.uint8 else 0
    padded = torch.nn.functional.pad(stored, (0, groups * group - x.shape[-1]), value=padding)
    d = torch.arange(groups * group, device=x.device)
    panel, slot = (row_ids // panel_rows)[:, None], (row_ids % panel_rows)[:, None]
    out[panel, (d // group)[None, :], slot, (d % group)[None, :]] = padded


def _check_offsets(hidden: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, int]:
    """The offsets the op takes, and R."""
    integers = (torch.int32, torch.int64)
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths: expected None beside cu_seqlens")
        check_tensor("cu_seqlens", cu_seqlens, shape=("R + 1",), dtypes=integers, device=hidden.device)
        if cu_seqlens.numel() == 0:
            raise ValueError("cu_seqlens: expected [R + 1], got no element")
        return cu_seqlens, cu_seqlens.numel() - 1
    rows, tokens, _ = hidden.shape
    if lengths is None:
        return torch.full((rows,), tokens, dtype=torch.int64, device=hidden.device), rows
    check_tensor("lengths", lengths, shape=(rows,), dtypes=integers, device=hidden.device)
    return lengths, rows


def _check_parameter(
    name: str, value: Tensor | None, dim: int, device: torch.device, owner: str, owner_given: bool
) -> None:
    if value is None:
        return
    if not owner_given:
        raise ValueError(f"{name}: expected None without {owner}")
    check_tensor(name, value, shape=(dim,), dtypes=(*HIDDEN_DTYPES, torch.float64), device=device)


def _check_out(out: Tensor, dim: int, device: torch.device) -> int:
    """How many rows `out` stores."""
    if isinstance(out, Tensor) and out.dim() == 4:
        check_tensor(
            "out", out, shape=("panels", "groups", "panel_rows", "group"), dtypes=STORED_DTYPES, device=device
        )
        panels, groups, panel_rows, group = out.shape
        if groups != -(-dim // max(group, 1)):
            raise ValueError(f"out: expected {dim} dimensions in groups of {group}, got {list(out.shape)}")
        if panels and not out[0].is_contiguous():
            raise ValueError(f"out: expected contiguous panels, got strides {list(out.stride())}")
        return panels * panel_rows
    check_tensor("out", out, shape=("N", dim), dtypes=STORED_DTYPES, device=device)
    if dim > 1 and out.stride(1) != 1:
        raise ValueError(f"out: expected contiguous rows, got strides {list(out.stride())}")
    return out.shape[0]


def _check_per_row(name: str, value: Tensor | None, rows: int, device: torch.device, *, needed: bool) -> None:
    if value is None:
        if needed:
            raise ValueError(f"{name}: expected [{rows}] float32 for int8 rows, got None")
        return
    check_tensor(name, value, shape=(rows,), dtypes=(torch.float32,), device=device)
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {value.stride(0)}")


def _check_values(hidden: Tensor, offsets: Tensor, row_ids: Tensor, num_out_rows: int, ragged: bool) -> None:
    limit = hidden.shape[0] if ragged else hidden.shape[1]
    fault, index, value = _native.embed_epilogue_check(
        offsets.data_ptr(), ragged, limit, row_ids.data_ptr(), row_ids.numel(), num_out_rows
    )
    name = "cu_seqlens" if ragged else "lengths"
    if fault == 1:
        raise ValueError(f"{name}: expected at least one token a block, got {value} for block {index}")
    if fault == 2:
        raise ValueError(f"{name}: expected tokens within [0, {limit}], got {value} for block {index}")
    if fault == 3:
        raise ValueError(f"row_ids: expected 0 <= row < {num_out_rows}, got {value} for block {index}")
    if fault == 4:
        raise ValueError(f"row_ids: expected different rows, got {value} twice")
