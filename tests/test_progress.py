"""realm_fast.progress: silent in a pipe, lines when asked for, a bar on a terminal."""

import io
import sys

import pytest

from realm_fast import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stderr(monkeypatch):
    def install(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    monkeypatch.delenv("REALM_FAST_PROGRESS", raising=False)
    return install


@pytest.mark.parametrize(
    ("terminal", "variable", "expected"),
    [
        (False, None, "silent"),
        (False, "", "silent"),
        (False, "0", "silent"),
        (False, "1", "lines"),
        (True, None, "bar"),
        (True, "1", "bar"),
        (True, "0", "silent"),
    ],
)
def test_mode_follows_terminal_and_variable(stderr, monkeypatch, terminal, variable, expected):
    stderr(Terminal() if terminal else io.StringIO())
    if variable is not None:
        monkeypatch.setenv("REALM_FAST_PROGRESS", variable)
    assert progress.mode() == expected


def test_a_missing_stderr_is_silent(stderr):
    stderr(None)  # a process started without one, as under pythonw
    with progress.bar(total=2) as shown:
        shown.update(2)
    assert shown.n == 2


def test_silent_writes_nothing_but_counts(stderr):
    out = stderr(io.StringIO())
    with progress.bar(total=10, desc="embed", unit="block", initial=3) as shown:
        shown.update(4)
        shown.update()
        shown.set_postfix(loss=1.0)
    assert shown.n == 8
    assert out.getvalue() == ""


def test_terminal_bar_shows_rate_total_and_postfix(stderr):
    out = stderr(Terminal())
    with progress.bar(total=4, desc="embed", unit="block") as shown:
        shown.set_postfix(loss=2.5)
        shown.update(4)
    text = out.getvalue()
    assert "embed" in text
    assert "4/4" in text
    assert "loss=2.5" in text
    assert "block/s" in text


def test_lines_come_every_ten_seconds_and_once_at_the_end(stderr):
    out = stderr(io.StringIO())
    clock = Clock()
    shown = progress.Progress(100, "pretrain", "step", 20, "lines", clock=clock)
    for _ in range(60):  # 30 s, two steps a second
        clock.now += 0.5
        shown.update(1)
        shown.set_postfix(loss=2.34567, note="x")
    shown.close()
    shown.close()
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    # updates at 10.0, 20.0 and 30.0 s; the last one is also the final state, so no fourth line
    assert [line.split("%")[1].split()[0] for line in lines] == ["40/100", "60/100", "80/100"]
    # 40 more steps at 2 steps/s are 20 s away: the 20 steps before this process do not count for the rate
    assert "00:20<00:20, 2.00step/s, loss=2.346, note=x" in lines[1]


def test_lines_without_total_and_final_line(stderr):
    out = stderr(io.StringIO())
    clock = Clock()
    with progress.Progress(None, "", "document", 0, "lines", clock=clock) as shown:
        clock.now += 1
        shown.update(5)
    assert out.getvalue() == "5 [00:01, 5.00document/s]\n"


def test_disabled_is_silent_even_on_a_terminal(stderr):
    out = stderr(Terminal())
    with progress.bar(total=3, enabled=False) as shown:
        shown.update(3)
    assert out.getvalue() == ""


def test_an_error_inside_closes_the_bar_and_passes_on(stderr):
    out = stderr(Terminal())
    shown = progress.bar(total=3)

    def work() -> None:
        with shown:
            shown.update(1)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        work()
    assert out.getvalue().endswith("\n")
