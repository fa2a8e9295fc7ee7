"""What a GPU run needs, what is there, and, where something is missing, what and why."""

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from realm_fast import build_info
from realm_fast.ops._cuda import device_reasons


def missing() -> list[str]:
    """Every reason why the CUDA kernels cannot run here; empty when they can."""
    reasons = []
    if not build_info()["cuda"]:
        reasons.append(
            "this build of realm_fast has no CUDA kernels: put nvcc on PATH (or set CUDACXX) and build again"
        )
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} was built without CUDA: install a CUDA build of torch")
        if not os.path.exists("/proc/driver/nvidia/version"):
            reasons.append("no NVIDIA driver is loaded (/proc/driver/nvidia/version does not exist)")
    elif not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reasons.append("torch.cuda.is_available() is False: no GPU is visible (see CUDA_VISIBLE_DEVICES)")
        except Exception as error:  # torch names the cause: no driver, a driver too old, no device
            reasons.append(f"CUDA cannot start: {str(error).splitlines()[0]}")
    elif not reasons:
        reasons += device_reasons(torch.device("cuda", torch.cuda.current_device()))
    return reasons


def describe() -> dict[str, Any]:
    """For the head of every result file."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build": build_info(),
        "host": platform.platform(),
        "nvcc": _first_line([shutil.which("nvcc"), "--version"], contains="release"),
        "compute_sanitizer": shutil.which("compute-sanitizer"),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
        found["driver"] = _first_line([shutil.which("nvidia-smi"), query, "--format=csv,noheader"])
    return found


def _first_line(command: list[str | None], contains: str = "") -> str | None:
    if command[0] is None:
        return None
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return next((line.strip() for line in done.stdout.splitlines() if contains in line), None)


def explain(reasons: list[str], what: str) -> str:
    """For people: why `what` stops here."""
    lines = "\n".join(f"  - {reason}" for reason in reasons)
    return (
        f"{what} cannot go on:\n{lines}\nWhat needs no GPU was tested by `make test` (docs/gpu.md says how)."
    )
