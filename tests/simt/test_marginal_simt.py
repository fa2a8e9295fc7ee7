"""The CUDA sources of marginal_lse and of the chunk kernels, run on the CPU."""

import numpy as np
import pytest
import torch
from tolerances import assert_as_good_as_torch

from realm_fast.ops.marginal_lse import (
    DTYPE_CODES,
    accumulation_dtype,
    marginal_log_likelihood_reference,
    responsibility_reference,
)
from simt.harness import ROOT, in_parallel
from simt.scans import ORDERS

INF, NAN = float("inf"), float("nan")
LEVELS = ["token", "sequence"]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def raw(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def cooked(array, shape, dtype):
    """Bytes from a driver as a tensor."""
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).view(shape)


@pytest.fixture(scope="module")
def marginal_program(harness):
    return harness.build("drive_marginal_lse.cpp", [ROOT / "csrc/marginal_lse/marginal_lse.cu"])


@pytest.fixture(scope="module")
def chunk_program(harness):
    return harness.build("drive_linear_marginal_ce.cpp", [ROOT / "csrc/linear_marginal_ce/chunk.cu"])


def run_marginal(harness, program, gold, candidate, mask, grad, level, **options):
    batch, candidates, positions = gold.shape
    acc = accumulation_dtype(gold)
    sequence = level == "sequence"
    shapes = {
        "marginal": ((batch,) if sequence else (batch, positions), acc),
        "responsibility": ((batch, candidates, 1 if sequence else positions), acc),
        "d_gold": (tuple(gold.shape), gold.dtype),
        "d_candidate": ((batch, candidates), gold.dtype),
    }
    run = harness.run(
        program,
        inputs={
            "gold": raw(gold),
            "candidate": raw(candidate),
            "mask": None if mask is None else mask.numpy().view(np.uint8),
            "grad": raw(grad.to(acc)),
        },
        outputs=dict.fromkeys(shapes, ((-1,), np.uint8)),
        B=batch,
        K=candidates,
        M=positions,
        dtype=DTYPE_CODES[gold.dtype],
        sequence=sequence,
        **options,
    )
    assert run.raised == ""
    assert run.kinds == set(), run.errors[:3]
    return {name: cooked(run.arrays[name], *shape) for name, shape in shapes.items()}, run


def inputs(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch, candidates, positions = shape
    gold = (torch.randn(shape, generator=g) * 4 - 8).to(dtype).requires_grad_()
    scores = torch.randn(batch, candidates, generator=g)
    if candidates > 2:
        scores[::2, 2] = -INF
    mask = torch.rand(batch, positions, generator=g) > 0.3
    if batch > 1:
        mask[1] = False
    return gold, torch.log_softmax(scores, -1).to(dtype).requires_grad_(), mask


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8, 10), (2, 1, 1), (2, 3, 70)])
def test_marginal_lse(harness, marginal_program, shape, dtype, level):
    gold, candidate, mask = inputs(shape, dtype)
    exact = [t.detach().double().requires_grad_() for t in (gold, candidate)]
    truth = marginal_log_likelihood_reference(*exact, mask, level=level)
    eager = marginal_log_likelihood_reference(gold, candidate, mask, level=level)
    grad = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = {"marginal": (truth, eager)}
    expected["responsibility"] = tuple(
        responsibility_reference(a, b, mask, level=level) for a, b in (exact, (gold, candidate))
    )
    d_truth = torch.autograd.grad((truth * grad).sum(), exact)
    d_eager = torch.autograd.grad((eager * grad.to(eager)).sum(), (gold, candidate))
    expected["d_gold"], expected["d_candidate"] = zip(d_truth, d_eager, strict=True)
    results = in_parallel(
        lambda order: run_marginal(harness, marginal_program, gold, candidate, mask, grad, level, **order)[0],
        ORDERS,
    )
    for name, (true, by_torch) in expected.items():
        assert_as_good_as_torch(results[0][name], true, by_torch, what=name, scale=float(name == "marginal"))
        assert all(torch.equal(other[name], results[0][name]) for other in results[1:]), name


@pytest.mark.parametrize("level", LEVELS)
def test_marginal_lse_edges(harness, marginal_program, level):
    """Query 0: poison where nothing is looked at. 1: impossible. 2: NaN. 3: +inf. 4: offset 1e4."""
    gold = torch.zeros(5, 3, 2)
    candidate = torch.log_softmax(torch.zeros(5, 3), -1)
    mask = torch.ones(5, 2, dtype=torch.bool)
    candidate[0], candidate[0, 1] = torch.log(torch.tensor(0.5)), -INF
    gold[0, 1], gold[0, :, 1], mask[0, 1] = NAN, NAN, False
    gold[1] = -INF
    gold[2, 1, 0] = NAN
    gold[3, 1, 0] = INF
    gold[4] = 1e4
    grad = torch.ones(5, 2) if level == "token" else torch.ones(5)
    got, _ = run_marginal(harness, marginal_program, gold, candidate, mask, grad, level)
    marginal = got["marginal"][:, 0] if level == "token" else got["marginal"]
    assert marginal[0] == pytest.approx(0.0, abs=1e-6)
    assert marginal[1] == -INF
    assert marginal[2].isnan()
    assert marginal[3] == INF
    assert marginal[4] == (1e4 if level == "token" else 2e4)
    assert torch.equal(got["d_gold"][0, :, 0], torch.tensor([0.5, 0.0, 0.5]))
    assert (got["d_gold"][0, :, 1] == 0).all()
    assert torch.equal(got["d_candidate"][0] == 0, torch.tensor([False, True, False]))
    assert (got["d_gold"][1] == 0).all()
    assert (got["d_candidate"][1] == 0).all()
    assert got["d_gold"][2, :, 0].isnan().all()
    assert got["d_gold"][3, 1, 0].isnan()


def run_chunks(harness, program, logits, labels, grad, chunk, out, **options):
    rows, columns = logits.shape
    dtype = NUMPY[logits.dtype]
    run = harness.run(
        program,
        inputs={"logits": logits.numpy(), "labels": labels.numpy(), "grad": grad.numpy()},
        outputs=dict.fromkeys(("row_max", "row_logsum", "gold"), ((rows,), dtype))
        | {"d_logits": ((-1,), np.uint8)},
        rows=rows,
        columns=columns,
        chunk=chunk,
        dtype=DTYPE_CODES[logits.dtype],
        out_dtype=DTYPE_CODES[out],
        **options,
    )
    assert run.raised == ""
    assert run.kinds == set(), run.errors[:3]
    arrays = {name: torch.from_numpy(run.arrays[name].copy()) for name in ("row_max", "row_logsum", "gold")}
    arrays["d_logits"] = cooked(run.arrays["d_logits"], (rows, columns), out)
    return arrays, run


@pytest.mark.parametrize("chunk", [1024, 640, 333, 1300])  # wide loads, a ragged end, narrow loads, one chunk
@pytest.mark.parametrize(
    ("dtype", "out", "in_place"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float16, False),
        (torch.float64, torch.float64, True),
    ],
)
def test_chunks(harness, chunk_program, dtype, out, in_place, chunk):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1300, generator=g, dtype=torch.float64).mul_(4)
    logits[1] += 1e4
    logits[2, 7] = -INF  # a word ruled out
    logits = logits.to(dtype)
    labels = torch.tensor([0, 1299, 639, 640, 332])
    grad = torch.randn(5, generator=g).to(dtype)
    results = in_parallel(
        lambda order: run_chunks(
            harness, chunk_program, logits, labels, grad, chunk, out, in_place=in_place, **order
        ),
        ORDERS,
    )
    got, run = results[0]
    for other, _ in results[1:]:
        assert all(torch.equal(got[name], other[name]) for name in got)
    assert torch.equal(got["gold"], logits[torch.arange(5), labels])
    assert torch.equal(got["row_max"], logits.amax(-1))
    exact = logits.double()
    logsum = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1).log()
    assert_as_good_as_torch(got["row_logsum"], logsum, logsum.to(dtype), what="row_logsum")
    onehot = torch.nn.functional.one_hot(labels, 1300)
    truth = -grad.double()[:, None] * (exact.softmax(-1) - onehot)
    eager = (-grad[:, None] * (logits.softmax(-1) - onehot)).to(out)
    assert_as_good_as_torch(got["d_logits"], truth, eager, what="d_logits")
    # Every logit is read once forward and once backward, and every gradient written once; beside them a
    # thread reads what belongs to its row (36 bytes at most), and a row's first thread writes it.
    moved = logits.numel() * logits.element_size()
    threads = sum(launch["blocks"] * launch["threads"] for launch in run.launches)
    read, written = run.total("global_bytes_read"), run.total("global_bytes_written")
    assert 2 * moved <= read <= 2 * moved + 36 * threads
    made = logits.numel() * out.itemsize
    assert made <= written <= made + 24 * 5 * -(-1300 // chunk)


def test_chunks_pass_nan_on(harness, chunk_program):
    logits = torch.zeros(3, 8)
    logits[0, 3], logits[1, 3] = NAN, INF
    got, _ = run_chunks(
        harness, chunk_program, logits, torch.zeros(3, dtype=torch.int64), torch.ones(3), 4,
        torch.float32, in_place=True,
    )  # fmt: skip
    assert got["row_logsum"][:2].isnan().all()
    assert got["d_logits"][:2].isnan().all()
    assert torch.isfinite(got["d_logits"][2]).all()


def test_under_the_sanitizers(harness):
    program = harness.build(
        "drive_linear_marginal_ce.cpp", [ROOT / "csrc/linear_marginal_ce/chunk.cu"], build="sanitizers"
    )
    logits = torch.randn(2, 517)
    labels = torch.tensor([0, 516])
    for chunk in (256, 100):
        run_chunks(harness, program, logits, labels, torch.ones(2), chunk, torch.bfloat16, in_place=False)
