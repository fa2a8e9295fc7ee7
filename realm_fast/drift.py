"""How far training has left the index behind, measured on fixed probe queries.

    probe = DriftProbe(store, queries, k=7, sample_blocks=256, seed=config.seed)
    drift = probe.measure(model, snapshot.index)       # drift.overlap, drift.score_drift

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
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from realm_fast.embedding import embed_blocks
from realm_fast.index import Index
from realm_fast.types import NO_BLOCK

if TYPE_CHECKING:
    from realm_fast.masking import MaskedQuery
    from realm_fast.model import RealmModel
    from realm_fast.token_store import TokenStore

DEPTH = 4  # blocks embedded afresh for each of the k that count


@dataclass(frozen=True)
class Drift:
    """What one check found."""

    overlap: float  # in [0, 1]
    score_drift: float  # 0: every score moved by the same amount
    blocks: int  # embedded for it
    seconds: float


class DriftProbe:
    """Measures drift on the same queries and the same sample of blocks each time.

    Args:
        queries: masked sentences; the block each was cut from is left out of its results.
        k: blocks of a result that count, at least 1.
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
        self.k = min(k, len(store) - 1)  # one is left out
        self.origins = torch.tensor([query.origin_block_id for query in self.queries])  # [Q]
        self.sample = np.random.default_rng(seed).choice(
            len(store), size=min(sample_blocks, len(store)), replace=False
        )

    def measure(self, model: "RealmModel", index: Index) -> Drift:
        """Leaves the model and every random state as they were."""
        begin = time.monotonic()
        query_emb = model.search_emb(self.queries).float().cpu()  # [Q, D]
        depth = min(DEPTH * self.k, len(index))
        stale = index.search(query_emb, depth, exclude_ids=self.origins)
        pool = np.union1d(stale.ids[stale.ids != NO_BLOCK].numpy(), self.sample)  # [P] ascending
        pool_emb = embed_blocks(model.embedder, self.store, block_ids=pool, token_budget=self.token_budget)
        fresh = query_emb @ pool_emb.T  # [Q, P]
        pool_ids = torch.from_numpy(pool)
        fresh[self.origins[:, None] == pool_ids] = -torch.inf
        fresh_top = pool_ids[fresh.topk(self.k, dim=1).indices]  # [Q, k]
        place = torch.searchsorted(pool_ids, stale.ids.clamp(min=0)).clamp(max=len(pool) - 1)
        return Drift(
            overlap=overlap_at_k(stale.ids[:, : self.k], fresh_top),
            score_drift=relative_score_drift(
                stale.scores, torch.where(stale.ids == NO_BLOCK, -torch.inf, fresh.gather(1, place)), self.k
            ),
            blocks=len(pool),
            seconds=time.monotonic() - begin,
        )


def overlap_at_k(stale_ids: torch.Tensor, fresh_ids: torch.Tensor) -> float:
    """The share of stale results that are fresh results too, mean over queries.

    Args:
        stale_ids, fresh_ids: [Q, k] int64, distinct in a row; NO_BLOCK where there was none.
    """
    there = stale_ids != NO_BLOCK
    found = (stale_ids[:, :, None] == fresh_ids[:, None, :]).any(dim=2) & there
    return int(found.sum()) / max(int(there.sum()), 1)


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
