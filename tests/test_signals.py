"""Asking a loop to stop."""

import os
import signal
import threading

import pytest

from realm_fast.errors import Interrupted
from realm_fast.signals import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
            stop.raise_interrupted("saved")
        assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_immediate():
    with stop_on_signal() as stop:  # noqa: SIM117
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            assert stop
            os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_nothing_is_caught():
    seen = []
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with stop_on_signal() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
