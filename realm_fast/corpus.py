"""From documents to the token store: split into sentences, tokenise, pack into blocks, write once.

    documents ── shards of a few thousand ──> processes: sentences -> wordpieces -> blocks ──> shard files
                                                                                                  │
                                     token store, written beside and renamed <── concatenated in order

Memory holds a few shards, whatever the size of the corpus. A shard file is complete or absent and its
name says what it was made of, so a build that was killed takes up the finished ones and goes on, and ends
with the same bytes. Neither the number of processes nor an interruption changes `corpus_hash`.
"""

import contextlib
import hashlib
import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from realm_fast import progress as progress_bars
from realm_fast.building import ArrayWriter, clear, exclusive, remove_leftovers
from realm_fast.config import CorpusConfig
from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import STAGING_PREFIX, atomic_dir, atomic_file, write_json
from realm_fast.sentences import split_sentences
from realm_fast.sources import Document, ReadLog, SourceFile, find_files, read_documents
from realm_fast.token_store import (
    ARRAYS,
    FORMAT_VERSION,
    MANIFEST,
    NUM_SPECIAL_TOKENS,
    TOKEN,
    TokenStore,
    corpus_hash,
    file_name,
    token_dtype,
)
from realm_fast.tokenizer import Tokenizer
from realm_fast.workers import default_num_workers, map_unordered

_SHARD_DOCUMENTS = 4096
_SHARD_CHARACTERS = 1 << 21
_IN_PROCESS_SHARDS = 4  # up to so many, starting processes costs more than it saves
_TOKENISE_SENTENCES = 2048  # in one call
_PACKING_VERSION = 1  # raised when sentence splitting or packing changes what a document becomes


def build_corpus(config: CorpusConfig, out: str | Path, *, progress: bool = True) -> TokenStore:
    """Builds the token store `out` from `config.source`, or opens it if it is already there.

    Raises:
        DataError: the source is missing, malformed or empty, or `out` holds something else.
        DiskFullError: no space is left; finished shards stay for the next try.
    """
    out = Path(out)
    files = find_files(config.source, config.format)
    tokenizer = Tokenizer.load(config.tokenizer)
    source = _describe_source(config, files)
    if out.exists():
        return _existing(out, source, tokenizer, config)
    if config.max_block_tokens > np.iinfo(np.int32).max:
        raise DataError(
            f"corpus.max_block_tokens: {config.max_block_tokens} is beyond what a block can hold."
        )
    work = out.parent / f".{out.name}.building"
    with exclusive(work, out):
        if out.exists():  # another process finished it meanwhile
            return _existing(out, source, tokenizer, config)
        remove_leftovers(out)
        log = ReadLog(malformed=config.malformed)
        shards = _make_shards(config, files, tokenizer, work, log, progress)
        if not shards:
            skipped = ", ".join(f"{count} {reason}" for reason, count in log.skipped.items()) or "none"
            raise DataError(f"{config.source}: holds no documents (skipped: {skipped}).")
        _merge(shards, out, source, tokenizer, config, log, progress)
        clear(work)
    return TokenStore.open(out)


# ---------------------------------------------------------------- packing: pure functions


class Sentence(NamedTuple):
    text: str
    tokens: list[int]


def pack_sentences(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Greedy packing: (start, stop) ranges of consecutive sentences whose tokens fit into `budget`.

    Every sentence must fit by itself; see `split_long`.
    """
    ranges = []
    start = total = 0
    for i, length in enumerate(lengths):
        if total + length > budget and i > start:
            ranges.append((start, i))
            start, total = i, 0
        total += length
    if start < len(lengths):
        ranges.append((start, len(lengths)))
    return ranges


def split_long(sentence: str, budget: int, tokenizer: Tokenizer) -> list[Sentence]:
    """Cuts a sentence of more than `budget` tokens into pieces that fit, losing nothing.

    Cuts lie between words where there is white space to cut at, else between the tokenizer's words, else
    (a single word longer than a block) anywhere.
    """
    pieces = []
    encoding = tokenizer.encode(sentence)
    begin = 0  # token where the piece begins
    spaced = np.array(
        [start > 0 and sentence[start - 1].isspace() for start, _ in encoding.offsets], dtype=bool
    )
    while len(encoding.ids) - begin > budget:
        window = slice(begin + 1, begin + budget + 1)
        cuts = np.flatnonzero(spaced[window])
        if not len(cuts):
            cuts = np.flatnonzero(encoding.word_starts[window])
        end = begin + 1 + int(cuts[-1]) if len(cuts) else begin + budget
        pieces.append((begin, end))
        begin = end
    pieces.append((begin, len(encoding.ids)))
    sentences = []
    for first, last in pieces:
        # A piece keeps what lies before its first token (a zero-width mark, say) only if it is the first.
        left = int(encoding.offsets[first, 0]) if first else 0
        right = int(encoding.offsets[last, 0]) if last < len(encoding.ids) else len(sentence)
        text = sentence[left:right].strip()
        (ids,) = tokenizer.encode_ids([text])
        if len(ids) > budget:  # cut inside a word: what follows may need more pieces than before
            if len(text) >= len(sentence):
                raise DataError(f"a block of {budget} tokens cannot hold the single character {text[:1]!r}.")
            sentences += split_long(text, budget, tokenizer)
        elif ids:
            sentences.append(Sentence(text, ids))
    return sentences


def content_hash(text: str) -> int:
    """64-bit hash of a text without regard to case, white space and Unicode form."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


def max_title_tokens(max_block_tokens: int) -> int:
    """A title takes at most a quarter of a block; a longer one is cut in the tokens, not in the text."""
    return (max_block_tokens - NUM_SPECIAL_TOKENS) // 4


# ---------------------------------------------------------------- shards: the work of one process


class ShardTask(NamedTuple):
    path: str
    documents: list[Document]


class ShardSummary(NamedTuple):
    path: str
    documents: int
    blocks: int


def tokenise_shards(argument: tuple[Tokenizer, int]) -> Callable[[ShardTask], ShardSummary]:
    """Set-up of a tokenising process: returns the function that turns a ShardTask into a shard file."""
    tokenizer, max_block_tokens = argument

    def tokenise(task: ShardTask) -> ShardSummary:
        arrays, counts = _tokenise_documents(task.documents, tokenizer, max_block_tokens)
        metadata = {"counts": json.dumps(counts)}
        with atomic_file(task.path) as file:
            file.write(safetensors.numpy.save(arrays, metadata))
        return ShardSummary(task.path, len(task.documents), len(arrays["block_document"]))

    return tokenise


def _tokenise_documents(
    documents: list[Document], tokenizer: Tokenizer, max_block_tokens: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    counts: Counter[str] = Counter()
    body: list[int] = []
    bounds: list[int] = []
    texts: list[bytes] = []
    title_tokens: list[list[int]] = []
    titles: list[bytes] = []
    ids: list[bytes] = []
    body_lengths: list[int] = []
    bound_lengths: list[int] = []
    hashes: list[int] = []
    block_document: list[int] = []
    longest_title = max_title_tokens(max_block_tokens)
    for document, all_title_tokens, sentences in _tokenised(documents, tokenizer):
        title_ids = all_title_tokens[:longest_title]
        counts["titles_cut"] += len(all_title_tokens) > longest_title
        budget = max_block_tokens - NUM_SPECIAL_TOKENS - len(title_ids)
        fitting: list[Sentence] = []
        for sentence in sentences:
            if len(sentence.tokens) <= budget:
                if sentence.tokens:
                    fitting.append(sentence)
            else:
                counts["sentences_split"] += 1
                fitting += split_long(sentence.text, budget, tokenizer)
        if not fitting:
            counts["skipped_no_tokens"] += 1
            continue
        for start, stop in pack_sentences([len(s.tokens) for s in fitting], budget):
            packed = fitting[start:stop]
            length = 0
            bounds.append(0)
            for sentence in packed:
                body += sentence.tokens
                length += len(sentence.tokens)
                bounds.append(length)
            text = " ".join(s.text for s in packed)
            texts.append(text.encode())
            body_lengths.append(length)
            bound_lengths.append(len(packed) + 1)
            hashes.append(content_hash(text))
            block_document.append(len(titles))
        title_tokens.append(title_ids)
        titles.append(" ".join(document.title.split()).encode())
        ids.append(document.id.encode())
        counts["sentences"] += len(fitting)
    dtype = token_dtype(tokenizer.vocab_size)
    arrays = {
        "body_tokens": np.array(body, dtype=dtype),
        "body_offsets": _offsets(body_lengths),
        "sentence_bounds": np.array(bounds, dtype=np.int32),
        "sentence_offsets": _offsets(bound_lengths),
        "text": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "text_offsets": _offsets(map(len, texts)),
        "block_document": np.array(block_document, dtype=np.int32),
        "content_hash": np.array(hashes, dtype=np.uint64),
        "title_tokens": np.array([t for title in title_tokens for t in title], dtype=dtype),
        "title_token_offsets": _offsets(map(len, title_tokens)),
        "title_text": np.frombuffer(b"".join(titles), dtype=np.uint8),
        "title_text_offsets": _offsets(map(len, titles)),
        "document_ids": np.frombuffer(b"".join(ids), dtype=np.uint8),
        "document_id_offsets": _offsets(map(len, ids)),
    }
    return arrays, dict(counts)


def _tokenised(
    documents: list[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int], list[Sentence]]]:
    """(document, title tokens, sentences) of each, tokenised in large calls."""
    group: list[tuple[Document, list[str]]] = []
    size = 0
    for position, document in enumerate(documents):
        sentences = split_sentences(document.text)
        group.append((document, sentences))
        size += len(sentences)
        if size >= _TOKENISE_SENTENCES or position == len(documents) - 1:
            encoded = iter(
                tokenizer.encode_ids(
                    [text for d, texts in group for text in (" ".join(d.title.split()), *texts)]
                )
            )
            for one, texts in group:
                title_ids = next(encoded)
                yield one, title_ids, [Sentence(text, next(encoded)) for text in texts]
            group, size = [], 0


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    lengths = np.fromiter(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


# ---------------------------------------------------------------- the build


def _describe_source(config: CorpusConfig, files: list[SourceFile]) -> dict[str, Any]:
    return {
        "spec": config.source,
        "format": config.format,
        "limit_documents": config.limit_documents,
        "files": [{"name": file.path.name, "bytes": file.size} for file in files],
    }


def _existing(out: Path, source: dict, tokenizer: Tokenizer, config: CorpusConfig) -> TokenStore:
    """Opens what is there if it was built from the same source and settings."""
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: exists and is no token store; name another folder.")
    store = TokenStore.open(out)
    built = store.manifest
    for what, wanted, found in (
        ("source", source, built.get("source")),
        ("tokenizer", tokenizer.hash, store.tokenizer_hash),
        ("max_block_tokens", config.max_block_tokens, store.max_block_tokens),
        ("packing_version", _PACKING_VERSION, built.get("packing_version")),
    ):
        if wanted != found:
            raise DataError(
                f"{out}: already holds a corpus built with another {what} ({found}, now {wanted}); "
                "name another folder or delete this one."
            )
    return store


def _make_shards(
    config: CorpusConfig,
    files: list[SourceFile],
    tokenizer: Tokenizer,
    work: Path,
    log: ReadLog,
    progress: bool,
) -> list[Path]:
    """Makes every shard file that is not there yet; returns all of them in order."""
    settings = [_PACKING_VERSION, FORMAT_VERSION, tokenizer.hash, config.max_block_tokens]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    for leftover in work.glob(f"{STAGING_PREFIX}*"):
        leftover.unlink(missing_ok=True)
    shards: list[Path] = []
    documents = read_documents(files, log)

    def tasks() -> Iterator[ShardTask]:
        for group in _in_shards(documents, config.limit_documents):
            path = work / f"{len(shards):08d}-{_input_hash(group)[:32]}-{fingerprint}.safetensors"
            shards.append(path)
            if path.exists():
                bar.update(log.bytes_read - bar.n)
            else:
                yield ShardTask(str(path), group)

    num_workers = config.num_workers or default_num_workers()
    total = sum(file.size for file in files)
    with progress_bars.bar(total=total, desc="tokenise", unit="B", enabled=progress) as bar:
        for _ in _spread(tasks(), (tokenizer, config.max_block_tokens), num_workers):
            bar.update(log.bytes_read - bar.n)
    return shards


def _spread(
    tasks: Iterator[ShardTask], argument: tuple[Tokenizer, int], num_workers: int
) -> Iterator[ShardSummary]:
    """Does the tasks here if they are few, else in processes."""
    setup = f"{__name__}:{tokenise_shards.__name__}"
    first: list[ShardTask] = []
    if num_workers > 1:
        for task in tasks:
            first.append(task)
            if len(first) > _IN_PROCESS_SHARDS:
                break
        if len(first) <= _IN_PROCESS_SHARDS:
            num_workers = 1

    def chained() -> Iterator[ShardTask]:
        while first:
            yield first.pop(0)
        yield from tasks

    for _, summary in map_unordered(
        setup, argument, chained(), num_workers=num_workers, what="tokenise the corpus"
    ):
        yield summary


def _in_shards(documents: Iterator[Document], limit: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in itertools.islice(documents, limit or None):
        group.append(document)
        characters += len(document.text)
        if len(group) >= _SHARD_DOCUMENTS or characters >= _SHARD_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _input_hash(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _merge(
    shards: list[Path],
    out: Path,
    source: dict[str, Any],
    tokenizer: Tokenizer,
    config: CorpusConfig,
    log: ReadLog,
    progress: bool,
) -> None:
    """Concatenates the shards into one store, hashing on the way."""
    counts: Counter[str] = Counter()
    token = token_dtype(tokenizer.vocab_size)
    with atomic_dir(out) as staging, contextlib.ExitStack() as stack:
        writers = {
            name: ArrayWriter(
                stack.enter_context(open(staging / file_name(name), "wb")),
                token if dtype == TOKEN else dtype,
                is_offsets=bool(data),
            )
            for name, (dtype, data) in ARRAYS.items()
        }
        bar = stack.enter_context(
            progress_bars.bar(total=len(shards), desc="write store", unit="shard", enabled=progress)
        )
        num_documents = 0
        for path in shards:
            arrays, shard_counts = _read_shard(path)
            counts.update(shard_counts)
            arrays["block_document"] += np.int32(num_documents)
            num_documents += len(arrays["title_text_offsets"]) - 1
            for name, writer in writers.items():
                writer.append(arrays[name])
            bar.update(1)
        if not num_documents:
            raise DataError(f"{config.source}: none of its {log.documents} documents holds a single token.")
        if no_tokens := counts.pop("skipped_no_tokens", 0):
            log.skipped["no_tokens"] += no_tokens
        manifest = {
            "format_version": FORMAT_VERSION,
            "packing_version": _PACKING_VERSION,
            "corpus_hash": "",
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "max_block_tokens": config.max_block_tokens,
            "num_blocks": writers["block_document"].items,
            "num_documents": num_documents,
            "num_tokens": writers["body_tokens"].items,
            "num_sentences": counts.pop("sentences"),
            "titles_cut": counts.pop("titles_cut", 0),
            "sentences_split": counts.pop("sentences_split", 0),
            "skipped": dict(sorted(log.skipped.items())),
            "malformed": log.malformed_lines,
            "source": source,
            "documents_hash": _documents_hash(shards),
            "files": {name: writer.finish() for name, writer in writers.items()},
        }
        manifest["corpus_hash"] = corpus_hash(manifest)
        tokenizer.save(staging)
        write_json(staging / MANIFEST, manifest)


def _documents_hash(shards: list[Path]) -> str:
    """Over the documents as read, before any splitting: the shard names carry their inputs' hashes."""
    inputs = [path.name.split("-")[1] for path in shards]
    return hashlib.sha256("".join(inputs).encode()).hexdigest()


def _read_shard(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            counts = json.loads(file.metadata()["counts"])
            return {name: file.get_tensor(name) for name in ARRAYS}, counts
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise CorruptArtifactError(
            f"{path}: a finished part of the build cannot be read ({error}); it was deleted, "
            "run the same command again."
        ) from error
