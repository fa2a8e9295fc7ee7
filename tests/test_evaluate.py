import dataclasses
import json
import math

import numpy as np
import pytest
import qa_world
import torch
from qa_world import one_thread  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file

from realm_fast import evaluate as ev
from realm_fast import reading
from realm_fast.checkpoint import newest_checkpoint, save_checkpoint
from realm_fast.embedder import Embedder
from realm_fast.encoder import load_trunk
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, ProvenanceError
from realm_fast.finetune import finetune
from realm_fast.qa_metrics import score_answer
from realm_fast.qa_model import load_qa_model
from realm_fast.questions import Question
from realm_fast.reader import Reader
from realm_fast.reading import embed_questions, question_tokens
from realm_fast.snapshot import open_snapshot
from realm_fast.snapshot_writer import write_snapshot

COUNT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def store(folder):
    return qa_world.make_store(folder, COUNT)


@pytest.fixture(scope="module")
def tuned(folder, store):
    run, config = qa_world.make_run(
        folder, "tuned", store, "finetune.steps=60", "finetune.retriever_beam=16", "evaluate.recall_at=1,3,5"
    )
    finetune(run, config)
    return run, config


# ---------------------------------------------------------------- pure parts, by hand


def test_cutoffs():
    assert ev.parse_cutoffs("20, 1,5,5,") == [1, 5, 20]
    for bad in ("", "0,5", "one", "-1"):
        with pytest.raises(ConfigError, match=r"evaluate\.recall_at: expected whole numbers"):
            ev.parse_cutoffs(bad)


def test_recall_by_hand():
    ranks = np.array([0, 4, -1, 5, 19])
    assert ev.recall_percent(ranks, [1, 5, 20]) == {"1": 20.0, "5": 40.0, "20": 80.0}
    assert ev.recall_percent(np.zeros(0, np.int64), [1]) == {"1": None}


def test_read_utility_by_hand():
    """Two blocks, one span each: with equal span scores the gain is that of the right block's probability."""
    spans = torch.zeros(3, 2, 1, 1)
    retrieval = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)], [1.0, 2.0]])
    gold = torch.zeros(3, 2, 1, 1, dtype=torch.bool)
    gold[0, 0] = gold[1, 0] = True
    helped, harmed, nothing = ev.read_utility(spans, retrieval, gold)
    assert helped == pytest.approx(math.log(0.75 / 0.5))
    assert harmed == pytest.approx(math.log(0.25 / 0.5))
    assert nothing is None


def prediction(exact, f1, rank, reachable, utility):
    question = Question("q", "q", ["a"], reachable=reachable)
    return ev.Prediction(question, "x", exact, f1, 0, "t", 0.0, 0.5, (0, 1), rank, utility)


def test_summary_by_hand():
    found = [
        prediction(1.0, 1.0, 0, True, 0.5),
        prediction(0.0, 0.5, 3, True, None),
        prediction(0.0, 0.0, -1, False, -0.1),
        prediction(0.0, 0.5, 1, False, None),
    ]
    everything, reachable = ev.summarise("nq.test", found, [1, 5])
    assert everything == {
        "name": "nq.test", "subset": "all", "questions": 4, "exact_match": 25.0, "f1": 50.0,
        "recall": {"1": 25.0, "5": 75.0}, "retrieval_utility": pytest.approx(0.2), "with_answer_read": 2,
    }  # fmt: skip
    assert (reachable["subset"], reachable["questions"], reachable["exact_match"]) == ("reachable", 2, 50.0)
    assert reachable["recall"] == {"1": 50.0, "5": 100.0}
    (_, empty) = ev.summarise("x", found[2:], [1, 5])
    assert (empty["questions"], empty["exact_match"], empty["recall"]) == (0, None, {"1": None, "5": None})
    table = ev.format_table({"checkpoint": "c", "sets": [everything, reachable, empty], "notes": ["n"]})
    first, header, _, row, *_ = table.splitlines()
    assert first == "checkpoint: c"
    assert header.split() == ["set", "subset", "questions", "EM", "F1", "R@1", "R@5", "utility"]
    assert row.split() == ["nq.test", "all", "4", "25.0", "50.0", "25.0", "75.0", "+0.200"]
    assert table.splitlines()[5].split() == ["x", "reachable", "0", "-", "-", "-", "-", "-"]
    assert table.endswith("* n")


# ---------------------------------------------------------------- over a run


def test_results_and_predictions_agree(tuned, store):
    run, config = tuned
    results = ev.evaluate(run, config)
    assert json.loads((run.evaluate_dir / "results.json").read_text()) == results
    assert results["checkpoint"] == "finetune/checkpoints/step-00000060"
    assert results["stage"] == "finetune"
    assert any("spurious" in note for note in results["notes"])
    records = [json.loads(x) for x in (run.evaluate_dir / "predictions.jsonl").read_text().splitlines()]
    asked = qa_world.questions(COUNT)[::3]
    assert [r["id"] for r in records] == [q.id for q in asked]
    assert set(records[0]) == {
        "id", "question", "answers", "prediction", "exact_match", "f1", "block_id", "title", "score",
        "probability", "span", "answer_rank", "reachable",
    }  # fmt: skip
    for record in records:
        first, last = record["span"]
        assert store.text(record["block_id"])[first:last] == record["prediction"]  # the evidence says it
        assert store.title(record["block_id"]) == record["title"]
        again = score_answer(record["prediction"], record["answers"], "string")
        assert (record["exact_match"], record["f1"]) == again
        assert 0 < record["probability"] <= 1
    row = results["sets"][0]
    assert row["name"] == "test"
    assert row["questions"] == len(asked)
    assert row["exact_match"] == pytest.approx(100 * np.mean([r["exact_match"] for r in records]))
    assert row["recall"]["3"] == pytest.approx(100 * np.mean([0 <= r["answer_rank"] < 3 for r in records]))
    assert row["exact_match"] > 0
    stage = json.loads(run.stages_path.read_text().splitlines()[-1])
    assert (stage["stage"], stage["details"]["questions"]) == ("evaluate", len(asked))


def test_predictions_do_not_depend_on_the_batch(tuned, monkeypatch):
    run, config = tuned
    model = load_qa_model(run, config)
    asked = qa_world.questions(COUNT)[:9]
    whole = ev.predict(model, asked, reader_beam=3, depth=5)
    monkeypatch.setattr(ev, "BATCH_BLOCKS", 6)  # two questions
    monkeypatch.setattr(reading, "_READ_TOKENS", 60)  # two blocks
    for a, b in zip(whole, ev.predict(model, asked, reader_beam=3, depth=5), strict=True):
        assert (a.text, a.block_id, a.span, a.answer_rank) == (b.text, b.block_id, b.span, b.answer_rank)
        assert a.score == pytest.approx(b.score, abs=1e-4)


def test_retrieval_recall_against_plain_search(tuned, store):
    run, config = tuned
    model = load_qa_model(run, config)
    asked = [*qa_world.questions(COUNT), Question("none", "what is it", [])]
    tokens, _ = question_tokens(store.tokenizer(), asked, 20)
    blocks = model.index.reconstruct(torch.arange(len(store)))
    scores = embed_questions(model.embedder, tokens) @ blocks.T
    expected = {}
    for k in (1, 3, 20):
        best = scores.topk(min(k, len(store)), dim=1).indices.tolist()
        hit = [
            any(a in store.text(i).lower().replace(".", "").split() for i in ids for a in q.answers)
            for q, ids in zip(asked, best, strict=True)
        ]
        expected[str(k)] = pytest.approx(100 * sum(hit) / len(asked))
    assert ev.retrieval_recall(model.embedder, model.index, store, asked, [1, 3, 20]) == expected


def test_the_reachable_subset_is_found_once_and_kept(folder, store, monkeypatch):
    run, config = qa_world.make_run(folder, "reachable", store, "evaluate.reachable_top_k=1")
    (first,) = ev.question_sets(run, config, store)
    kept = [q.reachable for q in first.questions]
    assert any(kept)
    record = json.loads((run.evaluate_dir / "reachable" / "test.json").read_text())
    assert record["reachable"] == [q.id for q in first.questions if q.reachable]
    calls = []
    mark = ev.mark_reachable
    monkeypatch.setattr(ev, "mark_reachable", lambda *a, **k: calls.append(1) or mark(*a, **k))
    (again,) = ev.question_sets(run, config, store)
    assert [q.reachable for q in again.questions] == kept
    assert not calls
    other = qa_world.settings(folder, "evaluate.reachable_top_k=16")
    (wider,) = ev.question_sets(run, other, store)
    assert calls == [1]
    assert all(q.reachable for q in wider.questions)
    limited = dataclasses.replace(other, evaluate=dataclasses.replace(other.evaluate, limit_questions=2))
    assert [len(s.questions) for s in ev.question_sets(run, limited, store)] == [2]


def test_the_untrained_embedder_counts_where_it_is_not_random(folder, store, monkeypatch):
    """A trunk with weights of its own finds blocks too; it is made before any training of this run."""
    run, config = qa_world.make_run(folder, "dense", store, "evaluate.reachable_top_k=2")
    fresh = config.embedder.trunk
    monkeypatch.setattr(
        "realm_fast.embedder.load_trunk", lambda spec, **k: load_trunk(fresh if spec == "warm" else spec, **k)
    )
    warm = dataclasses.replace(config, embedder=dataclasses.replace(config.embedder, trunk="warm"))
    seen = []
    mark = ev.mark_reachable
    monkeypatch.setattr(
        ev, "mark_reachable", lambda *a, dense, **k: seen.append(dense) or mark(*a, dense=dense, **k)
    )
    (with_dense,) = ev.question_sets(run, warm, store)
    (without,) = ev.question_sets(run, config, store)
    assert seen[1] is None
    emb, index = seen[0]
    assert emb.shape == (len(with_dense.questions), 32)
    assert len(index) == len(store)
    found = {q.id for q in without.questions if q.reachable}
    assert found <= {q.id for q in with_dense.questions if q.reachable}


def test_several_sets_and_regex_answers(folder, store):
    run, config = qa_world.make_run(folder, "sets", store, "finetune.steps=40", "finetune.retriever_beam=16")
    finetune(run, config)
    asked = qa_world.questions(COUNT)
    country, capital, _ = qa_world.countries(COUNT)[1]
    patterns = [
        {
            "question": f"What is the capital of {country}?",
            "answer": [f"{capital[:3]}[a-z]+|other"],
            "answer_kind": "regex",
        }
    ]
    (folder / "patterns.jsonl").write_text("\n".join(json.dumps(p) for p in patterns) + "\n")
    qa_world.write_questions(folder / "more.jsonl", asked[:4])
    config = dataclasses.replace(
        config,
        evaluate=dataclasses.replace(
            config.evaluate, questions=f"{folder / 'more.jsonl'}, {folder / 'patterns.jsonl'}"
        ),
    )
    results = ev.evaluate(run, config)
    assert [(r["name"], r["subset"], r["questions"]) for r in results["sets"]] == [
        ("more", "all", 4), ("more", "reachable", 4), ("patterns", "all", 1), ("patterns", "reachable", 1),
    ]  # fmt: skip
    last = json.loads((run.evaluate_dir / "predictions.jsonl").read_text().splitlines()[-1])
    expected = float(last["prediction"].lower() == capital)
    assert (last["exact_match"], last["f1"]) == (expected, expected)
    assert last["answer_rank"] >= 0


def test_before_fine_tuning_only_retrieval_is_measured(folder, store):
    run, config = qa_world.make_run(folder, "bare", store)
    results = ev.evaluate(run, config)
    assert (results["checkpoint"], results["stage"]) == ("warm start", "start")
    assert "reads no answers" in results["notes"][0]
    row = results["sets"][0]
    assert (row["exact_match"], row["f1"], row["retrieval_utility"]) == (None, None, None)
    assert row["recall"]["20"] == 100.0  # 16 blocks
    record = json.loads((run.evaluate_dir / "predictions.jsonl").read_text().splitlines()[0])
    assert record["prediction"] is None
    assert record["title"]
    assert " - " in ev.format_table(results)
    for stage in ("finetune", "pretrain"):
        with pytest.raises(DataError, match=f"holds no {stage} checkpoint"):
            ev.evaluate(run, config, checkpoint=stage)
    with pytest.raises(DataError, match="no such checkpoint"):
        ev.evaluate(run, config, checkpoint=str(folder / "absent"))


def test_recall_before_fine_tuning_beside_that_after(folder, store):
    run, config = qa_world.make_run(
        folder, "after", store, "finetune.steps=40", "finetune.retriever_beam=16", "evaluate.recall_at=1,3"
    )
    torch.manual_seed(3)
    embedder = Embedder.from_config(config.embedder, store.tokenizer())
    reader = Reader.from_config(config.reader, store.tokenizer())
    save_checkpoint(
        run.pretrain_dir / "checkpoints", 7, modules={"embedder": embedder, "reader": reader},
        optimizer=None, state={}, identity={}, keep=2,
    )  # fmt: skip
    write_snapshot(run.pretrain_dir / "snapshots", 7, embedder, store, config.index, token_budget=2048)
    before = ev.evaluate(run, config)
    assert before["checkpoint"] == "pretrain/checkpoints/step-00000007"
    finetune(run, config)
    after = ev.evaluate(run, config, before=True)
    for row, earlier in zip(after["sets"], before["sets"], strict=True):
        assert row["recall_before"] == earlier["recall"]
    assert after["sets"][0]["recall"] != after["sets"][0]["recall_before"]
    by_folder = ev.evaluate(run, config, checkpoint=str(run.pretrain_dir / "checkpoints" / "step-00000007"))
    assert by_folder["sets"] == before["sets"]


# ---------------------------------------------------------------- what does not belong together


def test_an_index_of_other_weights_is_refused(folder, store):
    run, config = qa_world.make_run(folder, "swapped", store, "finetune.steps=1")
    finetune(run, config)
    snapshot = run.finetune_dir / "snapshots" / "step-00000000"
    torch.manual_seed(99)
    other = Embedder.from_config(config.embedder, store.tokenizer())
    write_snapshot(run.finetune_dir / "snapshots", 0, other, store, config.index, token_budget=2048)
    assert open_snapshot(snapshot).index.provenance.encoder_hash == other.hash()
    with pytest.raises(ProvenanceError, match=other.hash()[:8]):
        ev.evaluate(run, config)


def test_changed_weights_are_refused(folder, store):
    run, config = qa_world.make_run(folder, "changed", store, "finetune.steps=1")
    finetune(run, config)
    checkpoint = newest_checkpoint(run.finetune_dir / "checkpoints")
    file = checkpoint.path / "embedder" / "model.safetensors"
    state = load_file(file)
    save_file({name: value + 1e-3 for name, value in state.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CorruptArtifactError, match="not as it was written"):
        ev.evaluate(run, config)


def test_missing_question_sets_and_patterns_are_named(folder, store):
    run, config = qa_world.make_run(folder, "missing", store, "evaluate.questions=nowhere.jsonl")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        ev.evaluate(run, config)
    run, config = qa_world.make_run(folder, "empty", store, "evaluate.questions= ,")
    with pytest.raises(ConfigError, match="names no question set"):
        ev.evaluate(run, config)
    with pytest.raises(DataError, match=r"question x/1: answer pattern '\('"):
        ev._check_patterns([Question("x/1", "q", ["("], "regex")])
    assert not (run.evaluate_dir / "results.json").exists()
