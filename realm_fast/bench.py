"""`realm-fast bench`: each benchmark is a module of realm_fast.benchmarks with `main(argv)`."""

import importlib
from collections.abc import Sequence

from realm_fast.errors import MissingDependencyError

BENCHMARKS = {
    "roofline": ["roofline"],
    "mips": ["bench_mips_topk"],
    "epilogue": ["bench_embed_epilogue"],
    "refresh": ["bench_refresh"],
    "marginal": ["bench_marginal_lse", "bench_linear_marginal_ce"],
}


def run_benchmark(what: str, arguments: Sequence[str]) -> None:
    """Runs the benchmark named `what`; its own options follow the name on the command line."""
    for name in BENCHMARKS[what]:
        try:
            module = importlib.import_module(f"realm_fast.benchmarks.{name}")
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"bench {what}: the package {error.name} is not installed (pip install 'realm_fast[bench]')."
            ) from error
        module.main(list(arguments))
