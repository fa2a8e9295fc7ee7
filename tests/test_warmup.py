"""Evidence for salient spans, and the reader's warm-up on it."""

import json

import numpy as np
import pytest
import torch

from realm_fast.checkpoint import newest_checkpoint
from realm_fast.config import apply_overrides
from realm_fast.corpus import build_corpus
from realm_fast.errors import (
    ConfigError,
    CorruptArtifactError,
    DataError,
    Interrupted,
    ProvenanceError,
    UserError,
)
from realm_fast.evidence import Bm25, Evidence, build_evidence, evidence_path
from realm_fast.masking import Masker, build_salient_spans
from realm_fast.metrics import read_jsonl, read_metrics
from realm_fast.reader import Reader
from realm_fast.run_folder import RunFolder
from realm_fast.signals import StopRequest
from realm_fast.start import starting_models
from realm_fast.types import NO_BLOCK
from realm_fast.warmup import Warmup, warmup
from tests import qa_world

COUNT = 40
SETTINGS = (
    "masking.entity_tagger=rules",
    "reader.trunk=fresh:layers=1,hidden=64,heads=1,dropout=0",
    "warmup.steps=240",
    "warmup.batch_queries=16",
    "warmup.reader_lr=5e-3",
    "warmup.checkpoint_every_steps=120",
    "warmup.log_every_steps=40",
    "evaluate.held_out_queries=24",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_store(folder, texts):
    qa_world.write_vocabulary(folder / "vocabulary", COUNT)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"id": str(i), "title": "town", "text": text}) + "\n")
    return build_corpus(qa_world.settings(folder).corpus, folder / "store", progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Every capital is told of twice, in other words; every river once."""
    texts = []
    for country, capital, river in qa_world.countries(COUNT):
        texts.append(f"the capital of {country} is {capital.capitalize()} .")
        texts.append(f"many people live in {country} and {capital.capitalize()} .")
        texts.append(f"{country} has a river , {river.capitalize()} .")
    return make_store(tmp_path_factory.mktemp("world"), texts)


@pytest.fixture(scope="module")
def spans(store):
    return build_salient_spans(store, "rules", progress=False, num_workers=1)


@pytest.fixture(scope="module")
def evidence(store, spans):
    return build_evidence(store, spans, progress=False, num_workers=1)


def new_run(tmp_path, store, *overrides):
    config = qa_world.settings(store.path.parent, *SETTINGS, *overrides)
    return RunFolder.create(tmp_path / "run", config, store), config


# ---------------------------------------------------------------- evidence


def test_bm25_scores_are_the_formulas(store):
    bm25 = Bm25(store)
    bodies = [store.body_tokens(i).tolist() for i in range(len(store))]
    query = [bodies[0][1], bodies[0][3], bodies[0][3], bodies[7][2]]
    mean = np.mean([len(body) for body in bodies])
    expected = np.zeros(len(store))
    for token in set(query):
        n = sum(token in body for body in bodies)
        idf = np.log(1 + (len(store) - n + 0.5) / (n + 0.5))
        for i, body in enumerate(bodies):
            tf = body.count(token)
            expected[i] += idf * tf * 2.2 / (tf + 1.2 * (1 - 0.75 + 0.75 * len(body) / mean))
    np.testing.assert_allclose(bm25.scores(np.array(query)), expected, rtol=1e-5)
    assert bm25.blocks_with(bodies[3][0]).tolist() == [i for i, b in enumerate(bodies) if bodies[3][0] in b]


def test_evidence_is_the_other_block_with_the_span(store, spans, evidence):
    assert evidence.num_found == 2 * COUNT
    assert evidence.manifest["by_label"] == {"NAME": {"spans": 3 * COUNT, "with_evidence": 2 * COUNT}}
    for block in range(len(store)):
        (found,) = evidence.block_ids[spans.offsets[block] : spans.offsets[block + 1]].tolist()
        assert found == {0: block + 1, 1: block - 1, 2: NO_BLOCK}[block % 3]
    masker = Masker(
        store, qa_world.settings(store.path.parent, *SETTINGS).masking, 0, evidence.usable_spans()
    )
    for slot in range(50):
        query = masker.query(0, slot)
        assert query.origin_block_id % 3 != 2  # rivers have no evidence: never drawn
        assert query.labels.tolist() == [
            t for t in query.labels.tolist() if t in store.body_tokens(evidence.block_of(query))
        ]


def test_the_closest_block_wins_and_copies_are_no_evidence(tmp_path):
    store = make_store(
        tmp_path,
        [
            "the old town of nobu has a river , Xobu .",
            "the old town of nobu has a river , Xobu . many people live in it",  # holds the whole sentence
            "a country has many mountains and Xobu .",
            "many people live in the old town of nobu and Xobu .",
            "the old town of nobu has a river , Xobua .",  # another word, with the span's pieces at its start
            "the old town of nobu has a river , Xobu .",  # the same text
            "a town .",  # silent about it, and farther than the next
            "the old town has a river .",  # close, and silent about it
        ],
    )
    spans = build_salient_spans(store, "rules", progress=False, num_workers=1)
    evidence = build_evidence(store, spans, progress=False, num_workers=1)
    assert spans.labels(0) == ["NAME"]
    assert evidence.block_ids[spans.offsets[0]] == 3
    assert evidence.distractor_ids[spans.offsets[0]] == 7


def test_distractors_that_tie_go_by_the_lower_id(tmp_path):
    alike = [f"the river runs {'north ' * (i % 2)}here ." for i in range(200)]
    store = make_store(
        tmp_path, [*(text for text in alike), "the river runs by Xobu .", "many live in Xobu ."]
    )
    spans = build_salient_spans(store, "rules", progress=False, num_workers=1)
    evidence = build_evidence(store, spans, progress=False, num_workers=1)
    assert evidence.block_ids[spans.offsets[200]] == 201
    assert evidence.distractor_ids[spans.offsets[200]] == 0
    short = evidence.path / "distractors.bin"
    short.write_bytes(short.read_bytes()[:-4])
    with pytest.raises(CorruptArtifactError, match="distractors"):
        Evidence.open(evidence.path, spans)


def test_evidence_is_kept_and_checked(tmp_path, store, spans, evidence):
    assert build_evidence(store, spans, progress=False).path == evidence.path == evidence_path(spans)
    other = make_store(tmp_path, ["many people live in Xobu .", "the town Xobu is old ."])
    other_spans = build_salient_spans(other, "rules", progress=False, num_workers=1)
    with pytest.raises(ProvenanceError, match="evidence for other salient spans"):
        Evidence.open(evidence.path, other_spans)


def test_no_entities_or_no_evidence_is_named(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "once").mkdir()
    store = make_store(tmp_path / "none", ["many people live in it .", "the old town is a city ."])
    spans = build_salient_spans(store, "rules", progress=False, num_workers=1)
    with pytest.raises(DataError, match="rules-1 found no salient span in 2 blocks"):
        build_evidence(store, spans, progress=False, num_workers=1)
    run, config = new_run(tmp_path / "none", store)
    with pytest.raises(DataError, match="found no salient span"):
        warmup(run, config)
    store = make_store(tmp_path / "once", ["many people live in Xobu .", "the old town is Xeda ."])
    run, config = new_run(tmp_path / "once", store)
    with pytest.raises(DataError, match=r"none of 2 salient spans .* stands in another block"):
        warmup(run, config)


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    run, config = new_run(tmp_path_factory.mktemp("finished"), store)
    warmup(run, config)
    return run


def test_the_reader_learns_to_use_evidence(finished, store):
    before, after = read_jsonl(finished.path / "warmup" / "evaluations.jsonl", "the evaluations")
    assert (before["when"], before["step"], after["when"], after["step"]) == ("before", 0, "after", 240)
    assert (after["spans"], after["spans_with_evidence"]) == (3 * COUNT, 2 * COUNT)
    assert abs(before["nll_evidence"] - before["nll_null"]) < 0.1
    assert after["nll_evidence"] < after["nll_null"] - 1  # held-out capitals cannot be known without
    assert after["nll_evidence"] < after["nll_random"] - 1
    assert after["nll_evidence"] < after["nll_distractor"] - 1
    assert abs(after["nll_distractor"] - after["nll_null"]) < 0.5  # what misled it once is read with doubt
    assert after["accuracy_evidence"] >= after["accuracy_random"]
    lines = read_metrics(finished.path / "warmup" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [40, 80, 120, 160, 200, 240]
    assert 0.5 < np.mean([line["with_evidence"] for line in lines]) < 0.7
    start = starting_models(finished, finished.config(), store)
    assert start.reader_from == "warmup/checkpoints/step-00000240"
    saved = Reader.load(newest_checkpoint(finished.path / "warmup" / "checkpoints").path / "reader")
    assert torch.equal(start.reader.vocab_weight, saved.vocab_weight)


def test_a_resumed_run_takes_the_same_steps(tmp_path, store, finished):
    run, config = new_run(tmp_path, store)
    (run.path / "warmup" / "checkpoints").mkdir(parents=True)
    trainer = Warmup(run, config, None, False)
    stop = StopRequest()
    real = trainer.update

    def update(step):
        stop.signal_number = 2 if step == 17 else 0
        return real(step)

    trainer.update = update
    with pytest.raises(Interrupted, match="warmup stopped after step 17 of 240"):
        trainer.train(stop)
    with pytest.raises(UserError, match="already has a checkpoint of step 17"):
        warmup(run, config)
    warmup(run, config, resume=True)
    ours, theirs = (
        newest_checkpoint(of.path / "warmup" / "checkpoints").path / "reader" / "model.safetensors"
        for of in (run, finished)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_settings_that_do_not_fit_are_refused(tmp_path, store, finished):
    run, config = new_run(tmp_path, store, "masking.strategy=random_span")
    with pytest.raises(ConfigError, match="warm-up needs salient_span"):
        warmup(run, config)
    run, config = new_run(tmp_path / "sum", store, "warmup.distractor_probability=0.5")
    with pytest.raises(ConfigError, match=r"distractor_probability: expected at most .* = 0\.4, got 0\.5"):
        warmup(run, config)
    changed = apply_overrides(finished.config(), ["warmup.evidence_probability=0.5"])
    with pytest.raises(
        ConfigError, match=r"warmup\.evidence_probability: the checkpoint has 0\.6, now it is 0\.5"
    ):
        warmup(finished, changed, resume=True)
