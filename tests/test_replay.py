"""Replaying schedules over a made-up trajectory: who is fresh when, and that the work is equal."""

from dataclasses import replace

import numpy as np
import pytest
from realm_fast.benchmarks.replay import (
    Arm,
    Trajectory,
    after_partial_refresh,
    probe_overlap,
    replay,
    true_overlap,
)

N, DIM, TICKS, K = 48, 16, 13, 3
PLAIN = Arm("plain", blocks_per_tick=N / 3, shard_blocks=8, every_ticks=3)
NO_SAMPLE = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def trajectory():
    """Blocks wander; queries ask for blocks of the last shard only."""
    chance = np.random.default_rng(5)
    steps = [chance.standard_normal((N, DIM)).astype(np.float32)]
    for _ in range(TICKS - 1):
        steps.append(steps[-1] + 0.3 * chance.standard_normal((N, DIM)).astype(np.float32))
    queries = []
    for embeddings in steps:
        asked = (3 * embeddings[40:] + chance.standard_normal((8, DIM))).astype(np.float32)
        origins = np.full(8, -1)
        queries.append({"train": asked, "probe": asked, "train_origin": origins, "probe_origin": origins})
    return Trajectory(10, steps, queries)


def run(trajectory, arm):
    return replay(trajectory, arm, K, 20, NO_SAMPLE)


def test_a_plain_refresh_is_searched_once_all_of_it_is_done(trajectory):
    found = run(trajectory, PLAIN)
    # handed over at 0, 3, 6, ...; in use three ticks later: the age climbs from 3 to 5
    assert found.handed_over == [0, 3, 6, 9, 12]
    assert found.mean_age_ticks == [0, 1, 2, *[3, 4, 5] * 3, 3]
    assert found.blocks_embedded == 4 * N


def test_shards_published_as_they_are_done_are_fresher_for_the_same_work(trajectory):
    plain = run(trajectory, PLAIN)
    incremental = run(trajectory, replace(PLAIN, publish_every_shards=1))
    assert incremental.blocks_embedded == plain.blocks_embedded
    # a third of the shards is replaced at each tick, in the order of their numbers
    assert incremental.mean_age_ticks[3:] == pytest.approx([3] * 10)
    assert np.mean(incremental.recall[3:]) > np.mean(plain.recall[3:])


def test_priority_makes_what_is_asked_for_fresh_first(trajectory):
    in_order = run(trajectory, replace(PLAIN, publish_every_shards=1))
    first = run(trajectory, replace(PLAIN, publish_every_shards=1, priority=True))
    assert first.blocks_embedded == in_order.blocks_embedded
    assert np.mean(first.recall[3:]) > np.mean(in_order.recall[3:])


def test_the_drift_arm_hands_over_when_the_overlap_has_fallen(trajectory):
    arm = replace(PLAIN, overlap_below=0.8, min_ticks=2)
    found = run(trajectory, arm)
    assert found.handed_over
    assert all(found.overlap[tick] < 0.8 for tick in found.handed_over)
    assert all(gap >= 2 for gap in np.diff(found.handed_over))
    assert run(trajectory, replace(arm, overlap_below=0.0)).handed_over == []


def test_corrected_queries_make_up_for_what_moved_alike():
    """Blocks that all go through one affine map: the corrected search finds what a fresh index finds."""
    chance = np.random.default_rng(9)
    first = chance.standard_normal((400, DIM)).astype(np.float32)
    turn = (np.eye(DIM) + 0.2 * chance.standard_normal((DIM, DIM))).astype(np.float32)
    moved = first @ turn + 0.5 * chance.standard_normal(DIM).astype(np.float32)
    asked = (moved[:40] + chance.standard_normal((40, DIM))).astype(np.float32)
    queries = {
        "train": asked,
        "probe": asked,
        "train_origin": np.full(40, -1),
        "probe_origin": np.full(40, -1),
    }
    trajectory = Trajectory(10, [first, moved], [queries, queries])
    never = replace(PLAIN, every_ticks=100, blocks_per_tick=0)
    left_alone = run(trajectory, never)
    corrected = run(trajectory, replace(never, correct_every_ticks=1))
    assert corrected.recall[0] == 1.0
    assert left_alone.recall[1] < 0.8
    assert corrected.recall[1] > 0.97


def test_the_estimate_is_the_truth_when_the_pool_is_the_corpus_and_not_below_it_otherwise(trajectory):
    for tick in range(1, TICKS):
        ages = np.zeros(N, dtype=np.int64)
        truth = true_overlap(trajectory, tick, ages, K)
        assert probe_overlap(trajectory, tick, ages, K, np.arange(N)) == pytest.approx(truth)
        assert probe_overlap(trajectory, tick, ages, K, NO_SAMPLE) >= truth - 1e-9
    assert truth < 0.9  # there was something to see


def test_a_partly_fresh_index_goes_from_stale_to_fresh(trajectory):
    order = np.arange(N)[::-1]
    stale, some, fresh = after_partial_refresh(trajectory, 0, TICKS - 1, K, order, [0.0, 0.5, 1.0])
    assert stale == pytest.approx(
        run(trajectory, replace(PLAIN, every_ticks=100, blocks_per_tick=0)).recall[-1]
    )
    assert stale < some < fresh == 1.0
