"""From queries to candidates: search, then leave out what would give the answer away or stand there twice.

    candidates = retrieve_candidates(index, store, query_emb, queries, num_candidates=8)

Left out of a query's candidates:

- the block it was cut from (by id), and every block with the same body (by content hash);
- near-copies of that block: those that contain the query's sentence, as it was before masking, but for a few
  words. Measured by containment: of the sentence's distinct trigrams of tokens, the share found in the block;
- blocks with the same body as a better candidate.

What is left out is made up for by retrieving more, until K slots are filled or the index is exhausted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from realm_fast.device import to_device, to_host
from realm_fast.errors import ProvenanceError
from realm_fast.index import Index
from realm_fast.ops._checks import check_int, check_tensor
from realm_fast.types import NO_BLOCK

if TYPE_CHECKING:
    from realm_fast.masking import MaskedQuery
    from realm_fast.token_store import TokenStore

# A block that holds this share of the sentence's trigrams is a near-copy. One changed token breaks three
# trigrams, so that a sentence of 25 tokens with three scattered changes still reaches 0.6, while sentences of
# one pattern mostly stay below. docs/models.md shows the distribution over real text.
NEAR_COPY_CONTAINMENT = 0.6
NEAR_COPY_NGRAM_TOKENS = 3
# Retrieval doubles from about twice the need up to here; a slot still empty then stays absent.
MAX_RETRIEVED_BLOCKS = 2048


@dataclass(frozen=True)
class Candidates:
    """The K candidates of each query. A slot is the null block, a block, or absent (nothing was left)."""

    block_ids: torch.Tensor  # [B, K] int64; NO_BLOCK in the null block's slot and in absent ones
    is_null: torch.Tensor  # [B, K] bool; True in slot 0 where the null block is used
    present: torch.Tensor  # [B, K] bool; False: the slot is absent and has probability 0
    stale_scores: torch.Tensor  # [B, K] float32 as the index gave them; -inf where it gave none
    dropped_near_copies: int  # blocks left out as copies of the query's own sentence
    dropped_duplicates: int  # blocks left out as copies of a better candidate
    absent_slots: int  # slots that could not be filled
    runner_up_ids: torch.Tensor  # [B, R] int64: retrieved after the last candidate; NO_BLOCK fills up

    @property
    def num_queries(self) -> int:
        return self.block_ids.shape[0]

    @property
    def num_candidates(self) -> int:
        """K"""
        return self.block_ids.shape[1]


def retrieve_candidates(
    index: Index,
    store: "TokenStore",
    query_emb: torch.Tensor,
    queries: "Sequence[MaskedQuery]",
    *,
    num_candidates: int,
    exclude_trivial: bool = True,
    use_null_block: bool = True,
    near_copy_containment: float = NEAR_COPY_CONTAINMENT,
) -> Candidates:
    """The null block (slot 0) and the best blocks for each query, by descending stale score.

    A function of its arguments alone. The scores come from the index's weights; the training step computes
    them afresh. For scores of consistent staleness pass queries embedded with the index's own weights.

    Args:
        query_emb: [B, D].
        queries: B of them; origin_block_id = -1 marks one that was cut from no block.
        num_candidates: K, the null block included.
        exclude_trivial: leave out origin and near-copies (duplicates always go).
        use_null_block: slot 0 is the null block; otherwise all K are blocks.
        near_copy_containment: share of the sentence's trigrams in (0, 1]; above 1 only exact copies go.

    Raises:
        ProvenanceError: the index was built from another corpus.
    """
    check_int("num_candidates", num_candidates, minimum=1)
    check_tensor("query_emb", query_emb, shape=[len(queries), "D"])
    _check_corpus(index, store)
    wanted = num_candidates - int(use_null_block)
    num_queries = len(queries)
    origins = np.array([q.origin_block_id if exclude_trivial else NO_BLOCK for q in queries], dtype=np.int64)
    sentences = [_sentence_ngrams(store, q) if exclude_trivial else None for q in queries]
    kept_ids = np.full((num_queries, wanted), NO_BLOCK, dtype=np.int64)
    kept_scores = np.full((num_queries, wanted), -np.inf, dtype=np.float32)
    near_copies, duplicates = np.zeros(num_queries, np.int64), np.zeros(num_queries, np.int64)
    limit = min(len(index), MAX_RETRIEVED_BLOCKS)
    retrieve = min(limit, wanted + max(8, wanted // 2))
    runner_up_ids = np.full((num_queries, retrieve - min(wanted, retrieve)), NO_BLOCK, dtype=np.int64)
    pending = np.arange(num_queries) if wanted and limit else np.zeros(0, np.int64)
    while pending.size:
        rows = to_device(torch.from_numpy(pending), query_emb.device)
        found = index.search(
            query_emb.detach()[rows],
            retrieve,
            exclude_ids=to_device(torch.from_numpy(origins[pending]), query_emb.device),
        )
        # The one wait of a round for the device: tokens, which decide what is left out, are on the host.
        scores, ids = (part.numpy() for part in to_host(found.scores, found.ids))  # [b, retrieve]
        short = []
        for row, query in enumerate(pending.tolist()):
            there = ids[row] != NO_BLOCK
            row_ids, row_scores = ids[row][there], scores[row][there]
            copies = _near_copies(store, row_ids, origins[query], sentences[query], near_copy_containment)
            others = np.flatnonzero(~copies)
            hashes = [store.content_hash(i) for i in row_ids[others].tolist()]
            ranks = others[_first_of_each(hashes)][:wanted]
            kept_ids[query, : len(ranks)] = row_ids[ranks]
            kept_scores[query, : len(ranks)] = row_scores[ranks]
            # What was passed over on the way to the last slot.
            end = int(ranks[-1]) + 1 if len(ranks) == wanted else len(row_ids)
            near_copies[query] = copies[:end].sum()
            duplicates[query] = end - near_copies[query] - len(ranks)
            runners_up = row_ids[end:][: runner_up_ids.shape[1]]
            runner_up_ids[query, : len(runners_up)] = runners_up
            if len(ranks) < wanted and retrieve < limit:
                short.append(query)
        pending = np.array(short, dtype=np.int64)
        retrieve = min(limit, 2 * retrieve)
    return _as_candidates(
        kept_ids,
        kept_scores,
        use_null_block,
        int(near_copies.sum()),
        int(duplicates.sum()),
        torch.from_numpy(runner_up_ids),
    )


def ngram_keys(tokens: np.ndarray, n: int) -> np.ndarray:
    """[T - n + 1] uint64, one key an n-gram of tokens: exact for n <= 3 and ids below 2^21, a hash beyond.

    Fewer than n tokens give no key.
    """
    if tokens.shape[0] < n:
        return np.zeros(0, dtype=np.uint64)
    wide = tokens.astype(np.uint64)
    # Three ids of 21 bits fit side by side; a longer n-gram is hashed.
    multiplier = np.uint64(1 << 21) if n <= 3 else np.uint64(0x9E3779B97F4A7C15)
    keys = wide[: wide.shape[0] - n + 1].copy()
    for i in range(1, n):
        keys *= multiplier
        keys += wide[i : wide.shape[0] - n + 1 + i]
    return keys


def containment(sentence_keys: np.ndarray, bodies: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Of the distinct n-grams of a sentence, the share that each body holds.

    Args:
        sentence_keys: [s] sorted distinct keys (ngram_keys) of the sentence.
        bodies: C arrays of tokens.

    Returns:
        [C] float64 in [0, 1]; 0 for a sentence without n-grams.
    """
    if not len(bodies) or not sentence_keys.size:
        return np.zeros(len(bodies))
    lengths = np.fromiter((b.shape[0] for b in bodies), dtype=np.int64, count=len(bodies))
    keys = ngram_keys(np.concatenate(bodies), n)
    body_of = np.repeat(np.arange(len(bodies)), lengths)  # [sum of lengths]
    first = body_of[: keys.shape[0]]
    inside = first == body_of[n - 1 :]  # the n-gram does not run into the next body
    place = np.minimum(np.searchsorted(sentence_keys, keys), sentence_keys.size - 1)
    hit = inside & (sentence_keys[place] == keys)
    held = np.zeros((len(bodies), sentence_keys.size), dtype=bool)
    held[first[hit], place[hit]] = True
    return held.mean(axis=1)


def _sentence_ngrams(store: "TokenStore", query: "MaskedQuery") -> np.ndarray | None:
    """Sorted distinct keys of the unmasked sentence; None for a query that was cut from no block."""
    if query.origin_block_id == NO_BLOCK:
        return None
    start, stop = query.sentence
    return np.unique(ngram_keys(store.body_tokens(query.origin_block_id)[start:stop], NEAR_COPY_NGRAM_TOKENS))


def _near_copies(
    store: "TokenStore", ids: np.ndarray, origin: int, sentence: np.ndarray | None, threshold: float
) -> np.ndarray:
    """[C] bool: which blocks give the sentence away."""
    if origin == NO_BLOCK or sentence is None or not ids.size:
        return np.zeros(ids.shape, dtype=bool)
    own = store.content_hash(origin)
    same = np.array([store.content_hash(i) == own for i in ids.tolist()])
    bodies = [store.body_tokens(i) for i in ids.tolist()]
    return same | (containment(sentence, bodies, NEAR_COPY_NGRAM_TOKENS) >= threshold)


def _first_of_each(hashes: Sequence[int]) -> np.ndarray:
    """Positions of the first occurrence of each value, ascending."""
    _, firsts = np.unique(np.array(hashes, dtype=np.uint64), return_index=True)
    return np.sort(firsts)


def _as_candidates(
    ids: np.ndarray,
    scores: np.ndarray,
    use_null_block: bool,
    near_copies: int,
    duplicates: int,
    runner_up_ids: torch.Tensor,
) -> Candidates:
    block_ids, stale_scores = torch.from_numpy(ids), torch.from_numpy(scores)  # [B, K or K - 1]
    is_null = torch.zeros(block_ids.shape, dtype=torch.bool)
    if use_null_block:
        block_ids = torch.nn.functional.pad(block_ids, (1, 0), value=NO_BLOCK)
        stale_scores = torch.nn.functional.pad(stale_scores, (1, 0), value=-torch.inf)
        is_null = torch.nn.functional.pad(is_null, (1, 0), value=True)
    present = is_null | (block_ids != NO_BLOCK)
    return Candidates(
        block_ids,
        is_null,
        present,
        stale_scores,
        near_copies,
        duplicates,
        int((~present).sum()),
        runner_up_ids,
    )


def _check_corpus(index: Index, store: "TokenStore") -> None:
    provenance = index.provenance
    if provenance is not None and provenance.corpus_hash != store.corpus_hash:
        raise ProvenanceError(
            f"the index was built from corpus {provenance.corpus_hash[:12]}, candidates are asked for from "
            f"{store.corpus_hash[:12]}: build the index of this corpus."
        )
