"""The machine's own limits: multiply-add peaks and read bandwidth, for one thread and all.

    realm-fast bench roofline [--json FILE]       or  python -m realm_fast.benchmarks.roofline

Peaks are loops of independent multiply-adds in registers, with the instructions the kernels use at the
present CPU level (REALM_FAST_CPU forces another). The bandwidth is that of reading a buffer far larger than
the caches. Both are measured several times; the table gives the median and the spread, and benchmarks use
`measure` beside each case.
"""

import argparse
import json
import os
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from realm_fast import _native, cpu_features

KINDS = ("float32", "bfloat16", "int8")
_LEAST_BUFFER_BYTES = 1 << 29


@dataclass(frozen=True)
class Limits:
    """What `threads` threads reach: operations a second (a multiply-add is two) and bytes read a second."""

    threads: int
    operations: dict[str, float]
    read_bytes: float

    def seconds(self, kind: str, operations: float, read_bytes: float) -> float:
        """The least time such a case can take."""
        return max(operations / self.operations[kind], read_bytes / self.read_bytes)


def measure(threads: int, *, seconds: float = 0.1, repeats: int = 3) -> Limits:
    """The best of a few short measurements: what the machine can do now."""
    operations = {
        kind: max(_native.peak_operations_per_second(kind, threads, seconds) for _ in range(repeats))
        for kind in KINDS
    }
    # Levels without an instruction of their own for a type go through float32.
    operations = {kind: value or operations["float32"] for kind, value in operations.items()}
    return Limits(threads, operations, _native.read_bytes_per_second(threads, _buffer_bytes(), repeats))


def _buffer_bytes() -> int:
    """Four times the last cache (hundreds of megabytes on some servers), at most a quarter of the memory."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    caches = [int(size.rstrip("KMG")) * units[size.lstrip("0123456789")] for size in sizes]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(_LEAST_BUFFER_BYTES, min(4 * max(caches, default=0), memory // 4))


def machine() -> dict[str, object]:
    """What identifies this machine in a result file."""
    model = platform.machine()
    memory = 0
    if os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text()
        fields = dict(re.findall(r"^(model name|model|cpu family)\s*:\s*(.+)$", text, re.M))
        model = f"{fields.get('model name', model)} (family {fields.get('cpu family', '?')})"
        total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
        memory = int(total[1]) * 1024 if total else 0
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "levels": cpu_features()["levels"],
        "forced_level": cpu_features()["forced"],
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def device_slug(facts: dict[str, object] | None = None) -> str:
    """The name in a file name, e.g. amd-epyc-family-26-2t, of this machine or that of a results file."""
    facts = machine() if facts is None else facts
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['threads']}t".lower()).strip("-")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="realm-fast bench roofline", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each limit")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores, levels {', '.join(map(str, cpu_features()['levels']))}")
    results = []
    print("| threads | float32 GFLOP/s | bfloat16 GFLOP/s | int8 GOP/s | read GB/s |")
    print("|---|---|---|---|---|")
    for threads in sorted({1, torch.get_num_threads()}):
        samples = [measure(threads, repeats=1) for _ in range(arguments.repeats)]
        cells = [_spread([s.operations[kind] / 1e9 for s in samples]) for kind in KINDS]
        cells.append(_spread([s.read_bytes / 1e9 for s in samples]))
        print(f"| {threads} | " + " | ".join(cells) + " |")
        results += [asdict(sample) for sample in samples]
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "samples": results}, indent=2) + "\n")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
