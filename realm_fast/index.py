"""The block index: exact top-k search over embeddings, as one file on disk and one object in memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from realm_fast.errors import CorruptArtifactError, DataError, MissingDependencyError, ProvenanceError
from realm_fast.files import atomic_file
from realm_fast.ops._checks import check_choice, check_int, check_tensor
from realm_fast.ops.mips_topk import check_exclude_ids, mips_topk
from realm_fast.types import NO_BLOCK, TopK

LAYOUT_VERSION = 0
DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Provenance:
    """What an index was built from: the encoder's weights, the corpus, and the training step."""

    encoder_hash: str
    corpus_hash: str
    step: int

    def to_metadata(self) -> dict[str, str]:
        return {"encoder_hash": self.encoder_hash, "corpus_hash": self.corpus_hash, "step": str(self.step)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> "Provenance | None":
        if "encoder_hash" not in metadata:
            return None
        return cls(metadata["encoder_hash"], metadata["corpus_hash"], int(metadata["step"]))

    def check(self, expect: "Provenance", where: str) -> None:
        """Raises ProvenanceError unless encoder and corpus agree; the step may differ."""
        for name in ("encoder_hash", "corpus_hash"):
            have, want = getattr(self, name), getattr(expect, name)
            if have != want:
                raise ProvenanceError(f"{where}: its {name} is {have!r}, but {want!r} is expected.")


class Index(Protocol):
    """What retrieval needs of an index, local or sharded, exact or approximate."""

    def search(
        self, queries: torch.Tensor, k: int, *, exclude_ids: torch.Tensor | None = None, exact: bool = True
    ) -> TopK: ...

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor: ...

    def __len__(self) -> int: ...

    @property
    def provenance(self) -> Provenance | None: ...


class MipsIndex:
    """Exact top-k inner-product search."""

    def __init__(self, emb: torch.Tensor, ids: np.ndarray, dtype: str, provenance: Provenance | None) -> None:
        self._emb, self._ids, self._dtype, self._provenance = emb, ids, dtype, provenance

    @classmethod
    def from_embeddings(
        cls,
        emb: torch.Tensor,
        dtype: str = "float32",
        ids: torch.Tensor | None = None,
        *,
        provenance: Provenance | None = None,
        originals: str | Path = "memory",
    ) -> "MipsIndex":
        check_tensor("emb", emb, shape=["N", "D"])
        check_choice("dtype", dtype, DTYPES)
        index = cls(torch.empty(0, emb.shape[1]), np.empty(0, np.int64), dtype, provenance)
        index.add(emb, ids)
        return index

    def search(
        self, queries: torch.Tensor, k: int, *, exclude_ids: torch.Tensor | None = None, exact: bool = True
    ) -> TopK:
        check_tensor("queries", queries, shape=["B", self.dim])
        rows = None
        if exclude_ids is not None:
            excluded = check_exclude_ids(exclude_ids, len(queries), queries.device).cpu().numpy()
            found = np.minimum(np.searchsorted(self._ids, excluded), max(len(self._ids) - 1, 0))
            match = self._ids[found] == excluded if len(self._ids) else np.zeros(excluded.shape, bool)
            rows = torch.from_numpy(np.where(match, found, NO_BLOCK))
        scores, found_rows = mips_topk(queries.detach().float().cpu(), self._emb, k, exclude_ids=rows)
        if len(self._ids):
            ids = torch.where(found_rows >= 0, torch.from_numpy(self._ids)[found_rows.clamp(min=0)], NO_BLOCK)
        else:
            ids = found_rows
        return TopK(scores.to(queries.device), ids.to(queries.device))

    def add(self, emb: torch.Tensor, ids: torch.Tensor | None = None) -> None:
        check_tensor("emb", emb, shape=["N", self.dim])
        first = int(self._ids.max()) + 1 if len(self._ids) else 0
        new = np.arange(first, first + len(emb)) if ids is None else ids.cpu().numpy().astype(np.int64)
        if len(new) != len(emb):
            raise ValueError(f"ids: expected {len(emb)} ids, got {len(new)}")
        all_ids = np.concatenate([self._ids, new])
        unique, counts = np.unique(all_ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"ids: {int(unique[counts > 1][0])} is in the index already")
        order = np.argsort(all_ids, kind="stable")
        self._emb = torch.cat([self._emb, emb.detach().float().cpu()])[torch.from_numpy(order)]
        self._ids = all_ids[order]

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        wanted = torch.as_tensor(ids).cpu().numpy()
        found = np.minimum(np.searchsorted(self._ids, wanted), max(len(self._ids) - 1, 0))
        missing = self._ids[found] != wanted if len(self._ids) else np.ones(wanted.shape, bool)
        if missing.any():
            raise ValueError(f"ids: {int(wanted[missing][0])} is not in the index")
        return torch.from_numpy(found)

    def update(self, ids: torch.Tensor, emb: torch.Tensor) -> None:
        rows = self._rows(ids)
        check_tensor("emb", emb, shape=[len(rows), self.dim])
        self._emb = self._emb.index_copy(0, rows, emb.detach().float().cpu())

    def delete(self, ids: torch.Tensor) -> None:
        keep = np.ones(len(self._ids), bool)
        keep[self._rows(ids).numpy()] = False
        self._emb, self._ids = self._emb[torch.from_numpy(keep)], self._ids[keep]

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor:
        return self._emb[self._rows(ids)]

    def stats(self) -> dict[str, Any]:
        return {"rescored": 0, "fell_back": 0}

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        return self._emb.shape[1]

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def nbytes(self) -> int:
        return self._emb.nbytes + self._ids.nbytes

    @property
    def provenance(self) -> Provenance | None:
        return self._provenance

    def save(self, path: str | Path) -> None:
        metadata = {"kind": "MipsIndex", "layout_version": str(LAYOUT_VERSION), "dtype": self._dtype}
        if self._provenance is not None:
            metadata |= self._provenance.to_metadata()
        with atomic_file(path) as file:
            file.write(save({"emb": self._emb, "ids": torch.from_numpy(self._ids)}, metadata))

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True, expect: Provenance | None = None) -> "MipsIndex":
        tensors, metadata = _read(Path(path), "MipsIndex")
        provenance = _checked_provenance(metadata, expect, path)
        return cls(tensors["emb"], tensors["ids"].numpy(), metadata["dtype"], provenance)


class FaissIndex:
    """Approximate search by faiss, behind the same protocol. Exclusion is by over-retrieval."""

    def __init__(self, faiss_index: Any, factory: str, provenance: Provenance | None) -> None:
        self._faiss, self._factory, self._provenance = faiss_index, factory, provenance

    @classmethod
    def from_embeddings(
        cls, emb: torch.Tensor, factory: str = "HNSW32", *, provenance: Provenance | None = None
    ) -> "FaissIndex":
        faiss = _import_faiss()
        check_tensor("emb", emb, shape=["N", "D"])
        vectors = emb.detach().float().cpu().contiguous().numpy()
        try:
            index = faiss.index_factory(emb.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors)
            index.add(vectors)
        except RuntimeError as error:
            raise ValueError(
                f"factory: faiss cannot build {factory!r} over {list(emb.shape)}: {error}"
            ) from error
        return cls(index, factory, provenance)

    def search(
        self, queries: torch.Tensor, k: int, *, exclude_ids: torch.Tensor | None = None, exact: bool = False
    ) -> TopK:
        check_tensor("queries", queries, shape=["B", self._faiss.d])
        check_int("k", k, minimum=0)
        num_queries = len(queries)
        extra = 0
        if exclude_ids is not None:
            exclude_ids = check_exclude_ids(exclude_ids, num_queries, queries.device).cpu()
            extra = exclude_ids.shape[1]
        wanted = min(k + extra, len(self))
        if wanted == 0 or num_queries == 0:
            scores = torch.full((num_queries, k), -torch.inf)
            return TopK(scores, torch.full((num_queries, k), NO_BLOCK))
        found = self._faiss.search(queries.detach().float().cpu().contiguous().numpy(), wanted)
        scores, ids = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        dropped = ids < 0
        if exclude_ids is not None:
            dropped |= (ids[:, :, None] == exclude_ids[:, None, :]).any(2)
        scores = torch.where(dropped, -torch.inf, scores)
        ids = torch.where(dropped, NO_BLOCK, ids)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
        scores, ids = scores.gather(1, order), ids.gather(1, order)
        missing = k - scores.shape[1]
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        return TopK(
            scores.to(queries.device),
            torch.nn.functional.pad(ids, (0, missing), value=NO_BLOCK).to(queries.device),
        )

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor:
        wanted = torch.as_tensor(ids).cpu().numpy()
        bad = (wanted < 0) | (wanted >= len(self))
        if bad.any():
            raise ValueError(f"ids: {int(wanted[bad][0])} is not in the index")
        return torch.from_numpy(np.stack([self._faiss.reconstruct(int(i)) for i in wanted]))

    def __len__(self) -> int:
        return self._faiss.ntotal

    @property
    def dim(self) -> int:
        return self._faiss.d

    @property
    def provenance(self) -> Provenance | None:
        return self._provenance

    def save(self, path: str | Path) -> None:
        blob = torch.from_numpy(_import_faiss().serialize_index(self._faiss))
        metadata = {"kind": "FaissIndex", "factory": self._factory}
        if self._provenance is not None:
            metadata |= self._provenance.to_metadata()
        with atomic_file(path) as file:
            file.write(save({"faiss": blob}, metadata))

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True, expect: Provenance | None = None) -> "FaissIndex":
        tensors, metadata = _read(Path(path), "FaissIndex")
        provenance = _checked_provenance(metadata, expect, path)
        index = _import_faiss().deserialize_index(tensors["faiss"].numpy())
        return cls(index, metadata["factory"], provenance)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError("FaissIndex needs faiss: pip install 'realm_fast[faiss]'.") from None
    return faiss


def _read(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise DataError(f"{path}: the index file does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise CorruptArtifactError(f"{path}: expected a {kind}, got {json.dumps(metadata)}.")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptArtifactError(f"{path}: not a complete index file ({error}).") from error


def _checked_provenance(
    metadata: dict[str, str], expect: Provenance | None, path: str | Path
) -> Provenance | None:
    provenance = Provenance.from_metadata(metadata)
    if expect is not None:
        if provenance is None:
            raise ProvenanceError(f"{path}: it carries no provenance, but {expect} is expected.")
        provenance.check(expect, str(path))
    return provenance
