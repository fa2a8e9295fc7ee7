"""A scalar loss on the CPU makes its gradients along with its value: those of two passes and of float64."""

import itertools

import pytest
import torch
from test_linear_marginal_ce import NAMES, assert_right, differentiable, double, make
from torch._subclasses.fake_tensor import FakeTensorMode

import realm_fast as rf
from realm_fast.ops import linear_marginal_ce as lce

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ["mean", "sum"]
SHAPE = (7, 4, 5, 24, 301)
CHUNK_BYTES = {torch.float32: 60_000, torch.float64: 120_000}  # 32 rows of logits, of a hundred or so


@pytest.fixture
def chunks(monkeypatch):
    """How many rows each native backward call has had so far."""
    seen = []
    inner = lce._native_backward

    def recorded(hidden, weight, bias, rows, *rest, **options):
        seen.append(len(rows))
        return inner(hidden, weight, bias, rows, *rest, **options)

    monkeypatch.setattr(lce, "_native_backward", recorded)
    return seen


@pytest.fixture
def two_passes(monkeypatch):
    """The loss as it is without the one pass."""

    def loss(*inputs, **options):
        with monkeypatch.context() as patch:
            patch.setattr(lce, "_plan_one_pass", lambda *_: None)
            return rf.linear_marginal_cross_entropy(*inputs, **options)

    return loss


def in_chunks(inputs, **options):
    chunk_bytes = CHUNK_BYTES[inputs[0].dtype]
    return rf.linear_marginal_cross_entropy(*inputs, impl="cpu", chunk_bytes=chunk_bytes, **options)


def assert_close(actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        rtol, atol = (1e-4, 1e-6) if a.dtype == torch.float32 else (1e-10, 1e-13)
        torch.testing.assert_close(
            a, e, rtol=rtol, atol=atol, msg=lambda text, name=name: f"d {name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [SHAPE, (12, 1, 14, 33, 301)], ids=["K=4", "K=1"])
def test_several_chunks_make_the_loss_of_two_passes(
    cpu_level, chunks, two_passes, shape, level, reduction, dtype
):
    inputs = make(shape, dtype)
    options = {"level": level, "reduction": reduction}
    loss, stats = in_chunks(inputs, return_stats=True, **options)
    made = list(chunks)
    counted = (inputs[3] != -100)[:, None] & ~torch.isneginf(inputs[4])[..., None]
    assert len(made) >= 3  # before anybody asked for a gradient
    assert sum(made) == counted.sum()
    assert max(made) <= 32
    gradients = torch.autograd.grad(loss, differentiable(inputs))
    assert chunks == made  # and none since

    expected, expected_stats = two_passes(*inputs, impl="cpu", return_stats=True, **options)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
    assert not any(t.requires_grad for t in stats)
    assert_close(gradients, torch.autograd.grad(expected, differentiable(inputs)))
    assert_right(inputs, "cpu", chunk_bytes=CHUNK_BYTES[dtype], **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_upstream_gradient_also_on_a_retained_graph(two_passes, reduction):
    inputs = make(SHAPE, torch.float32)
    wanted = differentiable(inputs)
    loss = in_chunks(inputs, reduction=reduction)
    expected = torch.autograd.grad(two_passes(*inputs, impl="cpu", reduction=reduction), wanted)
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert_close(plain, expected)
    before = [gradient.clone() for gradient in plain]
    for upstream in (-2.5, 1.0, 1e-3, 0.0):
        actual = torch.autograd.grad(loss, wanted, torch.tensor(upstream), retain_graph=True)
        assert_close(actual, [gradient * upstream for gradient in before])
    assert all(torch.equal(a, b) for a, b in zip(plain, before, strict=True))  # what was given stays
    (3 * loss).backward(retain_graph=True)
    (-1 * loss).backward()
    for tensor, gradient in zip(wanted, before, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=4) if any(n[:3])])
def test_only_what_needs_a_gradient_gets_one(chunks, needs):
    inputs = make(SHAPE, torch.float32)
    everything = torch.autograd.grad(in_chunks(inputs), differentiable(inputs))
    hidden, weight, bias, scores = (
        t.detach().requires_grad_(need) for t, need in zip(differentiable(inputs), needs, strict=True)
    )
    chunks.clear()
    loss = in_chunks((hidden, weight, bias, inputs[3], scores))
    assert len(chunks) >= 3
    loss.backward()
    for tensor, need, expected in zip((hidden, weight, bias, scores), needs, everything, strict=True):
        assert torch.equal(tensor.grad, expected) if need else tensor.grad is None


def test_no_gradient_is_computed_where_none_can_be_asked_for(chunks):
    inputs = make(SHAPE, torch.float32)
    loss = in_chunks(inputs)
    chunks.clear()
    with torch.no_grad():
        assert torch.equal(in_chunks(inputs), loss)
    with torch.inference_mode():
        assert torch.equal(in_chunks(inputs), loss)
    assert torch.equal(in_chunks([t.detach() for t in inputs]), loss)
    scores = inputs[4].detach().requires_grad_()
    by_scores = in_chunks([*(t.detach() for t in inputs[:4]), scores])  # the retriever alone learns
    (d_scores,) = torch.autograd.grad(by_scores, scores)
    assert chunks == []
    torch.testing.assert_close(d_scores, torch.autograd.grad(loss, inputs[4])[0])


TWO_PASSES = {
    "none": {"reduction": "none"},
    "kept logits": {"keep_logits_bytes": 1},
    "dropped rows": {"drop_responsibility_below": 1e-6},
    "a budget below the largest group": {"chunk_bytes": 20_000},
    "blas": {"impl": "blas"},
}


@pytest.mark.parametrize("options", TWO_PASSES.values(), ids=TWO_PASSES)
def test_what_takes_two_passes(chunks, options):
    inputs = make(SHAPE, torch.float32)
    loss = rf.linear_marginal_cross_entropy(*inputs, **{"reduction": "sum"} | options).sum()
    assert chunks == []
    gradients = torch.autograd.grad(loss, differentiable(inputs))
    one_pass = in_chunks(inputs, reduction="sum")
    torch.testing.assert_close(loss, one_pass)
    assert_close(gradients, torch.autograd.grad(one_pass, differentiable(inputs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_take_two_passes(chunks, dtype):
    loss = rf.linear_marginal_cross_entropy(*make(SHAPE, dtype), impl="cpu")
    assert chunks == []
    loss.backward()
    assert chunks != []


def test_tensors_without_data_take_the_registered_ops():
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(t) for t in make(SHAPE, torch.float32)]
        loss = rf.linear_marginal_cross_entropy(*inputs, impl="cpu")
        gradients = torch.autograd.grad(loss, differentiable(inputs))
    assert [g.shape for g in gradients] == [t.shape for t in differentiable(inputs)]


def test_an_embedding_tied_to_the_output_weight(chunks):
    """One tensor, used before and in the loss: both gradients arrive, under an upstream gradient of 0.3."""
    _, weight, bias, labels, scores = make(SHAPE, torch.float32)
    tokens = torch.randint(301, SHAPE[:3], generator=torch.Generator().manual_seed(0))

    def gradient_of(function, weight, bias, scores):
        loss = 0.3 * function((torch.tanh(weight[tokens]), weight, bias, labels, scores))
        return torch.autograd.grad(loss, weight)[0]

    actual = gradient_of(in_chunks, weight, bias, scores)
    assert len(chunks) >= 3
    reference = gradient_of(
        lambda inputs: lce.linear_marginal_cross_entropy_reference(*inputs),
        *(t.detach().double().requires_grad_() for t in (weight, bias, scores)),
    )
    torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-6)


def test_inputs_changed_before_the_backward_pass_are_noticed():
    inputs = make(SHAPE, torch.float32)
    loss = in_chunks(inputs)
    with torch.no_grad():
        inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_says_what_to_do(name):
    inputs = make(SHAPE, torch.float64)
    wanted = dict(zip(NAMES, differentiable(inputs), strict=True))[name]
    upstream = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(in_chunks(inputs), wanted, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*impl='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias", "scores", "all absent"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nan_and_infinity_go_where_they_go_in_two_passes(chunks, two_passes, level, reduction, where, bad):
    tensors = [t.detach().clone() for t in make(SHAPE, torch.float32, ragged=False)]
    hidden, weight, bias, labels, scores = tensors
    if where == "hidden":
        hidden[0, 1, 2, 3] = bad
    elif where == "weight":
        weight[7, 2] = bad
    elif where == "bias":
        bias[labels[0, 0]] = bad
    elif where == "scores":
        scores[0, 1] = bad
    else:
        scores[0] = -INF
    for tensor in (hidden, weight, bias, scores):
        tensor.requires_grad_()
    options = {"level": level, "reduction": reduction}
    loss = in_chunks(tensors, **options)
    assert len(chunks) >= 3
    reference = lce.linear_marginal_cross_entropy_reference(*double(tensors), **options)
    absent_slot = where == "scores" and bad == -INF
    assert loss.isfinite() == reference.isfinite() == absent_slot
    expected = two_passes(*tensors, impl="cpu", **options)
    for a, e in zip(
        (loss, *torch.autograd.grad(loss, differentiable(tensors))),
        (expected, *torch.autograd.grad(expected, differentiable(tensors))),
        strict=True,
    ):
        assert torch.equal(a.isnan(), e.isnan())
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_many_chunks_do_not_depend_on_threads(cpu_level, chunks):
    inputs = make((16, 4, 5, 72, 1500), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            loss = rf.linear_marginal_cross_entropy(*inputs, chunk_bytes=130_000, impl="cpu")
            results.append((loss, *torch.autograd.grad(loss, differentiable(inputs))))
    finally:
        torch.set_num_threads(before)
    assert len(chunks) >= 5 * 10
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def most_at_once(profile):
    """The most bytes that torch's allocator had given out since the profile began."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("budget", [4 << 20, None])
def test_the_logits_stay_within_their_budget(chunks, budget):
    """Extra memory: the budget and what a chunk's rows need of hidden; by default less than a tenth of eager's."""
    inputs = make((16, 8, 10, 32, 16000), torch.float32, ragged=False)
    logits_bytes = 4 * 1280 * 16000
    extra = {}
    for impl in ("cpu", "reference"):
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            rf.linear_marginal_cross_entropy(*inputs, chunk_bytes=budget, impl=impl).backward()
        extra[impl] = most_at_once(profile) - sum(t.numel() * 4 for t in differentiable(inputs))
        for tensor in differentiable(inputs):
            tensor.grad = None
    assert len(chunks) >= 8
    allowed = (budget or logits_bytes // 8 + lce.CPU_CHUNK_BYTES // 4) + max(chunks) * 1024 + (1 << 18)
    assert max(chunks) * 16000 * 4 < extra["cpu"] < allowed
    assert extra["cpu"] < extra["reference"] / 10


def test_the_least_budget(chunks):
    """One pass from some budget on, never with more rows than fit; below the least of two passes, an error."""
    inputs = make(SHAPE, torch.float32)
    with pytest.raises(ValueError, match=r"chunk_bytes: expected at least (\d+)") as caught:
        rf.linear_marginal_cross_entropy(*inputs, chunk_bytes=100, impl="cpu").backward()
    least = int(str(caught.value).split("at least ")[1].split()[0])
    in_one_pass = []
    for chunk_bytes in (least, 2 * least, 4 * least, 8 * least, 64 * least):
        chunks.clear()
        loss = rf.linear_marginal_cross_entropy(*inputs, chunk_bytes=chunk_bytes, impl="cpu")
        in_one_pass.append(bool(chunks))
        assert max(chunks, default=0) * 4 * 301 <= chunk_bytes * 3 // 4
        loss.backward()
    assert not in_one_pass[0]
    assert in_one_pass[-1]
    assert in_one_pass == sorted(in_one_pass)
