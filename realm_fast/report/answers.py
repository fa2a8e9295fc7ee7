"""Sections of the report about questions: scores, published ones beside them, samples with evidence."""

from collections.abc import Callable, Sequence
from typing import Any

from realm_fast.report.charts import Change, before_after, wilson_interval
from realm_fast.report.data import SUBSETS, Record, RunData, cutoff_order
from realm_fast.report.markup import Markup, join, number, percent, probability, tag
from realm_fast.report.parts import REACHABLE, excerpt, missing, table

PUBLISHED = {
    "nq.test": ("NaturalQuestions", {"ORQA": 33.3, "REALM (Wikipedia)": 39.2, "REALM (CC-News)": 40.4}),
    "wq.test": ("WebQuestions", {"ORQA": 36.4, "REALM (Wikipedia)": 40.2, "REALM (CC-News)": 40.7}),
    "curated.test": ("CuratedTrec", {"ORQA": 30.1, "REALM (Wikipedia)": 46.8, "REALM (CC-News)": 42.9}),
}


PUBLISHED_SENTENCES = 200_000 * 512
EVIDENCE_CHARS = 260
PREDICTIONS_SHOWN = {"right": 4, "partly right": 2, "wrong": 4}


def answers(data: RunData) -> Markup:
    if data.results is None:
        return missing(
            "evaluate/results.json", "`realm-fast evaluate RUN` makes it, after `realm-fast finetune RUN`."
        )
    sets = data.results["sets"]
    if not sets:
        return tag("p", "The evaluation holds no question set.", cls="missing")
    cutoffs = sorted({k for s in sets for k in (s.get("recall") or {})}, key=cutoff_order)
    rows = []
    for s in sets:
        em = s.get("exact_match")
        interval = None
        if em is not None and s["questions"]:
            low, high = wilson_interval(em, s["questions"])
            interval = tag("small", f" {low:.1f}–{high:.1f}", title="95% interval")
        rows.append(
            [
                tag("b", s["name"]),
                SUBSETS.get(s["subset"], s["subset"]),
                f"{s['questions']:,}",
                join([tag("b", percent(em)), interval]),
                percent(s.get("f1")),
                *(percent((s.get("recall") or {}).get(k)) for k in cutoffs),
                number(s.get("retrieval_utility")) if s.get("retrieval_utility") is not None else "–",
            ]
        )
    header = [
        "question set",
        "subset",
        "questions",
        "exact match",
        "F1",
        *(f"recall@{k}" for k in cutoffs),
        "utility",
    ]
    return join(
        [
            table(header, rows, numeric_from=2),
            tag("p", REACHABLE, cls="note"),
            _recall_changes(sets),
            _published(data),
            [tag("p", text, cls="note") for text in data.results.get("notes", [])],
        ]
    )


def _recall_changes(sets: Sequence[Record]) -> Markup | None:
    """Recall of the retriever before and after fine-tuning, where the evaluation measured both."""
    changes = []
    for s in sets:
        before, after = s.get("recall_before") or {}, s.get("recall") or {}
        k = "5" if "5" in before and "5" in after else min(before.keys() & after.keys(), default=None)
        if k is not None:
            label = f"recall@{k} · {s['name']} {SUBSETS.get(s['subset'], s['subset'])}"
            changes.append(Change.measured(label, before[k], after[k], s["questions"]))
    if not changes:
        return None
    return before_after(
        changes,
        title="What fine-tuning did to the retriever",
        unit="% of questions with an answer among the top blocks",
        note="Before: the retriever as pre-training left it. Pale bars: 95% interval of each measurement.",
    )


def _published(data: RunData) -> Markup | None:
    sets = data.results["sets"] if data.results else []
    here = {s["name"]: s for s in sets if s["subset"] == "all" and s["name"] in PUBLISHED}
    if not here:
        return None
    systems = ["ORQA", "REALM (Wikipedia)", "REALM (CC-News)"]
    rows = [
        [
            PUBLISHED[name][0],
            percent(s.get("exact_match")),
            *(percent(PUBLISHED[name][1][system]) for system in systems),
        ]
        for name, s in here.items()
    ]
    sentences = data.queries_per_step() * data.metrics[-1]["step"] if data.metrics else 0
    ours = f"; this run on {sentences:,}" if sentences else ""
    return tag(
        "div",
        tag("h3", "Beside the published systems: another scale"),
        tag(
            "p",
            "Exact match on the test questions. ORQA and REALM read all of English Wikipedia with BERT-base "
            f"models, and REALM was pre-trained on {PUBLISHED_SENTENCES:,} masked sentences (200,000 steps "
            f"of 512){ours}. The published numbers say where the road leads; they are no yardstick for a "
            "run of another size.",
            cls="note",
        ),
        table(["test set", "this run", *systems], rows, numeric_from=1, cls="published"),
        cls="beside",
    )


def sample_answers(data: RunData, text_of: Callable[[int], str] | str) -> Markup:
    if data.predictions is None:
        return missing("evaluate/predictions.jsonl", "`realm-fast evaluate RUN` makes it.")
    if not data.predictions:
        return tag("p", "No question was answered.", cls="missing")
    if all(p["exact_match"] is None for p in data.predictions):
        return tag(
            "p", "Blocks were retrieved, but nothing was read: no reader was fine-tuned.", cls="missing"
        )
    groups = sample_predictions(data.predictions)
    parts: list[Any] = []
    if isinstance(text_of, str):
        parts.append(tag("p", f"The blocks’ text is not shown: {text_of}.", cls="missing"))
    for kind, records in groups.items():
        total = sum(1 for p in data.predictions if prediction_kind(p) == kind)
        parts.append(tag("h3", f"{kind.capitalize()} ", tag("small", f"{len(records)} of {total:,}")))
        if records:
            parts.append(tag("div", [_prediction_card(p, kind, text_of) for p in records], cls="cards"))
        else:
            parts.append(tag("p", "None.", cls="missing"))
    parts.append(
        tag(
            "p",
            "Right and partly right ones: those the reader is surest of. Wrong ones: spread evenly from the "
            "confident to the hesitant. All of them are in evaluate/predictions.jsonl.",
            cls="note",
        )
    )
    return join(parts)


def prediction_kind(prediction: Record) -> str:
    """right (exact match), partly right (some words shared), or wrong."""
    if prediction["exact_match"]:
        return "right"
    return "partly right" if prediction.get("f1") else "wrong"


def sample_predictions(predictions: Sequence[Record]) -> dict[str, list[Record]]:
    """A few of each kind, the same ones every time: the best of the good, a cross-section of the bad."""
    groups: dict[str, list[Record]] = {kind: [] for kind in PREDICTIONS_SHOWN}
    for prediction in predictions:
        groups[prediction_kind(prediction)].append(prediction)
    sample = {}
    for kind, limit in PREDICTIONS_SHOWN.items():
        ranked = sorted(groups[kind], key=lambda p: (-_confidence(p), p["id"]))
        if kind == "wrong" and len(ranked) > limit:
            ranked = [ranked[i * (len(ranked) - 1) // (limit - 1)] for i in range(limit)]
        sample[kind] = ranked[:limit]
    return sample


def _confidence(p: Record) -> float:
    """The reader's probability of its answer, or, where there is none, the score."""
    value = p.get("probability")
    return value if value is not None else p.get("score") or 0.0


def _how_sure(p: Record) -> str | None:
    if p.get("probability") is not None:
        return f" · p = {probability(p['probability'])}"
    return f" · score {number(p['score'])}" if p.get("score") is not None else None


def _prediction_card(p: Record, kind: str, text_of: Callable[[int], str] | str) -> Markup:
    sign = {"right": "✓", "partly right": "≈", "wrong": "✗"}[kind]
    evidence = None
    if callable(text_of) and p["block_id"] >= 0:
        evidence = tag("blockquote", _evidence(text_of(p["block_id"]), p.get("span")), dir="auto")
    where = f"{p.get('title') or 'untitled'}, block {p['block_id']}" if p["block_id"] >= 0 else "no block"
    answers = p["answers"]
    accepted = ", ".join(answers[:4]) + (f" and {len(answers) - 4} more" if len(answers) > 4 else "")
    return tag(
        "article",
        tag("p", p["question"], cls="question", dir="auto"),
        tag(
            "p",
            tag("span", sign, cls="sign", aria_label=kind),
            tag("b", p["prediction"] or "no answer", dir="auto"),
            cls="prediction",
        ),
        tag("p", "accepted: ", accepted or "none", cls="accepted", dir="auto"),
        evidence,
        tag(
            "p",
            where,
            _how_sure(p),
            f" · {p['id']}",
            " · reachable" if p.get("reachable") else None,
            cls="source",
        ),
        cls=f"card {kind.replace(' ', '-')}",
    )


def _evidence(text: str, span: Sequence[int] | None) -> Markup:
    """The block's text about the answer, the answer marked where the span fits the text."""
    fits = span is not None and len(span) == 2 and 0 <= span[0] < span[1] <= len(text)
    return excerpt(text, (span[0], span[1]) if span and fits else None, EVIDENCE_CHARS)
