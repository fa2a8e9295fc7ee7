"""The token store: what opening checks, views, ranges, pickling."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.token_store import ARRAYS, MANIFEST, TokenStore, file_name


@pytest.fixture
def copy(user_store, tmp_path) -> Path:
    return Path(shutil.copytree(user_store.path, tmp_path / "copy"))


def test_blocks_are_read_back(user_store, data_dir):
    lines = (data_dir / "user" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(user_store) == user_store.num_documents == 50
    tokenizer = user_store.tokenizer()
    for i, record in enumerate(records):
        assert user_store.document(i) == i
        assert user_store.text(i) == record["text"]
        assert user_store.title(i) == record["title"]
        assert user_store.document_id(i) == f"documents.jsonl:{i + 1}"
        encoding = tokenizer.encode(record["text"])
        assert user_store.body_tokens(i).tolist() == encoding.ids.tolist()
        bounds = user_store.sentences(i)
        assert bounds.dtype == np.int32
        starts = [int(encoding.offsets[b, 0]) for b in bounds[:-1]]
        assert all(s == 0 or record["text"][s - 2 : s] in (". ", "? ") for s in starts)


def test_block_lengths_are_those_of_the_framed_blocks(user_store):
    lengths = user_store.block_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (50,)
    expected = [3 + len(user_store.title_tokens(i)) + len(user_store.body_tokens(i)) for i in range(50)]
    assert lengths.tolist() == expected
    assert lengths.max() <= user_store.max_block_tokens
    with pytest.raises(ValueError, match="read-only"):
        lengths[0] = 0


def test_views_cannot_be_written(user_store):
    for view in (user_store.body_tokens(0), user_store.title_tokens(0), user_store.sentences(0)):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0


@pytest.mark.parametrize("i", [-1, 50, 10**9])
def test_ids_out_of_range_are_refused(user_store, i):
    for get in (
        user_store.body_tokens,
        user_store.title_tokens,
        user_store.sentences,
        user_store.text,
        user_store.title,
        user_store.document,
        user_store.document_id,
    ):
        with pytest.raises(IndexError, match=r"not in 0\.\.49"):
            get(i)


def test_pickling_opens_the_same_store_again(user_store):
    data = pickle.dumps(user_store)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.corpus_hash == user_store.corpus_hash
    assert again.text(7) == user_store.text(7)


def test_the_manifest_tells_what_the_corpus_is(user_store):
    manifest = json.loads((user_store.path / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["source"]["files"] == [
        {"name": "documents.jsonl", "bytes": manifest["source"]["files"][0]["bytes"]}
    ]
    assert manifest["num_sentences"] == len(user_store.array("sentence_bounds")) - len(user_store)
    assert manifest["num_tokens"] == len(user_store.array("body_tokens"))
    assert set(manifest["files"]) == set(ARRAYS)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_a_missing_or_truncated_file_is_named(copy, name):
    path = copy / file_name(name)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        CorruptArtifactError, match=rf"{name}\.bin: truncated: {len(data) - 1} bytes, .* {len(data)}"
    ):
        TokenStore.open(copy)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match=rf"{name}\.bin: missing"):
        TokenStore.open(copy)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_an_altered_byte_is_found_by_hashes(copy, name):
    TokenStore.open(copy, verify="hashes")
    path = copy / file_name(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    TokenStore.open(copy)  # sizes are right
    with pytest.raises(CorruptArtifactError, match=rf"{name}\.bin: altered: sha256"):
        TokenStore.open(copy, verify="hashes")


def test_an_altered_manifest_is_found(copy):
    path = copy / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))

    def write(**changes):
        path.write_text(json.dumps({**manifest, **changes}), encoding="utf-8")

    write(max_block_tokens=97)
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json: altered"):
        TokenStore.open(copy, verify="hashes")
    write(format_version=99)
    with pytest.raises(CorruptArtifactError, match="format version 99, this release reads 1"):
        TokenStore.open(copy)
    write(num_blocks="many")
    with pytest.raises(CorruptArtifactError, match="num_blocks: expected int, got 'many'"):
        TokenStore.open(copy)
    write(files={})
    with pytest.raises(CorruptArtifactError, match=r"says nothing complete about body_tokens\.bin"):
        TokenStore.open(copy)
    path.write_text('{"format_ver', encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="not valid JSON"):
        TokenStore.open(copy)


def test_an_exchanged_tokenizer_is_found(copy):
    path = copy / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"lowercase":true', '"lowercase":false'))
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.json: altered: its hash is"):
        TokenStore.open(copy).tokenizer()


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; build one with `realm-fast corpus build`"):
        TokenStore.open(tmp_path / "missing")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        TokenStore.open(tmp_path)
    with pytest.raises(ValueError, match="verify"):
        TokenStore.open(tmp_path, verify="everything")
