"""The CUDA search on a real GPU, against the CPU's answers. `make gpu-check` runs these."""

import pytest
import torch

from realm_fast import _native, mips_topk
from realm_fast.device_index import DeviceIndex
from realm_fast.ops.mips_topk import mips_topk_reference, run_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def whole_numbers(shape, dtype, seed=0, high=4):
    """Every sum of these is exact in every order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).to(dtype)


def assert_same(got, want):
    assert torch.equal(got.ids.cpu(), want.ids.cpu())
    assert torch.equal(got.scores.cpu(), want.scores.cpu().float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "N", "D", "k"),
    [(1, 100_003, 128, 1), (7, 5_000, 33, 10), (64, 300_000, 128, 10), (130, 40_000, 768, 100),
     (513, 200_000, 128, 10), (3, 50_000, 64, 2048), (2500, 6_000, 48, 5), (4, 3, 16, 8)],
)  # fmt: skip
def test_answers(dtype, B, N, D, k):
    queries, blocks = whole_numbers((B, D), dtype), whole_numbers((N, D), dtype, 1)
    got = mips_topk(queries.cuda(), blocks.cuda(), k, impl="cuda")
    assert_same(got, mips_topk(queries.float(), blocks.float(), k, impl="cpu"))


@pytest.mark.parametrize("B", [100, 400])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_float32_answers_bit_for_bit(dtype, B):
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(B, 128, generator=generator)
    blocks = torch.randn(200_000, 128, generator=generator)
    blocks[::11] *= 30
    exclude = torch.randint(-1, 200_000, (B, 4), generator=generator)
    index = DeviceIndex.from_embeddings(blocks.cuda(), dtype)
    got = index.search(queries.cuda(), 20, exclude_ids=exclude.cuda())
    assert_same(got, mips_topk(queries, blocks, 20, exclude_ids=exclude, impl="cpu"))


def search_with(kernel, queries, blocks, k, exclude=None):
    """`mips_topk`, told which matrix instructions to use."""
    call = _native.MipsTopkCuda(
        dtype=str(blocks.dtype).removeprefix("torch."),
        queries=queries.data_ptr(), num_queries=len(queries), query_stride=queries.stride(0),
        blocks=blocks.data_ptr(), num_blocks=len(blocks), block_stride=blocks.stride(0),
        dim=queries.shape[1], k=k,
    )  # fmt: skip
    call.use_kernel(kernel)
    return run_cuda(call, queries, k, exclude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "N", "D", "k"),
    [(1, 5_000, 128, 1), (129, 100_003, 128, 10), (300, 60_000, 64, 100), (512, 200_000, 128, 10),
     (600, 30_000, 104, 2048), (2500, 6_000, 48, 5)],
)  # fmt: skip
def test_hoppers_scan_gives_the_other_scans_answer(dtype, B, N, D, k):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    queries, blocks = whole_numbers((B, D), dtype).cuda(), whole_numbers((N, D), dtype, 1).cuda()
    exclude = torch.randint(-1, N, (B, 3), device="cuda")
    for _ in range(3):
        scores, ids = search_with("wgmma", queries, blocks, k, exclude)
        other_scores, other_ids = search_with("mma", queries, blocks, k, exclude)
        assert torch.equal(ids, other_ids)
        assert torch.equal(scores, other_scores)


def test_low_precision_scores_are_near_the_truth():
    queries, blocks = torch.randn(70, 256).bfloat16(), torch.randn(50_000, 256).bfloat16()
    got = mips_topk(queries.cuda(), blocks.cuda(), 10, impl="cuda")
    want = mips_topk_reference(queries.double(), blocks.double(), 10)
    torch.testing.assert_close(got.scores.cpu().double(), want.scores, rtol=0, atol=1e-3)


def test_the_same_answer_every_time_and_on_every_stream():
    queries, blocks = torch.randn(200, 96, device="cuda"), torch.randn(150_000, 96, device="cuda")
    first = mips_topk(queries, blocks, 50)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams * 3:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(mips_topk(queries, blocks, 50))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result.ids, first.ids)
        assert torch.equal(result.scores, first.scores)


def test_it_can_be_captured_into_a_graph():
    queries, blocks = torch.randn(64, 128, device="cuda"), torch.randn(100_000, 128, device="cuda").bfloat16()
    index = DeviceIndex.from_embeddings(blocks, "int8")
    index.search(queries, 10)  # warm up on the side, as torch asks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = index.search(queries, 10)
    queries.copy_(torch.randn(64, 128))
    graph.replay()
    want = index.search(queries, 10)
    assert torch.equal(captured.ids, want.ids)
    assert torch.equal(captured.scores, want.scores)


def test_views_that_are_not_aligned():
    storage = whole_numbers((20_001, 51), torch.bfloat16).cuda()
    for blocks in (storage[1:, 1:], storage[1:, ::2], storage.T[:40].T):
        queries = whole_numbers((9, blocks.shape[1]), torch.bfloat16, 4).cuda()
        want = mips_topk(queries.float().cpu(), blocks.float().cpu().contiguous(), 12)
        assert_same(mips_topk(queries, blocks, 12, impl="cuda"), want)


def test_offsets_beyond_32_bits():
    rows = (1 << 31) // 1024 + 5000  # N * D > 2^31
    if torch.cuda.mem_get_info()[0] < rows * 1024 * 2 * 1.2:
        pytest.skip("too little free device memory for 2^31 elements")
    blocks = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    queries = torch.ones(2, 1024, dtype=torch.bfloat16, device="cuda")
    blocks[-3:] = torch.tensor([1.0, 3.0, 2.0], device="cuda", dtype=torch.bfloat16)[:, None]
    got = mips_topk(queries, blocks, 3, impl="cuda")
    assert got.ids.tolist() == [[rows - 2, rows - 1, rows - 3]] * 2


def test_refusals():
    queries, blocks = torch.randn(2, 8, device="cuda"), torch.randn(100, 8, device="cuda")
    with pytest.raises(ValueError, match="k <= 2048"):
        mips_topk(queries, blocks, 3000, impl="cuda")
    with pytest.raises(ValueError, match=r"blocks: expected .* on cuda"):
        mips_topk(queries, blocks.cpu(), 3)
    with pytest.raises(TypeError, match="blocks: expected"):
        mips_topk(queries, blocks.half(), 3)
    assert mips_topk(queries[:0], blocks, 3).ids.shape == (0, 3)
    assert mips_topk(queries, blocks[:0], 3).ids.tolist() == [[-1] * 3] * 2


def test_out_of_memory_leaves_the_index_usable():
    queries, blocks = torch.randn(64, 64, device="cuda"), torch.randn(50_000, 64, device="cuda")
    index = DeviceIndex.from_embeddings(blocks, "int8")
    before = index.search(queries, 10)
    held = []
    try:
        while True:
            held.append(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        pass
    try:
        with pytest.raises(torch.OutOfMemoryError):
            mips_topk(queries.repeat(64, 1), blocks, 2048, impl="cuda")
    finally:
        held.clear()
        torch.cuda.empty_cache()
    assert torch.equal(index.search(queries, 10).ids, before.ids)


def test_gradients_flow_to_the_blocks_that_were_returned():
    queries = torch.randn(5, 16, device="cuda", requires_grad=True)
    blocks = torch.randn(3000, 16, device="cuda", requires_grad=True)
    scores, ids = mips_topk(queries, blocks, 4, impl="cuda")
    scores.sum().backward()
    torch.testing.assert_close(queries.grad, blocks.detach()[ids].sum(1))
    assert int((blocks.grad.abs().sum(1) > 0).sum()) == len(ids.unique())
