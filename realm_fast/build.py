"""What this build and this machine can run."""

import os
from typing import Any

import torch

from realm_fast import _native


def cpu_features() -> dict[str, Any]:
    """The instruction sets the CPU has, the levels that can be forced, and the one forced, if any.

    Returns:
        `detected`: {"avx2", "avx512", "avx512bf16", "avx512vnni", "amx"} -> bool;
        `levels`: names that REALM_FAST_CPU accepts on this machine, weakest first;
        `forced`: the value of REALM_FAST_CPU, or None;
        `num_threads`: torch.get_num_threads(), which the kernels follow.
    """
    return {
        "detected": dict(_native.detected_cpu_features()),
        "levels": list(_native.available_cpu_levels()),
        "forced": os.environ.get("REALM_FAST_CPU") or None,
        "num_threads": torch.get_num_threads(),
    }


def build_info() -> dict[str, Any]:
    """How the native module was built: compiler, whether CUDA kernels are in it and for which targets.

    Returns:
        `version`, `compiler`, `cuda` (bool), `cuda_archs`, `debug` (bool), `torch` (its version).
        Asks no driver: the answer is the same with and without a GPU.
    """
    import realm_fast

    return {"version": realm_fast.__version__, **_native.build_info(), "torch": torch.__version__}
