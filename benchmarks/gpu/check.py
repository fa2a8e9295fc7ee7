"""`make gpu-check`: correctness on a GPU. python -m realm_fast.benchmarks.gpu.check [--out FOLDER]

Runs `pytest -m gpu`, then the small calls of this module under compute-sanitizer's tools where it is
installed. Ends with 0 when all passed, 1 when something failed or the time was up before all had run, 2 when
it cannot start (and says why). One JSON file and one Markdown table, written anew after every step.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from realm_fast.benchmarks.gpu import environment

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BUDGET_S = 570.0
WORDS = {True: "yes", False: "NO", None: "not run"}


def small_calls() -> None:
    """Every kernel once or twice at sizes that a sanitizer gets through in seconds."""
    from realm_fast import linear_marginal_cross_entropy, marginal_log_likelihood, mips_topk
    from realm_fast.device_index import DeviceIndex

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_queries, num_blocks, dim, k in [
            (3, 6000, 64, 10),
            (130, 5000, 136, 100),
            (200, 4500, 768, 5),
        ]:
            queries = torch.randn(num_queries, dim, device="cuda", dtype=dtype)
            blocks = torch.randn(num_blocks, dim, device="cuda", dtype=dtype)
            mips_topk(queries, blocks, k, impl="cuda")
    blocks = torch.randn(6000, 64, device="cuda")
    for dtype in ("bfloat16", "int8"):
        DeviceIndex.from_embeddings(blocks, dtype).search(torch.randn(20, 64, device="cuda"), 10)
    gold = torch.randn(4, 8, 10, device="cuda").log_softmax(-1).requires_grad_()
    candidate = torch.randn(4, 8, device="cuda").log_softmax(-1).requires_grad_()
    for level in ("token", "sequence"):
        marginal_log_likelihood(gold, candidate, level=level, impl="cuda").sum().backward()
    labels = torch.randint(1000, (4, 10), device="cuda")
    labels[:, 7:] = -100
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(4, 8, 10, 64, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(1000, 64, device="cuda", dtype=dtype, requires_grad=True)
        linear_marginal_cross_entropy(
            hidden, weight, None, labels, candidate.detach(), impl="cuda", chunk_bytes=200_000
        ).backward()
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument(
        "--small-calls", action="store_true", help="only run every kernel once (for profilers)"
    )
    options = parser.parse_args(argv)
    reasons = environment.missing()
    if not (ROOT / "tests" / "gpu").is_dir():
        reasons.append(f"{ROOT / 'tests'} does not exist: run it from the source tree (make gpu-check)")
    if reasons:
        print(environment.explain(reasons, "gpu-check"), file=sys.stderr)
        return 2
    if options.small_calls:
        small_calls()
        return 0
    steps = [("pytest -m gpu", [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q"])]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZER_TOOLS if sanitizer else ():
        run = [sys.executable, "-m", "realm_fast.benchmarks.gpu.check", "--small-calls"]
        steps.append(
            (f"compute-sanitizer {tool}", [sanitizer, "--tool", tool, "--error-exitcode", "1", *run])
        )
    return run_steps(steps, options.out, notes=[] if sanitizer else ["compute-sanitizer was not found"])


def run_steps(steps: list[tuple[str, list[str]]], out: Path, *, notes: list[str]) -> int:
    """Runs the commands in turn within BUDGET_S; 0 if every one of them passed."""
    results: dict[str, Any] = {"environment": environment.describe(), "notes": notes, "steps": []}
    began = time.perf_counter()
    for name, command in steps:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        row: dict[str, Any] = {"step": name, "passed": None, "why": "the time was up"}
        left_s = BUDGET_S - (started - began)
        if left_s > 0:
            try:
                code = subprocess.run(command, cwd=ROOT, timeout=left_s).returncode
                row |= {"passed": code == 0, "why": "" if code == 0 else f"exit code {code}"}
            except subprocess.TimeoutExpired:
                row |= {"passed": False, "why": f"stopped: {BUDGET_S:.0f} s for all steps were up"}
        results["steps"].append(row | {"seconds": round(time.perf_counter() - started, 1)})
        out.mkdir(parents=True, exist_ok=True)
        (out / "check.json").write_text(json.dumps(results, indent=1))
        (out / "check.md").write_text(markdown(results))
    print(markdown(results))
    return 0 if all(step["passed"] for step in results["steps"]) else 1


def markdown(results: dict[str, Any]) -> str:
    lines = ["| step | passed | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {s['step']} | {WORDS[s['passed']]} | {s['seconds']} | {s['why']} |" for s in results["steps"]
    ]
    return "\n".join([*lines, *(f"\nLeft out: {note}." for note in results["notes"])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
