"""Making index snapshots: shard by shard, whole or absent, and taken up again where it was stopped.

A snapshot is made in a folder `.building-...` beside the others and renamed when its last shard and its
manifest are on disk. The folder's name is a function of what is being made (the weights' hash, the corpus',
the layout), so whoever was killed goes on at the first shard that is missing. A shard is written, synced,
hashed and renamed; one that is found is taken over only if every byte of it still has its hash.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from realm_fast import index_file
from realm_fast.block_encoder import Precision, resolve_precision
from realm_fast.config import Config, IndexConfig
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStats, EmbeddingStopped, embed_blocks, embed_index
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, ProvenanceError
from realm_fast.files import atomic_dir, disk_errors, fsync_dir, link_or_copy, remove_staging
from realm_fast.index import FaissIndex, MipsIndex, Provenance
from realm_fast.ownership import own
from realm_fast.panels import PANEL_ROWS
from realm_fast.progress import bar
from realm_fast.snapshot import (
    FORMAT_VERSION,
    ShardRecord,
    SnapshotManifest,
    open_snapshot,
    published_snapshots,
    read_manifest,
    retire_snapshot,
    snapshot_name,
    write_manifest,
)
from realm_fast.token_store import TokenStore

BUILDING_PREFIX = ".building-"
DEFAULT_SHARD_BLOCKS = 342 * PANEL_ROWS


@dataclass(frozen=True)
class _Plan:
    """What is being made. Its hash names the folder it is made in."""

    step: int
    encoder_hash: str
    corpus_hash: str
    backend: str
    dtype: str
    precision: Precision
    dim: int
    num_blocks: int
    shard_blocks: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.shard_blocks)

    @property
    def building_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{BUILDING_PREFIX}{snapshot_name(self.step)}-{digest[:16]}"

    @property
    def provenance(self) -> Provenance:
        return Provenance(self.encoder_hash, self.corpus_hash, self.step)

    def shard(self, number: int) -> tuple[str, int, int]:
        """(file, first block, number of blocks)"""
        first = number * self.shard_blocks
        return f"shard-{number:05d}.safetensors", first, min(self.shard_blocks, self.num_blocks - first)

    def manifest(self, shards: Sequence[ShardRecord], seconds: float, blocks: int) -> SnapshotManifest:
        return SnapshotManifest(
            FORMAT_VERSION, self.step, self.corpus_hash, self.backend, self.dtype, self.precision, self.dim,
            self.num_blocks, self.shard_blocks,
            round(seconds, 3), round(blocks / seconds, 1) if seconds else 0.0, tuple(shards),
        )  # fmt: skip


def write_snapshot(
    folder: Path,
    step: int,
    embedder: Embedder,
    store: TokenStore,
    config: IndexConfig,
    *,
    token_budget: int,
    precision: Precision = "float32",
    shard_blocks: int = DEFAULT_SHARD_BLOCKS,
    shard_order: Sequence[int] | None = None,
    publish_every_shards: int = 0,
    progress: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> Path:
    """Embeds every block, shard by shard, and publishes the index as `folder`/step-XXXXXXXX.

    One process at a time may write into `folder`. Memory holds one shard, whatever the corpus' size (with
    the faiss backend, which has a single shard, all of it). Shards that an earlier call with the same
    arguments finished are taken over once their hashes are checked. A complete snapshot of the same step,
    encoder and corpus is left as it is; one of that step from other weights (a future that was rolled back)
    is replaced.

    Args:
        shard_blocks: blocks in a shard, a multiple of 48.
        shard_order: a permutation of the shards' numbers: which is embedded first. None: as they come.
        publish_every_shards: after every so many shards, publish a partial snapshot, in which the shards
            still missing are those of the newest older snapshot; 0: only the whole.
        should_stop: asked between packs of blocks.

    Raises:
        EmbeddingStopped: `should_stop` returned True; finished shards are kept for the next call.
        DiskFullError, DataError: nothing could be written, or the corpus has no blocks.
    """
    if len(store) == 0:
        raise DataError(f"{store.path}: holds no blocks, so there is nothing to index.")
    if shard_blocks < PANEL_ROWS or shard_blocks % PANEL_ROWS:
        raise ConfigError(
            f"refresh.shard_blocks: expected a positive multiple of {PANEL_ROWS}, got {shard_blocks}"
        )
    plan = _Plan(
        step, embedder.hash(), store.corpus_hash, config.backend, config.dtype,
        resolve_precision(precision, embedder.device), embedder.dim, len(store),
        len(store) if config.backend == "faiss" else shard_blocks,
    )  # fmt: skip
    order = list(range(plan.num_shards)) if shard_order is None else list(shard_order)
    if sorted(order) != list(range(plan.num_shards)):
        raise ValueError(f"shard_order: expected a permutation of 0 .. {plan.num_shards - 1}, got {order}")
    path = folder / snapshot_name(step)
    if _is_made_from(path, plan.provenance, plan.precision):
        return path
    building = folder / plan.building_name
    with disk_errors(building):
        _prepare(folder, building)
        records: dict[int, ShardRecord] = {}
        seconds, blocks = 0.0, 0
        with bar(total=len(store), desc="embed blocks", unit="block", enabled=progress) as shown:
            for done, number in enumerate(order, 1):
                before = shown.n
                record = _finished_shard(building, plan, number)
                is_new = record is None
                if record is None:
                    stats = EmbeddingStats()

                    def stop(before: int = before, stats: EmbeddingStats = stats) -> bool:
                        shown.update(before + stats.blocks - shown.n)
                        return should_stop is not None and should_stop()

                    began = time.monotonic()
                    # Not named here: its memory must be free before the next shard is embedded.
                    record = _write_shard(building, plan, number, _embed_shard(
                        embedder, store, config, plan, number,
                        token_budget=token_budget, should_stop=stop, stats=stats,
                    ))  # fmt: skip
                    seconds, blocks = seconds + time.monotonic() - began, blocks + record.num_blocks
                elif should_stop is not None and should_stop():
                    raise EmbeddingStopped(f"stopped after {done - 1} of {plan.num_shards} shards.")
                shown.update(before + record.num_blocks - shown.n)
                records[number] = record
                due = publish_every_shards and done % publish_every_shards == 0 and done < plan.num_shards
                if due and is_new:
                    _publish_partial(folder, building, plan, records, seconds, blocks)
        manifest = plan.manifest([records[number] for number in sorted(records)], seconds, blocks)
        write_manifest(building, manifest)
        _make_room(path)
        os.rename(building, path)
        fsync_dir(folder)
    return path


def _embed_shard(
    embedder: Embedder,
    store: TokenStore,
    config: IndexConfig,
    plan: _Plan,
    number: int,
    *,
    token_budget: int,
    should_stop: Callable[[], bool],
    stats: EmbeddingStats,
) -> MipsIndex | FaissIndex:
    """The only place where blocks become an index."""
    _, first, count = plan.shard(number)
    if config.backend == "faiss":
        embeddings = embed_blocks(
            embedder, store, token_budget=token_budget, precision=plan.precision, should_stop=should_stop,
            stats=stats,
        )  # [N, D]: one shard holds everything  # fmt: skip
        return FaissIndex.from_embeddings(embeddings, config.faiss_factory, provenance=plan.provenance)
    return embed_index(
        embedder, store, first, count, dtype=config.dtype, token_budget=token_budget,
        precision=plan.precision, provenance=plan.provenance, should_stop=should_stop, stats=stats,
    )  # fmt: skip


def _prepare(folder: Path, building: Path) -> None:
    """Leaves nothing half-made in `folder` but what can be gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_staging(folder)
    for other in folder.glob(BUILDING_PREFIX + "*"):
        if other != building:  # of weights that nobody waits for any more
            shutil.rmtree(other, ignore_errors=True)
    building.mkdir(exist_ok=True)
    remove_staging(building)


def _write_shard(building: Path, plan: _Plan, number: int, index: MipsIndex | FaissIndex) -> ShardRecord:
    name, first, count = plan.shard(number)
    index.save(building / name)
    metadata = index_file.read_metadata(building / name, type(index).__name__)
    size = (building / name).stat().st_size
    return ShardRecord(name, first, count, size, metadata["header_sha256"], plan.step, plan.encoder_hash)


def _finished_shard(building: Path, plan: _Plan, number: int) -> ShardRecord | None:
    """The record of a shard that is there already, all of it and undamaged; None: it must be made."""
    name, first, count = plan.shard(number)
    file = building / name
    kind = "FaissIndex" if plan.backend == "faiss" else "MipsIndex"
    with contextlib.suppress(DataError, CorruptArtifactError):
        _, metadata = index_file.read(file, kind, verify=True)
        if Provenance.from_metadata(metadata) == plan.provenance:
            size, digest = file.stat().st_size, metadata["header_sha256"]
            return ShardRecord(name, first, count, size, digest, plan.step, plan.encoder_hash)
    return None


def _publish_partial(
    folder: Path, building: Path, plan: _Plan, records: Mapping[int, ShardRecord], seconds: float, blocks: int
) -> None:
    """Publishes the shards made so far together with older ones; nothing if there is no older snapshot."""
    base = _newest_like(folder, plan)
    if base is None:
        return
    base_path, base_manifest = base
    path = folder / snapshot_name(plan.step, len(records))
    shards = [records.get(number, old) for number, old in enumerate(base_manifest.shards)]
    _make_room(path)
    try:
        with atomic_dir(path) as staging:
            for shard in shards:
                source = building if shard.step == plan.step else base_path
                link_or_copy(source / shard.file, staging / shard.file)
            write_manifest(staging, plan.manifest(shards, seconds, blocks))
    except FileNotFoundError:
        if base_path.is_dir():
            raise
        # the older snapshot was pruned meanwhile: what is published next takes another one


def _newest_like(folder: Path, plan: _Plan) -> tuple[Path, SnapshotManifest] | None:
    """The newest snapshot older than `plan` whose shards can stand beside the plan's."""
    for one in reversed(published_snapshots(folder)):
        if one.step >= plan.step:
            continue
        with contextlib.suppress(DataError, CorruptArtifactError):
            manifest = read_manifest(one.path)
            names = ("corpus_hash", "backend", "dtype", "precision", "dim", "num_blocks", "shard_blocks")
            if all(getattr(manifest, name) == getattr(plan, name) for name in names):
                return one.path, manifest
    return None


def _make_room(path: Path) -> None:
    """A folder of this name is of weights that were rolled back, or lost its manifest."""
    retire_snapshot(path, even_if_open=True)
    shutil.rmtree(path, ignore_errors=True)


def build_index_folder(
    out: Path, embedder: Embedder, store: TokenStore, config: Config, *, progress: bool = False
) -> SnapshotManifest:
    """Embeds every block into `out`: a folder with the index, its manifest and the embedder that made it.

    It is built beside `out`; a call that was stopped goes on at the first shard that is missing.

    Raises:
        DataError: `out` exists and holds something else, or the index of other weights.
        TakenError: another process is building it.
    """
    provenance = Provenance(encoder_hash=embedder.hash(), corpus_hash=store.corpus_hash, step=0)
    precision = resolve_precision(config.refresh.precision, embedder.device)
    if out.exists():
        if not _is_made_from(out, provenance, precision):
            raise DataError(
                f"{out}: exists already, and is not the index of these weights and this corpus, "
                f"embedded in {precision}."
            )
        return read_manifest(out)
    workshop = out.with_name(BUILDING_PREFIX + out.name)
    with own(workshop, "builder of an index"), disk_errors(out):
        built = write_snapshot(
            workshop, 0, embedder, store, config.index,
            token_budget=config.refresh.token_budget, precision=config.refresh.precision,
            shard_blocks=config.refresh.shard_blocks, progress=progress,
        )  # fmt: skip
        if not (built / "embedder").exists():
            embedder.save(built / "embedder")
        os.rename(built, out)
        fsync_dir(out.parent)
    shutil.rmtree(workshop, ignore_errors=True)
    return read_manifest(out)


def _is_made_from(path: Path, provenance: Provenance, precision: str) -> bool:
    with contextlib.suppress(DataError, CorruptArtifactError, ProvenanceError):
        manifest = open_snapshot(path, expect=provenance, verify=True).manifest
        return (manifest.step, manifest.precision) == (provenance.step, precision)
    return False
