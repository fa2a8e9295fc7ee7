"""Where a run searches: the choice and its reasons, the move to a device, and the order of the hand-over.

There is no GPU here: the device is "cpu" where the work is real, and a pretended one (its memory, capability
and driver) where only the choice is tested. The real device is for tests/gpu/test_loop_gpu.py.
"""

import dataclasses
import threading
import time
from collections import Counter

import pytest
import torch

from realm_fast import MipsIndex, _native
from realm_fast.device_index import WORKING_BYTES, DeviceIndex
from realm_fast.errors import ConfigError
from realm_fast.index import Provenance
from realm_fast.metrics import read_metrics
from realm_fast.ops import _cuda
from realm_fast.residence import AUTO_SHARE, Residence, ResidentRefresher
from realm_fast.streams import NoStream
from realm_fast.train import Pretrainer, pretrain
from tests import qa_world
from tests.qa_world import one_thread  # noqa: F401

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def index():
    emb = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    return MipsIndex.from_embeddings(emb, "float32", provenance=Provenance("encoder", "corpus", 3))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that answers questions about itself and does nothing. Change `free` and the others as wanted."""

    class Pretended:
        free, capability, driver, runtime = 80 << 30, (9, 0), 13000, 13000

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (Pretended.free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: Pretended.capability)
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": True})
    monkeypatch.setattr(_native, "cuda_driver_version", lambda: Pretended.driver, raising=False)
    monkeypatch.setattr(_native, "cuda_runtime_version", lambda: Pretended.runtime, raising=False)
    monkeypatch.setattr(_native, "MAX_CUDA_K", 2048, raising=False)
    monkeypatch.setattr("realm_fast.residence.side_stream", lambda device: None)
    return Pretended


def residence(setting, device, *, copies=2, most_blocks=100):
    return Residence(setting, device, copies=copies, most_blocks=most_blocks)


class OnTheDevice(Residence):
    """A residence that has chosen the device, and whose device is the CPU: the moves are real."""

    def __init__(self):
        super().__init__("auto", CPU, copies=2, most_blocks=100)
        self._on_device = True


@pytest.mark.parametrize("setting", ["auto", "host"])
def test_a_run_on_the_cpu_searches_the_host(index, setting):
    assert residence(setting, CPU).place(index) is index


def test_a_run_on_the_cpu_has_no_device_memory(index):
    with pytest.raises(
        ConfigError, match=r"index.residence: got device.*\n  - the run is on cpu, which has no"
    ):
        residence("device", CPU).place(index)


@pytest.mark.parametrize("setting", ["auto", "device"])
def test_a_gpu_with_room_is_chosen(index, gpu, setting):
    assert residence(setting, GPU)._choose(index)
    assert not residence("host", GPU)._choose(index)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (7, 5)}, r"the kernels need compute capability 8.0, cuda:0 has 7.5"),
        ({"driver": 12040}, r"the driver runs CUDA 12.4 at most, this build needs 13.0"),
        ({"driver": 0}, r"no NVIDIA driver is loaded"),
        ({"free": 1 << 20}, r"it needs 0.5 GB \(300 x 24 float32, 2 copies .*0.0 GB of cuda:0 are free"),
    ],
)
def test_what_cannot_be_had_is_said(index, gpu, change, reason, caplog):
    for name, value in change.items():
        setattr(gpu, name, value)
    with pytest.raises(ConfigError, match=reason):
        residence("device", GPU).place(index)
    caplog.set_level("INFO")
    assert residence("auto", GPU).place(index) is index
    assert "the index is searched on the host: " in caplog.text


def test_every_reason_is_listed(gpu):
    gpu.capability, gpu.driver, gpu.free = (7, 0), 11080, 0
    with pytest.raises(ConfigError) as raised:
        residence("device", GPU).place(MipsIndex.from_embeddings(torch.randn(5, 4)))
    assert str(raised.value).count("\n  - ") == 3


def test_a_build_without_cuda_and_too_large_beams(index, gpu, monkeypatch):
    with pytest.raises(ConfigError, match=r"searches for 5000 blocks are asked for.*2048 at most"):
        residence("device", GPU, most_blocks=5000).place(index)
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": False})
    with pytest.raises(ConfigError, match="this build has no CUDA kernels"):
        residence("device", GPU).place(index)


def test_an_index_of_another_kind_stays_on_the_host(gpu):
    with pytest.raises(ConfigError, match=r"only indexes of index.backend=mips"):
        residence("device", GPU).place(object())


def test_auto_takes_half_of_what_is_free_and_device_all_of_it(index, gpu):
    needed = 2 * DeviceIndex.bytes_needed("float32", 24, 300) + WORKING_BYTES
    gpu.free = needed
    assert residence("device", GPU)._choose(index)
    assert not residence("auto", GPU)._choose(index)
    gpu.free = int(needed / AUTO_SHARE)
    assert residence("auto", GPU)._choose(index)
    gpu.free -= 8
    assert not residence("auto", GPU)._choose(index)
    gpu.free = needed - 1
    assert not residence("auto", GPU)._choose(index)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", [1, 37, 128])
def test_the_memory_asked_for_is_the_memory_held(dtype, dim):
    emb = torch.randn(40, dim)
    with_ids = DeviceIndex.from_embeddings(emb, dtype, torch.arange(40) * 2)
    assert DeviceIndex.bytes_needed(dtype, dim, 40) + 8 == with_ids.nbytes  # 8: the bounds of the whole index


def test_the_choice_holds_for_the_run(index, gpu):
    chosen = residence("auto", GPU)
    gpu.free = 0
    assert chosen.place(index) is index
    gpu.free = 80 << 30  # later on there would be room
    assert chosen.place(index) is index
    inner = Refreshed()
    inner.ready.append(Snapshot(1, index))
    assert chosen.beside(inner).poll().index is index


def test_a_placed_index_answers_as_before(index):
    placed = OnTheDevice().place(index)
    assert isinstance(placed, DeviceIndex)
    assert placed.held is index  # so that the snapshot's files are not pruned
    assert OnTheDevice().place(placed) is placed
    assert placed.provenance == index.provenance
    assert placed.ids is None  # ids that count up need no memory
    queries = torch.randn(7, 24)
    exclude = torch.randint(-1, 300, (7, 2))
    got, want = (i.search(queries, 9, exclude_ids=exclude) for i in (placed, index))
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.scores, want.scores)
    assert torch.equal(placed.reconstruct(want.ids[0]), index.reconstruct(want.ids[0]))


# ---- beside a refresh ----


@dataclasses.dataclass(frozen=True)
class Snapshot:
    step: int
    index: object


class Refreshed:
    """A refresher whose snapshots are put there by the test."""

    def __init__(self):
        self.failures, self.ready, self.closed = [], [], False

    def submit(self, step, embedder, *, shard_order=None):
        self.submitted = (step, shard_order)

    def make_now(self, step, embedder, *, should_stop=None, progress=False):
        return Snapshot(step, embedder)

    def poll(self):
        return self.ready.pop() if self.ready else None

    def is_busy(self):
        return bool(self.ready)

    def close(self, *, is_done=False):
        self.closed = ("done",) if is_done else ("open",)


def poll_until(refresher, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (snapshot := refresher.poll()) is not None:
            return snapshot
        time.sleep(0.001)
    raise AssertionError(f"nothing came; failures: {refresher.failures}")


class Slow(OnTheDevice):
    """Moves when told to, and remembers how many copies there were at once."""

    def __init__(self):
        super().__init__()
        self.go, self.moves = threading.Event(), 0

    def move(self, index):
        self.moves += 1
        assert self.go.wait(20)
        return super().move(index)


def test_poll_never_waits_for_a_move(index):
    inner, slow = Refreshed(), Slow()
    refresher = ResidentRefresher(inner, slow, waits=False)
    refresher.submit(4, None, shard_order=[2, 0, 1])
    assert inner.submitted == (4, [2, 0, 1])
    assert refresher.make_now(4, index).index is index
    inner.ready.append(Snapshot(4, index))
    assert refresher.is_busy()
    assert refresher.poll() is None  # begins the move
    assert refresher.poll() is None
    assert refresher.is_busy()
    slow.go.set()
    snapshot = poll_until(refresher)
    assert snapshot.step == 4
    assert isinstance(snapshot.index, DeviceIndex)
    assert not refresher.is_busy()
    assert refresher.poll() is None
    refresher.close(is_done=True)
    assert inner.closed == ("done",)


def test_only_the_newest_snapshot_is_moved_and_never_while_two_copies_are_held(index):
    inner, slow = Refreshed(), Slow()
    refresher = ResidentRefresher(inner, slow, waits=False)
    inner.ready.append(Snapshot(1, index))
    refresher.poll()
    for step in (2, 3):
        inner.ready.append(Snapshot(step, index))
        refresher.poll()
    assert slow.moves == 1  # 3 waits, 2 is dropped
    slow.go.set()
    assert poll_until(refresher).step == 1
    assert slow.moves == 1  # the trainer still holds the index that 1 replaces
    assert poll_until(refresher).step == 3
    assert slow.moves == 2
    refresher.close()


def test_inline_gives_the_snapshot_in_the_same_poll(index):
    inner = Refreshed()
    refresher = OnTheDevice().beside(inner, waits=True)
    inner.ready.append(Snapshot(8, index))
    assert isinstance(refresher.poll().index, DeviceIndex)
    refresher.close()


def test_who_searches_a_placed_index_is_told_to_the_allocator(index):
    """By place(), by a poll that brings one, and again where the trainer has changed its stream."""
    kept = []

    class Side(NoStream):
        def hand_over(self, tensors):
            kept.append(list(tensors))

    chosen = OnTheDevice()
    chosen._side = Side()
    first = chosen.place(index)
    chosen.place(first)
    inner = Refreshed()
    inner.ready.append(Snapshot(2, index))
    second = chosen.beside(inner, waits=True).poll().index
    for tensors, expected in zip(kept, (first, first, second), strict=True):
        assert {t.data_ptr() for t in tensors} == {t.data_ptr() for t in expected.tensors()}


def test_a_failed_move_costs_staleness_and_the_next_one_works(index):
    class Full(OnTheDevice):
        full = True

        def move(self, index):
            if self.full:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.4 GiB")
            return super().move(index)

    inner, full = Refreshed(), Full()
    refresher = ResidentRefresher(inner, full, waits=False)
    inner.ready.append(Snapshot(5, index))
    while not refresher.failures:
        assert refresher.poll() is None
    assert refresher.failures == [
        "moving the index of step 5 to the device: CUDA out of memory. Tried to allocate 6.4 GiB"
    ]
    assert not refresher.is_busy()
    full.full = False
    inner.ready.append(Snapshot(6, index))
    assert poll_until(refresher).step == 6
    refresher.close()


def test_closing_while_a_move_is_under_way(index):
    inner, slow = Refreshed(), Slow()
    refresher = ResidentRefresher(inner, slow, waits=False)
    inner.ready.append(Snapshot(1, index))
    refresher.poll()
    slow.go.set()
    refresher.close()
    refresher.close()  # the trainer closes twice after its last step
    assert not refresher.is_busy()


def test_reasons_that_need_no_device():
    assert _cuda.device_reasons(CPU) == ["the tensors are on cpu"]


# ---- a whole run ----

RUN = (
    "masking.strategy=random_token", "masking.random_token_rate=0.3", "masking.max_masks=4", "pretrain.steps=6",
    "pretrain.batch_queries=4", "pretrain.num_candidates=3", "pretrain.checkpoint_every_steps=6",
    "pretrain.log_every_steps=1", "pretrain.illustrations=1", "refresh.every_steps=2",
    "evaluate.held_out_queries=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"), count=40)


def pretrained(folder, store, *settings):
    run, config = qa_world.make_run(folder, "run", store, *RUN, *settings)
    pretrain(run, config)
    return [
        {name: line[name] for name in ("loss", "snapshot_step", "refresh_failures", "trainer_wait_s")}
        for line in read_metrics(run.pretrain_dir / "metrics.jsonl")
    ]


def test_a_run_over_a_placed_index_takes_the_steps_of_a_run_over_the_hosts(tmp_path, store, monkeypatch):
    """Training, its refreshes, its measurements before and after: all search what place() gave."""
    want = pretrained(tmp_path / "host", store, "refresh.mode=inline")
    monkeypatch.setattr("realm_fast.train.Residence", lambda *a, **k: OnTheDevice())
    monkeypatch.setattr(MipsIndex, "search", lambda *a, **k: pytest.fail("the host's index was searched"))
    assert pretrained(tmp_path / "placed", store, "refresh.mode=inline") == want
    assert [line["snapshot_step"] for line in want] == [0, 2, 2, 4, 4, 4]


def test_a_run_beside_a_thread_takes_snapshots_as_they_arrive(tmp_path, store, monkeypatch):
    monkeypatch.setattr("realm_fast.train.Residence", lambda *a, **k: OnTheDevice())
    lines = pretrained(tmp_path, store, "refresh.mode=thread", "pretrain.steps=40")
    assert all(line["trainer_wait_s"] == 0 and line["refresh_failures"] == 0 for line in lines)
    assert lines[-1]["snapshot_step"] > 0


def test_the_queries_drawn_ahead_are_those_of_the_next_step_and_counted_with_it(tmp_path, store):
    run, config = qa_world.make_run(tmp_path, "run", store, *RUN, "refresh.mode=off")
    trainer = Pretrainer(run, config, resume=False, progress=False)
    trainer._forward_backward(1, with_accuracy=False)
    counted = dict(trainer.masker.skipped)
    number, batches, skipped = trainer.ahead
    fresh, fresh_skipped = trainer._draw_batches(2)
    assert number == 2
    assert skipped == fresh_skipped
    for drawn, again in zip(batches[0], fresh[0], strict=True):
        assert drawn.origin_block_id == again.origin_block_id
        assert drawn.tokens.tolist() == again.tokens.tolist()
    assert dict(trainer.masker.skipped) == counted  # a checkpoint of step 1 does not count step 2
    trainer.ahead = (2, batches, Counter(planted=5))
    assert trainer._take_batches(2) is batches
    assert trainer.masker.skipped["planted"] == 5
    assert trainer._take_batches(6)[0][0].tokens.tolist() != batches[0][0].tokens.tolist()
    trainer.close()
