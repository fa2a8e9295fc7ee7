"""Files that are either complete or absent: stage, fsync, rename. And hashes, and JSON that fails clearly."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError

STAGING_PREFIX = ".staging-"  # whatever bears it was never finished and may be deleted
_HASH_CHUNK_BYTES = 1 << 22


def fsync_dir(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's errors about writing `path` into ones that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(path)).free
            raise DiskFullError(
                f"{path}: no space left to write it ({free / 1e6:.1f} MB free). Nothing was overwritten; "
                "free some space and run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise DataError(f"{path}: not writable ({error.strerror}).") from error
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a staging file beside `path` and renames it over `path` once it is complete and on disk.

    On an error or an interrupt the staging file is deleted and `path` stays as it was.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=STAGING_PREFIX + path.name + ".", dir=path.parent)
        try:
            with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
            fsync_dir(path.parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yields a staging folder that becomes `path` once complete; `path` must not exist yet."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX + path.name + ".", dir=path.parent))
        try:
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            os.chmod(staging, 0o777 & ~_umask())
            fsync_dir(staging)
            os.rename(staging, path)
            fsync_dir(path.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def remove_staging(folder: str | Path) -> None:
    """Deletes what killed processes left unfinished directly inside `folder`."""
    for leftover in Path(folder).glob(STAGING_PREFIX + "*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that never changes a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def sha256_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | Path, what: str) -> Any:
    """Reads JSON; `what` names the file's role in the error message ("the corpus manifest")."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: {what} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtifactError(f"{path}: {what} is not valid JSON ({error}).") from error


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
