"""What a refresh of the index costs, in suites of their own.

realm-fast bench refresh                        every suite
realm-fast bench refresh throughput --help      blocks/s beside SentenceTransformer.encode and transformers
realm-fast bench refresh training --help        steps, searches and schedules while an index is refreshed
"""

import importlib
import sys

# name -> module of realm_fast.benchmarks with main(argv)
SUITES = {"throughput": "refresh_throughput", "training": "bench_refresh_training"}


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nsuites: {', '.join(SUITES)}")
        return
    if arguments and arguments[0] not in SUITES:
        raise SystemExit(
            f"bench refresh: expected one of the suites {', '.join(SUITES)} first, got {arguments[0]!r}"
        )
    for name in [arguments.pop(0)] if arguments else SUITES:
        importlib.import_module(f"realm_fast.benchmarks.{SUITES[name]}").main(arguments)


if __name__ == "__main__":
    main()
