"""The inverse cloze task: exact cached gradients, what is drawn, what it learns, and that it resumes."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from realm_fast.checkpoint import newest_checkpoint
from realm_fast.config import apply_overrides
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError, DataError, Interrupted, ProvenanceError, UserError
from realm_fast.gradient_cache import EmbeddedRows, cached_backward
from realm_fast.ict import Ict, IctSampler, ict
from realm_fast.metrics import read_jsonl, read_metrics
from realm_fast.objective import in_batch_contrastive_loss
from realm_fast.packing import block_input, query_input
from realm_fast.qa_model import load_qa_model
from realm_fast.run_folder import RunFolder
from realm_fast.signals import StopRequest
from realm_fast.stage import run_stage
from realm_fast.start import starting_models
from realm_fast.train import Pretrainer
from tests import qa_world

COUNT = 60
SETTINGS = (
    "ict.steps=80",
    "ict.batch_queries=16",
    "ict.embedder_lr=1e-2",
    "ict.checkpoint_every_steps=40",
    "ict.log_every_steps=1",
    "ict.token_budget=512",
    "ict.score_temperature=4",
    "embedder.trunk=fresh:layers=1,hidden=32,heads=2,dropout=0",
    "embedder.dropout=0",
    "evaluate.held_out_queries=8",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return qa_world.make_store(tmp_path_factory.mktemp("world"), count=COUNT)


def new_run(tmp_path, store, *overrides):
    config = qa_world.settings(store.path.parent, *SETTINGS, *overrides)
    return RunFolder.create(tmp_path / "run", config, store), config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    run, config = new_run(tmp_path_factory.mktemp("finished"), store)
    ict(run, config)
    return run


# ---------------------------------------------------------------- gradient caching


def gradients(embedder, store, *, cache, token_budget, seed=7):
    embedder.zero_grad(set_to_none=True)
    special = embedder.special
    queries = [query_input(store.body_tokens(i)[: 4 + i % 7], special) for i in range(24)]
    blocks = [block_input(store.title_tokens(i), store.body_tokens(i), special) for i in range(24)]
    loss = cached_backward(
        [
            EmbeddedRows(queries, embedder, embedder.query_emb),
            EmbeddedRows(blocks, embedder, embedder.block_emb),
        ],
        lambda q, d: in_batch_contrastive_loss(q, d, temperature=4.0),
        token_budget=token_budget,
        seed=seed,
        cache=cache,
    )
    return loss, {name: p.grad.clone() for name, p in embedder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("token_budget", [48, 512])
def test_cached_gradients_are_the_plain_ones_with_dropout(store, shared, token_budget):
    config = qa_world.settings(store.path.parent).embedder
    torch.manual_seed(0)
    embedder = Embedder.from_config(
        dataclasses.replace(config, shared=shared, dropout=0.3), store.tokenizer()
    ).double()
    plain_loss, plain = gradients(embedder, store, cache=False, token_budget=token_budget)
    loss, cached = gradients(embedder, store, cache=True, token_budget=token_budget)
    assert plain.keys() == cached.keys()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0)
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert max(float(g.abs().max()) for g in plain.values()) > 1e-3
    # dropout does take part: another seed, another gradient
    _, other = gradients(embedder, store, cache=True, token_budget=token_budget, seed=8)
    assert any(not torch.allclose(other[name], plain[name], rtol=1e-3) for name in plain)


def test_without_dropout_packs_change_nothing(store):
    config = qa_world.settings(store.path.parent).embedder
    torch.manual_seed(0)
    embedder = Embedder.from_config(config, store.tokenizer()).double().eval()
    _, one_pack = gradients(embedder, store, cache=False, token_budget=1 << 20)
    _, many = gradients(embedder, store, cache=True, token_budget=48)
    for name, gradient in one_pack.items():
        torch.testing.assert_close(many[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


# ---------------------------------------------------------------- what is drawn


def sampler(store, **changes):
    settings = {"split": "train", "max_query_tokens": 24, "keep_sentence_probability": 0.1, **changes}
    return IctSampler(store, 5, **settings)


def test_examples_are_a_sentence_and_the_rest_of_its_block(store):
    kept = 0
    for step in range(20):
        for example in sampler(store).batch(step, 16):
            body = store.body_tokens(example.block_id)
            bounds = store.sentences(example.block_id)
            sentences = [body[a:b] for a, b in itertools.pairwise(bounds)]
            matches = [s for s in sentences if np.array_equal(s[: len(example.query)], example.query)]
            assert len(matches) == 1
            if len(example.body) == len(body):
                kept += 1
                assert np.array_equal(example.body, body)
            else:
                rest = [s for s in sentences if s is not matches[0]]
                assert np.array_equal(example.body, np.concatenate(rest))
    assert 10 <= kept <= 60  # 10% of 320


def test_blocks_of_a_step_differ_and_repeat_for_the_same_seed(store):
    batch = sampler(store).batch(3, 32)
    assert len({e.block_id for e in batch}) == 32
    again = sampler(store).batch(3, 32)
    assert [e.block_id for e in batch] == [e.block_id for e in again]
    assert all(np.array_equal(a.body, b.body) for a, b in zip(batch, again, strict=True))
    assert [e.block_id for e in batch] != [e.block_id for e in sampler(store).batch(4, 32)]
    assert [e.block_id for e in batch] != [e.block_id for e in sampler(store).batch(3, 32, rank=1)]
    assert not {e.block_id for e in batch} & {e.block_id for e in sampler(store, split="heldout").batch(0, 9)}


def test_blocks_of_one_sentence_are_named_when_there_is_nothing_else(tmp_path):
    folder = tmp_path / "short"
    qa_world.write_vocabulary(folder / "vocabulary", 4)
    lines = [json.dumps({"id": str(i), "title": "t", "text": f"Many people live in {n}."}) for i, n in
             enumerate(["nobu", "noke", "nogi"])]  # fmt: skip
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    from realm_fast.corpus import build_corpus

    store = build_corpus(qa_world.settings(folder).corpus, folder / "store", progress=False)
    with pytest.raises(DataError, match="no block of the train split has two sentences"):
        sampler(store)


# ---------------------------------------------------------------- the stage


def test_it_learns_and_leaves_what_it_promises(finished):
    folder = finished.path / "ict"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(0 <= line["in_batch_accuracy"] <= 1 and line["grad_norm"] > 0 for line in lines)
    before, after = read_jsonl(folder / "evaluations.jsonl", "the evaluations")
    assert (before["when"], before["step"], after["when"], after["step"]) == ("before", 0, "after", 80)
    assert before["blocks"] == COUNT
    for line in (before, after):
        assert 0 <= line["recall"]["1"] <= line["recall"]["5"] <= line["recall"]["20"] <= 100
    assert after["recall"]["5"] > before["recall"]["5"]
    stages = [json.loads(line)["stage"] for line in finished.stages_path.read_text().splitlines()]
    assert stages == ["measure before ict", "ict", "measure after ict"]


def test_a_resumed_run_takes_the_same_steps(tmp_path, store, finished):
    run, config = new_run(tmp_path, store)
    real = Ict.update

    def stopping(self, step):
        means = real(self, step)
        if step == 6:
            stop.signal_number = 15
        return means

    stop = StopRequest()
    trainer = Ict(run, config, None, False)
    trainer.update = stopping.__get__(trainer)
    (run.path / "ict" / "checkpoints").mkdir(parents=True)
    with pytest.raises(Interrupted, match="ict stopped after step 6 of 80"):
        trainer.train(stop)
    assert newest_checkpoint(run.path / "ict" / "checkpoints").step == 6
    with pytest.raises(UserError, match="already has a checkpoint of step 6"):
        ict(run, config)
    ict(run, config, resume=True)
    timing = ("step_s", "queries_per_s")

    def figures(of):
        lines = read_metrics(of.path / "ict" / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k not in timing} for line in lines]

    assert figures(run) == figures(finished)
    ours, theirs = (
        newest_checkpoint(of.path / "ict" / "checkpoints").path / "embedder" / "model.safetensors"
        for of in (run, finished)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_pretraining_and_questions_start_from_it(tmp_path, store, finished):
    trained = newest_checkpoint(finished.path / "ict" / "checkpoints").path / "embedder"
    weights = Embedder.load(trained).state_dict()
    start = starting_models(finished, finished.config(), store)
    assert start.embedder_from == "ict/checkpoints/step-00000080"
    assert start.reader_from.startswith("fresh:")
    assert all(torch.equal(value, weights[name]) for name, value in start.embedder.state_dict().items())
    assert load_qa_model(finished, finished.config()).stage == "ict"
    assert load_qa_model(finished, finished.config(), "start").stage == "start"
    # another run can name it
    run, config = new_run(
        tmp_path, store, f"pretrain.start_embedder={trained}", "masking.strategy=random_token"
    )
    trainer = Pretrainer(run, config, resume=False, progress=False)
    trainer.close()
    assert torch.equal(trainer.model.embedder.state_dict()["block_side.projection.weight"],
                       weights["block_side.projection.weight"])  # fmt: skip
    other = apply_overrides(config, ["embedder.pooling=cls"])
    with pytest.raises(ConfigError, match=r"section \[embedder\]"):
        starting_models(run, other, store)
    (tmp_path / "elsewhere").mkdir()
    strange = qa_world.make_store(tmp_path / "elsewhere", count=9)
    with pytest.raises((ProvenanceError, ConfigError), match="tokenizer"):
        starting_models(run, config, strange)


def test_bad_input_is_named(tmp_path, store, finished):
    run, config = new_run(tmp_path, store, "ict.batch_queries=500")
    with pytest.raises(ConfigError, match=r"ict.batch_queries: expected at most 59"):
        ict(run, config)
    changed = apply_overrides(finished.config(), ["ict.embedder_lr=1e-4"])
    with pytest.raises(ConfigError, match=r"ict.embedder_lr: the checkpoint has 0.01, now it is 0.0001"):
        run_stage(Ict, finished, changed, resume=True)
