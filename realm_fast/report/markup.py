"""HTML that is escaped by construction, and numbers as people read them.

    tag("p", "a < b ", tag("b", title), cls="note")      # every str is escaped; only Markup passes as it is

Nothing in the report is put together from strings any other way.
"""

import html
import math
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"br", "hr", "img", "input", "meta", "link", "wbr"})
# what HTML forbids or cannot hold: controls other than tab and newline, and lone surrogates
_FORBIDDEN = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)), "\ufffd"
)


class Markup(str):
    """Text that already is HTML."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: the element's name.
        children: Markup as it is, text and numbers escaped, None left out, iterables flattened.
        attributes: `cls` is class, a trailing or inner underscore is a hyphen ("aria_label"); None and False
            leave an attribute out, True writes it without a value.
    """
    start = "<" + name + "".join(_attribute(key, value) for key, value in attributes.items()) + ">"
    if name in _VOID:
        return Markup(start)
    return Markup(f"{start}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """The children one after another, escaped as in `tag`."""
    return Markup("".join(map(_child, children)))


def raw(text: str) -> Markup:
    """Marks HTML written in this package, never data, as needing no escaping."""
    return Markup(text)


def _child(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    if value is None:
        return ""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Iterable):
        return join(value)
    return escape(str(value))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def escape(text: str) -> Markup:
    return Markup(html.escape(text.translate(_FORBIDDEN), quote=True))


# ---- numbers as people read them ---------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, thousands apart: 12,345  0.0042  3.2e−9  n/a."""
    if value is None:
        return "n/a"
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}".replace("-", "−")
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-4 <= size < 1e9:
        mantissa, exponent = f"{value:.{max(digits - 1, 0)}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}".replace(
            "-", "−"
        )
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    """A percentage between 0 and 100 with its sign: 41.3%."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}%".replace("-", "−")


def whole_percent(value: float | None) -> str:
    """A percentage without decimals where it has none: 40%, 12.5%."""
    return percent(value, 0 if value is not None and abs(value - round(value)) < 1e-9 else 1)


def probability(value: float | None) -> str:
    """0.43, 0.007, <0.001, n/a; exactly 0 and 1 as they are."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value in (0, 1):
        return str(int(value))
    if value < 0.0005:
        return "<0.001"
    if value > 0.9995:
        return ">0.999"
    return f"{value:.2f}" if 0.095 <= value < 0.995 else f"{value:.3f}"


def signed(value: float | None) -> str:
    """+0.31, −0.004, ≈0, 0: with its sign, a true minus."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if abs(value) < 0.0005:
        return "≈0" if value else "0"
    text = f"{value:+.2f}" if abs(value) >= 0.095 else f"{value:+.3f}"
    return text.replace("-", "−")


def seconds(value: float | None) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 07 min."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value < 10:
        return f"{value:.1f} s"
    if round(value) < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def byte_size(value: float | None) -> str:
    """512 B, 3.2 MB, 1.21 GB (powers of ten)."""
    if value is None or not math.isfinite(value):
        return "n/a"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{number(float(value))} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1000
    return f"{number(float(value))} TB"


def count(n: int, singular: str, plural: str | None = None) -> str:
    """1 block, 2,345 blocks."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"
