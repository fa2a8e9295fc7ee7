"""The scan on Hopper's instructions (csrc/mips_topk/scan_wgmma.cuh), run on the CPU like the others."""

import numpy as np
import pytest
import torch
from realm_fast.benchmarks.gpu import model

from realm_fast.device_index import DeviceIndex
from realm_fast.ops.mips_topk import mips_topk_reference
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


def took_wgmma(run):
    return any("scan_wgmma" in launch["kernel"] for launch in run.launches)


@pytest.mark.parametrize(
    ("dtype", "B", "N", "D", "k"),
    [
        ("bfloat16", 512, 700, 128, 10),  # four groups: a round is a tile
        ("float16", 300, 900, 64, 100),  # three: rounds and tiles do not line up
        ("bfloat16", 200, 1301, 104, 33),  # two; the second slab is not full, nor is the last tile
        ("bfloat16", 5, 1900, 40, 10),  # one group, most of it padding
        ("float16", 600, 300, 16, 1),  # two chunks
        ("bfloat16", 1537, 700, 8, 2),  # four, and the last has one row
    ],
)
def test_answers(search, dtype, B, N, D, k):
    rng = np.random.default_rng(B + N)
    queries, blocks = integers(rng, (B, D), dtype), integers(rng, (N, D), dtype)
    for run in in_every_order(search, queries, blocks, k, kernel="wgmma"):
        assert_answer(run, queries, blocks, k)
        assert took_wgmma(run)


@pytest.mark.parametrize("case", ["all tied", "rising", "falling"])
def test_hard_orders(search, case):
    """Every score ties; every block beats all before it; none does: full queues, many compactions."""
    queries, blocks = torch.zeros(150, 8).bfloat16(), torch.zeros(1500, 8).bfloat16()
    queries[:, 0], queries[:, 1] = 64, 1
    if case == "all tied":
        blocks[:] = 1
    else:
        blocks[:, 0], blocks[:, 1] = torch.arange(1500) // 64, torch.arange(1500) % 64
    if case == "falling":
        blocks = blocks.flip(0)
    for run in in_every_order(search, queries, blocks, 150, kernel="wgmma", num_seeds=256):
        assert_answer(run, queries, blocks, 150)


def test_exclusions_and_special_values(search):
    rng = np.random.default_rng(3)
    queries, blocks = integers(rng, (140, 24), "bfloat16"), integers(rng, (700, 24), "bfloat16")
    exclude = torch.from_numpy(rng.integers(-1, 700, (140, 5)))
    exclude[:, 0] = mips_topk_reference(queries.double(), blocks.double(), 1).ids[:, 0]
    run = search(queries, blocks, 12, exclude, kernel="wgmma", num_seeds=128)
    assert_answer(run, queries, blocks, 12, exclude)
    # Fewer than k remain; NaN and -inf are no results, +inf comes first, -0 ties with 0.
    assert_answer(search(queries, blocks[:7], 12, kernel="wgmma"), queries, blocks[:7], 12)
    blocks[::3] = torch.nan
    blocks[5, 0], blocks[400, 0] = -torch.inf, torch.inf
    queries[:, 0] = 1.0
    blocks[300:340] = -0.0
    blocks[340:360] = 0.0
    run = search(queries, blocks, 480, kernel="wgmma", num_seeds=128)
    assert_answer(run, queries, blocks, 480)


def test_bit_for_bit_the_other_scan(search):
    """Rounded sums too: the emulated matrix units round alike, and the rest of the two scans is one code."""
    rng = np.random.default_rng(8)
    queries = torch.from_numpy(rng.standard_normal((150, 96), np.float32)).bfloat16()
    blocks = torch.from_numpy(rng.standard_normal((1800, 96), np.float32)).bfloat16()
    grids = [("mma", 3, 256, "ascending"), ("wgmma", 1, 128, "ascending"), ("wgmma", 3, 640, "random"),
             ("wgmma", 9, 256, "descending")]  # fmt: skip
    runs = in_parallel(
        lambda grid: search(
            queries, blocks, 10, kernel=grid[0], multiprocessors=grid[1], num_seeds=grid[2], order=grid[3]
        ),
        grids,
    )
    for run in runs:
        assert_same(run, answer_of(runs[0]))


@pytest.mark.parametrize("data", ["normal", "near copies", "zeros and giants"])
def test_a_certified_scan_gives_the_float32_answer(search, data):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((1500, 48)).astype(np.float32)
    q = rng.standard_normal((140, 48)).astype(np.float32)
    if data == "near copies":  # closer to one another than the codes can tell
        x = (x[:15].repeat(100, axis=0) * (1 + 1e-4 * x)).astype(np.float32)
    if data == "zeros and giants":
        x[::7] *= 1e4
        x[::5] = 0
        q[0], q[1, 3] = 0, np.nan
    queries, blocks = torch.from_numpy(q), torch.from_numpy(x)
    exclude = torch.from_numpy(rng.integers(-1, len(x), (len(q), 3)))
    index = DeviceIndex.from_embeddings(blocks, "bfloat16")
    calls = [(blocks, {}), (index, ORDERS[0] | {"kernel": "wgmma"}), (index, ORDERS[2] | {"kernel": "wgmma"})]
    exact, *runs = in_parallel(lambda call: search(queries, call[0], 10, exclude, **call[1]), calls)
    for run in runs:
        assert_same(run, answer_of(exact))
        assert took_wgmma(run)


@pytest.mark.parametrize(
    ("B", "D", "options", "obstacle"),
    [
        (129, 16, {}, None),
        (128, 16, {}, "few queries"),
        (129, 136, {}, "D from 1 to 128"),
        (129, 16, {"compute_capability": 80}, "compute capability 9.0"),
        (129, 16, {"compute_capability": 100}, "compute capability 9.0"),
        (129, 16, {"block_skip": 2}, "multiples of 16 bytes"),
        (129, 20, {}, "multiples of 16 bytes"),
    ],
)
def test_when_it_is_taken(search, B, D, options, obstacle):
    """By itself where it can be had and pays; asked for, it runs or says why it cannot."""
    rng = np.random.default_rng(2)
    queries, blocks = integers(rng, (B, D), "bfloat16"), integers(rng, (200, D), "bfloat16")
    run, mma, asked = in_parallel(
        lambda kernel: search(queries, blocks, 3, kernel=kernel, **options), ["auto", "mma", "wgmma"]
    )
    assert_answer(run, queries, blocks, 3)
    assert took_wgmma(run) == (obstacle is None)
    assert not took_wgmma(mma)
    if obstacle in (None, "few queries"):
        assert took_wgmma(asked)
    else:
        assert obstacle in asked.raised
    if B <= 128 or options.get("compute_capability", 90) != 90 or D > 128:
        device = EMULATED if "compute_capability" not in options else model.A100
        assert not model.takes_wgmma("bfloat16", B, D, device)


@pytest.mark.parametrize(
    ("dtype", "B", "N", "D"),
    [("bfloat16", 512, 3000, 128), ("bfloat16", 200, 2000, 128), ("float16", 600, 1500, 64)],
)
def test_copied_bytes_are_the_models(search, dtype, B, N, D):
    rng = np.random.default_rng(1)
    queries, blocks = integers(rng, (B, D), dtype), integers(rng, (N, D), dtype)
    run = search(queries, blocks, 5, num_seeds=512)
    plan = model.make_plan(dtype, B, D, EMULATED)
    assert plan.wgmma
    ranges = max(4 // plan.num_chunks, 1)
    seed, rest = (launch for launch in run.launches if "scan" in launch["kernel"])
    assert seed["shared_bytes"] == rest["shared_bytes"] == plan.shared_bytes
    assert seed["copy_bytes"] == model.copy_bytes(dtype, B, 512, D, plan, ranges)
    assert rest["copy_bytes"] == model.copy_bytes(dtype, B, N - 512, D, plan, ranges)


# ---- faults ----


def fault_inputs(num_queries=200, dim=72):
    """Two slabs, several tiles and rounds a range, survivors and compactions in every one."""
    rng = np.random.default_rng(21)
    queries, blocks = integers(rng, (70, dim), "bfloat16", 2), integers(rng, (1500, dim), "bfloat16", 2)
    blocks[:, 0] = torch.arange(1500) // 6
    queries[:, 0] = 1
    return queries.repeat(8, 1)[:num_queries], blocks


def test_every_barrier_is_needed_and_missed(search):
    queries, blocks = fault_inputs()

    def is_missed(place):
        file, line = place
        return bool(search(
            queries, blocks, 10, num_seeds=128, kernel="wgmma", multiprocessors=1, order="random", seed=3,
            drop_barrier_file=file, drop_barrier_line=line,
        ).kinds)  # fmt: skip

    places = list(barrier_lines("scan_wgmma.cuh"))
    assert len(places) >= 3
    unnoticed = [place for place, missed in zip(places, in_parallel(is_missed, places)) if not missed]
    assert unnoticed == []


FAULTS = {  # and what gives each away
    "flip_parity": "read before tma_load was waited for",
    "skip_wgmma_wait": "wgmma never waited for",
    "skip_wgmma_fence": "wgmma without wgmma.fence",
    "skip_proxy_fence": "no fence.proxy.async",
    "swap_accumulators": "",
}


@pytest.fixture(scope="module")
def faulty_runs(search):
    queries, blocks = fault_inputs()
    runs = in_parallel(
        lambda fault: search(queries, blocks, 10, num_seeds=128, kernel="wgmma", **{fault: 1}), FAULTS
    )
    return dict(zip(FAULTS, runs))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_instructions_are_noticed(faulty_runs, fault):
    run = faulty_runs[fault]
    assert noticed(run, *fault_inputs(), 10)
    assert any(FAULTS[fault] in kind for kind in run.kinds | {""})


WGMMA, HOPPER = "mips_topk/scan_wgmma.cuh", "core/cuda/hopper.cuh"
MUTANTS = {
    "wrong swizzle": (HOPPER, r"kSwizzle128 = 1", "kSwizzle128 = 2"),
    "wrong descriptor stride": (HOPPER, r"kRowGroups = kSwizzleAlignment >> 4", "kRowGroups = kSwizzleAlignment >> 5"),
    "wrong step along the rows": (HOPPER, r"n \* kWgmmaStepBytes\) >> 4", "n * kWgmmaStepBytes) >> 5"),
    "old accumulators": (WGMMA, r"slab \+ i > 0", "true"),
    "a product never committed": (WGMMA, r"    wgmma_commit\(\);\n", ""),
    "one warpgroup's queries twice": (WGMMA, r"tid / 128 \* kWgmmaRows", "0"),
    "waits for the wrong accumulators": (WGMMA, r"wgmma_wait<1>\(odd\)", "wgmma_wait<2>(odd)"),
    "a stage given away too early": (WGMMA, r"first\.tile \+ a\.stages", "first.tile + 1 + a.stages"),
    "bytes short": (WGMMA, r"mbarrier_expect\(arrived \+ into, a\.stage_bytes\)", "mbarrier_expect(arrived + into, a.stage_bytes - 128)"),
    "a parity that never turns": (WGMMA, r"at\.parity \^= 1;", ""),
    "one stage too few": (WGMMA, r"/ groups \+ 1;", "/ groups;"),
    "off-by-one load": (WGMMA, r"static_cast<int>\(block_of\(fetched\)\)", "static_cast<int>(block_of(fetched)) + 1"),
    "missed tail": ("mips_topk/scan.cuh", r"\(a\.last - a\.first \+ kTileBlocks - 1\) / kTileBlocks", "(a.last - a.first) / kTileBlocks"),
    "queue never handed on at the end": (WGMMA, r"hand_on \|\| past_the_end", "hand_on"),
}  # fmt: skip


def mutant_calls():
    """What is searched to find a change: (queries, blocks, k)."""
    queries, blocks = fault_inputs()
    few = blocks.clone()
    few[:, 0] = 0  # in no order: few survivors, which do not fill the queue
    return [(queries, blocks, 10), (queries[:2], few, 10)]


@pytest.fixture(scope="module")
def mutants_noticed(harness, search, tmp_path_factory):
    def is_noticed(name):
        folder = tmp_path_factory.mktemp("changed")
        program = build_changed(harness, folder, ["mips_topk_sm90a.cu"], [MUTANTS[name]])
        options = {"num_seeds": 128, "kernel": "wgmma", "multiprocessors": 2}
        return any(noticed(search(*call, program=program, **options), *call) for call in mutant_calls())

    return dict(zip(MUTANTS, in_parallel(is_noticed, MUTANTS)))


@pytest.mark.timeout(900)  # the first waits for all to be compiled and run
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_source_are_noticed(mutants_noticed, name):
    assert mutants_noticed[name]


def test_the_faults_are_all_that_is_wrong(search):
    """What the tests above run, unchanged: nothing is reported and the answer is right."""
    calls = [
        (call, options)
        for call in mutant_calls()
        for options in ({}, {"multiprocessors": 1, "order": "random", "seed": 3}, {"multiprocessors": 2})
    ]
    runs = in_parallel(lambda c: search(*c[0], num_seeds=128, kernel="wgmma", **c[1]), calls)
    for run, (call, _) in zip(runs, calls):
        assert not noticed(run, *call), run.options


def test_address_and_undefined_behaviour_sanitizers(harness, search):
    program = harness.build("drive_mips_topk.cpp", SOURCES, build="sanitizers")
    rng = np.random.default_rng(17)
    calls = []
    for dtype, (B, N, D), k, extra in [
        ("bfloat16", (300, 500, 128), 10, {}),
        ("float16", (140, 700, 40), 3, {"order": "random"}),
    ]:
        calls.append((integers(rng, (B, D), dtype), integers(rng, (N, D), dtype), k, extra))

    def check(call):
        queries, blocks, k, extra = call
        run = search(queries, blocks, k, program=program, num_seeds=128, kernel="wgmma", **extra)
        assert_answer(run, queries, blocks, k)

    in_parallel(check, calls)
