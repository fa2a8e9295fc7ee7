"""`make gpu-bench`: ours beside its peers. python -m realm_fast.benchmarks.gpu.bench [--out FOLDER] [--quick]

Measures the GPU's own limits first (copy bandwidth, bf16 matrix rate), then each case with every method
interleaved: the median of the rounds, and the spread. A method's answer is compared with ours before it is
timed.
One JSON file and one Markdown table. Ends with 2, and says why, when there is no GPU to use.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from realm_fast.benchmarks.gpu import environment, model

BUDGET_S = 480.0  # cases that would start after this are left out, and the table says so
CASES = [  # (dtype, B, N, D, k); N shrinks to what the memory holds
    ("bfloat16", 1, 13_400_000, 128, 10),
    ("bfloat16", 64, 13_400_000, 128, 10),
    ("bfloat16", 512, 13_400_000, 128, 10),
    ("bfloat16", 512, 13_400_000, 128, 100),
    ("bfloat16", 512, 4_000_000, 128, 1000),
    ("bfloat16", 64, 21_000_000, 768, 10),
    ("bfloat16", 512, 8_000_000, 768, 10),
    ("float32", 64, 4_000_000, 128, 10),
    ("int8", 64, 13_400_000, 128, 10),
    ("int8", 512, 13_400_000, 128, 10),
]
QUICK = [("bfloat16", 64, 1_000_000, 128, 10), ("int8", 64, 1_000_000, 128, 10)]


def timed_ms(call: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def limits() -> dict[str, float]:
    """Bytes/s of a large copy (read + write) and FLOP/s of a large bf16 product: the best of ten."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = min(timed_ms(lambda: target.copy_(source)) for _ in range(10))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_ms = min(timed_ms(lambda: a @ a) for _ in range(10))
    return {"bandwidth": 2 * (1 << 30) / copy_ms * 1e3, "bf16_flops": 2 * 8192**3 / product_ms * 1e3}


def torch_topk(queries: torch.Tensor, blocks: torch.Tensor, k: int, chunk: int = 1 << 20):
    """mm + topk over chunks of the index, merged: scores are written and read once."""
    best = None
    for begin in range(0, len(blocks), chunk):
        scores, ids = (queries @ blocks[begin : begin + chunk].T).topk(min(k, len(blocks) - begin), dim=1)
        ids = ids + begin
        if best is not None:
            scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids], 1)
            scores, order = scores.topk(k, dim=1)
            ids = ids.gather(1, order)
        best = scores, ids
    return best


def methods(dtype: str, queries: torch.Tensor, blocks: torch.Tensor, k: int) -> dict[str, Any]:
    """Name -> function returning (scores, ids), or the reason why it is not here."""
    from realm_fast import mips_topk
    from realm_fast.device_index import DeviceIndex

    found: dict[str, Any] = {}
    if dtype == "int8":
        index = DeviceIndex.from_embeddings(blocks, "int8")
        exact = queries.float()
        found["realm_fast int8, certified"] = lambda: index.search(exact, k)
    else:
        found["realm_fast"] = lambda: mips_topk(queries, blocks, k, impl="cuda")
    found["torch mm + topk"] = lambda: torch_topk(queries, blocks, k)
    try:
        import faiss
        import faiss.contrib.torch_utils

        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError("this faiss has no GPU support")
        resources = faiss.StandardGpuResources()
        whole = queries.float() if blocks.dtype == torch.bfloat16 else queries
        rows = blocks.float() if blocks.dtype == torch.bfloat16 else blocks
        found["faiss knn_gpu"] = lambda: faiss.knn_gpu(
            resources, whole, rows, k, metric=faiss.METRIC_INNER_PRODUCT
        )
    except (ImportError, torch.OutOfMemoryError) as error:
        found["faiss knn_gpu"] = f"not available: {str(error).splitlines()[0]}"
    try:
        from cuvs.neighbors import brute_force

        built = brute_force.build(blocks.half(), metric="inner_product")
        half = queries.half()
        found["cuVS brute_force"] = lambda: brute_force.search(built, half, k)
    except Exception as error:  # absent, or it refuses the shape: the table says which
        found["cuVS brute_force"] = f"not available: {type(error).__name__}: {str(error)[:80]}"
    try:
        import flashlib

        found["FlashLib flash_knn (L2)"] = lambda: flashlib.flash_knn(queries, blocks, k)
    except ImportError as error:
        found["FlashLib flash_knn (L2)"] = f"not available: {error}"
    return found


def run_case(case: tuple, rounds: int) -> dict[str, Any]:
    dtype, num_queries, num_blocks, dim, k = case
    element = torch.float32 if dtype in ("float32", "int8") else torch.bfloat16
    free, _ = torch.cuda.mem_get_info()
    per_block = dim * (element.itemsize * 2 + (3 if dtype == "int8" else 0)) + 64
    num_blocks = min(num_blocks, int(free * 0.6 / per_block))
    torch.manual_seed(0)
    blocks = torch.empty(num_blocks, dim, device="cuda", dtype=element)
    for begin in range(0, num_blocks, 1 << 20):
        blocks[begin : begin + (1 << 20)].normal_()
    queries = torch.randn(num_queries, dim, device="cuda", dtype=element)
    available = methods(dtype, queries, blocks, k)
    calls = {name: call for name, call in available.items() if callable(call)}
    row: dict[str, Any] = {"dtype": dtype, "B": num_queries, "N": num_blocks, "D": dim, "k": k, "methods": {}}
    row["left_out"] = {name: reason for name, reason in available.items() if not callable(reason)}
    reference = None
    for name in list(calls):
        try:
            scores, _ = calls[name]()[:2]
            torch.cuda.synchronize()
        except Exception as error:  # a peer that cannot take the case must not end the run
            row["left_out"][name] = f"failed: {type(error).__name__}: {str(error)[:100]}"
            del calls[name]
            continue
        if reference is None:
            reference = torch.as_tensor(scores, device="cuda").float()
        elif "L2" not in name:
            got = torch.as_tensor(scores, device="cuda").float()
            worst = float((got - reference).abs().max() / reference.abs().max())
            row["methods"].setdefault(name, {})["worst_score_difference"] = worst
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed_ms(call))
    for name, values in times.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[name]()
        torch.cuda.synchronize()
        row["methods"].setdefault(name, {}).update(
            median_ms=statistics.median(values),
            min_ms=min(values),
            max_ms=max(values),
            extra_bytes=torch.cuda.max_memory_allocated() - before,
        )
    size = model.ELEMENT_BYTES["int8" if dtype == "int8" else dtype]
    row["bytes"] = num_blocks * dim * size
    row["flops"] = 2 * num_queries * num_blocks * dim
    return row


def markdown(results: dict[str, Any]) -> str:
    peak = results["limits"]
    lines = [
        f"{results['environment'].get('gpu', {}).get('name')}: copy {peak['bandwidth'] / 1e12:.2f} TB/s, "
        f"bf16 product {peak['bf16_flops'] / 1e12:.0f} TFLOP/s, both measured in this run.",
        "",
        "| dtype | B | N x D | k | method | median ms (min-max) | of bandwidth | of matrix rate | extra MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["cases"]:
        head = f"| {row['dtype']} | {row['B']} | {row['N'] / 1e6:.1f}M x {row['D']} | {row['k']} |"
        for name, m in row["methods"].items():
            seconds = m["median_ms"] / 1e3
            lines.append(
                f"{head} {name} | {m['median_ms']:.3f} ({m['min_ms']:.3f}-{m['max_ms']:.3f}) "
                f"| {row['bytes'] / seconds / peak['bandwidth']:.0%} "
                f"| {row['flops'] / seconds / peak['bf16_flops']:.0%} | {m['extra_bytes'] / 1e6:.0f} |"
            )
        lines += [f"{head} {name} | {reason} | | | |" for name, reason in row["left_out"].items()]
    lines += [f"\nLeft out, the time was up: {case}" for case in results["not_run"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--quick", action="store_true", help="two small cases")
    options = parser.parse_args(argv)
    reasons = environment.missing()
    if reasons:
        print(environment.explain(reasons, "gpu-bench"), file=sys.stderr)
        return 2
    started = time.perf_counter()
    results: dict[str, Any] = {
        "environment": environment.describe(),
        "limits": limits(),
        "cases": [],
        "not_run": [],
    }
    for case in QUICK if options.quick else CASES:
        if time.perf_counter() - started > BUDGET_S:
            results["not_run"].append(str(case))
            continue
        print(f"== {case}", flush=True)
        results["cases"].append(run_case(case, 5 if options.quick else 15))
        torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(results, indent=1))
    (options.out / "bench.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
