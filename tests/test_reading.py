"""Questions in, spans out: batched results against plain loops over single questions, blocks and spans."""

import math

import numpy as np
import pytest
import qa_world
import torch
from qa_world import one_thread  # noqa: F401 (a fixture)

from realm_fast import reading
from realm_fast.embedder import Embedder
from realm_fast.index import MipsIndex
from realm_fast.packing import query_input
from realm_fast.questions import AnswerMatcher, Question
from realm_fast.reader import Reader, SpanReader
from realm_fast.types import NO_BLOCK

COUNT = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    store = qa_world.make_store(folder, COUNT)
    config = qa_world.settings(folder)
    torch.manual_seed(0)
    tokenizer = store.tokenizer()
    span_reader = SpanReader.from_reader(
        Reader.from_config(config.reader, tokenizer), span_hidden=8, max_span_tokens=3, max_reader_tokens=30
    ).eval()
    torch.nn.init.normal_(span_reader.score.weight)  # its small start would make all spans near alike
    return store, Embedder.from_config(config.embedder, tokenizer).eval(), span_reader


def test_questions_are_cut_and_counted(world):
    store, _, _ = world
    asked = [Question("a", "what is the capital of the city", []), Question("b", "a city", [])]
    tokens, cut = reading.question_tokens(store.tokenizer(), asked, 4)
    assert [len(t) for t in tokens] == [4, 2]
    assert cut == 1


def test_embed_questions_keeps_order_and_mode(world):
    store, embedder, _ = world
    asked = qa_world.questions(COUNT)[:7]
    tokens, _ = reading.question_tokens(store.tokenizer(), asked, 20)
    embedder.train()
    try:
        emb = reading.embed_questions(embedder, tokens, batch_rows=3)
        assert embedder.training
    finally:
        embedder.eval()
    assert not emb.requires_grad
    for row, t in zip(emb, tokens, strict=True):
        with torch.no_grad():
            one = embedder.query_emb(embedder.pad([query_input(t, embedder.special)]))[0]
        torch.testing.assert_close(row, one, rtol=1e-5, atol=1e-5)
    assert reading.embed_questions(embedder, []).shape == (0, embedder.dim)


def test_retrieve_scores_carry_the_gradient_to_the_query_alone(world):
    _, _, _ = world
    blocks = torch.randn(6, 4)
    query = torch.randn(2, 4, requires_grad=True)
    index = MipsIndex.from_embeddings(blocks)
    beam = reading.retrieve(index, query, 3, temperature=2.0)
    expected = (query.detach() @ blocks.T / 2.0).topk(3, dim=1)
    assert (beam.ids == expected.indices.numpy()).all()
    torch.testing.assert_close(beam.scores.detach(), expected.values)
    beam.scores.sum().backward()
    torch.testing.assert_close(query.grad, blocks[expected.indices].sum(1) / 2.0)
    plain = reading.retrieve(index, query.detach(), 3, temperature=2.0)
    torch.testing.assert_close(plain.scores, beam.scores.detach())


def test_retrieve_asks_for_no_more_than_there_is(world):
    index = MipsIndex.from_embeddings(torch.eye(3, 4))
    assert reading.retrieve(index, torch.randn(2, 4), 10).ids.shape == (2, 3)


def test_answer_table_agrees_with_the_matcher_and_remembers(world, monkeypatch):
    store, _, _ = world
    asked = qa_world.questions(COUNT)
    table = reading.AnswerTable(asked, store)
    ids = np.array([3, NO_BLOCK, 0, 5])
    for number in (0, 7):
        matcher = AnswerMatcher(asked[number], store.tokenizer())
        expected = [i != NO_BLOCK and matcher.in_text(store.text(int(i))) for i in ids]
        assert table.holds(number, ids).tolist() == expected
        assert table.first_rank(number, ids) == (expected.index(True) if any(expected) else -1)
    own = 3  # question 7 is about the river of country 3
    (span,) = table.spans(7, own)
    tokenizer = store.tokenizer()
    assert tokenizer.decode(store.body_tokens(own)[span[0] : span[1]]) == asked[7].answers[0]
    assert table.spans(7, NO_BLOCK) == []
    monkeypatch.setattr(AnswerMatcher, "in_blocks", lambda *_: pytest.fail("looked at a pair twice"))
    assert table.holds(7, ids).tolist() == expected
    monkeypatch.undo()
    monkeypatch.setattr(reading, "_MEMO_ENTRIES", 2)
    assert table.holds(7, ids).tolist() == expected  # also when the memo overflows


def naive_scores(span_reader, tokens, body, tokenizer):
    """{(start, stop): score} of every span of whole words of one block, span by span in float64."""
    row = span_reader.joint_row(tokens, body)
    batch = span_reader.pad([row])
    with torch.no_grad():
        states = span_reader.trunk(batch)[0].double()
    head = span_reader
    parameters = (
        head.start_projection.weight, head.start_projection.bias, head.end_projection.weight,
        head.norm.weight, head.norm.bias, head.score.weight[0], head.score.bias[0],
    )  # fmt: skip
    ws, bs, we, gain, shift, w, b = (p.detach().double() for p in parameters)
    first = len(tokens) + 2
    kept = len(row.ids) - first - 1
    begins = tokenizer.word_starts(body)
    scores = {}
    for start in range(kept):
        for stop in range(start + 1, min(start + span_reader.max_span_tokens, kept) + 1):
            if not begins[start] or (stop < len(body) and not begins[stop]):
                continue
            x = torch.relu(ws @ states[first + start] + bs + we @ states[first + stop - 1])
            x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + span_reader.norm.eps) * gain + shift
            scores[start, stop] = float(w @ x + b)
    return scores


def test_read_blocks_against_single_spans(world):
    store, _, span_reader = world
    asked = [
        Question("0", "what is the capital", ["x"]),
        Question("1", "which river runs through the country of many mountains in it", ["y"]),  # cuts the body
    ]
    tokens, _ = reading.question_tokens(store.tokenizer(), asked, 20)
    ids = np.array([[2, NO_BLOCK, 5], [4, 1, 2]])
    read = reading.read_blocks(span_reader, tokens, ids, store)
    assert read.scores.shape[:2] == (2, 3)
    assert torch.isneginf(read.scores[0, 1]).all()
    for b in range(2):
        for r in range(3):
            if ids[b, r] == NO_BLOCK:
                continue
            body = store.body_tokens(int(ids[b, r])).astype(np.int32)
            expected = naive_scores(span_reader, tokens[b], body, store.tokenizer())
            found = {}
            for t, w in torch.nonzero(torch.isfinite(read.scores[b, r])).tolist():
                start = t - read.body_start[b]
                found[start, start + w + 1] = float(read.scores[b, r, t, w].detach())
            assert found.keys() == expected.keys()
            for span, score in expected.items():
                assert found[span] == pytest.approx(score, abs=2e-4), (b, r, span)
    cut = store.body_tokens(4)
    assert max(stop for _, stop in found) < len(cut)  # the long question really cut the body


def test_no_span_begins_or_ends_inside_a_word(world):
    store, _, _ = world
    tokenizer = store.tokenizer()
    body = tokenizer.encode("Old zzqy town 1919.").ids  # unknown words fall apart into letters
    whole = reading._whole_words(body, 12, tokenizer)
    spans = {tokenizer.decode(body[i : i + w + 1]) for i, w in zip(*np.nonzero(whole), strict=True) if w < 12}
    assert "zzqy" in spans
    assert "old zzqy town" in spans
    assert not any(s in spans for s in ("zzq", "zqy", "old z"))
    assert reading._whole_words(np.zeros(0, np.int32), 3, tokenizer).shape == (0, 3)


def test_gold_spans_are_the_answers_that_can_be_predicted(world):
    store, _, span_reader = world
    asked = qa_world.questions(COUNT)
    tokens, _ = reading.question_tokens(store.tokenizer(), asked, 20)
    numbers = [0, 3]  # capital of country 0, river of country 1
    ids = np.array([[0, 2], [NO_BLOCK, 1]])
    table = reading.AnswerTable(asked, store)
    read = reading.read_blocks(span_reader, [tokens[i] for i in numbers], ids, store)
    gold = reading.gold_spans(read, numbers, table)
    assert gold.sum(dim=(2, 3)).tolist() == [[1, 0], [0, 1]]
    (t, w) = torch.nonzero(gold[0, 0])[0].tolist()
    start = t - read.body_start[0]
    text = store.tokenizer().decode(store.body_tokens(0)[start : start + w + 1])
    assert text == asked[0].answers[0]
    # with less room the river, which comes last, is cut off: it cannot be predicted, so it is not gold
    short = SpanReader(
        span_reader.trunk, span_hidden=8, max_span_tokens=3, max_reader_tokens=20,
        special=span_reader.special, tokenizer_hash=span_reader.tokenizer_hash,
    )  # fmt: skip
    assert not reading.gold_spans(reading.read_blocks(short, [tokens[3]], ids[1:], store), [3], table).any()


def test_best_answers_against_sorting_and_ties(world):
    generator = torch.Generator().manual_seed(0)
    spans = torch.randn(2, 3, 6, 2, generator=generator).masked_fill(
        torch.rand(2, 3, 6, 2, generator=generator) < 0.4, -math.inf
    )
    spans[0, 1, 2, 0] = spans[0, 0, 4, 1] = 9.0  # equal in total below: the better block comes first
    retrieval = torch.tensor([[1.0, 1.0, -math.inf], [0.5, 0.0, -3.0]])
    read = reading.Read(spans, [1, 2], np.array([[7, 8, NO_BLOCK], [4, 5, 6]]))
    found = reading.best_answers(read, retrieval, 4)
    for b in range(2):
        total = spans[b].double() + retrieval[b].double()[:, None, None]
        everything = sorted(
            ((-float(total[r, t, w]), r, t, w) for r in range(3) for t in range(6) for w in range(2)),
        )
        weight = sum(math.exp(-score) for score, *_ in everything if math.isfinite(score))
        for answer, (score, r, t, w) in zip(found[b], everything[:4], strict=True):
            assert (answer.rank, answer.block_id) == (r, read.ids[b, r])
            assert (answer.start, answer.stop) == (t - read.body_start[b], t - read.body_start[b] + w + 1)
            assert answer.score == pytest.approx(-score, rel=1e-6)
            assert answer.span_score + answer.retrieval_score == pytest.approx(answer.score, rel=1e-5)
            assert answer.probability == pytest.approx(math.exp(-score) / weight, rel=1e-4)
    assert [a.rank for a in found[0][:2]] == [0, 1]
    nothing = reading.Read(torch.full((1, 2, 3, 1), -math.inf), [0], np.full((1, 2), NO_BLOCK))
    assert reading.best_answers(nothing, torch.full((1, 2), -math.inf), 3) == [[]]


def test_span_text_is_cut_out_of_the_original(world):
    store, _, _ = world
    texts = reading.SpanText(store)
    (span,) = reading.AnswerTable(qa_world.questions(COUNT), store).spans(0, 0)
    assert texts.text(0, *span) == qa_world.countries(COUNT)[0][1].capitalize()
    first, last = texts.locate(0, *span)
    assert store.text(0)[first:last] == texts.text(0, *span)


def test_questions_hash_sees_everything_that_is_asked():
    base = [Question("1", "q", ["a", "b"])]
    hashes = {
        reading.questions_hash(qs)
        for qs in (
            base,
            [Question("2", "q", ["a", "b"])],
            [Question("1", "r", ["a", "b"])],
            [Question("1", "q", ["a"])],
            [Question("1", "q", ["a", "b"], "regex")],
            base + base,
        )
    }
    assert len(hashes) == 6
    assert reading.questions_hash([Question("1", "q", ["a", "b"], reachable=True)]) in hashes


def test_batches():
    assert [list(r) for r in reading.batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(reading.batches(0, 2)) == []
