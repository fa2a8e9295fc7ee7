"""Inverse cloze task: a warm start for the embedder from text alone.

    a sentence -> the block it was cut from, among the blocks of the step's other sentences

    loss = -log softmax_j(q(sentence_b) . d(block_j without its sentence) / temperature)[b]

The sentence stays in its block 10% of the time, so that word overlap is learned too. Large batches make the
task hard; gradient caching (realm_fast.gradient_cache) keeps memory at one pack of rows whatever the batch.

RUN/ict/evaluations.jsonl has recall@k on sentences of held-out documents: the rank of the sentence's block,
without the sentence, among all blocks of the corpus.

Source: ORQA (Lee et al. 2019), section 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from realm_fast.checkpoint import Checkpoint
from realm_fast.config import Config
from realm_fast.embedder import Embedder
from realm_fast.embedding import embed_blocks
from realm_fast.errors import ConfigError, DataError
from realm_fast.evaluate import parse_cutoffs, recall_percent
from realm_fast.gradient_cache import EmbeddedRows, cached_backward, embed_in_packs
from realm_fast.masking import split_blocks
from realm_fast.objective import in_batch_contrastive_loss
from realm_fast.optim import check_loss, step_seed
from realm_fast.packing import TokenBatch, block_input, query_input
from realm_fast.run_folder import RunFolder
from realm_fast.stage import StageTrainer, run_stage
from realm_fast.token_store import TokenStore

MIN_SENTENCE_TOKENS = 4  # "See also." retrieves nothing
_STREAM = 0x696374  # keeps these random numbers apart from others drawn from the same seed


class IctExample(NamedTuple):
    """A sentence and the block it was cut from."""

    block_id: int
    query: np.ndarray  # int32 [q] the sentence's tokens
    body: np.ndarray  # int32 [t] the block's body, with the sentence or without


class IctSampler:
    """Draws sentences with their blocks: a step's examples are a function of (seed, step, rank).

    Only blocks of two sentences and more take part: without its only sentence a block is empty. The blocks of
    one step are all different, in content too, or one's positive would be another's negative.
    """

    def __init__(
        self,
        store: TokenStore,
        seed: int,
        *,
        split: str,
        max_query_tokens: int,
        keep_sentence_probability: float,
    ) -> None:
        self.store, self._seed = store, seed
        self._max_sentence_tokens = max_query_tokens - 2  # [CLS] and [SEP] come on top
        self._keep = keep_sentence_probability
        seen: set[int] = set()
        blocks = []
        for i in split_blocks(store, split).tolist():
            content = store.content_hash(i)
            if content not in seen and len(self._usable(i)):
                seen.add(content)
                blocks.append(i)
        self._blocks = np.array(blocks, dtype=np.int64)
        if not blocks:
            raise DataError(
                f"{store.path}: no block of the {split} split has two sentences, one of them of at least "
                f"{MIN_SENTENCE_TOKENS} tokens; raise corpus.max_block_tokens and build the corpus again."
            )

    def __len__(self) -> int:
        """How many blocks take part."""
        return len(self._blocks)

    def batch(self, step: int, count: int, rank: int = 0) -> list[IctExample]:
        """`count` examples of different blocks (all there are, where that is fewer)."""
        bits = np.random.Philox(counter=[0, 0, rank, step], key=[self._seed, _STREAM])
        random = np.random.Generator(bits)
        chosen = random.choice(self._blocks, size=min(count, len(self)), replace=False)
        return [self._example(int(block), random) for block in chosen]

    def _usable(self, block: int) -> np.ndarray:
        """Numbers of the sentences that can be cut out."""
        lengths = np.diff(self.store.sentences(block))
        return np.flatnonzero(lengths >= MIN_SENTENCE_TOKENS) if len(lengths) > 1 else np.zeros(0, np.int64)

    def _example(self, block: int, random: np.random.Generator) -> IctExample:
        usable = self._usable(block)
        sentence = int(usable[random.integers(len(usable))])
        start, stop = (int(x) for x in self.store.sentences(block)[sentence : sentence + 2])
        body = self.store.body_tokens(block)
        query = body[start:stop][: self._max_sentence_tokens]
        if random.random() >= self._keep:
            body = np.concatenate([body[:start], body[stop:]])
        return IctExample(block, query.astype(np.int32), body.astype(np.int32))


def ict_rows(
    store: TokenStore, embedder: Embedder, examples: Sequence[IctExample], *, precision: str
) -> list[EmbeddedRows]:
    """What the loss embeds: the sentences, and their blocks. Under autocast where precision is bfloat16."""
    special = embedder.special

    def cast(embed: Callable[[TokenBatch], torch.Tensor]) -> Callable[[TokenBatch], torch.Tensor]:
        def run(batch: TokenBatch) -> torch.Tensor:
            with torch.autocast(embedder.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                return embed(batch)

        return run

    queries = [query_input(example.query, special) for example in examples]
    blocks = [block_input(store.title_tokens(e.block_id), e.body, special) for e in examples]
    return [
        EmbeddedRows(queries, embedder, cast(embedder.query_emb)),
        EmbeddedRows(blocks, embedder, cast(embedder.block_emb)),
    ]


class Ict(StageTrainer):
    """The stage: `realm-fast ict`."""

    name = "ict"
    module_name = "embedder"
    shapes = ("embedder", "ict")
    model: Embedder

    def load(self, checkpoint: Checkpoint | None) -> Embedder:
        if checkpoint is None:
            return Embedder.from_config(self.config.embedder, self.store.tokenizer())
        return Embedder.load(checkpoint.module_folder("embedder"))

    def prepare(self) -> None:
        settings = self.settings
        self.sampler = IctSampler(
            self.store,
            self.config.seed,
            split="train",
            max_query_tokens=settings.max_query_tokens,
            keep_sentence_probability=settings.keep_sentence_probability,
        )
        if settings.batch_queries > len(self.sampler):
            raise ConfigError(
                f"ict.batch_queries: expected at most {len(self.sampler)}, as so many training blocks have "
                f"two sentences and are no copies of each other, got {settings.batch_queries}"
            )
        self.held_out = IctSampler(
            self.store,
            self.config.seed,
            split="heldout",
            max_query_tokens=settings.max_query_tokens,
            keep_sentence_probability=0.0,
        )

    def update(self, step: int) -> dict[str, float]:
        settings = self.settings
        parts = self._parts(self.sampler.batch(step, settings.batch_queries))
        right = torch.zeros(())

        def loss_of(query_emb: torch.Tensor, block_emb: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                own = torch.arange(len(query_emb), device=query_emb.device)
                right.copy_(((query_emb @ block_emb.t()).argmax(dim=1) == own).float().mean())
            return in_batch_contrastive_loss(query_emb, block_emb, temperature=settings.score_temperature)

        loss = cached_backward(
            parts,
            loss_of,
            token_budget=settings.token_budget,
            seed=step_seed(self.config.seed, step),
            cache=settings.cache_gradients,
        )
        return {"loss": check_loss(loss, step, self.optimizer), "in_batch_accuracy": float(right)}

    def measure(self) -> dict[str, Any]:
        """Recall@k, in percent, of the blocks of held-out sentences among all blocks."""
        examples = self.held_out.batch(0, self.config.evaluate.held_out_queries)
        query_emb, own_emb = (
            embed_in_packs(part, self.settings.token_budget).cpu() for part in self._parts(examples)
        )
        others = embed_blocks(
            self.model, self.store, token_budget=self.settings.token_budget, progress=self.progress
        )
        own = (query_emb * own_emb).sum(dim=1)  # [n]
        scores = query_emb @ others.t()  # [n, N]
        scores[torch.arange(len(examples)), torch.tensor([e.block_id for e in examples])] = -torch.inf
        ranks = (scores >= own[:, None]).sum(dim=1).numpy()  # a tie counts against us
        recall = recall_percent(ranks, parse_cutoffs(self.config.evaluate.recall_at))
        return {"sentences": len(examples), "blocks": len(self.store), "recall": recall}

    def _parts(self, examples: list[IctExample]) -> list[EmbeddedRows]:
        return ict_rows(self.store, self.model, examples, precision=self.settings.precision)


def ict(run: RunFolder, config: Config, *, resume: bool = False, progress: bool = False) -> None:
    """Trains the run's embedder by the inverse cloze task. See `stage.run_stage`."""
    run_stage(Ict, run, config, resume=resume, progress=progress)
