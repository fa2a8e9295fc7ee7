"""Sections of the report about training: the curves, and what pre-training changed."""

from collections.abc import Sequence

from realm_fast.report.charts import (
    Change,
    Mark,
    before_after,
    line_chart,
    smoothing_half_life,
)
from realm_fast.report.data import SUBSETS, Record, RunData, cutoff_order
from realm_fast.report.markup import Markup, count, join, number, percent, tag, whole_percent
from realm_fast.report.parts import REACHABLE, difference, missing, series, table
from realm_fast.report.refreshes import refresh_charts


def pretraining(data: RunData) -> Markup:
    metrics = data.metrics
    if metrics is None:
        return missing("pretrain/metrics.jsonl", "`realm-fast pretrain RUN --corpus CORPUS` makes it.")
    if not metrics:
        return tag("p", "Pre-training has logged nothing yet.", cls="missing")
    level = data.setting("pretrain.level") or "token"
    per = "nats per masked token" if level == "token" else "nats per masked span"
    half_life = smoothing_half_life(len(metrics))
    curves = [
        line_chart(
            [series(metrics, "loss", "loss")],
            title="Loss",
            unit=per,
            note="−log of the marginal likelihood of the hidden tokens; lower is better.",
        ),
        line_chart(
            [series(metrics, "retrieval_utility", "retrieval utility", 2)],
            title="Retrieval utility",
            unit=per,
            note="What the retrieved blocks add over the null block; above 0, looking things up helps.",
        ),
        line_chart(
            [series(metrics, "masked_accuracy", "accuracy", 1, 100)],
            title="Hidden tokens guessed",
            unit="% of a training batch",
            from_zero=True,
            show=whole_percent,
        ),
        line_chart(
            [series(metrics, "null_probability", "null block", 4, 100)],
            title="Weight of the null block",
            unit="mean p(z = ∅ | x), %",
            from_zero=True,
            show=whole_percent,
            note="How often the retriever would rather read nothing.",
        ),
        *refresh_charts(metrics, data.refreshes or []),
    ]
    more = [
        line_chart(
            [
                series(metrics, "reader_lr", "reader", 1, smooth=False),
                series(metrics, "embedder_lr", "embedder", 2, smooth=False),
            ],
            title="Learning rate",
            unit="AdamW",
            from_zero=True,
        ),
        line_chart(
            [series(metrics, "grad_norm", "gradient norm", 4)],
            title="Gradient norm",
            unit="before clipping",
            from_zero=True,
        ),
    ]
    return join(
        [
            tag("div", curves, cls="charts"),
            tag(
                "p",
                "Dots: one logged record each. Line: their average with weights that halve every "
                f"{half_life:.2g} records to either side.",
                cls="note",
            ),
            _skipped(metrics),
            tag(
                "details", tag("summary", "Learning rates and gradient norm"), tag("div", more, cls="charts")
            ),
            _finetune_curves(data),
        ]
    )


def _finetune_curves(data: RunData) -> Markup | None:
    metrics = data.finetune_metrics
    if not metrics:
        return None
    shown = [
        line_chart(
            [
                series(metrics, "retriever_loss", "retriever", 1),
                series(metrics, "reader_loss", "reader", 2),
            ],
            title="Fine-tuning loss",
            unit="nats per question",
        ),
        line_chart(
            [
                series(metrics, "with_answer_retrieved", "retrieved", 3, 100),
                series(metrics, "with_answer_read", "read", 4, 100),
            ],
            title="Questions that can teach",
            unit="% of a training batch",
            from_zero=True,
            show=whole_percent,
            note="With an answer in a retrieved block, or in a block read. Others have no gradient.",
        ),
    ]
    if data.dev_evaluations:
        shown.append(_dev_chart(data.dev_evaluations))
    return join([tag("h3", "Fine-tuning on questions"), tag("div", shown, cls="charts")])


def _dev_chart(evaluations: list[Record]) -> Markup:
    """Exact match and F1 on the questions kept out of training, the best step marked."""
    *_, best = (line for line in evaluations if line["best"])  # the first one always is, so far
    widest = sorted(best["recall"], key=cutoff_order)[-1]
    return line_chart(
        [
            series(evaluations, "exact_match", "exact match", 1, smooth=False),
            series(evaluations, "f1", "F1", 2, smooth=False),
        ],
        title="Dev questions",
        unit=f"% of {count(best['questions'], 'question')}",
        from_zero=True,
        show=whole_percent,
        marks=[Mark(best["step"], "best")],
        note=f"Not trained on. Step {best['step']:,} was the best and is what answers: exact match "
        f"{percent(best['exact_match'])}, F1 {percent(best['f1'])}, an answer in a block read for "
        f"{percent(best['recall'][widest])}.",
    )


def what_changed(data: RunData) -> Markup:
    if data.evaluations is None:
        return missing(
            "pretrain/evaluations.jsonl", "Pre-training writes it before its first and after its last step."
        )
    if not data.evaluations:
        return tag("p", "No evaluation has been recorded yet.", cls="missing")
    changes, rows = [], []
    for subset in data.subsets():
        before, after = (data.evaluation(when, subset) for when in ("before", "after"))
        known = [e for e in (before, after) if e and e.get("recall")]
        for k in sorted({k for e in known for k in e["recall"]}, key=cutoff_order):
            was, now = (((e or {}).get("recall") or {}).get(k) for e in (before, after))
            n = next((e["questions"] for e in (after, before) if e and e.get("questions")), None)
            changes.append(Change.measured(f"recall@{k} · {SUBSETS.get(subset, subset)}", was, now, n))
            rows.append(
                [
                    SUBSETS.get(subset, subset),
                    f"{n:,}" if n else "n/a",
                    f"recall@{k}",
                    percent(was),
                    percent(now),
                    difference(was, now),
                ]
            )
    recall = join(
        [
            before_after(
                changes,
                title="Zero-shot retrieval recall",
                unit="% of questions with an answer among the top k blocks",
                note="Pale bars: 95% interval of each measurement.",
            ),
            table(["questions", "number", "measure", "before", "after", "change"], rows, numeric_from=1),
            tag("p", REACHABLE, cls="note"),
        ]
    )
    return join(
        [
            tag("h3", "Retrieval"),
            recall if changes else tag("p", "No recall was measured.", cls="missing"),
            _masked_tokens(data),
        ]
    )


def _masked_tokens(data: RunData) -> Markup:
    before, after = (data.evaluation(when, "all") for when in ("before", "after"))
    title = tag("h3", "Guessing hidden tokens, with and without retrieval")
    if not any(e and e.get("masked_accuracy") is not None for e in (before, after)):
        return join([title, tag("p", "No masked-token accuracy was measured.", cls="missing")])

    def value(evaluation: Record | None, name: str, factor: float = 1) -> float | None:
        found = (evaluation or {}).get(name)
        return None if found is None else factor * found

    names = (("with retrieval", "masked_accuracy"), ("without (null block)", "masked_accuracy_null"))
    changes = [Change(label, value(before, name, 100), value(after, name, 100)) for label, name in names]
    rows = [
        [f"accuracy {c.label}", percent(c.before), percent(c.after), difference(c.before, c.after)]
        for c in changes
    ]
    for label, name in (
        ("negative log-likelihood with retrieval, nats a token", "masked_nll"),
        ("negative log-likelihood without, nats a token", "masked_nll_null"),
        ("retrieval utility, nats a token", "retrieval_utility"),
    ):
        was, now = value(before, name), value(after, name)
        if was is not None or now is not None:
            rows.append([label, number(was), number(now), difference(was, now, "")])
    spans = [(e or {}).get("span_recall") or {} for e in (before, after)]
    for k in sorted({*spans[0], *spans[1]}, key=int):
        was, now = (found.get(k) for found in spans)
        where = "the first block found" if k == "1" else f"one of the first {k} blocks found"
        rows.append([f"hidden words that stand in {where}", percent(was), percent(now), difference(was, now)])
    return join(
        [
            title,
            before_after(
                changes, title="Accuracy on held-out sentences", unit="% of hidden tokens guessed right"
            ),
            table(["held-out sentences", "before", "after", "change"], rows, numeric_from=1),
        ]
    )


def _skipped(metrics: Sequence[Record]) -> Markup | None:
    """Sentences that could not be used, by reason. The counters run on, so the last record has the sums."""
    skipped = next((r["skipped"] for r in reversed(metrics) if r.get("skipped")), None)
    failures = metrics[-1].get("refresh_failures")
    failed = (
        tag("p", f"Refreshes that failed and were tried again: {number(failures)}.", cls="note")
        if failures
        else None
    )
    if not skipped:
        return failed
    reasons = ", ".join(f"{reason.replace('_', ' ')} {n:,}" for reason, n in sorted(skipped.items()))
    drawn_again = f"Sentences drawn again because they could not be used: {reasons}."
    return join([tag("p", drawn_again, cls="note"), failed])
