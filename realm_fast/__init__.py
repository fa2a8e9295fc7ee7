"""realm_fast: REALM-style retrieval-augmented pre-training, made cheap."""

from realm_fast.build import build_info, cpu_features
from realm_fast.index import FaissIndex, MipsIndex, Provenance
from realm_fast.ops.linear_marginal_ce import MarginalStats, linear_marginal_cross_entropy
from realm_fast.ops.marginal_lse import marginal_log_likelihood
from realm_fast.ops.mips_topk import mips_topk
from realm_fast.types import NO_BLOCK, TopK

__version__ = "0.1.0"

__all__ = [
    "NO_BLOCK",
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
