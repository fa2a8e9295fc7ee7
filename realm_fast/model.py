"""One differentiable step of REALM, for a micro-batch.

    model = RealmModel(embedder, reader, temperature=1.0, level="token")
    candidates = retrieve_candidates(index, store, model.search_emb(queries), queries, num_candidates=8)
    output = model(store, queries, candidates)
    output.loss.backward()

The index only chose the candidates. Scores are computed afresh here, s_bz = q_b . d_bz / temperature (for the
null block plus an offset, which is 0 unless set), with gradient for query and block, and from them
p(z | x) = softmax over the K slots. The reader sees every candidate beside the query, and the loss is the
negative marginal log-likelihood of the masked words.

Two savings change no value: a block that is a candidate of several queries is embedded once (the null block,
a candidate of all of them, above all), and rows are grouped by length before they go through a trunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from realm_fast.device import to_device
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError, ProvenanceError
from realm_fast.index import Index
from realm_fast.objective import emdr2_retriever_loss, perplexity_distillation_loss
from realm_fast.ops.linear_marginal_ce import MarginalStats, linear_marginal_cross_entropy
from realm_fast.ops.marginal_lse import Level
from realm_fast.packing import (
    NO_TOKENS,
    Row,
    TokenBatch,
    block_input,
    bucket_by_length,
    null_block_input,
    query_input,
    row_lengths,
    row_multiple,
)
from realm_fast.reader import Reader
from realm_fast.retriever import Candidates, retrieve_candidates

if TYPE_CHECKING:
    from realm_fast.drift import QueryCorrection
    from realm_fast.masking import MaskedQuery
    from realm_fast.token_store import TokenStore

IGNORE_INDEX = -100
Objective = Literal["marginal", "emdr2", "pdist", "ict"]
_ARGMAX_LOGITS_BYTES = 32 << 20


@dataclass(frozen=True)
class StepStats:
    """What a step showed, detached. Tensors stay on the model's device until somebody reads them."""

    masked_positions: int  # positions the loss counts
    queries: int  # queries with at least one candidate and one masked position
    null_probability: torch.Tensor | None  # mean p(null block | x); None without the null block
    retrieval_utility: torch.Tensor | None  # mean of log p(y | x) - log p(y | x, null block)
    marginal_log_likelihood: torch.Tensor  # mean over positions (token level) or queries (sequence level)
    null_log_likelihood: torch.Tensor | None  # the same mean for the null block alone
    masked_accuracy: torch.Tensor | None  # share of positions where the marginal's best token is the gold one
    masked_accuracy_null: torch.Tensor | None  # the same for the null block alone
    embedded_blocks: int  # block rows that went through the embedder
    block_slots: int  # what that would have been without sharing equal blocks
    reader_padding_waste: float  # share of the reader's computed tokens that were padding


@dataclass(frozen=True)
class StepOutput:
    loss: torch.Tensor  # scalar; 0 when nothing is masked
    retriever_loss: torch.Tensor | None  # its own, a mean over queries; None: it shares `loss`
    stats: StepStats
    retrieval_scores: torch.Tensor  # [B, K] fresh, those of p(z | x); -inf in absent slots
    marginal: MarginalStats


class RealmModel(nn.Module):
    """Embedder and reader, trained jointly.

    Args:
        level: marginalise each masked token ("token") or the whole span ("sequence").
        temperature: scores are divided by it before the softmax.
        null_score_offset: added to the null block's score after that. Where nothing has taught the embedder
            what the null block is, its probability starts near 0; then a retriever that is pulled towards the
            reader's likelihoods learns first of all to score every candidate lower.
        train_retriever: False: no graph is built through the embedder, and it stays in evaluation mode.
        objective: "marginal" trains both by the marginal likelihood. Otherwise that trains the reader alone,
            p(z | x) given, and the retriever learns from the reader's likelihoods, given: by "emdr2" or by
            perplexity distillation, "pdist" (realm_fast.objective); or, with "ict", not from here.
        distill_temperature: of "pdist".
    """

    def __init__(
        self,
        embedder: Embedder,
        reader: Reader,
        *,
        level: Level = "token",
        temperature: float = 1.0,
        null_score_offset: float = 0.0,
        train_retriever: bool = True,
        objective: Objective = "marginal",
        distill_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if embedder.tokenizer_hash != reader.tokenizer_hash:
            raise ProvenanceError(
                f"the embedder was made for tokenizer {embedder.tokenizer_hash[:12]} and the reader for "
                f"{reader.tokenizer_hash[:12]}: they must share one."
            )
        if not temperature > 0:
            raise ConfigError(f"pretrain.score_temperature: expected a value > 0, got {temperature}.")
        self.embedder = embedder
        self.reader = reader
        self.level: Level = level
        self.temperature = temperature
        self.null_score_offset = null_score_offset
        self.train_retriever = train_retriever
        self.objective: Objective = objective
        self.distill_temperature = distill_temperature
        if not train_retriever:
            embedder.eval()

    def set_retriever_training(self, on: bool) -> None:
        """Lets the gradient into the embedder, or not: then it is in evaluation mode, too."""
        self.train_retriever = on
        self.embedder.train(on and self.training)

    def train(self, mode: bool = True) -> "RealmModel":
        super().train(mode)
        if not self.train_retriever:
            self.embedder.eval()
        return self

    @torch.no_grad()
    def search_emb(self, queries: "Sequence[MaskedQuery]") -> torch.Tensor:
        """[B, D] embeddings to search with: in evaluation mode, so that retrieval ignores dropout."""
        was_training = self.embedder.training
        self.embedder.eval()
        try:
            return self._embed(self.embedder.query_emb, self._query_rows(queries))[0]
        finally:
            self.embedder.train(was_training)

    def forward(
        self,
        store: "TokenStore",
        queries: "Sequence[MaskedQuery]",
        candidates: Candidates,
        *,
        with_accuracy: bool = True,
    ) -> StepOutput:
        """The loss of B queries over their K candidates.

        Args:
            store: where the candidates' tokens are.
            with_accuracy: also find the best token of every marginal, which costs a third of the loss again.
        """
        scores, embedded_blocks = self.fresh_scores(store, queries, candidates)  # [B, K]
        host_labels = self._labels(queries, candidates)
        host_mask = host_labels != IGNORE_INDEX  # counted here: asking the device for it would wait for it
        labels = to_device(host_labels, scores.device)  # [B, M]
        hidden, waste = self.reader_hidden(store, queries, candidates, labels.shape[1])  # [B, K, M, H]
        # A query without a single candidate has no probability to speak of: its labels are all ignored.
        empty = to_device(~candidates.present.any(dim=1, keepdim=True), scores.device)
        scores = torch.where(empty, torch.zeros_like(scores), scores)
        weight, bias = self.reader.vocab_weight, self.reader.vocab_bias
        loss, marginal = linear_marginal_cross_entropy(
            hidden,
            weight,
            bias,
            labels,
            scores if self.objective == "marginal" else scores.detach(),
            level=self.level,
            ignore_index=IGNORE_INDEX,
            return_stats=True,
        )
        retriever_loss = None
        if self.objective in ("emdr2", "pdist") and self.train_retriever:
            retriever_loss = self._retriever_loss(marginal.gold_log_prob, scores, labels != IGNORE_INDEX)
        accuracy = accuracy_null = None
        if with_accuracy:
            accuracy, accuracy_null = masked_accuracy(
                hidden, weight, bias, labels, marginal.candidate_log_prob
            )
        has_null = bool(candidates.is_null[:, 0].all()) and candidates.num_queries > 0
        mask = labels != IGNORE_INDEX
        stats = StepStats(
            masked_positions=int(host_mask.sum()),
            queries=int(host_mask.any(dim=1).sum()),
            null_probability=marginal.candidate_log_prob[:, 0].exp().mean() if has_null else None,
            retrieval_utility=marginal.retrieval_utility if has_null else None,
            marginal_log_likelihood=_counted_mean(marginal.marginal, mask, self.level),
            null_log_likelihood=_null_log_likelihood(marginal, mask, self.level) if has_null else None,
            masked_accuracy=accuracy,
            masked_accuracy_null=accuracy_null if has_null else None,
            embedded_blocks=embedded_blocks,
            block_slots=int(candidates.present.sum()),
            reader_padding_waste=waste,
        )
        return StepOutput(loss, retriever_loss, stats, scores.detach(), marginal)

    def _retriever_loss(
        self, gold_log_prob: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if self.objective == "emdr2":
            # Of whole spans: token by token its gradient is the marginal likelihood's own.
            return emdr2_retriever_loss(gold_log_prob, scores, mask, level="sequence")
        return perplexity_distillation_loss(gold_log_prob, scores, mask, temperature=self.distill_temperature)

    def fresh_scores(
        self, store: "TokenStore", queries: "Sequence[MaskedQuery]", candidates: Candidates
    ) -> tuple[torch.Tensor, int]:
        """([B, K] float32 scores, those of p(z | x), -inf in absent slots; how many blocks were embedded)"""
        special = self.embedder.special
        # NO_BLOCK sorts first: if the null block is present anywhere it is row 0.
        ids, slot_row = torch.unique(candidates.block_ids[candidates.present], return_inverse=True)
        rows = [
            null_block_input(special)
            if i < 0
            else block_input(store.title_tokens(i), store.body_tokens(i), special)
            for i in ids.tolist()
        ]
        learns = self.train_retriever and self.objective != "ict"
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            query_emb, _ = self._embed(self.embedder.query_emb, self._query_rows(queries))  # [B, D]
            scores = query_emb.new_full(candidates.block_ids.shape, -torch.inf)  # [B, K]
            if rows:
                block_emb, _ = self._embed(self.embedder.block_emb, rows)  # [unique, D]
                slot = to_device(candidates.present.nonzero(), query_emb.device)  # [slots, 2]
                rows_of_slots = block_emb[to_device(slot_row, block_emb.device)]
                slot_scores = (query_emb[slot[:, 0]] * rows_of_slots).sum(dim=1)
                scores = scores.index_put((slot[:, 0], slot[:, 1]), slot_scores / self.temperature)
        if self.null_score_offset:
            is_null = to_device(candidates.is_null, scores.device)
            scores = scores + self.null_score_offset * is_null.to(scores.dtype)
        return scores, len(rows)

    def reader_hidden(
        self, store: "TokenStore", queries: "Sequence[MaskedQuery]", candidates: Candidates, num_masks: int
    ) -> tuple[torch.Tensor, float]:
        """([B, K, M, H] the reader's states at the masked positions, 0 in absent slots; padding waste)"""
        slot = candidates.present.nonzero()  # [slots, 2]
        rows = [
            self.reader.joint_row(
                queries[b].tokens,
                NO_TOKENS if block < 0 else store.body_tokens(block),
                what=f"the query from block {queries[b].origin_block_id}",
            )
            for (b, _), block in zip(
                slot.tolist(), candidates.block_ids[candidates.present].tolist(), strict=True
            )
        ]
        positions = torch.zeros(
            len(queries), num_masks, dtype=torch.int64
        )  # [B, M]; [CLS] where there is none
        for b, query in enumerate(queries):
            positions[b, : len(query.positions)] = torch.from_numpy(query.positions.astype(np.int64)) + 1
        row_positions = to_device(positions[slot[:, 0]], self.reader.device)  # [slots, M]
        num_queries, num_candidates = candidates.block_ids.shape
        if not rows:
            shape = (num_queries, num_candidates, num_masks, self.reader.hidden_size)
            return self.reader.vocab_weight.new_zeros(shape), 0.0
        states, waste = _by_length(
            rows,
            row_multiple(self.reader.device),
            self.reader.pad,
            lambda batch, index: self.reader.masked_hidden(
                batch, row_positions[to_device(index, row_positions.device)]
            ),
        )  # [slots, M, H]
        hidden = states.new_zeros(num_queries, num_candidates, *states.shape[1:])
        slot = to_device(slot, states.device)
        return hidden.index_put((slot[:, 0], slot[:, 1]), states), waste

    def _query_rows(self, queries: "Sequence[MaskedQuery]") -> list[Row]:
        return [query_input(query.tokens, self.embedder.special) for query in queries]

    def _embed(
        self, embed: Callable[[TokenBatch], torch.Tensor], rows: Sequence[Row]
    ) -> tuple[torch.Tensor, float]:
        return _by_length(
            rows, row_multiple(self.embedder.device), self.embedder.pad, lambda batch, _: embed(batch)
        )

    def _labels(self, queries: "Sequence[MaskedQuery]", candidates: Candidates) -> torch.Tensor:
        """[B, M] int64, M the most masks of a query; IGNORE_INDEX beyond a query's own."""
        most = max((len(query.labels) for query in queries), default=0)
        labels = torch.full((len(queries), max(most, 1)), IGNORE_INDEX, dtype=torch.int64)
        answerable = candidates.present.any(dim=1).tolist()
        for b, query in enumerate(queries):
            if answerable[b]:
                labels[b, : len(query.labels)] = torch.from_numpy(query.labels.astype(np.int64))
        return labels


def realm_step(
    model: RealmModel,
    index: Index,
    store: "TokenStore",
    queries: "Sequence[MaskedQuery]",
    *,
    num_candidates: int,
    exclude_trivial: bool = True,
    use_null_block: bool = True,
    with_accuracy: bool = True,
    correction: "QueryCorrection | None" = None,
) -> tuple[StepOutput, Candidates]:
    """Search, then the loss: all of a micro-batch up to `backward()`.

    Args:
        correction: applied to the queries that search, to make up for the index's age.
    """
    search_emb = model.search_emb(queries)
    candidates = retrieve_candidates(
        index,
        store,
        search_emb if correction is None else correction(search_emb),
        queries,
        num_candidates=num_candidates,
        exclude_trivial=exclude_trivial,
        use_null_block=use_null_block,
    )
    return model(store, queries, candidates, with_accuracy=with_accuracy), candidates


@torch.no_grad()
def masked_accuracy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    candidate_log_prob: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often the gold token is the most probable one, under the marginal and under slot 0 alone.

    argmax_v sum_z p(z | x) p(v | x, z). All K candidates of a position are in one chunk, a few positions at a
    time, so that [B, K, M, V] never exists.

    Args:
        hidden: [B, K, M, H]; weight: [V, H]; bias: [V]; labels: [B, M]; candidate_log_prob: [B, K].

    Returns:
        Two scalars; 0 where nothing is masked.
    """
    query, position = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [P]
    num_candidates = hidden.shape[1]
    chunk = max(1, _ARGMAX_LOGITS_BYTES // (4 * num_candidates * weight.shape[0]))
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    right = torch.zeros(2, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for at in range(0, len(query), chunk):
            b, m = query[at : at + chunk], position[at : at + chunk]
            logits = torch.nn.functional.linear(hidden[b, :, m], weight, bias)  # [p, K, V]
            probability = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            prior = candidate_log_prob[b].exp().to(probability.dtype)  # [p, K]
            marginal = torch.einsum("pk,pkv->pv", prior, probability)
            gold = labels[b, m]
            right[0] += (marginal.argmax(dim=-1) == gold).sum()
            right[1] += (probability[:, 0].argmax(dim=-1) == gold).sum()
    share = right / max(len(query), 1)
    return share[0], share[1]


def _by_length(
    rows: Sequence[Row],
    multiple_of: int,
    pad: Callable[[Sequence[Row]], TokenBatch],
    run: Callable[[TokenBatch, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, float]:
    """Runs rows in groups of like length; results in the rows' order, and the share of padding."""
    lengths = row_lengths(rows)
    results, order, computed = [], [], 0
    for group in bucket_by_length(lengths, multiple_of=multiple_of):
        batch = pad([rows[i] for i in group.tolist()])
        index = torch.from_numpy(group)
        results.append(run(batch, index))
        order.append(index)
        computed += batch.ids.numel()
    if len(results) == 1:  # one group keeps the rows' order
        return results[0], 1.0 - float(lengths.sum()) / max(computed, 1)
    back = to_device(torch.argsort(torch.cat(order)), results[0].device)
    return torch.cat(results)[back], 1.0 - float(lengths.sum()) / max(computed, 1)


def _counted_mean(values: torch.Tensor, mask: torch.Tensor, level: Level) -> torch.Tensor:
    counted = mask if level == "token" else mask.any(dim=1)
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def _null_log_likelihood(marginal: MarginalStats, mask: torch.Tensor, level: Level) -> torch.Tensor:
    gold = marginal.gold_log_prob[:, 0]  # [B, M]; 0 where ignored
    return _counted_mean(gold if level == "token" else gold.sum(dim=1), mask, level)
