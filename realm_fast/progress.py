"""Progress on stderr: a moving bar on a terminal, a line now and then in a log, nothing otherwise.

    with bar(total=len(blocks), desc="embed blocks", unit="block") as progress:
        for pack in packs:
            ...
            progress.update(len(pack))
            progress.set_postfix(loss=2.31)

REALM_FAST_PROGRESS=1 asks for progress where stderr is no terminal: a line about every 10 seconds, so that
a log stays readable. REALM_FAST_PROGRESS=0 silences it everywhere.
"""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

from tqdm import tqdm

LINE_EVERY_S = 10.0
Mode = Literal["bar", "lines", "silent"]


def mode() -> Mode:
    """How progress is shown now, from REALM_FAST_PROGRESS and whether stderr is a terminal."""
    wanted = os.environ.get("REALM_FAST_PROGRESS", "")
    if wanted == "0":
        return "silent"
    if sys.stderr is not None and sys.stderr.isatty():
        return "bar"
    return "lines" if wanted not in ("", "0") else "silent"


def bar(
    *, total: int | None = None, desc: str = "", unit: str = "it", initial: int = 0, enabled: bool = True
) -> "Progress":
    """Starts showing the progress of one loop.

    Args:
        total: units of work in all; None where it is not known (then no ETA).
        desc: what is being done, in two or three words.
        unit: one unit of work, singular ("block", "step").
        initial: units done before this process started (a resumed run); the rate leaves them out.
        enabled: False is silent; saves the caller an `if`.
    """
    return Progress(total, desc, unit, initial, mode() if enabled else "silent")


class Progress:
    """What `bar` returns: a context manager with `update` and `set_postfix`."""

    def __init__(
        self,
        total: int | None,
        desc: str,
        unit: str,
        initial: int,
        mode: Mode,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n = initial
        self.total = total
        self._mode = mode
        self._desc, self._unit, self._initial = desc, unit, initial
        self._postfix: dict[str, Any] = {}
        self._clock = clock
        self._started_s = self._last_line_s = clock()
        self._last_n = initial - 1  # nothing is printed yet, not even `initial`
        self._closed = False
        self._tqdm: tqdm | None = None
        if mode == "bar":
            self._tqdm = tqdm(
                total=total,
                desc=desc,
                unit=unit,
                initial=initial,
                file=sys.stderr,
                dynamic_ncols=True,
                unit_scale=unit == "B",
                mininterval=0.2,
            )

    def update(self, n: int = 1) -> None:
        """Says that `n` more units are done."""
        self.n += n
        if self._tqdm is not None:
            self._tqdm.update(n)
        elif self._mode == "lines" and self._clock() - self._last_line_s >= LINE_EVERY_S:
            self._print_line()

    def set_postfix(self, **values: Any) -> None:
        """Shows `name=value` pairs after the rate; floats in four significant digits."""
        self._postfix = values
        if self._tqdm is not None:
            self._tqdm.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Leaves the final state on the screen or in the log; harmless the second time."""
        if self._closed:
            return
        self._closed = True
        if self._tqdm is not None:
            self._tqdm.close()
        elif self._mode == "lines" and self._last_n != self.n:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line_s, self._last_n = self._clock(), self.n
        done = (
            "{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
            if self.total
            else "{n_fmt} [{elapsed}"
        )
        meter = tqdm.format_meter(
            n=self.n,
            total=self.total,
            elapsed=self._last_line_s - self._started_s,
            prefix=self._desc,
            unit=self._unit,
            unit_scale=self._unit == "B",
            initial=self._initial,
            postfix=", ".join(f"{k}={_short(v)}" for k, v in self._postfix.items()),
            bar_format="{desc}: " + done + ", {rate_fmt}{postfix}]",
        )
        line = " ".join(meter.split())  # tqdm pads its numbers, for a bar that stays in place
        print(line.removeprefix(": "), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
