"""The trainer's view of a snapshots folder: a thread that finds, opens and checks what is published.

    watch = SnapshotWatch(folder, store.corpus_hash, expected={500: embedder.hash()}, on_bad=report)
    watch.start()
    ...
    newest = watch.take()          # between two steps: a pointer changes hands, nobody reads a disk

A snapshot is handed over only when every byte of it has its hash (files that were checked before, or are
links to such, are not read again). What that reads is in the page cache when the first search comes.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from realm_fast import index_file
from realm_fast.errors import RealmFastError
from realm_fast.snapshot import (
    IndexSnapshot,
    Published,
    open_snapshot,
    published_snapshots,
    read_manifest,
)

LOOK_EVERY_S = 0.1
AWAY_S = 5.0  # between looks while the file system does not answer
NICENESS = 5  # the trainer's threads come first
log = logging.getLogger(__name__)


class SnapshotWatch:
    """Looks at `folder` again and again; `take` gives what is new."""

    def __init__(
        self,
        folder: Path,
        corpus_hash: str,
        expected: Mapping[int, str],
        *,
        on_bad: Callable[[Published, Exception], None],
        also: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            corpus_hash, expected: the corpus, and by step the encoder, of snapshots that may be taken; others
                are left alone. `expected` may grow meanwhile.
            on_bad: told once of each snapshot that is expected but damaged.
            also: called at every look, in the same thread.
        """
        self._folder, self._corpus_hash, self._expected = folder, corpus_hash, expected
        self._on_bad, self._also = on_bad, also
        self._lock = threading.Lock()
        self._ready: IndexSnapshot | None = None
        self._newest: Published | None = None  # the last that was opened
        self._passed_over: set[tuple[str, int, int]] = set()  # damaged, or of other weights
        self._sound: set[tuple[int, ...]] = set()  # files whose every byte was checked
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="snapshot watch", daemon=True)
        self._thread.start()

    def take(self) -> IndexSnapshot | None:
        """The newest snapshot that was not taken before, or None. Never waits for a disk."""
        with self._lock:
            ready, self._ready = self._ready, None
        return ready

    def expect_again(self, step: int) -> None:
        """The snapshot of `step` is handed over once more although it was taken before."""
        with self._lock:
            if self._newest is not None and self._newest.step >= step:
                self._newest = Published(step, False, -1, self._folder)  # before all of that step

    def has_ready(self) -> bool:
        return self._ready is not None

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """One look: opens the newest expected snapshot that is newer than the last one."""
        newest = self._newest
        for one in reversed(published_snapshots(self._folder)):
            if newest is not None and one[:3] <= newest[:3]:
                return
            encoder_hash = self._expected.get(one.step)
            if encoder_hash is None:
                continue
            try:
                found = os.stat(one.path)
                key = (one.path.name, found.st_ino, found.st_ctime_ns)  # an inode's number is used again
            except FileNotFoundError:  # pruned
                continue
            if key in self._passed_over:
                continue
            try:
                snapshot = self._open(one.path, encoder_hash)
            except (RealmFastError, OSError) as error:
                if one.path.is_dir():
                    self._passed_over.add(key)
                    self._on_bad(one, error)
                continue
            if snapshot is None:
                self._passed_over.add(key)
                continue
            with self._lock:
                if self._newest is newest:  # else an older one is expected again
                    self._newest, self._ready = one, snapshot
            return

    def _open(self, path: Path, encoder_hash: str) -> IndexSnapshot | None:
        """The snapshot, every byte of it checked; None if it is of other weights or another corpus."""
        manifest = read_manifest(path)
        if (manifest.newest_encoder_hash, manifest.corpus_hash) != (encoder_hash, self._corpus_hash):
            return None
        snapshot = open_snapshot(path)
        self._check(snapshot)
        return snapshot

    def _check(self, snapshot: IndexSnapshot) -> None:
        if snapshot.manifest.backend == "faiss":
            return  # loading it read it all
        for shard in snapshot.manifest.shards:
            file = snapshot.path / shard.file
            found = os.stat(file)
            key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if key not in self._sound:
                index_file.read(file, "MipsIndex", verify=True)
                self._sound.add(key)

    def _loop(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                self._also()
                self.look()
            except Exception as error:  # the file system is away, say; without a watch there is no refresh
                log.warning("%s: cannot be looked at now: %s", self._folder, error)
                self._closed.wait(AWAY_S)
