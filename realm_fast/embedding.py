"""Embedding a whole corpus: every block of the token store through the embedder, in length-sorted packs.

    stats = EmbeddingStats()
    embeddings = embed_blocks(embedder, store, token_budget=16384, stats=stats)  # [N, D]
    print(f"{stats.blocks_per_s:.0f} blocks/s, {stats.padding_waste:.1%} padding")

Nothing is tokenised: ids come straight from the memory map. Rows of one pack have nearly the same length, so
that hardly a token of padding is computed.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError, DataError, ProvenanceError, RealmFastError, TrainingDivergedError
from realm_fast.packing import PackPlan, block_input, null_block_input, plan_packs, row_multiple
from realm_fast.progress import bar

if TYPE_CHECKING:
    from realm_fast.token_store import TokenStore

Precision = Literal["float32", "bfloat16"]


class EmbeddingStopped(RealmFastError):
    """`should_stop` said so before every block was embedded."""


@dataclass
class EmbeddingStats:
    """What one call of `embed_blocks` did; filled in as it goes."""

    blocks: int = 0
    tokens: int = 0  # special tokens included, padding not
    padded_tokens: int = 0
    packs: int = 0
    seconds: float = 0.0

    @property
    def padding_waste(self) -> float:
        """The share of computed tokens that were padding."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def blocks_per_s(self) -> float:
        return self.blocks / self.seconds if self.seconds else 0.0


def embed_blocks(
    embedder: Embedder,
    store: "TokenStore",
    *,
    block_ids: Sequence[int] | np.ndarray | None = None,
    token_budget: int = 16384,
    out: torch.Tensor | np.ndarray | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] | None = None,
    precision: Precision = "float32",
    stats: EmbeddingStats | None = None,
) -> torch.Tensor:
    """Embeds blocks, in evaluation mode and without a graph.

    A row's value depends on the pack it is in only through the order of floating-point sums: other budgets
    give the same embedding to about 1e-5 of its norm in float32, not the same bits. The same budget, corpus,
    weights and machine give the same bits.

    Args:
        embedder: left in the mode (training or evaluation) it was in. It must not be trained meanwhile.
        store: whose tokenizer must be the embedder's.
        block_ids: [n] which blocks, in which order; None: all of them.
        token_budget: tokens in one pack, padding included; a longer block is a pack of its own.
        out: [n, D] float32 to write to, a tensor or an array (a memory map, for one); None: a new tensor.
        progress: show a bar.
        should_stop: asked before every pack.
        precision: "bfloat16" runs the trunk under autocast; pooling's result and all after it stay float32.
        stats: filled in.

    Returns:
        [n, D] float32 on the CPU, row i the embedding of block_ids[i]; `out` where it was given. The null
        block is not among them (see `embed_null_block`).

    Raises:
        EmbeddingStopped: `should_stop` returned True; `out` is incomplete.
        ProvenanceError: store and embedder have different tokenizers.
        DataError: a block id does not exist, or blocks are longer than the embedder can take.
        TrainingDivergedError: an embedding is NaN or infinite.
    """
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision: expected float32 or bfloat16, got {precision!r}.")
    _check_fit(embedder, store)
    ids = _checked_ids(block_ids, len(store))
    result = _checked_out(out, len(ids), embedder.dim)
    plan = plan_packs(
        np.asarray(store.block_lengths())[ids], token_budget, multiple_of=row_multiple(embedder.device)
    )
    stats = stats if stats is not None else EmbeddingStats()
    began = time.monotonic()
    with (
        _evaluation(embedder),
        bar(total=len(ids), desc="embed blocks", unit="block", enabled=progress) as shown,
    ):
        for rows in _packs(plan):
            if should_stop is not None and should_stop():
                raise EmbeddingStopped(f"stopped after {stats.blocks} of {len(ids)} blocks.")
            inputs = [
                block_input(store.title_tokens(i), store.body_tokens(i), embedder.special)
                for i in ids[rows].tolist()
            ]
            batch = embedder.pad(inputs)
            with torch.autocast(embedder.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                embeddings = embedder.block_rows(batch)  # [R, D]
            finite = embeddings.isfinite().all(dim=1).cpu()
            if not bool(finite.all()):
                worst = int(ids[rows[int((~finite).nonzero()[0])]])
                raise TrainingDivergedError(f"the embedding of block {worst} is NaN or infinite.")
            result[torch.from_numpy(rows)] = embeddings.to("cpu", torch.float32)
            stats.blocks += len(rows)
            stats.packs += 1
            stats.tokens += sum(row.ids.shape[0] for row in inputs)
            stats.padded_tokens += batch.ids.numel()
            stats.seconds = time.monotonic() - began
            shown.update(len(rows))
            shown.set_postfix(padding=f"{stats.padding_waste:.1%}")
    return result


def embed_null_block(embedder: Embedder) -> torch.Tensor:
    """[D] float32 on the CPU: the embedding of `[CLS] [SEP] [SEP]`, in evaluation mode."""
    with _evaluation(embedder):
        embedding = embedder.block_emb(embedder.pad([null_block_input(embedder.special)]))[0]
    return embedding.cpu().clone()  # a copy made outside of inference mode may enter a graph


def _packs(plan: PackPlan) -> Iterator[np.ndarray]:
    for start, stop in itertools.pairwise(plan.bounds.tolist()):
        yield plan.order[start:stop]


@contextlib.contextmanager
def _evaluation(embedder: Embedder) -> Iterator[None]:
    was_training = embedder.training
    embedder.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        embedder.train(was_training)


def _check_fit(embedder: Embedder, store: "TokenStore") -> None:
    if embedder.tokenizer_hash != store.tokenizer_hash:
        raise ProvenanceError(
            f"the corpus was tokenised with tokenizer {store.tokenizer_hash[:12]}, the embedder was made for "
            f"{embedder.tokenizer_hash[:12]}: build the corpus with the embedder's tokenizer."
        )
    longest = int(np.asarray(store.block_lengths()).max(initial=0))
    if longest > embedder.max_tokens:
        raise DataError(
            f"the longest block has {longest} tokens, the embedder takes {embedder.max_tokens} at most: "
            f"build the corpus with corpus.max_block_tokens={embedder.max_tokens} or less."
        )


def _checked_ids(block_ids: Sequence[int] | np.ndarray | None, num_blocks: int) -> np.ndarray:
    if block_ids is None:
        return np.arange(num_blocks, dtype=np.int64)
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"block_ids: expected [n], got {list(ids.shape)}")
    wrong = ids[(ids < 0) | (ids >= num_blocks)]
    if wrong.size:
        raise DataError(f"block {wrong[0]} does not exist: the corpus has blocks 0 to {num_blocks - 1}.")
    return ids


def _checked_out(out: torch.Tensor | np.ndarray | None, rows: int, dim: int) -> torch.Tensor:
    if out is None:
        return torch.empty(rows, dim, dtype=torch.float32)
    result = torch.from_numpy(out) if isinstance(out, np.ndarray) else out
    if result.dtype != torch.float32 or tuple(result.shape) != (rows, dim) or result.device.type != "cpu":
        raise ValueError(
            f"out: expected [{rows}, {dim}] float32 on the CPU, got {list(result.shape)} {result.dtype} "
            f"on {result.device}"
        )
    return result
