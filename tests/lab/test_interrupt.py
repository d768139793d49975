"""Signals become a request; what was there before comes back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sinkroute.lab.interrupt import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks_and_the_second_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_in_another_thread_nothing_is_caught_and_nothing_fails() -> None:
    seen = []

    def work() -> None:
        with stop_on_signal() as request:
            seen.append(bool(request))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
