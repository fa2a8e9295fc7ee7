"""A block index that lives in a GPU's memory: exact top-k search without a copy to the host.

    index = DeviceIndex.from_embeddings(emb, dtype="int8")     # emb on "cuda"
    scores, ids = index.search(queries, k=8)                   # the float32 answer; no wait for the device

Rows are stored one after the other, as the scan's cp.async wants them. bfloat16 and int8 keep the float32
rows beside the codes: the scan reads the codes, and every row that could be among the k best is scored again
in float32 (docs/ops/mips_topk.md derives the certificate). `MipsIndex` is the index that grows, shrinks and
is saved; this is the one that a training step on a GPU searches (realm_fast/residence.py says when).
"""

import torch
from torch import Tensor

from realm_fast import _native
from realm_fast.device import to_device
from realm_fast.index import MipsIndex, Provenance
from realm_fast.ops._checks import check_choice, check_int, check_tensor
from realm_fast.ops._dispatch import choose_impl
from realm_fast.ops.mips_topk import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_exclude_ids,
    mips_topk,
    run_cuda,
    topk_cuda_reason,
)
from realm_fast.panels import MAX_INT8_DIM
from realm_fast.types import NO_BLOCK, TopK

DTYPES = ("float32", "bfloat16", "int8")
_ROW_BYTES = 16  # rows start at multiples of it, so that cp.async and 128-bit loads may be used
_STORE_BYTES = 64 << 20  # of float32 rows, copied and quantised at a time
# What using an index takes beside it: the temporaries of a part while it is quantised (up to seven times the
# part), or a search's workspace (docs/adr/0005), which is less.
WORKING_BYTES = 8 * _STORE_BYTES
_LEVELS = 127
_CODE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class DeviceIndex:
    """Exact top-k inner-product search over embeddings in device memory."""

    def __init__(self, dtype: str, dim: int, num_rows: int, device: torch.device) -> None:
        """`num_rows` rows of zeros; use `from_embeddings`, or `store` into it, then `seal`."""
        check_choice("dtype", dtype, DTYPES)
        check_int("dim", dim, minimum=1)
        if dtype == "int8" and dim > MAX_INT8_DIM:
            raise ValueError(f"dim: expected at most {MAX_INT8_DIM} for int8, got {dim}")
        self.dtype, self.dim = dtype, dim
        self.provenance: Provenance | None = None
        self.ids: Tensor | None = None  # [N] int64 ascending; None: a row's id is its number
        self.held: object = None  # lives as long as the index: what it was copied from
        code_type = _CODE_TYPES[dtype]
        self.codes = torch.zeros(num_rows, _stride(dim, code_type), dtype=code_type, device=device)[:, :dim]
        self.device = self.codes.device  # "cuda" has become "cuda:0"
        self.originals = self.codes  # [N, D] float32
        self.certified = dtype != "float32"
        if self.certified:
            self.originals = torch.zeros(num_rows, _stride(dim, torch.float32), device=device)[:, :dim]
        side_rows = num_rows if self.certified else 0
        self.residual = torch.zeros(side_rows, device=device)  # [N] |x - x~|, rounded up
        self.norm = torch.zeros(side_rows, device=device)  # [N] |x|, rounded up
        self.bounds = torch.zeros(2, device=device)  # the largest of each
        self.scale = torch.ones(num_rows if dtype == "int8" else 0, device=device)  # [N], int8 only

    @classmethod
    def from_embeddings(
        cls,
        emb: Tensor,
        dtype: str = "float32",
        ids: Tensor | None = None,
        *,
        provenance: Provenance | None = None,
        device: torch.device | str | None = None,
    ) -> "DeviceIndex":
        """Builds an index over a copy of `emb` on `device` (default: where `emb` is).

        Args:
            emb: [N, D] float32, bfloat16 or float16, one row a block.
            dtype: what a search reads: "float32", "bfloat16" or "int8". Answers are float32-exact for each.
            ids: [N] int64 or int32, ascending and distinct, >= 0; None: 0 .. N-1.
            provenance: what the embeddings were made from.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range; a row of a bfloat16 or
                int8 index is not finite.
        """
        check_tensor("emb", emb, shape=["N", "D"], dtypes=FLOAT_DTYPES)
        index = cls(dtype, emb.shape[1], len(emb), torch.device(emb.device if device is None else device))
        if ids is not None:
            check_tensor("ids", ids, shape=[len(emb)], dtypes=ID_DTYPES)
            ids = ids.to(index.device, torch.int64)
            if len(ids) and (int(ids[0]) < 0 or not bool((ids.diff() > 0).all())):
                raise ValueError("ids: expected distinct ids >= 0 in ascending order")
            index.ids = ids.clone()
        index.provenance = provenance
        rows = _store_rows(index.dim)
        for begin in range(0, len(emb), rows):
            index.store(begin, emb[begin : begin + rows])
        index.seal()
        return index

    @classmethod
    def from_index(
        cls, index: MipsIndex, device: torch.device | str, dtype: str | None = None
    ) -> "DeviceIndex":
        """The blocks of a `MipsIndex`, in ascending order of their ids, on a device.

        To a GPU the rows go through pinned memory, on the current stream; returns when they are there.
        """
        ids = index.ids
        copy = cls(index.dtype if dtype is None else dtype, index.dim, len(ids), torch.device(device))
        rows = _store_rows(copy.dim)
        for begin in range(0, len(ids), rows):
            copy.store(begin, index.reconstruct(ids[begin : begin + rows]))
        if not torch.equal(ids, torch.arange(len(ids))):
            copy.ids = to_device(ids, copy.device)
        copy.provenance = index.provenance
        copy.seal()
        return copy

    @staticmethod
    def bytes_needed(dtype: str, dim: int, num_rows: int) -> int:
        """Device memory that an index of this size holds; WORKING_BYTES come on top while it is used."""
        row = (
            _stride(dim, _CODE_TYPES[dtype]) * _CODE_TYPES[dtype].itemsize + 8
        )  # 8: its id, unless all count up
        if dtype != "float32":
            row += _stride(dim, torch.float32) * 4 + 4 + 4  # the original, residual and norm
        return num_rows * (row + (4 if dtype == "int8" else 0))  # scale

    def store(self, first_row: int, emb: Tensor) -> None:
        """Writes rows [first_row, first_row + n) and their codes, on the current stream; then call `seal`.

        Args:
            emb: [n, D] float32, bfloat16 or float16, on any device. Pinned memory is read until the current
                stream has come this far; any other on the host is free when this returns.
        """
        check_tensor("emb", emb, shape=["n", self.dim], dtypes=FLOAT_DTYPES)
        check_int("first_row", first_row, minimum=0, maximum=len(self) - len(emb))
        rows = slice(first_row, first_row + len(emb))
        values = to_device(emb.detach(), self.device).float()
        self.originals[rows] = values
        if not self.certified:
            return
        if self.dtype == "int8":
            largest = values.abs().amax(1)
            scale = torch.where(largest > 0, largest / _LEVELS, 1)
            codes = (values / scale[:, None]).round().clamp(-_LEVELS, _LEVELS)
            self.scale[rows] = scale
            self.codes[rows] = codes.to(torch.int8)
            stored = codes * scale[:, None]
        else:
            self.codes[rows] = values.to(torch.bfloat16)
            stored = self.codes[rows].float()
        # Rounded up: each norm is a sum of dim squares in float32, in whatever order.
        slack = 1 + (self.dim + 16) * 2.0**-23
        self.residual[rows] = torch.linalg.vector_norm(values - stored, dim=1) * slack
        self.norm[rows] = torch.linalg.vector_norm(values, dim=1) * slack

    def seal(self) -> None:
        """Takes the certificate's bounds over all rows. Waits for the device where there are codes.

        Raises:
            ValueError: a row is not finite, or too large for the codes.
        """
        if not self.certified or len(self) == 0:
            return
        bad = ~(self.residual.isfinite() & self.norm.isfinite())
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"emb: row {row} is not finite or too large for {self.dtype} codes; a float32 index takes it"
            )
        torch.stack([self.residual.amax(), self.norm.amax()], out=self.bounds)

    def search(
        self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None, exact: bool = True
    ) -> TopK:
        """The k blocks with the largest inner product with each query.

        Args:
            queries: [B, D] float32, bfloat16 or float16. From another device they are copied to the index's,
                and the answer back; on the index's own, nothing waits for the device.
            k: how many, 0 .. 2048.
            exclude_ids: [B] or [B, E] int64 or int32, beside the queries; per query the ids that may not be
                returned (-1: none).
            exact: True: the float32 answer. False is not offered: the certificate costs too little here.

        Returns:
            TopK(scores [B, k] float32, ids [B, k] int64) where the queries are, by descending score, ties to
            the lower id; -inf and -1 where fewer than k blocks remain.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range, exclude_ids are not
                beside the queries, or this build or this device cannot run the kernels.
            torch.OutOfMemoryError: no memory for the workspace; the index stays as it is.
        """
        check_tensor("queries", queries, shape=["B", self.dim], dtypes=FLOAT_DTYPES)
        check_int("k", k, minimum=0)
        if not exact:
            raise ValueError("exact: a DeviceIndex always gives the float32 answer, expected True, got False")
        if exclude_ids is not None:
            exclude_ids = to_device(check_exclude_ids(exclude_ids, queries), self.device)
            if self.ids is not None:
                exclude_ids = _rows_of(exclude_ids, self.ids)
        values = to_device(queries.detach(), self.device).float().contiguous()
        if not self.certified:
            impl = "cuda" if self.codes.is_cuda else "auto"
            scores, ids = mips_topk(values, self.codes, k, exclude_ids=exclude_ids, impl=impl)
        else:
            choose_impl("DeviceIndex.search", "cuda", {"cuda": lambda: topk_cuda_reason(values, k)})
            scores, ids = run_cuda(self._call(values, k), values, k, exclude_ids)
        if self.ids is not None and len(self.ids):
            ids = torch.where(ids >= 0, self.ids[ids.clamp(min=0)], NO_BLOCK)
        if queries.device == self.device:
            return TopK(scores, ids)
        return TopK(scores.to(queries.device), ids.to(queries.device))

    def _call(self, queries: Tensor, k: int):
        call = _native.MipsTopkCuda(
            dtype=self.dtype,
            queries=queries.data_ptr(),
            num_queries=len(queries),
            query_stride=self.dim,
            blocks=self.codes.data_ptr(),
            num_blocks=len(self),
            block_stride=self.codes.stride(0),
            dim=self.dim,
            k=k,
        )
        call.certify(
            originals=self.originals.data_ptr(),
            original_stride=self.originals.stride(0),
            scale=self.scale.data_ptr(),
            residual=self.residual.data_ptr(),
            norm=self.norm.data_ptr(),
            bounds=self.bounds.data_ptr(),
        )
        return call

    def reconstruct(self, ids: Tensor) -> Tensor:
        """[n, D] float32, on the index's device. Waits for it only if `ids` are there or looked up there.

        Raises:
            ValueError: an id is not in the index.
        """
        wanted = check_tensor("ids", ids, shape=["n"], dtypes=ID_DTYPES).long()
        rows = wanted if self.ids is None else _rows_of(to_device(wanted, self.device), self.ids)
        missing = (rows < 0) | (rows >= len(self))
        if bool(missing.any()):
            raise ValueError(f"ids: {int(wanted[missing.to(wanted.device)][0])} is not in the index")
        return self.originals[to_device(rows, self.device)]

    def __len__(self) -> int:
        return len(self.codes)

    def tensors(self) -> list[Tensor]:
        """Everything the index holds, each memory once."""
        held = [self.codes, self.residual, self.norm, self.bounds, self.scale]
        held += [self.originals] if self.certified else []
        return held if self.ids is None else [*held, self.ids]

    @property
    def nbytes(self) -> int:
        """Device memory held."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())


def _stride(dim: int, dtype: torch.dtype) -> int:
    """Elements from one row to the next."""
    per_row = _ROW_BYTES // dtype.itemsize
    return -(-dim // per_row) * per_row


def _store_rows(dim: int) -> int:
    return max(_STORE_BYTES // (4 * dim), 1)


def _rows_of(ids: Tensor, known: Tensor) -> Tensor:
    """Places of ids among `known` (ascending), NO_BLOCK for those not there."""
    if len(known) == 0:
        return torch.full_like(ids, NO_BLOCK)
    wanted = ids.long()
    rows = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[rows] == wanted, rows, NO_BLOCK)
