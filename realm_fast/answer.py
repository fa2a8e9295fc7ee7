"""One question, answered from a run, with the evidence; and the plain search behind it.

for answer in ask(RunFolder("runs/demo/run"), "Who wrote Romeo and Juliet?"):
    print(answer.text, answer.probability, answer.title, answer.marked())

for hit in search_text("runs/demo/run", "a play by Shakespeare", top=5):
    print(hit.score, hit.title)
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from realm_fast.embedder import Embedder
from realm_fast.errors import DataError, ProvenanceError, UserError
from realm_fast.index import Index, Provenance
from realm_fast.qa_metrics import normalise_answer
from realm_fast.qa_model import QaModel, load_qa_model
from realm_fast.reading import SpanText, best_answers, embed_questions, read_blocks, retrieve
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import open_snapshot
from realm_fast.token_store import TokenStore
from realm_fast.types import NO_BLOCK

SPANS_PER_ANSWER = 20  # spans looked at for each answer wanted: many are the same words
WIDTH = 100


@dataclass(frozen=True)
class Hit:
    """A block found for a text."""

    rank: int  # from 0
    score: float  # inner product
    block_id: int
    title: str
    text: str


@dataclass(frozen=True)
class Answer:
    """An answer and where it stands. Before fine-tuning there is no `text`, only the block."""

    text: str | None
    probability: float | None  # of all spans read that say the same words, wherever they stand
    score: (
        float  # span score + retrieval score of the best of them; the retrieval score where there is no text
    )
    span_score: float | None
    retrieval_score: float
    rank: int  # of the block, from 0
    block_id: int
    title: str
    block_text: str
    span: tuple[int, int] | None  # characters of block_text

    def marked(self, left: str = "[[", right: str = "]]") -> str:
        """The block's text with the answer marked."""
        if self.span is None:
            return self.block_text
        start, stop = self.span
        return f"{self.block_text[:start]}{left}{self.block_text[start:stop]}{right}{self.block_text[stop:]}"


def ask(
    run: RunFolder,
    question: str,
    *,
    top: int = 5,
    reader_beam: int | None = None,
    checkpoint: str = "auto",
    corpus: TokenStore | None = None,
) -> list[Answer]:
    """The best answers to `question`, best first, fewer than `top` if no more spans were read.

    Spans that say the same words (after normalisation) are one answer: its evidence is the best of them, its
    probability that of all. A run that is not fine-tuned gives its best blocks instead, with text=None.

    Args:
        reader_beam: blocks that are read (default: evaluate.reader_beam of the run).
        checkpoint: as for `evaluate`.
        corpus: answer from this one instead of the run's; nothing is trained again.

    Raises:
        UserError: the question is empty, or the run holds nothing to answer from.
        ProvenanceError: another tokenizer made `corpus`.
    """
    if top < 1:
        raise UserError(f"top: expected at least 1, got {top}")
    config = run.config()
    model = load_qa_model(run, config, checkpoint, corpus=corpus, progress=True)
    return answer_with(model, question, top=top, reader_beam=reader_beam or config.evaluate.reader_beam)


def answer_with(model: QaModel, question: str, *, top: int, reader_beam: int) -> list[Answer]:
    """`ask` over a model that is loaded already."""
    store = model.store
    tokens = store.tokenizer().encode(question).ids[: model.settings.max_question_tokens]
    if not len(tokens):
        raise UserError("question: it has no words")
    emb = embed_questions(model.embedder, [tokens])  # [1, D]
    beam = model.beam([question], emb, max(top, reader_beam))
    if model.span_reader is None:
        return [
            Answer(
                None,
                None,
                score,
                None,
                score,
                rank,
                block_id,
                store.title(block_id),
                store.text(block_id),
                None,
            )
            for rank, (score, block_id) in enumerate(zip(beam.scores[0].tolist(), beam.ids[0].tolist()))
            if block_id != NO_BLOCK
        ][:top]
    scores = beam.scores[:, :reader_beam]
    with torch.inference_mode():
        read = read_blocks(model.span_reader, [tokens], beam.ids[:, :reader_beam], store)
        (spans,) = best_answers(read, scores, top * SPANS_PER_ANSWER)
    texts = SpanText(store)
    answers: dict[str, Answer] = {}
    for span in spans:
        where = texts.locate(span.block_id, span.start, span.stop)
        block_text = store.text(span.block_id)
        text = block_text[where[0] : where[1]]
        key = normalise_answer(text)
        if key in answers:
            known = answers[key]
            answers[key] = replace(known, probability=(known.probability or 0.0) + span.probability)
        else:
            answers[key] = Answer(
                text, span.probability, span.score, span.span_score, span.retrieval_score, span.rank,
                span.block_id, store.title(span.block_id), block_text, where,
            )  # fmt: skip
    return sorted(answers.values(), key=lambda a: -(a.probability or 0.0))[:top]


def format_answers(answers: Sequence[Answer]) -> str:
    """For the terminal: each answer, its scores, and the block with the answer in [[ ]]."""
    if not answers:
        return "No answer: no block with a whole word in it was found."
    lines: list[str] = []
    if answers[0].text is None:
        lines += ["This run is not fine-tuned, so it finds blocks but reads no answers out of them.", ""]
    for place, answer in enumerate(answers, start=1):
        if answer.text is None:
            lines.append(f"{place}. {answer.title} (block {answer.block_id}), score {answer.score:.3f}")
        else:
            lines.append(f"{place}. {answer.text}")
            lines.append(
                f"   probability {answer.probability:.3f}; score {answer.score:.3f} = "
                f"span {answer.span_score:.3f} + retrieval {answer.retrieval_score:.3f}"
            )
            lines.append(f"   {answer.title} (block {answer.block_id}, rank {answer.rank + 1})")
        lines += textwrap.wrap(
            _around(answer), WIDTH, initial_indent="   | ", subsequent_indent="   | ", break_long_words=False
        )
        lines.append("")
    return "\n".join(lines).rstrip()


def search_text(where: str | Path, text: str, *, top: int = 5, corpus: str | Path | None = None) -> list[Hit]:
    """The best blocks for `text`.

    Args:
        where: a run folder, or a folder that `realm-fast index build` wrote.
        corpus: the token store; needed for an index folder, and must be the run's own otherwise.

    Raises:
        UserError: nothing searchable is there, the text is empty, or index, embedder and corpus do not belong
            together.
    """
    path = Path(where)
    if top < 1:
        raise UserError(f"top: expected at least 1, got {top}")
    if (path / "run.json").is_file():
        run = RunFolder(path)
        if corpus is not None:
            run.check_store(TokenStore.open(corpus))
        model = load_qa_model(run, run.config(), progress=True)
        embedder, index, store = model.embedder, model.index, model.store
    else:
        embedder, index, store = _open_index_folder(path, corpus)
    tokens = store.tokenizer().encode(text).ids[: embedder.max_tokens - 2]
    if not len(tokens):
        raise UserError("text: it has no words")
    beam = retrieve(index, embed_questions(embedder, [tokens]), top)
    return [
        Hit(rank, score, block_id, store.title(block_id), store.text(block_id))
        for rank, (score, block_id) in enumerate(zip(beam.scores[0].tolist(), beam.ids[0].tolist()))
        if block_id != NO_BLOCK
    ]


def _open_index_folder(path: Path, corpus: str | Path | None) -> tuple[Embedder, Index, TokenStore]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a run, or what `realm-fast index build` wrote.")
    if not (path / "embedder").is_dir():
        raise DataError(f"{path}: neither a run (run.json) nor an index with its embedder (embedder/).")
    if corpus is None:
        raise UserError(f"{path}: is an index; --corpus CORPUS must name the token store it was built from.")
    store = TokenStore.open(corpus)
    embedder = Embedder.load(path / "embedder").eval()
    if embedder.tokenizer_hash != store.tokenizer_hash:
        raise ProvenanceError(
            f"{path / 'embedder'}: its tokenizer is {embedder.tokenizer_hash[:16]}, "
            f"that of {store.path} is {store.tokenizer_hash[:16]}."
        )
    expect = Provenance(embedder.hash(), store.corpus_hash, step=0)
    return embedder, open_snapshot(path, expect=expect).index, store


def _around(answer: Answer, characters: int = 400) -> str:
    """The marked text, cut to about `characters` around the answer."""
    text = answer.marked()
    if len(text) <= characters:
        return text
    middle = sum(answer.span) // 2 if answer.span else 0
    start = max(0, min(middle - characters // 2, len(text) - characters))
    start = 0 if start == 0 else text.find(" ", start) + 1
    stop = text.rfind(" ", 0, start + characters)
    stop = len(text) if start + characters >= len(text) or stop <= start else stop
    return ("… " if start else "") + text[start:stop] + (" …" if stop < len(text) else "")
