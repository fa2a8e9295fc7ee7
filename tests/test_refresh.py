"""Refreshers: the schedule, the modes, who may write, and what happens when a process is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from realm_fast import ownership, refresh
from realm_fast.cli import main
from realm_fast.config import apply_overrides
from realm_fast.embedder import Embedder
from realm_fast.embedding import embed_blocks
from realm_fast.errors import (
    ConfigError,
    CorruptArtifactError,
    DataError,
    ProvenanceError,
    RefreshError,
)
from realm_fast.files import write_json
from realm_fast.handover import Handover
from realm_fast.ownership import Sighting, TakenError, own
from realm_fast.refresh import ProcessRefresher, RefreshTask, make_refresher
from realm_fast.refresher import follow, parse_cpus, use_budget
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import list_snapshots, open_snapshot, published_snapshots, snapshot_name
from tests import qa_world
from tests.qa_world import one_thread  # noqa: F401 (a fixture)

PATIENCE_S = 180
BLOCKS, SHARD = 100, 48


@pytest.fixture(autouse=True)
def handlers():
    """cli.main() takes over SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"), count=BLOCKS)


@pytest.fixture
def embedder(store):
    torch.manual_seed(0)
    return Embedder.from_config(qa_world.settings(store.path.parent).embedder, store.tokenizer())


def make_task(store, folder, mode, **refresh):
    overrides = [f"refresh.{name}={value}" for name, value in {"shard_blocks": SHARD, **refresh}.items()]
    config = qa_world.settings(store.path.parent, f"refresh.mode={mode}", *overrides)
    return RefreshTask(folder / "snapshots", store, config.index, config.refresh)


def make(store, folder, mode, **refresh):
    return make_refresher(make_task(store, folder, mode, **refresh), work_dir=folder / "work")


class Follower:
    """`follow` in a thread, as `realm-fast refresher` would in a process."""

    def __init__(self, task, folder):
        self.closed = threading.Event()
        self.error = None
        self._thread = threading.Thread(target=self._run, args=(task, folder))
        self._thread.start()

    def _run(self, task, folder):
        try:
            follow(Handover(folder), task, should_stop=self.closed.is_set)
        except Exception as error:
            self.error = error

    def join(self):
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def close(self):
        self.closed.set()
        self.join()


@pytest.fixture
def followers():
    """Starts followers, and stops them at the end."""
    started = []

    def start(task, folder):
        started.append(Follower(task, folder))
        return started[-1]

    yield start
    for one in started:
        one.close()


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.01)


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


@pytest.mark.parametrize("mode", ["inline", "thread", "process", "follow"])
def test_each_mode_publishes_the_weights_it_was_given(tmp_path, store, embedder, mode, followers):
    refresher = make(store, tmp_path, mode)
    if mode == "follow":
        followers(make_task(store, tmp_path, mode), tmp_path / "work")
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
        assert len(snapshot.manifest.shards) == 3
        assert refresher.poll() is None
        assert not refresher.is_busy()
        assert refresher.failures == []
    finally:
        refresher.close()


@pytest.mark.parametrize("mode", ["thread", "follow"])
def test_only_the_newest_weights_count(tmp_path, store, embedder, mode, followers):
    refresher = make(store, tmp_path, mode)
    try:
        for step in range(1, 6):
            change(embedder)
            refresher.submit(step, embedder)
        if mode == "follow":
            followers(make_task(store, tmp_path, mode), tmp_path / "work")
        snapshot = wait_for_snapshot(refresher, 5)
        assert snapshot.index.provenance.encoder_hash == embedder.hash()
        assert len(list_snapshots(tmp_path / "snapshots")) <= 5
        assert refresher.failures == []
    finally:
        refresher.close()


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_shards_are_published_by_and_by_and_in_the_order_asked_for(
    tmp_path, store, embedder, mode, followers
):
    refresher = make(store, tmp_path, mode, publish_every_shards=1)
    first = refresher.make_now(1, embedder)
    if mode == "follow":
        followers(make_task(store, tmp_path, mode), tmp_path / "work")
    try:
        change(embedder)
        refresher.submit(2, embedder, shard_order=[2, 0, 1])
        whole = wait_for_snapshot(refresher, 2)
        while not whole.is_whole:  # how many of the partial ones were seen is a matter of time
            assert whole.manifest.shards[2].step == 2
            assert refresher.is_busy()
            whole = wait_for_snapshot(refresher, 2)
        wait_until(lambda: not refresher.is_busy(), "the end of the refresh")
        assert whole.manifest.encoder_hash == embedder.hash()
        names = [one.path.name for one in published_snapshots(tmp_path / "snapshots")]
        assert names == [first.path.name, *(snapshot_name(2, n) for n in (1, 2)), whole.path.name]
        partial = open_snapshot(tmp_path / "snapshots" / names[1], verify=True)
        assert [shard.step for shard in partial.manifest.shards] == [1, 1, 2]
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
        refresher.submit(3, embedder)
        first = refresher.pid
        os.kill(first, signal.SIGKILL)
        snapshot = wait_for_snapshot(refresher, 3)
        assert snapshot.index.provenance.encoder_hash == embedder.hash()
        assert refresher.pid != first
        assert "killed by signal 9" in refresher.failures[0]
    finally:
        refresher.close()


def test_a_refresher_that_cannot_live_is_given_up_and_the_trainer_goes_on(tmp_path, store, embedder):
    refresher = make(store, tmp_path, "process", max_restarts=0)
    try:
        refresher.submit(1, embedder)
        os.kill(refresher.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while len(refresher.failures) < 2 and time.monotonic() < deadline:
            assert refresher.poll() is None
            time.sleep(0.01)
        assert "not started again" in refresher.failures[-1]
        refresher.submit(2, embedder)
        assert not refresher.is_busy()
    finally:
        refresher.close()


def test_weights_go_through_shared_memory_which_is_given_back(tmp_path, store, embedder, monkeypatch, caplog):
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr("realm_fast.refresh.SHARED_MEMORY", shared)
    refresher = make(store, tmp_path, "process")
    refresher.submit(1, embedder)
    (folder,) = shared.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name[:9] for path in folder.glob("weights-*")] == ["weights-s"]
    wait_for_snapshot(refresher, 1)
    abandoned = folder.with_name(folder.name.rpartition("-")[0] + "-4194305")  # no such process
    shutil.copytree(folder, abandoned)  # of a trainer that was killed
    refresher.close()
    assert [path.name for path in shared.iterdir()] == [abandoned.name]
    with caplog.at_level("INFO", "realm_fast"):
        monkeypatch.setattr(
            "realm_fast.refresh.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9)
        )
        refresher = make(store, tmp_path, "process")
        refresher.submit(2, embedder)
    assert list(shared.iterdir()) == []
    assert "has no room for the weights" in caplog.text
    refresher.close()


@pytest.mark.parametrize("mode", ["thread", "follow"])
def test_a_failed_refresh_is_reported_and_the_next_one_works(tmp_path, store, embedder, mode, followers):
    refresher = make(store, tmp_path, mode)
    if mode == "follow":
        followers(make_task(store, tmp_path, mode), tmp_path / "work")
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
    assert list((tmp_path / "snapshots").glob(".staging*")) == []


# ---------------------------------------------------------------- a refresher beside the trainer


@pytest.fixture
def followed(tmp_path, store):
    """A run that trains with refresh.mode=follow."""
    config = qa_world.settings(store.path.parent, "refresh.mode=follow", f"refresh.shard_blocks={SHARD}")
    return RunFolder.create(tmp_path / "run", config, store)


def refresher_of(run, store):
    config = run.config()
    task = RefreshTask(run.snapshots_dir, store, config.index, config.refresh)
    return make_refresher(task, work_dir=run.handover_dir)


def test_the_command_follows_a_run_to_its_end(followed, store, embedder):
    command = [sys.executable, "-m", "realm_fast", "refresher", str(followed.path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    trainer = refresher_of(followed, store)
    try:
        wait_until(Sighting(followed.snapshots_dir).is_owned, "the refresher")
        assert trainer.make_now(0, embedder).manifest.encoder_hash == embedder.hash()
        assert followed.snapshots_dir.stat().st_mtime > 0
        change(embedder)
        trainer.submit(5, embedder)
        wait_for_snapshot(trainer, 5)
        trainer.close(is_done=True)
        _, errors = child.communicate(timeout=PATIENCE_S)
        assert child.returncode == 0, errors
        assert "step 0: published" in errors
        assert "step 5: published" in errors
    finally:
        child.kill()
        trainer.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_cleanly_on_a_signal_and_with_once(followed, store, embedder, number, code, capsys):
    trainer = refresher_of(followed, store)
    trainer.submit(5, embedder)
    assert not trainer.is_busy()  # nobody is there to do it
    assert main(["refresher", str(followed.path), "--once"]) == 0
    assert wait_for_snapshot(trainer, 5).manifest.encoder_hash == embedder.hash()
    command = [sys.executable, "-m", "realm_fast", "refresher", str(followed.path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(Sighting(followed.snapshots_dir).is_owned, "the refresher")
    child.send_signal(number)
    _, errors = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == code, errors
    assert "finished shards are kept" in errors
    assert not Sighting(followed.snapshots_dir).is_owned()
    trainer.close()


def test_without_a_refresher_the_trainer_makes_the_index_itself(followed, store, embedder):
    trainer = refresher_of(followed, store)
    assert trainer.make_now(0, embedder).manifest.encoder_hash == embedder.hash()
    trainer.close()


@pytest.mark.parametrize("harm", ["deleted", "flipped"])
def test_an_index_harmed_before_it_is_opened_is_made_again(tmp_path, store, embedder, harm, monkeypatch):
    real, calls = refresh.write_snapshot, []

    def write_and_harm(*args, **options):
        path = real(*args, **options)
        shard = next(path.glob("shard-*"))
        if not calls and harm == "deleted":
            shutil.rmtree(path)
        elif not calls:
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
        calls.append(path)
        return path

    monkeypatch.setattr(refresh, "write_snapshot", write_and_harm)
    trainer = make(store, tmp_path, "off")
    snapshot = trainer.make_now(3, embedder)
    assert len(calls) == 2
    assert snapshot.manifest.encoder_hash == embedder.hash()
    open_snapshot(snapshot.path, verify=True)


def test_the_same_weights_can_be_asked_for_again(tmp_path, store, embedder, followers):
    followers(make_task(store, tmp_path, "follow"), tmp_path / "work")
    trainer = make(store, tmp_path, "follow")
    trainer.submit(4, embedder)
    path = wait_for_snapshot(trainer, 4).path
    trainer.submit(4, embedder)  # it is there already, and is handed over again
    assert wait_for_snapshot(trainer, 4).path == path
    shutil.rmtree(path)
    trainer.submit(4, embedder)  # it is not there any more, and is made again
    assert open_snapshot(wait_for_snapshot(trainer, 4).path, verify=True).is_whole
    trainer.close()


def test_a_trainer_that_waits_gives_its_weights_again_when_they_were_deleted(
    tmp_path, store, embedder, monkeypatch
):
    trainer = make(store, tmp_path, "follow")
    handover, found = Handover(tmp_path / "work"), []
    with own(tmp_path / "snapshots", "refresher"):
        waiting = threading.Thread(target=lambda: found.append(trainer.make_now(0, embedder)))
        waiting.start()
        wait_until(lambda: handover.wanted() is not None, "an order")
        first = handover.wanted()
        shutil.rmtree(tmp_path / "work" / first.weights_name)
        wait_until(lambda: handover.wanted().number != first.number, "another order")
        assert handover.load(handover.wanted()).hash() == embedder.hash()
    waiting.join(PATIENCE_S)  # the refresher is gone: it does the work itself
    assert found[0].manifest.encoder_hash == embedder.hash()
    trainer.close()


def test_an_index_that_comes_although_its_order_failed_is_not_lost(tmp_path, store, embedder, monkeypatch):
    """The order was read before the write of it failed, so the refresher makes the index all the same."""
    task = make_task(store, tmp_path, "follow")
    trainer, real = make(store, tmp_path, "follow"), Handover.publish

    def publish_and_fail(self, order, weights):
        real(self, order, weights)
        task.write(order.step, embedder)
        wait_until(trainer._watch.has_ready, "the snapshot")
        raise OSError("no space left")

    monkeypatch.setattr(Handover, "publish", publish_and_fail)
    with own(tmp_path / "snapshots", "refresher"):
        snapshot = trainer.make_now(0, embedder)
    assert snapshot.manifest.encoder_hash == embedder.hash()
    trainer.close()


def test_a_refresher_waits_while_the_trainer_makes_its_first_index(tmp_path, store, embedder, followers):
    trainer = make(store, tmp_path, "follow")
    with own(tmp_path / "snapshots", "trainer"):
        one = followers(make_task(store, tmp_path, "follow"), tmp_path / "work")
        trainer.submit(1, embedder)
        time.sleep(0.5)
        assert one.error is None
        assert list_snapshots(tmp_path / "snapshots") == {}
    wait_for_snapshot(trainer, 1)
    trainer.close()


def test_weights_of_a_step_that_was_rolled_back_are_never_served(tmp_path, store, embedder, followers):
    """A trainer killed at step 9 goes on from step 5; a late snapshot of the old step 9 is not its own."""
    before = make(store, tmp_path, "follow")
    before.submit(9, embedder)
    before.close()
    change(embedder)
    trainer = make(store, tmp_path, "follow")
    trainer.submit(5, embedder)
    task = make_task(store, tmp_path, "follow")
    torch.manual_seed(1)
    late = Embedder.from_config(qa_world.settings(store.path.parent).embedder, store.tokenizer())
    with own(task.folder, "trainer"):
        task.write(9, late)
    followers(task, tmp_path / "work")
    assert wait_for_snapshot(trainer, 5).step == 5
    change(embedder)
    trainer.submit(9, embedder)
    assert wait_for_snapshot(trainer, 9).manifest.encoder_hash == embedder.hash()
    trainer.close()


def test_a_damaged_snapshot_is_passed_over_and_said_once(tmp_path, store, embedder):
    trainer = make(store, tmp_path, "follow")
    task = make_task(store, tmp_path, "follow")
    for step in (1, 2):
        change(embedder)
        with own(task.folder, "trainer"):
            path = task.write(step, embedder)
        if step == 2:
            shard = path / "shard-00001.safetensors"
            content = bytearray(shard.read_bytes())
            content[-5] ^= 1
            shard.write_bytes(content)
        trainer.submit(step, embedder)
        if step == 1:
            assert wait_for_snapshot(trainer, 1).step == 1
    wait_until(lambda: trainer.poll() is not None or trainer.failures, "a word about the damage")
    time.sleep(0.3)
    assert trainer.poll() is None
    assert len(trainer.failures) == 1
    assert "shard-00001.safetensors: its data is not as it was written" in trainer.failures[0]
    trainer.close()


# ---------------------------------------------------------------- one at a time


OWN = """
import sys
from pathlib import Path
from realm_fast.ownership import own
with own(Path(sys.argv[1]), "refresher"):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_second_refresher_is_told_who_is_at_work_and_a_killed_one_is_no_obstacle(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", OWN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "mine\n"
        with (
            pytest.raises(TakenError, match=rf"a refresher \(process {child.pid} on "),
            own(tmp_path, "trainer"),
        ):
            pass
        assert Sighting(tmp_path).is_owned()
        child.kill()
        child.wait()
    assert not Sighting(tmp_path).is_owned()
    with own(tmp_path, "trainer"):
        pass


def elsewhere(folder, beat, token="t"):
    """What a machine leaves that does not see our flocks."""
    record = {
        "what": "refresher",
        "host": "far",
        "pid": 7,
        "machine": "another",
        "token": token,
        "beat": beat,
    }
    write_json(folder / ".owner.json", record)  # whole or not at all, as owners write it


def test_an_owner_on_another_machine_counts_while_it_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "SILENCE_S", 1.5)  # the thread that beats may be kept waiting
    alive = threading.Event()

    def beat():
        number = 0
        while not alive.is_set():
            number += 1
            elsewhere(tmp_path, number)
            time.sleep(0.05)

    thread = threading.Thread(target=beat)
    thread.start()
    wait_until((tmp_path / ".owner.json").exists, "the first beat")
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock is set back: nothing depends on it
    with pytest.raises(TakenError, match=r"process 7 on far"), own(tmp_path, "refresher"):
        pass
    assert Sighting(tmp_path).is_owned()
    alive.set()
    thread.join()
    begin = time.monotonic()
    with own(tmp_path, "refresher"):  # it fell silent
        assert time.monotonic() - begin >= 1.5


def test_who_was_suspended_too_long_learns_that_another_took_over(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    with own(tmp_path, "refresher") as owner:
        owner.check()
        wait_until(lambda: json.loads((tmp_path / ".owner.json").read_text())["beat"] > 1, "a beat")

        def lost():
            elsewhere(tmp_path, 1)
            try:
                owner.check()
            except RefreshError as error:
                return "process 7 on far" in str(error)

        wait_until(lost, "the loss")
    assert json.loads((tmp_path / ".owner.json").read_text())["host"] == "far"  # not ours to delete


def test_two_refreshers_on_one_run_by_mistake(tmp_path, store, followers):
    task = make_task(store, tmp_path, "follow")
    followers(task, tmp_path / "work")
    wait_until(Sighting(task.folder).is_owned, "the first")
    second = followers(task, tmp_path / "work")
    second.join()
    assert isinstance(second.error, TakenError)
    assert "a refresher" in str(second.error)


# ---------------------------------------------------------------- bad input


def test_a_run_that_does_not_fit_is_refused(tmp_path, store, followed, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["refresher", str(tmp_path / "empty")]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert main(["refresher", str(followed.path), "--once"]) == 2
    assert "no snapshot is wanted yet" in capsys.readouterr().err
    followed.save_config(apply_overrides(followed.config(), ["refresh.mode=process"]))
    assert main(["refresher", str(followed.path)]) == 2
    assert "its refresh.mode is process, so it needs no refresher beside it" in capsys.readouterr().err
    followed.save_config(apply_overrides(followed.config(), ["refresh.mode=follow"]))
    other = qa_world.make_store(tmp_path / "other", count=9)
    assert main(["refresher", str(followed.path), "--corpus", str(other.path)]) == 2
    assert "belongs to corpus" in capsys.readouterr().err
    manifest = {**followed.manifest, "corpus": str(tmp_path / "gone")}
    followed.manifest_path.write_text(json.dumps(manifest))
    assert main(["refresher", str(followed.path)]) == 2
    assert "not there on this machine; say where with --corpus" in capsys.readouterr().err


def test_weights_of_another_model_or_for_another_corpus_are_refused(tmp_path, store, embedder, followers):
    trainer = make(store, tmp_path, "follow")
    trainer.submit(1, embedder)
    other = qa_world.make_store(tmp_path / "other", count=9)
    one = followers(replace(make_task(store, tmp_path, "follow"), store=other), tmp_path / "work")
    one.join()
    assert isinstance(one.error, ProvenanceError)
    assert "the trainer uses corpus" in str(one.error)
    wait_until(lambda: trainer.poll() or trainer.failures, "the failure")
    assert "the trainer uses corpus" in trainer.failures[0]
    # the corpus is the right one, but the embedder was made for another tokenizer
    torch.manual_seed(0)
    foreign = Embedder.from_config(qa_world.settings(other.path.parent).embedder, other.tokenizer())
    trainer.submit(2, foreign)
    one = followers(make_task(store, tmp_path, "follow"), tmp_path / "work")
    one.join()
    assert isinstance(one.error, ProvenanceError)
    assert "tokenised with tokenizer" in str(one.error)
    trainer.close()


def test_weights_that_are_not_those_of_the_order_are_not_used(tmp_path, store, embedder):
    trainer = make(store, tmp_path, "follow")
    trainer.submit(1, embedder)
    trainer.close()
    handover = Handover(tmp_path / "work")
    order = handover.wanted()
    assert handover.load(order).hash() == embedder.hash()
    shutil.rmtree(tmp_path / "work" / order.weights_name)
    change(embedder)
    embedder.save(tmp_path / "work" / order.weights_name)
    with pytest.raises(CorruptArtifactError, match=r"holds encoder .*, expected"):
        handover.load(order)
    (tmp_path / "work" / "wanted.json").write_text('{"format_version": 9}')
    with pytest.raises(CorruptArtifactError, match="not an order for a refresher"):
        handover.wanted()


def test_a_block_longer_than_the_encoder_takes_is_named(tmp_path, store, embedder, monkeypatch, followers):
    monkeypatch.setattr(Embedder, "max_tokens", 10)
    trainer = make(store, tmp_path, "follow")
    trainer.submit(1, embedder)
    one = followers(make_task(store, tmp_path, "follow"), tmp_path / "work")
    one.join()
    assert isinstance(one.error, DataError)
    assert "the embedder takes 10 at most" in str(one.error)
    trainer.close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, store):
    (tmp_path / "file").write_text("in the way")  # for root no folder is read-only
    task = make_task(store, tmp_path / "file", "follow")
    with pytest.raises(DataError, match=r"snapshots: not writable"):
        follow(Handover(tmp_path / "work"), task, should_stop=lambda: False)


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("2", {2}), ("0-3, 8", {0, 1, 2, 3, 8})])
def test_processors_are_named_as_usual(text, cpus):
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1-b", "1;2"])
def test_processors_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"refresh.cpu_affinity: expected numbers and ranges"):
        parse_cpus(text)


def test_the_budget_binds_the_process(store):
    allowed = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    refresh = qa_world.settings(store.path.parent).refresh
    try:
        use_budget(replace(refresh, cpu_affinity=str(min(allowed)), num_threads=1))
        assert os.sched_getaffinity(0) == {min(allowed)}
        assert torch.get_num_threads() == 1
        with pytest.raises(ConfigError, match=r"refresh.cpu_affinity: expected processors among"):
            use_budget(replace(refresh, cpu_affinity="9999"))
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def test_no_blocks_nothing_to_do(tmp_path, store, embedder, monkeypatch):
    monkeypatch.setattr(type(store), "__len__", lambda self: 0)
    with pytest.raises(DataError, match="holds no blocks"):
        make(store, tmp_path, "inline").make_now(0, embedder)
