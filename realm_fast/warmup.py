"""Reader warm-up: learn to use a block before a retriever's choice depends on it.

    x: a masked sentence, e(x), d(x): its evidence and its distractor (realm_fast.evidence), 0: the null block
    loss = -mean over masked words of log p(y | x, z),  z = e(x), d(x) or 0 at random, as often as is set

A reader that cannot use a block tells the retriever nothing: every candidate is as good as the null block.
One that saw nothing but evidence believes every block, and most candidates are none: distractors teach it to
doubt. This stage needs no retriever and no label. RUN/warmup/evaluations.jsonl has, for sentences of held-out
documents, the negative log-likelihood and the accuracy of the masked words with each of these and with a
random block: with the evidence it should end far below all others, and those close to one another.
"""

from typing import Any

import numpy as np
import torch

from realm_fast.checkpoint import Checkpoint
from realm_fast.config import Config
from realm_fast.errors import ConfigError
from realm_fast.evidence import build_evidence
from realm_fast.masking import MaskedQuery, Masker, prepare_spans
from realm_fast.model import IGNORE_INDEX, masked_accuracy
from realm_fast.ops.linear_marginal_ce import linear_marginal_cross_entropy
from realm_fast.optim import check_loss
from realm_fast.packing import NO_TOKENS, bucket_by_length, row_lengths, row_multiple
from realm_fast.progress import bar
from realm_fast.reader import Reader
from realm_fast.run_folder import RunFolder
from realm_fast.stage import StageTrainer, run_stage
from realm_fast.types import NO_BLOCK

_STREAM = 0x7761726D  # keeps these random numbers apart from others drawn from the same seed


class Warmup(StageTrainer):
    """The stage: `realm-fast warmup`."""

    name = "warmup"
    module_name = "reader"
    shapes = ("reader", "masking", "warmup")
    model: Reader

    def load(self, checkpoint: Checkpoint | None) -> Reader:
        if checkpoint is None:
            return Reader.from_config(self.config.reader, self.store.tokenizer())
        return Reader.load(checkpoint.module_folder("reader"))

    def prepare(self) -> None:
        evidence, distractor = self.settings.evidence_probability, self.settings.distractor_probability
        if evidence + distractor > 1:
            raise ConfigError(
                "warmup.distractor_probability: expected at most 1 - warmup.evidence_probability = "
                f"{1 - evidence:g}, got {distractor:g}"
            )
        spans = prepare_spans(self.store, self.config.masking, progress=self.progress)
        if spans is None:
            raise ConfigError(
                "masking.strategy: the reader's warm-up needs salient_span, as evidence is found for spans; "
                f"got {self.config.masking.strategy}."
            )
        self.evidence = build_evidence(self.store, spans, progress=self.progress)
        usable = self.evidence.usable_spans()
        self.masker = Masker(self.store, self.config.masking, self.config.seed, usable, split="train")
        self.held_out = self.masker.with_split("heldout")

    def update(self, step: int) -> dict[str, float]:
        count = self.settings.batch_queries
        queries = self.masker.queries(step, count)
        random = np.random.Generator(
            np.random.Philox(counter=[0, 0, 0, step], key=[self.config.seed, _STREAM])
        )
        draws = random.random(count)
        seen = draws < self.settings.evidence_probability
        misled = ~seen & (draws < self.settings.evidence_probability + self.settings.distractor_probability)
        blocks = [
            self.evidence.block_of(query) if s else self.evidence.distractor_of(query) if m else NO_BLOCK
            for query, s, m in zip(queries, seen, misled, strict=True)
        ]
        with self.autocast():
            loss, _ = self._loss(queries, blocks)
        value = check_loss(loss, step, self.optimizer)
        loss.backward()
        return {"loss": value, "with_evidence": float(seen.mean())}

    def measure(self) -> dict[str, Any]:
        """NLL and accuracy of the masked words, by what the reader reads beside them."""
        count, size = self.config.evaluate.held_out_queries, self.settings.batch_queries
        random = np.random.default_rng([self.config.seed, _STREAM])
        sums: dict[str, float] = {}
        positions = 0
        with bar(total=count, desc="held-out words", unit="query", enabled=self.progress) as shown:
            for start in range(0, count, size):
                slots = range(start, min(start + size, count))
                queries = [self.held_out.query(0, slot) for slot in slots]
                words = sum(len(query.labels) for query in queries)
                choices = {
                    "evidence": [self.evidence.block_of(query) for query in queries],
                    "null": [NO_BLOCK] * len(queries),
                    "distractor": [self.evidence.distractor_of(query) for query in queries],
                    "random": random.integers(len(self.store), size=len(queries)).tolist(),
                }
                for name, blocks in choices.items():
                    with self.autocast():
                        loss, accuracy = self._loss(queries, blocks, with_accuracy=True)
                    sums[f"nll_{name}"] = sums.get(f"nll_{name}", 0.0) + float(loss) * words
                    sums[f"accuracy_{name}"] = sums.get(f"accuracy_{name}", 0.0) + accuracy * words
                positions += words
                shown.update(len(queries))
        return {
            "queries": count,
            "spans": self.evidence.spans.num_spans,
            "spans_with_evidence": self.evidence.num_found,
            **{name: round(total / positions, 5) for name, total in sums.items()},
        }

    def _loss(
        self, queries: list[MaskedQuery], blocks: list[int], *, with_accuracy: bool = False
    ) -> tuple[torch.Tensor, float]:
        """(mean over the masked words of -log p(y | x, z), share of them that are the most probable word)"""
        most = max(len(query.labels) for query in queries)
        positions = np.zeros((len(queries), most), dtype=np.int64)  # [B, M]; [CLS] where there is none
        labels = np.full((len(queries), most), IGNORE_INDEX, dtype=np.int64)
        rows = []
        for b, (query, block) in enumerate(zip(queries, blocks, strict=True)):
            positions[b, : len(query.labels)] = query.positions + 1
            labels[b, : len(query.labels)] = query.labels
            body = NO_TOKENS if block == NO_BLOCK else self.store.body_tokens(block)
            what = f"the query from block {query.origin_block_id}"
            rows.append(self.model.joint_row(query.tokens, body, what=what))
        hidden, order = [], []
        for group in bucket_by_length(row_lengths(rows), multiple_of=row_multiple(self.device)):
            batch = self.model.pad([rows[i] for i in group.tolist()])
            hidden.append(self.model.masked_hidden(batch, torch.from_numpy(positions[group]).to(self.device)))
            order.append(group)
        states = torch.cat(hidden)[:, None]  # [B, 1, M, H], in the order of `order`
        gold = torch.from_numpy(labels[np.concatenate(order)]).to(self.device)  # [B, M]
        scores = torch.zeros(len(queries), 1, device=self.device)  # one candidate has all the probability
        weight, bias = self.model.vocab_weight, self.model.vocab_bias
        loss = linear_marginal_cross_entropy(states, weight, bias, gold, scores, ignore_index=IGNORE_INDEX)
        if not with_accuracy:
            return loss, 0.0
        return loss, float(masked_accuracy(states, weight, bias, gold, scores)[0])


def warmup(run: RunFolder, config: Config, *, resume: bool = False, progress: bool = False) -> None:
    """Warms up the run's reader on evidence. See `stage.run_stage`."""
    run_stage(Warmup, run, config, resume=resume, progress=progress)
