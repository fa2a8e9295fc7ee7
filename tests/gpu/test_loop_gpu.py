"""The training loop on a real GPU: the index in its memory, the refresh beside the step, graphs, and waits.

`make gpu-check` runs these.
"""

import copy
import warnings

import pytest
import torch

from realm_fast import MipsIndex, linear_marginal_cross_entropy, marginal_log_likelihood
from realm_fast.config import apply_overrides
from realm_fast.device import HostCopy, to_device, to_host
from realm_fast.device_index import DeviceIndex
from realm_fast.embedding import embed_blocks
from realm_fast.errors import ConfigError
from realm_fast.index import Provenance
from realm_fast.metrics import read_metrics
from realm_fast.model import RealmModel, realm_step
from realm_fast.refresh import RefreshTask, make_refresher
from realm_fast.residence import Residence, free_bytes
from realm_fast.run_folder import RunFolder
from realm_fast.streams import side_stream, training_stream
from realm_fast.train import Pretrainer, pretrain
from tests import model_world, qa_world

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"), count=60)


def on_device(**options):
    return Residence("device", GPU, **({"copies": 2, "most_blocks": 2048} | options))


def make_index(rows=100_000, dim=128, dtype="float32"):
    emb = torch.randn(rows, dim, generator=torch.Generator().manual_seed(5))
    return MipsIndex.from_embeddings(emb, dtype, provenance=Provenance("encoder", "corpus", 1))


# ---- the index ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_placed_index_gives_the_hosts_answers_bit_for_bit(dtype):
    index = make_index(dtype=dtype)
    placed = on_device().place(index)
    assert isinstance(placed, DeviceIndex)
    queries = torch.randn(40, 128)
    exclude = torch.randint(-1, 100_000, (40, 3))
    want = index.search(queries, 20, exclude_ids=exclude)
    got = placed.search(queries.cuda(), 20, exclude_ids=exclude.cuda())
    assert torch.equal(got.ids.cpu(), want.ids)
    assert torch.equal(got.scores.cpu(), want.scores)
    from_host = placed.search(queries, 20, exclude_ids=exclude)
    assert from_host.ids.device.type == "cpu"
    assert torch.equal(from_host.ids, want.ids)
    assert torch.equal(placed.reconstruct(want.ids[0]).cpu(), index.reconstruct(want.ids[0]))


def test_the_memory_of_a_dropped_index_is_not_reused_while_it_is_searched():
    """Without record_stream the second index would be written over the first while searches still read it."""
    residence, queries = on_device(), torch.randn(64, 128, device="cuda")
    first = residence.place(make_index(400_000))
    want = first.search(queries, 10)
    torch.cuda._sleep(200_000_000)  # what follows is queued behind it
    late = first.search(queries, 10)
    del first
    residence.place(MipsIndex.from_embeddings(torch.zeros(400_000, 128)))
    torch.cuda.synchronize()
    assert torch.equal(late.ids, want.ids)
    assert torch.equal(late.scores, want.scores)


def test_memory_is_accounted_for():
    index = make_index(200_000, dtype="int8")
    before = torch.cuda.memory_allocated()
    placed = on_device().place(index)
    held = torch.cuda.memory_allocated() - before
    assert placed.nbytes <= held <= placed.nbytes + (16 << 20)
    assert held <= DeviceIndex.bytes_needed("int8", 128, 200_000) + (16 << 20)


def test_an_index_larger_than_the_memory_is_refused_or_stays_on_the_host(monkeypatch):
    index = make_index(1000)
    monkeypatch.setattr("realm_fast.residence.free_bytes", lambda device: 1 << 20)
    with pytest.raises(ConfigError, match="are free"):
        on_device().place(index)
    assert Residence("auto", GPU, copies=2, most_blocks=10).place(index) is index
    monkeypatch.undo()
    assert free_bytes(GPU) > 1 << 30


def test_running_out_of_memory_during_a_move_leaves_the_old_index_usable():
    residence = on_device()
    placed, queries = residence.place(make_index()), torch.randn(8, 128, device="cuda")
    want = placed.search(queries, 5)
    held = []
    try:
        while True:
            held.append(torch.empty(1 << 26, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        pass
    try:
        with pytest.raises(torch.OutOfMemoryError):
            residence.place(make_index(2_000_000))
    finally:
        held.clear()
        torch.cuda.empty_cache()
    assert torch.equal(placed.search(queries, 5).ids, want.ids)


# ---- streams and copies ----


def test_side_work_sees_what_was_queued_before_the_mark():
    side = side_stream(GPU)
    with training_stream(GPU):
        values = torch.zeros(1 << 22, device="cuda")
        torch.cuda._sleep(100_000_000)
        values += 1
        mark = side.mark()
        with side.after(mark):
            doubled = values * 2
        side.finish()
        side.hand_over([doubled])
        assert bool((doubled == 2).all())


def test_copies_both_ways():
    tensor = torch.randn(1000, 7)
    there = to_device(tensor, GPU)
    assert torch.equal(to_host(there)[0], tensor)
    copy = HostCopy(there * 2)
    assert torch.equal(copy.wait(), tensor * 2)


# ---- the refresh ----


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
def test_each_mode_embeds_on_the_gpu_and_places_the_index(tmp_path, store, mode):
    config = qa_world.settings(store.path.parent, f"refresh.mode={mode}", "refresh.device=cuda")
    embedder = model_embedder(store, config).cuda()
    task = RefreshTask(tmp_path / "snapshots", store, config.index, config.refresh)
    residence = on_device()
    refresher = residence.beside(make_refresher(task, work_dir=tmp_path / "work"), waits=mode == "inline")
    try:
        residence.place(refresher.make_now(0, embedder).index)
        refresher.submit(7, embedder)
        expected = embed_blocks(embedder, store, token_budget=2048)
        with torch.no_grad():
            for parameter in embedder.parameters():
                parameter.add_(1.0)  # the trainer goes on at once
        snapshot = None
        while snapshot is None:
            assert refresher.failures == []
            snapshot = refresher.poll()
        assert snapshot.step == 7
        assert isinstance(snapshot.index, DeviceIndex)
        rows = snapshot.index.reconstruct(torch.arange(len(store))).cpu()
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    finally:
        refresher.close()


def model_embedder(store, config):
    from realm_fast.embedder import Embedder

    torch.manual_seed(0)
    return Embedder.from_config(config.embedder, store.tokenizer())


# ---- the loop ----

SETTINGS = (
    "device=cuda", "masking.strategy=random_token", "masking.random_token_rate=0.3", "masking.max_masks=4",
    "pretrain.steps=12", "pretrain.batch_queries=4", "pretrain.num_candidates=3", "pretrain.reader_lr=3e-3",
    "pretrain.embedder_lr=3e-3", "pretrain.checkpoint_every_steps=6", "pretrain.log_every_steps=1",
    "pretrain.illustrations=1", "refresh.every_steps=4", "evaluate.held_out_queries=16",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["inline", "thread", "process"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pretraining_from_end_to_end_with_the_index_on_the_device(tmp_path, store, mode, dtype, monkeypatch):
    searched = []
    real = DeviceIndex.search
    monkeypatch.setattr(
        DeviceIndex, "search", lambda self, *a, **k: searched.append(self.device.type) or real(self, *a, **k)
    )
    monkeypatch.setattr(MipsIndex, "search", lambda *a, **k: pytest.fail("the host was searched"))
    config = qa_world.settings(
        store.path.parent, *SETTINGS, f"refresh.mode={mode}", f"index.dtype={dtype}", "index.residence=device"
    )
    run = RunFolder.create(tmp_path / "run", config, store)
    pretrain(run, config)
    lines = read_metrics(run.pretrain_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["refresh_failures"] == 0 for line in lines)
    assert all(line["trainer_wait_s"] == 0 for line in lines)
    assert set(searched) == {"cuda"}
    if mode == "inline":
        assert [line["staleness_steps"] for line in lines] == [(step - 1) % 4 for step in range(1, 13)]


def test_host_and_device_residence_take_the_same_steps(tmp_path, store):
    """The answers are the same bits, so are the candidates, so is (inline) every loss, to cuBLAS' rounding."""
    losses = []
    for residence in ("host", "device"):
        config = qa_world.settings(
            store.path.parent,
            *SETTINGS,
            "refresh.mode=inline",
            f"index.residence={residence}",
            "pretrain.steps=6",
        )
        run = RunFolder.create(tmp_path / residence, config, store)
        pretrain(run, config)
        losses.append([line["loss"] for line in read_metrics(run.pretrain_dir / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_finetuning_and_evaluation_search_the_device(tmp_path, store, monkeypatch):
    from realm_fast.evaluate import evaluate
    from realm_fast.finetune import finetune

    monkeypatch.setattr(MipsIndex, "search", lambda *a, **k: pytest.fail("the host was searched"))
    config = qa_world.settings(store.path.parent, "device=cuda", "index.residence=device")
    run = RunFolder.create(tmp_path / "run", config, store)
    finetune(run, config)
    monkeypatch.undo()  # marking which questions can be reached searches a host index, once
    results = evaluate(run, config)
    assert results["sets"][0]["questions"] > 0


# ---- waits, and graphs ----


def waits_in(action):
    """How often torch had to wait for the device, and where. HostCopy's own waits are not among them."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in seen if "synchron" in str(w.message)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_search_never_waits(dtype):
    placed, queries = on_device().place(make_index(dtype=dtype)), torch.randn(30, 128, device="cuda")
    exclude = torch.randint(-1, 1000, (30, 2), device="cuda")
    placed.search(queries, 10, exclude_ids=exclude)
    assert waits_in(lambda: placed.search(queries, 10, exclude_ids=exclude)) == []


def test_a_step_waits_where_docs_gpu_says(tmp_path):
    documents = model_world.real_documents(40)
    store = model_world.make_store(tmp_path, documents)
    embedder, reader = model_world.make_embedder(store), model_world.make_reader(store)
    model = RealmModel(embedder, reader).cuda()
    queries = model_world.make_queries(store, 6)
    index = on_device().place(
        MipsIndex.from_embeddings(
            embed_blocks(embedder, store), provenance=Provenance(embedder.hash(), store.corpus_hash, 0)
        )
    )

    def step():
        output, _ = realm_step(model, index, store, queries, num_candidates=4, with_accuracy=False)
        output.loss.backward()

    step()
    found = waits_in(step)
    # The loss learns how many rows count, forward and backward; HostCopy brings the candidates.
    assert len(found) <= 2, found


def loss_inputs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, 6, 64, generator=g).cuda(), torch.randn(3000, 64, generator=g).cuda()
    labels = torch.randint(3000, (4, 6), generator=g)
    labels[:, 4:] = -100
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels.cuda(),
        torch.randn(4, 8, generator=g).cuda(),
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_and_its_gradients_can_be_captured(level):
    hidden, weight, labels, scores = loss_inputs()
    scores.requires_grad_()

    def step():
        loss = linear_marginal_cross_entropy(hidden, weight, None, labels, scores, level=level, impl="cuda")
        return loss, torch.autograd.grad(loss, (hidden, weight, scores))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
        labels[0, :2] = -100  # another number of rows counts now
        labels[1, 4:] = 17
    graph.replay()
    torch.testing.assert_close(captured[0], step()[0])
    for got, want in zip(captured[1], step()[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_search_and_marginal_can_be_captured_together():
    placed, queries = on_device().place(make_index()), torch.randn(16, 128, device="cuda")
    gold = torch.randn(16, 8, 5, device="cuda").log_softmax(-1)

    def step():
        scores, ids = placed.search(queries, 8)
        return ids, marginal_log_likelihood(gold, scores.log_softmax(-1), impl="cuda")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, marginal = step()
    queries.copy_(torch.randn(16, 128))
    graph.replay()
    want_ids, want = step()
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(marginal, want)


# ---- bad input ----


def test_mixed_devices_are_refused_by_name():
    hidden, weight, labels, scores = loss_inputs()
    with pytest.raises(ValueError, match=r"retrieval_scores: expected .* on cuda:0"):
        linear_marginal_cross_entropy(hidden, weight, None, labels, scores.cpu())
    with pytest.raises(ValueError, match=r"candidate_log_prob: expected .* on cuda:0"):
        marginal_log_likelihood(torch.zeros(2, 3, 4, device="cuda"), torch.zeros(2, 3))
    placed = on_device().place(make_index(1000))
    with pytest.raises(ValueError, match=r"exclude_ids: expected .* on cuda:0"):
        placed.search(torch.randn(2, 128, device="cuda"), 3, exclude_ids=torch.zeros(2, dtype=torch.int64))


def test_without_columns_every_score_is_zero():
    from realm_fast import mips_topk

    found = mips_topk(torch.ones(2, 0, device="cuda"), torch.ones(3, 0, device="cuda"), 2, impl="cuda")
    assert found.ids.tolist() == [[0, 1]] * 2
    assert found.scores.tolist() == [[0.0, 0.0]] * 2


def test_a_run_resumes_on_the_other_side(tmp_path, store):
    """Where the index lives is no part of what a run computes: a checkpoint may be taken up on the host."""
    config = qa_world.settings(store.path.parent, *SETTINGS, "refresh.mode=inline", "index.residence=device")
    run = RunFolder.create(tmp_path / "run", config, store)
    trainer = Pretrainer(run, copy.copy(config), resume=False, progress=False)
    assert isinstance(trainer.snapshot.index, DeviceIndex)
    trainer.step = 6
    trainer._save()
    trainer.close()
    host = apply_overrides(config, ["index.residence=host"])
    resumed = Pretrainer(run, host, resume=True, progress=False)
    assert isinstance(resumed.snapshot.index, MipsIndex)
    resumed.close()
