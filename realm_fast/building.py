"""What long builds of flat-file artifacts share: one builder at a time, parts that a killed build keeps, and
files written while hashed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors

from realm_fast import progress as progress_bars
from realm_fast.errors import CorruptArtifactError, UserError
from realm_fast.files import STAGING_PREFIX, atomic_dir, disk_errors, write_json
from realm_fast.workers import map_unordered


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


def build_parts(
    work: Path,
    num_blocks: int,
    *,
    part_blocks: int,
    fingerprint: Sequence[Any],
    setup: str,
    argument: Any,
    num_workers: int,
    what: str,
    progress: bool,
) -> list[Path]:
    """One file for every `part_blocks` blocks; those an earlier, killed build finished are kept.

    Args:
        work: the folder that `exclusive` made.
        fingerprint: JSON values; parts of other values are not reused.
        setup, argument, num_workers: as in `workers.map_unordered`; a task is (start, stop, path).
        what: for bars and messages ("find salient spans").
    """
    for leftover in work.glob(f"{STAGING_PREFIX}*"):
        leftover.unlink(missing_ok=True)
    name = hashlib.sha256(json.dumps(list(fingerprint)).encode()).hexdigest()[:16]
    starts = range(0, num_blocks, part_blocks)
    parts = [work / f"{start:010d}-{name}.safetensors" for start in starts]
    with progress_bars.bar(total=num_blocks, desc=what, unit="block", enabled=progress) as bar:
        tasks = []
        for start, part in zip(starts, parts, strict=True):
            stop = min(start + part_blocks, num_blocks)
            if part.exists():
                bar.update(stop - start)
            else:
                tasks.append((start, stop, str(part)))
        workers = min(num_workers, len(starts))
        for (start, stop, _), _ in map_unordered(setup, argument, tasks, num_workers=workers, what=what):
            bar.update(stop - start)
    return parts


def merge_parts(
    parts: Sequence[Path],
    out: Path,
    arrays: Mapping[str, str],
    manifest_of: Callable[[list[dict[str, str]], dict[str, "ArrayWriter"]], dict[str, Any]],
) -> None:
    """Joins the arrays of all parts into the flat files of the new folder `out`, manifest.json beside them.

    Args:
        arrays: name -> dtype; one called `offsets` counts on from part to part.
        manifest_of: (metadata of every part, the writers) -> the manifest; "files" is added.
    """
    notes: list[dict[str, str]] = []
    with atomic_dir(out) as staging, contextlib.ExitStack() as stack:
        writers = {
            name: ArrayWriter(
                stack.enter_context(open(staging / f"{name}.bin", "wb")), dtype, is_offsets=name == "offsets"
            )
            for name, dtype in arrays.items()
        }
        for path in parts:
            try:
                with safetensors.safe_open(path, framework="np") as file:
                    notes.append(file.metadata())
                    for name, writer in writers.items():
                        writer.append(file.get_tensor(name))
            except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise CorruptArtifactError(
                    f"{path}: a finished part cannot be read ({error}); it was deleted, "
                    "run the same command again."
                ) from error
        files = {name: writer.finish() for name, writer in writers.items()}
        write_json(staging / "manifest.json", {**manifest_of(notes, writers), "files": files})


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
