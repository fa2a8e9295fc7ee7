"""Index snapshots: what a refresh publishes and a trainer searches.

A snapshot is a folder that is complete or absent:

    snapshots/step-00000500/index.safetensors    the index, stamped with encoder hash, corpus hash and step
    snapshots/step-00000500/manifest.json        its size, hash and how it was made

It is written under another name, synced to disk and renamed, so that a reader meets only whole ones.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from realm_fast.block_encoder import Precision
from realm_fast.config import Config, IndexConfig
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStats, embed_blocks
from realm_fast.errors import CorruptArtifactError, DataError, ProvenanceError
from realm_fast.files import atomic_dir, read_json, sha256_file, write_json
from realm_fast.index import FaissIndex, Index, MipsIndex, Provenance
from realm_fast.token_store import TokenStore

INDEX_FILE = "index.safetensors"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class SnapshotManifest:
    """How a snapshot was made."""

    step: int
    encoder_hash: str
    corpus_hash: str
    backend: str
    dtype: str
    num_blocks: int
    dim: int
    bytes: int
    sha256: str
    seconds: float
    blocks_per_s: float
    padding_waste: float


@dataclass(frozen=True)
class IndexSnapshot:
    """An index nobody changes any more, and the step whose weights made it."""

    step: int
    index: Index
    manifest: SnapshotManifest
    path: Path


def snapshot_name(step: int) -> str:
    return f"step-{step:08d}"


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Complete snapshots by step, oldest first."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and (path / MANIFEST_FILE).is_file():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def write_snapshot(
    folder: Path,
    step: int,
    embedder: Embedder,
    store: TokenStore,
    config: IndexConfig,
    *,
    token_budget: int,
    precision: Precision = "float32",
    progress: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> Path:
    """Embeds every block and publishes the index as `folder`/step-XXXXXXXX.

    A complete snapshot of the same step, encoder and corpus is left as it is; one of that step from other
    weights (a future that was rolled back) is replaced.
    """
    path = folder / snapshot_name(step)
    provenance = Provenance(encoder_hash=embedder.hash(), corpus_hash=store.corpus_hash, step=step)
    if _is_made_from(path, provenance):
        return path
    if path.is_dir():
        shutil.rmtree(path)
    stats = EmbeddingStats()
    embeddings = embed_blocks(
        embedder, store, token_budget=token_budget, precision=precision, progress=progress,
        should_stop=should_stop, stats=stats,
    )  # [N, D]  # fmt: skip
    index: Index
    if config.backend == "faiss":
        index = FaissIndex.from_embeddings(embeddings, config.faiss_factory, provenance=provenance)
    else:
        index = MipsIndex.from_embeddings(embeddings, dtype=config.dtype, provenance=provenance)
    with atomic_dir(path) as staging:
        index.save(staging / INDEX_FILE)
        manifest = SnapshotManifest(
            step=step,
            encoder_hash=provenance.encoder_hash,
            corpus_hash=provenance.corpus_hash,
            backend=config.backend,
            dtype=config.dtype,
            num_blocks=len(index),
            dim=embeddings.shape[1],
            bytes=(staging / INDEX_FILE).stat().st_size,
            sha256=sha256_file(staging / INDEX_FILE),
            seconds=round(stats.seconds, 3),
            blocks_per_s=round(stats.blocks_per_s, 1),
            padding_waste=round(stats.padding_waste, 4),
        )
        write_json(staging / MANIFEST_FILE, asdict(manifest))
    return path


def build_index_folder(
    out: Path, embedder: Embedder, store: TokenStore, config: Config, *, progress: bool = False
) -> SnapshotManifest:
    """Embeds every block into `out`: a folder with the index, its manifest and the embedder that made it.

    Raises:
        DataError: `out` exists and holds something else, or the index of other weights.
    """
    provenance = Provenance(encoder_hash=embedder.hash(), corpus_hash=store.corpus_hash, step=0)
    if out.exists():
        if not _is_made_from(out, provenance):
            raise DataError(f"{out}: exists already, and is not the index of these weights and this corpus.")
        return read_manifest(out)
    with atomic_dir(out) as staging:
        built = write_snapshot(
            staging,
            0,
            embedder,
            store,
            config.index,
            token_budget=config.refresh.token_budget,
            precision=config.refresh.precision,
            progress=progress,
        )
        for file in built.iterdir():
            file.rename(staging / file.name)
        built.rmdir()
        embedder.save(staging / "embedder")
    return read_manifest(out)


def _is_made_from(path: Path, provenance: Provenance) -> bool:
    with contextlib.suppress(DataError, CorruptArtifactError, ProvenanceError):
        manifest = open_snapshot(path, expect=provenance, verify=True).manifest
        return manifest.step == provenance.step
    return False


def read_manifest(path: Path) -> SnapshotManifest:
    values = read_json(path / MANIFEST_FILE, "the snapshot's manifest")
    try:
        return SnapshotManifest(**values)
    except TypeError as error:
        raise CorruptArtifactError(f"{path / MANIFEST_FILE}: not a snapshot manifest ({error}).") from error


def open_snapshot(path: Path, *, expect: Provenance | None = None, verify: bool = False) -> IndexSnapshot:
    """Maps a snapshot's index into memory.

    Args:
        path: the snapshot's folder.
        expect: the encoder and corpus it must come from; a mismatch raises ProvenanceError.
        verify: also compare the file's hash with the manifest (reads the whole file).

    Raises:
        CorruptArtifactError: the index file is not as it was written.
    """
    manifest = read_manifest(path)
    file = path / INDEX_FILE
    size = file.stat().st_size if file.is_file() else -1
    if size != manifest.bytes:
        raise CorruptArtifactError(f"{file}: {max(size, 0)} bytes, but its manifest says {manifest.bytes}.")
    if verify and sha256_file(file) != manifest.sha256:
        raise CorruptArtifactError(f"{file}: its content is not what the manifest's sha256 says.")
    index: Index
    if manifest.backend == "faiss":
        index = FaissIndex.load(file, expect=expect)
    else:
        index = MipsIndex.load(file, mmap=True, expect=expect)
    return IndexSnapshot(step=manifest.step, index=index, manifest=manifest, path=path)


def prune_snapshots(folder: Path, *, keep: int, pinned_steps: Collection[int]) -> None:
    """Deletes all but the newest `keep` snapshots, except those a checkpoint still needs.

    A snapshot mapped by this or another process stays readable until it is let go: the operating system
    keeps an unlinked file's data alive.
    """
    snapshots = list_snapshots(folder)
    for step in list(snapshots)[:-keep]:
        if step not in pinned_steps:
            shutil.rmtree(snapshots[step], ignore_errors=True)
