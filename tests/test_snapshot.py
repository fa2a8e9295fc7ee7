"""Snapshots are complete or absent, and belong to one encoder and one corpus."""

import json

import pytest
import torch

from realm_fast.config import IndexConfig
from realm_fast.embedder import Embedder
from realm_fast.embedding import embed_blocks
from realm_fast.errors import CorruptArtifactError, ProvenanceError
from realm_fast.index import Provenance
from realm_fast.snapshot import (
    INDEX_FILE,
    list_snapshots,
    open_snapshot,
    prune_snapshots,
    read_manifest,
    snapshot_name,
    write_snapshot,
)
from tests import qa_world


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"))


@pytest.fixture
def embedder(store):
    torch.manual_seed(0)
    return Embedder.from_config(qa_world.settings(store.path.parent).embedder, store.tokenizer())


def write(folder, step, embedder, store, **index):
    return write_snapshot(folder, step, embedder, store, IndexConfig(**index), token_budget=1024)


def test_a_snapshot_holds_the_embeddings_and_says_where_they_come_from(tmp_path, embedder, store):
    path = write(tmp_path, 7, embedder, store)
    snapshot = open_snapshot(path, expect=Provenance(embedder.hash(), store.corpus_hash, 0), verify=True)
    embeddings = embed_blocks(embedder, store, token_budget=1024)
    assert snapshot.step == snapshot.index.provenance.step == 7
    torch.testing.assert_close(
        snapshot.index.reconstruct(torch.arange(len(store))), embeddings, rtol=0, atol=0
    )
    found = snapshot.index.search(embeddings[:5], 3)
    best = (embeddings[:5].double() @ embeddings.double().T).topk(3)
    torch.testing.assert_close(found.scores.double(), best.values, rtol=1e-5, atol=1e-5)
    assert read_manifest(path).num_blocks == len(store)


def test_the_same_weights_are_not_embedded_twice_and_other_weights_replace(tmp_path, embedder, store):
    path = write(tmp_path, 1, embedder, store)
    stamp = (path / INDEX_FILE).stat().st_mtime_ns
    assert write(tmp_path, 1, embedder, store) == path
    assert (path / INDEX_FILE).stat().st_mtime_ns == stamp
    before = read_manifest(path).encoder_hash
    with torch.no_grad():
        next(embedder.block_side.parameters()).add_(0.1)
    write(tmp_path, 1, embedder, store)
    assert read_manifest(path).encoder_hash == embedder.hash() != before


def test_a_mismatch_names_both_sides(tmp_path, embedder, store):
    path = write(tmp_path, 1, embedder, store)
    with pytest.raises(ProvenanceError) as caught:
        open_snapshot(path, expect=Provenance("f" * 64, store.corpus_hash, 1))
    assert embedder.hash() in str(caught.value)
    assert "f" * 64 in str(caught.value)


def test_truncated_or_altered_files_are_refused(tmp_path, embedder, store):
    path = write(tmp_path, 1, embedder, store)
    file = path / INDEX_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"index.safetensors: its content is not what"):
        open_snapshot(path, verify=True)
    file.write_bytes(content[:-10])
    with pytest.raises(CorruptArtifactError, match=r"bytes, but its manifest says"):
        open_snapshot(path)
    (path / "manifest.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CorruptArtifactError, match="not a snapshot manifest"):
        open_snapshot(path)


def test_an_unfinished_snapshot_is_not_listed(tmp_path, embedder, store):
    write(tmp_path, 3, embedder, store)
    write(tmp_path, 1, embedder, store)
    (tmp_path / snapshot_name(9)).mkdir()  # no manifest
    (tmp_path / ".staging-step-00000005.x").mkdir()
    assert list(list_snapshots(tmp_path)) == [1, 3]


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path, embedder, store):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, embedder, store)
    mapped = open_snapshot(tmp_path / snapshot_name(2))
    expected = mapped.index.search(torch.ones(1, embedder.dim), 3)
    prune_snapshots(tmp_path, keep=1, pinned_steps={1})
    assert list(list_snapshots(tmp_path)) == [1, 4]
    again = mapped.index.search(torch.ones(1, embedder.dim), 3)  # deleted, but still mapped
    assert torch.equal(again.ids, expected.ids)


@pytest.mark.parametrize(
    "index", [{"dtype": "bfloat16"}, {"dtype": "int8"}, {"backend": "faiss", "faiss_factory": "Flat"}]
)
def test_every_kind_of_index_can_be_published(tmp_path, embedder, store, index):
    if index.get("backend") == "faiss":
        pytest.importorskip("faiss", reason="the faiss extra is not installed")
    snapshot = open_snapshot(write(tmp_path, 1, embedder, store, **index), verify=True)
    embeddings = embed_blocks(embedder, store, token_budget=1024)
    exact = torch.topk(embeddings[:4] @ embeddings.T, 2)
    assert torch.equal(snapshot.index.search(embeddings[:4], 2).ids, exact.indices)
