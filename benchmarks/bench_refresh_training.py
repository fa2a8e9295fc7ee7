"""Training while the index is refreshed: what it costs the trainer, and what each schedule is worth.

    realm-fast bench refresh training --suites steps,latency --work FOLDER

    steps        a step without a refresh, with one in a thread, with one in a process; what the trainer
                 spends on handing over and swapping; the shares of index search and marginal loss in a step
    latency      p50 and p99 of a search while snapshots are made and swapped in, against an idle machine
    trajectory   records the course of a training run (once; the next suite needs it)
    schedules    each schedule replayed over that course at equal work: recall against an always-fresh index
    run          a real run with its refreshes: the time line and the staleness of its index
    mechanisms   wall-clock of each schedule with live refreshes in a process, beside the plain one

The corpus (wiki-leads) and the warm start are the demo's. `--work` keeps the corpus and the trajectory
between calls. Figures go to benchmarks/results, plots to docs/images.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from realm_fast.benchmarks import replay as replays
from realm_fast.benchmarks import roofline

import realm_fast.model as model_module
from realm_fast.config import Config, load_config
from realm_fast.corpus import build_corpus
from realm_fast.errors import Interrupted
from realm_fast.metrics import read_jsonl, read_metrics
from realm_fast.run_folder import RunFolder
from realm_fast.schedule import Reason
from realm_fast.signals import StopRequest
from realm_fast.token_store import TokenStore
from realm_fast.train import Pretrainer

SUITES = ("steps", "latency", "trajectory", "schedules", "run", "mechanisms")
ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
Figures = dict[str, Any]
_said: list[str] = []  # by the suite that is running


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="where corpus, runs and trajectory are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the trainer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of an arm of `latency`")
    parser.add_argument("--steps", type=int, help="of a timed arm, of the trajectory, or of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of a setting of `run`"
    )
    parser.add_argument("--name", default="run", help="of the run, in its results and plots")
    parser.add_argument("--docs", action="store_true", help="also write the plots into docs/images")
    parser.add_argument("--json", type=Path, help="where to (default: benchmarks/results/...)")
    arguments = parser.parse_args(argv)
    chosen = arguments.suites.split(",")
    if unknown := set(chosen) - set(SUITES):
        parser.error(f"--suites: unknown {', '.join(sorted(unknown))}")
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # that there are no evaluation questions
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(arguments.threads)
        if arguments.work is None:
            arguments.work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        machine = roofline.machine()
        suites: dict[str, Callable[[argparse.Namespace], Figures]] = {
            "steps": bench_steps,
            "latency": bench_latency,
            "trajectory": record_trajectory,
            "schedules": bench_schedules,
            "run": bench_run,
            "mechanisms": bench_mechanisms,
        }
        for name in chosen:
            _said.clear()
            threads, when = arguments.threads, date.today().isoformat()
            _say(
                f"{when}, {machine['cpu']}, {machine['cores']} cores, trainer threads {threads}, "
                f"load {os.getloadavg()[0]:.1f}."
            )
            _say()
            figures = suites[name](arguments)
            slug = arguments.name if name == "run" else name
            out = arguments.json or RESULTS / (
                f"refresh_training_{slug}_{roofline.device_slug()}_{date.today().isoformat()}.json"
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n", encoding="utf-8")
            if arguments.docs and name != "trajectory":
                write_docs(slug, _said)
            print(f"-> {out}\n")


# --- the demo's training, watched ---------------------------------------------------------------------------


def settings(*overrides: str) -> Config:
    """The demo's, without what would take time outside of the steps."""
    with as_file(files("realm_fast") / "assets" / "demo.toml") as path:
        return load_config(
            path,
            [
                "evaluate.questions=/no/questions",  # recall on questions is not what is measured here
                "evaluate.held_out_queries=1",
                "pretrain.illustrations=0",
                "pretrain.checkpoint_every_steps=100000",
                "refresh.shard_blocks=1056",  # 16 shards of the 16,589 blocks
                "refresh.drift_every_steps=0",
                *overrides,
            ],
        )


def corpus(work: Path, config: Config) -> TokenStore:
    path = work / "corpus"
    if not path.exists():
        build_corpus(config.corpus, path, progress=True)
    return TokenStore.open(path)


class Watched(Pretrainer):
    """A trainer that notes when each step ended and what it spent on refreshes."""

    def __init__(self, run: RunFolder, config: Config, *, resume: bool = False) -> None:
        self.ends_s: list[float] = []  # a step each, since the loop began
        self.spent_s: dict[str, list[float]] = {"hand over": [], "poll": [], "swap": []}
        self.handed_over_at: list[tuple[float, int, str]] = []
        self.in_use_at: list[tuple[float, int, int]] = []  # seconds, step of the newest and oldest shard
        self.staleness: list[tuple[int, int]] = []  # a step each: of the newest and of the oldest shard
        self.keep_busy = False  # hand weights over whenever the refresher has nothing to do
        self.begin_s = time.perf_counter()
        super().__init__(run, config, resume=resume, progress=False)

    def run_for(self, steps: int) -> None:
        """Trains for so many steps, then stops as on a signal; the final index is not made."""
        self.begin_s = time.perf_counter()
        self.stop = _StopAfter(self, steps)
        with contextlib.suppress(Interrupted):
            self.train()

    def _hand_over(self, reason: Reason) -> None:
        begin = time.perf_counter()
        super()._hand_over(reason)
        self.spent_s["hand over"].append(time.perf_counter() - begin)
        self.handed_over_at.append((begin - self.begin_s, self.step, reason))

    def _swap_snapshot(self) -> None:
        before = self.snapshot
        self.staleness.append((self.step - 1 - before.step, self.step - 1 - before.oldest_step))
        begin = time.perf_counter()
        super()._swap_snapshot()
        now = time.perf_counter()
        self.spent_s["poll" if self.snapshot is before else "swap"].append(now - begin)
        if self.snapshot is not before:
            self.in_use_at.append((now - self.begin_s, self.snapshot.step, self.snapshot.oldest_step))
        if self.keep_busy and not self.refresher.is_busy():
            self._hand_over("steps")
        self.ends_s.append(time.perf_counter() - self.begin_s)


class _StopAfter(StopRequest):
    """Becomes true after so many steps."""

    signal_number = 15

    def __init__(self, trainer: Watched, steps: int) -> None:
        self.trainer, self.last = trainer, trainer.step + steps

    def __bool__(self) -> bool:
        return self.trainer.step >= self.last


@contextlib.contextmanager
def watched(work: Path, store: TokenStore, config: Config) -> Iterator[Watched]:
    """A new run in a folder of its own; its first index is made once for all of them."""
    first = work / "first-index"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        run = RunFolder.create(Path(folder) / "run", config, store)
        snapshots = run.pretrain_dir / "snapshots"
        if first.exists():
            shutil.copytree(first, snapshots)
        trainer = Watched(run, config)
        if not first.exists():
            shutil.copytree(snapshots, first)
        try:
            yield trainer
        finally:
            trainer.close()


# --- steps --------------------------------------------------------------------------------------------------


def bench_steps(arguments: argparse.Namespace) -> Figures:
    """Arms take turns, two rounds; a refresh is always on its way in those that have one."""
    steps, modes, rounds = arguments.steps or 30, ("off", "thread", "process"), 2
    store = corpus(arguments.work, settings())
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    spent: dict[str, dict[str, list[float]]] = {mode: {} for mode in modes}
    waited: dict[str, float] = dict.fromkeys(modes, 0.0)
    parts: dict[str, list[float]] = {}
    blocks_per_s: dict[str, list[float]] = {mode: [] for mode in modes}
    for _, mode in itertools.product(range(rounds), modes):
        config = settings(
            f"refresh.mode={mode}", "refresh.every_steps=100000", "pretrain.log_every_steps=100000"
        )
        with (
            watched(arguments.work, store, config) as trainer,
            _timed_parts(trainer, parts if mode == "off" else {}),
        ):
            trainer.keep_busy = mode != "off"
            trainer.run_for(steps)
            times[mode] += np.diff(trainer.ends_s).tolist()  # the first step warms up
            waited[mode] += trainer.window.trainer_wait_s
            for what, values in trainer.spent_s.items():
                spent[mode].setdefault(what, []).extend(values)
            blocks_per_s[mode] += [
                trainer.snapshot.manifest.blocks_per_s for at in trainer.in_use_at[-1:] if at[1] > 0
            ]
    whole = statistics.median(times["off"])
    _head(
        "refresh", "ms a step", "quartiles", "against none", "waited, s", "handing over, ms", "swapping, ms",
        "blocks/s",
    )  # fmt: skip
    for mode in modes:
        low, median, high = statistics.quantiles(times[mode], n=4)
        over, swap = (_milliseconds(spent[mode].get(what, [])) for what in ("hand over", "swap"))
        rate = f"{statistics.median(blocks_per_s[mode]):.0f}" if blocks_per_s[mode] else "-"
        _row(
            mode, f"{median * 1e3:.0f}", f"{low * 1e3:.0f}-{high * 1e3:.0f}", f"{median / whole:.2f}x",
            f"{waited[mode]:.3f}", over, swap, rate,
        )  # fmt: skip
    shares = {name: statistics.median(values[1:]) / whole for name, values in parts.items()}
    _say(
        "\nof a step without a refresh: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    )
    return {"steps_s": times, "spent_s": spent, "waited_s": waited, "shares": shares, "parts_s": parts,
            "blocks_per_s": blocks_per_s}  # fmt: skip


@contextlib.contextmanager
def _timed_parts(trainer: Watched, parts: dict[str, list[float]]) -> Iterator[None]:
    """Times, in the steps taken inside: search, all of retrieval, and the marginal loss both ways."""
    sums: dict[str, float] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            sums[name] = sums.get(name, 0.0) + time.perf_counter() - begin
            return result

        return call

    def loss(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Forward as usual; backward lasts from the loss's gradient to that of the reader's states."""
        result = timed("marginal loss", linear_marginal_cross_entropy)(hidden, *args, **kwargs)
        begin = [0.0]

        def started(_: torch.Tensor) -> None:
            begin[0] = time.perf_counter()

        def ended(_: torch.Tensor) -> None:
            sums["marginal loss"] += time.perf_counter() - begin[0]

        if hidden.requires_grad:
            result[0].register_hook(started)
            hidden.register_hook(ended)
        return result

    linear_marginal_cross_entropy = model_module.linear_marginal_cross_entropy
    retrieve, take_step = model_module.retrieve_candidates, trainer._forward_backward
    search = type(trainer.snapshot.index).search

    def step(*args: Any, **kwargs: Any) -> Any:
        result = take_step(*args, **kwargs)
        for name, value in sums.items():
            parts.setdefault(name, []).append(value)
        sums.clear()
        return result

    with (
        mock.patch.object(model_module, "linear_marginal_cross_entropy", loss),
        mock.patch.object(
            model_module, "retrieve_candidates", timed("search and choice of candidates", retrieve)
        ),
        mock.patch.object(type(trainer.snapshot.index), "search", timed("index search", search)),
        mock.patch.object(trainer, "_forward_backward", step),
    ):
        yield


def _head(*names: str) -> None:
    _row(*names)
    _say("|---" * len(names) + "|")


def _row(*cells: Any) -> None:
    _say("| " + " | ".join(map(str, cells)) + " |")


def _say(line: str = "") -> None:
    """Prints a line, which is also one of the suite's in docs/refresh.md."""
    _said.append(line)
    print(line, flush=True)


def write_docs(suite: str, lines: Sequence[str]) -> None:
    """Puts what a suite said between its marks in docs/refresh.md, and leaves the rest as it is."""
    page = ROOT / "docs" / "refresh.md"
    begin, end = f"<!-- training {suite}: begin -->", f"<!-- training {suite}: end -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page}: expected the marks {begin} and {end} for the results of {suite}")
    head, tail = text.split(begin)[0], text.split(end)[1]
    body = "\n".join(lines).strip()
    page.write_text(f"{head}{begin}\n\n{body}\n\n{end}{tail}", encoding="utf-8")


def _milliseconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values) * 1e3:.1f} ({max(values) * 1e3:.1f})" if values else "-"


# --- search latency -----------------------------------------------------------------------------------------


def bench_latency(arguments: argparse.Namespace) -> Figures:
    """Searches one after the other, the newest snapshot taken in between as the trainer does."""
    config = settings()
    store = corpus(arguments.work, config)
    seconds = arguments.seconds
    figures: Figures = {"seconds_an_arm": seconds, "arms": {}}
    _head("snapshots made", "swaps", "B", "searches", "p50, ms", "p99, ms", "worst, ms")
    for batch, (mode, every_shards) in itertools.product(
        (1, 16), (("off", 0), ("thread", 0), ("process", 0), ("process", 1))
    ):
        config = settings(
            f"refresh.mode={mode}",
            f"refresh.publish_every_shards={every_shards}",
            "refresh.every_steps=100000",
        )
        with watched(arguments.work, store, config) as trainer:
            queries = [trainer.masker.query(1, slot) for slot in range(batch)]
            query_emb = trainer.model.search_emb(queries)
            expected = trainer.snapshot.index.search(query_emb, 15)
            taken: list[float] = []
            swaps, begin = 0, time.perf_counter()
            while (now := time.perf_counter()) - begin < seconds:
                trainer.step += 1
                if not trainer.refresher.is_busy():
                    trainer._hand_over("steps")
                before = trainer.snapshot
                Pretrainer._swap_snapshot(trainer)
                swaps += trainer.snapshot is not before
                now = time.perf_counter()
                found = trainer.snapshot.index.search(query_emb, 15)
                taken.append(time.perf_counter() - now)
                assert torch.equal(found.ids, expected.ids), "the weights are the same, so are the results"
                time.sleep(0.002)  # a trainer does other things between two searches
        p50, p99 = (float(np.percentile(taken, p)) * 1e3 for p in (50, 99))
        what = {"off": "none"}.get(mode, f"in a {mode}")
        how = ", published shard by shard" if every_shards else ""
        _row(what + how, swaps, batch, len(taken), f"{p50:.2f}", f"{p99:.2f}", f"{max(taken) * 1e3:.2f}")
        figures["arms"][f"{mode}, publish_every_shards={every_shards}, B={batch}"] = {
            "p50_ms": p50, "p99_ms": p99, "worst_ms": max(taken) * 1e3, "searches": len(taken),
            "swaps": swaps,
        }  # fmt: skip
    return figures


# --- schedules over a recorded trajectory -------------------------------------------------------------------

TICK_STEPS = 10
PROBE_QUERIES = 128


def record_trajectory(arguments: argparse.Namespace) -> Figures:
    """Trains with an index that is made anew at every tick, and keeps them all."""
    folder = arguments.work / "trajectory"
    folder.mkdir(parents=True, exist_ok=True)
    steps = arguments.steps or 240
    config = settings(
        "refresh.mode=inline", f"refresh.every_steps={TICK_STEPS}", f"pretrain.steps={steps}", "num_threads=1"
    )
    store = corpus(arguments.work, config)

    class Recorded(Watched):
        def _swap_snapshot(self) -> None:
            super()._swap_snapshot()
            if self.step % TICK_STEPS == 0:
                self.record()

        def record(self) -> None:
            """This tick's embeddings, and those of the queries of the steps that follow."""
            coming = range(self.step + 1, self.step + 1 + TICK_STEPS)
            held_out = self.masker.with_split("heldout")
            queries = {
                "train": [
                    self.masker.query(s, slot) for s in coming for slot in range(self.queries_per_step)
                ],
                "probe": [held_out.query(0, slot) for slot in range(PROBE_QUERIES)],
            }
            arrays = {name: self.model.search_emb(some).numpy() for name, some in queries.items()}
            arrays |= {f"{name}_origin": [q.origin_block_id for q in some] for name, some in queries.items()}
            np.savez(folder / f"queries-{self.step:05d}.npz", **arrays)
            every_block = self.snapshot.index.reconstruct(torch.arange(len(store)))
            np.save(folder / f"embeddings-{self.step:05d}.npy", every_block.numpy())

    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        trainer = Recorded(RunFolder.create(Path(scratch) / "run", config, store), config)
        try:
            trainer.record()
            trainer.run_for(steps - 1)  # the last step would make the final index
        finally:
            trainer.close()
    return {"ticks": len(list(folder.glob("embeddings-*.npy"))), "tick_steps": TICK_STEPS}


def bench_schedules(arguments: argparse.Namespace) -> Figures:
    """Recall of training queries against an always-fresh index, schedule by schedule."""
    trajectory = replays.Trajectory.open(arguments.work / "trajectory")
    config = settings()
    k, half_life = config.pretrain.num_candidates - 1, config.refresh.priority_half_life_steps
    n, shard = trajectory.num_blocks, config.refresh.shard_blocks
    sample = np.random.default_rng(config.seed).choice(n, config.refresh.drift_sample_blocks, replace=False)
    figures: Figures = {"tick_steps": trajectory.tick_steps, "ticks": len(trajectory), "k": k, "regimes": {}}
    for duration in (4, 8):  # ticks that a refresh takes
        base = {"blocks_per_tick": n / duration, "shard_blocks": shard, "every_ticks": duration}
        arms = [
            replays.Arm("plain", **base),
            replays.Arm("incremental", publish_every_shards=1, **base),
            replays.Arm("incremental, priority by shard", publish_every_shards=1, priority=True, **base),
            replays.Arm(
                "incremental, priority by block", publish_every_shards=n // 48, priority=True,
                **{**base, "shard_blocks": 1},
            ),
            replays.Arm("plain, queries corrected every 10 steps", correct_every_ticks=1, **base),
            replays.Arm("plain, queries corrected every 40 steps", correct_every_ticks=4, **base),
            replays.Arm("never refreshed", **{**base, "every_ticks": 10**6}),
            replays.Arm("never refreshed, queries corrected every 40 steps", correct_every_ticks=4,
                        **{**base, "every_ticks": 10**6}),
        ]  # fmt: skip
        found = [replays.replay(trajectory, arm, k, half_life, sample) for arm in arms]
        figures["regimes"][f"always busy, {duration * trajectory.tick_steps} steps a refresh"] = _table(
            f"always busy, a refresh takes {duration * trajectory.tick_steps} steps", found, duration
        )
    figures["regimes"]["drift"] = _drift_against_steps(trajectory, k, half_life, sample, shard)
    figures["estimate"] = _estimates(trajectory, k, sample)
    figures["partial"] = _partial(trajectory, k, half_life, shard)
    if arguments.docs:
        plot_schedules(figures, IMAGES / "refresh_schedules.png")
    return figures


def _table(title: str, found: Sequence[replays.Replay], first: int) -> Figures:
    """Means over the ticks after the first refresh is through."""
    _say(f"{title}\n")
    _head(
        "schedule", "recall of the fresh top-k", "worst tick", "mean age of a block, ticks", "blocks embedded"
    )
    rows: Figures = {}
    for one in found:
        recall, age = one.recall[first:], one.mean_age_ticks[first:]
        rows[one.arm.name] = asdict(one) | {"mean_recall": statistics.fmean(recall)}
        _row(
            one.arm.name, f"{statistics.fmean(recall):.4f}", f"{min(recall):.4f}",
            f"{statistics.fmean(age):.2f}", f"{one.blocks_embedded:,.0f}",
        )  # fmt: skip
    _say()
    return rows


def _drift_against_steps(
    trajectory: replays.Trajectory, k: int, half_life: int, sample: np.ndarray, shard: int
) -> Figures:
    """A refresh takes two ticks; as many refreshes by steps as the drift trigger asked for."""
    fast = {"blocks_per_tick": trajectory.num_blocks / 2, "shard_blocks": shard}
    found = []
    for threshold in (0.98, 0.95, 0.9):
        arm = replays.Arm(f"drift, overlap below {threshold}", overlap_below=threshold, min_ticks=2, **fast)
        drift = replays.replay(trajectory, arm, k, half_life, sample)
        times = sum(tick + 2 < len(trajectory) for tick in drift.handed_over)
        found.append(drift)
        if times:
            every = max(1, round(len(trajectory) / (times + 1)))
            steps = replays.Arm(f"every {every * trajectory.tick_steps} steps", every_ticks=every, **fast)
            found.append(replays.replay(trajectory, steps, k, half_life, sample))
    return _table("drift against steps, a refresh takes 20 steps", found, 0)


def _estimates(trajectory: replays.Trajectory, k: int, sample: np.ndarray) -> Figures:
    """The probe's estimate beside the true overlap, for every pair of an index and later weights."""
    pairs = []
    for now in range(1, len(trajectory)):
        for old in range(0, now, 3):
            ages = np.full(trajectory.num_blocks, old)
            pairs.append(
                {
                    "staleness_steps": (now - old) * trajectory.tick_steps,
                    "estimate": replays.probe_overlap(trajectory, now, ages, k, sample),
                    "true": replays.true_overlap(trajectory, now, ages, k),
                }
            )
    gaps = [pair["estimate"] - pair["true"] for pair in pairs]
    lowest = min(pair["true"] for pair in pairs)
    _say(
        f"probe overlap: {len(pairs)} pairs of index and weights, true overlap {lowest:.3f} to 1; the "
        f"estimate is above it by {statistics.fmean(gaps):.4f} on average, {max(gaps):.4f} at most\n"
    )
    return {"pairs": pairs}


def _partial(trajectory: replays.Trajectory, k: int, half_life: int, shard: int) -> Figures:
    """What a partly fresh index finds, by the order in which blocks were made fresh."""
    n, last = trajectory.num_blocks, len(trajectory) - 1
    stale = max(0, last - 8)
    by_block, by_shard = (replays.ShardTally(n, size, half_life_steps=half_life) for size in (1, shard))
    for tick in range(stale + 1):
        found = trajectory.fresh(tick, "train", 2 * k)
        for tally in (by_block, by_shard):
            tally.add(tick * trajectory.tick_steps, found.ids[:, :k].numpy(), found.ids[:, k:].numpy())
    sequence = np.arange(n)
    orders = {
        "as they come": sequence,
        "shards by tally": np.concatenate(
            [sequence[s * shard : (s + 1) * shard] for s in by_shard.order([0] * len(by_shard.tally))]
        ),
        "blocks by tally": np.array(by_block.order([0] * n)),
    }  # fmt: skip
    shares = [0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    curves = {
        name: list(replays.after_partial_refresh(trajectory, stale, last, k, order, shares))
        for name, order in orders.items()
    }
    _say("recall when only so much of the corpus is fresh\n")
    _head("order", *(f"{share:.0%}" for share in shares))
    for name, values in curves.items():
        _row(name, *(f"{value:.3f}" for value in values))
    _say()
    return {"shares": shares, "curves": curves, "stale_tick": stale, "tick": last}


# --- a real run ---------------------------------------------------------------------------------------------


def bench_run(arguments: argparse.Namespace) -> Figures:
    """The demo's training with its live refreshes, as long as asked for."""
    config = settings("refresh.drift_every_steps=50", *arguments.set)
    store = corpus(arguments.work, config)
    with watched(arguments.work, store, config) as trainer:
        trainer.run_for(arguments.steps or 300)
        shown = trainer
        records = read_metrics(trainer.folder / "metrics.jsonl")
        refreshes = read_jsonl(trainer.folder / "refreshes.jsonl", "the refreshes")
        kept = arguments.work / "runs" / arguments.name  # for its report
        if kept.exists():
            shutil.rmtree(kept)
        shutil.copytree(trainer.run.path, kept, ignore=shutil.ignore_patterns("snapshots", "checkpoints"))
    each = np.diff([0.0, *shown.ends_s])
    low, median, high = statistics.quantiles(each, n=4)
    overlaps = {r["step"]: round(r["probe_overlap"], 4) for r in records if "probe_overlap" in r}
    checks = [r["drift_check_s"] for r in records if "drift_check_s" in r]
    waited = sum(r["trainer_wait_s"] for r in records)
    named = ", ".join(arguments.set) or "as in the demo"
    _say(f"Settings: {named}. {len(each)} steps in {shown.ends_s[-1]:.0f} s, {median * 1e3:.0f} ms a step "
         f"({low * 1e3:.0f}-{high * 1e3:.0f}); the trainer waited {waited:.3f} s; "
         f"{len(shown.handed_over_at)} handovers, {len(shown.in_use_at)} swaps.")  # fmt: skip
    _say(f"Staleness: newest shard {statistics.fmean(s for s, _ in shown.staleness):.1f} steps on average, "
         f"oldest {statistics.fmean(s for _, s in shown.staleness):.1f}.")  # fmt: skip
    _say(f"Probe overlap by step: {', '.join(f'{step}: {value:.3f}' for step, value in overlaps.items())}; "
         f"a check took {_milliseconds(checks)} ms, the slowest in brackets.")  # fmt: skip
    figures = {
        "settings": list(arguments.set), "ends_s": shown.ends_s, "handed_over_at": shown.handed_over_at,
        "in_use_at": shown.in_use_at, "staleness": shown.staleness, "metrics": records,
        "refreshes": refreshes,
    }  # fmt: skip
    if arguments.docs:
        plot_run(figures, IMAGES / f"refresh_{arguments.name}.png")
    return figures


# --- what each schedule costs -------------------------------------------------------------------------------

MECHANISMS = {  # a refresh takes about 16 steps
    "plain": (),
    "shard by shard": ("refresh.publish_every_shards=4",),
    "shard by shard, by priority": ("refresh.publish_every_shards=4", "refresh.order=priority"),
    "by drift": (
        "refresh.trigger=drift", "refresh.drift_every_steps=20", "refresh.drift_min_steps=20",
        "refresh.drift_overlap_below=0.975",
    ),
    "queries corrected": ("refresh.drift_every_steps=20", "refresh.correct_queries=true"),
}  # fmt: skip


def bench_mechanisms(arguments: argparse.Namespace) -> Figures:
    """The same queries under every schedule, one after another; what they find is `schedules`' matter."""
    store = corpus(arguments.work, settings())
    found: dict[str, Figures] = {}
    for name, overrides in MECHANISMS.items():
        with watched(arguments.work, store, settings("refresh.every_steps=20", *overrides)) as trainer:
            trainer.run_for(arguments.steps or 50)
            records = read_metrics(trainer.folder / "metrics.jsonl")
            each = np.diff([0.0, *trainer.ends_s])
            found[name] = {
                "overrides": list(overrides),
                "step_s": each.tolist(),
                "spent_s": trainer.spent_s,
                "checks_s": trainer.checked_s,
                "waited_s": sum(r["trainer_wait_s"] for r in records),
                "handovers": len(trainer.handed_over_at),
                "swaps": len(trainer.in_use_at),
                "staleness": trainer.staleness,
            }
    base = sum(found["plain"]["step_s"])
    _head("schedule", "ms a step, all in", "against plain", "median (quartiles)", "drift checks, ms a step",
          "waited, s", "handovers", "swaps", "oldest shard, steps")  # fmt: skip
    for name, one in found.items():
        each, count = one["step_s"], len(one["step_s"])
        low, median, high = (x * 1e3 for x in statistics.quantiles(each, n=4))
        _row(name, f"{sum(each) / count * 1e3:.0f}", f"{sum(each) / base:.2f}x",
             f"{median:.0f} ({low:.0f}-{high:.0f})", f"{one['checks_s'] / count * 1e3:.0f}",
             f"{one['waited_s']:.3f}", one["handovers"], one["swaps"],
             f"{statistics.fmean(oldest for _, oldest in one['staleness']):.1f}")  # fmt: skip
    return {"schedules": found}


# --- plots --------------------------------------------------------------------------------------------------


def plot_run(figures: Figures, path: Path) -> None:
    """Above: steps and refreshes on the clock. Below: staleness by step."""
    pyplot = _pyplot()
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(11, 5.6), height_ratios=[1, 1.5])
    ends = np.array(figures["ends_s"])
    top.vlines(ends, 1.6, 2.4, lw=0.5, color="C0")
    had = {}
    for seconds, step, _ in figures["in_use_at"]:
        had[step] = seconds
    free = 0.0
    for seconds, step, _ in figures["handed_over_at"]:
        if step in had:
            start = max(seconds, free)  # the refresher was at the one before it
            top.barh(1, had[step] - start, left=start, height=0.55, color="C1", edgecolor="white")
            top.text((start + had[step]) / 2, 1, f"{step}", ha="center", va="center", fontsize=7)
            free = had[step]
    for seconds, _, _ in figures["in_use_at"]:
        top.axvline(seconds, color="0.6", lw=0.7, ls=":")
    top.set(xlabel="seconds since the first step", xlim=(0, ends[-1]), ylim=(0.5, 2.6))
    top.set_yticks([1, 2], ["refreshes\n(weights of step)", "optimizer steps"])
    newest, oldest = zip(*figures["staleness"])
    steps = np.arange(1, len(newest) + 1)
    if newest != oldest:
        bottom.plot(steps, oldest, color="C3", lw=1.2, label="oldest shard")
    bottom.plot(steps, newest, color="C1", lw=1.2, label="newest shard" if newest != oldest else None)
    if newest != oldest:
        bottom.legend()
    bottom.set(xlabel="optimizer step", ylabel="staleness, steps", xlim=(0, len(newest)), ylim=(0, None))
    _save(figure, path)


def plot_schedules(figures: Figures, path: Path) -> None:
    """Recall tick by tick, the estimate against the truth, and recall of a partly fresh index."""
    pyplot = _pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.4))
    name = list(figures["regimes"])[1]
    for i, (arm, row) in enumerate(figures["regimes"][name].items()):
        steps = figures["tick_steps"] * np.arange(len(row["recall"]))
        left.plot(steps, row["recall"], lw=1.3, color=f"C{i}", label=arm)
    left.set(xlabel="optimizer step", ylabel="share of the fresh top-k found", title=name)
    left.legend(fontsize=7, loc="upper right")
    pairs = figures["estimate"]["pairs"]
    middle.scatter([p["true"] for p in pairs], [p["estimate"] for p in pairs], s=8)
    low = min(p["true"] for p in pairs)
    middle.plot([low, 1], [low, 1], color="0.6", lw=0.8)
    middle.set(xlabel="true overlap", ylabel="overlap within the pool", title="what the drift probe says")
    for arm, values in figures["partial"]["curves"].items():
        right.plot([100 * s for s in figures["partial"]["shares"]], values, "o-", ms=3, label=arm)
    right.set(
        xlabel="% of blocks fresh", ylabel="share of the fresh top-k found", title="a partly fresh index"
    )
    right.legend(fontsize=7)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"-> {path}")


if __name__ == "__main__":
    main()
