"""Snapshots are complete or absent, made shard by shard, and belong to one encoder and one corpus."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref

import pytest
import torch

from realm_fast import snapshot, snapshot_writer
from realm_fast.config import IndexConfig, load_config
from realm_fast.embedder import Embedder
from realm_fast.embedding import EmbeddingStopped, embed_blocks
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, ProvenanceError
from realm_fast.index import Provenance
from realm_fast.snapshot import (
    MANIFEST_FILE,
    MIXED,
    list_snapshots,
    open_snapshot,
    prune_snapshots,
    published_snapshots,
    read_manifest,
    retire_snapshot,
    snapshot_name,
)
from realm_fast.snapshot_writer import BUILDING_PREFIX, build_index_folder, write_snapshot
from tests import qa_world
from tests.qa_world import one_thread  # noqa: F401 (a fixture)

BLOCKS = 150
SHARD = 48
SHARDS = 4  # 48, 48, 48, 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"), count=BLOCKS)


@pytest.fixture
def embedder(store):
    torch.manual_seed(0)
    return Embedder.from_config(qa_world.settings(store.path.parent).embedder, store.tokenizer())


def write(folder, step, embedder, store, *, index=IndexConfig(), shard_blocks=SHARD, **options):  # noqa: B008
    return write_snapshot(
        folder, step, embedder, store, index, token_budget=1024, shard_blocks=shard_blocks, **options
    )


def change(embedder):
    with torch.no_grad():
        for parameter in embedder.block_side.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def rows_of(snapshot):
    return snapshot.index.reconstruct(torch.arange(len(snapshot.index)))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def embedded(monkeypatch):
    """Which shards were embedded, in order."""
    real, numbers = snapshot_writer._embed_shard, []

    def counting(embedder, store, config, plan, number, **options):
        numbers.append(number)
        return real(embedder, store, config, plan, number, **options)

    monkeypatch.setattr(snapshot_writer, "_embed_shard", counting)
    return numbers


# ---------------------------------------------------------------- a whole one


def test_a_snapshot_holds_the_embeddings_and_says_where_they_come_from(tmp_path, embedder, store):
    assert len(store) == BLOCKS
    path = write(tmp_path, 7, embedder, store)
    snapshot = open_snapshot(path, expect=Provenance(embedder.hash(), store.corpus_hash, 0), verify=True)
    embeddings = embed_blocks(embedder, store, token_budget=1024)
    assert snapshot.step == snapshot.oldest_step == snapshot.index.provenance.step == 7
    close(rows_of(snapshot), embeddings)
    found = snapshot.index.search(embeddings[:50], 3)
    best = (embeddings[:50].double() @ embeddings.double().T).topk(3)
    close(found.scores.double(), best.values)
    assert torch.equal(found.ids, best.indices)
    manifest = read_manifest(path)
    assert manifest.num_blocks == BLOCKS
    assert [(s.first_block, s.num_blocks) for s in manifest.shards] == [(0, 48), (48, 48), (96, 48), (144, 6)]
    assert {p.name for p in path.iterdir()} == {s.file for s in manifest.shards} | {MANIFEST_FILE}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_shard_and_many_search_alike_and_so_do_different_orders(tmp_path, embedder, store):
    queries = torch.randn(20, embedder.dim)
    one = open_snapshot(write(tmp_path / "one", 1, embedder, store, shard_blocks=4800))
    many = open_snapshot(write(tmp_path / "many", 1, embedder, store, shard_order=[2, 0, 3, 1]))
    assert len(one.manifest.shards) == 1
    left, right = (s.index.search(queries, 9, exclude_ids=torch.arange(20)) for s in (one, many))
    assert torch.equal(left.ids, right.ids)
    close(left.scores, right.scores)


@pytest.mark.parametrize(
    "index",
    [
        IndexConfig(dtype="bfloat16"),
        IndexConfig(dtype="int8"),
        IndexConfig(backend="faiss", faiss_factory="Flat"),
    ],
    ids=["bfloat16", "int8", "faiss"],
)
def test_every_kind_of_index_can_be_published(tmp_path, embedder, store, index):
    if index.backend == "faiss":
        pytest.importorskip("faiss", reason="the faiss extra is not installed")
    path = write(tmp_path, 1, embedder, store, index=index)
    snapshot = open_snapshot(path, verify=True)
    assert len(snapshot.manifest.shards) == (1 if index.backend == "faiss" else SHARDS)
    embeddings = embed_blocks(embedder, store, token_budget=1024)
    exact = torch.topk(embeddings[100:140] @ embeddings.T, 2)
    assert torch.equal(snapshot.index.search(embeddings[100:140], 2).ids, exact.indices)
    shard = path / snapshot.manifest.shards[-1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="not as it was written"):
        open_snapshot(path, verify=True)


def test_the_same_weights_are_not_embedded_twice_and_other_weights_replace(
    tmp_path, embedder, store, embedded
):
    path = write(tmp_path, 1, embedder, store)
    assert write(tmp_path, 1, embedder, store) == path
    assert embedded == list(range(SHARDS))
    mapped = open_snapshot(path)
    old_rows, before = rows_of(mapped), mapped.manifest.encoder_hash
    change(embedder)
    write(tmp_path, 1, embedder, store)
    assert read_manifest(path).encoder_hash == embedder.hash() != before
    assert torch.equal(rows_of(mapped), old_rows)  # who had it open goes on reading what was there


# ---------------------------------------------------------------- taken up again


def test_what_was_finished_is_not_made_again(tmp_path, embedder, store, embedded):
    packs = iter(range(10_000))
    stopped_at = []

    def stop():
        stopped_at.append(next(packs))
        return len(embedded) == 3  # amid the third shard

    with pytest.raises(EmbeddingStopped):
        write(tmp_path, 5, embedder, store, should_stop=stop)
    assert published_snapshots(tmp_path) == []
    write(tmp_path, 5, embedder, store)
    assert embedded == [0, 1, 2, 2, 3]
    close(rows_of(open_snapshot(tmp_path / snapshot_name(5), verify=True)), embed_blocks(embedder, store))


@pytest.mark.parametrize("harm", ["truncate", "flip", "foreign"])
def test_a_shard_that_was_harmed_meanwhile_is_made_again(tmp_path, embedder, store, embedded, harm):
    def stop():
        return len(embedded) == SHARDS

    with pytest.raises(EmbeddingStopped):
        write(tmp_path, 5, embedder, store, should_stop=stop)
    (building,) = tmp_path.glob(BUILDING_PREFIX + "*")
    first = building / "shard-00000.safetensors"
    if harm == "truncate":
        os.truncate(first, 100)
    elif harm == "flip":
        content = bytearray(first.read_bytes())
        content[len(content) // 2] ^= 4
        first.write_bytes(content)
    else:
        healthy = {name: value.clone() for name, value in embedder.state_dict().items()}
        change(embedder)
        other = write(tmp_path / "other", 5, embedder, store)
        embedder.load_state_dict(healthy)
        os.replace(other / first.name, first)
    del embedded[:]
    path = write(tmp_path, 5, embedder, store)
    assert embedded == [0, 3]
    close(rows_of(open_snapshot(path, verify=True)), embed_blocks(embedder, store))


def test_half_a_snapshot_of_weights_that_nobody_wants_any_more_is_deleted(
    tmp_path, embedder, store, embedded
):
    with pytest.raises(EmbeddingStopped):
        write(tmp_path, 5, embedder, store, should_stop=lambda: len(embedded) == 3)
    change(embedder)
    write(tmp_path, 6, embedder, store)
    assert [p.name for p in tmp_path.iterdir()] == [snapshot_name(6)]


def test_memory_holds_one_shard_at_a_time(tmp_path, embedder, store, monkeypatch):
    real = snapshot_writer.embed_index
    made = []

    def watched(*arguments, **options):
        assert all(earlier() is None for earlier in made)  # the shards before are gone
        index = real(*arguments, **options)
        assert len(index) <= SHARD
        made.append(weakref.ref(index))
        return index

    monkeypatch.setattr(snapshot_writer, "embed_index", watched)
    write(tmp_path, 1, embedder, store)
    assert len(made) == SHARDS


# ---------------------------------------------------------------- published by and by


def test_partial_snapshots_mix_new_shards_with_the_newest_older_ones(tmp_path, embedder, store, monkeypatch):
    old = open_snapshot(write(tmp_path, 10, embedder, store))
    old_rows = rows_of(old)
    change(embedder)
    new_rows = embed_blocks(embedder, store, token_budget=1024)
    seen = []
    real = snapshot_writer._publish_partial

    def watched(folder, *arguments):
        real(folder, *arguments)
        seen.append(published_snapshots(folder)[-1].path)

    monkeypatch.setattr(snapshot_writer, "_publish_partial", watched)
    whole = write(tmp_path, 20, embedder, store, shard_order=[3, 1, 0, 2], publish_every_shards=1)
    assert [path.name for path in seen] == [snapshot_name(20, n) for n in (1, 2, 3)]
    for path, fresh in zip(seen, ({3}, {3, 1}, {3, 1, 0}), strict=True):
        snapshot = open_snapshot(path, verify=True)
        assert (snapshot.step, snapshot.oldest_step, snapshot.manifest.fresh_shards) == (20, 10, len(fresh))
        assert snapshot.manifest.encoder_hash == snapshot.index.provenance.encoder_hash == MIXED
        assert snapshot.manifest.newest_encoder_hash == embedder.hash()
        for number, shard in enumerate(snapshot.manifest.shards):
            assert shard.step == (20 if number in fresh else 10)
            rows = slice(shard.first_block, shard.first_block + shard.num_blocks)
            close(rows_of(snapshot)[rows], (new_rows if number in fresh else old_rows)[rows])
        # such an index is for the run that made it: who needs one encoder's is refused
        for step_hash in (embedder.hash(), old.manifest.encoder_hash):
            with pytest.raises(ProvenanceError):
                open_snapshot(path, expect=Provenance(step_hash, store.corpus_hash, 20))
    shared = os.stat(seen[0] / "shard-00000.safetensors").st_ino
    assert shared == os.stat(old.path / "shard-00000.safetensors").st_ino  # a link, not a copy
    assert list(list_snapshots(tmp_path)) == [10, 20]
    assert published_snapshots(tmp_path)[-1].path == whole  # the whole one is the newest
    assert open_snapshot(whole).manifest.encoder_hash == embedder.hash()


def test_a_partial_snapshot_may_stand_on_another_and_needs_one_like_it(tmp_path, embedder, store, embedded):
    write(tmp_path, 10, embedder, store)
    del embedded[:]
    change(embedder)
    with pytest.raises(EmbeddingStopped):
        write(tmp_path, 20, embedder, store, publish_every_shards=1, should_stop=lambda: len(embedded) == 3)
    change(embedder)
    del embedded[:]
    with pytest.raises(EmbeddingStopped):
        write(
            tmp_path, 30, embedder, store, shard_order=[3, 2, 1, 0], publish_every_shards=1,
            should_stop=lambda: len(embedded) == 2,
        )  # fmt: skip
    newest = open_snapshot(published_snapshots(tmp_path)[-1].path, verify=True)
    assert [shard.step for shard in newest.manifest.shards] == [20, 20, 10, 30]
    assert newest.oldest_step == 10
    # nothing to stand on: another shard size, or no snapshot at all
    for folder, shard_blocks in ((tmp_path, 96), (tmp_path / "empty", SHARD)):
        change(embedder)
        before = len(published_snapshots(folder))
        write(folder, 40, embedder, store, shard_blocks=shard_blocks, publish_every_shards=1)
        assert len(published_snapshots(folder)) == before + 1


def test_copies_serve_where_there_are_no_hard_links(tmp_path, embedder, store, monkeypatch):
    def no_links(source, target):
        raise PermissionError("hard links are not supported here")

    monkeypatch.setattr(os, "link", no_links)
    write(tmp_path, 1, embedder, store)
    change(embedder)
    write(tmp_path, 2, embedder, store, publish_every_shards=2)
    partial = tmp_path / snapshot_name(2, 2)
    assert [shard.step for shard in open_snapshot(partial, verify=True).manifest.shards] == [2, 2, 1, 1]


# ---------------------------------------------------------------- opening


def test_a_mismatch_names_both_sides(tmp_path, embedder, store):
    path = write(tmp_path, 1, embedder, store)
    with pytest.raises(ProvenanceError) as caught:
        open_snapshot(path, expect=Provenance("f" * 64, store.corpus_hash, 1))
    assert embedder.hash() in str(caught.value)
    assert "f" * 64 in str(caught.value)


def test_truncated_altered_exchanged_or_missing_files_are_refused(tmp_path, embedder, store):
    path = write(tmp_path, 1, embedder, store)
    second, third = path / "shard-00001.safetensors", path / "shard-00002.safetensors"  # of one size
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"shard-00001.safetensors: its data is not as it was"):
        open_snapshot(path, verify=True)
    second.write_bytes(third.read_bytes())  # whole and well, but in the wrong place: seen without reading it
    with pytest.raises(CorruptArtifactError, match="another one than was written here"):
        open_snapshot(path)
    second.write_bytes(content[:-10])
    with pytest.raises(CorruptArtifactError, match=r"bytes, but its manifest says"):
        open_snapshot(path)
    second.unlink()
    with pytest.raises(CorruptArtifactError, match=r"shard-00001.safetensors: 0 bytes"):
        open_snapshot(path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"step": 1}', CorruptArtifactError, "not a snapshot manifest"),
        ('{"step": 1, "sha256": "0", "bytes": 1}', DataError, "an index of format 1; this version"),
        ('{"format_version": 4}', DataError, "an index of format 4; this version"),
        ('{"format_version": 2, "shards": []}', DataError, "an index of format 2; this version"),
        ("[]", CorruptArtifactError, "not a snapshot manifest"),
        ('{"format_ver', CorruptArtifactError, "not valid JSON"),
    ],
)
def test_a_manifest_that_is_none_says_so(tmp_path, content, error, message):
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(error, match=message):
        open_snapshot(tmp_path)


@pytest.mark.parametrize("harm", ["gap", "type", "outside", "step", "none"])
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, embedder, store, harm):
    path = write(tmp_path, 1, embedder, store)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    if harm == "gap":
        del manifest["shards"][1]
    elif harm == "type":
        manifest["shards"][1]["num_blocks"] = "48"
    elif harm == "outside":
        manifest["shards"][0]["file"] = "../elsewhere.safetensors"
    elif harm == "step":
        manifest["step"] = 2
    else:
        manifest["shards"], manifest["num_blocks"] = [], 0
    del manifest["digest"]
    manifest["digest"] = snapshot._digest(manifest)
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifactError, match=r"not a snapshot manifest \((?!its digest)"):
        open_snapshot(path)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path, embedder, store):
    path = write(tmp_path, 1, embedder, store)
    whole = (path / MANIFEST_FILE).read_bytes()
    at = whole.index(embedder.hash().encode())  # still a hash, of weights that nobody has
    for position in (at, at + 63, whole.index(b'"step": 1') + 8, *range(0, len(whole), 37)):
        flipped = bytearray(whole)
        flipped[position] ^= 2
        (path / MANIFEST_FILE).write_bytes(flipped)
        try:
            assert read_manifest(path) == read_manifest_of(whole, tmp_path), chr(
                whole[position]
            )  # white space
        except (CorruptArtifactError, DataError):
            continue


def read_manifest_of(content, tmp_path):
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    return read_manifest(tmp_path)


def test_an_unfinished_snapshot_is_not_listed(tmp_path, embedder, store):
    write(tmp_path, 3, embedder, store)
    write(tmp_path, 1, embedder, store)
    (tmp_path / snapshot_name(9)).mkdir()  # no manifest
    (tmp_path / ".staging-step-00000005.x").mkdir()
    assert list(list_snapshots(tmp_path)) == [1, 3]
    assert write(tmp_path, 9, embedder, store) == tmp_path / snapshot_name(9)
    assert list(list_snapshots(tmp_path)) == [1, 3, 9]


# ---------------------------------------------------------------- deleting


def settle():
    for thread in threading.enumerate():
        if thread.name == "delete a snapshot":
            thread.join()


def test_pruning_keeps_the_newest_the_pinned_and_what_is_open(tmp_path, embedder, store):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, embedder, store)
    mapped = open_snapshot(tmp_path / snapshot_name(2)).index
    expected = mapped.search(torch.ones(1, embedder.dim), 3)
    prune_snapshots(tmp_path, keep=1, pinned={snapshot_name(1)})
    assert list(list_snapshots(tmp_path)) == [1, 2, 4]
    assert not retire_snapshot(tmp_path / snapshot_name(2))
    assert retire_snapshot(tmp_path / snapshot_name(2), even_if_open=True)
    assert torch.equal(mapped.search(torch.ones(1, embedder.dim), 3).ids, expected.ids)
    write(tmp_path, 5, embedder, store)
    held = open_snapshot(tmp_path / snapshot_name(4)).index
    prune_snapshots(tmp_path, keep=1, pinned=())
    assert list(list_snapshots(tmp_path)) == [4, 5]
    del held  # the lock goes with the last reference to the index
    prune_snapshots(tmp_path, keep=1, pinned=())
    settle()
    assert list(list_snapshots(tmp_path)) == [5]
    assert not retire_snapshot(tmp_path / snapshot_name(4))


HOLD = """
import sys
from pathlib import Path
from realm_fast.snapshot import open_snapshot
index = open_snapshot(Path(sys.argv[1])).index
print("open", flush=True)
sys.stdin.read()
"""


def test_what_another_process_has_open_stays_until_that_is_killed(tmp_path, embedder, store):
    for step in (1, 2):
        write(tmp_path, step, embedder, store)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / snapshot_name(1))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout.readline() == "open\n"
        prune_snapshots(tmp_path, keep=1, pinned=())
        assert list(list_snapshots(tmp_path)) == [1, 2]
        child.kill()
        child.wait()
    prune_snapshots(tmp_path, keep=1, pinned=())
    settle()
    assert list(list_snapshots(tmp_path)) == [2]


def test_of_partial_snapshots_only_the_newest_stays_and_only_until_the_whole_is_there(
    tmp_path, embedder, store, embedded
):
    write(tmp_path, 1, embedder, store)
    change(embedder)
    del embedded[:]
    with pytest.raises(EmbeddingStopped):
        write(tmp_path, 2, embedder, store, publish_every_shards=1, should_stop=lambda: len(embedded) == 3)
    prune_snapshots(tmp_path, keep=1, pinned=())
    assert [one.path.name for one in published_snapshots(tmp_path)] == [snapshot_name(1), snapshot_name(2, 2)]
    write(tmp_path, 2, embedder, store, publish_every_shards=1)
    prune_snapshots(tmp_path, keep=1, pinned=())
    assert [one.path.name for one in published_snapshots(tmp_path)] == [snapshot_name(2)]


# ---------------------------------------------------------------- bad input, index build


def test_what_cannot_be_made_is_refused_by_name(tmp_path, embedder, store, monkeypatch):
    for shard_blocks in (0, 47, 100):
        with pytest.raises(
            ConfigError, match=rf"refresh.shard_blocks: .* multiple of 48, got {shard_blocks}"
        ):
            write(tmp_path, 1, embedder, store, shard_blocks=shard_blocks)
    for order in ([0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"shard_order: expected a permutation of 0 .. 3"):
            write(tmp_path, 1, embedder, store, shard_order=order)
    monkeypatch.setattr(type(store), "__len__", lambda self: 0)
    with pytest.raises(DataError, match="holds no blocks"):
        write(tmp_path, 1, embedder, store)


def test_index_build_goes_on_where_it_was_stopped(tmp_path, embedder, store, monkeypatch, embedded):
    config = load_config(None, [f"refresh.shard_blocks={SHARD}", "refresh.token_budget=1024"])
    real = snapshot_writer._embed_shard

    class Killed(BaseException):
        pass

    def dying(*arguments, **options):
        if len(embedded) == 2:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(snapshot_writer, "_embed_shard", dying)
    with pytest.raises(Killed):
        build_index_folder(tmp_path / "index", embedder, store, config)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(snapshot_writer, "_embed_shard", real)
    manifest = build_index_folder(tmp_path / "index", embedder, store, config)
    assert embedded == [0, 1, 2, 3]
    assert len(manifest.shards) == SHARDS
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    expect = Provenance(Embedder.load(tmp_path / "index" / "embedder").hash(), store.corpus_hash, 0)
    close(rows_of(open_snapshot(tmp_path / "index", expect=expect)), embed_blocks(embedder, store))
    assert build_index_folder(tmp_path / "index", embedder, store, config) == manifest
    change(embedder)
    with pytest.raises(DataError, match="exists already, and is not the index of these weights"):
        build_index_folder(tmp_path / "index", embedder, store, config)


def test_a_snapshot_is_retired_although_another_process_cleans_up_meanwhile(
    tmp_path, store, embedder, monkeypatch
):
    path, real = write(tmp_path, 1, embedder, store), tempfile.mkdtemp
    made = []

    def cleaned_away_at_first(**options):
        made.append(real(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", cleaned_away_at_first)
    assert retire_snapshot(path)
    assert len(made) == 2
    assert not path.exists()
