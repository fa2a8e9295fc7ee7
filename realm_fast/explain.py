"""Following one masked sentence through the model: what REALM does, in numbers a report can show.

    illustrate(model, store, tokenizer, query, candidates, title="...", step=200)
    print(format_illustration(explain_sentence(run, "Paris is the capital of [MASK:France].")))

sentence -> candidates with p(z | x) -> each candidate's prediction p(y | x, z) -> the marginal p(y | x) ->
the gradient of the loss with respect to each candidate's score, p(z | x) - p(z | x, y): negative where the
step pushes the block up.
"""

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from realm_fast.checkpoint import newest_checkpoint
from realm_fast.embedder import Embedder
from realm_fast.errors import DataError, UserError
from realm_fast.masking import MaskedQuery
from realm_fast.model import RealmModel
from realm_fast.reader import Reader
from realm_fast.retriever import Candidates, retrieve_candidates
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import open_snapshot, trained_snapshot
from realm_fast.tokenizer import Tokenizer
from realm_fast.types import NO_BLOCK

if TYPE_CHECKING:
    from realm_fast.token_store import TokenStore

_MASK = re.compile(r"\[MASK(?::([^\]]*))?\]")


@torch.no_grad()
def illustrate(
    model: RealmModel,
    store: "TokenStore",
    tokenizer: Tokenizer,
    query: MaskedQuery,
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


def _top(probabilities: torch.Tensor, tokenizer: Tokenizer, count: int) -> list[list[dict[str, Any]]]:
    """[M, V] -> for each position the most probable tokens, best first."""
    values, ids = probabilities.topk(min(count, probabilities.shape[1]), dim=1)
    return [
        [{"token": token, "p": p} for token, p in zip(tokenizer.tokens(row), ps, strict=True)]
        for row, ps in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def parse_masked_sentence(sentence: str, tokenizer: Tokenizer) -> tuple[MaskedQuery, bool]:
    """`Paris is the capital of [MASK:France].` as a query, and whether every masked word is known.

    `[MASK:word]` becomes one mask a wordpiece of the word; a bare `[MASK]` is one wordpiece, not known.

    Raises:
        UserError: nothing is masked, a `[MASK:]` names no word, or nothing is left to retrieve by.
    """
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    known, at = True, 0
    for match in _MASK.finditer(sentence):
        tokens += tokenizer.encode(sentence[at : match.start()]).ids.tolist()
        if match[1] is None:
            gold, known = [tokenizer.mask_id], False
        else:
            gold = tokenizer.encode(match[1]).ids.tolist()
            if not gold:
                raise UserError(f"sentence: {match[0]} names no word; write [MASK:word] or [MASK].")
        positions += range(len(tokens), len(tokens) + len(gold))
        labels += gold
        tokens += [tokenizer.mask_id] * len(gold)
        at = match.end()
    tokens += tokenizer.encode(sentence[at:]).ids.tolist()
    if not positions:
        raise UserError("sentence: expected a [MASK] or [MASK:word] in it.")
    if len(tokens) == len(positions):
        raise UserError("sentence: everything is masked; nothing is left to retrieve by.")
    query = MaskedQuery(
        origin_block_id=NO_BLOCK,
        tokens=np.array(tokens, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        labels=np.array(labels, dtype=np.int32),
        sentence=(0, 0),
    )
    return query, known


def explain_sentence(run: RunFolder, sentence: str) -> dict[str, Any]:
    """Follows a sentence through the run's newest pre-trained model; see `illustrate` for what comes back.

    Where a masked word is not given, the model's own best guess stands in for it ("gold_known": false).

    Raises:
        DataError: the run is not pre-trained. UserError: see parse_masked_sentence.
    """
    config, store = run.config(), run.store()
    tokenizer = store.tokenizer()
    query, known = parse_masked_sentence(sentence, tokenizer)
    checkpoint = newest_checkpoint(run.pretrain_dir / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{run.path}: has no pre-trained model yet; run `realm-fast pretrain {run.path}`.")
    settings = config.pretrain
    model = RealmModel(
        Embedder.load(checkpoint.module_folder("embedder")),
        Reader.load(checkpoint.module_folder("reader")),
        level=settings.level,
        temperature=settings.score_temperature,
        null_score_offset=settings.null_score_offset,
    )
    longest = min(
        config.masking.max_query_tokens - 2, config.reader.max_joint_tokens - config.corpus.max_block_tokens
    )
    if len(query.tokens) > max(longest, 8):
        raise UserError(f"sentence: expected at most {max(longest, 8)} wordpieces, got {len(query.tokens)}.")
    index = open_snapshot(trained_snapshot(run.pretrain_dir / "snapshots", checkpoint.state)).index
    candidates = retrieve_candidates(
        index,
        store,
        model.search_emb([query]),
        [query],
        num_candidates=settings.num_candidates,
        use_null_block=settings.use_null_block,
    )
    if not candidates.present.any():
        raise DataError(f"{run.path}: no block was found for the sentence, and there is no null block.")

    def follow(one: MaskedQuery) -> dict[str, Any]:
        return illustrate(model, store, tokenizer, one, candidates, title=sentence, step=checkpoint.step)

    shown = follow(query)
    if not known:
        guesses = [tokenizer.token_id(position[0]["token"]) for position in shown["marginal"]]
        labels = [
            guess if label == tokenizer.mask_id else label
            for label, guess in zip(query.labels.tolist(), guesses, strict=True)
        ]
        shown = follow(dataclasses.replace(query, labels=np.array(labels, dtype=np.int32)))
    return {**shown, "gold_known": known}


def format_illustration(shown: dict[str, Any]) -> str:
    """An illustration for the terminal."""
    gold = " ".join(shown["gold"])
    whose = "gold" if shown.get("gold_known", True) else "the model's own guess"
    lines = [
        shown["query"],
        f"masked: {gold}  ({whose}; step {shown['step']})",
        "",
        "  p(z|x)  gradient   p(y|x,z)  block",
    ]
    for candidate in shown["candidates"]:
        gradient = candidate["gradient"]
        push = "up  " if gradient < -5e-4 else "down" if gradient > 5e-4 else "    "
        name = candidate["title"] if candidate["block_id"] != NO_BLOCK else "the null block (no evidence)"
        probabilities = " ".join(f"{p:.3f}" for p in candidate["gold_p"])
        lines.append(f"  {candidate['p_z']:6.3f}  {gradient:+.3f} {push} {probabilities:>8}  {name}")
        if candidate["text"]:
            lines.append(f"{'':29}{candidate['text'][:100]}{'…' if len(candidate['text']) > 100 else ''}")
    lines += ["", "marginal p(y|x) = sum over z of p(y|x,z) p(z|x):"]
    for token, probability, top in zip(
        shown["gold"], shown["gold_marginal_p"], shown["marginal"], strict=True
    ):
        guesses = ", ".join(f"{guess['token']} {guess['p']:.3f}" for guess in top)
        lines.append(f"  {token}: {probability:.3f}   best guesses: {guesses}")
    lines += [
        "",
        "Negative gradient: the step raises the block's score; it predicted better than the mixture.",
    ]
    return "\n".join(lines)
