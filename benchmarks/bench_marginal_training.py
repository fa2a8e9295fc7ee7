"""What the fused loss is worth in training: whole pre-training steps through it and through plain torch.

    python -m realm_fast.benchmarks.bench_marginal_training tests/data/wiki_leads.jsonl tests/data/tokenizer

Both runs start from the same weights and see the same batches; only the `impl` of
`linear_marginal_cross_entropy` differs. They take turns of --slice steps, stopped as by Ctrl-C and resumed,
so that a busy machine is busy for both. Printed: a step's median seconds and quartiles, their ratio, and how
far the two loss curves are apart. Settings can be changed with --set, as everywhere.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from realm_fast.benchmarks.bench_linear_marginal_ce import machine

import realm_fast.model
from realm_fast.config import Config, load_config
from realm_fast.corpus import build_corpus
from realm_fast.errors import Interrupted
from realm_fast.metrics import read_metrics
from realm_fast.ops.linear_marginal_ce import linear_marginal_cross_entropy
from realm_fast.run_folder import RunFolder
from realm_fast.train import pretrain

IMPLEMENTATIONS = {"realm_fast": "cpu", "plain torch": "reference"}
SETTINGS = (
    "seed=1",
    "device=cpu",
    "corpus.max_block_tokens=96",
    "corpus.num_workers=1",
    "embedder.trunk=fresh:layers=2,hidden=128,heads=2",
    "embedder.pooling=mean",
    "reader.trunk=fresh:layers=2,hidden=128,heads=2",
    "reader.max_joint_tokens=160",
    "masking.strategy=random_token",
    "masking.max_query_tokens=64",
    "pretrain.batch_queries=8",
    "pretrain.num_candidates=8",
    "pretrain.reader_lr=2e-4",
    "pretrain.embedder_lr=2e-5",
    "pretrain.log_every_steps=1",
    "pretrain.illustrations=0",
    "refresh.mode=inline",
    "evaluate.held_out_queries=4",
)


def train(run: RunFolder, config: Config, impl: str, steps: int, *, resume: bool) -> None:
    """`steps` more steps of a run, or those that are left of it; its loss is computed by `impl`."""
    done = 0

    def chosen(*arguments, **options):
        nonlocal done
        done += torch.is_grad_enabled()  # not when held-out queries are looked at
        if done == steps:
            signal.raise_signal(signal.SIGINT)  # the step is finished and a checkpoint written
        return linear_marginal_cross_entropy(*arguments, **options, impl=impl)

    with mock.patch.object(realm_fast.model, "linear_marginal_cross_entropy", chosen):
        try:
            pretrain(run, config, resume=resume)
        except Interrupted:
            if done < steps:  # somebody else's Ctrl-C
                raise


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_marginal_training", description=__doc__)
    parser.add_argument("source", type=Path, help="corpus: jsonl, parquet or text, as corpus.source")
    parser.add_argument("tokenizer", type=Path, help="as corpus.tokenizer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--slice", type=int, default=20, help="steps of one run before the other's turn")
    parser.add_argument(
        "--threads", type=int, default=1, help="models this small are fastest on one (default)"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--out", type=Path, help="JSON file (default: none)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = load_config(
        None,
        [
            *SETTINGS,
            f"corpus.source={options.source}",
            f"corpus.tokenizer={options.tokenizer}",
            f"pretrain.steps={options.steps}",
            f"pretrain.checkpoint_every_steps={options.steps}",
            f"refresh.every_steps={options.steps}",
            *options.overrides,
        ],
    )
    result: dict[str, object] = {"machine": machine(), "steps": options.steps}
    curves, medians = [], []
    with tempfile.TemporaryDirectory() as name:
        store = build_corpus(config.corpus, Path(name) / "store", progress=False)
        runs = {impl: RunFolder.create(Path(name) / impl, config, store) for impl in IMPLEMENTATIONS.values()}
        for begin in range(0, options.steps, options.slice):
            for impl, run in runs.items():
                train(run, config, impl, options.slice, resume=begin > 0)
                print(f"{impl}: {min(options.steps, begin + options.slice)} steps", file=sys.stderr)
        for label, impl in IMPLEMENTATIONS.items():
            lines = list(read_metrics(runs[impl].pretrain_dir / "metrics.jsonl"))
            seconds = [line["step_s"] for line in lines]
            low, median, high = statistics.quantiles(seconds, n=4)
            print(f"{label:12} {median * 1e3:8.1f} ms a step ({low * 1e3:.1f}-{high * 1e3:.1f})", flush=True)
            result[label] = {
                "median_s": median,
                "quartiles_s": [low, high],
                "loss": [x["loss"] for x in lines],
            }
            curves.append(torch.tensor([line["loss"] for line in lines], dtype=torch.float64))
            medians.append(median)
    apart = ((curves[0] - curves[1]).abs() / curves[1]).max().item()
    print(
        f"plain torch / realm_fast: {medians[1] / medians[0]:.2f}; losses at most {apart:.1e} apart, relative"
    )
    print(f"loss {curves[0][:5].mean():.3f} -> {curves[0][-5:].mean():.3f}")
    result |= {"ratio": medians[1] / medians[0], "largest_relative_difference_of_losses": apart}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
