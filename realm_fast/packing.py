"""From token ids to the inputs of the models: special tokens, segments, padding, and grouping by length.

    query, for the embedder     [CLS] tokens [SEP]                   segments 0 ... 0
    block, for the embedder     [CLS] title [SEP] body [SEP]         segments 0 ... 0 1 ... 1
    null block                  [CLS] [SEP] [SEP]                    segments 0 0 1
    joint, for the reader       [CLS] tokens [SEP] body [SEP]        segments 0 ... 0 1 ... 1
    joint with the null block   [CLS] tokens [SEP] [SEP]             segments 0 ... 0 1

Everything here is pure; nothing knows a model. `T` is the number of tokens of a row, padding included.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from realm_fast.device import to_device
from realm_fast.errors import DataError

# What one more call of a trunk costs, in tokens of padding it must save: launches and, in the backward
# pass, one more dense gradient of the word embeddings. Steps are equally fast from 128 to 512 and slower
# beyond (BERT 2 x 128, 128 rows, 1 CPU thread).
CALL_OVERHEAD_TOKENS = 512

NO_TOKENS = np.zeros(0, dtype=np.int32)


class SpecialTokens(NamedTuple):
    """The ids that frame an input."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int

    @classmethod
    def of(cls, tokenizer: "HasSpecialTokens") -> "SpecialTokens":
        return cls(tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id)


class HasBlocks(Protocol):
    """What packs are gathered from: a TokenStore."""

    def array(self, name: str) -> np.ndarray: ...


class HasSpecialTokens(Protocol):
    @property
    def cls_id(self) -> int: ...
    @property
    def sep_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def mask_id(self) -> int: ...


class Row(NamedTuple):
    """One unpadded input."""

    ids: np.ndarray  # [t] int32
    segments: np.ndarray  # [t] uint8, 0 or 1


class TokenPack(NamedTuple):
    """R rows without padding, one after the other."""

    ids: torch.Tensor  # [S] int64
    segments: torch.Tensor  # [S] int64, 0 or 1
    cu_seqlens: torch.Tensor  # [R + 1] int64: row r has the tokens cu_seqlens[r] to cu_seqlens[r + 1]


class TokenBatch(NamedTuple):
    """R rows padded to one length. Rows are right-padded; `attention_mask` is True on real tokens."""

    ids: torch.Tensor  # [R, T] int64
    segments: torch.Tensor  # [R, T] int64, 0 or 1; 0 on padding
    attention_mask: torch.Tensor  # [R, T] bool

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(*(to_device(part, device) for part in self))

    def rows(self, index: torch.Tensor | slice) -> "TokenBatch":
        """The chosen rows, as wide as before."""
        return TokenBatch(*(part[index] for part in self))


def query_input(tokens: np.ndarray, special: SpecialTokens) -> Row:
    """`[CLS] tokens [SEP]`: the token at position i of the query stands at i + 1."""
    return _frame(special, tokens, None)


def block_input(title: np.ndarray, body: np.ndarray, special: SpecialTokens) -> Row:
    """`[CLS] title [SEP] body [SEP]`."""
    return _frame(special, title, body)


def null_block_input(special: SpecialTokens) -> Row:
    """`[CLS] [SEP] [SEP]`: the block with neither title nor body."""
    return _frame(special, NO_TOKENS, NO_TOKENS)


def joint_input(
    query_tokens: np.ndarray,
    body: np.ndarray,
    max_tokens: int,
    special: SpecialTokens,
    *,
    what: str = "query",
) -> Row:
    """`[CLS] query [SEP] body [SEP]`, the body cut at its end to fit into `max_tokens`, the query never.

    Raises:
        DataError: the query alone does not fit.
    """
    room = max_tokens - 3 - query_tokens.shape[0]
    if room < 0:
        raise DataError(
            f"{what}: {query_tokens.shape[0]} tokens and 3 special ones do not fit into {max_tokens} tokens "
            "(reader.max_joint_tokens)."
        )
    return _frame(special, query_tokens, body[:room])


def pad_batch(
    rows: Sequence[Row], pad_id: int, multiple_of: int = 8, max_tokens: int | None = None
) -> TokenBatch:
    """Stacks rows, padded to the longest, rounded up to `multiple_of` (vector and tensor-core widths).

    `max_tokens`, where given, is what the model has positions for: rounding stops there.
    """
    return pad_pack(pack_rows(rows), pad_id, multiple_of, max_tokens)


def pad_pack(pack: TokenPack, pad_id: int, multiple_of: int = 8, max_tokens: int | None = None) -> TokenBatch:
    """The rows of a pack on the CPU as `pad_batch` would stack them."""
    lengths = np.diff(pack.cu_seqlens.numpy())
    longest = int(lengths.max(initial=0))
    width = padded_length(longest, multiple_of)
    if max_tokens is not None:
        width = max(longest, min(width, max_tokens))
    mask = np.arange(width) < lengths[:, None]  # [R, T]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    segments = np.zeros(mask.shape, dtype=np.int64)
    # A boolean assignment fills row by row, which is the order of the pack.
    ids[mask] = pack.ids.numpy()
    segments[mask] = pack.segments.numpy()
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(segments), torch.from_numpy(mask))


def pack_rows(rows: Sequence[Row]) -> TokenPack:
    """Rows one after the other."""
    ids = np.concatenate([NO_TOKENS, *(row.ids for row in rows)]).astype(np.int64)
    segments = np.concatenate([NO_TOKENS, *(row.segments for row in rows)]).astype(np.int64)
    return TokenPack(torch.from_numpy(ids), torch.from_numpy(segments), _cu_seqlens(row_lengths(rows)))


def pack_blocks(store: HasBlocks, block_ids: np.ndarray, special: SpecialTokens) -> TokenPack:
    """`block_input` of many blocks of a token store at once, in the order asked for.

    Equal to `pack_rows([block_input(store.title_tokens(i), store.body_tokens(i), special) for i in ...])`,
    with a few array operations for a pack where that takes microseconds of Python for a block.
    """
    documents = store.array("block_document")[block_ids]
    title_offsets, body_offsets = store.array("title_token_offsets"), store.array("body_offsets")
    title_lengths = title_offsets[documents + 1] - title_offsets[documents]  # [R]
    body_lengths = body_offsets[block_ids + 1] - body_offsets[block_ids]
    cu_seqlens = _cu_seqlens(title_lengths + body_lengths + 3)
    starts = cu_seqlens.numpy()[:-1]
    middles = starts + title_lengths + 1  # where the [SEP] after the title stands
    ids = np.empty(int(cu_seqlens[-1]), dtype=np.int64)
    ids[starts] = special.cls_id
    ids[middles] = special.sep_id
    ids[middles + body_lengths + 1] = special.sep_id
    for name, first, lengths, places in (
        ("title_tokens", title_offsets[documents], title_lengths, starts + 1),
        ("body_tokens", body_offsets[block_ids], body_lengths, middles + 1),
    ):
        within = _ranges(lengths)
        ids[np.repeat(places, lengths) + within] = store.array(name)[np.repeat(first, lengths) + within]
    segments = np.zeros(len(ids), dtype=np.int64)
    segments[np.repeat(middles + 1, body_lengths + 1) + _ranges(body_lengths + 1)] = 1
    return TokenPack(torch.from_numpy(ids), torch.from_numpy(segments), cu_seqlens)


def _cu_seqlens(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0 .. n-1 for every n of `lengths`, one after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def row_lengths(rows: Sequence[Row]) -> np.ndarray:
    """[R] int64"""
    return np.fromiter((row.ids.shape[0] for row in rows), dtype=np.int64, count=len(rows))


def row_multiple(device: torch.device) -> int:
    """What rows are padded to a multiple of: 8 on CUDA (tensor cores); 4 on a CPU, where it was fastest.

    On a CPU (1 thread, BERT 2 x 128, blocks of 106 tokens) 4 beat 8 by 2 to 5% and 1 by 9 to 12%.
    """
    return 8 if device.type == "cuda" else 4


def padded_length(length: int, multiple_of: int = 8) -> int:
    return -(-length // multiple_of) * multiple_of


def bucket_by_length(
    lengths: np.ndarray, *, multiple_of: int = 8, overhead_tokens: int = CALL_OVERHEAD_TOKENS
) -> list[np.ndarray]:
    """Groups rows of like length so that padding plus `overhead_tokens` a group is as small as can be.

    Exact: over rows sorted by length a best grouping is contiguous, so dynamic programming over the distinct
    padded lengths finds it. Rows of one group go through the model together.

    Args:
        lengths: [R] tokens of each row.
        overhead_tokens: the cost of one more group, in tokens.

    Returns:
        Groups of row numbers, shortest rows first; inside a group rows keep their order.
    """
    padded = -(-np.asarray(lengths, dtype=np.int64) // multiple_of) * multiple_of
    widths, row_width, counts = np.unique(padded, return_inverse=True, return_counts=True)
    rows_before = np.concatenate([[0], np.cumsum(counts)])  # [W + 1]
    best = np.zeros(len(widths) + 1)  # best[j]: cost of the j shortest widths
    start = np.zeros(len(widths) + 1, dtype=np.int64)  # where the last group of that best grouping begins
    for j in range(1, len(widths) + 1):
        costs = best[:j] + (rows_before[j] - rows_before[:j]) * widths[j - 1] + overhead_tokens
        start[j] = int(np.argmin(costs))
        best[j] = costs[start[j]]
    cuts = [len(widths)]
    while cuts[-1] > 0:
        cuts.append(int(start[cuts[-1]]))
    cuts.reverse()
    return [np.flatnonzero((row_width >= a) & (row_width < b)) for a, b in itertools.pairwise(cuts)]


class PackPlan(NamedTuple):
    """Which rows go through the model together: pack i holds `order[bounds[i]:bounds[i + 1]]`."""

    order: np.ndarray  # [n] int64 row numbers, longest first
    bounds: np.ndarray  # [packs + 1] int64
    tokens: int  # real tokens of all rows
    padded_tokens: int  # tokens the model will compute, padding included

    @property
    def padding_waste(self) -> float:
        """The share of computed tokens that are padding."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


def plan_packs(lengths: np.ndarray, token_budget: int, *, multiple_of: int = 8) -> PackPlan:
    """Length-sorted packs of at most `token_budget` tokens, padding included.

    The longest come first: what does not fit into memory fails at once, and time estimates err on the safe
    side. A row longer than the budget is a pack of its own. The order is a function of `lengths` alone.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    bounds = [0]
    padded_tokens = 0
    while bounds[-1] < len(order):
        first = bounds[-1]
        width = padded_length(int(lengths[order[first]]), multiple_of)
        rows = min(max(1, token_budget // max(width, 1)), len(order) - first)
        padded_tokens += rows * width
        bounds.append(first + rows)
    return PackPlan(order, np.array(bounds, dtype=np.int64), int(lengths.sum()), padded_tokens)


def body_starts(batch: TokenBatch) -> torch.Tensor:
    """[R] position of the first body token: the first of segment 1 (of a joint or block input)."""
    return batch.segments.argmax(dim=1)


def body_mask(batch: TokenBatch) -> torch.Tensor:
    """[R, T] bool: True on the block body, False on query or title, special tokens and padding."""
    lengths = batch.attention_mask.sum(dim=1, keepdim=True)  # [R, 1]
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return (batch.segments == 1) & (positions < lengths - 1)  # the last real token is the closing [SEP]


def _frame(special: SpecialTokens, first: np.ndarray, second: np.ndarray | None) -> Row:
    """`[CLS] first [SEP]`, then `second [SEP]` with segment 1 unless it is None."""
    split = first.shape[0] + 2
    length = split + (second.shape[0] + 1 if second is not None else 0)
    ids = np.empty(length, dtype=np.int32)
    ids[0] = special.cls_id
    ids[1 : split - 1] = first
    ids[split - 1] = special.sep_id
    segments = np.zeros(length, dtype=np.uint8)
    if second is not None:
        ids[split : length - 1] = second
        ids[length - 1] = special.sep_id
        segments[split:] = 1
    return Row(ids, segments)
