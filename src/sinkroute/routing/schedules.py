"""Numbers that change over training: the share of Sinkhorn steps, the strength of noise, the number of experts.

A schedule is a number, a function of the step, or one of these, written as Python or, in YAML and on a command line, as
text:

    constant(value)
    linear(start, end, steps)        a straight line, then end
    cosine(start, end, steps)        half a cosine, then end
    exponential(start, end, steps)   a constant factor each step, then end; both above 0
    piecewise(0: 0.1, 1000: 0.01)    each value from its step on

`steps` may be left out: the whole training, which `sinkroute.set_step(model, step, total_steps=...)` has to tell then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sinkroute._errors import require_numbers, unknown_name

__all__ = [
    "SCHEDULES",
    "Constant",
    "Cosine",
    "Exponential",
    "Linear",
    "Piecewise",
    "Schedule",
    "ScheduleLike",
    "make_schedule",
]


class Schedule:
    """A function of the step and, if it says so, of the number of steps in all."""

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        raise NotImplementedError

    def values(self) -> tuple[float, ...]:
        """Values between which all others lie, to be checked before training; none if they are not known."""
        return ()


# What options take.
ScheduleLike = float | str | Schedule | Callable[[int], float]


@dataclass(frozen=True)
class Constant(Schedule):
    """The same at every step.

    >>> Constant(0.1)(5)
    0.1
    """

    value: float

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return self.value

    def values(self) -> tuple[float, ...]:
        return (self.value,)


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int | None = None

    def __post_init__(self) -> None:
        require_numbers(start=self.start, end=self.end)
        if self.steps is not None and (self.steps != int(self.steps) or self.steps < 1):
            raise ValueError(f"steps of a schedule must be an integer of 1 or more, got {self.steps}")

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        steps = self.steps if self.steps is not None else total_steps
        if steps is None:
            raise ValueError(
                f"{self} does not say its steps; write "
                f"{type(self).__name__.lower()}({self.start:g}, {self.end:g}, STEPS) "
                "or tell the length of training: sinkroute.set_step(model, step, total_steps=...)"
            )
        return self.between(min(step / steps, 1.0))

    def between(self, done: float) -> float:
        raise NotImplementedError

    def values(self) -> tuple[float, ...]:
        return (self.start, self.end)


class Linear(_Ramp):
    """From start to end along a straight line.

    >>> [Linear(1.0, 0.0, steps=4)(step) for step in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """

    def between(self, done: float) -> float:
        return self.start + (self.end - self.start) * done


class Cosine(_Ramp):
    """From start to end along half a cosine: slow at both ends.

    >>> [round(Cosine(1.0, 0.0)(step, total_steps=4), 3) for step in (0, 1, 2, 4)]
    [1.0, 0.854, 0.5, 0.0]
    """

    def between(self, done: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


class Exponential(_Ramp):
    """From start to end by a constant factor each step.

    >>> [round(Exponential(1.0, 0.01, steps=4)(step), 3) for step in (0, 2, 4)]
    [1.0, 0.1, 0.01]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"start and end of an exponential schedule must be above 0, got {self.start}, {self.end}")

    def between(self, done: float) -> float:
        value: float = self.start ** (1 - done) * self.end**done
        return value


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Each value from its step on; before the first step the first value.

    >>> schedule = Piecewise({0: 0.1, 100: 0.01})
    >>> schedule(99), schedule(100)
    (0.1, 0.01)
    """

    pieces: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError("a piecewise schedule needs at least one step: value")
        require_numbers(**{f"value at step {step}": value for step, value in self.pieces.items()})

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        begun = [start for start in self.pieces if start <= step]
        return self.pieces[max(begun) if begun else min(self.pieces)]

    def values(self) -> tuple[float, ...]:
        return tuple(self.pieces.values())


@dataclass(frozen=True)
class _Function(Schedule):
    function: Callable[[int], float]

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return float(self.function(step))


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "piecewise": Piecewise,
}


def make_schedule(name: str, value: ScheduleLike, least: float = 0.0, most: float = math.inf) -> Schedule:
    """What an option was given, as a schedule.

    Args:
        name: of the option, for messages.
        value: a number, text, a schedule, or a function of the step.
        least, most: bounds of the values. Those of a function are checked as they come.

    Raises:
        TypeError, ValueError: what it is given is something else, or leaves the bounds.

    >>> make_schedule("noise", "linear(1, 0.1, 500)")
    Linear(start=1.0, end=0.1, steps=500)
    >>> make_schedule("probability", "lineer(1, 0.1)")
    Traceback (most recent call last):
    ValueError: unknown schedule of probability: 'lineer'; did you mean 'linear'? Known: ...
    """
    if isinstance(value, str):
        schedule = _parse(name, value)
    elif isinstance(value, Schedule):
        schedule = value
    elif callable(value):
        schedule = _Function(value)
    else:
        require_numbers(**{name: value})
        schedule = Constant(value)
    for number in schedule.values():
        check_bounds(name, number, least, most)
    return schedule


def check_bounds(name: str, value: float, least: float, most: float) -> float:
    """`value`, if it is a finite number within the bounds.

    Raises:
        ValueError: it is not.
    """
    if not (least <= value <= most and math.isfinite(value)):
        if math.isinf(most):
            raise ValueError(f"{name} must be a finite number of {least:g} or more, got {value}")
        what = "; it is a share of the training steps" if name == "probability" else ""
        raise ValueError(f"{name} must be between {least:g} and {most:g}, got {value}{what}")
    return value


def _parse(name: str, text: str) -> Schedule:
    found = re.fullmatch(r"\s*([\w-]+)\s*\(([^()]*)\)\s*", text)
    if found is None:
        raise ValueError(f"{name} must be a number or a schedule such as linear(0.1, 0.001, 1000), got {text!r}")
    kind, inside = found[1].lower(), [part.strip() for part in found[2].split(",") if part.strip()]
    if kind not in SCHEDULES:
        raise unknown_name(f"schedule of {name}:", kind, SCHEDULES)
    try:
        if kind == "piecewise":
            pairs = [part.split(":") for part in inside]
            pieces = {int(step): float(value) for step, value in pairs}
            if len(pieces) < len(pairs):
                raise ValueError("a step stands there twice")
            return Piecewise(pieces)
        least, most = (1, 1) if kind == "constant" else (2, 3)
        if not least <= len(inside) <= most:
            raise ValueError(f"{len(inside)} numbers")
        numbers: list[float] = [float(part) for part in inside]
        if len(numbers) == 3 and numbers[2] != int(numbers[2]):
            raise ValueError(f"steps must be whole, got {inside[2]}")
        return SCHEDULES[kind](*numbers[:2], *map(int, numbers[2:]))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot read {text!r} ({error}); "
            "write for instance linear(0.1, 0.001, 1000) or piecewise(0: 0.1, 500: 0)"
        ) from None
