"""marginal_log_likelihood beside torch: microseconds, since the tensors are small and launches the cost.

    realm-fast bench marginal [--quick]        or  python -m realm_fast.benchmarks.bench_marginal_lse

Peers: the same formula in eager torch, the masked reference, and torch.compile of the formula. Values and
gradients are checked against float64 before anything is timed; implementations take turns.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from realm_fast.benchmarks.bench_linear_marginal_ce import RESULTS, machine

import realm_fast as rf
from realm_fast.ops.marginal_lse import marginal_log_likelihood_reference

SHAPES = [(8, 8, 10), (64, 8, 10), (16, 100, 32), (512, 8, 10)]  # B, K, M
OURS = "realm_fast"


def eager(gold: torch.Tensor, candidate: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(candidate[..., None] + gold, 1).masked_fill(~mask, 0)


def implementations() -> dict[str, Callable[..., torch.Tensor]]:
    return {
        OURS: rf.marginal_log_likelihood,
        "eager": eager,
        "reference": marginal_log_likelihood_reference,
        "torch.compile": torch.compile(eager, dynamic=True),
    }


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    batch, candidates, positions = shape
    gold = (torch.randn(shape, generator=g) * 4 - 8).to(dtype).requires_grad_()
    candidate = torch.log_softmax(torch.randn(batch, candidates, generator=g), -1)
    mask = torch.rand(batch, positions, generator=g) > 0.3
    return gold, candidate.to(dtype).requires_grad_(), mask


def forward_backward(run: Callable[..., torch.Tensor], inputs):
    return torch.autograd.grad(run(*inputs).sum(), inputs[:2])


def check_values(shape: tuple[int, int, int], run: Callable[..., torch.Tensor]) -> float:
    """Largest absolute error of value and gradients against float64; raises if it is large."""
    inputs, exact = make_inputs(shape), make_inputs(shape)
    exact = tuple(t.detach().double().requires_grad_() for t in exact[:2]) + exact[2:]
    pairs = [(run(*inputs), eager(*exact))]
    pairs += zip(forward_backward(run, inputs), forward_backward(eager, exact), strict=True)
    error = max((a.double() - b).abs().max().item() for a, b in pairs)
    if not error < 1e-4:
        raise AssertionError(f"{shape}: off by {error:.1e}")
    return error


def test_marginal_lse(benchmark):
    """For pytest-benchmark: forward and backward at the pre-training shape."""
    check_values(SHAPES[0], rf.marginal_log_likelihood)
    inputs = make_inputs(SHAPES[0])
    benchmark(lambda: forward_backward(rf.marginal_log_likelihood, inputs))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_marginal_lse", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, a few seconds")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/...; quick: none)")
    options, _ = parser.parse_known_args(argv)  # shares its command line with bench_linear_marginal_ce
    rows = []
    runs = implementations()
    for shape in SHAPES[:2] if options.quick else SHAPES:
        inputs = make_inputs(shape)
        errors = {name: check_values(shape, run) for name, run in runs.items()}
        for what in ("forward", "forward+backward"):
            rows += _time_shape(shape, what, runs, inputs, errors, 20 if options.quick else 60)
    if not options.quick:
        stem = f"marginal_lse-{machine()['cpu'].replace(' ', '-')}-{os.cpu_count()}c-{date.today()}.json"
        out = options.out or RESULTS / stem
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        print(f"wrote {out}")


def _time_shape(shape, what: str, runs, inputs, errors, rounds: int) -> list[dict[str, object]]:
    calls_in_a_round = 20
    micros: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls_in_a_round):
                if what == "forward":
                    with torch.no_grad():
                        run(*inputs)
                else:
                    forward_backward(run, inputs)
            micros[name].append((time.perf_counter() - start) / calls_in_a_round * 1e6)
    own = statistics.median(micros[OURS])
    print(f"\n{what}, f32, B={shape[0]} K={shape[1]} M={shape[2]}")
    rows = []
    for name, values in micros.items():
        median = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        print(f"  {name:16}{median:9.1f} us ({low:.1f}-{high:.1f}){median / own:8.2f} x ours", flush=True)
        rows.append(
            {
                "shape": shape, "pass": what, "implementation": name, "median_us": median,
                "quartiles_us": [low, high], "times_ours": median / own, "error": errors[name],
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
