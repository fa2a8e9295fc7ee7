"""Schedules of the refresh compared on one recorded course of training, at equal work.

A trajectory holds, every so many steps of one real run (a tick), the embeddings of the whole corpus by the
weights of that moment, and of the queries that came next. Any schedule can then be replayed over it: block b
is searched with the embedding of the tick its shard was last made at, and what is found is compared with what
an index of the present weights finds. Nothing differs between schedules but when which block is embedded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from realm_fast.drift import DEPTH, QueryCorrection, drift_in_pool, overlap_at_k, pool_of
from realm_fast.ops.mips_topk import mips_topk
from realm_fast.schedule import ShardTally
from realm_fast.types import TopK


@dataclass
class Trajectory:
    """What `bench_refresh_training.record_trajectory` left in a folder, mapped."""

    tick_steps: int
    embeddings: list[np.ndarray]  # a tick each: [N, D] float32
    queries: list[dict[str, np.ndarray]]  # a tick each: train, probe [Q, D]; train_origin, probe_origin [Q]
    _fresh: dict[tuple[int, str, int], TopK] = field(default_factory=dict)  # the same for every schedule

    @classmethod
    def open(cls, folder: Path) -> "Trajectory":
        files = sorted(folder.glob("embeddings-*.npy"))
        if len(files) < 2:
            raise FileNotFoundError(f"{folder}: holds no trajectory (--suites trajectory records one).")
        steps = [int(file.stem.split("-")[1]) for file in files]
        queries = [dict(np.load(folder / f"queries-{step:05d}.npz")) for step in steps]
        return cls(steps[1] - steps[0], [np.load(file, mmap_mode="r") for file in files], queries)

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def num_blocks(self) -> int:
        return self.embeddings[0].shape[0]

    def search(
        self, tick: int, which: str, ages: np.ndarray, k: int, correction: QueryCorrection | None = None
    ) -> TopK:
        """The k best blocks for the queries of a tick, block b embedded at tick ages[b]."""
        mixed = np.empty(self.embeddings[0].shape, np.float32)
        for age in np.unique(ages):
            rows = np.flatnonzero(ages == age)
            mixed[rows] = self.embeddings[age][rows]
        queries = torch.from_numpy(self.queries[tick][which])
        return mips_topk(
            queries if correction is None else correction(queries),
            torch.from_numpy(mixed),
            k,
            exclude_ids=self.origins(tick, which),
        )

    def fresh(self, tick: int, which: str, k: int) -> TopK:
        """The k best blocks, all embedded at the tick itself: what an always-fresh index returns."""
        key = (tick, which, k)
        if key not in self._fresh:
            self._fresh[key] = self.search(tick, which, np.full(self.num_blocks, tick), k)
        return self._fresh[key]

    def origins(self, tick: int, which: str) -> torch.Tensor:
        return torch.from_numpy(self.queries[tick][f"{which}_origin"].astype(np.int64))


@dataclass(frozen=True)
class Arm:
    """A schedule under test."""

    name: str
    blocks_per_tick: float  # the refresher's speed
    shard_blocks: int
    publish_every_shards: int = 0  # 0: when all are done
    priority: bool = False
    every_ticks: int = 1  # handed over at multiples of it
    overlap_below: float | None = None  # instead: handed over when the probe overlap is below it
    min_ticks: int = 1
    correct_every_ticks: int = 0  # a query correction is fitted so often, and when an index is swapped in


@dataclass
class Replay:
    """What an arm showed."""

    arm: Arm
    recall: list[float] = field(default_factory=list)  # per tick: share of the fresh top-k that is found
    overlap: list[float] = field(default_factory=list)  # as the drift probe estimates it
    mean_age_ticks: list[float] = field(default_factory=list)  # over blocks
    handed_over: list[int] = field(default_factory=list)  # ticks
    blocks_embedded: float = 0.0


def replay(
    trajectory: Trajectory, arm: Arm, k: int, half_life_steps: int, probe_sample: np.ndarray
) -> Replay:
    """Runs one schedule over the trajectory.

    At every tick: what is finished is published; the queries of the tick search (and are tallied); the
    schedule is asked. The refresher works on one set of weights at a time; handing over while it is busy
    waits for it, as the newest weights at that time.
    """
    found = Replay(arm)
    n = trajectory.num_blocks
    ages = np.zeros(n, dtype=np.int64)  # of the embeddings searched
    tally = ShardTally(n, arm.shard_blocks, half_life_steps=half_life_steps)
    work: _Work | None = None
    correction: QueryCorrection | None = None
    for tick in range(len(trajectory)):
        swapped = False
        if work is not None:
            found.blocks_embedded += work.go_on(arm.blocks_per_tick, ages)
            swapped = work.done
            work = None if work.done else work
        if arm.correct_every_ticks and (swapped or tick % arm.correct_every_ticks == 0):
            correction = fit_correction(trajectory, tick, ages, k, probe_sample)
        fresh = trajectory.fresh(tick, "train", k)
        stale = trajectory.search(tick, "train", ages, DEPTH * k, correction)
        found.recall.append(overlap_at_k(fresh.ids, stale.ids[:, :k]))
        found.mean_age_ticks.append(float(np.mean(tick - ages)))
        found.overlap.append(probe_overlap(trajectory, tick, ages, k, probe_sample))
        tally.add(tick * trajectory.tick_steps, stale.ids[:, :k].numpy(), stale.ids[:, k : 2 * k].numpy())
        if work is None and _is_due(arm, tick, found):
            shard_ages = ages[:: arm.shard_blocks]
            order = tally.order(shard_ages.tolist()) if arm.priority else list(range(len(shard_ages)))
            work = _Work(tick, order, arm, n)
            found.handed_over.append(tick)
    return found


def probe_overlap(trajectory: Trajectory, tick: int, ages: np.ndarray, k: int, sample: np.ndarray) -> float:
    """What DriftProbe would measure at a tick with an index of these ages."""
    stale = trajectory.search(tick, "probe", ages, DEPTH * k)
    pool = pool_of(stale.ids, sample)
    query_emb = torch.from_numpy(trajectory.queries[tick]["probe"])
    pool_emb = torch.from_numpy(np.ascontiguousarray(trajectory.embeddings[tick][pool]))
    return drift_in_pool(query_emb, stale, trajectory.origins(tick, "probe"), pool, pool_emb, k)[0]


def fit_correction(
    trajectory: Trajectory, tick: int, ages: np.ndarray, k: int, sample: np.ndarray
) -> QueryCorrection:
    """What DriftProbe would fit at a tick to an index of these ages."""
    pool = pool_of(trajectory.search(tick, "probe", ages, DEPTH * k).ids, sample)
    stale = np.stack([trajectory.embeddings[ages[block]][block] for block in pool])
    return QueryCorrection.fit(
        torch.from_numpy(stale), torch.from_numpy(np.ascontiguousarray(trajectory.embeddings[tick][pool]))
    )


def true_overlap(trajectory: Trajectory, tick: int, ages: np.ndarray, k: int) -> float:
    """The overlap that `probe_overlap` estimates."""
    stale = trajectory.search(tick, "probe", ages, k)
    fresh = trajectory.fresh(tick, "probe", k)
    return overlap_at_k(stale.ids, fresh.ids)


def _is_due(arm: Arm, tick: int, found: Replay) -> bool:
    if arm.overlap_below is None:
        return tick % arm.every_ticks == 0
    since = tick - (found.handed_over[-1] if found.handed_over else -arm.min_ticks)
    return since >= arm.min_ticks and found.overlap[-1] < arm.overlap_below


class _Work:
    """A refresh on its way: shards in their order, published in groups."""

    def __init__(self, tick: int, order: Sequence[int], arm: Arm, num_blocks: int) -> None:
        self.tick = tick
        group = arm.publish_every_shards or len(order)
        shards = [np.arange(s * arm.shard_blocks, min((s + 1) * arm.shard_blocks, num_blocks)) for s in order]
        self.groups = [np.concatenate(shards[i : i + group]) for i in range(0, len(shards), group)]
        self.credit = 0.0  # blocks embedded of the groups not published yet
        self.done = False

    def go_on(self, blocks: float, ages: np.ndarray) -> float:
        """Embeds so many blocks more; returns how many there were to embed."""
        left = sum(len(group) for group in self.groups) - self.credit
        self.credit += min(blocks, left)
        while self.groups and self.credit >= len(self.groups[0]) - 1e-6:
            group = self.groups.pop(0)
            self.credit -= len(group)
            ages[group] = self.tick
        self.done = not self.groups
        return min(blocks, left)


def after_partial_refresh(
    trajectory: Trajectory,
    stale_tick: int,
    tick: int,
    k: int,
    order: np.ndarray,
    shares: Sequence[float],
) -> Iterator[float]:
    """Recall at `tick` when only a share of the blocks is fresh, the first ones of an order over blocks."""
    n = trajectory.num_blocks
    fresh = trajectory.fresh(tick, "train", k)
    for share in shares:
        ages = np.full(n, stale_tick)
        ages[order[: round(share * n)]] = tick
        yield overlap_at_k(fresh.ids, trajectory.search(tick, "train", ages, k).ids)
