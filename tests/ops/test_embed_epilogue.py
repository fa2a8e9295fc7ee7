"""embed_epilogue: every implementation against the float64 reference, and what must hold to the last bit."""

import contextlib
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from realm_fast.kernels import embed_epilogue as kernels
from tolerances import assert_as_good_as_torch

from realm_fast import _native
from realm_fast.ops.embed_epilogue import (
    StoredRows,
    embed_epilogue,
    embed_epilogue_op,
    embed_rows_reference,
    quantize_rows_reference,
    rows_of,
)
from realm_fast.panels import Slab

LEVELS = _native.available_cpu_levels()
HIDDEN = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
STORED = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "uint8": torch.uint8}
needs_triton = pytest.mark.skipif(kernels.UNAVAILABLE is not None, reason=str(kernels.UNAVAILABLE))
IMPLS = ["cpu", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=LEVELS)
def level(request):
    _native.force_cpu_level(request.param)
    yield request.param
    _native.force_cpu_level("")


def random(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def make_call(
    lengths, hidden_dim, dim=None, *, ragged=True, dtype=torch.float32, weight_dtype=None, pooling="cls",
    bias=True, ln=True, normalize=False, seed=0,
):  # fmt: skip
    """Arguments of embed_epilogue for random blocks of these lengths; padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    weight_dtype = weight_dtype or dtype
    width = hidden_dim if dim is None else dim
    lengths = torch.tensor(lengths, dtype=torch.int64)
    call = {"pooling": pooling, "normalize": normalize}
    if ragged:
        call["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        call["hidden"] = random(generator, int(lengths.sum()), hidden_dim, dtype=dtype) + 0.25
    else:
        tokens = int(lengths.max()) + 2 if len(lengths) else 3
        hidden = random(generator, len(lengths), tokens, hidden_dim, dtype=dtype) + 0.25
        hidden[torch.arange(tokens) >= lengths[:, None]] = math.nan
        call |= {"hidden": hidden, "lengths": lengths}
    if dim is not None:
        call["weight"] = random(generator, dim, hidden_dim, dtype=weight_dtype) / math.sqrt(hidden_dim)
        call["bias"] = random(generator, dim, dtype=weight_dtype) if bias else None
    if ln:
        call |= {
            "ln_eps": 1e-3,
            "ln_weight": 1 + random(generator, width, dtype=weight_dtype) / 4 if bias else None,
            "ln_bias": random(generator, width, dtype=weight_dtype) / 4 if bias else None,
        }
    return call


def reference(call, dtype):
    """The rows before storing, computed in `dtype`."""

    def to(name):
        return None if call.get(name) is None else call[name].to(dtype)

    ragged = "cu_seqlens" in call
    lengths = call.get("lengths")
    if not ragged and lengths is None:
        lengths = torch.full((call["hidden"].shape[0],), call["hidden"].shape[1])
    return embed_rows_reference(
        to("hidden"), call["cu_seqlens"] if ragged else lengths, ragged, call["pooling"] == "mean",
        to("weight"), to("bias"), call.get("ln_eps"), to("ln_weight"), to("ln_bias"), call["normalize"],
    )  # fmt: skip


def assert_right(rows, call):
    assert rows.dtype == torch.float32
    assert_as_good_as_torch(rows, reference(call, torch.float64), reference(call, torch.float32))


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("dtype", HIDDEN)
@pytest.mark.parametrize("dim", [None, 128, 37])
def test_every_level_is_right(level, dtype, pooling, dim):
    for ragged in (True, False):
        call = make_call(
            [1, 7, 8, 9, 30, 64, 3], 96, dim, dtype=HIDDEN[dtype], pooling=pooling, ragged=ragged
        )
        assert_right(embed_epilogue(**call, impl="cpu").out, call)


@needs_triton
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("dtype", HIDDEN)
@pytest.mark.parametrize("dim", [None, 20, 257])
def test_triton_is_right(dtype, pooling, dim):
    for ragged in (True, False):
        call = make_call([1, 7, 70, 3], 40, dim, dtype=HIDDEN[dtype], pooling=pooling, ragged=ragged)
        if dtype == "f16" and pooling == "mean" and dim == 20:
            # high and low halves: 22 bits of the mean enter the product
            truth = reference(call, torch.float64)
            assert (embed_epilogue(**call, impl="triton").out - truth).abs().max() < 4e-6
        else:
            assert_right(embed_epilogue(**call, impl="triton").out, call)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), max_size=35),
    hidden_dim=st.integers(1, 70),
    dim=st.one_of(st.none(), st.integers(1, 70)),
    ragged=st.booleans(),
    pooling=st.sampled_from(["cls", "mean"]),
    bias=st.booleans(),
    ln=st.booleans(),
    normalize=st.booleans(),
    dtype=st.sampled_from(list(HIDDEN)),
    weight_dtype=st.sampled_from(list(HIDDEN)),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 2**20),
)
def test_any_shape_is_right(level, lengths, hidden_dim, dim, dtype, weight_dtype, **options):
    call = make_call(
        lengths, hidden_dim, dim, dtype=HIDDEN[dtype], weight_dtype=HIDDEN[weight_dtype], **options
    )
    _native.force_cpu_level(level)
    try:
        assert_right(embed_epilogue(**call, impl="cpu").out, call)
    finally:
        _native.force_cpu_level("")


@needs_triton
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), max_size=4),
    hidden_dim=st.integers(1, 40),
    dim=st.one_of(st.none(), st.integers(1, 40)),
    ragged=st.booleans(),
    pooling=st.sampled_from(["cls", "mean"]),
    bias=st.booleans(),
    ln=st.booleans(),
    normalize=st.booleans(),
    dtype=st.sampled_from(["f32", "bf16"]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_is_right_in_triton(lengths, hidden_dim, dim, dtype, **options):
    call = make_call(lengths, hidden_dim, dim, dtype=HIDDEN[dtype], weight_dtype=torch.float32, **options)
    assert_right(embed_epilogue(**call, impl="triton").out, call)


def test_equals_the_layers_of_an_embedder():
    """The order of the steps and the meaning of each parameter: against torch.nn itself."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 9, 64)
    lengths = torch.tensor([9, 1, 4, 7, 2])
    linear, norm = torch.nn.Linear(64, 32), torch.nn.LayerNorm(32, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mask = (torch.arange(9) < lengths[:, None]).float()
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(norm(linear(pooled)), dim=-1)
        got = embed_epilogue(
            hidden, lengths=lengths, pooling="mean", weight=linear.weight, bias=linear.bias,
            ln_eps=norm.eps, ln_weight=norm.weight, ln_bias=norm.bias, normalize=True,
        ).out  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_autocast_does_not_reach_inside(impl):
    call = make_call([5, 2, 9], 40, 260, pooling="mean")
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(embed_epilogue(**call, impl=impl).out, call)


# --------------------------------------------------------------------------------------------- storing


def stored_values(got):
    """[R, D] float64: what the stored rows stand for."""
    rows = got.out.double() - (128 if got.out.dtype == torch.uint8 else 0)
    return rows if got.scale is None else rows * got.scale.double()[:, None]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stored", ["bf16", "int8", "uint8"])
def test_stored_rows_are_the_float_rows_rounded(impl, stored):
    call = make_call([3, 1, 20, 5, 8], 48, 24, pooling="mean", normalize=True)
    x = embed_epilogue(**call, impl=impl).out
    got = embed_epilogue(**call, dtype=STORED[stored], impl=impl)
    if stored == "bf16":
        assert got.scale is None
        # Triton's interpreter cuts bfloat16 off; the compiled kernel rounds (tests/test_triton_aot.py).
        torch.testing.assert_close(got.out, x.bfloat16(), rtol=0 if impl == "cpu" else 2**-7, atol=0)
    else:
        rows, scale = quantize_rows_reference(x)
        assert torch.equal(got.out.int() - (128 if stored == "uint8" else 0), rows.int())
        assert torch.equal(got.scale, scale)
        assert (rows.abs().amax(1) == 127).all()
    true_norm = (x.double() - stored_values(got)).norm(dim=1)
    assert (got.residual_norm >= true_norm).all()
    assert (got.residual_norm <= true_norm * (1 + 1e-4) + x.norm(dim=1) * 2e-7 + 2e-17).all()
    assert (got.norm >= stored_values(got).norm(dim=1)).all()
    assert (got.norm <= stored_values(got).norm(dim=1) * (1 + 1e-4)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    exponent=st.integers(-140, 60),
    dim=st.integers(1, 300),
    spread=st.floats(0, 30),
    seed=st.integers(0, 2**20),
    stored=st.sampled_from(["bf16", "int8"]),
    level=st.sampled_from(LEVELS),
)
def test_the_norms_are_never_too_small(exponent, dim, spread, seed, stored, level):
    """The certificate of a low-precision scan rests on it, whatever the magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, 4, dim) * torch.exp2(-spread * torch.rand(4, dim, generator=generator))
    x = torch.ldexp(x, torch.tensor(exponent))
    _native.force_cpu_level(level)
    try:
        got = embed_epilogue(x[:, None], dtype=STORED[stored], impl="cpu")
    finally:
        _native.force_cpu_level("")
    true_norm = (x.double() - stored_values(got)).norm(dim=1)
    assert (got.residual_norm.double() >= true_norm).all()
    assert (got.norm.double() >= stored_values(got).norm(dim=1)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("panel_rows", "group"), [(48, 1), (48, 2), (16, 4), (3, 5)])
def test_panels_hold_what_rows_hold(impl, stored, panel_rows, group):
    """The search layout, dimensions in groups; rows that are not named stay as they were."""
    call = make_call([2, 3, 1, 4, 2, 2], 30, 22)
    rows = embed_epilogue(**call, dtype=STORED[stored], impl=impl)
    row_ids = torch.tensor([97, 0, 49, 48, 5, 140])
    panels = -(-150 // panel_rows)
    out = torch.full((panels, -(-22 // group), panel_rows, group), 7).to(STORED[stored])
    scale, residual, norm = torch.full((3, panels * panel_rows), 7.0)
    whole = "int8" in stored
    embed_epilogue(
        **call, out=out, row_ids=row_ids, residual_norm=residual, norm=norm, scale=scale if whole else None,
        impl=impl,
    )  # fmt: skip
    assert torch.equal(rows_of(out, 22)[row_ids], rows.out)
    if stored != "f32":
        assert torch.equal(residual[row_ids], rows.residual_norm)
        assert torch.equal(norm[row_ids], rows.norm)
    if whole:
        assert torch.equal(scale[row_ids], rows.scale)
    everything = out.transpose(1, 2).flatten(2).flatten(0, 1)
    others = torch.ones(panels * panel_rows, dtype=torch.bool)
    others[row_ids] = False
    assert (everything[others] == 7).all()
    assert (residual[others] == 7).all()
    assert (norm[others] == 7).all()
    # What D does not fill of a last group stands for 0.
    assert (everything[row_ids, 22:] == (128 if stored == "uint8" else 0)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", [22, 128])
def test_panels_are_the_ones_of_an_index(impl, dtype, dim):
    """Bit for bit what MipsIndex makes of the same rows, so that a refresh may write into its storage."""
    x = random(torch.Generator().manual_seed(3), 60, dim)
    x[7] = 0
    x[8] *= 1e-33
    x[9, 0] = 1e-39
    slab = Slab.new(dtype, dim, 60, None)
    assert not slab.append(x.numpy()).any()
    ours = Slab.new(dtype, dim, 60, None)
    out = torch.from_numpy(ours.panels)
    out = out.view(torch.bfloat16) if dtype == "bfloat16" else out
    bounds = {}
    if dtype != "float32":
        bounds = {name: torch.from_numpy(getattr(ours, name)) for name in ("residual_norm", "norm")}
    if dtype == "int8":
        bounds["scale"] = torch.from_numpy(ours.scale)
    # Other rows of the last panel keep what they held: here, that they do not exist.
    ours.panels[:], expected = slab.panels, slab.panels.copy()
    row_ids = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    out[:, :, :, :].flatten()[: 48 * dim] = 3  # the first panel must be written in full
    embed_epilogue(x[row_ids][:, None], out=out, row_ids=row_ids, impl=impl, **bounds)
    if impl == "cpu" or dtype != "bfloat16":
        assert np.array_equal(ours.panels.view(np.uint8), expected.view(np.uint8))
    for name, bound in bounds.items():
        theirs = getattr(slab, name)[:60]
        if name == "scale":
            assert np.array_equal(bound.numpy()[:60], theirs)
        elif impl == "cpu" or dtype != "bfloat16":
            assert (bound.numpy()[:60] >= theirs * (1 - 1e-6)).all()
            assert (
                bound.numpy()[:60] <= theirs * (1 + 1e-4) + np.linalg.norm(x, axis=1) * 3e-7 + 1e-16
            ).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_rows_land_where_row_ids_says(impl):
    call = make_call([2, 3, 1], 8)
    rows = embed_epilogue(**call, impl=impl).out
    buffer = torch.full((9, 12), 7.0)
    out = buffer[:, 2:10]  # rows that are contiguous, in a wider table
    result = embed_epilogue(**call, out=out, row_ids=torch.tensor([8, 0, 3]), impl=impl)
    assert result.out is out
    assert torch.equal(out[[8, 0, 3]], rows)
    assert (out[[1, 2, 4, 5, 6, 7]] == 7).all()
    assert (buffer[:, :2] == 7).all()
    assert (buffer[:, 10:] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_int8_cannot_hold_say_so(impl):
    x = torch.zeros(4, 1, 20)
    x[1, 0, 3] = 1e-33
    x[2, 0, 3] = math.nan
    x[3, 0, 3] = math.inf
    with (
        pytest.warns(RuntimeWarning) if impl == "triton" else contextlib.nullcontext()
    ):  # numpy's, in the interpreter
        got = embed_epilogue(x, dtype=torch.int8, impl=impl)
    assert (got.out[:2] == 0).all()
    assert got.residual_norm[0] < 1e-16
    assert 1e-33 <= got.residual_norm[1] < 1e-16
    assert not got.residual_norm[2:].isfinite().any()


# ----------------------------------------------------------------------------- what must not change a bit


def test_a_row_does_not_depend_on_its_pack_nor_on_the_threads(level):
    lengths = [5, 33, 1, 18, 64, 2, 9, 9, 40, 7, 100, 3, 21, 8, 16, 15, 17, 6, 4, 50]
    call = make_call(lengths, 264, 100, pooling="mean", normalize=True)
    whole = embed_epilogue(**call, dtype=torch.int8, impl="cpu")
    bounds = call["cu_seqlens"].tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        alone = call | {"hidden": call["hidden"][start:stop], "cu_seqlens": torch.tensor([0, stop - start])}
        got = embed_epilogue(**alone, dtype=torch.int8, impl="cpu")
        assert all(torch.equal(a[0], b[row]) for a, b in zip(got, whole))
    before = torch.get_num_threads()
    big = make_call([60] * 200, 264, 100, pooling="mean")
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(embed_epilogue(**big, impl="cpu").out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_views_and_unaligned_memory(impl):
    call = make_call([4, 4, 4], 24, 10, ragged=False)
    expected = embed_epilogue(**call, impl=impl).out
    rows, tokens, width = call["hidden"].shape
    memory = torch.full((rows * 2 * (tokens + 1) * (width + 3) + 1,), math.nan)
    view = memory[1:].view(rows * 2, tokens + 1, width + 3)[::2, 1:, 1 : width + 1]
    view.copy_(call["hidden"])
    assert view.data_ptr() % 16 != 0
    weight = torch.empty(10, 48)[:, ::2].copy_(call["weight"])
    got = embed_epilogue(**call | {"hidden": view, "weight": weight}, impl=impl).out
    assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("ragged", [True, False])
def test_an_empty_pack_writes_nothing(impl, ragged):
    call = make_call([], 8, 4, ragged=ragged)
    out, residual, scale = torch.ones(3, 4, dtype=torch.int8), torch.ones(3), torch.ones(3)
    embed_epilogue(**call, out=out, scale=scale, residual_norm=residual, impl=impl)
    assert (out == 1).all()
    assert (residual == 1).all()
    assert embed_epilogue(**call, impl=impl).out.shape == (0, 4)


def test_tokens_after_the_last_block_are_never_read():
    call = make_call([3, 5], 16, pooling="mean")
    padded = call | {"hidden": torch.cat([call["hidden"], torch.full((9, 16), math.nan)])}
    assert torch.equal(embed_epilogue(**padded).out, embed_epilogue(**call).out)


# ------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("stored", ["f32", "int8"])
def test_the_op_is_registered_soundly(stored):
    call = make_call([3, 1, 2], 8, 5)
    int8 = stored == "int8"
    arguments = (
        call["hidden"], call["cu_seqlens"], torch.tensor([2, 0, 3]), call["weight"], call["bias"],
        call["ln_weight"], call["ln_bias"], torch.zeros(4, 5, dtype=STORED[stored]),
        torch.zeros(4) if int8 else None, torch.zeros(4) if int8 else None, torch.zeros(4), True, True, 1e-3,
        True, "cpu",
    )  # fmt: skip
    torch.library.opcheck(embed_epilogue_op, arguments)


def test_torch_compile_keeps_it_in_one_graph():
    call = make_call([3, 1, 2], 8, 5)
    compiled = torch.compile(
        functools.partial(embed_epilogue, dtype=torch.bfloat16), backend="aot_eager", fullgraph=True
    )
    with torch.inference_mode():
        got, expected = compiled(**call), embed_epilogue(**call, dtype=torch.bfloat16)
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.residual_norm, expected.residual_norm)


def test_a_gradient_is_refused_by_name():
    call = make_call([3, 1], 8, 5)
    call["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        embed_epilogue(**call)
    with torch.no_grad():
        assert not embed_epilogue(**call).out.requires_grad


# ----------------------------------------------------------------------------------- the user's mistakes

GOOD = make_call([3, 1, 4], 8, 5)
PADDED = make_call([3, 1, 4], 8, 5, ragged=False)


@pytest.mark.parametrize(
    ("call", "change", "error", "match"),
    [
        (GOOD, {"hidden": torch.zeros(8, 8, dtype=torch.int32)}, TypeError, "hidden: expected"),
        (GOOD, {"hidden": torch.zeros(8)}, ValueError, "hidden: expected"),
        (GOOD, {"hidden": torch.zeros(8, 8).t()[:, :8].contiguous().t()}, ValueError, "contiguous last"),
        (GOOD, {"cu_seqlens": torch.tensor([0, 3, 3, 8])}, ValueError, "got 0 for block 1"),
        (GOOD, {"cu_seqlens": torch.tensor([0, 4, 3, 8])}, ValueError, "got -1 for block 1"),
        (GOOD, {"cu_seqlens": torch.tensor([0, 3, 4, 9])}, ValueError, "tokens within"),
        (GOOD, {"cu_seqlens": torch.tensor([-1, 3, 4, 8])}, ValueError, "tokens within"),
        (GOOD, {"cu_seqlens": torch.tensor([0.0, 3, 4, 8])}, TypeError, "cu_seqlens: expected"),
        (GOOD, {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, ValueError, "no element"),
        (GOOD, {"lengths": torch.tensor([3, 1, 4])}, ValueError, "beside cu_seqlens"),
        (PADDED, {"lengths": torch.tensor([3, 0, 4])}, ValueError, "got 0 for block 1"),
        (PADDED, {"lengths": torch.tensor([3, 1, 7])}, ValueError, "tokens within"),
        (PADDED, {"lengths": torch.tensor([3, 1])}, ValueError, "lengths: expected"),
        (GOOD, {"pooling": "max"}, ValueError, "pooling: expected"),
        (GOOD, {"weight": torch.zeros(5, 7)}, ValueError, "weight: expected"),
        (GOOD, {"weight": None}, ValueError, "bias: expected None without weight"),
        (GOOD, {"bias": torch.zeros(4)}, ValueError, "bias: expected"),
        (GOOD, {"ln_eps": None}, ValueError, "ln_weight: expected None without ln_eps"),
        (GOOD, {"ln_eps": -1.0}, ValueError, "ln_eps: expected"),
        (GOOD, {"ln_eps": math.nan}, ValueError, "ln_eps: expected"),
        (GOOD, {"out": torch.zeros(3, 5), "norm": torch.zeros(2)}, ValueError, "norm: expected"),
        (GOOD, {"dtype": torch.float16}, TypeError, "dtype: expected"),
        (GOOD, {"out": torch.zeros(3, 6)}, ValueError, "out: expected"),
        (GOOD, {"out": torch.zeros(2, 5)}, ValueError, "room for 3 rows"),
        (GOOD, {"out": torch.zeros(3, 5).t().contiguous().t()}, ValueError, "contiguous rows"),
        (GOOD, {"out": torch.zeros(3, 5), "dtype": torch.int8}, TypeError, "dtype: expected that of out"),
        (GOOD, {"out": torch.zeros(3, 5, dtype=torch.int8)}, ValueError, "scale: expected"),
        (GOOD, {"out": torch.zeros(3, 5), "scale": torch.zeros(3)}, ValueError, "only int8 and uint8"),
        (GOOD, {"out": torch.zeros(1, 2, 4, 2)}, ValueError, "in groups of 2"),
        (GOOD, {"out": torch.zeros(3, 5), "residual_norm": torch.zeros(2)}, ValueError, "residual_norm:"),
        (GOOD, {"out": torch.zeros(3, 5), "residual_norm": torch.zeros(6)[::2]}, ValueError, "contiguous"),
        (GOOD, {"row_ids": torch.arange(3)}, ValueError, "out: expected a tensor"),
        (GOOD, {"out": torch.zeros(9, 5), "row_ids": torch.tensor([0, 9, 1])}, ValueError, "row < 9, got 9 for block 1"),
        (GOOD, {"out": torch.zeros(9, 5), "row_ids": torch.tensor([0, -1, 1])}, ValueError, "got -1 for block 1"),
        (GOOD, {"out": torch.zeros(9, 5), "row_ids": torch.tensor([4, 0, 4])}, ValueError, "got 4 twice"),
        (GOOD, {"out": torch.zeros(9, 5), "row_ids": torch.tensor([4, 0])}, ValueError, "row_ids: expected"),
        (GOOD, {"out": torch.zeros(3, 5).to("meta")}, ValueError, "out: expected"),
        (GOOD, {"impl": "cuda"}, ValueError, "impl: expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(call, change, error, match):
    with pytest.raises(error, match=match):
        embed_epilogue(**{**call, **change})


def test_triton_runs_or_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"triton: the tensors are on the CPU") as error:
        embed_epilogue(**GOOD, impl="triton")
    assert "cpu: can take this call" in str(error.value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "UNAVAILABLE", "Triton is not installed (No module named 'triton')")
    with pytest.raises(ValueError, match=r"triton: Triton is not installed"):
        embed_epilogue(**GOOD, impl="triton")


def test_auto_takes_the_native_kernel_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    calls = []
    monkeypatch.setattr(_native, "embed_epilogue_cpu", lambda **kwargs: calls.append(kwargs))
    embed_epilogue(**GOOD)
    assert len(calls) == 1
    double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in GOOD.items()}
    embed_epilogue(**double)  # float64 is the reference's alone
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"cpu: it takes no torch.float64"):
        embed_epilogue(**double, impl="cpu")


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("dtype", HIDDEN)
@pytest.mark.parametrize("dim", [None, 128, 256, 768])
@pytest.mark.parametrize("stored", STORED)
def test_gpu_is_right(monkeypatch, dtype, pooling, dim, stored):
    monkeypatch.delenv("TRITON_INTERPRET")
    call = make_call(
        [288, 1, 17, 64, 130] * 9, 768, dim, dtype=HIDDEN[dtype], pooling=pooling, normalize=True
    )
    there = {k: v.cuda() if torch.is_tensor(v) else v for k, v in call.items()}
    got = embed_epilogue(**there, dtype=STORED[stored])
    truth = reference(call, torch.float64)
    if stored == "f32":
        assert (got.out.cpu() - truth).abs().max() < 1e-5
        return
    got = StoredRows(*(None if t is None else t.cpu() for t in got))
    distance = (truth - stored_values(got)).norm(dim=1)
    assert (distance <= got.residual_norm + 1e-5).all()
    assert (got.residual_norm <= distance + 1e-5).all()


@pytest.mark.gpu
@needs_triton
def test_gpu_follows_the_stream_and_a_graph(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    call = make_call([40, 3, 128], 768, 128, dtype=torch.bfloat16, pooling="mean")
    there = {k: v.cuda() if torch.is_tensor(v) else v for k, v in call.items()}
    expected = embed_epilogue(**there).out.clone()
    out = torch.zeros_like(expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        embed_epilogue(**there, out=out)
    stream.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embed_epilogue(**there, out=out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@needs_triton
def test_gpu_survives_offsets_and_rows_that_do_not_exist(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    call = make_call([4, 4, 4], 64, 32, dtype=torch.bfloat16)
    there = {k: v.cuda() if torch.is_tensor(v) else v for k, v in call.items()}
    there["cu_seqlens"] = torch.tensor([0, 4, 4, 99], device="cuda")
    out = torch.zeros(3, 32, device="cuda")
    embed_epilogue(**there, out=out, row_ids=torch.tensor([0, 1, 2], device="cuda"))
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()
    embed_epilogue(**there, out=out.zero_(), row_ids=torch.tensor([-1, 3, 10**12], device="cuda"))
    assert (out == 0).all()
