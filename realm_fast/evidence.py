"""Evidence and distractors of salient spans: the lexically closest block that holds the span, or does not.

    evidence = build_evidence(store, spans)     # once per corpus, kept beside the token store
    evidence.block_of(query)                    # the block a reader can find the masked span in, or -1
    evidence.distractor_of(query)               # one that looks like it, and does not hold the span, or -1

Closeness is BM25 of the sentence, its span left out, against the blocks that hold the span's tokens as whole
words (evidence), or do not (distractor). The block that the sentence stands in, and near-copies of the
sentence, are neither: they would teach the reader to copy a sentence instead of finding a fact. Unlabelled
text is all it takes.

    bm25(x, z) = sum over distinct tokens t of x: idf(t) tf (k1 + 1) / (tf + k1 (1 - b + b |z| / mean |z|))
    idf(t)     = log(1 + (N - n_t + 0.5) / (n_t + 0.5))

Source of BM25: Robertson and Zaragoza 2009, with Lucene's idf.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from realm_fast.building import (
    ArrayWriter,
    build_parts,
    clear,
    exclusive,
    merge_parts,
    remove_leftovers,
)
from realm_fast.errors import CorruptArtifactError, DataError, ProvenanceError
from realm_fast.files import atomic_file, read_json
from realm_fast.masking import MaskedQuery, SalientSpans
from realm_fast.retriever import NEAR_COPY_CONTAINMENT, NEAR_COPY_NGRAM_TOKENS, containment, ngram_keys
from realm_fast.token_store import TokenStore, file_name
from realm_fast.tokenizer import Tokenizer
from realm_fast.types import NO_BLOCK
from realm_fast.workers import default_num_workers

BM25_K1, BM25_B = 1.2, 0.75
_FORMAT_VERSION = 2
_SEARCH_VERSION = 2  # raised whenever the same corpus may get other evidence
_TASK_BLOCKS = 512
_CHUNK_BLOCKS = 16  # candidates looked at together, best first
_CLOSEST_BLOCKS = 64  # among which a distractor is looked for


class Bm25:
    """An inverted index over the bodies of a token store, wordpieces as terms."""

    def __init__(self, store: TokenStore) -> None:
        tokens = store.array("body_tokens").astype(np.int64)
        offsets = store.array("body_offsets")
        num_blocks = len(offsets) - 1
        lengths = np.diff(offsets)
        block_of = np.repeat(np.arange(num_blocks), lengths)
        keys, tf = np.unique(tokens * num_blocks + block_of, return_counts=True)
        self.num_blocks = num_blocks
        self._blocks = (keys % num_blocks).astype(np.int32)  # [postings], by token, ascending in each
        vocab_size = store.tokenizer().vocab_size
        self._bounds = np.searchsorted(keys // num_blocks, np.arange(vocab_size + 1))
        in_blocks = np.diff(self._bounds)  # [V] n_t
        idf = np.log1p((num_blocks - in_blocks + 0.5) / (in_blocks + 0.5))
        norm = BM25_K1 * (1 - BM25_B + BM25_B * lengths / max(lengths.mean(), 1))
        weights = np.repeat(idf, in_blocks) * tf * (BM25_K1 + 1) / (tf + norm[self._blocks])
        self._weights = weights.astype(np.float32)

    def blocks_with(self, token: int) -> np.ndarray:
        """Ids of the blocks that hold a token, ascending."""
        return self._blocks[self._bounds[token] : self._bounds[token + 1]]

    def scores(self, tokens: np.ndarray) -> np.ndarray:
        """[N] float32 score of every block for the distinct tokens of a query."""
        scores = np.zeros(self.num_blocks, dtype=np.float32)
        for token in np.unique(tokens).tolist():
            posting = slice(self._bounds[token], self._bounds[token + 1])
            scores[self._blocks[posting]] += self._weights[posting]  # a block is in a posting once
        return scores


def holds_span(body: np.ndarray, span: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether a span of wordpieces stands in a block's body as whole words."""
    places = np.flatnonzero(body[: len(body) - len(span) + 1] == span[0])
    for place in places.tolist():
        end = place + len(span)
        if np.array_equal(body[place:end], span) and (
            end == len(body) or tokenizer.word_starts(body[end : end + 1])[0]
        ):
            return True
    return False


class EvidenceFinder:
    """Finds evidence and distractor of one span at a time."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self._bm25 = Bm25(store)
        self._tokenizer = store.tokenizer()

    def find(self, block: int, sentence: tuple[int, int], spans: np.ndarray) -> list[tuple[int, int]]:
        """(evidence, distractor) of the spans of one sentence, NO_BLOCK where there is none.

        Args:
            block: the block the sentence stands in; sentence: its token range there.
            spans: [n, 2] token ranges in the block, inside the sentence.
        """
        start, stop = sentence
        body = self.store.body_tokens(block)
        ngrams = np.unique(ngram_keys(body[start:stop], NEAR_COPY_NGRAM_TOKENS))
        found = []
        for first, last in spans.tolist():
            rest = np.concatenate([body[start:first], body[last:stop]])
            span, scores = body[first:last], self._bm25.scores(rest)
            holding = min((self._bm25.blocks_with(int(token)) for token in span), key=len)
            least = np.partition(scores, -min(_CLOSEST_BLOCKS, len(scores)))[-_CLOSEST_BLOCKS:].min()
            closest = np.flatnonzero((scores >= least) & (scores > 0))  # with all that tie for the last place
            found.append(
                (
                    self._best(holding, scores, ngrams, origin=block, span=span, holds=True),
                    self._best(closest, scores, ngrams, origin=block, span=span, holds=False),
                )
            )
        return found

    def _best(
        self,
        blocks: np.ndarray,
        scores: np.ndarray,
        ngrams: np.ndarray,
        *,
        origin: int,
        span: np.ndarray,
        holds: bool,
    ) -> int:
        """The best of `blocks` that holds the span, or does not, and is no copy of the sentence."""
        blocks = blocks[np.lexsort((blocks, -scores[blocks]))]  # best first, ties to the lower id
        own = self.store.content_hash(origin)
        for at in range(0, len(blocks), _CHUNK_BLOCKS):
            fitting = [
                i for i in blocks[at : at + _CHUNK_BLOCKS].tolist()
                if self.store.content_hash(i) != own
                and holds_span(self.store.body_tokens(i), span, self._tokenizer) == holds
            ]  # fmt: skip
            shares = containment(ngrams, [self.store.body_tokens(i) for i in fitting], NEAR_COPY_NGRAM_TOKENS)
            for i, share in zip(fitting, shares, strict=True):
                if share < NEAR_COPY_CONTAINMENT:
                    return i
        return NO_BLOCK


class Evidence:
    """The evidence of every salient span, memory-mapped."""

    def __init__(self, path: Path, manifest: dict[str, Any], spans: SalientSpans) -> None:
        self.path, self.manifest, self.spans = path, manifest, spans
        self.block_ids = self._array("evidence")  # [spans]
        self.distractor_ids = self._array("distractors")  # [spans]

    def _array(self, name: str) -> np.ndarray:
        file, expected = self.path / file_name(name), 4 * self.spans.num_spans
        size = file.stat().st_size if file.is_file() else -1
        if size != self.manifest["files"][name]["bytes"] or size != expected:
            raise CorruptArtifactError(
                f"{file}: {size} bytes, expected {expected}; delete {self.path} and run again."
            )
        return np.memmap(file, dtype=np.int32, mode="r").view(np.ndarray) if size else np.empty(0, np.int32)

    @classmethod
    def open(cls, path: str | Path, spans: SalientSpans) -> "Evidence":
        """Raises ProvenanceError where it was found for other spans."""
        path = Path(path)
        manifest = read_json(path / "manifest.json", "the manifest of the evidence")
        identity = [_FORMAT_VERSION, spans.corpus_hash, spans.tagger, spans.num_spans]
        if manifest.get("identity") != identity:
            raise ProvenanceError(
                f"{path}: evidence for other salient spans or of another release "
                f"({manifest.get('identity')}, expected {identity}); delete it to have it found again."
            )
        return cls(path, manifest, spans)

    @property
    def num_found(self) -> int:
        """Spans that have evidence."""
        return int(self.manifest["with_evidence"])

    def usable_spans(self) -> SalientSpans:
        """The spans that have evidence, for a Masker to draw from.

        Raises:
            DataError: there is none.
        """
        if not self.num_found:
            raise DataError(
                f"{self.path}: none of {self.spans.num_spans:,} salient spans ({self.spans.tagger}) stands "
                "in another block too, so no reader can learn from evidence here; use a larger corpus, or "
                "another masking.entity_tagger."
            )
        return self.spans.where(self.block_ids != NO_BLOCK)

    def block_of(self, query: MaskedQuery) -> int:
        """The evidence of the span that is masked in a query; NO_BLOCK where it has none."""
        return int(self.block_ids[self._span_of(query)])

    def distractor_of(self, query: MaskedQuery) -> int:
        """The distractor of the span that is masked in a query; NO_BLOCK where it has none."""
        return int(self.distractor_ids[self._span_of(query)])

    def _span_of(self, query: MaskedQuery) -> int:
        first = query.sentence[0] + int(query.positions[0])
        of_block = self.spans.spans(query.origin_block_id)
        (places,) = np.nonzero(of_block[:, 0] == first)
        if not len(places):
            raise ValueError(
                f"query: no salient span of block {query.origin_block_id} begins at token {first}"
            )
        return int(self.spans.offsets[query.origin_block_id] + places[0])


def evidence_path(spans: SalientSpans) -> Path:
    """Beside the store and its spans."""
    return spans.path.with_name(re.sub(r"\.spans-", ".evidence-", spans.path.name))


def build_evidence(
    store: TokenStore, spans: SalientSpans, *, progress: bool = True, num_workers: int = 0
) -> Evidence:
    """Finds the evidence of every span, or opens it if that was done before. Resumable.

    Args:
        num_workers: processes (0: one a core); each holds an inverted index of the corpus, about 12 bytes
            a token.

    Raises:
        DataError: the corpus has no salient span.
        ProvenanceError: what is there belongs to other spans.
    """
    if not spans.num_spans:
        raise DataError(
            f"{spans.path}: {spans.tagger} found no salient span in {len(store)} blocks, so there is nothing "
            "to find evidence for; use another masking.entity_tagger."
        )
    out = evidence_path(spans)
    if out.exists():
        return Evidence.open(out, spans)
    work = out.parent / f".{out.name}.building"
    with exclusive(work, out):
        if out.exists():  # another process finished it meanwhile
            return Evidence.open(out, spans)
        remove_leftovers(out)
        identity = [_FORMAT_VERSION, spans.corpus_hash, spans.tagger, spans.num_spans]
        parts = build_parts(
            work,
            len(store),
            part_blocks=_TASK_BLOCKS,
            fingerprint=[*identity, _SEARCH_VERSION],
            setup=f"{__name__}:{find_in_blocks.__name__}",
            argument=(str(store.path), str(spans.path)),
            num_workers=num_workers or default_num_workers(),
            what="find evidence",
            progress=progress,
        )

        def manifest_of(notes: list[dict[str, str]], writers: dict[str, ArrayWriter]) -> dict[str, Any]:
            found: Counter[str] = Counter()
            total: Counter[str] = Counter()
            for note in notes:
                found.update(json.loads(note["found"]))
                total.update(json.loads(note["total"]))
            return {
                "identity": identity,
                "num_spans": writers["evidence"].items,
                "with_evidence": found.total(),
                "with_distractor": sum(int(note["with_distractor"]) for note in notes),
                "by_label": {
                    label: {"spans": count, "with_evidence": found[label]}
                    for label, count in total.most_common()
                },
            }

        merge_parts(parts, out, {"evidence": "int32", "distractors": "int32"}, manifest_of)
        clear(work)
    return Evidence.open(out, spans)


def find_in_blocks(argument: tuple[str, str]) -> Callable[[tuple[int, int, str]], None]:
    """Set-up of a worker: returns the function that finds what belongs to blocks [start, stop)."""
    store = TokenStore.open(argument[0])
    spans = SalientSpans.open(argument[1], store)
    finder = EvidenceFinder(store)

    def find(task: tuple[int, int, str]) -> None:
        start, stop, path = task
        pairs: list[tuple[int, int]] = []
        found: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for block in range(start, stop):
            of_block, bounds = spans.spans(block), store.sentences(block)
            of_span = np.searchsorted(bounds, of_block[:, 0], side="right") - 1
            of_spans: list[tuple[int, int]] = []
            for sentence in np.unique(of_span).tolist():
                inside = of_block[of_span == sentence]  # in order, as sentences are
                of_spans += finder.find(block, (int(bounds[sentence]), int(bounds[sentence + 1])), inside)
            labels = spans.labels(block)
            total.update(labels)
            found.update(label for label, (i, _) in zip(labels, of_spans, strict=True) if i != NO_BLOCK)
            pairs += of_spans
        evidence, distractors = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
        arrays = {"evidence": evidence.copy(), "distractors": distractors.copy()}
        notes = {
            "found": json.dumps(dict(found)),
            "total": json.dumps(dict(total)),
            "with_distractor": str(int((distractors != NO_BLOCK).sum())),
        }
        with atomic_file(path) as file:
            file.write(safetensors.numpy.save(arrays, notes))

    return find
