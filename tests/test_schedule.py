"""When a refresh is due and which shards come first: pure functions, checked against what they say they are."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_fast.config import RefreshConfig
from realm_fast.errors import ConfigError, CorruptArtifactError
from realm_fast.schedule import RUNNER_UP_WEIGHT, RefreshSchedule, ShardTally
from realm_fast.types import NO_BLOCK

DRIFT = RefreshConfig(
    trigger="drift", drift_every_steps=10, drift_overlap_below=0.8, drift_min_steps=30, drift_max_steps=100
)


def drift_due(step, *, handed_over_step=0, oldest_shard_step=None, overlap=None):
    oldest = handed_over_step if oldest_shard_step is None else oldest_shard_step
    return RefreshSchedule.from_config(DRIFT).due(
        step, handed_over_step=handed_over_step, oldest_shard_step=oldest, overlap=overlap
    )


@given(every=st.integers(1, 1000), step=st.integers(0, 10**6), overlap=st.none() | st.floats(0, 1))
def test_the_plain_schedule_is_every_so_many_steps_and_not_at_the_start(every, step, overlap):
    schedule = RefreshSchedule.from_config(RefreshConfig(every_steps=every))
    reason = schedule.due(step, handed_over_step=0, oldest_shard_step=0, overlap=overlap)
    assert (reason == "steps") == (step in range(every, step + 1, every))


def test_drift_hands_over_when_the_overlap_is_below_and_not_before():
    assert drift_due(40, overlap=0.79) == "drift"
    assert drift_due(40, overlap=0.8) is None
    assert drift_due(40, overlap=None) is None  # not measured after this step


def test_the_interval_has_a_floor_and_a_ceiling():
    assert drift_due(129, handed_over_step=100, overlap=0.0) is None
    assert drift_due(130, handed_over_step=100, overlap=0.0) == "drift"
    assert drift_due(199, handed_over_step=100, overlap=1.0) is None
    assert drift_due(200, handed_over_step=100, overlap=1.0) == "ceiling"


def test_a_refresh_on_its_way_is_waited_for_but_not_beyond_the_ceiling():
    assert drift_due(140, handed_over_step=100, oldest_shard_step=60, overlap=0.1) is None
    assert drift_due(200, handed_over_step=100, oldest_shard_step=60, overlap=0.1) == "ceiling"


@given(
    overlaps=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=300),
    delay=st.integers(0, 120),
)
def test_any_run_of_the_drift_trigger_keeps_floor_and_ceiling(overlaps, delay):
    handed_over, steps = 0, []
    for step, overlap in enumerate(overlaps, start=1):
        published = max((s for s in (0, *steps) if s + delay <= step), default=0)
        if drift_due(step, handed_over_step=handed_over, oldest_shard_step=published, overlap=overlap):
            handed_over = step
            steps.append(step)
    gaps = np.diff([0, *steps])
    assert all(DRIFT.drift_min_steps <= gap <= DRIFT.drift_max_steps for gap in gaps)
    assert len(overlaps) - handed_over < DRIFT.drift_max_steps


def test_checks_come_every_so_many_steps_whatever_the_trigger():
    assert [s for s in range(31) if RefreshSchedule.from_config(DRIFT).is_check_due(s)] == [10, 20, 30]
    never = RefreshSchedule.from_config(RefreshConfig(drift_every_steps=0))
    assert not any(never.is_check_due(s) for s in range(200))


def test_settings_that_cannot_work_together_are_refused():
    with pytest.raises(ConfigError, match=r"refresh.drift_every_steps: expected at least 1"):
        RefreshSchedule.from_config(RefreshConfig(trigger="drift", drift_every_steps=0))
    with pytest.raises(
        ConfigError, match=r"refresh.drift_every_steps: expected at least 1 with refresh.corr"
    ):
        RefreshSchedule.from_config(RefreshConfig(correct_queries=True, drift_every_steps=0))
    with pytest.raises(
        ConfigError, match=r"refresh.correct_queries: .*publish_every_shards=0 with it, got 2"
    ):
        RefreshSchedule.from_config(RefreshConfig(correct_queries=True, publish_every_shards=2))
    with pytest.raises(ConfigError, match=r"refresh.drift_min_steps: expected at most .*=50, got 60"):
        RefreshSchedule.from_config(RefreshConfig(drift_min_steps=60, drift_max_steps=50))


hits = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(NO_BLOCK, 24)), st.lists(st.integers(NO_BLOCK, 24))),
    max_size=8,
)


@given(hits=hits, half_life=st.floats(0.5, 50))
def test_the_tally_is_the_decayed_sum_it_says_it_is(hits, half_life):
    tally = ShardTally(25, 10, half_life_steps=half_life)
    step, added = 0, []
    for gap, candidates, runners_up in hits:
        step += gap
        tally.add(step, np.array(candidates, dtype=np.int64), np.array(runners_up, dtype=np.int64))
        added.append((step, candidates, runners_up))
    expected = np.zeros(3)
    for then, candidates, runners_up in added:
        decay = 0.5 ** ((step - then) / half_life)
        for weight, ids in ((1, candidates), (RUNNER_UP_WEIGHT, runners_up)):
            for block in ids:
                if block != NO_BLOCK:
                    expected[block // 10] += weight * decay
    np.testing.assert_allclose(tally.tally, expected, rtol=1e-9)


def test_the_order_is_by_tally_per_block_then_age_then_number():
    tally = ShardTally(25, 10, half_life_steps=10)  # shards of 10, 10 and 5 blocks
    assert tally.order([0, 0, 0]) == [0, 1, 2]
    assert tally.order([4, 0, 4]) == [1, 0, 2]  # nothing retrieved yet: the stalest first
    tally.add(1, np.array([[0, 1, 2, NO_BLOCK]]), np.array([[20, 21]]))  # 3 of 10; twice a half of 5
    assert tally.order([4, 0, 4]) == [0, 2, 1]
    tally.add(1, np.array([20, 20]), np.array([], dtype=np.int64))
    assert tally.order([4, 0, 4]) == [2, 0, 1]


@given(hits=hits, cut=st.integers(0, 8))
def test_a_restored_tally_goes_on_bit_for_bit(hits, cut):
    def run(tally, part, step):
        for gap, candidates, runners_up in part:
            step += gap
            tally.add(step, np.array(candidates, dtype=np.int64), np.array(runners_up, dtype=np.int64))
        return step

    whole = ShardTally(25, 10, half_life_steps=7)
    run(whole, hits, 0)
    first = ShardTally(25, 10, half_life_steps=7)
    step = run(first, hits[:cut], 0)
    second = ShardTally(25, 10, half_life_steps=7)
    second.restore(json.loads(json.dumps(first.state())))
    run(second, hits[cut:], step)
    assert second.state() == whole.state()


def test_a_tally_refuses_what_does_not_fit():
    tally = ShardTally(25, 10, half_life_steps=10)
    with pytest.raises(ValueError, match=r"shard_steps: expected 3 of them, got 2"):
        tally.order([0, 0])
    with pytest.raises(CorruptArtifactError, match="expected 3 shards, got 1"):
        tally.restore({"step": 0, "tally": [1.0]})
    tally.add(5, np.array([1]), np.array([2]))
    with pytest.raises(ValueError, match=r"step: expected at least 5, got 4"):
        tally.add(4, np.array([1]), np.array([2]))
