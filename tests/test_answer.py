import dataclasses
import json

import pytest
import qa_world
import torch
from qa_world import one_thread  # noqa: F401 (a fixture)

from realm_fast.answer import Answer, answer_with, ask, format_answers, search_text
from realm_fast.corpus import build_corpus
from realm_fast.embedder import Embedder
from realm_fast.errors import DataError, ProvenanceError, UserError
from realm_fast.finetune import finetune
from realm_fast.qa_metrics import normalise_answer
from realm_fast.qa_model import load_qa_model
from realm_fast.snapshot_writer import write_snapshot

COUNT = 16
QUESTION = qa_world.questions(COUNT)[6].text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def store(folder):
    return qa_world.make_store(folder, COUNT)


@pytest.fixture(scope="module")
def tuned(folder, store):
    run, config = qa_world.make_run(folder, "tuned", store, "finetune.steps=80", "finetune.retriever_beam=16")
    finetune(run, config)
    return run


def test_answers_come_with_their_evidence(tuned, store):
    answers = ask(tuned, QUESTION, top=4)
    assert len(answers) == 4
    assert [a.probability for a in answers] == sorted((a.probability for a in answers), reverse=True)
    assert sum(a.probability for a in answers) <= 1 + 1e-5
    for answer in answers:
        first, last = answer.span
        assert answer.block_text == store.text(answer.block_id)
        assert answer.block_text[first:last] == answer.text
        assert answer.marked() == f"{answer.block_text[:first]}[[{answer.text}]]{answer.block_text[last:]}"
        assert answer.title == store.title(answer.block_id)
        assert answer.score == pytest.approx(answer.span_score + answer.retrieval_score, abs=1e-4)
    assert len({normalise_answer(a.text) for a in answers}) == 4  # the same words are one answer


def test_it_answers_what_it_was_trained_on(tuned):
    asked = qa_world.questions(COUNT)
    right = [ask(tuned, q.text, top=1)[0].text.lower() in q.answers for q in asked[:8]]
    assert sum(right) >= 4


def test_with_another_corpus_the_same_models_give_other_answers(folder, store, tuned, tmp_path):
    """Every capital has moved one country on: what is answered must come from the blocks, not from weights."""
    world = qa_world.countries(COUNT)
    moved = {country: world[(i + 1) % COUNT][1] for i, (country, _, _) in enumerate(world)}
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    for line, (country, capital, _) in zip(lines, world, strict=True):
        line["text"] = line["text"].replace(capital.capitalize(), moved[country].capitalize())
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    settings = dataclasses.replace(qa_world.settings(folder).corpus, source=str(tmp_path / "corpus.jsonl"))
    other = build_corpus(settings, tmp_path / "store", progress=False)
    weights = {p: p.read_bytes() for p in tuned.finetune_dir.rglob("*.safetensors")}
    followed = 0
    for question, (country, capital, _) in zip(qa_world.questions(COUNT)[::2], world, strict=True):
        before = ask(tuned, question.text, top=1)[0]
        after = ask(tuned, question.text, top=1, corpus=other)[0]
        assert after.block_text == other.text(after.block_id)
        if before.text.lower() == capital:
            followed += 1
            assert after.text.lower() == moved[country], question.text
    assert followed >= COUNT // 2
    assert {p: p.read_bytes() for p in weights} == weights
    kept = list((tuned.path / "corpora" / other.corpus_hash[:16]).iterdir())
    assert len(kept) == 1  # embedded once
    assert ask(tuned, QUESTION)[0].block_text == store.text(ask(tuned, QUESTION)[0].block_id)
    strange = qa_world.make_store(tmp_path / "strange", COUNT + 1)
    with pytest.raises(ProvenanceError, match="tokenizer"):
        ask(tuned, QUESTION, corpus=strange)


def test_probability_sums_over_the_same_words_in_all_blocks(tuned):
    model = load_qa_model(tuned, tuned.config())
    wide = answer_with(model, QUESTION, top=500, reader_beam=6)  # every span there is
    assert sum(a.probability for a in wide) == pytest.approx(1.0, abs=1e-4)
    the_city = [a for a in wide if normalise_answer(a.text) == "city"]
    assert len(the_city) == 1  # it stands in each of the six blocks
    (narrow,) = answer_with(model, QUESTION, top=1, reader_beam=1)
    assert narrow.rank == 0


def test_formatted_answers_show_scores_and_the_marked_text(tuned):
    answers = ask(tuned, QUESTION, top=2)
    text = format_answers(answers)
    assert text.startswith(f"1. {answers[0].text}\n   probability {answers[0].probability:.3f}; score ")
    assert f"[[{answers[0].text}]]" in text
    assert f"{answers[0].title} (block {answers[0].block_id}, rank {answers[0].rank + 1})" in text
    assert "\n\n2. " in text
    assert format_answers([]).startswith("No answer")


def test_long_blocks_are_cut_around_the_answer():
    words = " ".join(f"w{i}" for i in range(400))
    start = words.index("w250 ")
    answer = Answer("w250", 0.5, 1.0, 0.5, 0.5, 0, 3, "T", words, (start, start + 4))
    shown = format_answers([answer])
    assert "[[w250]]" in shown
    assert "… " in shown
    assert " …" in shown
    assert len(shown) < 900
    assert " w2\n" not in shown  # cut at spaces
    at_the_end = Answer("w399", 0.5, 1.0, 0.5, 0.5, 0, 3, "T", words, (len(words) - 4, len(words)))
    assert format_answers([at_the_end]).endswith("[[w399]]")


def test_without_fine_tuning_it_says_so_and_shows_blocks(folder, store):
    run, _ = qa_world.make_run(folder, "bare", store)
    answers = ask(run, QUESTION, top=3)
    assert [a.rank for a in answers] == [0, 1, 2]
    assert all(a.text is None and a.span is None and a.probability is None for a in answers)
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    text = format_answers(answers)
    assert text.startswith("This run is not fine-tuned")
    assert answers[0].title in text


def test_search_over_a_run_and_over_an_index_folder(folder, store, tuned, tmp_path):
    run, config = qa_world.make_run(folder, "searched", store)
    hits = search_text(run.path, "the river", top=3)
    torch.manual_seed(0)
    embedder = Embedder.from_config(config.embedder, store.tokenizer())
    path = write_snapshot(tmp_path, 0, embedder, store, config.index, token_budget=2048)
    index = path.rename(tmp_path / "index")
    embedder.save(index / "embedder")
    assert [h.rank for h in hits] == [0, 1, 2]
    assert all(h.text == store.text(h.block_id) and h.title == store.title(h.block_id) for h in hits)
    found = search_text(index, "the river", top=30, corpus=store.path)
    assert len(found) == COUNT
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    with pytest.raises(UserError, match="--corpus CORPUS must name the token store"):
        search_text(index, "the river")
    other = qa_world.make_store(tmp_path / "other", COUNT + 1)
    with pytest.raises(ProvenanceError):
        search_text(index, "the river", corpus=other.path)
    with pytest.raises(ProvenanceError, match="belongs to corpus"):
        search_text(run.path, "the river", corpus=other.path)


def test_bad_input_is_named(tuned, tmp_path):
    with pytest.raises(UserError, match="question: it has no words"):
        ask(tuned, "  ")
    with pytest.raises(UserError, match="top: expected at least 1, got 0"):
        ask(tuned, QUESTION, top=0)
    with pytest.raises(UserError, match="text: it has no words"):
        search_text(tuned.path, "")
    with pytest.raises(UserError, match="top: expected at least 1"):
        search_text(tuned.path, "x", top=0)
    with pytest.raises(DataError, match="no such folder"):
        search_text(tmp_path / "absent", "x")
    with pytest.raises(DataError, match="neither a run"):
        search_text(tmp_path, "x")
