"""Each kernel beside the machine's limit and its best-tuned peers. Installed as `realm_fast.benchmarks`."""
