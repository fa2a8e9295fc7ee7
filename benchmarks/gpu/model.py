"""The CUDA search on paper: what a launch reads and writes, and how long that should take.

The plan mirrors csrc/mips_topk/mips_topk.cu (make_plan); tests hold the bytes counted by the harness in
tests/simt against these formulas. `python -m realm_fast.benchmarks.gpu.model` prints docs/gpu.md's table.
"""

import math
from dataclasses import dataclass

TILE_BLOCKS = 128
SLAB_BYTES = 128
MAX_CHUNK_ROWS = 512
MAX_SEEDS = 8192  # blocks whose scores give the first thresholds
REFRESH_TILES = 64  # how often thresholds are taken over, in tiles or rounds of four groups of queries
MIN_CAPACITY = 32  # of a row's buffer
# How many blocks a certificate lets through for each that reaches the threshold: counted by the emulated
# machine for int8 on normal vectors of 128 dimensions; the CPU scan's for bf16. The data decide.
CERTIFICATE_MARGIN = {"int8": 2.0, "bfloat16": 1.2}
FLUSHING_BYTES = 2 * MAX_CHUNK_ROWS + 8 + 4 * (256 + 4)
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
GROUP_ROWS = {"float32": (16, 64), "bfloat16": (64, 128), "float16": (64, 128), "int8": (64, 128)}
# The scan on Hopper's wgmma (scan_wgmma.cuh).
WGMMA_PAYS_ABOVE, WGMMA_MAX_SLABS, WGMMA_GROUP_ROWS, WGMMA_ROUND_STEPS = 128, 2, 128, 4
# A round's matrix units stand still from its last product to the next round's first: a warp's 64 maxima at
# half rate, twice a scheduler, the barrier, and the pipeline's start. A guess.
WGMMA_IDLE_CLOCKS = 450


@dataclass(frozen=True)
class Device:
    name: str
    multiprocessors: int
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    bandwidth: float  # bytes/s a copy reaches
    tensor_flops: float  # dense bf16, FLOP/s that a good matrix product reaches
    fma_flops: float  # float32 FMA units
    mma_share: float  # the part of tensor_flops that mma.sync can reach (wgmma reaches the rest)
    clock: float  # Hz
    hopper: bool = False  # compute capability 9.0


# Copy bandwidth and matrix rate: measured ones for H100, the data sheet's x 0.9 and x 0.8 for the others.
A100 = Device("A100-80G SXM", 108, 163 << 10, 164 << 10, 1.75e12, 250e12, 19.5e12, 1.0, 1.41e9)
H100 = Device("H100-80G SXM", 132, 227 << 10, 228 << 10, 3.0e12, 798e12, 60e12, 0.62, 1.7e9, True)
H200 = Device("H200-141G SXM", 132, 227 << 10, 228 << 10, 4.3e12, 798e12, 60e12, 0.62, 1.7e9, True)


@dataclass(frozen=True)
class Plan:
    group_rows: int
    chunk_rows: int
    num_chunks: int
    stages: int
    resident: bool
    shared_bytes: int
    blocks_per_multiprocessor: int
    wgmma: bool = False


def takes_wgmma(dtype: str, num_queries: int, dim: int, device: Device) -> bool:
    """Whether the search takes Hopper's scan by itself, for rows at multiples of 16 bytes."""
    fits = dim * ELEMENT_BYTES[dtype] <= WGMMA_MAX_SLABS * SLAB_BYTES
    return device.hopper and dtype in ("bfloat16", "float16") and fits and num_queries > WGMMA_PAYS_ABOVE


def make_wgmma_plan(dtype: str, num_queries: int, dim: int, device: Device) -> Plan:
    slabs = math.ceil(dim * ELEMENT_BYTES[dtype] / SLAB_BYTES)

    def stages(rows: int) -> int:
        return math.ceil(WGMMA_ROUND_STEPS / (rows // WGMMA_GROUP_ROWS)) + 1

    def shared_bytes(rows: int) -> int:
        tiles = stages(rows) * TILE_BLOCKS
        return slabs * (rows + tiles) * SLAB_BYTES + FLUSHING_BYTES + 4 * rows + 8 * (stages(rows) + 1)

    def whole_groups(rows: float) -> int:
        return math.ceil(rows / WGMMA_GROUP_ROWS) * WGMMA_GROUP_ROWS

    rows = min(whole_groups(num_queries), MAX_CHUNK_ROWS)
    while rows > WGMMA_GROUP_ROWS and shared_bytes(rows) > device.shared_bytes_per_block:
        rows -= WGMMA_GROUP_ROWS
    chunks = math.ceil(num_queries / rows)
    rows = whole_groups(num_queries / chunks)
    return Plan(WGMMA_GROUP_ROWS, rows, chunks, stages(rows), True, shared_bytes(rows), 1, wgmma=True)


def make_plan(
    dtype: str, num_queries: int, dim: int, device: Device, occupancy: int = 2, wgmma: bool = True
) -> Plan:
    """What the host decides; `wgmma=False` is the plan of a search that is told not to use it."""
    if wgmma and takes_wgmma(dtype, num_queries, dim, device):
        return make_wgmma_plan(dtype, num_queries, dim, device)
    size = ELEMENT_BYTES[dtype]
    small, large = GROUP_ROWS[dtype]
    group = small if num_queries <= small else large
    slabs = max(math.ceil(dim * size / SLAB_BYTES), 1)

    def shared_bytes(chunk: int, stages: int, resident: bool) -> int:
        total = slabs * chunk * SLAB_BYTES if resident else 0
        total += stages * (TILE_BLOCKS + (0 if resident else group)) * SLAB_BYTES
        total += (stages + 1) * TILE_BLOCKS * 4 if dtype == "int8" else 0
        return total + FLUSHING_BYTES + 4 * chunk

    def plan(chunk: int, stages: int, resident: bool) -> Plan:
        used = shared_bytes(chunk, stages, resident)
        together = min(device.shared_bytes_per_multiprocessor // (used + 1024), occupancy)
        return Plan(group, chunk, math.ceil(num_queries / chunk), stages, resident, used, max(together, 1))

    def ring(chunk: int, resident: bool) -> Plan | None:
        def together(stages: int) -> int:
            used = shared_bytes(chunk, stages, resident)
            if used > device.shared_bytes_per_block:
                return 0
            return min(device.shared_bytes_per_multiprocessor // (used + 1024), 2)

        stages = 4 if together(4) >= together(3) else 3
        fits = shared_bytes(chunk, stages, resident) <= device.shared_bytes_per_block
        return plan(chunk, stages, resident) if fits else None

    most_groups = min(math.ceil(num_queries / group), MAX_CHUNK_ROWS // group)
    for groups in range(most_groups, 1, -1):
        stages = max(4, slabs + 1)
        if shared_bytes(groups * group, stages, True) <= device.shared_bytes_per_block:
            return plan(groups * group, stages, True)
    found = ring(group, True) or ring(most_groups * group, False)
    if found is None:
        raise ValueError(f"{device.name} has too little shared memory")
    return found


def copy_bytes(dtype: str, num_queries: int, num_blocks: int, dim: int, plan: Plan, ranges: int) -> int:
    """What one scan launch brings into shared memory by cp.async or tma_load: exact."""
    size = ELEMENT_BYTES[dtype]
    tiles = math.ceil(num_blocks / TILE_BLOCKS)
    blocks, queries = num_blocks * dim * size, num_queries * dim * size
    scales = num_blocks * 4 * plan.num_chunks if dtype == "int8" else 0
    if plan.resident:
        return blocks * plan.num_chunks + queries * min(ranges, tiles) + scales
    groups = sum(
        math.ceil(min(plan.chunk_rows, num_queries - first) / plan.group_rows)
        for first in range(0, num_queries, plan.chunk_rows)
    )
    return blocks * groups + queries * tiles + scales


def expected_survivors(k: int, seeds: int, num_blocks: int, capacity: int, at_once: int = 0) -> float:
    """Scores a row's threshold lets through after the seeds, for blocks in random order.

    The first `at_once` blocks meet the seeds' threshold: thread blocks score them before any hands on.
    Between two compactions the threshold is the k-th best of the n blocks seen so far, so that k of the next
    n pass; `capacity - k` have passed when n has grown by the factor capacity / k.
    """
    at_once = min(at_once, num_blocks - seeds)
    passed, seen, kept = k * at_once / seeds, float(seeds + at_once), float(k)
    while True:
        growth = 1 + (capacity - kept) / k
        if seen * growth >= num_blocks:
            return passed + k * (num_blocks / seen - 1)
        passed += capacity - kept
        seen, kept = seen * growth, k


@dataclass(frozen=True)
class Estimate:
    minimum_bytes: float  # the index once, the queries once, the answer once
    bytes: float  # what kernels ask for
    memory_bytes: float  # the part that caches cannot have: index, seeds, originals of survivors, queues
    flops: float
    floor_s: float  # max(minimum_bytes / bandwidth, flops / peak): no kernel can be faster
    seconds: float  # this kernel: bytes, the share of the peak its instructions reach, survivors, launches


def estimate(
    dtype: str,
    num_queries: int,
    num_blocks: int,
    dim: int,
    k: int,
    device: Device,
    certified: bool = False,
    seeds: int = 0,
) -> Estimate:
    size = ELEMENT_BYTES[dtype]
    plan = make_plan(dtype, num_queries, dim, device)
    seeds = seeds or min(num_blocks, MAX_SEEDS)
    ranges = max(device.multiprocessors * plan.blocks_per_multiprocessor // plan.num_chunks, 1)
    capacity = MIN_CAPACITY
    while capacity < 2 * k:
        capacity *= 2
    side = 4.0 if dtype == "int8" else 0.0
    minimum = num_blocks * (dim * size + side) + num_queries * (dim * size + 12.0 * k)
    # Through L2 every chunk asks for the index again; from memory it comes once, because the chunks of a
    # range run side by side.
    once = copy_bytes(dtype, num_queries, num_blocks - seeds, dim, plan, ranges)
    again = (plan.num_chunks - 1) * (num_blocks - seeds) * (dim * size + side) if plan.resident else 0
    if not plan.resident:
        again = once - num_blocks * dim * size
    seed_bytes = seeds * dim * (4 if certified else size) + 2 * 4 * num_queries * seeds
    tiles = math.ceil((num_blocks - seeds) / TILE_BLOCKS)
    groups = plan.chunk_rows // plan.group_rows
    refreshes = tiles / REFRESH_TILES * (groups / WGMMA_ROUND_STEPS if plan.wgmma else 1)
    refresh = refreshes * num_queries * 8
    survivors = num_queries * expected_survivors(k, seeds, num_blocks, capacity, ranges * TILE_BLOCKS)
    survivors *= CERTIFICATE_MARGIN[dtype] if certified else 1
    survivor_bytes = survivors * (10 + 18 + 8 * 5 + (8 * dim if certified else 0))
    total = once - again + seed_bytes + refresh + survivor_bytes
    # Queries, scores of the seeds, thresholds and row buffers stay in L2; a query's float32 row is asked for
    # at each of its survivors.
    from_memory = num_blocks * (dim * size + side) + num_queries * (dim * size + 12.0 * k)
    from_memory += (seeds * dim * 4 if certified else 0) + survivors * (
        10 + (4 * dim + 8 if certified else 0)
    )
    flops = 2.0 * num_queries * num_blocks * dim
    padded = 2.0 * plan.num_chunks * groups * plan.group_rows * num_blocks * dim
    peak = device.fma_flops if dtype == "float32" else device.tensor_flops * (2 if dtype == "int8" else 1)
    if plan.wgmma:
        round_flops = 2.0 * WGMMA_ROUND_STEPS * plan.group_rows * TILE_BLOCKS * dim
        clocks = round_flops / (peak / device.multiprocessors / device.clock)
        reach = peak * clocks / (clocks + WGMMA_IDLE_CLOCKS)
    else:
        reach = peak * (0.8 if dtype == "float32" else device.mma_share * 0.85)
    floor = max(minimum / device.bandwidth, flops / peak)
    launches = 20e-6 if certified else 16e-6
    # A survivor costs a thread block about 2 us of latency, shared by the 256 that it handles together.
    handling = survivors / (device.multiprocessors * plan.blocks_per_multiprocessor) / 128 * 4e-6
    seconds = max(total / device.bandwidth, padded / reach) + launches + handling
    return Estimate(minimum, total, from_memory, flops, floor, seconds)


CASES = [  # (dtype, certified, B, N, D)
    ("bfloat16", False, 64, 13_400_000, 128),
    ("bfloat16", False, 512, 13_400_000, 128),
    ("int8", True, 64, 13_400_000, 128),
    ("int8", True, 512, 13_400_000, 128),
    ("bfloat16", False, 64, 21_000_000, 768),
    ("bfloat16", False, 512, 21_000_000, 768),
    ("int8", True, 64, 21_000_000, 768),
    ("float32", False, 64, 13_400_000, 128),
]


def table(k: int = 10) -> str:
    lines = [
        "| scan | B | N x D | GPU | minimum GB | asked | from memory | floor ms | predicted ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype, certified, queries, blocks, dim in CASES:
        for device in (A100, H100, H200):
            e = estimate(dtype, queries, blocks, dim, k, device, certified)
            name = f"{dtype}, certified" if certified else dtype
            lines.append(
                f"| {name} | {queries} | {blocks / 1e6:g}M x {dim} | {device.name.split('-')[0]} "
                f"| {e.minimum_bytes / 1e9:.2f} | {e.bytes / e.minimum_bytes:.3f} "
                f"| {e.memory_bytes / e.minimum_bytes:.3f} "
                f"| {e.floor_s * 1e3:.2f} | {e.seconds * 1e3:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
