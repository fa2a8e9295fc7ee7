"""What a pre-trained model can do, measured from outside the loop: before training, and after.

evaluations.jsonl    masked words of held-out sentences, with retrieval and without; recall of the retriever
                     on questions it was never trained for (zero-shot)
illustrations.json   a few masked sentences followed through the whole model, for the report
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realm_fast.config import Config
from realm_fast.errors import UserError
from realm_fast.evaluate import QuestionSet, answer_ranks, parse_cutoffs, question_sets, recall_percent
from realm_fast.evidence import holds_span
from realm_fast.explain import illustrate
from realm_fast.files import write_json
from realm_fast.masking import MaskedQuery, Masker
from realm_fast.metrics import read_jsonl, write_evaluations
from realm_fast.model import RealmModel, realm_step
from realm_fast.progress import bar
from realm_fast.retriever import Candidates, retrieve_candidates
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import IndexSnapshot
from realm_fast.token_store import TokenStore
from realm_fast.types import NO_BLOCK

log = logging.getLogger(__name__)


class Probe:
    """Measures a model between two stretches of training; leaves model and random state as they were.

    Args:
        held_out: draws sentences of documents that training does not see; None where there are none.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        model: RealmModel,
        store: TokenStore,
        held_out: Masker | None,
        *,
        progress: bool,
    ) -> None:
        self.run, self.config, self.model, self.store = run, config, model, store
        self.held_out, self.progress = held_out, progress
        self._sets: list[QuestionSet] | None = None

    @property
    def path(self) -> Path:
        return self.run.pretrain_dir / "evaluations.jsonl"

    def measure(self, when: str, snapshot: IndexSnapshot, *, only_if_missing: bool = False) -> None:
        """Adds (or replaces) the lines of `when` ("before", "after") in evaluations.jsonl."""
        earlier = read_jsonl(self.path, "the evaluations") if self.path.exists() else []
        if only_if_missing and any(line["when"] == when for line in earlier):
            return
        with self.run.stage(f"measure {when}"):
            write_evaluations(self.path, when, self.rows(snapshot))

    def rows(self, snapshot: IndexSnapshot) -> list[dict[str, Any]]:
        """What is measured: a row over all questions, then one over the reachable ones."""
        masked = self._masked_words(snapshot)
        return [{"step": snapshot.step, **row, **masked} for row in self._recall(snapshot)]

    def illustrate(self, snapshot: IndexSnapshot, step: int) -> None:
        """Writes illustrations.json."""
        count = self.config.pretrain.illustrations
        if self.held_out is None or not count:
            return
        settings, tokenizer = self.config.pretrain, self.store.tokenizer()
        shown = []
        for slot in range(count):
            query = self.held_out.query(0, self.config.evaluate.held_out_queries + slot)
            candidates = retrieve_candidates(
                snapshot.index,
                self.store,
                self.model.search_emb([query]),
                [query],
                num_candidates=settings.num_candidates,
                exclude_trivial=settings.exclude_trivial,
                use_null_block=settings.use_null_block,
            )
            if not candidates.present.any():  # every block is a near-copy, and there is no null block
                continue
            title = self.store.title(query.origin_block_id)
            shown.append(
                illustrate(self.model, self.store, tokenizer, query, candidates, title=title, step=step)
            )
        write_json(self.run.pretrain_dir / "illustrations.json", shown)

    def _masked_words(self, snapshot: IndexSnapshot) -> dict[str, Any]:
        """How well the masked words of held-out sentences are predicted, with retrieval and without.

        Where salient spans are masked, also how often the words stand in a block that is retrieved for them:
        in the first, and in any of the candidates ("span_recall", by cut-off).
        """
        names = {
            "masked_accuracy": "masked_accuracy",
            "masked_accuracy_null": "masked_accuracy_null",
            "retrieval_utility": "retrieval_utility",
            "masked_nll": "marginal_log_likelihood",
            "masked_nll_null": "null_log_likelihood",
        }
        if self.held_out is None:
            return dict.fromkeys(names)
        settings, count = self.config.pretrain, self.config.evaluate.held_out_queries
        sums, counted = dict.fromkeys(names, 0.0), 0
        ranks: list[int] = []
        spans = self.config.masking.strategy == "salient_span" and settings.blocks_a_query > 0
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                bar(total=count, desc="held-out words", unit="query", enabled=self.progress) as shown,
            ):
                for start in range(0, count, settings.batch_queries):
                    slots = range(start, min(start + settings.batch_queries, count))
                    queries = [self.held_out.query(0, slot) for slot in slots]
                    output, candidates = realm_step(
                        self.model,
                        snapshot.index,
                        self.store,
                        queries,
                        num_candidates=settings.num_candidates,
                        exclude_trivial=settings.exclude_trivial,
                        use_null_block=settings.use_null_block,
                    )
                    weight = output.stats.masked_positions
                    counted += weight
                    for name, source in names.items():
                        value = getattr(output.stats, source)
                        sums[name] += (float("nan") if value is None else float(value)) * weight
                    if spans:
                        ranks += span_ranks(self.store, queries, candidates)
                    shown.update(len(queries))
        finally:
            self.model.train(was_training)
        means = {name: total / max(counted, 1) for name, total in sums.items()}
        for name in ("masked_nll", "masked_nll_null"):
            means[name] = -means[name]
        shown_means = {name: None if value != value else round(value, 5) for name, value in means.items()}
        if not spans:
            return shown_means
        cutoffs = sorted({1, settings.blocks_a_query})
        return {**shown_means, "span_recall": recall_percent(np.array(ranks, dtype=np.int64), cutoffs)}

    def _recall(self, snapshot: IndexSnapshot) -> list[dict[str, Any]]:
        """Zero-shot recall over all questions of the evaluation, and over the reachable ones."""
        if self._sets is None:
            try:
                self._sets = question_sets(self.run, self.config, self.store, progress=self.progress)
            except UserError as error:
                log.warning("no evaluation questions, so the retriever's recall is not measured: %s", error)
                self._sets = []
        questions = [question for chosen in self._sets for question in chosen.questions]
        if not questions:
            return [{"subset": "all", "questions": 0, "recall": {}}]
        cutoffs = parse_cutoffs(self.config.evaluate.recall_at)
        ranks = answer_ranks(
            self.model.embedder,
            snapshot.index,
            self.store,
            questions,
            max(cutoffs),
            max_question_tokens=self.config.masking.max_query_tokens - 2,
            progress=self.progress,
        )
        rows = []
        for subset in ("all", "reachable"):
            rows_of = [i for i, q in enumerate(questions) if subset == "all" or q.reachable]
            rows.append(
                {
                    "subset": subset,
                    "questions": len(rows_of),
                    "recall": recall_percent(ranks[rows_of], cutoffs),
                }
            )
        return rows


def span_ranks(store: TokenStore, queries: Sequence[MaskedQuery], candidates: Candidates) -> list[int]:
    """The place, from 0, of each query's first candidate that holds its masked span; -1: none does.

    The null block takes no place. Of a query whose masked tokens are one span.
    """
    tokenizer, ranks = store.tokenizer(), []
    for query, ids, null in zip(queries, candidates.block_ids, candidates.is_null, strict=True):
        first = query.sentence[0] + int(query.positions[0])
        masked = int((query.tokens == tokenizer.mask_id).sum())  # labels may be fewer
        span = store.body_tokens(query.origin_block_id)[first : first + masked]
        found = [
            place
            for place, block in enumerate(ids[~null].tolist())
            if block != NO_BLOCK and holds_span(store.body_tokens(block), span, tokenizer)
        ]
        ranks.append(found[0] if found else -1)
    return ranks
