"""MipsIndex and FaissIndex: certified exactness, changes, files, provenance, concurrency, bad input."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from strategies import KINDS, make_embeddings, searches
from topk_truth import assert_is_top_k, same

import realm_fast as rf
from realm_fast import _native
from realm_fast.errors import CorruptArtifactError, DataError, ProvenanceError
from realm_fast.index import DTYPES
from realm_fast.ops.mips_topk import mips_topk

LEVELS = _native.available_cpu_levels()
LOW = ("bfloat16", "int8")
PROVENANCE = rf.Provenance(encoder_hash="e" * 8, corpus_hash="c" * 8, step=7)


@pytest.fixture(params=LEVELS)
def level(request):
    _native.force_cpu_level(request.param)
    yield request.param
    _native.force_cpu_level("")


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def data(rows=600, dim=24, queries=7, kind="normal"):
    return make_embeddings(kind, rows, dim, 0), make_embeddings(kind, queries, dim, 1)


class TestExactness:
    @settings(max_examples=80, deadline=None)
    @given(search=searches(), dtype=st.sampled_from(LOW), candidates=st.sampled_from([0, 1, 60]))
    def test_low_precision_answers_are_the_float32_answers(self, search, dtype, candidates):
        blocks, queries, k = search["blocks"], search["queries"], search["k"]
        if blocks.shape[1] == 0:
            return
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        index.max_candidates = candidates  # few: also the fall-back must be exact
        for level in LEVELS[-3:]:
            _native.force_cpu_level(level)
            try:
                expected = mips_topk(**search)
                assert same(index.search(queries, k, exclude_ids=search["exclude_ids"]), expected)
            finally:
                _native.force_cpu_level("")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", LOW)
    def test_on_adversarial_data(self, level, dtype, kind):
        blocks, queries = data(4000, 64, 12, kind)
        queries[0] = blocks[17]
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        for k in (1, 10, 100):
            result = index.search(queries, k)
            assert same(result, mips_topk(queries, blocks, k))
            assert_is_top_k(result, queries, blocks, k)

    @pytest.mark.parametrize("dtype", LOW)
    def test_adversarial_queries_on_ordinary_blocks(self, level, dtype):
        """Blocks chosen to sit within the quantisation error of each other, seen from the query."""
        blocks, _ = data(3000, 96)
        query = make_embeddings("normal", 1, 96, 5)
        along = blocks @ query[0] / query[0].dot(query[0])
        nudged = blocks - (along - 0.5)[:, None] * query  # all inner products equal but for rounding
        index = rf.MipsIndex.from_embeddings(nudged, dtype)
        assert same(index.search(query, 20), mips_topk(query, nudged, 20))

    @pytest.mark.parametrize("dtype", LOW)
    def test_work_is_saved_and_counted(self, dtype):
        blocks, queries = data(20000, 128, 16)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        index.search(queries, 10)
        stats = index.stats()
        assert stats["fell_back"] == 0
        assert 160 <= stats["rescored"] <= 160 * (3 if dtype == "bfloat16" else 12)
        index = rf.MipsIndex.from_embeddings(blocks[:1].expand(20000, -1), dtype)
        index.search(queries, 10)
        assert index.stats()["fell_back"] == 16

    @pytest.mark.parametrize("order", ["random", "by score", "in clusters", "ids out of order"])
    def test_thresholds_guessed_from_samples_change_nothing(self, level, dtype, order):
        """Large k over many panels, where a sample of the panels decides what is looked at."""
        blocks, queries = data(110_000, 8, 20)
        ids = torch.arange(len(blocks))
        if order == "by score":
            blocks = blocks[(blocks @ queries[0]).argsort()]
        elif order == "in clusters":
            blocks = blocks[:1100].repeat_interleave(100, 0) + 0.05 * blocks
        elif order == "ids out of order":
            ids = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
        index = rf.MipsIndex.from_embeddings(blocks, dtype, ids)
        by_id = torch.empty_like(blocks)
        by_id[ids] = blocks
        for k in (60, 700):
            result = index.search(queries, k, exclude_ids=torch.arange(20))
            assert_is_top_k(result, queries, by_id, k, torch.arange(20)[:, None])
        assert index.stats()["fell_back"] == index.stats()["repeated"] == 0

    def test_not_exact_returns_scores_as_stored(self, level, dtype):
        blocks, queries = data(500, 40)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        result = index.search(queries, 8, exact=False)
        truth = (queries.double() @ blocks.double().T).gather(1, result.ids)
        size = queries.norm(dim=1, keepdim=True) * blocks.norm(dim=1).max()
        allowed = {"float32": 1e-6, "bfloat16": 8e-3, "int8": 3e-2}[dtype]
        assert ((result.scores - truth).abs() <= size * allowed).all()
        assert index.stats()["rescored"] == 0
        if dtype == "float32":
            assert same(result, mips_topk(queries, blocks, 8))

    @pytest.mark.parametrize("dtype", LOW)
    def test_rows_only_float32_can_hold(self, level, dtype):
        blocks, queries = data(300, 10)
        blocks[5, 2], blocks[6, 0], blocks[7, 1] = torch.nan, torch.inf, -torch.inf
        blocks[8] *= 1e32
        queries[1, 3], queries[2] = torch.nan, queries[2] * 1e33
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        assert index.stats()["irregular_rows"] == 4
        assert same(index.search(queries, 20), mips_topk(queries, blocks, 20))
        index.update(torch.tensor([6, 100]), torch.stack([blocks[100], blocks[6]]))
        blocks[[6, 100]] = blocks[[100, 6]]
        assert same(index.search(queries, 20), mips_topk(queries, blocks, 20))

    def test_threads_and_batches_do_not_matter(self, dtype):
        blocks, queries = data(5000, 48, 19)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            whole = index.search(queries, 25)
            torch.set_num_threads(3)
            assert same(index.search(queries, 25), whole)
        finally:
            torch.set_num_threads(before)
        for part in (1, 2, 5):
            found = [index.search(some, 25) for some in queries.split(part)]
            assert same(rf.TopK(*(torch.cat(x) for x in zip(*found))), whole)


class Model:
    """What an index should hold, as a dictionary."""

    def __init__(self, emb, ids):
        self.rows = dict(zip(ids.tolist(), emb))

    def search(self, queries, k, exclude_ids=None):
        ids = torch.tensor(sorted(self.rows))
        emb = (
            torch.stack([self.rows[i] for i in ids.tolist()])
            if len(ids)
            else torch.empty(0, queries.shape[1])
        )
        if exclude_ids is not None:
            place = {i: p for p, i in enumerate(ids.tolist())}
            exclude_ids = torch.tensor([[place.get(i, -1) for i in row] for row in exclude_ids.tolist()])
        found = mips_topk(queries, emb, k, exclude_ids=exclude_ids)
        known = ids if len(ids) else torch.tensor([-1])
        return rf.TopK(found.scores, torch.where(found.ids >= 0, known[found.ids.clamp(min=0)], -1))


class TestChanges:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES), ordered=st.booleans())
    def test_any_sequence_of_changes(self, seed, dtype, ordered, tmp_path_factory):
        """Random adds, updates, deletes, compactions, saves and loads beside a dictionary."""
        generator = np.random.default_rng(seed)

        def rows(n):  # integers: ties are common, and go to the lower id whatever the order of rows
            return torch.from_numpy(generator.integers(-2, 3, (n, 5)).astype(np.float32))

        count = int(generator.integers(0, 120))
        ids = torch.arange(count) if ordered else torch.from_numpy(generator.permutation(1000)[:count])
        emb = rows(count)
        index = rf.MipsIndex.from_embeddings(emb, dtype, ids=None if ordered else ids)
        model, queries, next_id = Model(emb, ids), rows(4), int(ids.max()) + 1 if count else 0
        for _ in range(8):
            held = list(model.rows)
            action = generator.integers(0, 6)
            n = int(generator.integers(0, 60))
            if action == 0:
                new = rows(n)
                index.add(new)
                model.rows |= {next_id + i: row for i, row in enumerate(new)}
                next_id += n
            elif action == 1:
                free = [i for i in generator.permutation(3000).tolist() if i not in model.rows][:n]
                new = rows(len(free))
                index.add(new, torch.tensor(free, dtype=torch.int64))
                model.rows |= dict(zip(free, new))
                next_id = max([next_id, *(i + 1 for i in free)])
            elif action == 2 and held:
                some = generator.permutation(held)[: n // 2].tolist()
                new = rows(len(some))
                index.update(torch.tensor(some, dtype=torch.int64), new)
                model.rows |= dict(zip(some, new))
            elif action == 3 and held:
                some = generator.permutation(held)[: n // 2].tolist()
                index.delete(torch.tensor(some, dtype=torch.int64))
                for i in some:
                    del model.rows[i]
            elif action == 4:
                index.compact()
            elif action == 5:
                path = tmp_path_factory.mktemp("index") / "i.safetensors"
                index.save(path)
                index = rf.MipsIndex.load(path, mmap=bool(n % 2))
            assert len(index) == len(model.rows)
            assert index.ids.tolist() == sorted(model.rows)
            assert same(index.search(queries, 9), model.search(queries, 9))
            excluded = index.search(queries, 3).ids
            expected = model.search(queries, 9, exclude_ids=excluded)
            assert same(index.search(queries, 9, exclude_ids=excluded), expected)
        if model.rows:
            some = list(model.rows)[:7]
            wanted = torch.stack([model.rows[i] for i in some])
            assert torch.equal(index.reconstruct(torch.tensor(some)), wanted)

    def test_adding_moves_nothing(self, dtype):
        blocks, _ = data(1000, 8)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        before = index._rows.slabs[0].panels.ctypes.data
        for _ in range(30):
            index.add(blocks[:100])
        assert index._rows.slabs[0].panels.ctypes.data == before
        assert len(index._rows.slabs) < 12  # slabs grow with the index

    def test_a_failed_change_changes_nothing(self, dtype, monkeypatch):
        blocks, queries = data(100, 8)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        before = index.search(queries, 5)
        attempts = [
            lambda: index.add(blocks[:3], torch.tensor([200, 5, 201])),
            lambda: index.add(blocks[:2], torch.tensor([200, 200])),
            lambda: index.add(blocks[:2], torch.tensor([-1, 300])),
            lambda: index.update(torch.tensor([1, 100]), blocks[:2]),
            lambda: index.update(torch.tensor([1, 1]), blocks[:2]),
            lambda: index.update(torch.tensor([1]), blocks[:2]),
            lambda: index.delete(torch.tensor([3, 1000])),
            lambda: index.add(blocks[:2, :5]),
        ]
        for attempt in attempts:
            with pytest.raises(ValueError, match=r"ids|emb"):
                attempt()
            assert len(index) == 100
            assert same(index.search(queries, 5), before)

        from realm_fast.panels import Slab

        monkeypatch.setattr(Slab, "new", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            index.add(blocks.repeat(3, 1) * 10)  # fills the last slab, then wants another
        assert len(index) == 100
        assert same(index.search(queries, 5), before)

    def test_freed_ids_can_come_back(self, dtype):
        blocks, queries = data(50, 8)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        index.delete(torch.arange(10, 20))
        assert not set(index.search(queries, 50).ids.flatten().tolist()) & set(range(10, 20))
        index.add(blocks[10:20], torch.arange(10, 20))
        assert same(index.search(queries, 50), mips_topk(queries, blocks, 50))
        assert index.stats()["deleted_rows"] == 10
        index.compact()
        assert index.stats()["deleted_rows"] == 0
        assert same(index.search(queries, 50), mips_topk(queries, blocks, 50))


class TestConcurrency:
    def test_searches_see_whole_snapshots_while_others_publish(self, dtype):
        """Every snapshot's blocks are one constant: a mixed answer would show two of them."""
        queries = torch.ones(2, 4)

        def snapshot(value: int) -> rf.MipsIndex:
            return rf.MipsIndex.from_embeddings(torch.full((200, 4), float(value)), dtype)

        index, stop, problems = snapshot(0), threading.Event(), []

        def search() -> None:
            last = -1.0
            while not stop.is_set():
                scores = index.search(queries, 50).scores
                if len(scores.unique()) != 1 or scores[0, 0] < last:
                    problems.append(scores)
                last = float(scores[0, 0])

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for value in range(1, 120):
                new = snapshot(value)
                index.publish(new)
                assert len(new) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not problems

    def test_searches_never_see_half_an_update(self, dtype):
        queries = torch.ones(1, 64)
        index = rf.MipsIndex.from_embeddings(torch.zeros(60, 64), dtype)
        stop, problems = threading.Event(), []

        def search() -> None:
            while not stop.is_set():
                if len(index.search(queries, 60).scores.unique()) != 1:
                    problems.append("mixed")

        thread = threading.Thread(target=search)
        thread.start()
        try:
            for value in range(100):
                index.update(torch.arange(60), torch.full((60, 64), float(value % 7)))
        finally:
            stop.set()
            thread.join()
        assert not problems

    def test_publishing_another_width_is_refused(self):
        index = rf.MipsIndex.from_embeddings(torch.zeros(3, 4))
        other = rf.MipsIndex.from_embeddings(torch.zeros(3, 5))
        with pytest.raises(ValueError, match="width 4, got 5"):
            index.publish(other)
        assert len(other) == 3


class TestFiles:
    @pytest.mark.parametrize("mmap", [True, False])
    @pytest.mark.parametrize("ids", [None, torch.tensor([9, 3, 7, 1000, 2])])
    def test_round_trip(self, dtype, mmap, ids, tmp_path):
        blocks, queries = data(5 if ids is not None else 333, 12)
        index = rf.MipsIndex.from_embeddings(blocks, dtype, ids, provenance=PROVENANCE)
        index.save(tmp_path / "a.safetensors")
        loaded = rf.MipsIndex.load(tmp_path / "a.safetensors", mmap=mmap, expect=PROVENANCE)
        assert (len(loaded), loaded.dim, loaded.dtype) == (len(index), index.dim, index.dtype)
        assert loaded.provenance == PROVENANCE
        assert same(loaded.search(queries, 9), index.search(queries, 9))
        assert (loaded.stats()["mapped_bytes"] > 0) == mmap

    def test_changes_to_a_mapped_index_leave_the_file_alone(self, dtype, tmp_path):
        blocks, queries = data(200, 12)
        path = tmp_path / "a.safetensors"
        rf.MipsIndex.from_embeddings(blocks, dtype).save(path)
        before = path.read_bytes()
        index = rf.MipsIndex.load(path)
        index.update(torch.arange(100), blocks[:100] * 2)
        index.delete(torch.arange(5))
        index.add(blocks)
        again = torch.cat([blocks[:100] * 2, blocks[100:], blocks])
        again[:5] = torch.nan
        assert same(index.search(queries, 20), mips_topk(queries, again, 20))
        assert path.read_bytes() == before
        index.save(path)  # over the file it is mapped from
        assert same(rf.MipsIndex.load(path, verify=True).search(queries, 20), index.search(queries, 20))

    def test_other_readers_of_safetensors_understand_it(self, dtype, tmp_path):
        blocks, _ = data(100, 12)
        rf.MipsIndex.from_embeddings(blocks, dtype, provenance=PROVENANCE).save(tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert file.metadata()["encoder_hash"] == PROVENANCE.encoder_hash
            panels = file.get_tensor("panels")
            if dtype == "float32":
                rows = panels.permute(0, 2, 1).reshape(-1, 12)
                assert torch.equal(rows[:100], blocks)
                assert rows[100:].isnan().all()
            else:
                assert torch.equal(file.get_tensor("originals")[:100], blocks)

    @pytest.mark.parametrize("dtype", LOW)
    def test_originals_in_a_file(self, dtype, tmp_path):
        blocks, queries = data(500, 20)
        path = tmp_path / "originals.f32"
        index = rf.MipsIndex.from_embeddings(blocks, dtype, originals=path)
        assert path.stat().st_size >= blocks.nbytes
        index.add(blocks * 1.5)
        index.update(torch.arange(9), blocks[:9] * 3)
        blocks = torch.cat([blocks, blocks * 1.5])
        blocks[:9] *= 3
        assert same(index.search(queries, 30), mips_topk(queries, blocks, 30))
        stats = index.stats()
        assert stats["mapped_bytes"] >= blocks.nbytes
        assert stats["memory_bytes"] < blocks.nbytes
        assert stats["memory_bytes"] + stats["mapped_bytes"] == index.nbytes
        index.compact()
        assert same(index.search(queries, 30), mips_topk(queries, blocks, 30))
        index.save(tmp_path / "a.safetensors")
        loaded = rf.MipsIndex.load(tmp_path / "a.safetensors", mmap=False, originals="mapped")
        assert same(loaded.search(queries, 30), mips_topk(queries, blocks, 30))
        with pytest.raises(ValueError, match="originals: a float32 index"):
            rf.MipsIndex.from_embeddings(blocks, "float32", originals=path)

    def test_what_was_altered_is_refused(self, dtype, tmp_path):
        blocks, _ = data(200, 12)
        path = tmp_path / "a.safetensors"
        rf.MipsIndex.from_embeddings(blocks, dtype, provenance=PROVENANCE).save(path)
        good = path.read_bytes()
        header_end = 8 + int.from_bytes(good[:8], "little")

        def refused(content: bytes, **kwargs) -> str:
            path.write_bytes(content)
            with pytest.raises(CorruptArtifactError, match=r"a\.safetensors") as error:
                rf.MipsIndex.load(path, **kwargs)
            return str(error.value)

        for size in (0, 4, 8, 100, header_end - 1, header_end, header_end + 1, len(good) - 1):
            refused(good[:size])
        assert "its header says" in refused(good + b"\0")
        assert "header" in refused(good.replace(PROVENANCE.encoder_hash.encode(), b"f" * 8))
        refused(b"\xff" * 8 + good[8:])
        refused(good[:8] + b"x" + good[9:])
        flipped = bytearray(good)
        flipped[header_end + 777] ^= 1
        assert "sha256" in refused(bytes(flipped), verify=True)
        assert "sha256" in refused(bytes(flipped), mmap=False)
        refused(np.random.default_rng(0).bytes(5000))
        with pytest.raises(DataError, match="does not exist"):
            rf.MipsIndex.load(tmp_path / "absent")
        path.write_bytes(good)
        assert len(rf.MipsIndex.load(path, verify=True)) == 200

    def test_another_layout_is_refused(self, tmp_path, monkeypatch):
        path = tmp_path / "a.safetensors"
        monkeypatch.setattr("realm_fast.index.LAYOUT_VERSION", 99)
        rf.MipsIndex.from_embeddings(torch.zeros(3, 4)).save(path)
        monkeypatch.undo()
        with pytest.raises(CorruptArtifactError, match="layout is version 99"):
            rf.MipsIndex.load(path)

    def test_provenance_mismatch_names_both_sides(self, tmp_path):
        path = tmp_path / "a.safetensors"
        rf.MipsIndex.from_embeddings(torch.zeros(3, 4), provenance=PROVENANCE).save(path)
        other_step = rf.Provenance(PROVENANCE.encoder_hash, PROVENANCE.corpus_hash, 99)
        assert rf.MipsIndex.load(path, expect=other_step).provenance.step == 7
        for expect in (rf.Provenance("other", PROVENANCE.corpus_hash, 7), rf.Provenance("e" * 8, "other", 7)):
            with pytest.raises(ProvenanceError, match="other") as error:
                rf.MipsIndex.load(path, expect=expect)
            assert "eeeeeeee" in str(error.value) or "cccccccc" in str(error.value)
        rf.MipsIndex.from_embeddings(torch.zeros(3, 4)).save(path)
        with pytest.raises(ProvenanceError, match="no provenance"):
            rf.MipsIndex.load(path, expect=PROVENANCE)

    def test_a_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.safetensors"
        index = rf.MipsIndex.from_embeddings(torch.ones(3, 4))
        index.save(path)
        before = path.read_bytes()

        def full_disk(_fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(Exception, match="no space left"):
            rf.MipsIndex.from_embeddings(torch.zeros(3, 4)).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    def test_saving_and_mapping_take_no_memory_of_the_size_of_the_index(self, tmp_path):
        """In a process of its own: peak memory over saving and loading, against an index of 200 MB."""
        script = """
import resource, sys, torch, realm_fast as rf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
emb = torch.randn(200_000, 256)
index = rf.MipsIndex.from_embeddings(emb)
del emb
before = peak()
index.save(sys.argv[1])
after_save = peak()
del index
current = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
base = current()
loaded = rf.MipsIndex.load(sys.argv[1])
print(after_save - before, current() - base, loaded.nbytes)
"""
        command = [sys.executable, "-c", script, str(tmp_path / "big.safetensors")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        saved, loaded, nbytes = (int(x) for x in run.stdout.split())
        assert nbytes >= 200_000 * 256 * 4
        assert saved < 40e6
        assert loaded < 10e6


class TestNumbers:
    def test_nbytes_counts_what_is_allocated(self, dtype):
        blocks, _ = data(4800, 32)
        index = rf.MipsIndex.from_embeddings(blocks, dtype)
        value_bytes = {"float32": 4, "bfloat16": 2 + 4, "int8": 1 + 4}[dtype]  # with the originals
        row_bytes = 32 * value_bytes + {"float32": 0, "bfloat16": 8, "int8": 12}[dtype]
        assert index.nbytes == 4800 * row_bytes + (0 if dtype == "float32" else 100 * 8)

    def test_counters(self):
        blocks, queries = data(100, 8)
        index = rf.MipsIndex.from_embeddings(blocks)
        index.search(queries, 2)
        index.search(queries[:3], 2)
        stats = index.stats()
        assert (stats["searches"], stats["queries"], stats["blocks"]) == (2, 10, 100)

    def test_extra_memory_of_a_search_does_not_grow_with_the_index(self):
        """A float32 search over 8x the rows may not allocate more than over the first eighth."""
        queries = torch.randn(64, 64)
        peaks = []
        for rows in (25_000, 200_000):
            index = rf.MipsIndex.from_embeddings(torch.randn(rows, 64))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            index.search(queries, 10)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert peaks[1] * 1024 < 20e6  # the scores alone would be 51 MB


class TestFaiss:
    faiss = pytest.importorskip("faiss")

    @pytest.mark.parametrize("ids", [None, torch.arange(400).flip(0) * 3])
    def test_round_trip_through_faiss(self, dtype, ids):
        blocks, queries = data(400, 16)
        index = rf.MipsIndex.from_embeddings(blocks, dtype, ids)
        exported = index.to_faiss()
        scores, found = exported.search(queries.numpy(), 5)
        result = index.search(queries, 5)
        assert np.array_equal(found, result.ids.numpy())
        np.testing.assert_allclose(scores, result.scores.numpy(), rtol=1e-5)
        assert same(rf.MipsIndex.from_faiss(exported, dtype).search(queries, 5), result)

    def test_other_metrics_are_refused(self):
        with pytest.raises(ValueError, match="METRIC_INNER_PRODUCT"):
            rf.MipsIndex.from_faiss(self.faiss.IndexFlatL2(4))

    @pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat"])
    def test_faiss_index_searches_excludes_saves_and_loads(self, factory, tmp_path):
        blocks, queries = data(500, 16)
        index = rf.FaissIndex.from_embeddings(blocks, factory, provenance=PROVENANCE)
        result = index.search(queries, 5)
        assert result.ids.shape == (7, 5)
        exact = mips_topk(queries, blocks, 5)
        found = (result.ids[:, :, None] == exact.ids[:, None]).any(2).float().mean()
        assert found == 1 if factory == "Flat" else found > 0.2
        without = index.search(queries, 5, exclude_ids=result.ids[:, 0])
        assert not (without.ids == result.ids[:, :1]).any()
        index.save(tmp_path / "f")
        loaded = rf.FaissIndex.load(tmp_path / "f", expect=PROVENANCE)
        assert torch.equal(loaded.search(queries, 5).ids, result.ids)
        with pytest.raises(ProvenanceError, match="wrong"):
            rf.FaissIndex.load(tmp_path / "f", expect=rf.Provenance("wrong", "c" * 8, 7))
        with pytest.raises(CorruptArtifactError, match="expected a MipsIndex, found FaissIndex"):
            rf.MipsIndex.load(tmp_path / "f")
        if factory != "IVF4,Flat":
            torch.testing.assert_close(loaded.reconstruct(torch.tensor([3, 499])), blocks[[3, 499]])

    def test_a_factory_faiss_does_not_know(self):
        with pytest.raises(ValueError, match="factory: faiss cannot build 'Nonsense'"):
            rf.FaissIndex.from_embeddings(torch.zeros(3, 4), "Nonsense")

    def test_more_than_there_are(self):
        index = rf.FaissIndex.from_embeddings(torch.randn(3, 4), "Flat")
        assert (index.search(torch.randn(2, 4), 5).ids[:, 3:] == -1).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"emb": torch.zeros(4)}, ValueError, r"emb: expected \[N, D\]"),
            ({"emb": torch.zeros(4, 0)}, ValueError, "at least one column"),
            ({"emb": torch.zeros(4, 2, dtype=torch.int8)}, TypeError, "emb: expected .* got .* int8"),
            ({"emb": np.zeros((4, 2))}, TypeError, "emb: expected"),
            ({"dtype": "float16"}, ValueError, "dtype: expected one of 'float32'"),
            ({"ids": torch.zeros(3).long()}, ValueError, r"ids: expected \[4\]"),
            ({"ids": torch.zeros(4)}, TypeError, "ids: expected .*int64"),
            ({"ids": torch.tensor([1, 2, 3, 3])}, ValueError, "ids: 3 is named more than once"),
            ({"ids": torch.tensor([1, 2, 3, -1])}, ValueError, "ids: expected ids >= 0, got -1"),
            ({"emb": torch.zeros(1, 70000), "dtype": "int8"}, ValueError, "at most 65536 columns"),
        ],
    )
    def test_building(self, arguments, error, message):
        with pytest.raises(error, match=message):
            rf.MipsIndex.from_embeddings(**{"emb": torch.zeros(4, 2)} | arguments)

    def test_searching(self, dtype):
        index = rf.MipsIndex.from_embeddings(torch.zeros(4, 2), dtype)
        with pytest.raises(ValueError, match=r"queries: expected \[B, 2\]"):
            index.search(torch.zeros(1, 3), 2)
        with pytest.raises(ValueError, match="k: expected an int >= 0, got -3"):
            index.search(torch.zeros(1, 2), -3)
        with pytest.raises(ValueError, match=r"exclude_ids: .*got -2"):
            index.search(torch.zeros(1, 2), 2, exclude_ids=torch.tensor([-2]))
        unknown = index.search(torch.zeros(1, 2), 4, exclude_ids=torch.tensor([[4, 10**12, 1]]))
        assert unknown.ids.tolist() == [[0, 2, 3, -1]]  # ids the index does not hold exclude nothing
        with pytest.raises(ValueError, match="ids: 9 is not in the index"):
            index.reconstruct(torch.tensor([1, 9]))

    def test_an_empty_index(self, dtype, tmp_path):
        index = rf.MipsIndex.from_embeddings(torch.empty(0, 6), dtype)
        assert index.search(torch.zeros(2, 6), 3).ids.tolist() == [[-1] * 3] * 2
        index.save(tmp_path / "empty")
        index = rf.MipsIndex.load(tmp_path / "empty")
        index.add(torch.ones(2, 6))
        assert index.search(torch.ones(1, 6), 3).ids.tolist() == [[0, 1, -1]]

    def test_int8_rows_of_zeros(self, level):
        blocks = torch.zeros(10, 6)
        blocks[4] = 1
        index = rf.MipsIndex.from_embeddings(blocks, "int8")
        assert index.search(torch.ones(1, 6), 3).ids.tolist() == [[4, 0, 1]]
        assert index.search(torch.zeros(1, 6), 3).ids.tolist() == [[0, 1, 2]]


def test_metadata_of_a_file_is_json_that_people_can_read(tmp_path):
    rf.MipsIndex.from_embeddings(torch.zeros(3, 4), provenance=PROVENANCE).save(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header["__metadata__"]
    assert (metadata["kind"], metadata["dtype"], metadata["step"]) == ("MipsIndex", "float32", "7")
