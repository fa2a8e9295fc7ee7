"""`make gpu-check`: correctness on a GPU. python -m realm_fast.benchmarks.gpu.check [--out FOLDER]

Runs `pytest -m gpu`, then the small calls of this module under compute-sanitizer's tools where it is
installed. Ends with 0 when all passed, 1 when something failed, 2 when it cannot start (and says why).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from realm_fast.benchmarks.gpu import environment

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def small_calls() -> None:
    """Every kernel once or twice at sizes that a sanitizer gets through in seconds."""
    from realm_fast import marginal_log_likelihood, mips_topk
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
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument(
        "--small-calls", action="store_true", help="only run every kernel once (for profilers)"
    )
    options = parser.parse_args(argv)
    reasons = environment.missing()
    if reasons:
        print(environment.explain(reasons, "gpu-check"), file=sys.stderr)
        return 2
    if options.small_calls:
        small_calls()
        return 0
    results = {"environment": environment.describe(), "steps": []}

    def step(name: str, command: list[str]) -> None:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT).returncode
        seconds = round(time.perf_counter() - started, 1)
        results["steps"].append({"step": name, "passed": code == 0, "seconds": seconds})

    step("pytest -m gpu", [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q"])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("== compute-sanitizer was not found: its four tools are left out")
        results["steps"].append({"step": "compute-sanitizer", "passed": None, "seconds": 0})
    else:
        run = [sys.executable, "-m", "realm_fast.benchmarks.gpu.check", "--small-calls"]
        for tool in SANITIZER_TOOLS:
            step(f"compute-sanitizer {tool}", [sanitizer, "--tool", tool, "--error-exitcode", "1", *run])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "check.json").write_text(json.dumps(results, indent=1))
    lines = ["| step | passed | seconds |", "|---|---|---|"]
    word = {True: "yes", False: "NO", None: "not installed"}
    lines += [f"| {s['step']} | {word[s['passed']]} | {s['seconds']} |" for s in results["steps"]]
    (options.out / "check.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all(s["passed"] is not False for s in results["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
