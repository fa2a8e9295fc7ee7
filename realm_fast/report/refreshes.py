"""The report on refreshes: how stale the index was, how far it had drifted, and when which was made and used.

Lanes of the time line hold spans over optimizer steps:

    made        from the step whose weights were handed over to the step at which the trainer had the index
    searched    from there to the step at which the next one took over
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from realm_fast.report.charts import Mark, Series, line_chart, ticks, whole
from realm_fast.report.data import Record
from realm_fast.report.markup import Markup, count, number, tag, whole_percent
from realm_fast.report.parts import series

REASONS = {
    "steps": "by the schedule",
    "drift": "for drift",
    "ceiling": "for the longest interval allowed",
    "resume": "on resuming",
}


def refresh_charts(metrics: Sequence[Record], refreshes: Sequence[Record]) -> list[Markup]:
    """Staleness, the time line, and drift where it was measured.

    Args:
        metrics: records of pretrain/metrics.jsonl.
        refreshes: records of pretrain/refreshes.jsonl; none in a run of an older version.
    """
    marks = _swaps(metrics)
    staleness = [Series("staleness", *_saw_tooth(metrics, "staleness_steps"), color=3, smooth=False)]
    if any((r.get("oldest_staleness_steps") or 0) > (r.get("staleness_steps") or 0) for r in metrics):
        staleness = [
            Series("newest shard", *_saw_tooth(metrics, "staleness_steps"), color=3, smooth=False),
            Series("oldest shard", *_saw_tooth(metrics, "oldest_staleness_steps"), color=4, smooth=False),
        ]
    charts = [
        line_chart(
            staleness,
            title="Staleness of the index",
            unit="steps behind the trainer",
            marks=marks,
            from_zero=True,
            wide=True,
            note=_staleness_words(metrics, marks),
        )
    ]
    if refreshes:
        last_step = max((r["step"] for r in (*metrics, *refreshes)), default=0)
        charts.append(timeline(_lanes(refreshes, last_step), last_step, note=_timeline_words(refreshes)))
    if any(r.get("probe_overlap") is not None for r in metrics):
        charts += [
            line_chart(
                [series(metrics, "probe_overlap", "overlap", 1, 100, smooth=False)],
                title="Overlap of stale and fresh results",
                unit="% of probe queries' candidates",
                marks=marks,
                show=whole_percent,
                note="Of the blocks the index returns for held-out sentences, those that the present weights "
                "would return too: an estimate from above.",
            ),
            line_chart(
                [series(metrics, "score_drift", "score drift", 2, smooth=False)],
                title="Score drift",
                unit="of the spread of a query's scores",
                marks=marks,
                from_zero=True,
                note=_check_words(metrics),
            ),
        ]
    return charts


@dataclass(frozen=True)
class Span:
    """A stretch of steps with a name for the hover text."""

    start: float
    end: float
    label: str
    pale: bool = False  # to tell it from its neighbour


@dataclass(frozen=True)
class Lane:
    label: str
    spans: Sequence[Span]
    color: int = 1


def timeline(lanes: Sequence[Lane], last_step: int, *, note: str | None = None) -> Markup:
    """Spans over the optimizer steps 0 to `last_step`, one lane below the other."""
    end = max(last_step, 1)

    def left(step: float) -> str:
        return f"{100 * step / end:.2f}%"

    rows = [
        tag(
            "div",
            tag("span", lane.label, cls="lane-label"),
            tag(
                "span",
                [
                    tag(
                        "span",
                        cls=f"span span-{lane.color}{' pale' if span.pale else ''}",
                        style=f"left:{left(span.start)};width:{left(span.end - span.start)}",
                        title=span.label,
                    )
                    for span in lane.spans
                ],
                cls="track",
            ),
            cls="lane",
        )
        for lane in lanes
    ]
    shown = [t for t in ticks(0, end, 6) if 0 <= t <= end and t == int(t)]
    axis = tag(
        "div",
        tag("span", cls="lane-label"),
        tag("span", [tag("b", number(whole(t)), style=f"left:{left(t)}") for t in shown], cls="track"),
        cls="lane lane-axis",
        aria_hidden="true",
    )
    caption = tag(
        "figcaption",
        tag("span", "Time line of refreshes", cls="chart-title"),
        tag("span", "over optimizer steps", cls="unit"),
    )
    return tag(
        "figure",
        caption,
        rows,
        axis,
        tag("p", note, cls="chart-note") if note else None,
        cls="chart wide lanes",
    )


def _lanes(refreshes: Sequence[Record], last_step: int) -> list[Lane]:
    handed_over = {r["step"]: r["reason"] for r in refreshes if r["event"] == "handed over"}
    uses = [r for r in refreshes if r["event"] == "in use"]
    had_at: dict[int, int] = {}  # step of the weights -> when the trainer had all it got of them
    for use in uses:
        had_at[use["snapshot_step"]] = use["step"]
    making: list[Span] = []
    for step, reason in handed_over.items():
        if step not in had_at:  # superseded while it waited, or the run ended first
            continue
        start = max(step, making[-1].end) if making else step  # the refresher was at the one before it
        words = f"weights of step {step:,}, handed over {REASONS.get(reason, reason)}"
        making.append(Span(start, had_at[step], f"{words}; in use from step {had_at[step]:,}"))
    searched, pale = [], False
    for use, following in zip(uses, [*uses[1:], None]):
        end = last_step if following is None else following["step"]
        if end > use["step"]:
            searched.append(Span(use["step"], end, _index_words(use), pale))
            pale = not pale
    return [Lane("being made", making, 3), Lane("searched", searched, 1)]


def _index_words(use: Record) -> str:
    if use["oldest_shard_step"] == use["snapshot_step"]:
        return f"index of step {use['snapshot_step']:,}"
    return (
        f"{use['fresh_shards']} of {use['shards']} shards of step {use['snapshot_step']:,}, "
        f"the oldest of step {use['oldest_shard_step']:,}"
    )


def _timeline_words(refreshes: Sequence[Record]) -> str:
    reasons = [r["reason"] for r in refreshes if r["event"] == "handed over"]
    if not reasons:
        return "No weights were handed over."
    shares = ", ".join(
        f"{reasons.count(reason)} {REASONS.get(reason, reason)}" for reason in dict.fromkeys(reasons)
    )
    return (
        f"Weights handed over {count(len(reasons), 'time')} ({shares}). Above: from the handover to the "
        "finished index in the trainer's hands; below: which index was searched."
    )


def _check_words(metrics: Sequence[Record]) -> str:
    costs = [r["drift_check_s"] for r in metrics if r.get("drift_check_s") is not None]
    spent = f" A measurement took {number(statistics.median(costs))} s (median)." if costs else ""
    return (
        f"How much scores of retrieved blocks have moved against each other since they were indexed.{spent}"
    )


def _saw_tooth(metrics: Sequence[Record], name: str) -> tuple[list[float], list[float | None]]:
    """Staleness as logged, the climb up to each refresh filled in: it grows by one a step until the swap."""
    xs: list[float] = []
    ys: list[float | None] = []
    last: Record | None = None
    for record in metrics:
        value = record.get(name)
        if value is None:
            continue
        if last is not None and value < last[name] + record["step"] - last["step"]:
            xs.append(record["step"])
            ys.append(last[name] + record["step"] - last["step"])
        xs.append(record["step"])
        ys.append(value)
        last = record
    return xs, ys


def _swaps(metrics: Sequence[Record]) -> list[Mark]:
    """Where the trainer was first seen with weights of another step in its index."""
    marks = []
    last = None
    for record in metrics:
        snapshot = record.get("snapshot_step")
        if snapshot is None:
            continue
        if last is not None and snapshot != last:
            marks.append(Mark(record["step"], f"index of step {number(whole(snapshot))} in use"))
        last = snapshot
    return marks


def _staleness_words(metrics: Sequence[Record], refreshes: Sequence[Mark]) -> str:
    values = [record["staleness_steps"] for record in metrics if record.get("staleness_steps") is not None]
    if not values:
        return "Staleness was not recorded."
    if not refreshes:
        return f"No fresh index was swapped in; largest logged {number(whole(max(values)))} steps."
    refreshed = count(len(refreshes), "refresh", "refreshes")
    mean, largest = number(statistics.fmean(values)), number(whole(max(values)))
    return (
        f"{refreshed} (vertical lines); mean {mean} steps, largest logged {largest}. The index is rebuilt in "
        "the background while training goes on; each tooth ends where a new one is swapped in, drawn at the "
        "first record after the swap."
    )
