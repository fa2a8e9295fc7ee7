"""The words and letters of the project, and the few records that cross module boundaries.

Shape letters, used in comments where tensors are born:

    B queries   K candidates (null block included)   M masked positions   T tokens   S snapshot rows
    H hidden    V vocabulary                         D embedding width    N blocks
"""

from typing import NamedTuple

import torch

NO_BLOCK = -1  # "no result": fewer than k blocks were left to return


class TopK(NamedTuple):
    """The k best blocks of each query, by descending score, ties to the lower id."""

    scores: torch.Tensor  # [B, k] float32; -inf where there is no result
    ids: torch.Tensor  # [B, k] int64; NO_BLOCK where there is no result
