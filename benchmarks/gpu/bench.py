"""`make gpu-bench`: ours beside its peers. python -m realm_fast.benchmarks.gpu.bench [--out FOLDER] [--quick]

Measures the GPU's own limits first (copy bandwidth, bf16 matrix rate), then each case with every method
interleaved: the median of the rounds, and the spread. A method's answer is compared with the first one's that
works before it is timed; a method that fails is left out of the case, with its reason, and the others go on.
One JSON file and one Markdown table, written anew after every case. Ends with 2, and says why, when there is
no GPU to use.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from realm_fast.benchmarks.gpu import environment, model, peers

BUDGET_S = 420.0  # no case starts after it: with the last one, the start and the limits it is ten minutes
ROUNDS, QUICK_ROUNDS = 15, 5


class Search(NamedTuple):
    dtype: str  # what the scan reads
    num_queries: int
    num_blocks: int  # fewer where the memory holds no more
    dim: int
    k: int


class Loss(NamedTuple):
    queries: int
    candidates: int
    positions: int
    hidden: int
    vocab: int


CASES = [
    Search("bfloat16", 64, 13_400_000, 128, 10),
    Search("bfloat16", 512, 13_400_000, 128, 10),
    Loss(512, 1, 10, 768, 30_522),
    Loss(64, 8, 10, 768, 30_522),
    Search("int8", 64, 13_400_000, 128, 10),
    Search("bfloat16", 64, 21_000_000, 768, 10),
    Search("bfloat16", 1, 13_400_000, 128, 10),
    Search("bfloat16", 512, 13_400_000, 128, 100),
    Search("bfloat16", 512, 4_000_000, 128, 1000),
    Search("bfloat16", 512, 8_000_000, 768, 10),
    Search("float32", 64, 4_000_000, 128, 10),
    Search("int8", 512, 13_400_000, 128, 10),
]
QUICK = [
    Search("bfloat16", 64, 1_000_000, 128, 10),
    Search("int8", 64, 1_000_000, 128, 10),
    Loss(64, 1, 10, 768, 30_522),
]


class Gpu:
    """What the benchmark asks of the device. (Its tests put a CPU in its place.)"""

    device = "cuda"

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def timed_ms(self, call: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def extra_bytes(self, call: Callable[[], Any]) -> int:
        """The most that torch's allocator held during the call, beyond what it held before."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def limits(gpu: Gpu) -> dict[str, float]:
    """Bytes/s of a large copy (read + write) and FLOP/s of a large bf16 product: the best of ten."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    copy_ms = min(gpu.timed_ms(lambda: target.copy_(source)) for _ in range(10))
    a = torch.randn(8192, 8192, device=gpu.device, dtype=torch.bfloat16)
    product_ms = min(gpu.timed_ms(lambda: a @ a) for _ in range(10))
    return {"bandwidth": 2 * (1 << 30) / copy_ms * 1e3, "bf16_flops": 2 * 8192**3 / product_ms * 1e3}


def prepare(case: Search | Loss, gpu: Gpu) -> tuple[dict[str, Any], dict[str, peers.Method]]:
    """A case's row (shape, least bytes, FLOPs) and its methods."""
    torch.manual_seed(0)
    if isinstance(case, Loss):
        b, k, m, h, v = case
        hidden = torch.randn(b, k, m, h, device=gpu.device, dtype=torch.bfloat16)
        weight = torch.randn(v, h, device=gpu.device, dtype=torch.bfloat16) * h**-0.5
        labels = torch.randint(v, (b, m), device=gpu.device)
        scores = torch.randn(b, k, device=gpu.device)
        shape = f"loss, B = {b}, K = {k}, M = {m}, {h} x {v}"
        # Operands and their gradients once; the product, and the two of its backward pass.
        row = {"case": shape, "bytes": 2 * 2 * (b * k * m * h + v * h), "flops": 6 * b * k * m * h * v}
        return row, peers.loss_methods(hidden, weight, labels, scores)
    element = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    per_block = case.dim * (element.itemsize * 2 + (3 if case.dtype == "int8" else 0)) + 64
    num_blocks = min(case.num_blocks, int(gpu.free_bytes() * 0.6 / per_block))
    blocks = torch.empty(num_blocks, case.dim, device=gpu.device, dtype=element)
    for begin in range(0, num_blocks, 1 << 20):
        blocks[begin : begin + (1 << 20)].normal_()
    queries = torch.randn(case.num_queries, case.dim, device=gpu.device, dtype=element)
    row = {
        "case": f"search {case.dtype}, B = {case.num_queries}, {num_blocks} x {case.dim}, k = {case.k}",
        "bytes": num_blocks * case.dim * model.ELEMENT_BYTES[case.dtype],
        "flops": 2 * case.num_queries * num_blocks * case.dim,
    }
    return row, peers.search_methods(case.dtype, queries, blocks, case.k)


def run_case(case: Search | Loss, rounds: int, gpu: Gpu) -> dict[str, Any]:
    """Every method's answer compared, then timed in turns."""
    row, methods = prepare(case, gpu)
    left_out = {name: call for name, call in methods.items() if isinstance(call, str)}
    calls = {name: call for name, call in methods.items() if not isinstance(call, str)}
    measured: dict[str, dict[str, Any]] = {name: {} for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}

    def attempt(name: str, action: Callable[[], None]) -> None:
        """A method that cannot take the case must not end the run, whenever it fails."""
        if name in left_out:
            return
        try:
            action()
            gpu.synchronize()
        except Exception as error:
            left_out[name] = f"failed: {peers.first_line(error)}"

    reference: dict[str, torch.Tensor] = {}

    def compare(name: str) -> None:
        result = calls[name]()  # also compiles what is compiled on first use
        if peers.L2 in name:
            return
        got = torch.as_tensor(result[0], device=gpu.device).float()
        if not reference:
            reference[name] = got
        else:
            (known,) = reference.values()
            measured[name]["worst_difference"] = float((got - known).abs().max() / known.abs().max())

    for name in calls:
        attempt(name, lambda name=name: compare(name))
    for _ in range(rounds):
        for name in calls:
            attempt(name, lambda name=name: times[name].append(gpu.timed_ms(calls[name])))
    for name in calls:
        attempt(name, lambda name=name: measured[name].update(extra_bytes=gpu.extra_bytes(calls[name])))
    for name, values in times.items():
        if name not in left_out:
            spread = {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
            measured[name].update(spread)
    row["compared_with"] = next(iter(reference), None)
    row["methods"] = {name: values for name, values in measured.items() if name not in left_out}
    return row | {"left_out": left_out}


def markdown(results: dict[str, Any]) -> str:
    peak = results["limits"]
    lines = [
        f"{results['environment'].get('gpu', {}).get('name')}: copy {peak['bandwidth'] / 1e12:.2f} TB/s, "
        f"bf16 product {peak['bf16_flops'] / 1e12:.0f} TFLOP/s, both measured in this run.",
        "",
        "| case | method | median ms (min-max) | of bandwidth | of matrix rate | extra MB | differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["cases"]:
        for name, m in row["methods"].items():
            seconds = m["median_ms"] / 1e3
            differs = m.get("worst_difference")
            lines.append(
                f"| {row['case']} | {name} | {m['median_ms']:.3f} ({m['min_ms']:.3f}-{m['max_ms']:.3f}) "
                f"| {row['bytes'] / seconds / peak['bandwidth']:.0%} "
                f"| {row['flops'] / seconds / peak['bf16_flops']:.0%} | {m['extra_bytes'] / 1e6:.0f} "
                f"| {'' if differs is None else f'{differs:.1e}'} |"
            )
        lines += [f"| {row['case']} | {name} | {why} | | | | |" for name, why in row["left_out"].items()]
    lines += [f"\nNot run: {case}" for case in results["not_run"]]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(results, indent=1))
    (folder / "bench.md").write_text(markdown(results))


def run(cases: list[Search | Loss], rounds: int, out: Path, gpu: Gpu) -> int:
    """0; 1 where not a single call of ours could be timed."""
    started = time.perf_counter()
    results: dict[str, Any] = {"environment": environment.describe(), "limits": limits(gpu)}
    results |= {"cases": [], "not_run": []}
    for case in cases:
        if time.perf_counter() - started > BUDGET_S:
            results["not_run"].append(f"{case}: the time was up")
            continue
        print(f"== {case}", flush=True)
        try:
            results["cases"].append(run_case(case, rounds, gpu))
        except Exception as error:  # no memory for its operands, for one
            results["not_run"].append(f"{case}: {peers.first_line(error)}")
        gpu.release()
        write(results, out)
    write(results, out)
    print(markdown(results))
    timed = any(name.startswith("realm_fast") for row in results["cases"] for name in row["methods"])
    return 0 if timed else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--quick", action="store_true", help="three small cases")
    options = parser.parse_args(argv)
    reasons = environment.missing()
    if reasons:
        print(environment.explain(reasons, "gpu-bench"), file=sys.stderr)
        return 2
    cases, rounds = (QUICK, QUICK_ROUNDS) if options.quick else (CASES, ROUNDS)
    return run(cases, rounds, options.out, Gpu())


if __name__ == "__main__":
    sys.exit(main())
