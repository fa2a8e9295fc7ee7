"""One process at a time at a folder, on one machine or on several that share its file system.

    with own(run.snapshots_dir, "refresher") as owner:
        ...                        # a second process that tries is told who is at work
        owner.check()              # raises if another one took over while this one was suspended

Two signs say that a folder is taken:

- an flock on `.owner.lock`. It dies with its holder, however that ends, and so is the last word among the
  processes of one machine;
- `.owner.json` beside it, in which the holder counts up every few seconds. It is for machines that do not see
  each other's flocks. One that finds a record from elsewhere watches for a beat, and takes the folder over
  only if none comes. It counts its own seconds: clocks of two machines are never compared, and a clock that
  is set back changes nothing.
"""

import contextlib
import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm_fast.errors import RefreshError, UserError
from realm_fast.files import STAGING_PREFIX, disk_errors

BEAT_S = 3.0
SILENCE_S = 3 * BEAT_S  # without a beat for so long, an owner elsewhere counts as dead
_LOCK_FILE, _RECORD_FILE = ".owner.lock", ".owner.json"
_RETRY_S = 0.05
_AT_LEAST_S = 0.25  # a look by `Sighting` holds the lock for a moment


class TakenError(UserError):
    """Another process owns the folder; `what` is what it calls itself."""

    def __init__(self, folder: Path, record: dict[str, Any] | None) -> None:
        self.what = "" if record is None else record["what"]
        super().__init__(f"{folder}: {_describe(record)} is at work on it. Wait for it, or stop it first.")


class Ownership:
    """What `own` yields."""

    def __init__(self, folder: Path, what: str) -> None:
        self._folder, self._what = folder, what
        self._token = secrets.token_hex(8)
        self._beat = 0
        self._released = threading.Event()
        self._lost_to: dict[str, Any] | None = None
        self._write()
        threading.Thread(target=self._keep_beating, name="owner's beat", daemon=True).start()

    def check(self) -> None:
        """Raises RefreshError if another process took the folder over."""
        if self._lost_to is not None:
            raise RefreshError(
                f"{self._folder}: {_describe(self._lost_to)} took over while this process was suspended."
            )

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_S):
            record = _read_record(self._folder)
            if record is not None and record["token"] != self._token:
                self._lost_to = record
                return
            self._beat += 1
            with contextlib.suppress(OSError):  # a full disk must not end the work
                self._write()

    def _write(self) -> None:
        record = {
            "what": self._what, "host": platform.node(), "pid": os.getpid(), "machine": _machine(),
            "token": self._token, "beat": self._beat,
        }  # fmt: skip
        staging = self._folder / f"{STAGING_PREFIX}owner.{self._token}"
        staging.write_text(json.dumps(record), encoding="utf-8")
        os.replace(staging, self._folder / _RECORD_FILE)

    def _release(self) -> None:
        self._released.set()
        record = _read_record(self._folder)
        if record is not None and record["token"] == self._token:
            (self._folder / _RECORD_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def own(folder: Path, what: str, *, wait_s: float = 0.0) -> Iterator[Ownership]:
    """Makes this process the only one at work on `folder`, which is made if need be.

    Args:
        what: what this process calls itself to others.
        wait_s: how long to wait for an owner to go.

    Raises:
        TakenError: another process owns it; the message says which.
        DataError: the folder cannot be written to.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK_FILE, "ab")  # noqa: SIM115
    with lock:
        sighting = Sighting(folder)
        end = time.monotonic() + max(wait_s, _AT_LEAST_S)
        while not _try_lock(lock.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise TakenError(folder, _read_record(folder))
            time.sleep(_RETRY_S)
        while sighting.beats_elsewhere():
            if sighting.beats_seen > 1 and time.monotonic() > end:
                raise TakenError(folder, _read_record(folder))
            time.sleep(_RETRY_S)
        with disk_errors(folder):
            owner = Ownership(folder, what)
        try:
            yield owner
        finally:
            owner._release()


class Sighting:
    """Watches whether somebody owns a folder, without getting in the way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[str, int] | None = None
        self._last_at_s = 0.0
        self.beats_seen = 0

    def is_owned(self) -> bool:
        """Whether it is owned now. Of an owner elsewhere that died it says so SILENCE_S later."""
        try:
            descriptor = os.open(self._folder / _LOCK_FILE, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            if not _try_lock(descriptor, fcntl.LOCK_SH):
                return True
        finally:
            os.close(descriptor)
        return self.beats_elsewhere()

    def beats_elsewhere(self) -> bool:
        """Whether there is a record from another machine that has not been silent for SILENCE_S."""
        record = _read_record(self._folder)
        if record is None or record["machine"] == _machine():
            return False
        beat, now = (record["token"], record["beat"]), time.monotonic()
        if beat != self._last:
            self._last, self._last_at_s = beat, now
            self.beats_seen += 1
        return now - self._last_at_s < SILENCE_S


def _describe(record: dict[str, Any] | None) -> str:
    if record is None:
        return "another process"
    return f"a {record['what']} (process {record['pid']} on {record['host']})"


def _try_lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The owner's record; None if there is none, or nothing that can be understood."""
    try:
        record = json.loads((folder / _RECORD_FILE).read_text(encoding="utf-8"))
        return record if {"what", "host", "pid", "machine", "token", "beat"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _machine() -> str:
    """The same for all processes that share a kernel, and so its flocks; containers of one host included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()
