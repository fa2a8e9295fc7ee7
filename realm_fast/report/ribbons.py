"""Probability drawn as ribbons: out from the sentence to the blocks, in from the blocks to the marginal."""

from collections.abc import Sequence
from dataclasses import dataclass

from realm_fast.report.markup import Markup, tag

ROW_UNITS = 100  # a row's height in the drawing's units; a ribbon fills at most RIBBON_UNITS of it
RIBBON_UNITS = 84


@dataclass(frozen=True)
class Row:
    """One block (or, with `blocks` > 1, several taken together) in the view of one masked token."""

    title: str
    text: str
    block_id: int  # -1: the null block
    p_z: float
    gold_p: float
    share: float  # p_z * gold_p: what the block adds to the marginal
    responsibility: float
    push: float  # -d loss / d score
    guesses: tuple[tuple[str, float], ...]
    blocks: int = 1

    @property
    def is_null(self) -> bool:
        return self.block_id == -1 and self.blocks == 1


def _scale(rows: Sequence[Row]) -> float:
    """Units of height a probability of 1 takes: as much as fits, with each ribbon inside its row."""
    largest = max((row.p_z for row in rows), default=1.0) or 1.0
    return min(0.8 * ROW_UNITS * len(rows), RIBBON_UNITS / largest)


def fan_out(rows: Sequence[Row]) -> Markup:
    height, unit = ROW_UNITS * len(rows), _scale(rows)
    top = height / 2 - unit * sum(row.p_z for row in rows) / 2
    ribbons = []
    for place, row in enumerate(rows):
        thick = unit * row.p_z
        centre = ROW_UNITS * (place + 0.5)
        ribbons.append(_ribbon(0, top, 100, centre - thick / 2, thick, f"ribbon retrieve row-{place}"))
        top += thick
    whole = unit * sum(row.p_z for row in rows)
    return _svg(height, [*ribbons, _mass(0, height / 2 - whole / 2, whole, "whole")])


def fan_in(rows: Sequence[Row]) -> Markup:
    height, unit = ROW_UNITS * len(rows), _scale(rows)
    total, share = sum(row.p_z for row in rows), sum(row.share for row in rows)
    gold_top = height / 2 - unit * total / 2
    rest_top = gold_top + unit * share
    masses = [
        _mass(95, gold_top, unit * share, "mass-right"),
        _mass(95, rest_top, unit * max(total - share, 0.0), "mass-wrong"),
    ]
    gold, rest = [], []
    for place, row in enumerate(rows):
        start = ROW_UNITS * (place + 0.5) - unit * row.p_z / 2
        right, wrong = unit * row.share, unit * max(row.p_z - row.share, 0.0)
        gold.append(_ribbon(0, start, 100, gold_top, right, f"ribbon right row-{place}"))
        rest.append(_ribbon(0, start + right, 100, rest_top, wrong, f"ribbon wrong row-{place}"))
        gold_top += right
        rest_top += wrong
    return _svg(height, [*rest, *gold, *masses])


def _ribbon(x0: float, y0: float, x1: float, y1: float, thick: float, cls: str) -> Markup:
    middle = (x0 + x1) / 2
    d = (
        f"M{x0} {y0:.2f}C{middle} {y0:.2f} {middle} {y1:.2f} {x1} {y1:.2f}"
        f"v{thick:.2f}C{middle} {y1 + thick:.2f} {middle} {y0 + thick:.2f} {x0} {y0 + thick:.2f}z"
    )
    return tag("path", d=d, cls=cls)


def _mass(x: float, y: float, height: float, cls: str) -> Markup:
    return tag("rect", x=x, y=f"{y:.2f}", width=5, height=f"{height:.2f}", cls=cls)


def _svg(height: float, paths: Sequence[Markup]) -> Markup:
    return tag(
        "svg",
        paths,
        viewBox=f"0 0 100 {height}",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )
