"""linear_marginal_cross_entropy beside its peers: time and peak extra memory, forward and forward+backward.

    realm-fast bench marginal [--quick]        or  python -m realm_fast.benchmarks.bench_linear_marginal_ce

Peers, each followed by the same logsumexp marginal: eager torch, torch.compile of the same, torch's
F.linear_cross_entropy without and with its chunking options (torch >= 2.13), and cut-cross-entropy's
torch_compile path (which takes no bias and is run without one). Values and gradients of each are
checked against float64 before anything is timed. Implementations take turns inside every repetition, so
that a busy machine is busy for all; figures are medians with the range beside them, and the least processor
time of a call (all threads), which other programs disturb less.

The whole table takes long. Parts of it (--width, --vocab, --dtype, --only) go to files of their own (--out),
and `--merge FILE...` makes one JSON file, table and plot of them.

Peak extra memory is what the process grows by beyond what it held before the call and beyond the gradients
it must return (Linux's VmHWM, reset before the call), in a process that has run the same call once before.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import realm_fast as rf

RESULTS = Path(__file__).resolve().parent / "results"
CHART = RESULTS.parents[1] / "docs" / "ops" / "linear_marginal_ce.png"
# A process for each figure takes long; these show what memory grows with: (H, V, dtype).
MEMORY = {(128, 30522, "f32"), (768, 30522, "f32"), (768, 30522, "bf16"), (384, 250002, "f32")}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
OURS = "realm_fast"
KEEPING = "realm_fast, logits kept"  # all of them from forward to backward, as most peers do
SETTLE_SECONDS = 0.03  # OpenMP threads of the call before spin for a while after it


@dataclass(frozen=True)
class Case:
    """One shape. FLOPs: three products of 2 * rows * H * V for forward and backward, one for forward."""

    width: int
    vocab: int
    dtype: str
    batch: int = 8
    candidates: int = 8
    positions: int = 10

    @property
    def rows(self) -> int:
        return self.batch * self.candidates * self.positions

    def flops(self, backward: bool) -> float:
        return (3 if backward else 1) * 2.0 * self.rows * self.width * self.vocab

    def gradient_bytes(self) -> int:
        size = DTYPES[self.dtype].itemsize
        return (
            size * (self.rows * self.width + self.vocab * (self.width + 1)) + 4 * self.batch * self.candidates
        )


def make_inputs(case: Case, dtype: torch.dtype | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias, labels, scores: logits of a spread a trained reader has, gradients wanted."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype] if dtype is None else dtype
    storage = DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(*shape, generator=generator).mul_(scale)
        return value.to(storage).to(dtype).requires_grad_()

    hidden = normal(case.batch, case.candidates, case.positions, case.width)
    weight = normal(case.vocab, case.width, scale=3 * case.width**-0.5)
    bias = normal(case.vocab)
    scores = torch.randn(case.batch, case.candidates, generator=generator)
    scores = scores.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    labels = torch.randint(case.vocab, (case.batch, case.positions), generator=generator)
    return hidden, weight, bias, labels, scores


def marginal_of(nll: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The marginal every peer is followed by: nll [B, K, M], scores [B, K] -> mean loss."""
    log_prior = torch.log_softmax(scores, -1)[..., None]
    return -torch.logsumexp(log_prior - nll.to(scores.dtype), 1).mean()


def _targets(labels: torch.Tensor, candidates: int) -> torch.Tensor:
    return labels[:, None].expand(-1, candidates, -1)


def eager(hidden, weight, bias, labels, scores):
    log_prob = torch.log_softmax(F.linear(hidden, weight, bias), -1)
    gold = log_prob.gather(-1, _targets(labels, hidden.shape[1])[..., None])[..., 0]
    return marginal_of(-gold, scores)


def compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(eager, dynamic=True)


def linear_cross_entropy(options) -> Callable[..., torch.Tensor]:
    def run(hidden, weight, bias, labels, scores):
        target = _targets(labels, hidden.shape[1])
        nll = F.linear_cross_entropy(
            hidden.flatten(0, 2),
            weight,
            target.reshape(-1),
            linear_bias=bias,
            reduction="none",
            options=options,
        )
        return marginal_of(nll.view(target.shape), scores)

    return run


def cut_cross_entropy() -> Callable[..., torch.Tensor]:
    from cut_cross_entropy import linear_cross_entropy as cce

    def run(hidden, weight, bias, labels, scores):
        target = _targets(labels, hidden.shape[1])
        nll = cce(hidden.flatten(0, 2), weight, target.reshape(-1), reduction="none", impl="torch_compile")
        return marginal_of(nll.view(target.shape), scores)

    return run


def ours(**options) -> Callable[..., torch.Tensor]:
    """By default: f32 in one pass, logits computed once and held by chunks; bf16 in two, recomputing them."""

    def run(hidden, weight, bias, labels, scores):
        return rf.linear_marginal_cross_entropy(hidden, weight, bias, labels, scores, **options)

    return run


def implementations() -> dict[str, Callable[..., torch.Tensor]]:
    """Every implementation this environment has; what is missing is said on stderr."""
    found = {OURS: ours(), KEEPING: ours(keep_logits_bytes=1 << 40), "eager": eager}
    found["torch.compile"] = compiled()
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = linear_cross_entropy(None)
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy chunked"] = linear_cross_entropy(options)
    else:
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: left out", file=sys.stderr)
    try:
        found["cut-cross-entropy"] = cut_cross_entropy()
    except ImportError as error:
        print(f"cut-cross-entropy left out: {error}", file=sys.stderr)
    return found


def with_backward(run: Callable[..., torch.Tensor], inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    hidden, weight, bias, _, scores = inputs
    wanted = (hidden, weight, scores, bias)

    def call():
        return torch.autograd.grad(run(*inputs), wanted, allow_unused=True)

    return call


def without_backward(run: Callable[..., torch.Tensor], inputs) -> Callable[[], torch.Tensor]:
    def call():
        with torch.no_grad():
            return run(*inputs)

    return call


def check_values(case: Case, runs: dict[str, Callable[..., torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Largest error, relative to the largest value, of loss and gradients; raises if one is wrong."""
    small = Case(case.width, case.vocab, case.dtype, batch=2)
    exact, inputs = make_inputs(small, torch.float64), make_inputs(small)
    names = ("loss", "hidden", "weight", "scores", "bias")
    with_bias = [eager(*exact), *with_backward(eager, exact)()]
    no_bias_inputs = (*exact[:2], None, *exact[3:])
    loss = eager(*no_bias_inputs)
    no_bias = [loss, *torch.autograd.grad(loss, (exact[0], exact[1], exact[4])), None]
    errors: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        truth = no_bias if name == "cut-cross-entropy" else with_bias
        got = [run(*inputs), *with_backward(run, inputs)()]
        errors[name] = {}
        for what, value, expected in zip(names, got, truth, strict=True):
            if expected is None or value is None:
                continue
            error = (value.double() - expected).abs().max() / expected.abs().max()
            errors[name][what] = error.item()
            if not error < (1e-4 if case.dtype == "f32" else 6e-2):
                raise AssertionError(f"{name}: {what} of {case} is off by {error:.1e} of the largest value")
    return errors


class Timing(NamedTuple):
    """Seconds of one call: on the clock, and of processor time."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def time_together(
    calls: dict[str, Callable[[], object]], budget_seconds: float, least: int = 2, most: int = 15
) -> dict[str, list[Timing]]:
    """Seconds of each call; the calls take turns until the budget is used. Each has an untimed one first."""
    seconds: dict[str, list[Timing]] = {name: [] for name in calls}
    slow: set[str] = set()
    for name, call in calls.items():
        call()  # what is compiled or fetched once is not counted
        first = timed(call)
        if first.wall > budget_seconds / 2:  # one call has to do
            seconds[name].append(first)
            slow.add(name)
    end = time.perf_counter() + budget_seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if name in slow:
                continue
            time.sleep(SETTLE_SECONDS)
            seconds[name].append(timed(call))
    return seconds


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """What one call adds to the resident memory at its peak, everything it returns included."""
    call()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the heap's free pages would hide what is allocated again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_bytes("VmRSS")
    kept = call()
    peak = _status_bytes("VmHWM")
    del kept
    return peak - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": rf.cpu_features()["levels"],
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "load": os.getloadavg()[0],
    }


def measure_peak(name: str, case: Case, backward: bool) -> int:
    run = implementations()[name]
    inputs = make_inputs(case)
    call = with_backward(run, inputs) if backward else without_backward(run, inputs)
    return max(0, peak_extra_bytes(call) - (case.gradient_bytes() if backward else 0))


def peak_in_new_process(name: str, case: Case, backward: bool) -> int | None:
    """measure_peak in a process of its own: what other cases left in the allocator would blur it."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        json.dumps({"name": name, "case": asdict(case), "backward": backward}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        print(f"memory of {name} not measured: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return int(done.stdout.split()[-1])


def cases(widths: list[int], vocabs: list[int], dtypes: list[str]) -> list[Case]:
    return [Case(width, vocab, dtype) for vocab in vocabs for width in widths for dtype in dtypes]


def merge(parts: list[dict]) -> dict:
    """One result of several parts, measured on one machine; of a row measured twice the later one stays.

    Raises:
        ValueError: the parts come from different machines, threads or versions of torch.
    """
    same = ("cpu", "cores", "threads", "features", "torch")
    for part in parts[1:]:
        for key in same:
            if part["machine"][key] != parts[0]["machine"][key]:
                raise ValueError(
                    f"merge: expected parts of one machine, got {key} {parts[0]['machine'][key]!r} and "
                    f"{part['machine'][key]!r}"
                )
    key = ("vocab", "width", "dtype", "pass", "implementation", "batch", "candidates", "positions")
    rows = {tuple(row[name] for name in key): row for part in parts for row in part["rows"]}
    loads = [load for part in parts for load in _as_list(part["machine"]["load"])]
    by_case = sorted(rows.values(), key=lambda row: tuple(row[name] for name in key[:4]))  # a stable sort
    return {"machine": {**parts[0]["machine"], "load": loads}, "rows": by_case}


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def run_case(
    case: Case, backward: bool, runs, budget_seconds: float, memory: bool
) -> list[dict[str, object]]:
    inputs = make_inputs(case)
    make = with_backward if backward else without_backward
    seconds = time_together({name: make(run, inputs) for name, run in runs.items()}, budget_seconds)
    own = statistics.median(timing.wall for timing in seconds[OURS])
    rows = []
    for name, timings in seconds.items():
        values = [timing.wall for timing in timings]
        median = statistics.median(values)
        peak = peak_in_new_process(name, case, backward) if memory else None
        rows.append(
            {
                **asdict(case),
                "pass": "forward+backward" if backward else "forward",
                "implementation": name,
                "median_ms": median * 1e3,
                "range_ms": [min(values) * 1e3, max(values) * 1e3],
                "least_cpu_ms": min(timing.cpu for timing in timings) * 1e3,
                "repeats": len(values),
                "gflops": case.flops(backward) / median / 1e9,
                "times_ours": median / own,
                "peak_extra_bytes": peak,
            }
        )
    return rows


def print_rows(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    print(
        f"\n{first['pass']}, {first['dtype']}, B={first['batch']} K={first['candidates']} "
        f"M={first['positions']} H={first['width']} V={first['vocab']}"
    )
    print(f"  {'':32}{'ms (range)':>26}{'CPU ms':>9}{'GFLOP/s':>9}{'x ours':>8}{'peak extra MB':>15}")
    for row in rows:
        low, high = row["range_ms"]
        span = f"{row['median_ms']:.1f} ({low:.1f}-{high:.1f})"
        peak = "-" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 1e6:.1f}"
        print(
            f"  {row['implementation']:32}{span:>26}{row['least_cpu_ms']:>9.1f}{row['gflops']:>9.0f}"
            f"{row['times_ours']:>8.2f}{peak:>15}",
            flush=True,
        )


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Time and memory of forward+backward against ours, one group of bars a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["pass"] == "forward+backward"]
    measured = [row for row in rows if row["peak_extra_bytes"] is not None]
    figure, axes = plt.subplots(2, 1, figsize=(11, 7.5), layout="constrained")
    _bars(axes[0], rows, lambda row: row["times_ours"], "time of forward+backward, realm_fast = 1")
    _bars(axes[1], measured, lambda row: row["peak_extra_bytes"] / 1e6, "peak extra memory, MB")
    axes[0].legend(fontsize=8, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis, rows, value_of, title: str) -> None:
    def label(row) -> str:
        return f"{row['dtype']}\nH={row['width']}\nV={row['vocab'] // 1000}k"

    names = list(dict.fromkeys(row["implementation"] for row in rows))
    labels = list(dict.fromkeys(label(row) for row in rows))
    for i, name in enumerate(names):
        own = [
            row for row in rows if row["implementation"] == name
        ]  # not every case has every implementation
        places = [labels.index(label(row)) + (i - len(names) / 2) * 0.8 / len(names) for row in own]
        axis.bar(places, [value_of(row) for row in own], 0.8 / len(names), label=name)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)


def test_linear_marginal_ce(benchmark):
    """For pytest-benchmark: forward and backward of one small case."""
    case = Case(128, 30522, "f32", batch=2)
    check_values(case, {OURS: ours()})
    benchmark(with_backward(ours(), make_inputs(case)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_linear_marginal_ce", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, about a minute")
    parser.add_argument("--width", type=int, nargs="+", default=[128, 384, 768], help="values of H")
    parser.add_argument("--vocab", type=int, nargs="+", default=[30522, 250002], help="values of V")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these implementations (ours always)")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="measure nothing: join these")
    parser.add_argument("--seconds", type=float, default=0, help="for each case and pass (0: 10; quick: 3)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's default)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/...; quick: none)")
    parser.add_argument("--plot", type=Path, help="PNG file (default: docs/...; quick: none)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak:
        task = json.loads(options.peak)
        print(measure_peak(task["name"], Case(**task["case"]), task["backward"]))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.merge:
        result = merge([json.loads(path.read_text()) for path in options.merge])
        for _, group in itertools.groupby(
            result["rows"], key=lambda r: (r["pass"], r["dtype"], r["width"], r["vocab"])
        ):
            print_rows(list(group))
        write(result, options.out or RESULTS / _result_name(result["machine"]), options.plot or CHART)
        return
    everything = implementations()
    if options.only:
        unknown = set(options.only) - everything.keys()
        if unknown:
            parser.error(f"--only: expected names of {list(everything)}, got {sorted(unknown)}")
        everything = {name: run for name, run in everything.items() if name in (OURS, *options.only)}
    print(json.dumps(machine()))
    rows: list[dict[str, object]] = []
    wanted = (
        ([128], [30522], list(DTYPES)) if options.quick else (options.width, options.vocab, options.dtype)
    )
    for case in cases(*wanted):
        # What takes 15 times as long at V = 30,522 would take all the time there is at V = 250,002.
        hopeless = {
            row["implementation"] for row in rows if row["dtype"] == case.dtype and row["times_ours"] > 15
        }
        runs = {name: run for name, run in everything.items() if name not in hopeless}
        errors = check_values(case, runs)
        worst = {name: max(values.values()) for name, values in errors.items()}
        print(f"\nchecked against float64: {', '.join(f'{n} {e:.1e}' for n, e in worst.items())}", flush=True)
        seconds = options.seconds or (3 if options.quick else 10)
        memory = not options.no_memory and (case.width, case.vocab, case.dtype) in MEMORY
        for backward in (False, True):
            rows += run_case(case, backward, runs, seconds, memory and backward)
            print_rows(rows[-len(runs) :])
    result = {"machine": machine(), "rows": rows}
    if options.out is not None:
        write(result, options.out, options.plot)
    elif not options.quick:
        write(result, RESULTS / _result_name(result["machine"]), options.plot or CHART)


def _result_name(described: dict) -> str:
    cpu = described["cpu"].replace(" ", "-")
    return f"linear_marginal_ce-{cpu}-{described['cores']}c-{described['date']}.json"


def write(result: dict, out: Path, chart: Path | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {out}")
    if chart is not None:
        plot(result["rows"], chart)
        print(f"wrote {chart}")


if __name__ == "__main__":
    main()
