"""Time: a limit on a call, and how long a peer takes for a number of iterations."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType


class TooLong(Exception):
    """A call ran into its limit."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `TooLong` within the block after so many seconds, as soon as Python gets a word in."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"not ended after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


MOST_ITERATIONS = 10_000


@dataclass(frozen=True)
class Pace:
    """Seconds of a call and of each iteration within it."""

    call: float
    iteration: float

    def seconds(self, iterations: int) -> float:
        return self.call + iterations * self.iteration

    def iterations_within(self, seconds: float) -> int:
        return min(max(1, int((seconds - self.call) / self.iteration)), MOST_ITERATIONS)


def pace(run: Callable[[int], object]) -> Pace:
    """The best of a few calls of 1 and of 6 iterations, after a call that compiles what there is to compile."""
    run(1)
    calls = 5 if timed(partial(run, 1)) < 0.05 else 2
    one, six = (min(timed(partial(run, iterations)) for _ in range(calls)) for iterations in (1, 6))
    iteration = max((six - one) / 5, one / 1000)  # noise must not make it nothing
    return Pace(call=max(one - iteration, 0.0), iteration=iteration)
