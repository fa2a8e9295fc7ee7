"""What long builds of flat-file artifacts share: one builder at a time, and files written while hashed."""

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from realm_fast.errors import UserError
from realm_fast.files import STAGING_PREFIX, disk_errors


@contextlib.contextmanager
def exclusive(work: Path, out: Path) -> Iterator[None]:
    """Makes the folder `work` and lets one process build `out`; the lock dies with its holder.

    On the way out `work` goes too, unless finished parts are kept in it.
    """
    with disk_errors(out):
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another process is building it right now.") from None
        try:
            yield
        finally:
            if all(entry.name == "lock" for entry in work.iterdir()):
                shutil.rmtree(work, ignore_errors=True)


def clear(work: Path) -> None:
    """Deletes the finished parts once what they were for is complete."""
    for entry in work.iterdir():
        if entry.name != "lock":
            entry.unlink(missing_ok=True)


def remove_leftovers(out: Path) -> None:
    """Deletes the staging folders that killed builds of `out` left beside it; call while holding the lock."""
    for leftover in out.parent.glob(f"{STAGING_PREFIX}{out.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


class ArrayWriter:
    """Appends arrays to a file and hashes them; offsets are shifted so that they run on."""

    def __init__(self, file: IO[bytes], dtype: str, *, is_offsets: bool = False) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self._is_offsets = is_offsets
        self._base = 0
        self._digest = hashlib.sha256()
        self.items = 0
        if is_offsets:
            self._write(np.zeros(1, dtype=self._dtype))

    def append(self, values: np.ndarray) -> None:
        """Adds values; offsets begin with 0 each time and are made to go on from the last."""
        if self._is_offsets:
            values = values[1:] + self._base
            self._base = int(values[-1]) if len(values) else self._base
        if values.dtype != self._dtype:
            raise TypeError(f"expected {self._dtype} for {self._file.name}, got {values.dtype}")
        self._write(values)

    def _write(self, values: np.ndarray) -> None:
        if values.size:
            data = np.ascontiguousarray(values).data.cast("B")
            self._file.write(data)
            self._digest.update(data)
            self.items += values.size

    def finish(self) -> dict[str, Any]:
        """The manifest's entry: size, hash, type and number of items."""
        self._file.flush()
        return {
            "bytes": self._file.tell(),
            "sha256": self._digest.hexdigest(),
            "dtype": self._dtype.name,
            "items": self.items,
        }
