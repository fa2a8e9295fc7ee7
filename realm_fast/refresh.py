"""Refreshing the block embeddings while training goes on.

The trainer hands over its weights every so many steps (`submit`) and, between two steps, picks up the
newest finished snapshot (`poll`). Neither waits. Who embeds the blocks is a matter of mode:

    inline    the trainer itself, inside submit: deterministic, and the only mode that stops the loop
    thread    a thread of the trainer's process
    process   a child process at lower priority; if it dies it is started again with back-off
    off       nobody: the first index is kept

All of them publish through realm_fast.snapshot. Weights that arrive while a refresh is running wait; only
the newest are kept, since an index of older ones would be stale before it was done.
"""

import contextlib
import copy
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from realm_fast.config import IndexConfig, RefreshConfig
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStopped
from realm_fast.snapshot import IndexSnapshot, open_snapshot, snapshot_name, write_snapshot
from realm_fast.token_store import TokenStore

RESTART_BACK_OFF_S = 0.5  # doubled after each restart in a row
REFRESHER_NICENESS = 5  # the trainer's threads come first


@dataclass(frozen=True)
class RefreshSchedule:
    """When weights are handed to the refresher. A pure function of the step."""

    every_steps: int

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.every_steps == 0


class Refresher(Protocol):
    """What the trainer sees, whoever does the work."""

    failures: list[str]  # what went wrong so far; training goes on with the last good snapshot

    def submit(self, step: int, embedder: Embedder) -> None:
        """Hands over the weights of `step`. Returns at once (except inline)."""

    def poll(self) -> IndexSnapshot | None:
        """The newest finished snapshot that poll has not returned before, or None."""

    def is_busy(self) -> bool:
        """Whether a snapshot is still to come from what was submitted."""

    def close(self) -> None:
        """Stops; what is half-done is thrown away."""


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
        should_stop: Callable[[], bool] | None = None,
        progress: bool = False,
    ) -> Path:
        return write_snapshot(
            self.folder, step, embedder, self.store, self.index,
            token_budget=self.refresh.token_budget, precision=self.refresh.precision,
            should_stop=should_stop, progress=progress,
        )  # fmt: skip


def make_refresher(task: RefreshTask, *, work_dir: Path) -> Refresher:
    """The refresher that `task.refresh.mode` names. `work_dir` holds weights on their way to a process."""
    match task.refresh.mode:
        case "inline":
            return InlineRefresher(task)
        case "thread":
            return ThreadRefresher(task)
        case "process":
            return ProcessRefresher(task, work_dir)
        case _:
            return NoRefresher()


class NoRefresher:
    """Mode off: the index stays as it was at the start."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def submit(self, step: int, embedder: Embedder) -> None:
        pass

    def poll(self) -> IndexSnapshot | None:
        return None

    def is_busy(self) -> bool:
        return False

    def close(self) -> None:
        pass


class InlineRefresher:
    """Embeds inside submit: the trainer waits, and the same seed gives the same run."""

    def __init__(self, task: RefreshTask) -> None:
        self.failures: list[str] = []
        self._task = task
        self._ready: IndexSnapshot | None = None

    def submit(self, step: int, embedder: Embedder) -> None:
        self._ready = open_snapshot(self._task.write(step, embedder))

    def poll(self) -> IndexSnapshot | None:
        ready, self._ready = self._ready, None
        return ready

    def is_busy(self) -> bool:
        return self._ready is not None

    def close(self) -> None:
        pass


class ThreadRefresher:
    """Embeds in a thread, from a copy of the weights."""

    def __init__(self, task: RefreshTask) -> None:
        self.failures: list[str] = []
        self._task = task
        self._ready: queue.SimpleQueue[IndexSnapshot] = queue.SimpleQueue()
        self._condition = threading.Condition()
        self._pending: tuple[int, Embedder] | None = None
        self._working = False
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="realm_fast refresher", daemon=True)
        self._thread.start()

    def submit(self, step: int, embedder: Embedder) -> None:
        weights = copy.deepcopy(embedder)
        with self._condition:
            self._pending = (step, weights)
            self._condition.notify()

    def poll(self) -> IndexSnapshot | None:
        newest = None
        while True:
            try:
                newest = self._ready.get_nowait()
            except queue.Empty:
                return newest

    def is_busy(self) -> bool:
        with self._condition:
            return self._pending is not None or self._working or not self._ready.empty()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._condition:
                self._working = False
                self._condition.wait_for(lambda: self._closed or self._pending is not None)
                if self._closed:
                    return
                assert self._pending is not None
                step, embedder = self._pending
                self._pending = None
                self._working = True
            try:
                path = self._task.write(step, embedder, should_stop=lambda: self._closed)
                self._ready.put(open_snapshot(path))
            except EmbeddingStopped:
                return
            except Exception as error:  # a failed refresh costs staleness, never the run
                self.failures.append(f"refresh of step {step}: {error}")


class ProcessRefresher:
    """Embeds in a child process of lower priority, which is started again when it dies.

    Weights go to the child as a folder under `work_dir`; commands and answers are JSON lines on its standard
    input and output; its messages end up in work_dir/refresher.log. The child leaves when its input closes,
    so it does not outlive a trainer that was killed.
    """

    def __init__(self, task: RefreshTask, work_dir: Path) -> None:
        self.failures: list[str] = []
        self._task = task
        self._work_dir = work_dir
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        self._log_path = work_dir / "refresher.log"
        self._events: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._pending_step: int | None = None  # submitted, and neither published nor failed yet
        self._restarts = 0
        self._restart_at = 0.0
        self._given_up = False
        self._child = self._start()

    def submit(self, step: int, embedder: Embedder) -> None:
        if self._given_up:
            return
        embedder.save(self._weights(step))
        superseded, self._pending_step = self._pending_step, step
        self._send({"step": step, "weights": str(self._weights(step))})
        if superseded is not None:
            # The child may be reading it still; it drops what has vanished, as newer weights are waiting.
            shutil.rmtree(self._weights(superseded), ignore_errors=True)

    def poll(self) -> IndexSnapshot | None:
        newest = None
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                break
            step = event["step"]
            if event["event"] == "published":
                newest = step
                self._restarts = 0
            elif step == self._pending_step:
                self.failures.append(f"refresh of step {step}: {event['error']}")
            if step == self._pending_step:
                self._pending_step = None
                shutil.rmtree(self._weights(step), ignore_errors=True)
        self._restart_if_dead()
        return None if newest is None else open_snapshot(self._task.folder / snapshot_name(newest))

    def is_busy(self) -> bool:
        return (self._pending_step is not None and not self._given_up) or not self._events.empty()

    def close(self) -> None:
        self._given_up = True
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join()
        if self._child.stdout is not None:
            self._child.stdout.close()

    @property
    def pid(self) -> int:
        return self._child.pid

    def _weights(self, step: int) -> Path:
        return self._work_dir / f"weights-{snapshot_name(step)}"

    def _start(self) -> subprocess.Popen:
        settings = {
            "folder": str(self._task.folder),
            "store": str(self._task.store.path),
            "index": asdict(self._task.index),
            "refresh": asdict(self._task.refresh),
        }
        with open(self._log_path, "ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", "from realm_fast.refresh import worker_main; worker_main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C at the terminal is the trainer's to handle
            )
        self._child = child
        self._send(settings)
        self._reader = threading.Thread(target=self._read, args=(child,), daemon=True)
        self._reader.start()
        return child

    def _read(self, child: subprocess.Popen) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if line.endswith("\n"):  # a child killed while writing leaves half a line
                self._events.put(json.loads(line))

    def _send(self, message: dict) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died; poll starts another one and sends what is pending

    def _restart_if_dead(self) -> None:
        code = self._child.poll()
        if code is None or self._given_up:
            return
        now = time.monotonic()
        if self._restart_at == 0.0:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self.failures.append(f"the refresher died ({how}); its last words: {self._last_words()}")
            if self._restarts >= self._task.refresh.max_restarts:
                self._given_up = True
                self.failures.append(
                    f"the refresher died {self._restarts + 1} times in a row; not started again"
                )
                return
            self._restart_at = now + RESTART_BACK_OFF_S * 2**self._restarts
        if now < self._restart_at:
            return
        self._restart_at = 0.0
        self._restarts += 1
        self._reader.join()
        self._child = self._start()
        if self._pending_step is not None:
            self._send({"step": self._pending_step, "weights": str(self._weights(self._pending_step))})

    def _last_words(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "none"


def worker_main() -> None:
    """The child of ProcessRefresher: settings first, then one line for each set of weights."""
    import torch

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    os.nice(REFRESHER_NICENESS)
    settings = json.loads(sys.stdin.readline())
    refresh = RefreshConfig(**settings["refresh"])
    torch.set_num_threads(refresh.num_threads)
    task = RefreshTask(
        folder=Path(settings["folder"]),
        store=TokenStore.open(settings["store"]),
        index=IndexConfig(**settings["index"]),
        refresh=refresh,
    )
    commands: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    closed = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        closed.set()
        commands.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        command = commands.get()
        while not commands.empty():  # only the newest weights count
            command = commands.get()
        if command is None or closed.is_set():
            return
        try:
            embedder = Embedder.load(command["weights"])
            task.write(command["step"], embedder, should_stop=closed.is_set)
            answer = {"event": "published", "step": command["step"]}
        except Exception as error:  # the trainer decides what a failed refresh means
            if closed.is_set():
                return
            answer = {"event": "failed", "step": command["step"], "error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
