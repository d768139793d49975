"""Comparing the times of calls on a machine that is never quite still.

Machines drift, so nothing is compared across time: the calls alternate, in an order that is shuffled at each turn, and
a call's time is set against the baseline's of the same turn. A repeat is the median of those ratios over its turns.
Calls that are several times slower than the baseline take part in a repeat's first turn only: they need no third digit.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

__all__ = ["Comparison", "alternate", "compare", "seconds_of"]

LEAST_TURNS, MOST_TURNS = 3, 60  # of a repeat
SLOW = 4  # times the baseline's time
Call = Callable[[], object]


class Comparison(NamedTuple):
    """What `compare` measured.

    Attributes:
        turns: of a repeat.
        milliseconds: of the baseline, the median of all its calls.
        ratios: name → time relative to the baseline, one a repeat.
    """

    turns: int
    milliseconds: float
    ratios: dict[str, list[float]]


def seconds_of(call: Call, device: torch.device) -> float:
    """The time of one call; on a GPU from its own clock, until the work is done.

    On one thread it is that of the processor, so that what else the machine does takes no part."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def compare(
    calls: Mapping[str, Call],
    baseline: str,
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    seed: int,
    pause: Call = lambda: None,
) -> Comparison:
    """The times of `calls` relative to `baseline`, one of them.

    Args:
        calls: name → what is timed.
        baseline: the name of the call that the others are set against.
        device: where the calls work.
        repeats: each gives one ratio per call; 3 will do where the turns are long.
        seconds: how long all of it may take; sets the turns of a repeat, of which there are three at least.
        seed: of the order of calls.
        pause: called before each call: what it raises ends the comparison.
    """
    for _ in range(2):  # the first turn also compiles kernels and fetches memory; where that is not seen, it will do
        first: dict[str, float] = {}
        for name, call in calls.items():
            pause()
            first[name] = seconds_of(call, device)
        if sum(first.values()) > seconds / 10:
            break
    quick = [name for name in calls if first[name] < SLOW * first[baseline]]
    turn, rest = sum(first[name] for name in quick), sum(first.values())
    repeats = min(repeats, max(3, int(seconds / rest)))
    turns = max(LEAST_TURNS, min(MOST_TURNS, 1 + int((seconds / repeats - rest) / turn)))

    def timed(name: str) -> float:
        pause()
        return seconds_of(calls[name], device)

    return alternate([list(calls), *[quick] * (turns - 1)], baseline, timed, repeats=range(repeats), seed=seed)


def alternate(
    turns: Sequence[Sequence[str]],
    baseline: str,
    seconds: Callable[[str], float],
    *,
    repeats: Iterable[object],
    seed: int = 0,
) -> Comparison:
    """Times relative to `baseline` of the same turn, whatever it is that is timed.

    Args:
        turns: of a repeat: which names take part in each, the baseline always, in an order that is shuffled.
        baseline: what the others are set against.
        seconds: makes the call of a name and says how long it took.
        repeats: a ratio for each: the median over its turns.
        seed: of the order, which is the same in each process.

    >>> alternate([["a", "b"]] * 3, "a", {"a": 2.0, "b": 3.0}.__getitem__, repeats=range(2))
    Comparison(turns=3, milliseconds=2000.0, ratios={'a': [1.0, 1.0], 'b': [1.5, 1.5]})
    """
    order = random.Random(seed)
    ratios: dict[str, list[float]] = {name: [] for names in turns for name in names}
    base: list[float] = []
    for _ in repeats:
        paired: dict[str, list[float]] = {name: [] for name in ratios}
        for names in turns:
            taken = {name: seconds(name) for name in order.sample(list(names), len(names))}
            base.append(taken[baseline])
            for name, value in taken.items():
                paired[name].append(value / taken[baseline])
        for name, values in paired.items():
            ratios[name].append(statistics.median(values))
    return Comparison(len(turns), 1e3 * statistics.median(base), ratios)
