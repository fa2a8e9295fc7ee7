"""Triton: pool, project, normalise, cast or quantise, scatter: one launch for a pack of blocks.

A program owns `rows` blocks. It walks the hidden width in tiles of BLOCK_H: pools the tile over each block's
own tokens (read once, summed in float32), multiplies it with the matching tile of the projection on the
matrix units, and finishes the row (LayerNorm, L2, cast or int8) in registers, so that nothing but the stored
row is written.

Works ragged ([S, H] with offsets) and padded ([R, T, H] with lengths): the caller passes strides.
Nothing is compiled and no device is asked for at import; Triton itself is imported on first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    UNAVAILABLE: str | None = None
except ImportError as _error:  # an optional dependency; CUDA builds of torch bring it
    triton = tl = None  # type: ignore[assignment]
    UNAVAILABLE = f"Triton is not installed ({_error}); pip install 'realm_fast[triton]'"

MAX_FUSED_DIM = 256  # above it the [16, D] accumulator no longer fits beside the pooling tile without spills
MAX_DIM = 4096  # one row must fit a program's registers
DOT_ROWS = 16  # the matrix units' smallest tile


@dataclasses.dataclass(frozen=True)
class Config:
    """How one launch is cut. `rows`: blocks a program; `block_t` x `block_h`: tokens x hidden in one read."""

    rows: int
    block_t: int
    block_h: int
    num_warps: int
    num_stages: int


# (target, mean pooling, projection) -> choice. Reasoned, and free of spills (tests/test_triton_aot.py), but
# NOT measured: no GPU was at hand.
#   mean: one block a program, so that a pack of 128 blocks fills 132 SMs; 64 x 128 bf16 is 16 KiB in flight
#         an SM, what 3 TB/s asks for at 600 ns. The 15 idle rows of the matrix tile cost under a microsecond.
#   cls:  one token a block, so 16 blocks share every read of the projection.
# sm_80 has half the bandwidth to feed: smaller tiles. gfx942 has 64 KiB of shared memory: fewer stages.
# `realm-fast bench epilogue --tune` measures `candidates()` on the GPU at hand and prints this table.
CONFIGS: dict[tuple[str, bool, bool], Config] = {
    ("sm_80", True, True): Config(rows=1, block_t=32, block_h=128, num_warps=4, num_stages=2),
    ("sm_80", True, False): Config(rows=1, block_t=8, block_h=0, num_warps=8, num_stages=2),
    ("sm_80", False, True): Config(rows=16, block_t=1, block_h=64, num_warps=4, num_stages=3),
    ("sm_80", False, False): Config(rows=1, block_t=1, block_h=0, num_warps=4, num_stages=1),
    ("sm_90", True, True): Config(rows=1, block_t=64, block_h=128, num_warps=4, num_stages=2),
    ("sm_90", True, False): Config(rows=1, block_t=16, block_h=0, num_warps=8, num_stages=2),
    ("sm_90", False, True): Config(rows=16, block_t=1, block_h=64, num_warps=4, num_stages=4),
    ("sm_90", False, False): Config(rows=1, block_t=1, block_h=0, num_warps=4, num_stages=1),
    ("sm_100", True, True): Config(rows=1, block_t=64, block_h=128, num_warps=4, num_stages=2),
    ("sm_100", True, False): Config(rows=1, block_t=16, block_h=0, num_warps=8, num_stages=2),
    ("sm_100", False, True): Config(rows=16, block_t=1, block_h=64, num_warps=4, num_stages=4),
    ("sm_100", False, False): Config(rows=1, block_t=1, block_h=0, num_warps=4, num_stages=1),
    ("gfx942", True, True): Config(rows=1, block_t=64, block_h=64, num_warps=4, num_stages=2),
    ("gfx942", True, False): Config(rows=1, block_t=16, block_h=0, num_warps=8, num_stages=2),
    ("gfx942", False, True): Config(rows=16, block_t=1, block_h=64, num_warps=4, num_stages=2),
    ("gfx942", False, False): Config(rows=1, block_t=1, block_h=0, num_warps=4, num_stages=1),
}


def target_of(backend: str, capability_major: int) -> str:
    """The column of CONFIGS for a device; newer and older parts take the nearest generation listed."""
    return "gfx942" if backend == "hip" else f"sm_{10 * min(max(capability_major, 8), 10)}"


def config_for(target: str, mean: bool, project: bool, dim: int) -> Config:
    """The table's choice; above D = 128 a projection gets twice the warps, for its accumulator."""
    config = CONFIGS[target, mean, project]
    if project and dim > 128:
        config = dataclasses.replace(config, num_warps=2 * config.num_warps)
    return config


def candidates(mean: bool, project: bool) -> list[Config]:
    """What the benchmark's --tune tries on a GPU."""
    if not project:
        tokens = (4, 8, 16, 32) if mean else (1,)
        return [
            Config(1, t, 0, w, s) for t in tokens for w in (2, 4, 8) for s in ((1, 2, 3) if mean else (1,))
        ]
    shapes = [(r, t) for r in (1, 2, 4) for t in (16, 32, 64)] if mean else [(r, 1) for r in (4, 8, 16)]
    return [
        Config(r, t, h, w, s) for r, t in shapes for h in (32, 64, 128) for w in (4, 8) for s in (1, 2, 3, 4)
    ]


def embed_epilogue_kernel(
    hidden,  # [S, H] or [R, T, H]
    offsets,  # RAGGED: [R + 1] first token of each block; else [R] tokens of each block
    row_ids,  # [R] int64 row of `out`
    weight,  # [D, H]
    bias,  # [D]
    ln_weight,  # [D]
    ln_bias,  # [D]
    out,  # rows, or panels of PANEL rows
    scale,  # [N] float32, int8 only
    residual_norm,  # [N] float32
    stored_norm,  # [N] float32
    num_rows,  # R
    num_tokens,  # S or T
    num_out_rows,  # N
    block_stride,  # elements between blocks of a padded `hidden`
    token_stride,  # elements between tokens
    out_stride,  # elements between rows of `out`, or between panels
    ln_eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,  # without a projection: BLOCK_D, one tile
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,  # rows of the register tile: ROWS, or DOT_ROWS with a projection
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    MEAN: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    HAS_LN_WEIGHT: tl.constexpr,
    HAS_LN_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SHIFT: tl.constexpr,  # added to int8 values: 0, or 128 for uint8
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,  # "exact": 16-bit as it is; "split": in high and low halves; else an input_precision
    PANEL: tl.constexpr,
    GROUP: tl.constexpr,
    STORED: tl.constexpr,  # elements of a stored row: D, in panels rounded up to whole groups
):
    first = tl.program_id(0) * ROWS
    slot = tl.arange(0, TILE)
    row = first + slot  # [TILE]
    alive = (slot < ROWS) & (row < num_rows)
    if RAGGED:
        start = tl.load(offsets + row, mask=alive, other=0).to(tl.int64)
        count = tl.load(offsets + row + 1, mask=alive, other=0).to(tl.int64) - start
        begin = start * token_stride
    else:
        start = tl.full((TILE,), 0, tl.int64)
        count = tl.load(offsets + row, mask=alive, other=0).to(tl.int64)
        begin = row.to(tl.int64) * block_stride
    # A block without tokens, or with offsets outside of `hidden`, reads nothing and becomes NaN.
    readable = alive & (count > 0) & (start >= 0) & (start + count <= num_tokens)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D

    x = tl.full((TILE, BLOCK_D), 0.0, tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        in_h = h < H
        if MEAN:
            pooled = tl.full((TILE, BLOCK_H), 0.0, tl.float32)
            for r in tl.static_range(ROWS):
                # Scalars of their own, so that the compiler sees that token rows are 16-byte aligned.
                here = first + r
                if RAGGED:
                    at = tl.load(offsets + here, mask=here < num_rows, other=0).to(tl.int64)
                    tokens = tl.load(offsets + here + 1, mask=here < num_rows, other=0).to(tl.int64) - at
                    base = hidden + at * token_stride
                else:
                    at = here.to(tl.int64) * 0
                    tokens = tl.load(offsets + here, mask=here < num_rows, other=0).to(tl.int64)
                    base = hidden + here.to(tl.int64) * block_stride
                tokens = tl.where((at >= 0) & (at + tokens <= num_tokens), tokens, 0)
                total = tl.full((BLOCK_T, BLOCK_H), 0.0, tl.float32)
                for t0 in range(0, tokens.to(tl.int32), BLOCK_T):
                    t = t0 + tl.arange(0, BLOCK_T)
                    total += tl.load(
                        base + t[:, None].to(tl.int64) * token_stride + h[None, :],
                        mask=(t[:, None] < tokens) & in_h[None, :],
                        other=0.0,
                    ).to(tl.float32)
                scale_t = tl.div_rn(1.0, tl.maximum(tokens, 1).to(tl.float32))
                mean = tl.sum(total, axis=0) * scale_t  # [BLOCK_H]
                pooled = tl.where((slot == r)[:, None], mean[None, :], pooled)
        else:
            pooled = tl.load(
                hidden + begin[:, None] + h[None, :], mask=readable[:, None] & in_h[None, :], other=0.0
            )
        if PROJECT:
            w = tl.load(  # [BLOCK_H, BLOCK_D]
                weight + d[None, :] * H + h[:, None], mask=in_d[None, :] & in_h[:, None], other=0.0
            )
            if DOT == "exact":
                x = tl.dot(pooled, w, x)
            elif DOT == "split":
                high = pooled.to(w.dtype)
                low = (pooled - high.to(tl.float32)).to(w.dtype)
                x = tl.dot(low, w, x)
                x = tl.dot(high, w, x)
            else:
                x = tl.dot(pooled.to(tl.float32), w.to(tl.float32), x, input_precision=DOT)
        else:
            x = pooled.to(tl.float32)  # the only tile
    if HAS_BIAS:
        x += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    x = tl.where((alive & ~readable)[:, None], float("nan"), x)

    if LAYER_NORM:
        x = tl.where(in_d[None, :], x, 0.0)
        center = x - (tl.sum(x, axis=1) * (1.0 / D))[:, None]
        center = tl.where(in_d[None, :], center, 0.0)
        variance = tl.sum(center * center, axis=1) * (1.0 / D)
        x = center * tl.div_rn(1.0, tl.sqrt_rn(variance + ln_eps))[:, None]
        if HAS_LN_WEIGHT:
            x *= tl.load(ln_weight + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        if HAS_LN_BIAS:
            x += tl.load(ln_bias + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    x = tl.where(in_d[None, :], x, 0.0)
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
        x = tl.div_rn(x, tl.maximum(norm, 1e-12)[:, None] + tl.full((TILE, BLOCK_D), 0.0, tl.float32))

    place = tl.load(row_ids + row, mask=alive, other=-1)  # [TILE] int64
    alive = alive & (place >= 0) & (place < num_out_rows)  # a foreign row id must not write into other memory
    if PANEL == 1 and GROUP == 1:
        where = place[:, None] * out_stride + d[None, :]
    else:
        inner = (d // GROUP) * (PANEL * GROUP) + d % GROUP
        where = (place // PANEL * out_stride + place % PANEL * GROUP)[:, None] + inner[None, :]
    keep = alive[:, None] & (d < STORED)[None, :]
    step = tl.full((TILE,), 1.0, tl.float32)
    if QUANTIZE:
        # 2^-100 keeps the reciprocal finite; the residual says what is lost.
        step = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0 * step), 7.888609052210118e-31)
        inverse = tl.div_rn(tl.full((TILE,), 1.0, tl.float32), step)
        # 1.5 * 2^23: adding it rounds to an integer, ties to even
        kept = (x * inverse[:, None] + 12582912.0) - 12582912.0
        kept = tl.minimum(tl.maximum(kept, -127.0), 127.0)
        tl.store(out + where, (kept.to(tl.int32) + SHIFT).to(out.dtype.element_ty), mask=keep)
        tl.store(scale + place, step, mask=alive)
        error = x - kept * step[:, None]
    else:
        y = x.to(out.dtype.element_ty)
        if out.dtype.element_ty == tl.bfloat16:
            y = tl.where(tl.abs(y.to(tl.float32)) < 1.1754943508222875e-38, 0.0, y)  # no subnormals
        tl.store(out + where, y, mask=keep)
        kept = y.to(tl.float32)
        error = x - kept
    # Rounded up past every error made here: the sums (D terms), q * step (2^-24 of x), and underflow.
    if RESIDUAL:
        norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
        lost = tl.sqrt_rn(tl.sum(error * error, axis=1))
        tl.store(residual_norm + place, lost * (1.0 + (D + 8) * 6e-8) + norm * 1.2e-7 + 1e-17, mask=alive)
    if NORM:
        norm = step * tl.sqrt_rn(tl.sum(kept * kept, axis=1))
        tl.store(stored_norm + place, norm * (1.0 + (D + 8) * 6e-8) + 1e-17, mask=alive)


@functools.cache
def compiled_kernel() -> Any:
    """The kernel as Triton's just-in-time function."""
    from triton.runtime.jit import JITFunction

    return JITFunction(embed_epilogue_kernel)


class InterpretedKernel:
    """The kernel as numpy runs it, for values without a GPU: `InterpretedKernel()[grid](...)`."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._kernel = InterpretedFunction(embed_epilogue_kernel)
        # tl.sum and tl.max are kernels themselves, which the interpreter can call only if TRITON_INTERPRET
        # was set when Triton was imported; what they reduce to it can always call.
        self._reductions = {
            "sum": lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine),
            "max": lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max),
        }

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            with contextlib.ExitStack() as stack:
                for name, function in self._reductions.items():
                    stack.callback(setattr, tl, name, getattr(tl, name))
                    setattr(tl, name, function)
                self._kernel[grid](*args, **kwargs)

        return run


@functools.cache
def interpreted_kernel() -> InterpretedKernel:
    return InterpretedKernel()


def constants(
    config: Config,
    *,
    hidden_dim: int,
    dim: int,
    project: bool,
    mean: bool,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    backend: str,
    group: int = 1,
) -> dict[str, Any]:
    """The compile-time sizes and the arithmetic of the projection, for `config` and these operands.

    `backend`: "cuda", "hip" or "interpreter".
    """
    stored = -(-dim // group) * group
    block_d = max(DOT_ROWS, triton.next_power_of_2(stored))
    if not project:
        # At most 8192 elements in flight: 32 registers a thread at 8 warps.
        block_t = max(1, min(config.block_t, 8192 // block_d))
        return {"H": hidden_dim, "D": dim, "STORED": stored, "BLOCK_T": block_t,
            "BLOCK_H": block_d, "BLOCK_D": block_d,
                "TILE": config.rows, "ROWS": config.rows, "DOT": "none"}  # fmt: skip
    block_h = min(config.block_h, max(16, triton.next_power_of_2(hidden_dim)))
    # Triton 3.7's interpreter multiplies the bit patterns of bfloat16: there it is widened first.
    sixteen_bit = (torch.float16,) if backend == "interpreter" else (torch.float16, torch.bfloat16)
    if weight_dtype == hidden_dtype and hidden_dtype in sixteen_bit:
        # The first token is 16-bit as it stands; a mean is not, so its low half is multiplied as well.
        dot = "split" if mean else "exact"
    else:
        dot = "tf32x3" if backend == "cuda" else "ieee"  # AMD's matrix units take float32 as it is
        block_h = max(16, block_h // 2)  # operands are twice as wide
    return {"H": hidden_dim, "D": dim, "STORED": stored, "BLOCK_T": config.block_t,
            "BLOCK_H": block_h, "BLOCK_D": block_d,
            "TILE": DOT_ROWS, "ROWS": config.rows, "DOT": dot}  # fmt: skip


def launch(
    hidden: torch.Tensor,
    offsets: torch.Tensor,
    row_ids: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    residual_norm: torch.Tensor | None,
    norm: torch.Tensor | None,
    *,
    ragged: bool,
    mean: bool,
    ln_eps: float | None,
    normalize: bool,
    dim: int,
    num_out_rows: int,
    config: Config | None = None,
) -> None:
    """Launches on the current stream; CPU tensors run in Triton's interpreter. Arguments are checked already.

    One launch, except for a projection to D > MAX_FUSED_DIM: pool, GEMM in float32, finish.
    """
    rows = row_ids.numel()
    if weight is not None and dim > MAX_FUSED_DIM:
        hidden_dim = hidden.shape[-1]
        pooled = torch.empty(rows, hidden_dim, dtype=torch.float32, device=hidden.device)
        each = torch.arange(rows, device=hidden.device)
        launch(
            hidden, offsets, each, None, None, None, None, pooled, None, None, None, ragged=ragged, mean=mean,
            ln_eps=None, normalize=False, dim=hidden_dim, num_out_rows=rows, config=config,
        )  # fmt: skip
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = torch.nn.functional.linear(pooled, weight.float())[:, None]  # [R, 1, D]
        offsets, ragged, mean, weight, config = torch.ones_like(each), False, False, None, None
    project = weight is not None
    on_gpu = hidden.is_cuda
    backend = "interpreter" if not on_gpu else "cuda" if torch.version.hip is None else "hip"
    major = torch.cuda.get_device_capability(hidden.device)[0] if on_gpu else 9
    config = config or config_for(target_of(backend, major), mean, project, dim)
    sizes = constants(
        config, hidden_dim=hidden.shape[-1], dim=dim, project=project, mean=mean, hidden_dtype=hidden.dtype,
        weight_dtype=None if weight is None else weight.dtype,
        backend=backend, group=out.shape[3] if out.dim() == 4 else 1,
    )  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if on_gpu else {}
    kernel = compiled_kernel() if on_gpu else interpreted_kernel()
    parameters = [None if p is None else p.contiguous() for p in (weight, bias, ln_weight, ln_bias)]
    with torch.cuda.device(hidden.device) if on_gpu else contextlib.nullcontext():
        kernel[(triton.cdiv(rows, config.rows),)](
            hidden,
            offsets.contiguous(),
            row_ids.contiguous(),
            *(row_ids if p is None else p for p in parameters),  # never read: the flags below say so
            out,
            out if scale is None else scale,
            out if residual_norm is None else residual_norm,
            out if norm is None else norm,
            rows,
            hidden.shape[-2],
            num_out_rows,
            0 if ragged else hidden.stride(0),
            hidden.stride(-2),
            out.stride(0),
            ln_eps or 0.0,
            **sizes,
            RAGGED=ragged,
            MEAN=mean,
            PROJECT=project,
            HAS_BIAS=bias is not None,
            LAYER_NORM=ln_eps is not None,
            HAS_LN_WEIGHT=ln_weight is not None,
            HAS_LN_BIAS=ln_bias is not None,
            NORMALIZE=normalize,
            QUANTIZE=out.dtype in (torch.int8, torch.uint8),
            SHIFT=128 if out.dtype == torch.uint8 else 0,
            RESIDUAL=residual_norm is not None,
            NORM=norm is not None,
            PANEL=out.shape[2] if out.dim() == 4 else 1,
            GROUP=out.shape[3] if out.dim() == 4 else 1,
            **options,
        )
