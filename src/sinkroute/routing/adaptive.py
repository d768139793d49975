"""Sinkhorn steps when they are needed: a rate that follows the measured imbalance of the gate.

    ema ← decay · ema + (1 − decay) · MaxVio of the gate's own top-k over the whole batch of a step
    firing switches on when ema > high, off when ema < low      (hysteresis: between them it stays what it was)
    p = ceiling while firing, floor otherwise

The paper leaves p as a constant (arXiv 2511.08972) and asks whether it should be learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sinkroute._errors import require_numbers, unknown_name

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive:
    """The share of Sinkhorn steps as a function of imbalance.

    Args:
        high: MaxVio (moving average) above which Sinkhorn steps are taken.
        low: MaxVio below which they stop; at most `high`.
        floor: share of Sinkhorn steps when balanced.
        ceiling: share of Sinkhorn steps when not; at least `floor`.
        decay: of the moving average; 0.9 remembers about 10 steps.

    Raises:
        ValueError: numbers that do not fit each other.

    >>> rule = Adaptive(high=1.0, low=0.5, floor=0.001, ceiling=0.2)
    >>> rule.fires(1.2, False), rule.fires(0.7, True), rule.fires(0.7, False), rule.fires(0.4, True)
    (True, True, False, False)
    >>> rule.rate(True), rule.rate(False)
    (0.2, 0.001)
    """

    high: float = 0.5
    low: float = 0.25
    floor: float = 0.001
    ceiling: float = 0.5
    decay: float = 0.9

    def __post_init__(self) -> None:
        require_numbers(high=self.high, low=self.low, floor=self.floor, ceiling=self.ceiling, decay=self.decay)
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low and high must be 0 <= low <= high, got low={self.low}, high={self.high}")
        if not 0 <= self.floor <= self.ceiling <= 1:
            raise ValueError(
                f"floor and ceiling must be 0 <= floor <= ceiling <= 1, got floor={self.floor}, ceiling={self.ceiling}"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be 0 or more and below 1, got {self.decay}")

    @classmethod
    def parse(cls, text: str) -> Adaptive:
        """From `"adaptive"` or `"adaptive(high=1, low=0.5, ceiling=0.1)"`.

        Raises:
            ValueError: it is neither.

        >>> Adaptive.parse("adaptive(high=1, floor=0)")
        Adaptive(high=1.0, low=0.25, floor=0.0, ceiling=0.5, decay=0.9)
        """
        found = re.fullmatch(r"\s*adaptive\s*(?:\(([^()]*)\))?\s*", text)
        if found is None:
            raise ValueError(f"cannot read {text!r}; write for instance adaptive(high=1, low=0.5, ceiling=0.1)")
        values = {}
        for part in (found[1] or "").split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if not name:
                continue
            if name not in cls.__dataclass_fields__:
                raise unknown_name("part of adaptive:", name, cls.__dataclass_fields__)
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"{name} of adaptive must be a number, got {value!r}") from None
        return cls(**values)

    def average(self, ema: float, max_vio: float) -> float:
        """The moving average after one more step; a negative `ema` means that there was none."""
        return max_vio if ema < 0 else self.decay * ema + (1 - self.decay) * max_vio

    def fires(self, ema: float, firing: bool) -> bool:
        """Whether Sinkhorn steps are wanted now."""
        return ema > self.high or (firing and ema >= self.low)

    def rate(self, firing: bool) -> float:
        """p."""
        return self.ceiling if firing else self.floor
