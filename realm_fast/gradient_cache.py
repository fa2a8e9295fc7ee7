"""Losses over more embeddings than memory holds graphs for: gradient caching.

    loss = cached_backward([queries, blocks], loss_of, token_budget=8192, seed=seed)

A contrastive loss needs the embeddings of the whole batch at once, but its graph through the trunks does not:

    1. embed every row, pack by pack, without a graph                              e = f(x; w)
    2. the loss of the embeddings alone, and its gradient with respect to them     g = dL/de
    3. embed again, pack by pack, with a graph, and send g into it                 dL/dw += (de/dw)^T g

Memory holds the graph of one pack; the result is the plain gradient (to the rounding of its sums) at the
price of a second forward pass. Dropout must be the same in 1 and 3: each pack seeds torch's generator anew.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from realm_fast.embedder import Embedder
from realm_fast.optim import step_seed
from realm_fast.packing import Row, TokenBatch, plan_packs, row_lengths, row_multiple


@dataclass(frozen=True)
class EmbeddedRows:
    """Inputs of a loss that are embedded by one function."""

    rows: Sequence[Row]
    embedder: Embedder
    embed: Callable[[TokenBatch], torch.Tensor]  # R rows -> [R, D]; embedder.query_emb, for one


def cached_backward(
    parts: Sequence[EmbeddedRows],
    loss_of: Callable[..., torch.Tensor],
    *,
    token_budget: int,
    seed: int,
    cache: bool = True,
) -> torch.Tensor:
    """Adds the gradient of loss_of(embeddings of parts[0], of parts[1], ...) to the parameters.

    Args:
        parts: what is embedded; every part has at least one row.
        loss_of: [rows of part, D] for each part -> scalar.
        token_budget: tokens in one pack, padding included.
        seed: of dropout; the same one draws the same masks whether or not gradients are cached.
        cache: False keeps the graph of all packs (a third less work, memory that grows with the batch).

    Returns:
        The loss, detached.
    """
    if not cache:
        loss = loss_of(*(_embed(part, n, token_budget, seed) for n, part in enumerate(parts)))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        embeddings = [_embed(part, n, token_budget, seed) for n, part in enumerate(parts)]
    for embedding in embeddings:
        embedding.requires_grad_()
    loss = loss_of(*embeddings)
    loss.backward()
    for n, (part, embedding) in enumerate(zip(parts, embeddings, strict=True)):
        assert embedding.grad is not None
        for order, again in _packs(part, n, token_budget, seed):
            again.backward(embedding.grad[order.to(again.device)])
    return loss.detach()


def embed_in_packs(part: EmbeddedRows, token_budget: int) -> torch.Tensor:
    """[rows, D], in the rows' order: what `loss_of` is given, with whatever graph the caller wants."""
    return _embed(part, 0, token_budget, 0)


def _embed(part: EmbeddedRows, number: int, token_budget: int, seed: int) -> torch.Tensor:
    orders, embeddings = zip(*_packs(part, number, token_budget, seed), strict=True)
    together = torch.cat(embeddings)
    return together[torch.argsort(torch.cat(orders)).to(together.device)]


def _packs(
    part: EmbeddedRows, number: int, token_budget: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (which rows, their embeddings), rows of like length together."""
    multiple_of = row_multiple(part.embedder.device)
    plan = plan_packs(row_lengths(part.rows), token_budget, multiple_of=multiple_of)
    for pack, (start, stop) in enumerate(itertools.pairwise(plan.bounds.tolist())):
        order = plan.order[start:stop]
        torch.manual_seed(step_seed(seed, pack, number))
        batch = part.embedder.pad([part.rows[i] for i in order.tolist()])
        yield torch.from_numpy(order), part.embed(batch)
