"""linear_marginal_cross_entropy: values, gradients, registration, memory, edges; every CPU level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_good_as_torch
from torch.utils.checkpoint import checkpoint

import realm_fast as rf
from realm_fast import _native
from realm_fast.ops.linear_marginal_ce import (
    NOT_COUNTED,
    linear_gold_backward_op,
    linear_gold_op,
    linear_marginal_cross_entropy_reference,
)

INF, NAN = float("inf"), float("nan")
LEVELS = ["token", "sequence"]
REDUCTIONS = ["mean", "sum", "none"]
NAMES = ("hidden", "weight", "bias", "scores")


def make(shape=(3, 4, 5, 24, 61), dtype=torch.float64, seed=0, ragged=True):
    """hidden, weight, bias, labels, scores; ragged: some positions ignored, a query ignored, slots absent."""
    batch, candidates, positions, width, vocab = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, candidates, positions, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * 2 * width**-0.5
    bias = torch.randn(vocab, generator=g)
    labels = torch.randint(vocab, (batch, positions), generator=g)
    scores = torch.randn(batch, candidates, generator=g, dtype=torch.float64)
    if ragged:
        labels[torch.rand(batch, positions, generator=g) < 0.3] = -100
        if batch > 1:
            labels[1] = -100
        if candidates > 2:
            scores[::2, candidates - 1] = -INF
    scores = scores if dtype == torch.float64 else scores.float()
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        bias.to(dtype).requires_grad_(),
        labels,
        scores.requires_grad_(),
    )


def differentiable(inputs):
    return [t for t in (*inputs[:3], inputs[4]) if t is not None and t.requires_grad]


def upstream_like(loss, seed=1):
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        loss
    )


def loss_and_gradients(function, inputs, **options):
    loss = function(*inputs, **options)
    return loss, torch.autograd.grad((loss * upstream_like(loss)).sum(), differentiable(inputs))


def double(inputs):
    return tuple(
        None if t is None else t if not t.is_floating_point() else t.detach().double().requires_grad_()
        for t in inputs
    )


def sizes_of_terms(inputs, loss, reduction):
    """What the terms of each gradient, which may cancel, can be as large as: g (softmax - onehot) x, |g| <= w."""
    hidden, weight, _, labels, _ = (None if t is None else t.detach() for t in inputs)
    w = upstream_like(loss).abs().max().item() if loss.numel() else 0.0
    w /= max(1, int((labels != -100).any(-1).sum())) if reduction == "mean" else 1
    largest = {"hidden": weight, "weight": hidden}
    sizes = {name: w * t.abs().max().item() if t.numel() else 0.0 for name, t in largest.items()}
    return {**sizes, "bias": w, "scores": 1.0}


def assert_right(inputs, impl, **options):
    """Loss and gradients: error at most twice that of same-dtype eager torch."""
    reference = linear_marginal_cross_entropy_reference
    plain = {key: value for key, value in options.items() if key != "chunk_bytes"}
    truth, d_truth = loss_and_gradients(reference, double(inputs), **plain)
    eager, d_eager = loss_and_gradients(reference, inputs, **plain)
    actual, d_actual = loss_and_gradients(rf.linear_marginal_cross_entropy, inputs, impl=impl, **options)
    assert_as_good_as_torch(actual, truth, eager, what="loss", scale=1.0)
    scales = sizes_of_terms(inputs, actual, plain.get("reduction", "mean"))
    for name, tensor, a, e, t in zip(
        NAMES if inputs[2] is not None else NAMES[:2] + NAMES[3:],
        differentiable(inputs),
        d_actual,
        d_eager,
        d_truth,
        strict=True,
    ):
        assert a.dtype == tensor.dtype
        assert_as_good_as_torch(a, t, e, what=f"d {name}", scale=scales[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(3, 8, 10, 128, 1009), (2, 1, 1, 33, 7), (1, 5, 3, 100, 385), (4, 6, 4, 48, 768)],
)
def test_against_float64(cpu_level, shape, dtype):
    assert_right(make(shape, dtype), "cpu", chunk_bytes=200_000)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", ["cpu", "blas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_reduction_under_any_upstream_gradient(impl, level, reduction, dtype):
    assert_right(make((3, 4, 5, 40, 301), dtype), impl, level=level, reduction=reduction, chunk_bytes=60_000)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 4), st.integers(1, 9), st.integers(0, 7), st.integers(1, 70), st.integers(1, 500)
    ),
    level=st.sampled_from(LEVELS),
    reduction=st.sampled_from(REDUCTIONS),
    with_bias=st.booleans(),
    impl=st.sampled_from(["cpu", "blas"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    chunk_kilobytes=st.integers(16, 400),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shape, level, reduction, with_bias, impl, dtype, chunk_kilobytes, seed):
    inputs = list(make(shape, dtype, seed=seed))
    if not with_bias:
        inputs[2] = None
    assert_right(tuple(inputs), impl, level=level, reduction=reduction, chunk_bytes=chunk_kilobytes * 1024)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", ["cpu", "blas"])
def test_gradcheck(level, reduction, impl):
    hidden, weight, bias, labels, scores = make((2, 3, 2, 5, 11), ragged=False)
    labels[0, 1] = -100

    def run(*tensors):
        return rf.linear_marginal_cross_entropy(
            *tensors[:3], labels, tensors[3], level=level, reduction=reduction, impl=impl
        )

    assert torch.autograd.gradcheck(run, (hidden, weight, bias, scores))


@pytest.mark.parametrize("impl", ["cpu", "blas"])
def test_opcheck(impl):
    hidden, weight, bias, labels, _ = make((2, 3, 2, 8, 21), torch.float32)
    labels = torch.where(labels < 0, NOT_COUNTED, labels)[:, None].expand(-1, 3, -1).reshape(-1)
    arguments = (hidden.flatten(0, 2).detach().requires_grad_(), weight, bias, labels)
    torch.library.opcheck(linear_gold_op, (*arguments, torch.float32, 1 << 20, 0, impl))
    keep = 1 << 10 if impl == "cpu" else 0
    torch.library.opcheck(  # not the ones that compare results: bytes kept for nothing are not initialised
        linear_gold_op,
        (*arguments, torch.float32, 1 << 20, keep, impl),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    gold, *saved = (t.detach() for t in linear_gold_op(*arguments, torch.float32, 1 << 20, keep, impl))
    detached = tuple(t.detach() for t in arguments)
    rest = (_native.linear_gold_panel_rows(0), torch.float32, 1 << 20, impl, [True, True, True])
    torch.library.opcheck(linear_gold_backward_op, (torch.randn_like(gold), *detached, *saved, *rest))


def test_stats_are_the_by_products_of_the_same_pass():
    inputs = make((3, 4, 5, 24, 61), torch.float64)
    hidden, weight, bias, labels, scores = inputs
    for level in LEVELS:
        loss, stats = rf.linear_marginal_cross_entropy(*inputs, level=level, return_stats=True)
        assert not any(t.requires_grad for t in stats)
        mask = labels != -100
        present = ~torch.isneginf(scores)
        log_prob = torch.log_softmax(hidden @ weight.T + bias, -1)
        gold = log_prob.gather(-1, labels.clamp(min=0)[:, None, :, None].expand(-1, 4, -1, 1))[..., 0]
        counted = mask[:, None] & present[..., None]
        torch.testing.assert_close(stats.gold_log_prob, gold.masked_fill(~counted, 0))
        torch.testing.assert_close(stats.candidate_log_prob, torch.log_softmax(scores, -1))
        marginal, r = rf.marginal_log_likelihood(
            gold, torch.log_softmax(scores, -1), mask, level=level, return_responsibility=True
        )
        torch.testing.assert_close(stats.marginal, marginal)
        torch.testing.assert_close(stats.responsibility, r)
        null = gold[:, 0].masked_fill(~mask, 0)
        if level == "token":
            expected = (marginal - null).masked_fill(~mask, 0).sum() / mask.sum()
        else:
            expected = (marginal - null.sum(-1)).sum() / mask.any(-1).sum()
        torch.testing.assert_close(stats.retrieval_utility, expected)
        torch.testing.assert_close(loss, rf.linear_marginal_cross_entropy(*inputs, level=level))
        assert stats.dropped_mass == 0


@pytest.mark.parametrize("impl", ["cpu", "blas"])
def test_absent_slots_and_ignored_positions_are_never_looked_at(impl):
    inputs = make((3, 4, 5, 24, 61), torch.float32)
    hidden, _, _, labels, scores = inputs
    counted = (labels != -100)[:, None] & ~torch.isneginf(scores)[..., None]
    poisoned = hidden.detach().masked_fill(~counted[..., None], NAN).requires_grad_()
    expected, d_expected = loss_and_gradients(rf.linear_marginal_cross_entropy, inputs, impl=impl)
    actual, d_actual = loss_and_gradients(
        rf.linear_marginal_cross_entropy, (poisoned, *inputs[1:]), impl=impl
    )
    assert torch.equal(actual, expected)
    for a, e in zip(d_actual, d_expected, strict=True):
        assert torch.equal(a, e)
    assert (d_actual[0][~counted] == 0).all()
    assert (d_actual[3][torch.isneginf(scores)] == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "blas", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_predict_is_zero_with_zero_gradients(impl, reduction, level):
    hidden, weight, bias, labels, scores = make(dtype=torch.float32)
    labels = torch.full_like(labels, -100)
    loss = rf.linear_marginal_cross_entropy(
        hidden, weight, bias, labels, scores, impl=impl, reduction=reduction, level=level
    )
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), (hidden, weight, bias, scores)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 8, 9), (2, 3, 0, 8, 9)])
@pytest.mark.parametrize("impl", ["cpu", "blas", "reference"])
def test_empty_batches(shape, impl):
    inputs = make(shape, torch.float32)
    loss = rf.linear_marginal_cross_entropy(*inputs, impl=impl)
    assert loss == 0
    for gradient, tensor in zip(
        torch.autograd.grad(loss, differentiable(inputs)), differentiable(inputs), strict=True
    ):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "blas"])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias", "scores", "all_absent"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity_never_become_a_number(impl, where, bad):
    tensors = [t.detach().clone() for t in make(dtype=torch.float32, ragged=False)]
    hidden, weight, bias, _, scores = tensors
    if where == "hidden":
        hidden[0, 1, 2, 3] = bad
    elif where == "weight":
        weight[7, 2] = bad
    elif where == "bias":
        bias[7] = bad
    elif where == "scores":
        scores[0, 1] = bad
    else:
        scores[0] = -INF
    for tensor in (hidden, weight, bias, scores):
        tensor.requires_grad_()
    loss = rf.linear_marginal_cross_entropy(*tensors, impl=impl, reduction="none")
    # An infinite weight makes logits of +inf or -inf; -inf is a word of probability 0, and no error.
    reference = linear_marginal_cross_entropy_reference(*tensors, reduction="none")
    assert torch.equal(torch.isnan(loss), torch.isnan(reference))
    touched = loss if where in ("weight", "bias") else loss[0, 2] if where == "hidden" else loss[0]
    assert torch.isnan(touched).any()
    assert torch.isnan(touched).all() or (where, bad) == ("weight", INF)
    if where not in ("weight", "bias"):
        assert torch.isfinite(loss[1:]).all()
        assert torch.isfinite(loss[0, :2]).all() == (where == "hidden")
    d_hidden, _, d_scores = torch.autograd.grad(loss.sum(), (hidden, weight, scores))
    assert torch.isnan(d_hidden[0]).any() or where == "all_absent"
    assert torch.isnan(d_scores[0]).any()


@pytest.mark.parametrize("impl", ["cpu", "blas"])
def test_words_ruled_out_by_the_bias(impl):
    hidden, weight, bias, labels, scores = make(ragged=False)
    bias = bias.detach().clone()
    banned = next(v for v in range(weight.shape[0]) if v not in labels)
    bias[banned] = -INF
    bias.requires_grad_()
    loss, gradients = loss_and_gradients(
        rf.linear_marginal_cross_entropy, (hidden, weight, bias, labels, scores), impl=impl
    )
    keep = torch.arange(weight.shape[0]) != banned
    smaller = (
        hidden,
        weight[keep].detach().requires_grad_(),
        bias[keep].detach().requires_grad_(),
        labels - (labels > banned).long(),
        scores,
    )
    expected, d_expected = loss_and_gradients(linear_marginal_cross_entropy_reference, smaller)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients[0], d_expected[0])
    torch.testing.assert_close(gradients[1][keep], d_expected[1])
    assert (gradients[1][banned] == 0).all()
    assert gradients[2][banned] == 0


def test_large_logit_offsets_cost_no_precision(cpu_level):
    """The softmax does not see a constant added to every logit; at 1e4, lse in float32 would lose 1e-3."""
    hidden, weight, bias, labels, scores = make((2, 4, 5, 32, 203), torch.float32)
    weight = (weight.detach() * 64).round().div(64).requires_grad_()
    hidden = (hidden.detach() * 8).round().div(8).requires_grad_()
    bias = torch.zeros_like(bias).requires_grad_()
    plain = loss_and_gradients(rf.linear_marginal_cross_entropy, (hidden, weight, bias, labels, scores))
    moved_bias = torch.full_like(bias, 8192.0).requires_grad_()  # all sums stay exact in float32
    moved = loss_and_gradients(rf.linear_marginal_cross_entropy, (hidden, weight, moved_bias, labels, scores))
    torch.testing.assert_close(moved[0], plain[0], rtol=1e-6, atol=1e-6)
    for a, e in zip(moved[1], plain[1], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_confident_true_class_in_bfloat16_does_not_cancel():
    """p near 1: softmax - onehot is formed in float32, so 1 - p survives."""
    hidden = torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16)
    hidden[..., 0] = 1.0
    weight = torch.zeros(17, 32, dtype=torch.bfloat16)
    weight[3, 0] = 12.0
    inputs = (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        None,
        torch.tensor([[3]]),
        torch.zeros(1, 1, requires_grad=True),
    )
    exact = double(inputs)
    truth = torch.autograd.grad(linear_marginal_cross_entropy_reference(*exact), exact[1])[0]
    actual = torch.autograd.grad(rf.linear_marginal_cross_entropy(*inputs), inputs[1])[0]
    torch.testing.assert_close(actual.double(), truth, rtol=2**-7, atol=0)  # two roundings to bfloat16


def test_results_do_not_depend_on_threads_or_repetition(cpu_level):
    inputs = make((3, 4, 5, 72, 1500), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            loss, gradients = loss_and_gradients(
                rf.linear_marginal_cross_entropy, inputs, chunk_bytes=300_000, impl="cpu"
            )
            results.append((loss, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kept_logits_change_nothing(cpu_level, dtype):
    inputs = make((3, 4, 5, 40, 301), dtype)
    everything = 4 * (60 + 16) * 400 * (2 if dtype == torch.float64 else 1)
    two_passes = {"impl": "cpu", "reduction": "none"}
    expected = loss_and_gradients(rf.linear_marginal_cross_entropy, inputs, **two_passes)
    for keep in (1, everything // 3, everything, 10 * everything):
        loss, gradients = loss_and_gradients(
            rf.linear_marginal_cross_entropy, inputs, keep_logits_bytes=keep, **two_passes
        )
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))
    # A scalar loss is not always computed in two passes: then its gradients are rounded in another order.
    for reduction in ("mean", "sum"):
        options = {"impl": "cpu", "reduction": reduction}
        plain = loss_and_gradients(rf.linear_marginal_cross_entropy, inputs, **options)
        loss, gradients = loss_and_gradients(
            rf.linear_marginal_cross_entropy, inputs, keep_logits_bytes=everything, **options
        )
        assert torch.equal(loss, plain[0])
        rtol, atol = {torch.float64: (1e-10, 1e-13), torch.float32: (1e-4, 1e-5)}.get(dtype, (0, 0))
        for a, b in zip(gradients, plain[1], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_kept_logits_are_not_read_for_other_rows_or_at_another_level():
    inputs = make((4, 4, 5, 40, 301), torch.float32, ragged=False)
    upstream = torch.zeros(4, 5)
    upstream[1:, 2] = 1.0  # three positions in twenty: recomputed for them alone
    plain = rf.linear_marginal_cross_entropy(*inputs, impl="cpu", reduction="none")
    kept = rf.linear_marginal_cross_entropy(*inputs, impl="cpu", reduction="none", keep_logits_bytes=1 << 20)
    expected, actual = (
        torch.autograd.grad((loss * upstream).sum(), differentiable(inputs), retain_graph=True)
        for loss in (plain, kept)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    expected = torch.autograd.grad(plain.sum(), differentiable(inputs))
    _native.force_cpu_level("generic")
    try:
        actual = torch.autograd.grad(kept.sum(), differentiable(inputs))
    finally:
        _native.force_cpu_level("")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("impl", ["cpu", "blas"])
def test_frozen_inputs_get_no_gradient_and_change_nothing(impl, needs):
    inputs = make(dtype=torch.float32)
    everything = torch.autograd.grad(
        rf.linear_marginal_cross_entropy(*inputs, impl=impl), differentiable(inputs)
    )
    frozen = [t.detach().requires_grad_(need) for t, need in zip(inputs[:3], needs, strict=True)]
    loss = rf.linear_marginal_cross_entropy(*frozen, *inputs[3:], impl=impl)
    index = needs.index(True)
    (gradient,) = torch.autograd.grad(loss, frozen[index])
    assert torch.equal(gradient, everything[index])


def test_dropping_rows_reports_their_mass_and_leaves_the_retriever_exact():
    inputs = make((6, 5, 4, 24, 61), torch.float64)
    exact = torch.autograd.grad(rf.linear_marginal_cross_entropy(*inputs), differentiable(inputs))
    threshold = 0.15
    loss, stats = rf.linear_marginal_cross_entropy(
        *inputs, drop_responsibility_below=threshold, return_stats=True
    )
    dropped = torch.autograd.grad(loss, differentiable(inputs))
    torch.testing.assert_close(loss, rf.linear_marginal_cross_entropy(*inputs))
    small = stats.responsibility < threshold
    mask = inputs[3] != -100
    mass = (stats.responsibility * small).sum(1)[mask].mean()
    torch.testing.assert_close(stats.dropped_mass, mass)
    assert 0 < mass < 0.5
    torch.testing.assert_close(dropped[3], exact[3])
    assert (dropped[0][small] == 0).all()
    torch.testing.assert_close(dropped[0][~small], exact[0][~small])
    # The oracle for weight: the rows that are left, in plain torch.
    r = (stats.responsibility * ~small).flatten()
    logits = inputs[0].flatten(0, 2) @ inputs[1].T + inputs[2]
    target = inputs[3].clamp(min=0)[:, None].expand(-1, 5, -1).reshape(-1)
    onehot = torch.nn.functional.one_hot(target, inputs[1].shape[0])
    d_logits = (logits.softmax(-1) - onehot) * (r / mask.sum())[:, None]
    torch.testing.assert_close(dropped[1], d_logits.T @ inputs[0].flatten(0, 2))


def test_autocast_reads_parameters_as_they_are():
    inputs = make((2, 4, 5, 64, 403), torch.float32)
    half = tuple(
        t if not t.is_floating_point() else t.detach().to(torch.bfloat16).float().requires_grad_()
        for t in inputs
    )
    truth = loss_and_gradients(linear_marginal_cross_entropy_reference, double(half))
    with torch.autocast("cpu", torch.bfloat16):
        eager = loss_and_gradients(linear_marginal_cross_entropy_reference, inputs)
        for impl in ("cpu", "blas"):
            loss, gradients = loss_and_gradients(rf.linear_marginal_cross_entropy, inputs, impl=impl)
            assert loss.dtype == torch.float32
            for a, e, t in zip(gradients, eager[1], truth[1], strict=True):
                assert a.dtype == torch.float32
                # Both round their inputs to bfloat16 (the truth has been given rounded ones).
                error, allowed = (a - t).abs().max(), 2 * (e - t).abs().max() + 8e-3 * t.abs().max()
                assert error <= allowed
    mixed = (inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:])
    with torch.autocast("cpu", torch.bfloat16):
        rf.linear_marginal_cross_entropy(*mixed).backward()
    assert mixed[0].grad.dtype == torch.bfloat16
    assert inputs[1].grad.dtype == torch.float32


def test_gradient_checkpointing_and_tied_weights():
    """The trunk's embedding is also the output weight: its gradient is the sum of both uses."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(61, 24)
    tokens = torch.randint(61, (3, 4, 5))
    labels, scores = torch.randint(61, (3, 5)), torch.randn(3, 4)

    def trunk(ids):
        return torch.tanh(embedding(ids))

    def loss_of(function):
        def run(ids):
            return function(trunk(ids), embedding.weight, None, labels, scores)

        return run

    expected = torch.autograd.grad(
        loss_of(linear_marginal_cross_entropy_reference)(tokens), embedding.weight
    )[0]
    loss = checkpoint(loss_of(rf.linear_marginal_cross_entropy), tokens, use_reentrant=False)
    (actual,) = torch.autograd.grad(loss, embedding.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_torch_compile():
    inputs = make(dtype=torch.float32)

    def run(hidden, weight, bias, labels, scores):
        loss, stats = rf.linear_marginal_cross_entropy(
            hidden, weight, bias, labels, scores, return_stats=True
        )
        return loss + 0 * stats.retrieval_utility

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, d_expected = loss_and_gradients(run, inputs)
    actual, d_actual = loss_and_gradients(compiled, inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(d_actual, d_expected, strict=True):
        torch.testing.assert_close(a, e)


def test_retained_graph_gives_the_same_gradient_twice():
    inputs = make(dtype=torch.float32)
    loss = rf.linear_marginal_cross_entropy(*inputs)
    first = torch.autograd.grad(loss, differentiable(inputs), retain_graph=True)
    second = torch.autograd.grad(loss, differentiable(inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_says_what_to_do():
    inputs = make((2, 3, 2, 5, 11))
    (d_hidden,) = torch.autograd.grad(rf.linear_marginal_cross_entropy(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*impl='reference'"):
        d_hidden.sum().backward()


def test_views_and_other_ignore_indices():
    hidden, weight, bias, labels, scores = make(dtype=torch.float32)
    expected = rf.linear_marginal_cross_entropy(hidden, weight, bias, labels, scores)
    turned = hidden.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strided = torch.stack([weight, weight], -1)[..., 0]
    actual = rf.linear_marginal_cross_entropy(
        turned, strided, bias, labels.masked_fill(labels == -100, -1), scores, ignore_index=-1
    )
    assert torch.equal(actual, expected)
    gradient = torch.autograd.grad(actual, weight)[0]
    assert torch.equal(gradient, torch.autograd.grad(expected, weight)[0])


@pytest.mark.parametrize("impl", ["cpu", "blas", "reference"])
@pytest.mark.parametrize("bad", [61, -1, 10**12, -(10**12)])
def test_labels_out_of_range(impl, bad):
    hidden, weight, bias, labels, scores = make(dtype=torch.float32)
    labels[0, 0] = bad
    with pytest.raises(ValueError, match=rf"labels: expected values in \[0, 61\) or ignore_index, got {bad}"):
        rf.linear_marginal_cross_entropy(hidden, weight, bias, labels, scores, impl=impl)


@pytest.mark.parametrize("impl", ["cpu", "blas", "reference"])
def test_the_mark_of_rows_that_do_not_count_is_no_label(impl):
    hidden, weight, bias, labels, scores = make(dtype=torch.float32)
    expected = rf.linear_marginal_cross_entropy(hidden, weight, bias, labels, scores, impl=impl)
    marked = labels.masked_fill(labels == -100, NOT_COUNTED)
    with pytest.raises(ValueError, match="labels: expected values in"):
        rf.linear_marginal_cross_entropy(hidden, weight, bias, marked, scores, impl=impl)
    loss = rf.linear_marginal_cross_entropy(
        hidden, weight, bias, marked, scores, ignore_index=NOT_COUNTED, impl=impl
    )
    assert torch.equal(loss, expected)


def test_bad_input_is_named():
    hidden, weight, bias, labels, scores = (t.detach() for t in make(dtype=torch.float32))

    def call(*arguments, **options):
        return rf.linear_marginal_cross_entropy(*arguments, **options)

    with pytest.raises(ValueError, match=r"hidden: expected \[B, K, M, H\]"):
        call(hidden[0], weight, bias, labels, scores)
    with pytest.raises(ValueError, match=r"weight: expected \[V, 24\] float32, got \[61, 23\]"):
        call(hidden, weight[:, :23], bias, labels, scores)
    with pytest.raises(TypeError, match=r"weight: expected .* float32, got .* bfloat16"):
        call(hidden, weight.bfloat16(), bias, labels, scores)
    with pytest.raises(ValueError, match=r"bias: expected \[61\]"):
        call(hidden, weight, bias[:60], labels, scores)
    with pytest.raises(TypeError, match=r"labels: expected \[3, 5\] int64"):
        call(hidden, weight, bias, labels.int(), scores)
    with pytest.raises(ValueError, match=r"retrieval_scores: expected \[3, 4\]"):
        call(hidden, weight, bias, labels, scores[:, :3])
    with pytest.raises(ValueError, match=r"weight: expected .* on cpu, got .* on meta"):
        call(hidden, weight.to("meta"), bias, labels, scores)
    with pytest.raises(ValueError, match="at least one candidate"):
        call(hidden[:, :0], weight, bias, labels, scores[:, :0])
    with pytest.raises(ValueError, match="at least one vocabulary entry"):
        call(hidden, weight[:0], None, labels, scores)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        call(hidden, weight, bias, labels, scores, reduction="average")
    with pytest.raises(ValueError, match="level: expected one of 'token', 'sequence'"):
        call(hidden, weight, bias, labels, scores, level="word")
    with pytest.raises(TypeError, match=r"retrieval_scores: expected \[3, 4\] .*, got .* int64"):
        call(hidden, weight, bias, labels, scores.nan_to_num(neginf=0).long())
    with pytest.raises(ValueError, match="chunk_bytes: expected an int >= 1, got 0"):
        call(hidden, weight, bias, labels, scores, chunk_bytes=0)
    with pytest.raises(TypeError, match="chunk_bytes: expected an int"):
        call(hidden, weight, bias, labels, scores, chunk_bytes=1e6)
    with pytest.raises(ValueError, match="keep_logits_bytes: expected an int >= 0, got -1"):
        call(hidden, weight, bias, labels, scores, keep_logits_bytes=-1)
    with pytest.raises(ValueError, match=r"drop_responsibility_below: expected 0 <= x < 1, got 1.5"):
        call(hidden, weight, bias, labels, scores, drop_responsibility_below=1.5)
    with pytest.raises(
        ValueError, match=r"impl='cuda' cannot take this call:\n  cuda: the tensors are on cpu"
    ):
        call(hidden, weight, bias, labels, scores, impl="cuda")


@pytest.mark.parametrize("impl", ["cpu", "blas"])
def test_too_small_a_chunk_says_the_least_that_would_do(impl):
    inputs = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"chunk_bytes: expected at least (\d+)") as caught:
        rf.linear_marginal_cross_entropy(*inputs, chunk_bytes=100, impl=impl).backward()
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert_right(inputs, impl, chunk_bytes=least)


def test_the_logits_are_never_held():
    """The largest tensor of either pass, seen through torch's allocator, against [B, K, M, V] logits."""
    shape = (4, 8, 10, 32, 16000)
    inputs = make(shape, torch.float32, ragged=False)
    logits_bytes = 4 * 320 * 16000
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        rf.linear_marginal_cross_entropy(*inputs, chunk_bytes=1 << 20, impl="cpu").backward()
    largest = max(event.cpu_memory_usage for event in p.events())
    gradients = sum(t.numel() * 4 for t in differentiable(inputs))
    assert 0 < largest < gradients + (4 << 20) < logits_bytes / 2


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8, 10, 128, 1009), (2, 1, 1, 32, 8), (4, 6, 4, 48, 768)])
def test_cuda_against_float64(shape, dtype, level, reduction):
    inputs = make(shape, dtype)
    device = tuple(t.detach().cuda().requires_grad_(t.requires_grad) for t in inputs)
    options = {"level": level, "reduction": reduction}
    truth = loss_and_gradients(linear_marginal_cross_entropy_reference, double(inputs), **options)
    eager = loss_and_gradients(linear_marginal_cross_entropy_reference, inputs, **options)
    loss = rf.linear_marginal_cross_entropy(*device, impl="cuda", chunk_bytes=300_000, **options)
    assert_as_good_as_torch(loss.cpu(), truth[0], eager[0], what="loss", scale=1.0)
    upstream = upstream_like(loss.cpu()).cuda()
    gradients = torch.autograd.grad((loss * upstream).sum(), differentiable(device))
    for name, a, e, t in zip(NAMES, gradients, eager[1], truth[1], strict=True):
        assert_as_good_as_torch(a.cpu(), t, e, what=f"d {name}")


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_do_not_undo_each_others_rows(threads):
    """Slices of the vocabulary find the gold logits of neighbouring rows at the same time; none may get lost."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8, 3, 32, dtype=torch.float64), torch.randn(1000, 32, dtype=torch.float64)
    bias, labels = torch.zeros(1000, dtype=torch.float64), torch.randint(1000, (4, 3))
    arguments = (hidden, weight, bias, labels, torch.randn(4, 8, dtype=torch.float64))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: a lost value shows
    try:
        losses = {rf.linear_marginal_cross_entropy(*arguments, impl="cpu").item() for _ in range(500)}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert losses == {rf.linear_marginal_cross_entropy(*arguments, impl="cpu").item()}
