"""Answering a question from blocks: what fine-tuning, evaluation and `ask` share.

    question -> embedder -> query embedding -> index -> the beam, K blocks
    question + each of the best R blocks -> span reader -> a score for every span of words

    tokens = question_tokens(tokenizer, questions, limit)                 # B arrays
    beam = retrieve(index, embed_questions(embedder, tokens), k)          # ids [B, K]
    read = read_blocks(span_reader, tokens, beam.ids[:, :R], store)       # spans [B, R, T, W]
    answers = best_answers(read, beam.scores[:, :R], ...)

Letters beside those of types.py: K blocks in the beam, R blocks read, T positions of the reader's input, W
widths. A span of width index w covers the tokens t ... t + w.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from realm_fast.config import Config
from realm_fast.device import to_device, to_host
from realm_fast.embedder import Embedder
from realm_fast.index import Index
from realm_fast.packing import bucket_by_length, query_input
from realm_fast.progress import bar
from realm_fast.questions import AnswerMatcher, Bm25Index, Question
from realm_fast.reader import SpanReader
from realm_fast.token_store import TokenStore
from realm_fast.tokenizer import Tokenizer
from realm_fast.types import NO_BLOCK

_MEMO_ENTRIES = 1_000_000  # (question, block) pairs whose matches are remembered; about 150 MB
_MEMO_MATCHERS = 10_000
_READ_TOKENS = 32_768  # that go through the span reader at once, so that wide beams do not cost memory


@dataclass(frozen=True)
class ReadSettings:
    """The settings that must be the same in fine-tuning and in evaluation."""

    max_question_tokens: int  # without special tokens
    reader_beam: int  # R
    score_temperature: float
    retriever: str = "embedder"  # or "bm25"

    @classmethod
    def of(cls, config: Config) -> "ReadSettings":
        """A question may be as long as the embedder's queries, and must leave the reader room for a block."""
        longest = min(config.masking.max_query_tokens - 2, config.finetune.max_reader_tokens // 2)
        return cls(
            longest,
            config.finetune.reader_beam,
            config.pretrain.score_temperature,
            config.finetune.retriever,
        )


class Beam(NamedTuple):
    """The blocks retrieved for B questions, best first."""

    ids: np.ndarray  # [B, K] int64, NO_BLOCK where there are fewer
    scores: torch.Tensor  # [B, K] float32, divided by the temperature; -inf where there is no block


class Read(NamedTuple):
    """The span reader's view of B questions, R blocks each."""

    scores: torch.Tensor  # [B, R, T, W] float32; -inf for what is no span of whole words inside the block
    body_start: list[int]  # [B] position in T of the block's first token
    ids: np.ndarray  # [B, R]


class SpanAnswer(NamedTuple):
    """A span of a block, with the parts of its score."""

    rank: int  # of the block among those read, from 0
    block_id: int
    start: int  # tokens of the block's body
    stop: int
    score: float  # span score + retrieval score
    span_score: float
    retrieval_score: float
    probability: float  # softmax over all spans of all blocks read


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 over ids, texts and answers, in order."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(json.dumps([q.id, q.text, q.answers, q.answer_kind]).encode())
    return digest.hexdigest()


def question_tokens(
    tokenizer: Tokenizer, questions: Sequence[Question], max_tokens: int
) -> tuple[list[np.ndarray], int]:
    """Wordpieces of each question, cut at the end to `max_tokens`, and how many questions were cut."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([q.text for q in questions])]
    return [ids[:max_tokens] for ids in encoded], sum(len(ids) > max_tokens for ids in encoded)


def embed_questions(
    embedder: Embedder, tokens: Sequence[np.ndarray], *, batch_rows: int = 256, progress: bool = False
) -> torch.Tensor:
    """Query embeddings [n, D] float32 on the CPU, in evaluation mode and without a graph."""
    emb = torch.empty(len(tokens), embedder.dim)
    order = np.argsort([len(t) for t in tokens], kind="stable")  # like lengths together: little padding
    training = embedder.training
    embedder.eval()
    try:
        with (
            torch.no_grad(),
            bar(total=len(tokens), desc="embed questions", unit="question", enabled=progress) as shown,
        ):
            for rows in np.array_split(order, max(1, -(-len(order) // batch_rows))):
                batch = embedder.pad([query_input(tokens[i], embedder.special) for i in rows])
                emb[torch.from_numpy(rows)] = embedder.query_emb(batch).float().cpu()
                shown.update(len(rows))
    finally:
        embedder.train(training)
    return emb


def retrieve(index: Index, query_emb: torch.Tensor, k: int, *, temperature: float = 1.0) -> Beam:
    """The beam of each question; `k` is cut to the size of the index.

    Args:
        query_emb: [B, D]. Where it requires grad, so do the scores: they are recomputed as the inner products
            of the query embedding with the block embeddings the index was built from, which stay constant.
    """
    found = index.search(query_emb.detach().float(), min(k, len(index)))
    present = found.ids != NO_BLOCK  # [B, K]
    (ids,) = to_host(found.ids)  # waits for the device: what comes next looks into the blocks' tokens
    if not query_emb.requires_grad:
        return Beam(ids.numpy(), found.scores.masked_fill(~present, -torch.inf) / temperature)
    unique, place = torch.unique(ids.clamp(min=0), return_inverse=True)
    blocks = to_device(index.reconstruct(unique), query_emb.device)  # [n, D]
    products = torch.einsum("bd,bkd->bk", query_emb.float(), blocks[to_device(place, blocks.device)])
    return Beam(ids.numpy(), products.masked_fill(~present, -torch.inf) / temperature)


def bm25_beam(bm25: Bm25Index, texts: Sequence[str], k: int) -> Beam:
    """The beam of each question by BM25, its scores as they are; constant."""
    scores, ids = bm25.search(texts, k)
    return Beam(ids, torch.from_numpy(scores))


class AnswerTable:
    """Which blocks hold an answer of which question, and where. Looks at a pair once and remembers it."""

    def __init__(self, questions: Sequence[Question], store: TokenStore) -> None:
        self._questions, self._store, self._tokenizer = questions, store, store.tokenizer()
        self._matchers: dict[int, AnswerMatcher] = {}
        self._holds: dict[tuple[int, int], bool] = {}
        self._spans: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def holds(self, question: int, block_ids: np.ndarray) -> np.ndarray:
        """[K] bool: whether each block holds an answer at word boundaries; False for NO_BLOCK."""
        ids = [int(i) for i in block_ids]
        new = [i for i in ids if i != NO_BLOCK and (question, i) not in self._holds]
        if new:
            if len(self._holds) + len(new) > _MEMO_ENTRIES:
                self._holds.clear()
                new = [i for i in ids if i != NO_BLOCK]
            found = self._matcher(question).in_blocks(self._store, new)
            self._holds.update({(question, i): bool(hit) for i, hit in zip(new, found, strict=True)})
        return np.array([i != NO_BLOCK and self._holds[question, i] for i in ids], dtype=bool)

    def first_rank(self, question: int, block_ids: np.ndarray) -> int:
        """The place of the first block that holds an answer; -1 if none does."""
        hits = np.flatnonzero(self.holds(question, block_ids))
        return int(hits[0]) if len(hits) else -1

    def spans(self, question: int, block_id: int) -> list[tuple[int, int]]:
        """(start, stop) token ranges of the answers in the block's body; none for NO_BLOCK."""
        if block_id == NO_BLOCK or not self.holds(question, np.array([block_id]))[0]:
            return []
        key = (question, block_id)
        if key not in self._spans:
            if len(self._spans) >= _MEMO_ENTRIES:
                self._spans.clear()
            self._spans[key] = self._matcher(question).block_spans(self._store, block_id)
        return self._spans[key]

    def _matcher(self, question: int) -> AnswerMatcher:
        if question not in self._matchers:
            if len(self._matchers) >= _MEMO_MATCHERS:
                self._matchers.clear()
            self._matchers[question] = AnswerMatcher(self._questions[question], self._tokenizer)
        return self._matchers[question]


def read_blocks(
    span_reader: SpanReader,
    tokens: Sequence[np.ndarray],
    block_ids: np.ndarray,
    store: TokenStore,
) -> Read:
    """Scores every span of whole words in every block read. Rows of like length are computed together.

    Args:
        tokens: B questions.
        block_ids: [B, R], NO_BLOCK where there is none.
    """
    tokenizer = store.tokenizer()
    slots = np.flatnonzero(block_ids.reshape(-1) != NO_BLOCK)  # which of the B * R there are
    reads = block_ids.shape[1]
    bodies = [store.body_tokens(int(block_ids.reshape(-1)[slot])).astype(np.int32) for slot in slots]
    rows = [
        span_reader.joint_row(tokens[slot // reads], body) for slot, body in zip(slots, bodies, strict=True)
    ]
    width = span_reader.max_span_tokens
    longest = max((len(row.ids) for row in rows), default=1)
    parts: list[torch.Tensor] = []
    order: list[int] = []
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    for group in _chunks(bucket_by_length(lengths), lengths):
        batch = span_reader.pad([rows[i] for i in group])
        logits = span_reader.span_logits(batch)  # [r, T, W]
        whole = np.zeros(tuple(logits.shape), dtype=bool)
        for r, i in enumerate(group):
            start = len(tokens[slots[i] // reads]) + 2
            whole[r, start : start + len(bodies[i])] = _whole_words(bodies[i], width, tokenizer)[
                : whole.shape[1] - start
            ]
        logits = logits.float().masked_fill(~torch.from_numpy(whole).to(logits.device), -torch.inf)
        grow = longest - logits.shape[1]
        parts.append(torch.nn.functional.pad(logits, (0, 0, 0, grow), value=-torch.inf)[:, :longest])
        order += [int(slots[i]) for i in group]
    device = span_reader.device
    flat = torch.full((block_ids.size, longest, width), -torch.inf, device=device)  # [B * R, T, W]
    if parts:
        flat = flat.index_copy(0, torch.tensor(order, device=device), torch.cat(parts))
    return Read(flat.view(*block_ids.shape, longest, width), [len(t) + 2 for t in tokens], block_ids)


def gold_spans(read: Read, questions: Sequence[int], answers: AnswerTable) -> torch.Tensor:
    """[B, R, T, W] bool: the spans of `read` that are an answer of their question (numbers in `answers`)."""
    gold = np.zeros(tuple(read.scores.shape), dtype=bool)
    _, _, length, widths = gold.shape
    for b, question in enumerate(questions):
        for r, block_id in enumerate(read.ids[b]):
            for start, stop in answers.spans(question, int(block_id)):
                position, width = read.body_start[b] + start, stop - start - 1
                if position < length and 0 <= width < widths:
                    gold[b, r, position, width] = True
    # A span that was cut off with the end of its block scores -inf: it cannot be predicted, so is not gold.
    return torch.from_numpy(gold).to(read.scores.device) & torch.isfinite(read.scores)


def best_answers(read: Read, retrieval_scores: torch.Tensor, top: int) -> list[list[SpanAnswer]]:
    """The `top` best spans of each question over all blocks read; ties to the better block, the earlier span.

    Args:
        retrieval_scores: [B, R], -inf where there is no block.
    """
    total = read.scores + retrieval_scores[:, :, None, None].to(read.scores.device)  # [B, R, T, W]
    flat = total.detach().flatten(1).cpu()  # [B, R * T * W]
    spans, width = read.scores.detach().cpu(), read.scores.shape[3]
    length = read.scores.shape[2]
    answers: list[list[SpanAnswer]] = []
    for b, row in enumerate(flat):
        log_total = torch.logsumexp(row, 0)
        # a stable sort of the few best: topk's own order among equals is undefined
        threshold = torch.topk(row, min(top, len(row))).values[-1]
        candidates = torch.nonzero((row >= threshold) & torch.isfinite(row)).flatten().numpy()
        chosen = candidates[np.argsort(-row.numpy()[candidates], kind="stable")][:top]
        found = []
        for place in chosen:
            r, rest = divmod(int(place), length * width)
            position, w = divmod(rest, width)
            start = position - read.body_start[b]
            found.append(
                SpanAnswer(
                    rank=r,
                    block_id=int(read.ids[b, r]),
                    start=start,
                    stop=start + w + 1,
                    score=float(row[place]),
                    span_score=float(spans[b, r, position, w]),
                    retrieval_score=float(retrieval_scores[b, r]),
                    probability=float(torch.exp(row[place] - log_total)),
                )
            )
        answers.append(found)
    return answers


class SpanText:
    """Turns token spans of blocks into text and character ranges; encodes a block once."""

    def __init__(self, store: TokenStore) -> None:
        self._store, self._tokenizer = store, store.tokenizer()
        self._offsets: dict[int, np.ndarray] = {}

    def locate(self, block_id: int, start: int, stop: int) -> tuple[int, int]:
        """The characters [from, to) of the block's text that its tokens start ... stop - 1 stand for."""
        offsets = self._offsets.get(block_id)
        if offsets is None:
            if len(self._offsets) >= 4096:
                self._offsets.clear()
            offsets = self._offsets[block_id] = self._tokenizer.encode(self._store.text(block_id)).offsets
        return int(offsets[start, 0]), int(offsets[stop - 1, 1])

    def text(self, block_id: int, start: int, stop: int) -> str:
        first, last = self.locate(block_id, start, stop)
        return self._store.text(block_id)[first:last]


def batches(count: int, size: int) -> Iterator[range]:
    """0 ... count - 1 in ranges of at most `size`."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def _chunks(groups: Sequence[np.ndarray], lengths: np.ndarray) -> Iterator[np.ndarray]:
    """`groups` of rows, cut so that none has more than _READ_TOKENS tokens, padding included."""
    for group in groups:
        rows = max(1, _READ_TOKENS // max(1, int(lengths[group].max(initial=1))))
        yield from (group[i : i + rows] for i in range(0, len(group), rows))


def _whole_words(body: np.ndarray, widths: int, tokenizer: Tokenizer) -> np.ndarray:
    """[L, W] bool: spans of `body` that begin where a word begins and end where one ends."""
    begins = tokenizer.word_starts(body)  # [L]
    ends = np.append(begins[1:], True)
    length = len(body)
    last = np.arange(length)[:, None] + np.arange(widths)  # [L, W]
    return begins[:, None] & (last < length) & ends[np.minimum(last, max(length - 1, 0))]
