"""Following one masked sentence through the model: what REALM does, in numbers a report can show.

    illustrate(model, store, tokenizer, query, candidates, title="...", step=200)

sentence -> candidates with p(z | x) -> each candidate's prediction p(y | x, z) -> the marginal p(y | x) ->
the gradient of the loss with respect to each candidate's score, p(z | x) - p(z | x, y): negative where the
step pushes the block up.
"""

from typing import TYPE_CHECKING, Any

import torch

from realm_fast.model import RealmModel
from realm_fast.retriever import Candidates
from realm_fast.types import NO_BLOCK

if TYPE_CHECKING:
    from realm_fast.masking import MaskedQuery
    from realm_fast.token_store import TokenStore
    from realm_fast.tokenizer import Tokenizer


@torch.no_grad()
def illustrate(
    model: RealmModel,
    store: "TokenStore",
    tokenizer: "Tokenizer",
    query: "MaskedQuery",
    candidates: Candidates,
    *,
    title: str,
    step: int,
    top_tokens: int = 5,
) -> dict[str, Any]:
    """One query's way through the model, in evaluation mode, as plain JSON.

    Scores and hidden states come from the model as it is; everything after them is float64, so that
    probabilities sum to 1 and the gradients to 0 within about 1e-12.

    Args:
        candidates: of this query alone (B = 1).
        title: a heading for people.
        step: the training step of the weights.
        top_tokens: how many predictions to list.

    Returns:
        {"title", "origin_block_id", "step", "level", "query", "query_tokens", "positions", "gold",
        "candidates": [{"slot", "block_id" (-1 for the null block), "title", "text", "p_z", "score",
        "responsibility" (mean over positions), "gradient", "predictions" [M][top_tokens] {"token", "p"},
        "gold_p" [M]}], "marginal" [M][top_tokens], "gold_marginal_p" [M], "null_gold_p" [M] or None}.
        "gradient" is d loss / d score for the loss of this query alone, averaged over its masked positions.
    """
    if candidates.num_queries != 1:
        raise ValueError(f"candidates: expected those of one query, got those of {candidates.num_queries}")
    was_training = model.training
    model.eval()
    try:
        scores, _ = model.fresh_scores(store, [query], candidates)
        hidden, _ = model.reader_hidden(store, [query], candidates, len(query.labels))
    finally:
        model.train(was_training)
    labels = torch.from_numpy(query.labels.astype("int64")).to(hidden.device)  # [M]
    log_p_z = scores[0].double().log_softmax(dim=-1)  # [K]
    weight, bias = model.reader.vocab_weight.double(), model.reader.vocab_bias.double()
    log_p_y = torch.nn.functional.linear(hidden[0].double(), weight, bias).log_softmax(dim=-1)  # [K, M, V]
    gold_log_p = log_p_y.gather(2, labels[None, :, None].expand(log_p_y.shape[0], -1, 1))[..., 0]  # [K, M]
    posterior = _responsibility(log_p_z, gold_log_p, model.level)  # [K, M], or [K, 1] for the whole span
    marginal = torch.logsumexp(log_p_z[:, None, None] + log_p_y, dim=0).exp()  # [M, V]
    responsibility = posterior.mean(dim=1)  # [K]
    p_z = log_p_z.exp()
    slots = candidates.present[0].nonzero()[:, 0].tolist()
    has_null = bool(candidates.is_null[0, 0])
    return {
        "title": title,
        "origin_block_id": int(query.origin_block_id),
        "step": step,
        "level": model.level,
        "query": tokenizer.decode(query.tokens),
        "query_tokens": tokenizer.tokens(query.tokens),
        "positions": [int(p) for p in query.positions],
        "gold": tokenizer.tokens(query.labels),
        "candidates": [
            {
                "slot": k,
                **_block(store, int(candidates.block_ids[0, k])),
                "p_z": float(p_z[k]),
                "score": float(scores[0, k]),
                "responsibility": float(responsibility[k]),
                "gradient": float(p_z[k] - responsibility[k]),
                "predictions": _top(log_p_y[k].exp(), tokenizer, top_tokens),
                "gold_p": gold_log_p[k].exp().tolist(),
            }
            for k in slots
        ],
        "marginal": _top(marginal, tokenizer, top_tokens),
        "gold_marginal_p": torch.logsumexp(log_p_z[:, None] + gold_log_p, dim=0).exp().tolist(),
        "null_gold_p": gold_log_p[0].exp().tolist() if has_null else None,
    }


def _responsibility(log_p_z: torch.Tensor, gold_log_p: torch.Tensor, level: str) -> torch.Tensor:
    """p(z | x, y): [K, M] for each position, or [K, 1] for the whole span."""
    if level == "sequence":
        gold_log_p = gold_log_p.sum(dim=1, keepdim=True)
    return (log_p_z[:, None] + gold_log_p).softmax(dim=0)


def _block(store: "TokenStore", block_id: int) -> dict[str, Any]:
    if block_id == NO_BLOCK:
        return {"block_id": NO_BLOCK, "title": "", "text": ""}
    return {"block_id": block_id, "title": store.title(block_id), "text": store.text(block_id)}


def _top(probabilities: torch.Tensor, tokenizer: "Tokenizer", count: int) -> list[list[dict[str, Any]]]:
    """[M, V] -> for each position the most probable tokens, best first."""
    values, ids = probabilities.topk(min(count, probabilities.shape[1]), dim=1)
    return [
        [{"token": token, "p": p} for token, p in zip(tokenizer.tokens(row), ps, strict=True)]
        for row, ps in zip(ids.tolist(), values.tolist(), strict=True)
    ]
