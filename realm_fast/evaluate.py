"""Question answering, measured: exact match, F1, recall, and what the retriever adds to the reader.

    results = evaluate(run, config)      # also writes RUN/evaluate/results.json and predictions.jsonl
    recall = retrieval_recall(embedder, index, store, questions, [1, 5, 20])    # {"1": 12.5, "5": ...}

Every figure is a percentage, but for the retrieval utility: nats. Each is given over all questions and over
the reachable ones: those with an answer string in the BM25 top blocks, or in the top blocks of the embedder
as it was before any training. Which these are depends on corpus and questions, not on what is measured; it
is found once and kept in RUN/evaluate/reachable.

Retrieval utility of question answering, over the questions whose answer stands in a block read:

    mean of  log p(answer | scores of spans and blocks)  -  log p(answer | scores of spans alone)

the gain in answer log-probability from the retriever's scores over a reader that trusts all blocks alike.
(The gain over the null block, which pre-training reports, has no counterpart: an empty block has no spans.)
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realm_fast.config import Config
from realm_fast.device import resolve_device
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError, DataError
from realm_fast.files import atomic_file, read_json, write_json
from realm_fast.index import Index, Provenance
from realm_fast.progress import bar
from realm_fast.qa_metrics import compile_answer, score_answer
from realm_fast.qa_model import QaModel, index_of, load_qa_model, untrained_embedder
from realm_fast.questions import Bm25Index, Question, load_questions, mark_reachable
from realm_fast.reading import (
    AnswerTable,
    SpanText,
    batches,
    best_answers,
    embed_questions,
    gold_spans,
    question_tokens,
    questions_hash,
    read_blocks,
    retrieve,
)
from realm_fast.residence import Residence
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import open_snapshot
from realm_fast.token_store import TokenStore
from realm_fast.types import NO_BLOCK

BATCH_BLOCKS = 160  # read at once
REACHABLE_VERSION = 1  # of the rule; a change of it makes every kept subset due again
NOTES = [
    "An answer counts as retrieved or reachable if its string stands in a block at word boundaries; "
    "such matches can be spurious (a year, a common name).",
    "A regular-expression answer must match the whole prediction; its F1 is its exact match.",
    "The packaged warm starts were trained on retrieval data (MS MARCO; NQ and TriviaQA for MiniLM): "
    "recall before any training in this run is no evidence for REALM pre-training.",
]


@dataclass(frozen=True)
class QuestionSet:
    """A named set of questions, each marked reachable or not."""

    name: str
    questions: list[Question]


@dataclass(frozen=True)
class Prediction:
    """What was answered to one question, from where, and how right it is."""

    question: Question
    text: str | None  # None: only retrieved, nothing was read
    exact_match: float | None  # 0..1
    f1: float | None  # 0..1
    block_id: int  # where the answer stands; the best block where nothing was read
    title: str
    score: float | None
    probability: float | None
    span: tuple[int, int] | None  # characters of the block's text
    answer_rank: int  # of the first block retrieved that holds an answer, from 0; -1: none
    utility: float | None  # see the module's docstring; None where no block read holds an answer

    def record(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        return {
            "id": self.question.id,
            "question": self.question.text,
            "answers": self.question.answers,
            "prediction": self.text,
            "exact_match": self.exact_match,
            "f1": self.f1,
            "block_id": self.block_id,
            "title": self.title,
            "score": self.score,
            "probability": self.probability,
            "span": list(self.span) if self.span else None,
            "answer_rank": self.answer_rank,
            "reachable": self.question.reachable,
        }


def evaluate(
    run: RunFolder,
    config: Config,
    *,
    checkpoint: str = "auto",
    before: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Answers the questions that `config.evaluate` names and writes results.json and predictions.jsonl.

    Args:
        checkpoint: "finetune", "pretrain", "ict", "start", "auto" (the first of these there is), or a
            folder of a checkpoint. Without fine-tuning there is recall but no exact match.
        before: also measure the recall of the retriever that fine-tuning started from.
        progress: show bars, and print the table to stdout.

    Returns:
        What results.json holds.

    Raises:
        UserError: there is no such checkpoint, a question set is missing, or artifacts do not belong
            together.
    """
    cutoffs = parse_cutoffs(config.evaluate.recall_at)
    with run.lock("evaluation"), run.stage("evaluate") as details:
        model = load_qa_model(run, config, checkpoint, progress=progress)
        device = resolve_device(config.device)
        beam = max(*cutoffs, config.evaluate.reader_beam)
        residence = Residence(config.index.residence, device, copies=1, most_blocks=beam)
        model = dataclasses.replace(model, index=residence.place(model.index))
        model.embedder.to(device)
        if model.span_reader is not None:
            model.span_reader.to(device)
        sets = question_sets(run, config, model.store, progress=progress)
        earlier = None
        if before and model.stage == "finetune":
            stage, slash, _ = str(model.started_from).partition("/")  # "pretrain/checkpoints/…", "warm start"
            earlier = load_qa_model(run, config, stage if slash else "start", progress=progress)
        results: dict[str, Any] = {"checkpoint": model.name, "stage": model.stage, "sets": []}
        predictions: list[Prediction] = []
        for chosen in sets:
            found = predict(
                model,
                chosen.questions,
                reader_beam=config.evaluate.reader_beam,
                depth=max(cutoffs),
                progress=progress,
                what=chosen.name,
            )
            rows = summarise(chosen.name, found, cutoffs)
            if earlier is not None:
                ranks = answer_ranks(
                    earlier.embedder, earlier.index, earlier.store, chosen.questions, max(cutoffs),
                    max_question_tokens=earlier.settings.max_question_tokens, progress=progress,
                )  # fmt: skip
                for row in rows:
                    kept = [row["subset"] == "all" or bool(q.reachable) for q in chosen.questions]
                    row["recall_before"] = recall_percent(ranks[np.array(kept, dtype=bool)], cutoffs)
            results["sets"] += rows
            predictions += found
        results["notes"] = [*model.notes, *NOTES]
        write_predictions(run.evaluate_dir / "predictions.jsonl", predictions)
        write_json(run.evaluate_dir / "results.json", results)
        details |= {"questions": len(predictions), "checkpoint": model.name}
    if progress:
        print(format_table(results), flush=True)
    return results


def parse_cutoffs(text: str) -> list[int]:
    """`evaluate.recall_at` as ascending numbers. Raises ConfigError."""
    try:
        cutoffs = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        cutoffs = []
    if not cutoffs or cutoffs[0] < 1:
        raise ConfigError(f"evaluate.recall_at: expected whole numbers from 1 on, like 1,5,20; got {text!r}")
    return cutoffs


def question_sets(
    run: RunFolder, config: Config, store: TokenStore, *, progress: bool = False
) -> list[QuestionSet]:
    """The evaluation's question sets, the reachable questions marked.

    The subset is found at the first call and kept in RUN/evaluate/reachable with what it was found with; it
    is found again only if the corpus, the questions or the rule change. A file in which every question is
    marked is taken at its word: runs that share it share the subset.
    """
    specs = [spec.strip() for spec in config.evaluate.questions.split(",") if spec.strip()]
    if not specs:
        raise ConfigError("evaluate.questions: names no question set")
    sets = []
    dense: tuple[Embedder, Index] | None = None
    bm25: Bm25Index | None = None
    for name, spec in zip(_set_names(specs), specs, strict=True):
        questions = load_questions(spec, limit=config.evaluate.limit_questions)
        if not questions:
            raise DataError(f"{spec}: holds no question.")
        _check_patterns(questions)
        if all(q.reachable is not None for q in questions):
            sets.append(QuestionSet(name, questions))
            continue
        made_with = {
            "version": REACHABLE_VERSION,
            "corpus_hash": store.corpus_hash,
            "questions_hash": questions_hash(questions),
            "top_k": config.evaluate.reachable_top_k,
            "dense": _dense_description(config),
        }
        file = run.evaluate_dir / "reachable" / f"{name}.json"
        record = read_json(file, "the reachable subset") if file.exists() else {}
        if record.get("made_with") != made_with:
            if made_with["dense"] is not None and dense is None:
                dense = _untrained_retriever(run, config, store, progress=progress)
            bm25 = bm25 or Bm25Index(store, progress=progress)
            marked = _mark(questions, store, config.evaluate.reachable_top_k, dense, bm25, progress=progress)
            record = {"made_with": made_with, "reachable": [q.id for q in marked if q.reachable]}
            write_json(file, record)
        reachable = set(record["reachable"])
        sets.append(
            QuestionSet(name, [dataclasses.replace(q, reachable=q.id in reachable) for q in questions])
        )
    return sets


def answer_ranks(
    embedder: Embedder,
    index: Index,
    store: TokenStore,
    questions: Sequence[Question],
    depth: int,
    *,
    max_question_tokens: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """[n] rank (from 0) of the first of the best `depth` blocks that holds an answer; -1: none does."""
    limit = embedder.max_tokens - 2 if max_question_tokens is None else max_question_tokens
    tokens, _ = question_tokens(store.tokenizer(), questions, limit)
    emb = embed_questions(embedder, tokens, progress=progress)  # [n, D]
    answers = AnswerTable(questions, store)
    ranks = np.full(len(questions), -1, dtype=np.int64)
    for rows in batches(len(questions), 256):
        ids = retrieve(index, emb[rows.start : rows.stop], depth).ids
        for row, block_ids in zip(rows, ids, strict=True):
            ranks[row] = answers.first_rank(row, block_ids)
    return ranks


def recall_percent(ranks: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float | None]:
    """{"5": share of questions with a rank below 5, in percent, ...}; None where there are no questions."""
    return {str(k): float(100 * np.mean((ranks >= 0) & (ranks < k))) if len(ranks) else None for k in cutoffs}


def retrieval_recall(
    embedder: Embedder,
    index: Index,
    store: TokenStore,
    questions: Sequence[Question],
    ks: Sequence[int],
    *,
    max_question_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, float | None]:
    """Recall of the retriever alone: percent of questions with an answer in the best k blocks, for each k.

    Questions without an answer count as missed.
    """
    ranks = answer_ranks(
        embedder,
        index,
        store,
        questions,
        max(ks),
        max_question_tokens=max_question_tokens,
        progress=progress,
    )
    return recall_percent(ranks, ks)


def predict(
    model: QaModel,
    questions: Sequence[Question],
    *,
    reader_beam: int,
    depth: int,
    progress: bool = False,
    what: str = "questions",
) -> list[Prediction]:
    """Answers `questions` in order.

    Args:
        reader_beam: blocks read for each.
        depth: blocks searched for an answer, for recall.
    """
    store = model.store
    tokens, _ = question_tokens(store.tokenizer(), questions, model.settings.max_question_tokens)
    emb = embed_questions(model.embedder, tokens)
    answers, span_texts = AnswerTable(questions, store), SpanText(store)
    predictions = []
    with (
        torch.inference_mode(),
        bar(total=len(questions), desc=f"answer {what}", unit="question", enabled=progress) as shown,
    ):
        for rows in batches(len(questions), max(1, BATCH_BLOCKS // reader_beam)):
            texts = [questions[i].text for i in rows]
            beam = model.beam(texts, emb[rows.start : rows.stop], max(depth, reader_beam))
            ranks = [answers.first_rank(i, ids[:depth]) for i, ids in zip(rows, beam.ids, strict=True)]
            if model.span_reader is None:
                predictions += [
                    _retrieved_only(questions[i], int(ids[0]), rank, store)
                    for i, ids, rank in zip(rows, beam.ids, ranks, strict=True)
                ]
            else:
                scores = beam.scores[:, :reader_beam]
                read = read_blocks(
                    model.span_reader, [tokens[i] for i in rows], beam.ids[:, :reader_beam], store
                )
                utilities = read_utility(read.scores, scores, gold_spans(read, list(rows), answers))
                best = best_answers(read, scores, 1)
                for i, found, rank, utility in zip(rows, best, ranks, utilities, strict=True):
                    predictions.append(_prediction(questions[i], found, rank, utility, store, span_texts))
            shown.update(len(rows))
    return predictions


def read_utility(
    span_scores: torch.Tensor, retrieval_scores: torch.Tensor, gold: torch.Tensor
) -> list[float | None]:
    """log p(answer) with the retrieval scores less that without; None where no span is gold.

    Args:
        span_scores: [B, R, T, W], -inf where there is no span.
        retrieval_scores: [B, R].
        gold: [B, R, T, W] bool.
    """
    retrieval = retrieval_scores.to(span_scores.device)[:, :, None, None]
    gains: list[torch.Tensor] = []
    for scores in (span_scores + retrieval, span_scores):
        correct = scores.masked_fill(~gold, -torch.inf)
        gains.append(torch.logsumexp(correct.flatten(1), 1) - torch.logsumexp(scores.flatten(1), 1))
    gain = (gains[0] - gains[1]).tolist()
    return [
        value if has and math.isfinite(value) else None
        for value, has in zip(gain, gold.flatten(1).any(1).tolist(), strict=True)
    ]


def summarise(name: str, predictions: Sequence[Prediction], cutoffs: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of results.json for one set: over all questions, and over the reachable ones."""
    rows = []
    for subset in ("all", "reachable"):
        chosen = [p for p in predictions if subset == "all" or p.question.reachable]
        rows.append(
            {
                "name": name,
                "subset": subset,
                "questions": len(chosen),
                "exact_match": _mean([p.exact_match for p in chosen], 100),
                "f1": _mean([p.f1 for p in chosen], 100),
                "recall": recall_percent(np.array([p.answer_rank for p in chosen]), cutoffs),
                "retrieval_utility": _mean([p.utility for p in chosen if p.utility is not None], 1),
                "with_answer_read": sum(p.utility is not None for p in chosen),
            }
        )
    return rows


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Writes predictions.jsonl, whole or not at all."""
    with atomic_file(path, "w") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction.record(), ensure_ascii=False, allow_nan=False) + "\n")


def format_table(results: dict[str, Any]) -> str:
    """results.json for the terminal."""
    cutoffs = list(results["sets"][0]["recall"]) if results["sets"] else []
    header = ["set", "subset", "questions", "EM", "F1", *(f"R@{k}" for k in cutoffs), "utility"]
    lines = [header]
    for row in results["sets"]:
        figures = [row["exact_match"], row["f1"], *row["recall"].values()]
        lines.append(
            [
                row["name"],
                row["subset"],
                f"{row['questions']:,}",
                *("-" if value is None else f"{value:.1f}" for value in figures),
                "-" if row["retrieval_utility"] is None else f"{row['retrieval_utility']:+.3f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    rule = "-" * len(table[0])
    notes = [f"* {note}" for note in results.get("notes", [])]
    return "\n".join([f"checkpoint: {results['checkpoint']}", table[0], rule, *table[1:], "", *notes])


def _prediction(
    question: Question, found: list, rank: int, utility: float | None, store: TokenStore, texts: SpanText
) -> Prediction:
    if not found:  # no block, or none with a whole word in it
        return Prediction(question, "", 0.0, 0.0, NO_BLOCK, "", None, None, None, rank, utility)
    (best,) = found
    span = texts.locate(best.block_id, best.start, best.stop)
    text = store.text(best.block_id)[span[0] : span[1]]
    exact, f1 = score_answer(text, question.answers, question.answer_kind)
    return Prediction(
        question, text, exact, f1, best.block_id, store.title(best.block_id), best.score, best.probability,
        span, rank, utility,
    )  # fmt: skip


def _retrieved_only(question: Question, block_id: int, rank: int, store: TokenStore) -> Prediction:
    title = store.title(block_id) if block_id != NO_BLOCK else ""
    return Prediction(question, None, None, None, block_id, title, None, None, None, rank, None)


def _mean(values: Sequence[float | None], scale: float) -> float | None:
    known = [value for value in values if value is not None]
    return scale * sum(known) / len(known) if known else None


def _set_names(specs: Sequence[str]) -> list[str]:
    """A short name for each set, free of folder separators; the place in the list tells equal ones apart."""
    names = [Path(spec).stem if Path(spec).exists() else spec.replace("/", "_") for spec in specs]
    return [
        name if names.count(name) == 1 else f"{name}#{place}" for place, name in enumerate(names, start=1)
    ]


def _check_patterns(questions: Sequence[Question]) -> None:
    for question in questions:
        if question.answer_kind == "regex":
            for pattern in question.answers:
                try:
                    compile_answer(pattern)
                except DataError as error:
                    raise DataError(f"question {question.id}: {error}") from error


def _dense_description(config: Config) -> dict[str, Any] | None:
    """What the untrained embedder is made by; None for a fresh trunk, whose random vectors say nothing."""
    if config.embedder.trunk.startswith("fresh:"):
        return None
    return {"seed": config.seed, **dataclasses.asdict(config.embedder)}


def _untrained_retriever(
    run: RunFolder, config: Config, store: TokenStore, *, progress: bool
) -> tuple[Embedder, Index]:
    embedder = untrained_embedder(config, store).to(resolve_device(config.device)).eval()
    path = index_of(
        run, embedder, store, config, out=run.evaluate_dir / "snapshots", step=0, progress=progress
    )
    return embedder, open_snapshot(path, expect=Provenance(embedder.hash(), store.corpus_hash, 0)).index


def _mark(
    questions: Sequence[Question],
    store: TokenStore,
    top_k: int,
    dense: tuple[Embedder, Index] | None,
    bm25: Bm25Index,
    *,
    progress: bool,
) -> list[Question]:
    tokenizer = store.tokenizer()
    found = None
    if dense is not None:
        embedder, index = dense
        tokens, _ = question_tokens(tokenizer, questions, embedder.max_tokens - 2)
        found = (embed_questions(embedder, tokens, progress=progress), index)
    return mark_reachable(questions, store, tokenizer, top_k=top_k, dense=found, bm25=bm25, progress=progress)
