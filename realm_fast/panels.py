"""The storage of a MipsIndex: stretches of rows ("slabs") in the panel layout that the native scan reads.

Rows stand in panels of 48, step-major inside a panel (csrc/mips_topk/kernels.h). A row that does not exist,
because it is padding or was deleted, holds NaN, which no comparison lets through. Slabs are never moved or
copied when rows
are added: another slab is opened instead.
"""

import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from realm_fast import _native

PANEL_ROWS = 48
STEP_VALUES = {"float32": 1, "bfloat16": 2, "int8": 4}  # values of a row in a step of 4 bytes
PANEL_TYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.uint8}
MAX_INT8_DIM = 65536  # beyond it a sum of products may leave int32
_HUGE_PAGE_BYTES = 2 << 20


def padded(rows: int) -> int:
    return -(-rows // PANEL_ROWS) * PANEL_ROWS


def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeroed memory, resident when touched; large arrays ask for huge pages (fewer TLB misses)."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < _HUGE_PAGE_BYTES:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


@dataclass
class Slab:
    """Rows [0, num_rows) of a stretch with room for `capacity` rows, a multiple of 48."""

    dtype: str
    dim: int
    num_rows: int
    panels: np.ndarray  # [panels, steps, 48, values in a step]
    scale: np.ndarray | None = None  # [capacity] float32, int8 only
    residual_norm: np.ndarray | None = None  # [capacity] float32 >= |row - stored row|; low precision only
    norm: np.ndarray | None = None  # [capacity] float32 >= |stored row|
    panel_bounds: np.ndarray | None = None  # [panels, 2] float32, the largest residual_norm and norm
    originals: np.ndarray | None = None  # [capacity or num_rows, dim] float32; low precision only
    mapped: set[str] = field(default_factory=set)  # names of the arrays that live in a mapped file

    ARRAYS = ("panels", "scale", "residual_norm", "norm", "panel_bounds", "originals")

    @classmethod
    def new(cls, dtype: str, dim: int, capacity: int, originals_file: Path | None) -> "Slab":
        rows = padded(capacity)
        panels = rows // PANEL_ROWS
        steps = -(-dim // STEP_VALUES[dtype])
        slab = cls(
            dtype, dim, 0, allocate((panels, steps, PANEL_ROWS, STEP_VALUES[dtype]), PANEL_TYPES[dtype])
        )
        if dtype == "float32":
            return slab
        slab.residual_norm = np.zeros(rows, np.float32)
        slab.norm = np.zeros(rows, np.float32)
        slab.panel_bounds = np.zeros((panels, 2), np.float32)
        if dtype == "int8":
            slab.scale = np.full(rows, np.nan, np.float32)
        if originals_file is None or rows * dim == 0:
            slab.originals = allocate((rows, dim), np.float32)
        else:
            slab.originals = np.memmap(originals_file, np.float32, "w+", shape=(rows, dim))
            slab.mapped.add("originals")
        return slab

    @property
    def capacity(self) -> int:
        return len(self.panels) * PANEL_ROWS

    @property
    def bytes_by_name(self) -> dict[str, int]:
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        return {name: array.nbytes for name, array in arrays.items() if array is not None}

    def native(self, rows: int | None = None) -> tuple[int, ...]:
        """(rows, addresses): what the native functions take."""
        addresses = (getattr(self, name) for name in self.ARRAYS)
        return (
            self.num_rows if rows is None else rows,
            *(0 if array is None else array.ctypes.data for array in addresses),
        )

    def append(self, values: np.ndarray) -> np.ndarray:
        """Stores float32 rows after the last one; returns which are irregular (only float32 holds them)."""
        first, count = self.num_rows, len(values)
        irregular = np.zeros(count, np.uint8)
        if count == 0:
            return irregular.astype(bool)
        padding = np.arange(first + count, padded(first + count))
        self._clear(padding)
        _native.mips_store_rows(
            self.dtype, self.dim, self.native(self.capacity), 0, first, count, values.ctypes.data,
            values.strides[0] // 4, irregular.ctypes.data, torch.get_num_threads(),
        )  # fmt: skip
        if self.originals is not None:
            self.originals[first : first + count] = values
        self.num_rows += count
        return irregular.astype(bool)

    def truncate(self, num_rows: int) -> None:
        """Forgets the rows from num_rows on."""
        self._clear(np.arange(num_rows, padded(num_rows)))
        self.num_rows = num_rows

    def store(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Overwrites the named rows; returns which are irregular."""
        irregular = np.zeros(len(rows), np.uint8)
        _native.mips_store_rows(
            self.dtype, self.dim, self.native(self.capacity), rows.ctypes.data, 0, len(rows),
            values.ctypes.data, values.strides[0] // 4, irregular.ctypes.data, 1,
        )  # fmt: skip
        if self.originals is not None:
            self.originals[rows] = values
        return irregular.astype(bool)

    def delete(self, rows: np.ndarray) -> None:
        self._clear(rows)
        if self.originals is not None:
            self.originals[rows] = np.nan

    def load(self, rows: np.ndarray) -> np.ndarray:
        """The rows as float32 [n, dim], as they were given."""
        if self.originals is not None:
            return np.array(self.originals[rows], np.float32)
        values = np.empty((len(rows), self.dim), np.float32)
        _native.mips_load_rows(
            self.dim, self.panels.ctypes.data, rows.ctypes.data, len(rows), values.ctypes.data
        )
        return values

    def _clear(self, rows: np.ndarray) -> None:
        _native.mips_clear_rows(self.dtype, self.dim, self.native(self.capacity), rows.ctypes.data, len(rows))
