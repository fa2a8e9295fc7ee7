"""Pieces that several sections of the report are made of."""

from collections.abc import Sequence
from typing import Any

from realm_fast.report.charts import Series
from realm_fast.report.data import Record
from realm_fast.report.markup import Markup, join, number, tag

REACHABLE = (
    "A question is reachable if some block near it (the best of BM25 or of an untrained dense search) holds "
    "an accepted answer as a string. Such matches can be accidental; most questions of these sets ask about "
    "pages that a small corpus does not have."
)


def missing(file: str, hint: str) -> Markup:
    """What a section says when its stage was not run. Text between backticks becomes code."""
    pieces = [tag("code", part) if i % 2 else part for i, part in enumerate(hint.split("`"))]
    return tag(
        "p", tag("b", "Not run."), " There is no ", tag("code", file), " in this run. ", pieces, cls="missing"
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, numeric_from: int | None = None, cls: str = ""
) -> Markup:
    """A table; columns from `numeric_from` on are numbers, set flush right."""

    def kind(column: int) -> str | None:
        return "num" if numeric_from is not None and column >= numeric_from else None

    head = tag(
        "thead", tag("tr", [tag("th", name, cls=kind(i), scope="col") for i, name in enumerate(header)])
    )
    body = tag(
        "tbody", [tag("tr", [tag("td", cell, cls=kind(i)) for i, cell in enumerate(row)]) for row in rows]
    )
    return tag("div", tag("table", head if any(header) else None, body), cls=f"scroll {cls}".strip())


def series(
    metrics: Sequence[Record], name: str, label: str, color: int = 1, factor: float = 1, smooth: bool = True
) -> Series:
    points = [(record["step"], record[name]) for record in metrics if name in record]
    return Series(
        label, [x for x, _ in points], [None if y is None else factor * y for _, y in points], color, smooth
    )


def difference(was: float | None, now: float | None, unit: str = " points") -> str:
    if was is None or now is None:
        return "–"
    change = now - was
    text = f"{change:+.1f}{unit}" if unit else ("+" if change >= 0 else "") + number(change)
    if change == 0:
        text = "0"
    return text.replace("-", "−")


def excerpt(text: str, marked: tuple[int, int] | None, limit: int) -> Markup:
    """About `limit` characters of a text, whole words, around the marked ones if there are any."""
    if marked is None:
        return join([text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"])
    start, stop = marked
    left = max(0, min(start - limit // 3, len(text) - limit))
    right = min(len(text), max(left + limit, stop))
    if left > 0:
        left = min(start, text.find(" ", left) + 1 or left)
    if right < len(text):
        right = max(stop, text.rfind(" ", 0, right))
    return join(
        [
            "… " if left else None,
            text[left:start],
            tag("mark", text[start:stop]),
            text[stop:right],
            " …" if right < len(text) else None,
        ]
    )
