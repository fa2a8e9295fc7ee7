"""Embedding a whole corpus: every block of the token store through the embedder, in length-sorted packs.

    stats = EmbeddingStats()
    embeddings = embed_blocks(embedder, store, token_budget=16384, stats=stats)  # [N, D]
    index = embed_index(embedder, store, 0, len(store), dtype="int8", token_budget=16384)
    print(f"{stats.blocks_per_s:.0f} blocks/s, {stats.padding_waste:.1%} padding")

Nothing is tokenised: ids come straight from the memory map, gathered by a thread while the encoder runs.
Rows of one pack have nearly the same length, so that hardly a token of padding is computed, and none where
the encoder takes packed tokens (realm_fast.block_encoder). What follows the trunk writes each row where it
stays: into the caller's array, or into the panels of an index.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from realm_fast.block_encoder import Precision, block_encoder
from realm_fast.embedder import Embedder
from realm_fast.errors import DataError, ProvenanceError, RealmFastError, TrainingDivergedError
from realm_fast.index import DTYPES, MipsIndex, Provenance
from realm_fast.index_builder import IndexBuilder
from realm_fast.ops._checks import check_choice
from realm_fast.packing import PackPlan, null_block_input, pack_blocks, plan_packs
from realm_fast.progress import bar

if TYPE_CHECKING:
    from realm_fast.token_store import TokenStore

_PACKS_AHEAD = 2  # gathered while the encoder is at work

# (states of a pack, its row numbers) -> those of its rows that are not finite.
_Write = Callable[[dict[str, torch.Tensor], np.ndarray], np.ndarray]


class EmbeddingStopped(RealmFastError):
    """`should_stop` said so before every block was embedded."""


@dataclass
class EmbeddingStats:
    """What `embed_blocks` or `embed_index` did; filled in as it goes, and summed over calls.

    On CUDA, where kernels run after the call that starts them, the parts of `seconds` are those of the host.
    """

    blocks: int = 0
    tokens: int = 0  # special tokens included, padding not
    padded_tokens: int = 0
    packs: int = 0
    seconds: float = 0.0  # all of it, the preparation of the weights included
    encoder_seconds: float = 0.0  # the trunk
    epilogue_seconds: float = 0.0  # pooling and all that follows, up to the stored row
    wait_seconds: float = 0.0  # for the next pack to be gathered

    @property
    def encoder_idle(self) -> float:
        """The share of the time in which neither the trunk nor the epilogue ran."""
        busy = self.encoder_seconds + self.epilogue_seconds
        return 1.0 - busy / self.seconds if self.seconds else 0.0

    @property
    def epilogue_share(self) -> float:
        """The epilogue's time as a share of the trunk's."""
        return self.epilogue_seconds / self.encoder_seconds if self.encoder_seconds else 0.0

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
        precision: of the trunk's products; sums, LayerNorms and all that follows pooling stay float32.
        stats: added to.

    Returns:
        [n, D] float32 on the CPU, row i the embedding of block_ids[i]; `out` where it was given. The null
        block is not among them (see `embed_null_block`).

    Raises:
        EmbeddingStopped: `should_stop` returned True; `out` is incomplete.
        ProvenanceError: store and embedder have different tokenizers.
        DataError: a block id does not exist, or blocks are longer than the embedder can take.
        TrainingDivergedError: an embedding is NaN or infinite.
    """
    _check_fit(embedder, store)
    ids = _checked_ids(block_ids, len(store))
    result = _checked_out(out, len(ids), embedder.dim)
    side = embedder.block_side

    def write(states: dict[str, torch.Tensor], rows: np.ndarray) -> np.ndarray:
        places = torch.from_numpy(rows)
        if states["hidden"].is_cpu:
            side.epilogue(**states, out=result, row_ids=places)
        else:
            result[places] = side.epilogue(**states).out.cpu()
        return rows[~result[places].isfinite().all(dim=1).numpy()]

    _embed(
        embedder, store, ids, write, token_budget=token_budget, precision=precision, should_stop=should_stop,
        progress=progress, stats=stats,
    )  # fmt: skip
    return result


def embed_index(
    embedder: Embedder,
    store: "TokenStore",
    first_block: int,
    num_blocks: int,
    *,
    dtype: str,
    token_budget: int,
    precision: Precision = "float32",
    provenance: Provenance | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
    stats: EmbeddingStats | None = None,
) -> MipsIndex:
    """Embeds a range of blocks straight into an index, whose ids are the blocks' own.

    Answers what `MipsIndex.from_embeddings(embed_blocks(...), dtype, ids)` answers, bit for bit, without an
    [n, D] array beside the index and without a second pass: memory is that of the range's index and a few
    packs, whatever the size of the corpus.

    Args:
        embedder: left in the mode (training or evaluation) it was in. It must not be trained meanwhile.
        store: whose tokenizer must be the embedder's.
        first_block, num_blocks: blocks first_block <= id < first_block + num_blocks; at least one.
        dtype: what a search of the index reads: "float32", "bfloat16" or "int8".
        token_budget: tokens in one pack; a longer block is a pack of its own.
        precision: as for `embed_blocks`.
        provenance: what the index is stamped with.
        should_stop: asked before every pack.
        progress: show a bar.
        stats: added to.

    Raises:
        EmbeddingStopped: `should_stop` returned True.
        ProvenanceError: store and embedder have different tokenizers.
        DataError: the range is empty or leaves the corpus, or blocks are longer than the embedder can take.
        TrainingDivergedError: an embedding is NaN or infinite.
    """
    check_choice("dtype", dtype, DTYPES)
    if num_blocks < 1 or first_block < 0 or first_block + num_blocks > len(store):
        raise DataError(
            f"blocks {first_block} to {first_block + num_blocks - 1}: expected at least one, all within the "
            f"corpus, which has {len(store)} blocks."
        )
    _check_fit(embedder, store)
    ids = np.arange(first_block, first_block + num_blocks)
    built = IndexBuilder(num_blocks, embedder.dim, dtype, first_id=first_block, provenance=provenance)
    side = embedder.block_side

    def write(states: dict[str, torch.Tensor], rows: np.ndarray) -> np.ndarray:
        if not states["hidden"].is_cpu:
            values = side.epilogue(**states).out.cpu().numpy()
            built.store(rows, values)
            return rows[~np.isfinite(values).all(axis=1)]
        places = torch.from_numpy(rows)
        side.epilogue(
            **states, out=built.panels, row_ids=places, scale=built.scale, residual_norm=built.residual_norm,
            norm=built.norm,
        )  # fmt: skip
        if built.originals is not None:  # the same row again: microseconds beside a pack's trunk
            side.epilogue(**states, out=built.originals, row_ids=places)
        return built.check(rows)

    _embed(
        embedder, store, ids, write, token_budget=token_budget, precision=precision, should_stop=should_stop,
        progress=progress, stats=stats,
    )  # fmt: skip
    return built.finish()


def _embed(
    embedder: Embedder,
    store: "TokenStore",
    ids: np.ndarray,
    write: _Write,
    *,
    token_budget: int,
    precision: Precision,
    should_stop: Callable[[], bool] | None,
    progress: bool,
    stats: EmbeddingStats | None,
) -> None:
    """Every block of `ids` through the trunk; `write` gets the states and their places in `ids`."""
    stats = stats if stats is not None else EmbeddingStats()
    before = stats.seconds
    began = time.monotonic()
    with (
        _evaluation(embedder),
        bar(total=len(ids), desc="embed blocks", unit="block", enabled=progress) as shown,
    ):
        encoder = block_encoder(embedder, precision)
        plan = plan_packs(
            np.asarray(store.block_lengths())[ids], token_budget, multiple_of=encoder.row_multiple
        )

        def gather(rows: np.ndarray) -> tuple[np.ndarray, int, Any]:
            pack = pack_blocks(store, ids[rows], embedder.special)
            return rows, pack.ids.shape[0], encoder.prepare(pack)

        done = 0
        packs = _ahead(gather, _packs(plan))
        with contextlib.closing(packs):
            while True:
                if should_stop is not None and done < len(ids) and should_stop():
                    raise EmbeddingStopped(f"stopped after {done} of {len(ids)} blocks.")
                waiting = time.monotonic()
                try:
                    rows, tokens, prepared = next(packs)
                except StopIteration:
                    break
                starting = time.monotonic()
                states = encoder.encode(prepared)
                encoded = time.monotonic()
                broken = write(states, rows)
                now = time.monotonic()
                if len(broken):
                    raise TrainingDivergedError(
                        f"the embedding of block {int(ids[broken[0]])} is NaN or infinite."
                    )
                done += len(rows)
                stats.blocks += len(rows)
                stats.packs += 1
                stats.tokens += tokens
                stats.padded_tokens += encoder.computed_tokens(prepared)
                stats.wait_seconds += starting - waiting
                stats.encoder_seconds += encoded - starting
                stats.epilogue_seconds += now - encoded
                stats.seconds = before + now - began
                shown.update(len(rows))
                shown.set_postfix(padding=f"{stats.padding_waste:.1%}")


def embed_null_block(embedder: Embedder) -> torch.Tensor:
    """[D] float32 on the CPU: the embedding of `[CLS] [SEP] [SEP]`, in evaluation mode."""
    with _evaluation(embedder):
        embedding = embedder.block_emb(embedder.pad([null_block_input(embedder.special)]))[0]
    return embedding.cpu().clone()  # a copy made outside of inference mode may enter a graph


def _ahead(make: Callable[[np.ndarray], Any], packs: Iterator[np.ndarray]) -> Generator[Any, None, None]:
    """`map(make, packs)` by a thread that keeps a few results ready; its errors surface here."""
    with ThreadPoolExecutor(1, "realm_fast packs") as pool:
        coming = deque(pool.submit(make, rows) for rows in itertools.islice(packs, _PACKS_AHEAD))
        try:
            while coming:
                made = coming.popleft().result()
                coming.extend(pool.submit(make, rows) for rows in itertools.islice(packs, 1))
                yield made
        finally:
            for future in coming:
                future.cancel()


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
