"""realm_fast: REALM-style retrieval-augmented pre-training, made cheap.

The public names are imported when they are first used, so that `import realm_fast` and the command line
start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realm_fast.build import build_info, cpu_features
    from realm_fast.device_index import DeviceIndex
    from realm_fast.index import FaissIndex, MipsIndex, Provenance
    from realm_fast.ops.linear_marginal_ce import MarginalStats, linear_marginal_cross_entropy
    from realm_fast.ops.marginal_lse import marginal_log_likelihood
    from realm_fast.ops.mips_topk import mips_topk
    from realm_fast.types import NO_BLOCK, TopK

__version__ = "0.1.0"

_HOMES = {
    "NO_BLOCK": "types",
    "DeviceIndex": "device_index",
    "FaissIndex": "index",
    "MarginalStats": "ops.linear_marginal_ce",
    "MipsIndex": "index",
    "Provenance": "index",
    "TopK": "types",
    "build_info": "build",
    "cpu_features": "build",
    "linear_marginal_cross_entropy": "ops.linear_marginal_ce",
    "marginal_log_likelihood": "ops.marginal_lse",
    "mips_topk": "ops.mips_topk",
}

__all__ = [
    "NO_BLOCK",
    "DeviceIndex",
    "FaissIndex",
    "MarginalStats",
    "MipsIndex",
    "Provenance",
    "TopK",
    "build_info",
    "cpu_features",
    "linear_marginal_cross_entropy",
    "marginal_log_likelihood",
    "mips_topk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realm_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"realm_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
