"""mips_topk: values against float64, ties, edges, determinism, gradients, registration, bad input."""

import mmap
import pickle
import signal
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from strategies import KINDS, make_embeddings, searches
from tolerances import assert_as_good_as_torch
from topk_truth import assert_is_top_k, same

import realm_fast as rf
from realm_fast import _native
from realm_fast.ops.mips_topk import mips_topk, mips_topk_op, mips_topk_reference

LEVELS = _native.available_cpu_levels()


@pytest.fixture(params=LEVELS)
def level(request):
    _native.force_cpu_level(request.param)
    yield request.param
    _native.force_cpu_level("")


@pytest.fixture
def threads():
    """Sets torch's number of threads inside a test and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def forced(level: str, *args, **kwargs) -> rf.TopK:
    _native.force_cpu_level(level)
    try:
        return mips_topk(*args, impl="cpu", **kwargs)
    finally:
        _native.force_cpu_level("")


@settings(max_examples=120, deadline=None)
@given(search=searches())
def test_every_level_gives_the_true_top_k(search):
    for level in ("generic", "avx2", "avx512"):
        if level in LEVELS:
            result = forced(level, **search)
            assert_is_top_k(result, **search)
    assert_is_top_k(mips_topk(**search, impl="reference"), **search)


@settings(max_examples=60, deadline=None)
@given(search=searches())
def test_avx2_and_avx512_return_the_same_bits(search):
    results = [forced(level, **search) for level in ("avx2", "avx512") if level in LEVELS]
    assert all(same(results[0], other) for other in results[1:])


def test_exact_sums_agree_with_the_reference_to_the_last_tie(level):
    blocks = make_embeddings("integers", 5000, 6, 0)  # 5000 rows, about 100 different scores
    queries = make_embeddings("integers", 37, 6, 1)
    for k in (1, 10, 333, 5000, 5005):
        expected = mips_topk_reference(queries, blocks, k)
        result = mips_topk(queries, blocks, k)
        assert torch.equal(result.ids, expected.ids)
        assert torch.equal(result.scores, expected.scores)


def test_generic_scores_are_the_documented_chain_of_sums():
    queries, blocks = make_embeddings("normal", 3, 29, 0), make_embeddings("normal", 50, 29, 1)
    chain = torch.zeros(3, 50)
    for d in range(29):
        chain = chain + queries[:, d : d + 1] * blocks[None, :, d]
    result = forced("generic", queries, blocks, 50)
    assert torch.equal(result.scores, chain.gather(1, result.ids))


@pytest.mark.parametrize("num_queries", [1, 2, 3, 4, 5, 8, 9, 12, 31])
def test_every_width_of_the_last_group(level, num_queries):
    blocks, queries = make_embeddings("normal", 1000, 24, 2), make_embeddings("normal", num_queries, 24, 3)
    assert_is_top_k(mips_topk(queries, blocks, 7), queries, blocks, 7)


def test_a_score_does_not_depend_on_batch_threads_k_or_place(level, threads):
    blocks, queries = make_embeddings("normal", 3001, 45, 4), make_embeddings("normal", 21, 45, 5)
    threads(1)
    whole = mips_topk(queries, blocks, 30)
    for count in (2, 3):
        threads(count)
        assert same(mips_topk(queries, blocks, 30), whole)
    for split in (1, 2, 8, 13):
        parts = [mips_topk(part, blocks, 30) for part in queries.split(split)]
        assert same(rf.TopK(torch.cat([p.scores for p in parts]), torch.cat([p.ids for p in parts])), whole)
    few = mips_topk(queries, blocks, 4)
    assert same(few, rf.TopK(whole.scores[:, :4], whole.ids[:, :4]))
    shifted = mips_topk(queries, torch.cat([torch.full((11, 45), torch.nan), blocks]), 30)
    assert same(rf.TopK(shifted.scores, shifted.ids - 11), whole)


def test_many_rows_and_large_k_against_the_reference(level):
    blocks, queries = make_embeddings("integers", 40000, 4, 6), make_embeddings("integers", 9, 4, 7)
    for k in (100, 4096):
        expected = mips_topk_reference(queries, blocks, k)
        assert torch.equal(mips_topk(queries, blocks, k).ids, expected.ids)


def test_rows_beyond_one_segment_are_merged(level):
    """A pass addresses rows with 32 bits; more rows make several passes. Here a pass is made small."""
    blocks, queries = make_embeddings("integers", 2000, 5, 8), make_embeddings("integers", 6, 5, 9)
    expected = mips_topk_reference(queries, blocks, 40)
    scores, ids = torch.empty(6, 40), torch.empty(6, 40, dtype=torch.int64)
    for segment_rows in (48, 500, 1999):
        _native.mips_topk_rows(
            5, queries.data_ptr(), 6, blocks.data_ptr(), 2000, 5, "float32", 40, 0, 0, 2,
            scores.data_ptr(), ids.data_ptr(), max_segment_rows=segment_rows,
        )  # fmt: skip
        assert torch.equal(ids, expected.ids)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
def test_offsets_beyond_2_to_the_31(level):
    """Rows four million bytes apart: 2,500 of them span 10 GB, of which one page a row is ever touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2500 << 22, flags=flags)
    blocks = torch.frombuffer(memory, dtype=torch.float32).as_strided((2500, 4), (1 << 20, 1))
    blocks[2400:] = make_embeddings("normal", 100, 4, 0)
    queries = make_embeddings("normal", 3, 4, 1)
    assert 2400 << 20 > 2**31
    assert same(mips_topk(queries, blocks, 9), mips_topk(queries, blocks.clone(), 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_exactly(level, dtype):
    queries, blocks = (make_embeddings("normal", n, 33, n).to(dtype) for n in (9, 400))
    assert same(mips_topk(queries, blocks, 11), mips_topk(queries.float(), blocks.float(), 11))
    special = (
        torch.tensor([[0.0, 6e-8, -6.1e-5, 1.0, 65504.0, -torch.inf, torch.nan]]).to(dtype).T.contiguous()
    )
    one = torch.ones(1, 1, dtype=dtype)
    expected = mips_topk(one.float(), special.float(), 7)
    assert same(mips_topk(one, special, 7), expected)


def test_error_is_at_most_twice_torchs(level):
    queries, blocks = make_embeddings("normal", 32, 768, 10), make_embeddings("normal", 2000, 768, 11)
    result = mips_topk(queries, blocks, 50)
    truth = (queries.double() @ blocks.double().T).gather(1, result.ids)
    by_torch = (queries @ blocks.T).gather(1, result.ids)
    assert_as_good_as_torch(result.scores, truth, by_torch)


class TestSpecialValues:
    def test_nan_and_minus_infinity_are_never_returned_and_plus_infinity_is_first(self, level):
        blocks = torch.tensor([[1.0], [torch.nan], [-torch.inf], [torch.inf], [2.0], [torch.inf], [-5.0]])
        result = mips_topk(torch.ones(1, 1), blocks, 7)
        assert result.ids.tolist() == [[3, 5, 4, 0, 6, -1, -1]]
        assert result.scores[0, :5].tolist() == [torch.inf, torch.inf, 2.0, 1.0, -5.0]
        assert (result.scores[0, 5:] == -torch.inf).all()

    def test_a_nan_query_has_no_results_and_harms_no_other(self, level):
        queries, blocks = make_embeddings("normal", 10, 12, 0), make_embeddings("normal", 300, 12, 1)
        expected = mips_topk(queries, blocks, 5)
        queries[3, 4] = torch.nan
        result = mips_topk(queries, blocks, 5)
        assert (result.ids[3] == -1).all()
        rest = torch.arange(10) != 3
        assert same(
            rf.TopK(result.scores[rest], result.ids[rest]), rf.TopK(expected.scores[rest], expected.ids[rest])
        )

    def test_overflow_to_infinity_and_to_nothing(self, level):
        blocks = torch.tensor([[3e38, 3e38], [1.0, 1.0], [-3e38, -3e38]])
        result = mips_topk(torch.tensor([[2.0, 2.0]]), blocks, 3)
        assert result.ids.tolist() == [[0, 1, -1]]

    def test_negative_zero_ties_with_zero(self, level):
        blocks = torch.tensor([[-1e-30], [0.0], [1e-30], [-0.0]])  # the first product underflows to -0
        result = mips_topk(torch.tensor([[1e-30]]), blocks, 4)
        assert result.ids.tolist() == [[0, 1, 2, 3]]
        assert not result.scores.signbit().any()

    def test_denormals_are_not_flushed_whatever_the_caller_set(self, level):
        blocks, query = torch.tensor([[1e-40], [2e-40]]), torch.ones(1, 1)
        expected = mips_topk(query, blocks, 2)
        assert expected.ids.tolist() == [[1, 0]]
        torch.set_flush_denormal(True)
        try:
            result = mips_topk(query, blocks, 2)
        finally:
            torch.set_flush_denormal(False)
        assert same(result, expected)


class TestExclusion:
    def test_excluded_ids_are_not_returned_and_others_move_up(self, level):
        queries, blocks = make_embeddings("normal", 13, 8, 0), make_embeddings("normal", 200, 8, 1)
        best = mips_topk(queries, blocks, 6)
        result = mips_topk(queries, blocks, 3, exclude_ids=best.ids[:, [0, 2, 4]])
        assert torch.equal(result.ids, best.ids[:, [1, 3, 5]])
        one = mips_topk(queries, blocks, 5, exclude_ids=best.ids[:, 0].to(torch.int32))
        assert torch.equal(one.ids, best.ids[:, 1:])

    def test_excluding_everything_leaves_nothing(self, level):
        result = mips_topk(torch.ones(1, 2), torch.ones(3, 2), 2, exclude_ids=torch.tensor([[0, 1, 2, 2]]))
        assert (result.ids == -1).all()

    def test_minus_one_excludes_nothing(self, level):
        queries, blocks = make_embeddings("normal", 2, 3, 0), make_embeddings("normal", 9, 3, 1)
        nobody = mips_topk(queries, blocks, 4, exclude_ids=torch.full((2, 3), -1))
        assert same(nobody, mips_topk(queries, blocks, 4))


class TestLayouts:
    def test_views_are_read_as_they_are(self, level):
        storage, queries = make_embeddings("normal", 300, 40, 0), make_embeddings("normal", 5, 16, 1)
        for view in (
            storage[:, 3:19],
            storage[::3, 3:19],
            storage[:, :32:2],
            storage.T[:16].T,
            storage[:0, :16],
        ):
            assert same(mips_topk(queries, view, 4), mips_topk(queries, view.clone().contiguous(), 4))
        wide = make_embeddings("normal", 16, 5, 2).T  # column-major queries
        assert same(mips_topk(wide, storage[:, :16], 4), mips_topk(wide.contiguous(), storage[:, :16], 4))
        row = storage[:1, :16].expand(50, 16)  # stride 0
        assert mips_topk(queries, row, 3).ids.tolist() == [[0, 1, 2]] * 5

    def test_empty_sizes(self, level):
        assert mips_topk(torch.empty(0, 4), torch.ones(3, 4), 2).ids.shape == (0, 2)
        assert mips_topk(torch.ones(2, 4), torch.empty(0, 4), 2).ids.tolist() == [[-1, -1]] * 2
        assert mips_topk(torch.ones(2, 4), torch.ones(3, 4), 0).ids.shape == (2, 0)
        assert mips_topk(torch.ones(2, 0), torch.ones(3, 0), 2).ids.tolist() == [[0, 1]] * 2


class TestGradients:
    @pytest.mark.parametrize("k", [1, 5, 12])
    def test_equal_those_of_the_float64_reference(self, k):
        queries, blocks = make_embeddings("normal", 4, 6, 0), make_embeddings("normal", 10, 6, 1)
        excluded = torch.tensor([[0, 3]] * 4)
        weight = make_embeddings("normal", 4, k, 2)
        found = []
        for function, dtype in ((mips_topk, torch.float32), (mips_topk_reference, torch.float64)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in (queries, blocks)]
            scores = function(*leaves, k, exclude_ids=excluded).scores
            torch.where(scores > -torch.inf, scores * weight, 0.0).sum().backward()
            found.append([leaf.grad for leaf in leaves])
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs.float())

    def test_only_where_asked(self):
        queries, blocks = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
        mips_topk(queries, blocks, 3).scores.sum().backward()
        assert blocks.grad is None
        assert not mips_topk(queries.detach(), blocks, 3).scores.requires_grad

    def test_absent_slots_give_none(self):
        queries, blocks = torch.randn(2, 3, requires_grad=True), torch.empty(0, 3, requires_grad=True)
        scores = mips_topk(queries, blocks, 2).scores
        scores.backward(torch.ones_like(scores))
        assert (queries.grad == 0).all()
        assert blocks.grad.shape == (0, 3)


class TestRegistration:
    def test_opcheck(self):
        queries, blocks = torch.randn(3, 5, requires_grad=True), torch.randn(20, 5, requires_grad=True)
        torch.library.opcheck(mips_topk_op, (queries, blocks, 4, torch.tensor([[1], [2], [-1]])))
        torch.library.opcheck(mips_topk_op, (queries.detach(), blocks.detach(), 4, None))

    def test_under_torch_compile(self):
        @torch.compile(fullgraph=True)
        def loss(queries, blocks):
            scores, ids = mips_topk(queries, blocks, 5)
            return torch.logsumexp(scores, 1).sum(), ids

        queries, blocks = torch.randn(6, 7, requires_grad=True), torch.randn(90, 7)
        value, ids = loss(queries, blocks)
        value.backward()
        expected = queries.detach().clone().requires_grad_()
        result = mips_topk(expected, blocks, 5)
        torch.logsumexp(result.scores, 1).sum().backward()
        assert torch.equal(ids, result.ids)
        torch.testing.assert_close(queries.grad, expected.grad)

    def test_result_pickles(self):
        result = mips_topk(torch.randn(2, 3), torch.randn(5, 3), 2)
        assert same(pickle.loads(pickle.dumps(result)), result)


class TestBadInput:
    good = staticmethod(lambda: (torch.zeros(2, 3), torch.zeros(5, 3)))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"queries": torch.zeros(3)}, ValueError, r"queries: expected \[B, D\]"),
            ({"queries": [[1.0]]}, TypeError, "queries: expected"),
            (
                {"queries": torch.zeros(2, 3, dtype=torch.int64)},
                TypeError,
                "queries: expected .*got .* int64",
            ),
            ({"queries": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "queries: .*got .* float64"),
            ({"blocks": torch.zeros(5, 4)}, ValueError, r"blocks: expected \[N, 3\]"),
            ({"blocks": torch.zeros(5, 3, 1)}, ValueError, "blocks: expected"),
            ({"blocks": torch.zeros(5, 3, dtype=torch.bfloat16)}, TypeError, "blocks: expected .*float32"),
            ({"blocks": torch.zeros(5, 3, device="meta")}, ValueError, "blocks: expected .* on cpu"),
            ({"k": -1}, ValueError, "k: expected an int >= 0, got -1"),
            ({"k": 1.0}, TypeError, "k: expected an int"),
            ({"k": True}, TypeError, "k: expected an int"),
            (
                {"exclude_ids": torch.zeros(3, dtype=torch.int64)},
                ValueError,
                r"exclude_ids: expected \[2, E\]",
            ),
            ({"exclude_ids": torch.zeros(2)}, TypeError, "exclude_ids: expected .*int64"),
            ({"exclude_ids": [0, 1]}, TypeError, "exclude_ids: expected"),
            ({"exclude_ids": torch.tensor([[5], [0]])}, ValueError, "exclude_ids: .*5 blocks.*got 5"),
            ({"exclude_ids": torch.tensor([[-2], [0]])}, ValueError, "exclude_ids: .*got -2"),
            ({"impl": "gpu"}, ValueError, "impl: expected one of"),
        ],
    )
    @pytest.mark.parametrize("impl", ["cpu", "reference"])
    def test_is_named(self, change, error, message, impl):
        queries, blocks = self.good()
        arguments = {"queries": queries, "blocks": blocks, "k": 2, "impl": impl} | change
        with pytest.raises(error, match=message):
            mips_topk(**arguments)

    def test_an_implementation_that_cannot_take_the_call_says_why(self):
        queries, blocks = (t.to("meta") for t in self.good())
        with pytest.raises(ValueError, match="cpu: the tensors are on meta"):
            mips_topk(queries, blocks, 2, impl="cpu")

    def test_an_unknown_cpu_level_is_refused(self):
        with pytest.raises(ValueError, match="expected generic, avx2"):
            _native.force_cpu_level("sse9")


def test_other_python_threads_run_during_a_search(threads):
    threads(1)
    queries, blocks = torch.randn(256, 128), torch.randn(20000, 128)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        for _ in range(3):
            mips_topk(queries, blocks, 5)
        assert counted[0] > before + 10
    finally:
        stop.set()
        thread.join()


def test_ctrl_c_ends_a_long_search(threads):
    threads(2)
    queries, blocks = torch.randn(1024, 64), torch.randn(200_000, 64)
    _native.force_cpu_level("generic")  # at least a second
    # A process started in the background inherits an ignored SIGINT; this test needs Python's own handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            mips_topk(queries, blocks, 5)
        assert time.monotonic() - begin < 5
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
        _native.force_cpu_level("")
    assert mips_topk(queries[:2], blocks[:100], 5).ids.shape == (2, 5)  # and nothing is left broken


def test_kinds_are_what_they_say():
    """The strategies' data must have the properties that make them hard."""
    assert len(make_embeddings("duplicates", 100, 3, 0).unique(dim=0)) < 20
    norms = make_embeddings("norm_spread", 500, 3, 0).norm(dim=1)
    assert norms.max() / norms.min() > 1e6
    assert 0 < make_embeddings("denormal", 9, 3, 0).abs().max() < 2**-126
    assert all(make_embeddings(kind, 5, 3, 0).shape == (5, 3) for kind in KINDS)
