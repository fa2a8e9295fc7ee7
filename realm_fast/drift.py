"""How far training has left the index behind, measured on fixed probe queries, and what corrects most of it.

    probe = DriftProbe(store, queries, k=7, sample_blocks=256, seed=config.seed, token_budget=8192)
    drift, correction = probe.measure(model, snapshot.index)      # drift.overlap, drift.score_drift
    index.search(correction(query_emb), k)                        # as if the blocks had moved along

Both sides use the present embedder for the query, as a training step does; what differs is the blocks'
embeddings, those of the index against those the present weights would give.

    overlap      of the k blocks the index returns, the share that an index of the present weights would
                 return too
    score_drift  mean |fresh - stale| score of the blocks returned, less the query's mean difference, over
                 the standard deviation of the query's stale scores

To know the overlap one would have to embed the corpus. Instead a pool of blocks is embedded: the DEPTH * k
best of every probe query, and a fixed random sample of the corpus; the fresh top-k is taken within the pool.
As a pool holds fewer rivals than the corpus, the estimate is never below the true overlap (docs/refresh.md
has both over a real run). The cost does not depend on the size of the corpus.

Much of what training does to blocks it does to all of them alike. From the pool, embedded both ways, the best
affine map from stale to fresh embeddings is known, and q . (A s + b) = (A^T q) . s + const: a query
multiplied by A^T finds in the stale index what it would find in one whose blocks had all been mapped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from realm_fast.embedding import embed_blocks
from realm_fast.index import Index
from realm_fast.types import NO_BLOCK, TopK

if TYPE_CHECKING:
    from realm_fast.masking import MaskedQuery
    from realm_fast.model import RealmModel
    from realm_fast.token_store import TokenStore

DEPTH = 4  # blocks embedded afresh for each of the k that count
RIDGE = (
    0.03  # of the mean variance of a dimension: pulls a correction towards none where the pool says little
)


@dataclass(frozen=True)
class Drift:
    """What one check found."""

    overlap: float  # in [0, 1]
    score_drift: float  # 0: every score moved by the same amount
    blocks: int  # embedded for it
    seconds: float


@dataclass(frozen=True)
class QueryCorrection:
    """Turns queries to where a stale index has what they would find in a fresh one. One index's own.

    Args:
        matrix: [D, D] float32, A^T of the module's docstring less the identity, for queries as rows.
    """

    matrix: torch.Tensor

    @classmethod
    def none(cls, dim: int) -> Self:
        return cls(torch.zeros(dim, dim))

    @classmethod
    def fit(cls, stale: torch.Tensor, fresh: torch.Tensor) -> Self:
        """Ridge regression, towards no correction, of what moved on where it was.

            min over M, b of  |fresh - stale - stale M - b|^2 + ridge |M|^2

        Args:
            stale, fresh: [P, D] the same blocks, as the index has them and by the present weights.
        """
        stale, fresh = stale.double(), fresh.double()
        x = stale - stale.mean(dim=0)
        moved = (fresh - fresh.mean(dim=0)) - x
        gram = x.T @ x
        ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
        m = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), x.T @ moved)
        return cls(m.T.float().contiguous())

    def __call__(self, query_emb: torch.Tensor) -> torch.Tensor:
        """[B, D] corrected queries: for searching only, their scores are off by a constant each."""
        matrix = self.matrix.to(query_emb.device, query_emb.dtype)
        return query_emb + query_emb @ matrix

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"matrix": self.matrix}, folder / "correction.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(load_file(folder / "correction.safetensors")["matrix"])


class DriftProbe:
    """Measures drift on the same queries and the same sample of blocks each time.

    Args:
        queries: masked sentences; the block each was cut from is left out of its results.
        k: blocks of a result that count; at least 1 does.
        sample_blocks: size of the random sample of the corpus in the pool.
        seed: of the sample.
        token_budget: tokens in a pack of blocks.
    """

    def __init__(
        self,
        store: "TokenStore",
        queries: "Sequence[MaskedQuery]",
        *,
        k: int,
        sample_blocks: int,
        seed: int,
        token_budget: int,
    ) -> None:
        self.store, self.queries, self.token_budget = store, list(queries), token_budget
        self.k = max(1, min(k, len(store) - 1))  # one is left out
        self.origins = torch.tensor([query.origin_block_id for query in self.queries])  # [Q]
        self.sample = np.random.default_rng(seed).choice(
            len(store), size=min(sample_blocks, len(store)), replace=False
        )

    def measure(
        self, model: "RealmModel", index: Index, correction: QueryCorrection | None = None
    ) -> tuple[Drift, QueryCorrection]:
        """Leaves the model and every random state as they were.

        Args:
            correction: with which the index is searched at present; drift is what remains under it.

        Returns:
            the drift, and the correction that fits the present weights.
        """
        begin = time.monotonic()
        query_emb = model.search_emb(self.queries).float().cpu()  # [Q, D]
        asked = query_emb if correction is None else correction(query_emb)
        stale = index.search(asked, min(DEPTH * self.k, len(index)), exclude_ids=self.origins)
        pool = pool_of(stale.ids, self.sample)
        pool_emb = embed_blocks(model.embedder, self.store, block_ids=pool, token_budget=self.token_budget)
        overlap, score_drift = drift_in_pool(query_emb, stale, self.origins, pool, pool_emb, self.k)
        fitted = QueryCorrection.fit(index.reconstruct(torch.from_numpy(pool)), pool_emb)
        return Drift(overlap, score_drift, len(pool), time.monotonic() - begin), fitted


def pool_of(stale_ids: torch.Tensor, sample: np.ndarray) -> np.ndarray:
    """[P] the blocks to embed afresh, ascending: everything the probe queries found, and the sample."""
    return np.union1d(stale_ids[stale_ids != NO_BLOCK].numpy(), sample)


def drift_in_pool(
    query_emb: torch.Tensor,
    stale: TopK,
    origins: torch.Tensor,
    pool: np.ndarray,
    pool_emb: torch.Tensor,
    k: int,
) -> tuple[float, float]:
    """(overlap, score drift) of k results, had the corpus no blocks but those of the pool.

    Args:
        query_emb: [Q, D] by the present weights.
        stale: [Q, d] what the index found for them, d >= k, all of it in the pool.
        origins: [Q] the block that each query may not find.
        pool, pool_emb: [P] block ids, ascending, and [P, D] their embeddings by the present weights.
    """
    pool_ids = torch.from_numpy(pool)
    fresh = query_emb @ pool_emb.T  # [Q, P]
    fresh_top = pool_ids[
        fresh.masked_fill(origins[:, None] == pool_ids, -torch.inf).topk(min(k, len(pool)), dim=1).indices
    ]  # [Q, k]
    place = torch.searchsorted(pool_ids, stale.ids.clamp(min=int(pool_ids[0])))
    fresh_scores = fresh.gather(1, place).masked_fill(stale.ids == NO_BLOCK, -torch.inf)  # [Q, d]
    return overlap_at_k(stale.ids[:, :k], fresh_top), relative_score_drift(stale.scores, fresh_scores, k)


def overlap_at_k(stale_ids: torch.Tensor, fresh_ids: torch.Tensor) -> float:
    """The share of stale results that are fresh results too; 1 where there are no results to lose.

    Args:
        stale_ids, fresh_ids: [Q, k] int64, distinct in a row; NO_BLOCK where there was none.
    """
    there = stale_ids != NO_BLOCK
    found = (stale_ids[:, :, None] == fresh_ids[:, None, :]).any(dim=2) & there
    return int(found.sum()) / int(there.sum()) if there.any() else 1.0


def relative_score_drift(stale: torch.Tensor, fresh: torch.Tensor, k: int) -> float:
    """Mean |fresh - stale| over the first k results, centred, over the spread of the stale scores.

    A difference that all blocks of a query share changes neither their order nor p(z | x): it is taken out.

    Args:
        stale, fresh: [Q, d] scores of the same blocks, by descending stale score; -inf where there is none.
    """
    drifts, spreads = [], []
    for old, new in zip(stale.double(), fresh.double(), strict=True):
        there = old.isfinite() & new.isfinite()
        if int(there.sum()) < 2:
            continue
        difference = (new - old)[there]
        drifts.append((difference - difference.mean())[:k].abs().mean())
        spreads.append(old[there].std())
    if not drifts:
        return 0.0
    return float(torch.stack(drifts).mean() / torch.stack(spreads).mean().clamp(min=1e-12))
