"""The real CUDA sources of csrc/mips_topk, run on the CPU: answers, bytes, and faults planted in them."""

import numpy as np
import pytest
import torch
from realm_fast.benchmarks.gpu import model

from realm_fast.device_index import DeviceIndex
from realm_fast.ops.mips_topk import mips_topk, mips_topk_reference
from simt.harness import in_parallel
from simt.scans import (
    EMULATED,
    ORDERS,
    SOURCES,
    answer_of,
    assert_answer,
    assert_same,
    barrier_lines,
    build_changed,
    in_every_order,
    integers,
    noticed,
)


@pytest.mark.parametrize(
    ("dtype", "B", "N", "D", "k"),
    [
        ("bfloat16", 1, 1500, 64, 1),
        ("bfloat16", 70, 1301, 128, 10),  # one resident group
        ("bfloat16", 300, 900, 64, 10),  # three groups, tiles that stay
        ("bfloat16", 130, 700, 768, 10),  # queries do not fit: they ride in the ring
        ("float16", 5, 1500, 200, 100),
        ("float32", 3, 1500, 52, 10),
        ("float32", 70, 1100, 128, 33),
        ("float32", 2, 2300, 16, 2048),
    ],
)
def test_answers(search, dtype, B, N, D, k):
    rng = np.random.default_rng(B + N)
    queries, blocks = integers(rng, (B, D), dtype), integers(rng, (N, D), dtype)
    for run in in_every_order(search, queries, blocks, k, kernel="mma"):
        assert_answer(run, queries, blocks, k)


@pytest.mark.parametrize("case", ["all tied", "rising", "falling"])
def test_hard_orders(search, case):
    """Every score ties; every block beats all before it; none does."""
    queries, blocks = torch.ones(3, 8), torch.ones(2500, 8)
    if case != "all tied":
        blocks[:, 1:] = 0
        blocks[:, 0] = torch.arange(2500.0)
    if case == "falling":
        blocks = blocks.flip(0)
    for run in in_every_order(search, queries, blocks, 150, num_seeds=128):
        assert_answer(run, queries, blocks, 150)


def test_more_queries_than_a_pass_takes(search):
    """2048 at a time over one workspace; every pass finds its own queries, exclusions and outputs."""
    rng = np.random.default_rng(31)
    queries, blocks = integers(rng, (2060, 8), "float32"), integers(rng, (200, 8), "float32")
    exclude = mips_topk_reference(queries, blocks, 1).ids
    assert_answer(search(queries, blocks, 2, exclude, num_seeds=128), queries, blocks, 2, exclude)


def test_exclusions_special_values_and_short_answers(search):
    rng = np.random.default_rng(3)
    queries, blocks = integers(rng, (9, 24), "float32"), integers(rng, (700, 24), "float32")
    exclude = torch.from_numpy(rng.integers(-1, 700, (9, 5)))
    exclude[:, 0] = mips_topk_reference(queries, blocks, 1).ids[:, 0]
    exclude[0, 1] = 1 << 40  # not a block
    known = torch.where(exclude < 700, exclude, -1)
    assert_answer(search(queries, blocks, 12, exclude, num_seeds=128), queries, blocks, 12, known)
    # Fewer than k remain.
    assert_answer(search(queries, blocks[:7], 12), queries, blocks[:7], 12)
    assert_answer(search(queries, blocks[:0], 4), queries, blocks[:0], 4)
    # NaN and -inf are no results, +inf comes first, -0 ties with 0.
    blocks[::3] = torch.nan
    blocks[5, 0], blocks[400, 0] = -torch.inf, torch.inf
    queries[:, 0] = 1.0
    blocks[300:340] = -0.0
    blocks[340:360] = 0.0
    assert_answer(search(queries, blocks, 480, num_seeds=128), queries, blocks, 480)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_are_not_aligned(search, dtype):
    """Odd widths, strides and addresses take the element-by-element path; nothing past a row is read."""
    rng = np.random.default_rng(5)
    queries, blocks = integers(rng, (6, 35), dtype), integers(rng, (600, 35), dtype)
    size = queries.element_size()
    assert_answer(search(queries, blocks, 7), queries, blocks, 7)
    run = search(queries, blocks, 7, query_skip=size, block_skip=3 * size)
    assert_answer(run, queries, blocks, 7)
    padded = torch.zeros(600, 48, dtype=blocks.dtype)
    padded[:, :35] = blocks
    assert_answer(search(queries, padded[:, :35], 7), queries, blocks, 7)


@pytest.mark.parametrize(
    ("dtype", "num_queries", "kernel"),
    [("float32", 3, "mma"), ("bfloat16", 3, "mma"), ("bfloat16", 3, "wgmma"), ("int8", 3, "mma")],
)
def test_offsets_beyond_32_bits(search, dtype, num_queries, kernel):
    """Rows so far apart that N * D passes 2^31 elements (float32 and bfloat16: and 2^32 bytes)."""
    rng = np.random.default_rng(7)
    num_blocks, stride = 200, 14_000_000
    assert num_blocks * stride > 1 << 31
    plain = "float32" if dtype == "int8" else dtype
    queries, blocks = integers(rng, (num_queries, 32), plain), integers(rng, (num_blocks, 32), plain)
    index = DeviceIndex.from_embeddings(blocks, "int8") if dtype == "int8" else blocks
    run = search(queries, index, 9, num_seeds=128, kernel=kernel, block_stride=stride, spread=1)
    assert_answer(run, queries, blocks, 9)


def test_nothing_to_search_for(search):
    queries, blocks = torch.ones(2, 8), torch.ones(300, 8)
    for some, k in ((queries[:0], 3), (queries, 0)):
        run = search(some, blocks, k)
        assert_answer(run, some, blocks, k)
        assert run.launches == []


def test_the_answer_does_not_depend_on_the_grid(search):
    """Scores are rounded here, and still every bit is the same for every number of thread blocks."""
    rng = np.random.default_rng(8)
    queries = torch.from_numpy(rng.standard_normal((20, 96), np.float32))
    blocks = torch.from_numpy(rng.standard_normal((1800, 96), np.float32))
    grids = [(1, 128, "ascending"), (3, 640, "random"), (9, 256, "descending")]
    runs = in_parallel(
        lambda grid: search(queries, blocks, 10, multiprocessors=grid[0], num_seeds=grid[1], order=grid[2]),
        grids,
    )
    for run in runs:
        assert_same(run, answer_of(runs[0]))


def test_float32_sums_like_the_cpu_kernels(search):
    """One chain of fused multiply-adds in the order of the dimensions: bit for bit the CPU's scores."""
    from realm_fast import cpu_features

    if "avx2" not in cpu_features()["levels"]:
        pytest.skip("the generic CPU level multiplies, then adds: other roundings")
    rng = np.random.default_rng(9)
    queries = torch.from_numpy(rng.standard_normal((20, 100), np.float32))
    blocks = torch.from_numpy(rng.standard_normal((1500, 100), np.float32))
    assert_same(search(queries, blocks, 10), mips_topk(queries, blocks, 10, impl="cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("data", ["normal", "power law", "near copies", "zeros and giants"])
def test_certified_scans_give_the_float32_answer(search, dtype, data):
    rng = np.random.default_rng(11)
    num_queries, num_blocks, dim, k = 33, 1700, 48, 10
    x = rng.standard_normal((num_blocks, dim)).astype(np.float32)
    q = rng.standard_normal((num_queries, dim)).astype(np.float32)
    if data == "power law":
        decay = (np.arange(dim) + 1.0) ** -1.5
        x, q = (x * decay).astype(np.float32), (q * decay).astype(np.float32)
    if data == "near copies":  # closer to one another than the codes can tell
        x = (x[:17].repeat(100, axis=0) * (1 + 1e-4 * x)).astype(np.float32)
    if data == "zeros and giants":
        x[::7] *= 1e4
        x[::5] = 0
        q[0] = 0
        q[1] *= 1e-20
    queries, blocks = torch.from_numpy(q), torch.from_numpy(x)
    exclude = torch.from_numpy(rng.integers(-1, num_blocks, (num_queries, 3)))
    index = DeviceIndex.from_embeddings(blocks, dtype)
    calls = [(blocks, {}), (index, ORDERS[0]), (index, ORDERS[2])]
    exact, *runs = in_parallel(lambda call: search(queries, call[0], k, exclude, **call[1]), calls)
    for run in runs:
        assert_same(run, answer_of(exact))


def test_queries_that_are_not_finite_are_searched_in_full(search):
    rng = np.random.default_rng(12)
    queries = torch.from_numpy(rng.standard_normal((4, 32), np.float32))
    queries[1, 3], queries[2, 4] = torch.nan, torch.inf
    blocks = torch.from_numpy(rng.standard_normal((900, 32), np.float32))
    exact = search(queries, blocks, 6)
    for dtype in ("bfloat16", "int8"):
        run = search(queries, DeviceIndex.from_embeddings(blocks, dtype), 6)
        assert run.errors == []
        np.testing.assert_array_equal(run.arrays["ids"], exact.arrays["ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 2049}, "k: the CUDA kernels take 0..2048"),
        ({"k": 3, "dim": 300_000}, "D: the CUDA kernels take at most 2^18"),
        ({"k": 3, "compute_capability": 75}, "compute capability 8.0"),
        ({"k": 3, "shared_bytes_per_block": 20000}, "too little shared memory"),
        ({"k": 3, "num_seeds": 8193}, "num_seeds: at most 8192"),
        ({"k": 3, "cuda_error": 35}, "the NVIDIA driver is older than this build needs"),
        ({"k": 3, "cuda_error": 209}, "this build has no code for this GPU"),
    ],
)
def test_refusals_name_their_reason(search, options, message):
    options = dict(options)
    dim = options.pop("dim", 8)
    queries, blocks = torch.ones(2, dim), torch.ones(4, dim)
    run = search(queries, blocks, options.pop("k"), **options)
    assert message in run.raised
    assert run.errors == []


# ---- bytes ----


def scans(run):
    return [launch for launch in run.launches if "scan" in launch["kernel"]]


@pytest.mark.parametrize(
    ("dtype", "B", "N", "D"),
    [("bfloat16", 16, 6000, 128), ("bfloat16", 200, 2000, 128), ("float32", 40, 3000, 64),
     ("bfloat16", 130, 1000, 768), ("float16", 600, 1500, 64)],
)  # fmt: skip
def test_copied_bytes_are_the_models(search, dtype, B, N, D):
    rng = np.random.default_rng(1)
    queries, blocks = integers(rng, (B, D), dtype), integers(rng, (N, D), dtype)
    run = search(queries, blocks, 5, num_seeds=512, kernel="mma")
    plan = model.make_plan(dtype, B, D, EMULATED, wgmma=False)
    ranges = max(4 * 2 // plan.num_chunks, 1)
    seed, rest = scans(run)
    assert seed["shared_bytes"] == rest["shared_bytes"] == plan.shared_bytes
    assert seed["copy_bytes"] == model.copy_bytes(dtype, B, 512, D, plan, ranges)
    assert rest["copy_bytes"] == model.copy_bytes(dtype, B, N - 512, D, plan, ranges)


def test_int8_copied_bytes_are_the_models(search):
    rng = np.random.default_rng(2)
    queries = torch.from_numpy(rng.standard_normal((40, 64), np.float32))
    blocks = torch.from_numpy(rng.standard_normal((3000, 64), np.float32))
    run = search(queries, DeviceIndex.from_embeddings(blocks, "int8"), 5, num_seeds=512)
    plan = model.make_plan("int8", 40, 64, EMULATED)
    _, rest = scans(run)
    assert rest["copy_bytes"] == model.copy_bytes("int8", 40, 3000 - 512, 64, plan, 8)


def test_all_global_traffic_is_within_five_percent_of_the_least(search):
    """Everything counted: index, queries, seeds, thresholds, survivors, answers."""
    rng = np.random.default_rng(4)
    queries = torch.from_numpy(rng.standard_normal((8, 128), np.float32)).bfloat16()
    blocks = torch.from_numpy(rng.standard_normal((40_000, 128), np.float32)).bfloat16()
    run = search(queries, blocks, 10, num_seeds=1024)
    assert run.errors == []
    moved = run.total("global_bytes_read") + run.total("global_bytes_written")
    paper = model.estimate("bfloat16", 8, 40_000, 128, 10, EMULATED, seeds=1024)
    assert paper.minimum_bytes <= moved <= 1.05 * paper.minimum_bytes
    # And the paper model, which also prices survivors, is not far off.
    assert moved == pytest.approx(paper.bytes, rel=0.02)


def test_all_global_traffic_of_a_certified_scan_is_the_models(search):
    """At these sizes the survivors' originals are most of it: their number is what is held against the model.

    Twice the blocks: the least doubles, and what comes on top grows by the survivors of k ln 2 (and the steps
    in which buffers fill), so that its share falls as ln(N) / N.
    """
    k, seeds = 10, 1024

    def counted(size):
        num_queries, num_blocks = size
        rng = np.random.default_rng(4)
        queries = torch.from_numpy(rng.standard_normal((num_queries, 128), np.float32))
        blocks = torch.from_numpy(rng.standard_normal((num_blocks, 128), np.float32))
        run = search(queries, DeviceIndex.from_embeddings(blocks, "int8"), k, num_seeds=seeds)
        assert run.errors == []
        moved = run.total("global_bytes_read") + run.total("global_bytes_written")
        paper = model.estimate("int8", *size, 128, k, EMULATED, certified=True, seeds=seeds)
        return moved, paper

    small, middle, large = in_parallel(counted, [(8, 20_000), (32, 20_000), (32, 40_000)])
    for moved, paper in (small, middle, large):
        assert moved == pytest.approx(paper.bytes, rel=0.05)
    more, less = (moved - paper.minimum_bytes for moved, paper in (large, middle))
    on_paper = [paper.bytes - paper.minimum_bytes for _, paper in (large, middle)]
    assert more - less == pytest.approx(on_paper[0] - on_paper[1], rel=0.3)
    assert more / large[1].minimum_bytes < 0.7 * less / middle[1].minimum_bytes


def test_every_small_kernel_moves_what_it_must(search):
    """select_seeds reads every score once; the answer is written once."""
    rng = np.random.default_rng(4)
    num_queries, k, seeds = 24, 10, 1024
    queries = torch.from_numpy(rng.standard_normal((num_queries, 32), np.float32))
    blocks = torch.from_numpy(rng.standard_normal((3000, 32), np.float32))
    run = search(queries, DeviceIndex.from_embeddings(blocks, "int8"), k, num_seeds=seeds)
    least = {
        "select_seeds": num_queries * (4 * seeds + 8 * k + 16),  # scores; candidates, count, threshold
        # The buffer; the answer; and each of 256 threads asks for the row's count, a warp's all at once.
        "finish_rows": num_queries * (8 * 256 + 8 * model.MIN_CAPACITY + 12 * k),
        "prepare_queries": num_queries * (2 * 4 * 32 + 32 + 12),  # twice: the largest, then codes and norms
    }
    for kernel, expected in least.items():
        moved = run.total("global_bytes_read", kernel) + run.total("global_bytes_written", kernel)
        assert expected <= moved <= 1.05 * expected, kernel


@pytest.mark.parametrize("device", [model.A100, model.H100, model.H200], ids=lambda d: d.name)
@pytest.mark.parametrize("case", model.CASES)
def test_the_model_at_production_size_is_within_five_percent(case, device):
    """Of what memory must deliver; what kernels ask for, answered by caches in part, is 12% over in one case."""
    dtype, certified, num_queries, num_blocks, dim = case
    e = model.estimate(dtype, num_queries, num_blocks, dim, 10, device, certified)
    assert e.memory_bytes <= 1.05 * e.minimum_bytes
    assert e.bytes <= (1.12 if certified and num_queries > 64 else 1.05) * e.minimum_bytes


def test_survivors_are_as_few_as_the_model_says(search):
    """k (1 + ...) a row, not k a thread block: the rising threshold is shared."""
    rng = np.random.default_rng(6)
    k, num_queries, num_blocks = 10, 40, 20_000
    queries = torch.from_numpy(rng.standard_normal((num_queries, 16), np.float32))
    blocks = torch.from_numpy(rng.standard_normal((num_blocks, 16), np.float32))
    run = search(queries, blocks, k, num_seeds=1024)
    appended = run.total("atomics", "scan")  # one atomic a survivor, few more for compactions
    expected = num_queries * model.expected_survivors(k, 1024, num_blocks, model.MIN_CAPACITY)
    assert 0.7 * expected < appended < 1.3 * expected


# ---- faults planted in the real kernels ----


def fault_inputs(num_queries=70, dim=136):
    """Several slabs, several tiles a range, survivors and compactions in every range."""
    rng = np.random.default_rng(21)
    queries, blocks = integers(rng, (70, dim), "bfloat16", 2), integers(rng, (1500, dim), "bfloat16", 2)
    blocks[:, 0] = torch.arange(1500) // 6
    queries[:, 0] = 1
    return queries.repeat(5, 1)[:num_queries], blocks


def test_every_barrier_is_needed_and_missed(search):
    def is_missed(place):
        file, line = place
        for num_queries, dim, blocks_at_once in (
            (70, 136, 1),
            (300, 136, 1),  # groups whose tile stays in the ring have a barrier of their own
            (70, 24, 1),  # one slab: one barrier a step
            (2, 24, 8),  # thread blocks that contend for the same rows
        ):
            queries, blocks = fault_inputs(num_queries, dim)
            run = search(
                queries, blocks, 120, num_seeds=128, multiprocessors=4 if blocks_at_once > 1 else 1,
                resident_blocks=blocks_at_once, order="random", seed=3,
                drop_barrier_file=file, drop_barrier_line=line,
            )  # fmt: skip
            if run.kinds:
                return True
        return False

    places = list(barrier_lines("scan.cuh", "select.cuh"))
    assert len(places) > 10
    unnoticed = [place for place, missed in zip(places, in_parallel(is_missed, places)) if not missed]
    assert unnoticed == []


@pytest.mark.parametrize(
    "fault", [{"swap_fragments": 1}, {"swap_matrices": 1}, {"shift_copy_bytes": 2}, {"skip_copy_wait": 1}]
)
def test_faults_of_the_instructions_are_missed(search, fault):
    queries, blocks = fault_inputs()
    assert noticed(search(queries, blocks, 10, num_seeds=128, **fault), queries, blocks, 10)


MUTANTS = {  # what is changed: (file, from, to)
    "missed tail": ("scan.cuh", r"\(a\.last - a\.first \+ kTileBlocks - 1\) / kTileBlocks", "(a.last - a.first) / kTileBlocks"),
    "off-by-one load": ("scan.cuh", r"row \+ i < rows_left", "row + i <= rows_left"),
    "padding let through": ("scan.cuh", r" && S::column\(c\) < step\.tile_columns\) \{\n\s+hits", ") {\n hits"),
    "swapped fragment index": ("scan.cuh", r"fb\[n / 2\]\[n % 2 \* 2\], fb\[n / 2\]\[n % 2 \* 2 \+ 1\]", "fb[n / 2][n % 2 * 2 + 1], fb[n / 2][n % 2 * 2]"),
    "lost tie": ("scan.cuh", r"if \(next_block > key_block\(threshold\)\)\s+\+\+ordered;", "(void)next_block, ++ordered;"),
    "ties to the higher id": ("select.cuh", r"\(0xffffffffu - static_cast<uint32_t>\(block\)\)", "static_cast<uint32_t>(block)"),
    "queue never handed on at the end": ("scan.cuh", r"a\.dense == nullptr && tile \+ 1 == end_tile && group == num_groups - 1", "false"),
    "wrong swizzle": ("scan.cuh", r"\(\(\(lane >> 3\) & 1\) \^ \(b_row & 7\)\) << 4", "((lane >> 3) & 1) << 4"),
}  # fmt: skip


def mutant_calls(name):
    """What is searched to find the change: (queries, blocks, k, options)."""
    if name == "lost tie":  # the lower ids of a tie come last, from another thread block
        queries, blocks = torch.ones(2, 16).bfloat16(), torch.zeros(1400, 16).bfloat16()
        blocks[130:] = 1
        return [(queries, blocks, 20, {"order": "descending", "multiprocessors": 4})]
    queries, blocks = fault_inputs()
    queries[:, 0], blocks[:, 0] = -1, 256  # all scores are negative: zeros of padding would win
    return [(some, blocks, 10, {}) for some in (queries, queries[:2])]


@pytest.fixture(scope="module")
def mutants_noticed(harness, search, tmp_path_factory):
    def is_noticed(name):
        file, pattern, replacement = MUTANTS[name]
        # Only the bf16 kernels run.
        sources = ["mips_topk_bf16.cu"] + (["mips_topk.cu"] if file == "select.cuh" else [])
        changes = [(f"mips_topk/{file}", pattern, replacement)]
        program = build_changed(harness, tmp_path_factory.mktemp("changed"), sources, changes)
        return any(
            noticed(search(*call, num_seeds=128, program=program, **options), *call)
            for *call, options in mutant_calls(name)
        )

    return dict(zip(MUTANTS, in_parallel(is_noticed, MUTANTS)))


@pytest.mark.timeout(900)  # the first waits for all to be compiled and run
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_source_are_missed(mutants_noticed, name):
    """Each change compiles, and the answers or the checks give it away."""
    assert mutants_noticed[name]


def test_the_faults_are_all_that_is_wrong(search):
    """What the tests above run, unchanged: nothing is reported and the answer is right."""
    calls = [*mutant_calls("lost tie"), *mutant_calls("missed tail"), (*fault_inputs(), 10, {})]
    calls += [(*fault_inputs(), 120, {"multiprocessors": 1, "order": "random", "seed": 3})]
    for *call, options in calls:
        assert not noticed(search(*call, num_seeds=128, **options), *call)


def test_address_and_undefined_behaviour_sanitizers(harness, search):
    program = harness.build("drive_mips_topk.cpp", SOURCES, build="sanitizers")
    rng = np.random.default_rng(17)
    calls = []
    for dtype, (B, N, D), k, extra in [
        ("bfloat16", (70, 900, 136), 10, {}),
        ("bfloat16", (140, 400, 768), 3, {}),
        ("float16", (3, 600, 35), 130, {"block_skip": 2}),
        ("float32", (20, 700, 50), 10, {"order": "random"}),
    ]:
        queries, blocks = integers(rng, (B, D), dtype), integers(rng, (N, D), dtype)
        calls.append((queries, blocks, blocks, k, extra))
    calls.append((queries, blocks, DeviceIndex.from_embeddings(blocks, "int8"), 10, {}))

    def check(call):
        queries, blocks, index, k, extra = call
        run = search(queries, index, k, program=program, num_seeds=128, **extra)
        assert_answer(run, queries, blocks, k)

    in_parallel(check, calls)
