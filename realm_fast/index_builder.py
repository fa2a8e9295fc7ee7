"""An index of a known number of rows, filled in any order, in the very layout that a search reads.

    builder = IndexBuilder(len(ids), dim, "int8", first_id=first_block)
    embed_epilogue(states, out=builder.panels, row_ids=rows, scale=builder.scale, ...)  # a pack, in place
    builder.check(rows)
    index = builder.finish()

So the embedding of a corpus needs no [n, D] array beside the index, and no second pass over it.
"""

import numpy as np
import torch
from torch import Tensor

from realm_fast.index import MipsIndex, Provenance
from realm_fast.panels import PANEL_ROWS, Slab

_TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
# Norms beyond it leave float32 when squared; the index itself, which computes in float64, looks at such rows.
_LARGE_NORM = 1e18


class IndexBuilder:
    """Rows [0, num_rows) of a MipsIndex to be; their ids count from `first_id`.

    Attributes:
        panels: [panels, steps, 48, values in a step], the `out` of `embed_epilogue`.
        scale, residual_norm, norm: [capacity] float32; scale for int8 only, residual_norm not for float32.
        originals: [capacity, D] float32, what bfloat16 and int8 keep beside; None for float32.
    """

    def __init__(
        self, num_rows: int, dim: int, dtype: str, *, first_id: int = 0, provenance: Provenance | None = None
    ) -> None:
        self._slab = slab = Slab.new(dtype, dim, num_rows, None)
        slab.num_rows = num_rows
        self._first_id, self._provenance = first_id, provenance
        self._irregular = np.zeros(num_rows, bool)
        self.panels = torch.from_numpy(slab.panels).view(_TORCH_TYPES[dtype])  # [panels, steps, 48, values]
        self.scale = _tensor(slab.scale)
        self.residual_norm = _tensor(slab.residual_norm)
        # A float32 index keeps no norms; here they tell which rows are finite.
        self.norm = torch.zeros(slab.capacity) if slab.norm is None else torch.from_numpy(slab.norm)
        self.originals = _tensor(slab.originals)

    def check(self, rows: np.ndarray) -> np.ndarray:
        """Looks at rows written by `embed_epilogue`; to be called for all of them.

        Args:
            rows: [R] int64.

        Returns:
            Those among them that hold NaN or infinity. Rows too large for the scan's type go to float32.
        """
        norms = self.norm.numpy()[rows]
        if self.residual_norm is not None:
            norms = np.maximum(norms, self.residual_norm.numpy()[rows])  # NaN stays NaN
        suspects = rows[~(norms < _LARGE_NORM)]
        if len(suspects) == 0:
            return suspects
        values = self._slab.load(suspects)
        finite = np.isfinite(values).all(axis=1)
        self.store(suspects[finite], values[finite])
        return suspects[~finite]

    def store(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes rows that were computed elsewhere.

        Args:
            rows: [R] int64.
            values: [R, D] float32, contiguous.
        """
        self._irregular[rows] = self._slab.store(rows, values)

    def finish(self) -> MipsIndex:
        """The index over what was written."""
        slab = self._slab
        slab.truncate(slab.num_rows)  # rows that only fill the last panel: no comparison lets them through
        if slab.panel_bounds is not None:
            assert slab.residual_norm is not None
            assert slab.norm is not None
            for column, bound in enumerate((slab.residual_norm, slab.norm)):
                slab.panel_bounds[:, column] = bound.reshape(-1, PANEL_ROWS).max(axis=1)
        return MipsIndex.from_slab(
            slab, np.flatnonzero(self._irregular), first_id=self._first_id, provenance=self._provenance
        )


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
