"""Refreshers: the schedule, the three modes, and what happens when the child process is killed."""

import os
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realm_fast.embedder import Embedder
from realm_fast.embedding import embed_blocks
from realm_fast.refresh import ProcessRefresher, RefreshSchedule, RefreshTask, make_refresher
from realm_fast.snapshot import list_snapshots
from tests import qa_world

PATIENCE_S = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"))


@pytest.fixture
def embedder(store):
    torch.manual_seed(0)
    return Embedder.from_config(qa_world.settings(store.path.parent).embedder, store.tokenizer())


def make(store, folder, mode, **refresh):
    overrides = [f"refresh.{name}={value}" for name, value in refresh.items()]
    config = qa_world.settings(store.path.parent, f"refresh.mode={mode}", *overrides)
    task = RefreshTask(folder / "snapshots", store, config.index, config.refresh)
    return make_refresher(task, work_dir=folder / "work")


def wait_for_snapshot(refresher, step):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        snapshot = refresher.poll()
        if snapshot is not None and snapshot.step >= step:
            return snapshot
        time.sleep(0.01)
    raise AssertionError(f"no snapshot of step {step} in {PATIENCE_S} s; failures: {refresher.failures}")


def change(embedder):
    with torch.no_grad():
        for parameter in embedder.block_side.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


@given(every=st.integers(1, 1000), step=st.integers(0, 10**6))
def test_the_schedule_is_every_so_many_steps_and_not_at_the_start(every, step):
    assert RefreshSchedule(every).is_due(step) == (step in range(every, step + 1, every))


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
def test_each_mode_publishes_the_weights_it_was_given(tmp_path, store, embedder, mode):
    refresher = make(store, tmp_path, mode)
    try:
        assert refresher.poll() is None
        refresher.submit(10, embedder)
        expected = embed_blocks(embedder, store, token_budget=2048)
        given_hash = embedder.hash()
        change(embedder)  # the trainer goes on; what was handed over must not change with it
        snapshot = wait_for_snapshot(refresher, 10)
        assert snapshot.index.provenance.encoder_hash == given_hash
        torch.testing.assert_close(
            snapshot.index.reconstruct(torch.arange(len(store))), expected, rtol=1e-5, atol=1e-5
        )
        assert refresher.poll() is None
        assert not refresher.is_busy()
        assert refresher.failures == []
    finally:
        refresher.close()


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_only_the_newest_weights_count(tmp_path, store, embedder, mode):
    refresher = make(store, tmp_path, mode)
    try:
        for step in range(1, 6):
            change(embedder)
            refresher.submit(step, embedder)
        snapshot = wait_for_snapshot(refresher, 5)
        assert snapshot.index.provenance.encoder_hash == embedder.hash()
        assert len(list_snapshots(tmp_path / "snapshots")) <= 5
        assert refresher.failures == []
    finally:
        refresher.close()


def test_mode_off_does_nothing(tmp_path, store, embedder):
    refresher = make(store, tmp_path, "off")
    refresher.submit(1, embedder)
    assert refresher.poll() is None
    assert not refresher.is_busy()
    refresher.close()
    assert list_snapshots(tmp_path / "snapshots") == {}


def test_a_killed_refresher_is_started_again_and_finishes(tmp_path, store, embedder):
    refresher = make(store, tmp_path, "process")
    assert isinstance(refresher, ProcessRefresher)
    try:
        first = refresher.pid
        os.kill(first, signal.SIGKILL)
        refresher.submit(3, embedder)
        snapshot = wait_for_snapshot(refresher, 3)
        assert snapshot.index.provenance.encoder_hash == embedder.hash()
        assert refresher.pid != first
        assert "killed by signal 9" in refresher.failures[0]
    finally:
        refresher.close()


def test_a_refresher_that_cannot_live_is_given_up_and_the_trainer_goes_on(tmp_path, store, embedder):
    refresher = make(store, tmp_path, "process", max_restarts=0)
    try:
        os.kill(refresher.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while len(refresher.failures) < 2 and time.monotonic() < deadline:
            assert refresher.poll() is None
            time.sleep(0.01)
        assert "not started again" in refresher.failures[-1]
        refresher.submit(1, embedder)
        assert not refresher.is_busy()
    finally:
        refresher.close()


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_failed_refresh_is_reported_and_the_next_one_works(tmp_path, store, embedder, mode):
    refresher = make(store, tmp_path, mode)
    try:
        healthy = {name: value.clone() for name, value in embedder.state_dict().items()}
        with torch.no_grad():
            next(embedder.block_side.parameters()).fill_(torch.nan)
        refresher.submit(1, embedder)
        deadline = time.monotonic() + PATIENCE_S
        while not refresher.failures and time.monotonic() < deadline:
            assert refresher.poll() is None
            time.sleep(0.01)
        assert "refresh of step 1" in refresher.failures[0]
        assert "NaN" in refresher.failures[0]
        embedder.load_state_dict(healthy)
        refresher.submit(2, embedder)
        assert wait_for_snapshot(refresher, 2).step == 2
    finally:
        refresher.close()


def test_closing_leaves_no_process_and_no_half_snapshot(tmp_path, store, embedder):
    refresher = make(store, tmp_path, "process")
    refresher.submit(1, embedder)
    pid = refresher.pid
    refresher.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    leftovers = list((tmp_path / "snapshots").glob(".staging*")) if (tmp_path / "snapshots").exists() else []
    assert leftovers == []
