"""marginal_log_likelihood: values, gradients, registration, edges; every CPU level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_good_as_torch

import realm_fast as rf
from realm_fast import _native
from realm_fast.ops.marginal_lse import (
    marginal_log_likelihood_reference,
    marginal_lse_backward_op,
    marginal_lse_op,
    responsibility_reference,
)

INF, NAN = float("inf"), float("nan")
CPU_LEVELS = _native.available_cpu_levels()
LEVELS = ["token", "sequence"]


def make(batch, candidates, positions, dtype=torch.float64, seed=0, absent=True, offset=0.0):
    """gold, candidate, mask: some slots absent, some positions masked, one query masked altogether."""
    generator = torch.Generator().manual_seed(seed)
    gold = torch.randn(batch, candidates, positions, generator=generator) * 4 - 8 + offset
    scores = torch.randn(batch, candidates, generator=generator) * 2
    if absent and candidates > 2:
        scores[::2, candidates - 1] = -INF
    mask = torch.rand(batch, positions, generator=generator) > 0.3
    if batch > 1:
        mask[1] = False
    candidate = torch.log_softmax(scores, -1)
    return gold.to(dtype).requires_grad_(), candidate.to(dtype).requires_grad_(), mask


def gradients(marginal, inputs, seed=1):
    upstream = torch.randn(marginal.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((marginal * upstream.to(marginal.dtype)).sum(), inputs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8, 10), (2, 1, 1), (5, 3, 37), (4, 19, 16)])
def test_against_float64(cpu_level, shape, dtype, level):
    gold, candidate, mask = make(*shape, dtype)
    gold64, candidate64 = (t.detach().double().requires_grad_() for t in (gold, candidate))
    truth = marginal_log_likelihood_reference(gold64, candidate64, mask, level=level)
    eager = marginal_log_likelihood_reference(gold, candidate, mask, level=level)
    actual, r = rf.marginal_log_likelihood(
        gold, candidate, mask, level=level, impl="cpu", return_responsibility=True
    )
    assert_as_good_as_torch(actual, truth, eager, what="marginal")
    r_truth, r_eager = (
        responsibility_reference(g.detach(), c.detach(), mask, level=level)
        for g, c in ((gold64, candidate64), (gold, candidate))
    )
    assert_as_good_as_torch(r, r_truth, r_eager, what="responsibility")
    for what, a, e, t in zip(
        ("d gold", "d candidate"),
        gradients(actual, (gold, candidate)),
        gradients(eager, (gold, candidate)),
        gradients(truth, (gold64, candidate64)),
        strict=True,
    ):
        assert_as_good_as_torch(a, t, e, what=what)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck(level, impl):
    gold, candidate, mask = make(3, 4, 5)
    candidate = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)  # finite differences need no -inf

    def run(g, c):
        return rf.marginal_log_likelihood(g, c, mask, level=level, impl=impl)

    assert torch.autograd.gradcheck(run, (gold, candidate))


@pytest.mark.parametrize("level", LEVELS)
def test_opcheck(level):
    gold, candidate, mask = make(3, 4, 5)
    torch.library.opcheck(marginal_lse_op, (gold, candidate, mask, level))
    torch.library.opcheck(marginal_lse_op, (gold, candidate, None, level))
    _, r = marginal_lse_op(gold, candidate, mask, level)
    grad = torch.randn(3, 5, dtype=torch.float64) if level == "token" else torch.randn(3, dtype=torch.float64)
    torch.library.opcheck(
        marginal_lse_backward_op, (grad, r.detach(), gold.detach(), candidate.detach(), mask)
    )


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    candidates=st.integers(1, 20),
    positions=st.integers(0, 40),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 2**16),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
)
def test_any_shape(batch, candidates, positions, level, seed, offset):
    gold, candidate, mask = make(batch, candidates, positions, seed=seed, offset=offset)
    expected = marginal_log_likelihood_reference(gold, candidate, mask, level=level)
    actual = rf.marginal_log_likelihood(gold, candidate, mask, level=level)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        gradients(actual, (gold, candidate)), gradients(expected, (gold, candidate)), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offsets_do_not_overflow(cpu_level, offset):
    gold, candidate, _ = make(4, 8, 10, torch.float32, offset=offset)
    truth = marginal_log_likelihood_reference(gold.double(), candidate.double())
    actual, r = rf.marginal_log_likelihood(gold, candidate, return_responsibility=True, impl="cpu")
    assert (actual.double() - truth).abs().max() <= 2 * abs(offset) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(r.sum(1), torch.ones(4, 10))


@pytest.mark.parametrize("level", LEVELS)
def test_masked_positions_are_never_looked_at(cpu_level, level):
    gold, candidate, mask = make(3, 4, 6, torch.float32)
    poisoned = torch.where(mask[:, None], gold.detach(), NAN).requires_grad_()
    expected = rf.marginal_log_likelihood(gold, candidate, mask, level=level)
    actual = rf.marginal_log_likelihood(poisoned, candidate, mask, level=level)
    assert torch.equal(actual, expected)
    d_gold, d_candidate = gradients(actual, (poisoned, candidate))
    assert torch.isfinite(d_gold).all()
    assert torch.isfinite(d_candidate).all()
    assert (d_gold[~mask[:, None].expand_as(d_gold)] == 0).all()
    # The query with nothing masked in: 0, and no gradient at all.
    assert (actual[1] == 0).all()
    assert (d_gold[1] == 0).all()
    assert (d_candidate[1] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_absent_slots_are_never_looked_at(cpu_level, level):
    gold, candidate, mask = make(4, 5, 6, torch.float32)
    absent = torch.isneginf(candidate)[..., None]
    assert absent.any()
    poisoned = gold.detach().masked_fill(absent, NAN).requires_grad_()
    actual, r = rf.marginal_log_likelihood(poisoned, candidate, mask, level=level, return_responsibility=True)
    assert torch.equal(actual, rf.marginal_log_likelihood(gold, candidate, mask, level=level))
    assert (r[absent.expand_as(r)] == 0).all()
    d_gold, d_candidate = gradients(actual, (poisoned, candidate))
    assert (d_gold[absent.expand_as(d_gold)] == 0).all()
    assert (d_candidate[absent[..., 0]] == 0).all()
    assert torch.isfinite(d_candidate).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_impossible_under_every_candidate(level, impl):
    gold = torch.full((1, 3, 2), -INF, requires_grad=True)
    candidate = torch.log_softmax(torch.randn(1, 3), -1).requires_grad_()
    marginal = rf.marginal_log_likelihood(gold, candidate, level=level, impl=impl)
    assert torch.isneginf(marginal).all()
    for gradient in torch.autograd.grad(marginal.sum(), (gold, candidate)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nan_and_infinity_are_passed_on_to_their_own_position_only(impl):
    gold = torch.zeros(1, 3, 4)
    gold[0, 1, 0], gold[0, 2, 1] = NAN, INF
    gold.requires_grad_()
    candidate = torch.zeros(1, 3, requires_grad=True)
    marginal = rf.marginal_log_likelihood(gold, candidate, impl=impl)
    assert torch.isnan(marginal[0, 0])
    assert marginal[0, 1] == INF
    assert torch.isfinite(marginal[0, 2:]).all()
    (d_gold,) = torch.autograd.grad(marginal.sum(), gold)
    assert torch.isnan(d_gold[0, :, 0]).all()
    assert torch.isnan(d_gold[0, 2, 1])
    assert torch.isfinite(d_gold[0, :, 2:]).all()


def test_one_candidate_is_the_plain_likelihood(cpu_level):
    gold = torch.randn(3, 1, 5, requires_grad=True)
    candidate = torch.zeros(3, 1)
    marginal = rf.marginal_log_likelihood(gold, candidate, impl="cpu")
    assert torch.equal(marginal, gold[:, 0])
    (d_gold,) = torch.autograd.grad(marginal.sum(), gold)
    assert torch.equal(d_gold, torch.ones_like(gold))


def test_levels_agree_on_one_position(cpu_level):
    gold, candidate, _ = make(4, 6, 1, torch.float32)
    token = rf.marginal_log_likelihood(gold, candidate, level="token")
    sequence = rf.marginal_log_likelihood(gold, candidate, level="sequence")
    torch.testing.assert_close(token[:, 0], sequence)


def test_exp_error_bound(cpu_level):
    """Every 61st float32 in [-104, 89]: relative error below 2^-22.5, 0 below normal range, +inf above."""
    bits = np.concatenate([np.arange(0, 0x42D20000, 61), np.arange(0x80000000, 0xC2D20000, 61)])
    x = bits.astype(np.uint32).view(np.float32)
    x = x[(x >= -104) & (x <= 89)]
    x = np.concatenate([x, np.array([-INF, -1e38, -3e38, 0.0, -0.0, INF, 1e38], np.float32)])
    y = np.empty_like(x)
    _native.vector_exp(x.ctypes.data, y.ctypes.data, len(x))
    with np.errstate(over="ignore", under="ignore"):
        truth = np.exp(x.astype(np.float64))
    low, high = x < np.float32(-87.3365448), x > np.float32(88.7228394)
    assert (y[low] == 0).all()
    assert np.isinf(y[high]).all()
    middle = ~(low | high)
    assert np.max(np.abs(y[middle] / truth[middle] - 1)) < 2**-22.5
    y = np.empty(1, np.float32)
    _native.vector_exp(np.array([NAN], np.float32).ctypes.data, y.ctypes.data, 1)
    assert np.isnan(y[0])


@pytest.mark.parametrize("level", LEVELS)
def test_torch_compile(level):
    gold, candidate, mask = make(3, 4, 5, torch.float32)

    def run(g, c, m):
        return rf.marginal_log_likelihood(g, c, m, level=level).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(gold, candidate, mask), (gold, candidate))
    actual = torch.autograd.grad(compiled(gold, candidate, mask), (gold, candidate))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_inputs_may_be_views():
    gold, candidate, mask = make(3, 4, 5, torch.float32)
    strided = torch.stack([gold, gold], -1)[..., 0]
    turned = candidate.t().contiguous().t()
    assert torch.equal(
        rf.marginal_log_likelihood(strided, turned, mask.t().contiguous().t()),
        rf.marginal_log_likelihood(gold, candidate, mask),
    )


def test_double_backward_says_what_to_do():
    gold, candidate, _ = make(2, 3, 4)
    (d_gold,) = torch.autograd.grad(
        rf.marginal_log_likelihood(gold, candidate).sum(), gold, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*impl='reference'"):
        d_gold.sum().backward()


def test_bad_input_is_named():
    gold, candidate, mask = (t.detach() for t in make(2, 3, 4, torch.float32))
    with pytest.raises(ValueError, match=r"gold_log_prob: expected \[B, K, M\]"):
        rf.marginal_log_likelihood(gold[0], candidate)
    with pytest.raises(TypeError, match=r"gold_log_prob: expected .* got .* int64"):
        rf.marginal_log_likelihood(gold.long(), candidate)
    with pytest.raises(ValueError, match=r"candidate_log_prob: expected \[2, 3\]"):
        rf.marginal_log_likelihood(gold, candidate[:, :2])
    with pytest.raises(TypeError, match=r"candidate_log_prob: expected .* float32, got .* float64"):
        rf.marginal_log_likelihood(gold, candidate.double())
    with pytest.raises(TypeError, match=r"mask: expected .* bool"):
        rf.marginal_log_likelihood(gold, candidate, mask.float())
    with pytest.raises(ValueError, match=r"mask: expected \[2, 4\]"):
        rf.marginal_log_likelihood(gold, candidate, mask[:1])
    with pytest.raises(ValueError, match="at least one candidate"):
        rf.marginal_log_likelihood(gold[:, :0], candidate[:, :0])
    with pytest.raises(ValueError, match="level: expected one of 'token', 'sequence'"):
        rf.marginal_log_likelihood(gold, candidate, level="word")
    with pytest.raises(ValueError, match="impl: expected one of"):
        rf.marginal_log_likelihood(gold, candidate, impl="fast")
    with pytest.raises(
        ValueError, match=r"impl='cuda' cannot take this call:\n  cuda: the tensors are on cpu"
    ):
        rf.marginal_log_likelihood(gold, candidate, impl="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8, 10), (2, 1, 1), (5, 3, 37), (300, 70, 16), (0, 3, 4)])
def test_cuda_against_float64(shape, dtype, level):
    gold, candidate, mask = make(*shape, dtype)
    device = [t.detach().cuda() for t in (gold, candidate, mask)]
    device[0].requires_grad_()
    device[1].requires_grad_()
    gold64, candidate64 = (t.detach().double().requires_grad_() for t in (gold, candidate))
    truth = marginal_log_likelihood_reference(gold64, candidate64, mask, level=level)
    eager = marginal_log_likelihood_reference(gold, candidate, mask, level=level)
    actual, r = rf.marginal_log_likelihood(*device, level=level, impl="cuda", return_responsibility=True)
    assert_as_good_as_torch(actual.cpu(), truth, eager, what="marginal")
    r_truth, r_eager = (
        responsibility_reference(g.detach(), c.detach(), mask, level=level)
        for g, c in ((gold64, candidate64), (gold, candidate))
    )
    assert_as_good_as_torch(r.cpu(), r_truth, r_eager, what="responsibility")
    upstream = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d_actual = torch.autograd.grad((actual * upstream.to(actual)).sum(), device[:2])
    for what, a, e, t in zip(
        ("d gold", "d candidate"),
        d_actual,
        gradients(eager, (gold, candidate)),
        gradients(truth, (gold64, candidate64)),
        strict=True,
    ):
        assert_as_good_as_torch(a.cpu(), t, e, what=what)
