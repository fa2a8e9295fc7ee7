"""Index snapshots: what a refresh publishes and a trainer searches.

    snapshots/step-00000500/shard-00000.safetensors    an index file over blocks 0 .. S-1
    snapshots/step-00000500/shard-00001.safetensors    ... over blocks S .. 2S-1, and so on
    snapshots/step-00000500/manifest.json              what each shard is, and whose weights made it
    snapshots/step-00001000-part-00004/...             four shards of step 1000's weights, the others older

A snapshot's folder is complete or absent and never changes. This module says what one is, opens it and
deletes it; realm_fast.snapshot_writer makes them; docs/refresh.md has the whole protocol.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from realm_fast import index_file
from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import STAGING_PREFIX, fsync_dir, read_json, write_json
from realm_fast.index import FaissIndex, Index, MipsIndex, Provenance

FORMAT_VERSION = 3  # 1 was one file for the whole index, 2 had no digest
MANIFEST_FILE = "manifest.json"
MIXED = "mixed"  # stands for the encoder's hash where shards of several encoders are searched together
_NAME = re.compile(r"step-(\d{8,})(?:-part-(\d{5,}))?")


# --- what a snapshot is -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardRecord:
    """One shard: a file, the blocks in it, and the weights that embedded them."""

    file: str
    first_block: int
    num_blocks: int
    bytes: int
    sha256: str  # of the file's header, which holds that of the data: checked whenever the file is opened
    step: int
    encoder_hash: str


@dataclass(frozen=True)
class SnapshotManifest:
    """What a snapshot consists of and how it was made."""

    format_version: int
    step: int  # of the newest weights in it
    corpus_hash: str
    backend: str
    dtype: str
    precision: str  # of the products that made the embeddings: float32 or bfloat16
    dim: int
    num_blocks: int
    shard_blocks: int  # blocks in every shard but the last
    seconds: float  # the process that finished it spent on embedding, and how many blocks a second it did
    blocks_per_s: float
    shards: tuple[ShardRecord, ...]

    @property
    def encoder_hash(self) -> str:
        """Of the one encoder that made all of it, or MIXED."""
        hashes = {shard.encoder_hash for shard in self.shards}
        return hashes.pop() if len(hashes) == 1 else MIXED

    @property
    def newest_encoder_hash(self) -> str:
        """Of the encoder of `step`."""
        return next(shard.encoder_hash for shard in self.shards if shard.step == self.step)

    @property
    def oldest_step(self) -> int:
        return min(shard.step for shard in self.shards)

    @property
    def fresh_shards(self) -> int:
        """How many were made by the weights of `step`."""
        return sum(shard.step == self.step for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def summary(self) -> dict[str, Any]:
        """For people: all of it but the list of shards."""
        values = {**asdict(self), "shards": len(self.shards), "fresh_shards": self.fresh_shards}
        return {**values, "bytes": self.bytes, "encoder_hash": self.encoder_hash}


@dataclass(frozen=True)
class IndexSnapshot:
    """An index nobody changes any more, and the step whose weights made it (the newest, where mixed)."""

    step: int
    index: Index
    manifest: SnapshotManifest
    path: Path

    @property
    def oldest_step(self) -> int:
        return self.manifest.oldest_step

    @property
    def is_whole(self) -> bool:
        """Whether every shard is of `step`'s weights."""
        return self.manifest.oldest_step == self.step


class Published(NamedTuple):
    """A complete folder among the snapshots; a later one is newer."""

    step: int
    is_whole: bool  # all shards are of one step
    fresh_shards: int  # of a partial one
    path: Path


def snapshot_name(step: int, fresh_shards: int | None = None) -> str:
    return f"step-{step:08d}" + ("" if fresh_shards is None else f"-part-{fresh_shards:05d}")


def published_snapshots(folder: Path) -> list[Published]:
    """Whole and partial snapshots, oldest first."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and (path / MANIFEST_FILE).is_file():
                found.append(Published(int(match[1]), match[2] is None, int(match[2] or 0), path))
    return sorted(found)


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Whole snapshots (every shard by the weights of one step) by step, oldest first."""
    return {one.step: one.path for one in published_snapshots(folder) if one.is_whole}


def trained_snapshot(folder: Path, state: Mapping[str, Any]) -> Path:
    """The snapshot in `folder` that a pre-training checkpoint with this state searches."""
    if "snapshot" not in state:
        raise DataError("the checkpoint names no snapshot: it was written before snapshots had shards.")
    return folder / state["snapshot"]


# --- opening one --------------------------------------------------------------------------------------------


def write_manifest(path: Path, manifest: SnapshotManifest) -> None:
    """Writes a snapshot's manifest, with a digest: what it says of its shards is found nowhere else."""
    values = asdict(manifest)
    write_json(path / MANIFEST_FILE, {**values, "digest": _digest(values)})


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> SnapshotManifest:
    """Reads and checks a snapshot's manifest.

    Raises:
        DataError: there is none, or one of another format.
        CorruptArtifactError: it is damaged.
    """
    file = path / MANIFEST_FILE
    values = read_json(file, "the snapshot's manifest")
    try:
        version = values.get("format_version", 1 if "sha256" in values else None)
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise DataError(
                f"{file}: an index of format {version}; this version of realm_fast reads {FORMAT_VERSION}. "
                "Delete the folder and have the index made again."
            )
        digest = values.pop("digest")
        if digest != _digest(values):
            raise ValueError("its digest is not that of its content")
        shards = tuple(ShardRecord(**shard) for shard in values.pop("shards"))
        manifest = SnapshotManifest(**values, shards=shards)
        _check_types(manifest, *shards)
        end = 0
        for shard in shards:
            if shard.first_block != end or Path(shard.file).name != shard.file:
                raise ValueError(f"{shard.file} begins at block {shard.first_block}, expected {end}")
            end += shard.num_blocks
        if end != manifest.num_blocks or max(shard.step for shard in shards) != manifest.step:
            raise ValueError(f"its shards hold {end} blocks, expected {manifest.num_blocks}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptArtifactError(f"{file}: not a snapshot manifest ({error}).") from error
    return manifest


def _check_types(*records: SnapshotManifest | ShardRecord) -> None:
    for record in records:
        for field in fields(record):
            if field.type in (int, str) and not isinstance(getattr(record, field.name), field.type):
                raise TypeError(f"{field.name}: expected {field.type}")


def open_snapshot(path: Path, *, expect: Provenance | None = None, verify: bool = False) -> IndexSnapshot:
    """Maps a snapshot's shards into memory: one slab each, nothing is copied.

    As long as the index lives, `prune_snapshots` leaves the folder alone, in whatever process it runs.

    Args:
        path: the snapshot's folder.
        expect: the encoder and corpus that every shard must come from. Without it, shards of several
            encoders are accepted too, which only a run's own training may do.
        verify: also compare every file's data with its hash (reads all of it).

    Raises:
        DataError: there is no such snapshot (any more), or it is of another format.
        CorruptArtifactError: a file is not as it was written, or not the one the manifest names.
        ProvenanceError: a shard comes from another encoder or corpus than `expect`.
    """
    held = _Held(path / MANIFEST_FILE)
    manifest = read_manifest(path)
    if expect is not None:
        for shard in manifest.shards:
            found = Provenance(shard.encoder_hash, manifest.corpus_hash, shard.step)
            found.check(expect, str(path / shard.file))
    for shard in manifest.shards:
        file = path / shard.file
        try:
            size = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):  # deleted, perhaps at this very moment
            size = -1
        if size != shard.bytes:
            raise CorruptArtifactError(f"{file}: {max(size, 0)} bytes, but its manifest says {shard.bytes}.")
    index: Index
    if manifest.backend == "faiss":
        only = manifest.shards[0]
        if index_file.read_metadata(path / only.file, "FaissIndex")["header_sha256"] != only.sha256:
            raise CorruptArtifactError(f"{path / only.file}: another file than was written here.")
        index = FaissIndex.load(path / only.file, expect=expect)
    else:
        index = MipsIndex.map_shards(
            [path / shard.file for shard in manifest.shards],
            [shard.sha256 for shard in manifest.shards],
            provenance=Provenance(manifest.encoder_hash, manifest.corpus_hash, manifest.step),
            held=held,
            verify=verify,
        )
    return IndexSnapshot(step=manifest.step, index=index, manifest=manifest, path=path)


class _Held:
    """A shared lock on a snapshot's manifest, given back with the last reference to it, or by dying."""

    def __init__(self, manifest: Path) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(manifest, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Between open and lock it may have been pruned.
            still_there = os.path.samestat(os.fstat(self._descriptor), os.stat(manifest))
        except (FileNotFoundError, NotADirectoryError, BlockingIOError):
            still_there = False
        if not still_there:
            raise DataError(f"{manifest}: the snapshot's manifest does not exist.")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


# --- deleting one -------------------------------------------------------------------------------------------


def prune_snapshots(folder: Path, *, keep: int, pinned: Collection[str]) -> None:
    """Deletes all but the newest `keep` whole snapshots and the newest partial one, if that is newer.

    Args:
        pinned: names of snapshots that a checkpoint still needs; they stay.

    A snapshot that a process has open stays too, until a later call: `open_snapshot` holds a lock on it
    that dies with its process.
    """
    found = published_snapshots(folder)
    whole = [one for one in found if one.is_whole][-keep:]
    partial = [one for one in found if not one.is_whole and (not whole or one > whole[-1])][-1:]
    for one in found:
        if one not in whole and one not in partial and one.path.name not in pinned:
            with contextlib.suppress(
                OSError
            ):  # a full disk must not end the training; a later call tries again
                retire_snapshot(one.path)


def retire_snapshot(path: Path, *, even_if_open: bool = False) -> bool:
    """Takes a snapshot out of sight at once and deletes it in a thread; False if it is open or not there.

    Args:
        even_if_open: out of sight even so; then its files are only deleted by a later `remove_staging`.
    """
    try:
        descriptor = os.open(
            path / MANIFEST_FILE, os.O_RDWR
        )  # NFS locks for writing only what is open for it
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        is_open = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_open = True
            if not even_if_open:
                return False
        while True:
            doomed = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}retired.", dir=path.parent))
            try:
                os.rename(path, doomed / path.name)
                break
            except FileNotFoundError:
                if not path.exists():  # somebody else was faster
                    return False
                # else it was `doomed` that a `remove_staging` of another process took away
        with contextlib.suppress(OSError):  # undone by a power cut, it would only be done again
            fsync_dir(path.parent)
    finally:
        os.close(descriptor)
    if not is_open:  # large files take a while to go, and a trainer may be waiting
        threading.Thread(target=shutil.rmtree, args=(doomed, True), name="delete a snapshot").start()
    return True
