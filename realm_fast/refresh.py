"""Refreshing the block embeddings while training goes on: the trainer's side.

The trainer hands over its weights every so many steps (`submit`) and, between two steps, picks up the
newest snapshot (`poll`). Neither waits. Who embeds the blocks is a matter of mode:

    inline    the trainer itself, inside submit: deterministic, and the only mode that stops the loop
    thread    a thread of the trainer's process
    process   a child process at lower priority, fed through shared memory; if it dies it is started again
    follow    `realm-fast refresher RUN`, started by whoever runs the job, on any machine that sees RUN
    off       nobody: the first index is kept

All of them publish through the folder of snapshots, and that is what the trainer watches. Weights that
arrive while a refresh is running wait; only the newest are kept, since an index of older ones would be stale
before it was done. docs/refresh.md has the whole protocol.
"""

import abc
import contextlib
import copy
import hashlib
import json
import logging
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from realm_fast.config import IndexConfig, RefreshConfig
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStopped
from realm_fast.errors import CorruptArtifactError, DataError, RealmFastError, RefreshError
from realm_fast.handover import FORMAT_VERSION, Handover, Order
from realm_fast.ownership import Sighting, TakenError, own
from realm_fast.snapshot import IndexSnapshot, Published, open_snapshot
from realm_fast.snapshot_watch import SnapshotWatch
from realm_fast.snapshot_writer import write_snapshot
from realm_fast.streams import SideStream, side_stream
from realm_fast.token_store import TokenStore

RESTART_BACK_OFF_S = 0.5  # doubled after each restart in a row
OWNER_PATIENCE_S = 30.0  # for the refresher of a killed trainer to notice, and for a trainer's own index
WAIT_POLL_S = 0.02
TRAINER, REFRESHER = "trainer", "refresher"  # what the owners of a snapshots folder call themselves
SHARED_MEMORY = Path("/dev/shm")
ShouldStop = Callable[[], bool]  # asked now and then
log = logging.getLogger(__name__)


class Refresher(Protocol):
    """What the trainer sees, whoever does the work."""

    failures: list[str]  # what went wrong so far; training goes on with the last good snapshot

    def submit(self, step: int, embedder: Embedder, *, shard_order: Sequence[int] | None = None) -> None:
        """Hands over the weights of `step`. Returns at once (except inline).

        `shard_order`: which shards matter most; see snapshot_writer.write_snapshot.
        """

    def poll(self) -> IndexSnapshot | None:
        """The newest snapshot of what was submitted that poll has not returned before, or None."""

    def is_busy(self) -> bool:
        """Whether a snapshot is still to come from what was submitted."""

    def make_now(
        self, step: int, embedder: Embedder, *, should_stop: ShouldStop | None = None, progress: bool = False
    ) -> IndexSnapshot:
        """The snapshot of exactly these weights; waits for it. Before the first submit or after close.

        Raises EmbeddingStopped once `should_stop` returns True; finished shards are kept.
        """

    def close(self, *, is_done: bool = False) -> None:
        """Stops; finished shards are kept. `is_done`: the run is complete, nothing more will be wanted."""


@dataclass(frozen=True)
class RefreshTask:
    """What every refresher needs to know besides the weights."""

    folder: Path  # of the snapshots
    store: TokenStore
    index: IndexConfig
    refresh: RefreshConfig

    def write(
        self,
        step: int,
        embedder: Embedder,
        *,
        shard_order: Sequence[int] | None = None,
        should_stop: ShouldStop | None = None,
        progress: bool = False,
    ) -> Path:
        """Publishes the snapshot of these weights. The caller must own the folder (realm_fast.ownership)."""
        return write_snapshot(
            self.folder, step, embedder, self.store, self.index,
            token_budget=self.refresh.token_budget, precision=self.refresh.precision,
            shard_blocks=self.refresh.shard_blocks, shard_order=shard_order,
            publish_every_shards=self.refresh.publish_every_shards,
            should_stop=should_stop, progress=progress,
        )  # fmt: skip

    def make(
        self, step: int, embedder: Embedder, *, should_stop: ShouldStop | None = None, progress: bool = False
    ) -> IndexSnapshot:
        """Publishes that snapshot and opens it, its hashes checked; once more if it was harmed in between."""
        path = self.write(step, embedder, should_stop=should_stop, progress=progress)
        try:
            return open_snapshot(path, verify=True)
        except (DataError, CorruptArtifactError) as error:
            log.warning("the index of step %d is made again: %s", step, error)
            self.write(step, embedder, should_stop=should_stop, progress=progress)
            return open_snapshot(path, verify=True)


def make_refresher(task: RefreshTask, *, work_dir: Path) -> Refresher:
    """The refresher that `task.refresh.mode` names. `work_dir` is for what it exchanges with a process."""
    match task.refresh.mode:
        case "inline":
            return InlineRefresher(task)
        case "thread":
            return ThreadRefresher(task)
        case "process":
            return ProcessRefresher(task, work_dir)
        case "follow":
            return FollowedRefresher(task, work_dir)
        case _:
            return NoRefresher(task)


class NoRefresher:
    """Mode off: the index stays as it was at the start."""

    def __init__(self, task: RefreshTask) -> None:
        self.failures: list[str] = []
        self._task = task

    def submit(self, step: int, embedder: Embedder, *, shard_order: Sequence[int] | None = None) -> None:
        pass

    def poll(self) -> IndexSnapshot | None:
        return None

    def is_busy(self) -> bool:
        return False

    def make_now(
        self, step: int, embedder: Embedder, *, should_stop: ShouldStop | None = None, progress: bool = False
    ) -> IndexSnapshot:
        with own(self._task.folder, TRAINER, wait_s=OWNER_PATIENCE_S):
            return self._task.make(step, embedder, should_stop=should_stop, progress=progress)

    def close(self, *, is_done: bool = False) -> None:
        pass


class InlineRefresher(NoRefresher):
    """Embeds inside submit: the trainer waits, and the same seed gives the same run."""

    def __init__(self, task: RefreshTask) -> None:
        super().__init__(task)
        self._ready: IndexSnapshot | None = None

    def submit(self, step: int, embedder: Embedder, *, shard_order: Sequence[int] | None = None) -> None:
        self._ready = self.make_now(step, embedder)

    def poll(self) -> IndexSnapshot | None:
        ready, self._ready = self._ready, None
        return ready

    def is_busy(self) -> bool:
        return self._ready is not None


class LiveRefresher(NoRefresher, abc.ABC):
    """What the modes share in which the trainer goes on: a watch over the folder, and what it waits for."""

    def __init__(self, task: RefreshTask) -> None:
        super().__init__(task)
        self._submitted: dict[int, str] = {}  # step -> hash of the weights; nothing else is ever served
        self._pending_step: int | None = None  # submitted, and neither taken whole nor failed yet
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()  # failures, from whatever thread
        self._watch = SnapshotWatch(
            task.folder, task.store.corpus_hash, self._submitted, on_bad=self._bad, also=self._listen
        )
        self._watch.start()

    def submit(self, step: int, embedder: Embedder, *, shard_order: Sequence[int] | None = None) -> None:
        self._submitted[step] = embedder.hash()
        self._pending_step = step
        self._watch.expect_again(step)
        try:
            self._hand_over(step, self._submitted[step], embedder, shard_order)
        except (OSError, RealmFastError) as error:  # a full disk costs staleness, not the run
            self._failed(step, error)

    def poll(self) -> IndexSnapshot | None:
        snapshot = self._watch.take()
        if snapshot is not None and snapshot.is_whole and snapshot.step == self._pending_step:
            self._pending_step = None
            self._delivered()
        self._take_messages()
        self._look_after()
        return snapshot

    def is_busy(self) -> bool:
        return self._pending_step is not None or self._watch.has_ready()

    def close(self, *, is_done: bool = False) -> None:
        self._watch.close()

    def _take_messages(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.failures.append(self._messages.get_nowait())

    def _bad(self, published: Published, error: Exception) -> None:
        message = f"snapshot {published.path.name} is not used: {error}"
        if published.is_whole:
            self._failed(published.step, message)
        else:
            self._messages.put(message)

    def _failed(self, step: int, error: object) -> None:
        self._messages.put(f"refresh of step {step}: {error}")
        if step == self._pending_step:
            self._pending_step = None

    @abc.abstractmethod
    def _hand_over(
        self, step: int, encoder_hash: str, embedder: Embedder, shard_order: Sequence[int] | None
    ) -> None:
        """Gives the weights to whoever embeds."""

    def _listen(self) -> None:
        """Called by the watch's thread again and again."""

    def _look_after(self) -> None:
        """Called by the trainer between two steps."""

    def _delivered(self) -> None:
        """Called when what was submitted last has arrived."""


class ThreadRefresher(LiveRefresher):
    """Embeds in a thread, from a copy of the weights; on a GPU, on a stream that yields to the trainer's."""

    def __init__(self, task: RefreshTask) -> None:
        self._condition = threading.Condition()
        self._next: tuple[int, Embedder, Sequence[int] | None, SideStream, Any] | None = None
        self._closed = False
        super().__init__(task)
        self._thread = threading.Thread(target=self._loop, name="realm_fast refresher", daemon=True)
        self._thread.start()

    def close(self, *, is_done: bool = False) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
        super().close()

    def _hand_over(
        self, step: int, encoder_hash: str, embedder: Embedder, shard_order: Sequence[int] | None
    ) -> None:
        weights, side = copy.deepcopy(embedder), side_stream(embedder.device)
        with self._condition:
            mark = side.mark()  # the copy was queued before it
            self._next = (step, weights, shard_order, side, mark)
            self._condition.notify()

    def _loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._next is not None)
                if self._closed:
                    return
                assert self._next is not None
                (step, embedder, shard_order, side, mark), self._next = self._next, None
            try:
                with own(self._task.folder, TRAINER, wait_s=OWNER_PATIENCE_S), side.after(mark):
                    self._task.write(
                        step, embedder, shard_order=shard_order, should_stop=lambda: self._closed
                    )
            except EmbeddingStopped:
                return
            except Exception as error:  # a failed refresh costs staleness, never the run
                self._failed(step, error)
            finally:
                side.finish()  # nothing reads the weights any more when they are let go


class FollowedRefresher(LiveRefresher):
    """Leaves weights in a folder of the run for a process that somebody else started."""

    def __init__(self, task: RefreshTask, folder: Path) -> None:
        self._handover = Handover(folder)
        self._order: Order | None = None  # the newest that was published
        self._heard: tuple[str, int] | None = None
        self._said = ""
        self._sighting = Sighting(task.folder)
        super().__init__(task)

    def is_busy(self) -> bool:
        return super().is_busy() and (self._watch.has_ready() or self._sighting.is_owned())

    def make_now(
        self, step: int, embedder: Embedder, *, should_stop: ShouldStop | None = None, progress: bool = False
    ) -> IndexSnapshot:
        """Waits for the refresher if there is one, and does the work itself if there is none (any more)."""
        self.submit(step, embedder)
        said = False
        while True:
            snapshot = self.poll()
            if snapshot is not None and snapshot.step == step and snapshot.is_whole:
                return snapshot
            if self._pending_step is None:
                self._take_messages()  # what was said about it
                raise RefreshError("; ".join(self.failures))
            if self._order is not None and not self._handover.holds(self._order):
                self.submit(step, embedder)
            try:
                with own(self._task.folder, TRAINER):
                    return self._task.make(step, embedder, should_stop=should_stop, progress=progress)
            except TakenError as error:
                if not said:
                    log.info("waiting for the index of step %d: %s", step, error)
                said = True
            if should_stop is not None and should_stop():
                raise EmbeddingStopped(f"stopped waiting for the index of step {step}.")
            time.sleep(WAIT_POLL_S)

    def close(self, *, is_done: bool = False) -> None:
        super().close()
        if is_done:
            self._handover.end()

    def _hand_over(
        self, step: int, encoder_hash: str, embedder: Embedder, shard_order: Sequence[int] | None
    ) -> None:
        order = Order(
            FORMAT_VERSION, step, encoder_hash, self._task.store.corpus_hash, self._task.index,
            self._task.refresh.shard_blocks, self._task.refresh.publish_every_shards,
            None if shard_order is None else tuple(shard_order), secrets.token_hex(8),
        )  # fmt: skip
        self._handover.publish(order, embedder)
        self._order = order

    def _listen(self) -> None:
        status = self._handover.status()
        if status is None or (status.speaker, status.number) == self._heard:
            return
        self._heard = (status.speaker, status.number)
        if status.state == "failed" and self._submitted.get(status.step) == status.encoder_hash:
            self._failed(status.step, status.error)
        elif status.state == "retrying" and status.error != self._said:  # once, not at every attempt
            self._messages.put(f"refresh of step {status.step}, being tried again: {status.error}")
        self._said = status.error


class ProcessRefresher(FollowedRefresher):
    """Embeds in a child process of lower priority, which is started again when it dies.

    It begins with the first weights. They go to the child as a folder in shared memory (on disk, and said so,
    where that has no room); its messages end up in work_dir/refresher.log. The child leaves when its standard
    input closes, so it does not outlive a trainer that was killed.
    """

    def __init__(self, task: RefreshTask, work_dir: Path) -> None:
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        self._work_dir = work_dir
        self._log_path = work_dir / "refresher.log"
        self._restarts = 0
        self._restart_at_s: float | None = None
        self._given_up = False
        self._child: subprocess.Popen | None = None
        super().__init__(task, work_dir)

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def submit(self, step: int, embedder: Embedder, *, shard_order: Sequence[int] | None = None) -> None:
        if self._given_up:
            return
        if self._child is None:
            size = sum(value.nbytes for value in embedder.state_dict().values())
            self._handover = Handover(_shared_folder(self._work_dir, 3 * size))
            self._handover.clear()
            self._child = self._start()
        super().submit(step, embedder, shard_order=shard_order)

    def is_busy(self) -> bool:
        return self._watch.has_ready() or (self._pending_step is not None and not self._given_up)

    def make_now(
        self, step: int, embedder: Embedder, *, should_stop: ShouldStop | None = None, progress: bool = False
    ) -> IndexSnapshot:
        return NoRefresher.make_now(self, step, embedder, should_stop=should_stop, progress=progress)

    def close(self, *, is_done: bool = False) -> None:
        self._given_up = True
        LiveRefresher.close(self)
        if self._child is None:
            return
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._handover.remove()

    def _start(self) -> subprocess.Popen:
        settings = {
            "handover": str(self._handover.folder),
            "folder": str(self._task.folder),
            "store": str(self._task.store.path),
            "index": asdict(self._task.index),
            "refresh": asdict(self._task.refresh),
        }
        with open(self._log_path, "ab") as log_file:
            child = subprocess.Popen(
                [sys.executable, "-c", "from realm_fast.refresher import child_main; child_main()"],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                text=True,
                start_new_session=True,  # a Ctrl-C at the terminal is the trainer's to handle
            )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; it is started again
            child.stdin.write(json.dumps(settings) + "\n")
            child.stdin.flush()
        return child

    def _listen(self) -> None:
        if self._child is not None:
            super()._listen()

    def _look_after(self) -> None:
        """Starts a child that died again, with back-off; what is wanted still lies in the folder."""
        code = None if self._child is None else self._child.poll()
        if code is None or self._given_up:
            return
        now = time.monotonic()
        if self._restart_at_s is None:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self.failures.append(f"the refresher died ({how}); its last words: {self._last_words()}")
            if self._restarts >= self._task.refresh.max_restarts:
                self._given_up = True
                self.failures.append(
                    f"the refresher died {self._restarts + 1} times in a row; not started again"
                )
                return
            self._restart_at_s = now + RESTART_BACK_OFF_S * 2**self._restarts
        if now >= self._restart_at_s:
            self._restart_at_s = None
            self._restarts += 1
            self._child = self._start()

    def _delivered(self) -> None:
        self._restarts = 0

    def _last_words(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "none"


def _shared_folder(work_dir: Path, need_bytes: int) -> Path:
    """A folder in shared memory for weights, of this process and this run alone; `work_dir`'s if there is no
    room. Folders that killed trainers of the same run left are deleted."""
    name = f"realm_fast-{os.getuid()}-{hashlib.sha256(str(work_dir.resolve()).encode()).hexdigest()[:16]}"
    for old in SHARED_MEMORY.glob(f"{name}-*"):
        pid = old.name.rpartition("-")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = SHARED_MEMORY / f"{name}-{os.getpid()}"
    if os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > need_bytes:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        return folder
    log.info("%s has no room for the weights: they go through %s", SHARED_MEMORY, work_dir)
    return work_dir / "handover"
