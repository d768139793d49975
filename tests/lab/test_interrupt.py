"""Signals become a request; what was there before comes back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sinkroute.lab.interrupt import Interrupted, stop_on_signal


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


@pytest.mark.parametrize(("world", "heard"), [("1", True), ("2", False)])
def test_a_process_of_several_that_leaves_does_not_hear_the_launcher(
    monkeypatch: pytest.MonkeyPatch, world: str, heard: bool
) -> None:
    # The first process to leave makes torchrun ask the rest, which then would not end with their own exit code.
    monkeypatch.setenv("WORLD_SIZE", world)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted), stop_on_signal():
            raise Interrupted("stopped at step 3")
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert after is (before if heard else signal.SIG_IGN)
