"""The block index: exact top-k search over embeddings, as one file on disk and one object in memory.

    index = MipsIndex.from_embeddings(emb, dtype="int8")
    scores, ids = index.search(queries, k=8)          # the float32 answer, at a quarter of the traffic
    index.update(ids, new_emb); index.delete(old_ids); index.add(more_emb)
    index.save("blocks.safetensors"); MipsIndex.load("blocks.safetensors")

How a search in bfloat16 or int8 can return the float32 answer, and when it must fall back, is derived in
docs/ops/mips_topk.md. `FaissIndex` offers faiss's approximate indexes behind the same protocol.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from realm_fast import _native, index_file
from realm_fast.errors import CorruptArtifactError, MissingDependencyError, ProvenanceError
from realm_fast.ops._checks import check_choice, check_int, check_tensor
from realm_fast.ops.mips_topk import FLOAT_DTYPES, ID_DTYPES, check_exclude_ids
from realm_fast.panels import MAX_INT8_DIM, STEP_VALUES, Slab, allocate, padded
from realm_fast.types import NO_BLOCK, TopK

LAYOUT_VERSION = 1  # of the panels and of the file
DTYPES = ("float32", "bfloat16", "int8")
_PANEL_FILE_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "U8"}
_GROWTH = 0.25  # a new slab has room for at least this share of the rows there are
_STORE_ROWS = 48 * 1024  # rows converted to float32 at a time


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
        self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None, exact: bool = True
    ) -> TopK: ...

    def reconstruct(self, ids: Tensor) -> Tensor: ...

    def __len__(self) -> int: ...

    @property
    def provenance(self) -> Provenance | None: ...


@dataclass
class _Ranks:
    """The order of ids where rows are not in it; a rank (the native "key") is an id's place among them."""

    key_of_row: np.ndarray  # [rows] uint32; arbitrary for deleted rows
    row_of_key: np.ndarray  # [live] int64
    ids: np.ndarray  # [live] int64, ascending


class _SharedLock:
    """Many searches at a time, or one change; a waiting change goes before later searches."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writers = 0  # waiting or at work
        self._writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._writers == 0)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._condition:
            self._writers += 1
            try:
                self._condition.wait_for(lambda: self._readers == 0 and not self._writing)
            except BaseException:
                self._writers -= 1
                self._condition.notify_all()
                raise
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writers -= 1
                self._writing = False
                self._condition.notify_all()


@dataclass
class _Rows:
    """What a search reads. `MipsIndex.publish` swaps it whole; changes in place hold `lock`."""

    dim: int
    dtype: str
    originals_file: Path | None
    num_files: int = 0
    slabs: list[Slab] = field(default_factory=list)  # all but the last are full
    ids: np.ndarray | None = None  # [>= num_rows] int64; None: a row's id is its number
    alive: np.ndarray | None = None  # [>= num_rows] bool; None: all are
    num_rows: int = 0
    num_deleted: int = 0
    next_id: int = 0
    irregular: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # rows, ascending
    in_order: bool = True  # ids ascend with rows
    ranks: _Ranks | None = None  # made when needed; dropped when ids change
    provenance: "Provenance | None" = None
    lock: _SharedLock = field(default_factory=_SharedLock)
    held: object = None  # lives as long as the rows do: what keeps a mapped snapshot from being deleted

    def ids_of_all(self) -> np.ndarray:
        return np.arange(self.num_rows) if self.ids is None else self.ids[: self.num_rows]

    def ordered(self) -> _Ranks | None:
        if self.in_order:
            return None
        if self.ranks is None:
            ids = self.ids_of_all()
            live = (
                np.arange(self.num_rows)
                if self.alive is None
                else np.flatnonzero(self.alive[: self.num_rows])
            )
            row_of_key = live[np.argsort(ids[live], kind="stable")]
            key_of_row = np.zeros(self.num_rows, np.uint32)
            key_of_row[row_of_key] = np.arange(len(row_of_key), dtype=np.uint32)
            self.ranks = _Ranks(key_of_row, row_of_key, ids[row_of_key])
        return self.ranks

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, rows) of ids; -1 for those the index does not hold."""
        ranks = self.ordered()
        if ranks is None and self.ids is None:
            keys = np.where((ids >= 0) & (ids < self.num_rows), ids, -1)
        else:
            known = self.ids_of_all() if ranks is None else ranks.ids
            if len(known) == 0:
                return np.full(ids.shape, -1), np.full(ids.shape, -1)
            keys = np.searchsorted(known, ids)
            keys = np.where(keys < len(known), keys, 0)
            keys = np.where(known[keys] == ids, keys, -1)
        rows = keys if ranks is None else np.where(keys >= 0, ranks.row_of_key[np.maximum(keys, 0)], -1)
        if self.alive is not None and self.num_rows:
            dead = (rows >= 0) & ~self.alive[np.maximum(rows, 0)]
            keys, rows = np.where(dead, -1, keys), np.where(dead, -1, rows)
        return keys, rows

    def by_slab(self, rows: np.ndarray) -> Iterator[tuple[Slab, np.ndarray, np.ndarray]]:
        """(slab, rows inside it, their places in `rows`)."""
        base = 0
        for slab in self.slabs:
            places = np.flatnonzero((rows >= base) & (rows < base + slab.num_rows))
            if len(places):
                yield slab, np.ascontiguousarray(rows[places] - base), places
            base += slab.num_rows

    def next_file(self) -> Path | None:
        """Where the next slab's originals go: the path that was asked for, then that path with a number."""
        file, number = self.originals_file, self.num_files
        self.num_files += 1
        return file if file is None or number == 0 else file.with_name(f"{file.name}.{number}")

    def append(self, values: np.ndarray, capacity: int) -> None:
        """Stores rows after the last; opens a slab of at least `capacity` rows when the last one is full."""
        irregular = []
        while len(values):
            if not self.slabs or self.slabs[-1].num_rows == self.slabs[-1].capacity:
                room = max(capacity, len(values))
                self.slabs.append(Slab.new(self.dtype, self.dim, room, self.next_file()))
            slab = self.slabs[-1]
            part = values[: slab.capacity - slab.num_rows]
            irregular.append(np.flatnonzero(slab.append(part)) + self.num_rows)
            self.num_rows += len(part)
            values = values[len(part) :]
        self.irregular = np.concatenate([self.irregular, *irregular])

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Takes back the rows appended inside if it ends in an exception."""
        num_slabs, num_rows, irregular = len(self.slabs), self.num_rows, self.irregular
        last = self.slabs[-1].num_rows if self.slabs else 0
        try:
            yield
        except BaseException:
            del self.slabs[num_slabs:]
            if self.slabs:
                self.slabs[-1].truncate(last)
            self.num_rows, self.irregular = num_rows, irregular
            raise


class MipsIndex:
    """Exact top-k inner-product search over a set of embeddings that may change.

    Searches may run in any number of threads, beside changes (`add`, `update`, `delete`, which wait for the
    searches under way) and beside `publish` (which waits for nobody). Tensors on other devices are copied
    to the CPU, results come back on the queries' device.
    """

    def __init__(self, rows: _Rows) -> None:
        """Use `from_embeddings`, `load` or `from_faiss`."""
        self._rows = rows
        self._changing = threading.Lock()
        self._counting = threading.Lock()
        self._counts = {"searches": 0, "queries": 0, "rescored": 0, "fell_back": 0, "repeated": 0}
        self.max_candidates = (
            0  # per query and thread before an exact low-precision search falls back; 0: default
        )

    @classmethod
    def from_embeddings(
        cls,
        emb: Tensor,
        dtype: str = "float32",
        ids: Tensor | None = None,
        *,
        provenance: Provenance | None = None,
        originals: str | Path = "memory",
    ) -> "MipsIndex":
        """Builds an index over a copy of `emb`.

        Args:
            emb: [N, D] float32, bfloat16 or float16, one row a block; N may be 0, D not.
            dtype: what a search reads: "float32", "bfloat16" or "int8". Answers are float32-exact for each.
            ids: [N] int64 or int32, distinct and >= 0; None: 0 .. N-1.
            provenance: what the embeddings were made from.
            originals: where bfloat16 and int8 keep the float32 rows that exact answers need: "memory", or
                the path of a file to be created and mapped.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range.
        """
        check_choice("dtype", dtype, DTYPES)
        check_tensor("emb", emb, shape=["N", "D"], dtypes=FLOAT_DTYPES)
        if emb.shape[1] == 0:
            raise ValueError(f"emb: expected at least one column, got {list(emb.shape)}")
        if dtype == "int8" and emb.shape[1] > MAX_INT8_DIM:
            raise ValueError(f"emb: expected at most {MAX_INT8_DIM} columns for int8, got {emb.shape[1]}")
        originals_file = None if originals == "memory" else Path(originals)
        if originals_file is not None and dtype == "float32":
            raise ValueError(
                "originals: a float32 index keeps its rows in the panels it scans; expected 'memory'"
            )
        index = cls(_Rows(emb.shape[1], dtype, originals_file, provenance=provenance))
        index.add(emb, ids)
        return index

    @classmethod
    def from_slab(
        cls, slab: Slab, irregular: np.ndarray, *, first_id: int = 0, provenance: Provenance | None = None
    ) -> "MipsIndex":
        """An index over rows that lie in its layout already (see realm_fast.index_builder).

        Args:
            slab: its rows, handed over; the padding of its last panel cleared.
            irregular: int64, ascending: rows that only float32 can hold.
            first_id: the id of row 0; the others count on from it.
        """
        rows = _Rows(slab.dim, slab.dtype, None, provenance=provenance)
        if slab.num_rows:
            rows.slabs = [slab]
        rows.num_rows, rows.irregular = slab.num_rows, irregular
        rows.next_id = first_id + slab.num_rows
        if first_id:
            rows.ids = np.arange(first_id, rows.next_id)
        return cls(rows)

    @contextmanager
    def _change(self) -> Iterator[_Rows]:
        """The rows, with nobody else reading or changing them."""
        with self._changing:
            rows = self._rows
            with rows.lock.writing():
                yield rows

    def search(
        self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None, exact: bool = True
    ) -> TopK:
        """The k blocks with the largest inner product with each query.

        Args:
            queries: [B, D] float32, bfloat16 or float16.
            k: how many, at least 0.
            exclude_ids: [B] or [B, E] int64 or int32; per query the ids that may not be returned (-1:
            none). An id
                the index does not hold could not be returned anyway and is ignored.
            exact: True: ids and scores are those of float32, whatever dtype the scan reads. False: scores as
                stored, without the second look at the originals.

        Returns:
            TopK(scores [B, k] float32, ids [B, k] int64), by descending score, ties to the lower id; -inf
            and -1 where fewer than k blocks remain.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range.
        """
        rows = self._rows
        check_tensor("queries", queries, shape=["B", rows.dim], dtypes=FLOAT_DTYPES)
        check_int("k", k, minimum=0)
        values = queries.detach().to("cpu", torch.float32).contiguous()
        excluded = None
        if exclude_ids is not None:
            excluded = check_exclude_ids(exclude_ids, queries).detach().cpu().numpy().astype(np.int64)
            if excluded.size and excluded.min() < NO_BLOCK:
                raise ValueError(f"exclude_ids: expected ids, or -1 for none; got {excluded.min()}")
        scores = torch.empty(len(values), k)
        keys = torch.empty(len(values), k, dtype=torch.int64)
        with rows.lock.reading():
            ranks = rows.ordered()
            if excluded is not None:
                excluded = np.ascontiguousarray(rows.find(excluded)[0])
            rescored, fell_back, repeated = _native.mips_index_search(
                rows.dtype,
                [slab.native() for slab in rows.slabs],
                rows.dim,
                values.data_ptr(),
                len(values),
                k,
                0 if excluded is None else excluded.ctypes.data,
                0 if excluded is None else excluded.shape[1],
                0 if ranks is None else ranks.key_of_row.ctypes.data,
                rows.irregular.tolist(),
                exact,
                self.max_candidates,
                torch.get_num_threads(),
                scores.data_ptr(),
                keys.data_ptr(),
            )
            ids = keys
            if ranks is not None or rows.ids is not None:
                known = torch.from_numpy(rows.ids_of_all() if ranks is None else ranks.ids)
                if len(known):
                    ids = torch.where(keys >= 0, known[keys.clamp(min=0)], NO_BLOCK)
        with self._counting:
            self._counts["searches"] += 1
            self._counts["queries"] += len(values)
            self._counts["rescored"] += rescored
            self._counts["fell_back"] += fell_back
            self._counts["repeated"] += repeated
        return TopK(scores.to(queries.device), ids.to(queries.device))

    def add(self, emb: Tensor, ids: Tensor | None = None) -> None:
        """Adds blocks; nothing that is stored already moves or is copied.

        Args:
            emb: [n, D] float32, bfloat16 or float16.
            ids: [n], distinct, >= 0, not in the index; None: counting on from the largest id ever held.

        Raises:
            TypeError, ValueError: as for `from_embeddings`, or an id is in the index already. Nothing is
            changed.
        """
        check_tensor("emb", emb, shape=["N", self.dim], dtypes=FLOAT_DTYPES)
        count = len(emb)
        new = None if ids is None else _check_ids(ids, count)
        with self._change() as rows:
            if new is None:
                new = np.arange(rows.next_id, rows.next_id + count)
            elif len(taken := new[rows.find(new)[0] >= 0]):
                raise ValueError(f"ids: {int(taken[0])} is in the index already (`update` changes it)")
            if count == 0:
                return
            first = rows.num_rows
            capacity = count if first == 0 else max(count, int(first * _GROWTH))
            with rows.all_or_nothing():
                for begin in range(0, count, _STORE_ROWS):
                    rows.append(_float_rows(emb[begin : begin + _STORE_ROWS]), capacity - begin)
                ids_before = rows.ids
                if ids_before is not None or int(new[0]) != first or bool((np.diff(new) != 1).any()):
                    rows.ids = _grown(np.arange(first) if ids_before is None else ids_before, first, new)
                if rows.alive is not None:
                    rows.alive = _grown(rows.alive, first, np.ones(count, bool))
            last = -1 if first == 0 else first - 1 if ids_before is None else int(ids_before[first - 1])
            rows.in_order = rows.in_order and int(new[0]) > last and bool((np.diff(new) > 0).all())
            rows.next_id = max(rows.next_id, int(new.max()) + 1)
            rows.ranks = None

    def update(self, ids: Tensor, emb: Tensor) -> None:
        """Overwrites blocks in place.

        Args:
            ids: [n] int64 or int32, distinct, all in the index.
            emb: [n, D] float32, bfloat16 or float16.

        Raises:
            TypeError, ValueError: wrong type, shape or dtype, or an id is absent or named twice. Nothing is
            changed.
        """
        check_tensor("emb", emb, shape=["n", self.dim], dtypes=FLOAT_DTYPES)
        wanted = _check_ids(ids, len(emb))
        with self._change() as rows:
            where = _find_all(rows, wanted)
            irregular = np.zeros(len(where), bool)
            for slab, local, places in rows.by_slab(where):
                for begin in range(0, len(places), _STORE_ROWS):
                    some = places[begin : begin + _STORE_ROWS]
                    part = _float_rows(emb[torch.from_numpy(some)])
                    irregular[some] = slab.store(local[begin : begin + _STORE_ROWS], part)
            rows.irregular = np.union1d(np.setdiff1d(rows.irregular, where), where[irregular])

    def delete(self, ids: Tensor) -> None:
        """Removes blocks. Their space is given back by `compact`.

        Raises:
            TypeError, ValueError: an id is absent or named twice. Nothing is changed.
        """
        wanted = _check_ids(ids, None)
        with self._change() as rows:
            where = _find_all(rows, wanted)
            if rows.alive is None:
                rows.alive = np.ones(rows.num_rows, bool)
            for slab, local, _ in rows.by_slab(where):
                slab.delete(local)
            rows.alive[where] = False
            rows.num_deleted += len(where)
            rows.irregular = np.setdiff1d(rows.irregular, where)
            rows.ranks = None

    def compact(self) -> None:
        """Rebuilds the index without the rows of deleted blocks; searches go on meanwhile."""
        with self._changing:
            old = self._rows
            new = _Rows(
                old.dim,
                old.dtype,
                old.originals_file,
                old.num_files,
                next_id=old.next_id,
                provenance=old.provenance,
            )
            live = np.arange(old.num_rows) if old.alive is None else np.flatnonzero(old.alive[: old.num_rows])
            for begin in range(0, len(live), _STORE_ROWS):
                part = live[begin : begin + _STORE_ROWS]
                new.append(_load(old, part), len(live) - begin)
            new.ids = np.ascontiguousarray(old.ids_of_all()[live])
            new.in_order = bool((np.diff(new.ids) > 0).all())
            self._rows = new
            for slab in old.slabs:  # searches under way keep their mapping of a deleted file
                if isinstance(slab.originals, np.memmap) and slab.originals.filename is not None:
                    Path(slab.originals.filename).unlink(missing_ok=True)

    def publish(self, new: "MipsIndex") -> None:
        """Searches that begin from now on see `new`; those under way end on what they began with.

        Waits for no search. `new` hands its rows over and is left empty.

        Raises:
            ValueError: `new` is of another width.
        """
        if new is self:
            return
        with self._changing:
            if new.dim != self.dim:
                raise ValueError(f"new: expected embeddings of width {self.dim}, got {new.dim}")
            with new._changing:
                self._rows, new._rows = new._rows, _Rows(new.dim, new.dtype, None)

    def reconstruct(self, ids: Tensor) -> Tensor:
        """The embeddings of ids, float32 [n, D], as they were given (bfloat16 and int8: the originals).

        Raises:
            TypeError, ValueError: an id is absent.
        """
        rows = self._rows
        wanted = _check_ids(ids, None, distinct=False)
        with rows.lock.reading():
            return torch.from_numpy(_load(rows, _find_all(rows, wanted)))

    @property
    def ids(self) -> Tensor:
        """All ids, ascending, int64 [N]."""
        rows = self._rows
        with rows.lock.reading():
            ids = rows.ids_of_all()
            live = ids if rows.alive is None else ids[rows.alive[: rows.num_rows]]
            return torch.from_numpy(np.sort(live))

    def stats(self) -> dict[str, int]:
        """Counters since the index was made, and where its bytes are.

        Returns:
            searches, queries;
            rescored: rows looked at again in float32 by exact bfloat16 and int8 searches;
            fell_back: queries that needed a float32 scan of the originals;
            repeated: queries with a large k that were scanned twice, because a sample of the blocks misled;
            blocks, deleted_rows, irregular_rows (bfloat16, int8: rows that only float32 can hold), slabs;
            memory_bytes, mapped_bytes: their sum is `nbytes`.
        """
        rows = self._rows
        mapped = sum(slab.bytes_by_name[name] for slab in rows.slabs for name in slab.mapped)
        with self._counting:
            counts = dict(self._counts)
        return {
            **counts,
            "blocks": len(self),
            "deleted_rows": rows.num_deleted,
            "irregular_rows": len(rows.irregular),
            "slabs": len(rows.slabs),
            "memory_bytes": self.nbytes - mapped,
            "mapped_bytes": mapped,
        }

    def __len__(self) -> int:
        return self._rows.num_rows - self._rows.num_deleted

    @property
    def dim(self) -> int:
        return self._rows.dim

    @property
    def dtype(self) -> str:
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of every array the index holds, in memory or mapped from a file, room for growth included."""
        rows = self._rows
        ranks = () if rows.ranks is None else (rows.ranks.key_of_row, rows.ranks.row_of_key, rows.ranks.ids)
        arrays = (rows.ids, rows.alive, rows.irregular, *ranks)
        return sum(sum(slab.bytes_by_name.values()) for slab in rows.slabs) + sum(
            array.nbytes for array in arrays if array is not None
        )

    @property
    def provenance(self) -> Provenance | None:
        return self._rows.provenance

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file, streamed and atomic.

        Raises:
            DiskFullError, DataError: it could not be written; what stood at `path` is untouched.
        """
        rows = self._rows
        with rows.lock.reading():
            metadata = {
                "kind": "MipsIndex",
                "layout_version": str(LAYOUT_VERSION),
                "dtype": rows.dtype,
                "dim": str(rows.dim),
                "num_rows": str(rows.num_rows),
                "next_id": str(rows.next_id),
                "in_order": str(int(rows.in_order)),
            }
            if rows.provenance is not None:
                metadata |= rows.provenance.to_metadata()
            index_file.write(Path(path), metadata, _tensors(rows))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mmap: bool = True,
        expect: Provenance | None = None,
        verify: bool | None = None,
        originals: str = "memory",
    ) -> "MipsIndex":
        """Opens a saved index.

        Args:
            path: the file.
            mmap: True: map it, in a time that does not depend on its size; pages are read as searches touch
            them,
                and changes to the index stay in memory. False: read it into memory (huge pages: a little
                faster).
            expect: the encoder and corpus it must have been built from; the step may differ.
            verify: hash the data too (reads all of it); None: only when it is read anyway (mmap=False).
            originals: with mmap=False, whether bfloat16 and int8 read their float32 rows into "memory" or
            leave
                them "mapped".

        Raises:
            DataError: there is no such file.
            CorruptArtifactError: it is no index, or truncated, or altered.
            ProvenanceError: it was built from another encoder or corpus than `expect`.
        """
        path = Path(path)
        check_choice("originals", originals, ("memory", "mapped"))
        tensors, metadata = _read_file(path, verify=not mmap if verify is None else verify)
        provenance = _checked_provenance(metadata, expect, path)
        rows = _Rows(int(metadata["dim"]), metadata["dtype"], None, provenance=provenance)
        rows.num_rows, rows.next_id = int(metadata["num_rows"]), int(metadata["next_id"])
        arrays = {name: tensors[name] for name in Slab.ARRAYS if name in tensors}
        mapped = set(arrays) if mmap else {"originals"} & set(arrays) if originals == "mapped" else set()
        for name in set(arrays) - mapped:
            copy = allocate(arrays[name].shape, arrays[name].dtype.type)
            copy[...] = arrays[name]
            arrays[name] = copy
        if rows.num_rows:
            rows.slabs = [Slab(rows.dtype, rows.dim, rows.num_rows, mapped=mapped, **arrays)]
        rows.irregular = np.array(tensors["irregular"])
        if "ids" in tensors:
            rows.ids = np.array(tensors["ids"])
            rows.in_order = metadata["in_order"] == "1"
        if "alive" in tensors:
            rows.alive = np.array(tensors["alive"])
            rows.num_deleted = rows.num_rows - int(rows.alive.sum())
        return cls(rows)

    @classmethod
    def map_shards(
        cls,
        paths: Sequence[str | Path],
        header_hashes: Sequence[str],
        *,
        provenance: Provenance | None = None,
        held: object = None,
        verify: bool = False,
    ) -> "MipsIndex":
        """Maps files that hold an index in pieces, each a stretch of rows: row i over all of them is block i.

        Takes a time that grows with the number of files, not with their size; nothing is copied.

        Args:
            paths: the files, in the order of their rows; of one dtype and width, without deleted rows.
            header_hashes: the `header_sha256` that each must have (which also says what its data hashes to).
            provenance: of the whole.
            held: kept alive as long as the rows are.
            verify: hash the data too, which reads all of it.

        Raises:
            DataError: a file does not exist.
            CorruptArtifactError: one is not the file that was meant, or not as it was written.
        """
        rows: _Rows | None = None
        irregular = []
        for path, header_hash in zip(map(Path, paths), header_hashes, strict=True):
            tensors, metadata = _read_file(path, verify=verify)
            if metadata["header_sha256"] != header_hash:
                raise CorruptArtifactError(
                    f"{path}: a whole index file, but another one than was written here."
                )
            dim, dtype, count = int(metadata["dim"]), metadata["dtype"], int(metadata["num_rows"])
            if rows is None:
                rows = _Rows(dim, dtype, None, provenance=provenance, held=held)
            if (rows.dim, rows.dtype) != (dim, dtype) or "alive" in tensors:
                raise CorruptArtifactError(
                    f"{path}: expected {rows.dtype} rows of width {rows.dim}, none of them deleted."
                )
            arrays = {name: tensors[name] for name in Slab.ARRAYS if name in tensors}
            rows.slabs.append(Slab(dtype, dim, count, mapped=set(arrays), **arrays))
            irregular.append(tensors["irregular"] + rows.num_rows)
            rows.num_rows += count
        if rows is None:
            raise ValueError("paths: expected at least one file")
        rows.next_id = rows.num_rows
        rows.irregular = np.concatenate(irregular)
        return cls(rows)

    def to_faiss(self) -> Any:
        """A faiss.IndexFlatIP over the same embeddings, inside an IndexIDMap2 where ids are not 0 .. N-1."""
        faiss = _import_faiss()
        ids = self.ids
        flat = faiss.IndexFlatIP(self.dim)
        plain = bool((ids == torch.arange(len(ids))).all())
        index = flat if plain else faiss.IndexIDMap2(flat)
        for begin in range(0, len(ids), _STORE_ROWS):
            part = ids[begin : begin + _STORE_ROWS]
            values = self.reconstruct(part).numpy()
            if plain:
                index.add(values)
            else:
                index.add_with_ids(values, part.numpy())
        return index

    @classmethod
    def from_faiss(
        cls, faiss_index: Any, dtype: str = "float32", *, provenance: Provenance | None = None
    ) -> "MipsIndex":
        """An exact index over the vectors of a faiss inner-product index (of a quantised one: as it decodes
        them).

        Raises:
            ValueError: its metric is not the inner product, or it cannot give its vectors back.
        """
        faiss = _import_faiss()
        if faiss_index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError("faiss_index: expected the metric METRIC_INNER_PRODUCT")
        inner, ids = faiss_index, None
        if hasattr(faiss_index, "id_map"):
            ids = torch.from_numpy(faiss.vector_to_array(faiss_index.id_map))
            inner = faiss.downcast_index(faiss_index.index)
        index = cls.from_embeddings(torch.empty(0, inner.d), dtype, provenance=provenance)
        for begin in range(0, inner.ntotal, _STORE_ROWS):
            count = min(_STORE_ROWS, inner.ntotal - begin)
            try:
                values = torch.from_numpy(inner.reconstruct_n(begin, count))
            except RuntimeError as error:
                raise ValueError(f"faiss_index: it cannot give its vectors back: {error}") from error
            index.add(values, None if ids is None else ids[begin : begin + count])
        return index


def _float_rows(emb: Tensor) -> np.ndarray:
    return emb.detach().to("cpu", torch.float32).contiguous().numpy()


def _grown(array: np.ndarray, used: int, more: np.ndarray) -> np.ndarray:
    """`array[:used]` followed by `more`, with room to grow: appending is cheap on average."""
    if used + len(more) > len(array):
        room = np.empty(max(used + len(more), int(used * (1 + _GROWTH))), array.dtype)
        room[:used] = array[:used]
        array = room
    array[used : used + len(more)] = more
    return array


def _check_ids(ids: Tensor, count: int | None, *, distinct: bool = True) -> np.ndarray:
    shape = ["n" if count is None else count]
    values = check_tensor("ids", ids, shape=shape, dtypes=ID_DTYPES).detach().cpu().numpy().astype(np.int64)
    if values.size and values.min() < 0:
        raise ValueError(f"ids: expected ids >= 0, got {values.min()}")
    if distinct and values.size > 1:
        ordered = np.sort(values)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise ValueError(f"ids: {int(repeated[0])} is named more than once")
    return values


def _find_all(rows: _Rows, ids: np.ndarray) -> np.ndarray:
    where = rows.find(ids)[1]
    if where.size and where.min() < 0:
        raise ValueError(f"ids: {int(ids[where < 0][0])} is not in the index")
    return where


def _load(rows: _Rows, where: np.ndarray) -> np.ndarray:
    values = np.empty((len(where), rows.dim), np.float32)
    for slab, local, places in rows.by_slab(where):
        values[places] = slab.load(local)
    return values


def _tensors(rows: _Rows) -> dict[str, index_file.Tensor]:
    """The file's tensors; those of 64-byte multiples first, so that they stay aligned."""
    count = padded(rows.num_rows)
    steps = -(-rows.dim // STEP_VALUES[rows.dtype])
    per_step = STEP_VALUES[rows.dtype]

    def pieces(name: str, unit: int) -> Iterator[np.ndarray]:
        for slab in rows.slabs:
            array = getattr(slab, name)
            yield array[: padded(slab.num_rows) // unit]

    shape = (count // 48, steps, 48) if per_step == 1 else (count // 48, steps, 48, per_step)
    tensors = {"panels": index_file.Tensor(_PANEL_FILE_TYPES[rows.dtype], shape, pieces("panels", 48))}
    if rows.dtype != "float32":
        for name in ("scale",) * (rows.dtype == "int8") + ("residual_norm", "norm"):
            tensors[name] = index_file.Tensor("F32", (count,), pieces(name, 1))
        tensors["panel_bounds"] = index_file.Tensor("F32", (count // 48, 2), pieces("panel_bounds", 48))
    tensors["irregular"] = index_file.Tensor("I64", rows.irregular.shape, [rows.irregular])
    if rows.ids is not None:
        tensors["ids"] = index_file.Tensor("I64", (rows.num_rows,), [rows.ids_of_all()])
    if rows.dtype != "float32":
        tensors["originals"] = index_file.Tensor("F32", (count, rows.dim), pieces("originals", 1))
    if rows.alive is not None:
        tensors["alive"] = index_file.Tensor("BOOL", (rows.num_rows,), [rows.alive[: rows.num_rows]])
    return tensors


class FaissIndex:
    """Approximate search by faiss, behind the same protocol. Exclusion is by over-retrieval."""

    def __init__(self, faiss_index: Any, factory: str, provenance: Provenance | None) -> None:
        self._faiss, self._factory, self._provenance = faiss_index, factory, provenance

    @classmethod
    def from_embeddings(
        cls, emb: Tensor, factory: str = "HNSW32", *, provenance: Provenance | None = None
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
        self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None, exact: bool = False
    ) -> TopK:
        check_tensor("queries", queries, shape=["B", self._faiss.d])
        check_int("k", k, minimum=0)
        num_queries = len(queries)
        extra = 0
        if exclude_ids is not None:
            exclude_ids = check_exclude_ids(exclude_ids, queries).cpu()
            extra = exclude_ids.shape[1]
        wanted = min(k + extra, len(self))
        if wanted == 0 or num_queries == 0:
            scores = torch.full((num_queries, k), -torch.inf, device=queries.device)
            return TopK(scores, torch.full_like(scores, NO_BLOCK, dtype=torch.int64))
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

    def reconstruct(self, ids: Tensor) -> Tensor:
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
        """Writes one .safetensors file, atomically."""
        blob = _import_faiss().serialize_index(self._faiss)
        metadata = {"kind": "FaissIndex", "factory": self._factory}
        if self._provenance is not None:
            metadata |= self._provenance.to_metadata()
        index_file.write(Path(path), metadata, {"faiss": index_file.Tensor("U8", blob.shape, [blob])})

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True, expect: Provenance | None = None) -> "FaissIndex":
        """Reads a saved index, always into memory, always checking its hash; `mmap` is for the protocol."""
        tensors, metadata = index_file.read(Path(path), "FaissIndex", verify=True)
        provenance = _checked_provenance(metadata, expect, Path(path))
        index = _import_faiss().deserialize_index(np.array(tensors["faiss"]))
        return cls(index, metadata["factory"], provenance)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError("this needs faiss: pip install 'realm_fast[faiss]'.") from None
    return faiss


def _read_file(path: Path, *, verify: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    tensors, metadata = index_file.read(path, "MipsIndex", verify=verify)
    if metadata["layout_version"] != str(LAYOUT_VERSION):
        raise CorruptArtifactError(
            f"{path}: its layout is version {metadata['layout_version']}, this library reads "
            f"{LAYOUT_VERSION}; build the index again."
        )
    return tensors, metadata


def _checked_provenance(metadata: dict[str, str], expect: Provenance | None, path: Path) -> Provenance | None:
    provenance = Provenance.from_metadata(metadata)
    if expect is not None:
        if provenance is None:
            raise ProvenanceError(f"{path}: it carries no provenance, but {expect} is expected.")
        provenance.check(expect, str(path))
    return provenance
