"""SIGINT and SIGTERM, turned into a question that a loop asks between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from realm_fast.errors import Interrupted


class StopRequest:
    """Whether someone asked this process to stop. `signal_number` is 0 until then."""

    signal_number = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def raise_interrupted(self, message: str) -> None:
        name = signal.Signals(self.signal_number).name
        raise Interrupted(f"{name}: {message}", self.signal_number)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Yields a StopRequest that SIGINT and SIGTERM set; a second SIGINT interrupts at once.

    Outside the main thread signals cannot be caught: there the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
