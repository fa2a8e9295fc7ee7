"""Calls with CUDA tensors, where there is no GPU: who takes them, what is refused and how it is said.

The tensors have a device, a shape and a dtype, but no values (tests/fake_cuda.py). So a call that passes here
asked the device for no value either: between the checks and the kernels the host never waits.
"""

import contextlib

import pytest
import torch
from fake_cuda import HostWaits, fake_cuda

import realm_fast as rf
from realm_fast import _native
from realm_fast.device_index import DeviceIndex
from realm_fast.ops import linear_marginal_ce as lce
from realm_fast.ops import mips_topk as topk
from realm_fast.ops.embed_epilogue import embed_epilogue


@pytest.fixture
def gpu(monkeypatch):
    """An H100 that can only be asked what it is; yields its properties, to be changed."""

    class Pretended:
        capability, driver, runtime, cuda = (9, 0), 13000, 13000, True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: Pretended.capability)
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": Pretended.cuda})
    monkeypatch.setattr(_native, "cuda_driver_version", lambda: Pretended.driver, raising=False)
    monkeypatch.setattr(_native, "cuda_runtime_version", lambda: Pretended.runtime, raising=False)
    monkeypatch.setattr(_native, "MAX_CUDA_K", 2048, raising=False)
    with fake_cuda():
        yield Pretended


@pytest.fixture
def chosen(monkeypatch):
    """What choose_impl answered, call by call."""
    answers = []
    for name in ("mips_topk", "marginal_lse", "linear_marginal_ce", "embed_epilogue"):
        module = __import__(f"realm_fast.ops.{name}", fromlist=["choose_impl"])
        real = module.choose_impl
        monkeypatch.setattr(
            module, "choose_impl", lambda *a, real=real: answers.append(real(*a)) or answers[-1]
        )
    return answers


def tensor(*shape, dtype=torch.float32, device="cuda"):
    return torch.empty(shape, dtype=dtype, device=device)


def integers(*shape, device="cuda"):
    return tensor(*shape, dtype=torch.int64, device=device)


# Each op's call, given (device, impl); the second device is that of one argument, to mix them.
def call_topk(device="cuda", impl="auto", other=None, k=3):
    return rf.mips_topk(tensor(2, 8, device=device), tensor(50, 8, device=other or device), k, impl=impl)


def call_marginal(device="cuda", impl="auto", other=None):
    gold = tensor(2, 3, 4, device=device)
    return rf.marginal_log_likelihood(gold, tensor(2, 3, device=other or device), impl=impl)


def call_loss(device="cuda", impl="auto", other=None):
    return rf.linear_marginal_cross_entropy(
        tensor(2, 3, 4, 8, device=device), tensor(11, 8, device=device), tensor(11, device=device),
        integers(2, 4, device=device), tensor(2, 3, device=other or device), impl=impl, return_stats=True,
    )  # fmt: skip


def call_epilogue(device="cuda", impl="auto", other=None):
    return embed_epilogue(
        tensor(3, 5, 8, device=device), weight=tensor(4, 8, device=other or device), impl=impl
    )


CALLS = {
    "mips_topk": call_topk,
    "marginal_log_likelihood": call_marginal,
    "linear_marginal_cross_entropy": call_loss,
    "embed_epilogue": call_epilogue,
}
GPU_IMPL = dict.fromkeys(CALLS, "cuda") | {"embed_epilogue": "triton"}
EVERY_IMPL = {
    "mips_topk": ["cuda", "cpu", "reference"],
    "marginal_log_likelihood": ["cuda", "cpu", "reference"],
    "linear_marginal_cross_entropy": ["cuda", "cpu", "blas", "reference"],
    "embed_epilogue": ["cpu", "triton", "reference"],
}
ops = pytest.mark.parametrize("op", CALLS)


def first_tensor(result):
    return result if isinstance(result, torch.Tensor) else first_tensor(result[0])


@ops
def test_auto_takes_the_gpu_kernels_and_no_value_is_looked_at(op, gpu, chosen):
    if op == "embed_epilogue":
        pytest.importorskip("triton", reason="Triton is not installed")
    result = first_tensor(CALLS[op]())
    assert result.device.type == "cuda"
    assert chosen[0] == GPU_IMPL[op]


@ops
@pytest.mark.parametrize("impl", ["auto", "gpu"])
def test_cpu_and_cuda_tensors_are_not_mixed(op, impl, gpu):
    impl = GPU_IMPL[op] if impl == "gpu" else impl
    with pytest.raises(ValueError, match=r"^\w+: expected .* on cuda:0, got \[.*\] float32$"):
        CALLS[op](impl=impl, other="cpu")
    with pytest.raises(ValueError, match=r"^\w+: expected .* on cpu, got \[.*\] float32 on cuda:0$"):
        CALLS[op](device="cpu", other="cuda")


@ops
def test_a_request_that_cannot_be_met_lists_every_implementation(op, gpu):
    with pytest.raises(ValueError, match=f"impl='{GPU_IMPL[op]}' cannot take this call:") as raised:
        CALLS[op](device="cpu", impl=GPU_IMPL[op])
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == EVERY_IMPL[op]
    assert all(line.split(": ", 1)[1] for line in lines)
    with pytest.raises(ValueError, match="impl='cpu' cannot take this call") as raised:
        CALLS[op](impl="cpu")
    assert "cpu: the tensors are on cuda:0" in str(raised.value)


@pytest.mark.parametrize("op", ["mips_topk", "marginal_log_likelihood", "linear_marginal_cross_entropy"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (7, 5)}, "cuda: the kernels need compute capability 8.0, cuda:0 has 7.5"),
        (
            {"driver": 12080},
            "cuda: the driver runs CUDA 12.8 at most, this build needs 13.0: install a newer",
        ),
        ({"cuda": False}, "cuda: this build has no CUDA kernels"),
        (
            {"capability": (7, 0), "driver": 11080},
            "cuda: the driver runs CUDA 11.8 at most, .*; the kernels need compute capability 8.0",
        ),
    ],
)
def test_an_old_gpu_an_old_driver_a_build_without_cuda(op, change, reason, gpu, chosen):
    for name, value in change.items():
        setattr(gpu, name, value)
    with pytest.raises(ValueError, match=reason):
        CALLS[op](impl="cuda")
    with contextlib.suppress(Exception):  # what "auto" falls back to may look at values
        CALLS[op]()
    assert "cuda" not in chosen


def test_a_driver_of_the_same_major_version_will_do(gpu, chosen):
    gpu.driver, gpu.runtime = 13000, 13010
    call_topk()
    assert chosen == ["cuda"]


def test_an_old_gpu_gets_no_triton_either(gpu):
    pytest.importorskip("triton", reason="Triton is not installed")
    gpu.capability = (7, 5)
    with pytest.raises(ValueError, match=r"triton: the kernels need compute capability 8.0, cuda:0 has 7.5"):
        call_epilogue(impl="triton")


def test_k_beyond_the_limit(gpu, chosen):
    with pytest.raises(ValueError, match="cuda: the kernels take k <= 2048, got 2049"):
        call_topk(k=2049, impl="cuda")
    call_topk(k=2048, impl="cuda")
    with pytest.raises(ValueError, match="k: expected an int >= 0, got -1"):
        call_topk(k=-1)


def test_any_layout_is_taken(gpu, chosen):
    """Views with strides, offsets and odd widths: read with narrower loads or copied, never misread."""
    rows = tensor(51, 40)
    for blocks in (rows[1:, 1:], rows[:, ::2], rows.T, rows[:, :0]):
        assert rf.mips_topk(tensor(2, blocks.shape[1]), blocks, 3, impl="cuda").ids.shape == (2, 3)
    gold = tensor(4, 3, 2).transpose(0, 2)
    assert rf.marginal_log_likelihood(gold, tensor(3, 2).T, impl="cuda").shape == (2, 4)
    assert set(chosen) == {"cuda"}


def test_empty_inputs(gpu, chosen):
    assert rf.mips_topk(tensor(0, 8), tensor(50, 8), 3).ids.shape == (0, 3)
    assert rf.mips_topk(tensor(2, 8), tensor(0, 8), 3).ids.shape == (2, 3)
    assert rf.mips_topk(tensor(2, 8), tensor(50, 8), 0).ids.shape == (2, 0)
    for shape in ((0, 3, 4), (2, 3, 0)):
        batch, candidates, positions = shape
        assert rf.marginal_log_likelihood(tensor(*shape), tensor(batch, candidates)).shape == (
            batch,
            positions,
        )
    assert set(chosen) == {"cuda"}
    with pytest.raises(ValueError, match="gold_log_prob: expected at least one candidate, got K = 0"):
        rf.marginal_log_likelihood(tensor(2, 0, 4), tensor(2, 0))


def test_wrong_dtypes(gpu):
    with pytest.raises(TypeError, match=r"blocks: expected .* float32, got .* float16 on cuda:0"):
        rf.mips_topk(tensor(2, 8), tensor(50, 8, dtype=torch.float16), 3)
    with pytest.raises(TypeError, match=r"queries: expected .*, got .* int64 on cuda:0"):
        rf.mips_topk(integers(2, 8), integers(50, 8), 3)
    with pytest.raises(TypeError, match="labels: expected"):
        rf.linear_marginal_cross_entropy(
            tensor(2, 3, 4, 8), tensor(11, 8), None, tensor(2, 4), tensor(2, 3), impl="cuda"
        )
    with pytest.raises(ValueError, match="hidden: expected a contiguous last dimension"):
        embed_epilogue(tensor(3, 5, 16)[:, :, ::2], impl="triton")


def test_sizes_beyond_2_to_the_31_keep_their_shapes(gpu, chosen):
    many = 3_000_000_000 // 256
    assert rf.mips_topk(tensor(2, 256), tensor(many, 256), 10).ids.shape == (2, 10)
    loss = rf.linear_marginal_cross_entropy(
        tensor(70_000, 8, 8, 768), tensor(30_522, 768), None, integers(70_000, 8), tensor(70_000, 8)
    )
    assert loss.shape == ()
    assert DeviceIndex.bytes_needed("int8", 768, 21_000_000) > 21_000_000 * 768 * 5 > 1 << 31


def test_the_index_names_what_is_wrong_and_moves_what_is_elsewhere(gpu):
    index = DeviceIndex("int8", 24, 500, torch.device("cuda"))
    assert index.device == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"exclude_ids: expected .* on cuda:0"):
        index.search(tensor(2, 24), 3, exclude_ids=integers(2, device="cpu"))
    gpu.capability = (6, 1)
    with pytest.raises(ValueError, match=r"compute capability 8\.0, cuda:0 has 6\.1"):
        index.search(tensor(2, 24), 3)
    gpu.capability = (8, 0)
    with pytest.raises(ValueError, match="k <= 2048, got 3000"):
        index.search(tensor(2, 24), 3000)


# ---- what a call does on the device ----


class Call:
    """Stands for the native call: what it needs, and the streams that it was run on."""

    workspace_bytes = 12345

    def __init__(self):
        self.streams = []

    def run(self, scores, ids, workspace, workspace_bytes, stream):
        assert workspace_bytes == self.workspace_bytes
        self.streams.append(stream)


@pytest.fixture
def guarded(monkeypatch):
    """Streams exist inside torch.cuda.device only; yields the devices that were made current."""
    entered, current = [], []

    @contextlib.contextmanager
    def guard(device):
        entered.append(device)
        current.append(device)
        yield
        current.pop()

    class Stream:
        @property
        def cuda_stream(self):
            assert current, "asked for a stream outside the device's guard"
            return 77

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    return entered


def test_a_search_runs_on_the_callers_stream_of_the_tensors_device(guarded):
    call, queries = Call(), torch.zeros(6, 8)
    topk.run_cuda(call, queries, 4, None)
    assert call.streams == [77]
    assert guarded == [queries.device]


@pytest.mark.parametrize("kernel", ["chunk_lse_update_cuda", "chunk_dlogits_cuda"])
def test_chunk_kernels_run_on_the_callers_stream_of_the_tensors_device(guarded, monkeypatch, kernel):
    streams = []
    monkeypatch.setattr(_native, kernel, lambda *arguments: streams.append(arguments[-1]), raising=False)
    monkeypatch.setattr(lce, "cuda_stream", lambda tensor: torch.cuda.current_stream().cuda_stream)
    row = torch.zeros(2)
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    if kernel == "chunk_lse_update_cuda":
        lce._cuda_lse_update(logits, labels, 0, row, row, row)
    else:
        lce._cuda_dlogits(logits, labels, 0, row, row, row, torch.float32)
    assert streams == [77]
    assert guarded == [logits.device]


def test_out_of_memory_for_the_workspace_is_named_and_nothing_is_launched(guarded, monkeypatch):
    real, call = torch.empty, Call()

    def empty(*size, dtype=None, **options):
        if dtype == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*size, dtype=dtype, **options)

    with monkeypatch.context() as full:
        full.setattr(torch, "empty", empty)
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"mips_topk: no memory for the workspace of 12345 bytes \(6 queries, k=4\)",
        ):
            topk.run_cuda(call, torch.zeros(6, 8), 4, None)
    assert call.streams == []
    topk.run_cuda(call, torch.zeros(6, 8), 4, None)  # the next call finds everything as it was
    assert call.streams == [77]


def test_out_of_memory_for_a_chunk_of_logits_is_named_and_the_next_call_runs(monkeypatch):
    def call():
        return rf.linear_marginal_cross_entropy(
            torch.ones(2, 3, 4, 8), torch.ones(50, 8), None, torch.zeros(2, 4, dtype=torch.int64),
            torch.zeros(2, 3), impl="blas", chunk_bytes=4096,
        )  # fmt: skip

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(lce, "_wide_mm", full)
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"linear_marginal_cross_entropy: no memory for logits \[24, \d+\] in float32 \(chunk_bytes",
        ):
            call()
    assert call() == pytest.approx(torch.tensor(50.0).log().item(), abs=1e-5)


# ---- shapes that a CUDA graph can hold ----


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_with_fixed_shapes_is_the_loss(level, bias, monkeypatch):
    """What runs while a graph is captured: every row is computed, and the result is the same."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, scores = draw(3, 4, 5, 8), draw(31, 8), draw(3, 4)
    labels = torch.randint(31, (3, 5), generator=g)
    labels[0, 3:], labels[1], scores[2, 3] = -100, -100, -torch.inf
    hidden[0, :, 4], hidden[2, 3] = torch.nan, torch.inf  # an ignored position, an absent slot
    inputs = [hidden, weight, draw(31) if bias else None, scores]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]

    def run():
        loss, stats = rf.linear_marginal_cross_entropy(
            inputs[0], inputs[1], inputs[2], labels, inputs[3], level=level, impl="blas", return_stats=True,
            chunk_bytes=20_000,
        )  # fmt: skip
        return loss, stats, torch.autograd.grad(loss, [t for t in inputs if t is not None])

    want = run()
    monkeypatch.setattr(lce, "fixed_shapes", lambda labels: True)
    got = run()
    torch.testing.assert_close(got[0], want[0])
    for ours, theirs in zip([*got[1], *got[2]], [*want[1], *want[2]], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_with_fixed_shapes_no_value_is_looked_at(gpu, monkeypatch):
    """The body of the op, forward and backward, over tensors that have no values to look at."""
    hidden, weight, labels = tensor(40, 16), tensor(300, 16), integers(40)

    def forward():
        return lce.linear_gold_op._init_fn(hidden, weight, None, labels, torch.float32, 100_000, 0, "blas")

    monkeypatch.setattr(lce, "fixed_shapes", lambda labels: False)
    with pytest.raises(HostWaits, match="nonzero"):  # it learns how many rows count
        forward()
    monkeypatch.setattr(lce, "fixed_shapes", lambda labels: True)
    gold, row_max, row_logsum, kept = forward()
    assert gold.shape == (40,)
    d_hidden, d_weight, _ = lce.linear_gold_backward_op._init_fn(
        tensor(40), hidden, weight, None, labels, row_max, row_logsum, kept, 0, torch.float32, 100_000, "blas",
        [True, True, False],
    )  # fmt: skip
    assert (d_hidden.shape, d_weight.shape) == ((40, 16), (300, 16))
