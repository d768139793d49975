"""The strength of the Gaussian noise on the scores: a number, a schedule, or learned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sinkroute.routing.schedules import Constant, Schedule, make_schedule

__all__ = ["Noise", "NoiseLike", "NoiseScale"]

# What the option takes.
NoiseLike = float | str | Schedule | Callable[[int], float]
NoiseScale = Literal["per-expert", "absolute"]


class Noise:
    """α of every step, and the standard deviation that it stands for.

    Args:
        noise: a number, a schedule or its text, a function of the step, or `"learned"` or `"learned(0.3)"`: softplus of
            a parameter, with this value at first.
        scale: a standard deviation of α/E (`"per-expert"`) or of α (`"absolute"`).
        num_experts: E.

    Attributes:
        learned: whether there is a parameter.
        schedule: α by the step; of a learned one, its first value.
        now: α of this step, set by whoever knows the step.

    >>> Noise("learned(2.0)", "per-expert", 4).schedule, Noise(2.0, "per-expert", 4).std(None)
    (Constant(value=2.0), 0.0)
    """

    def __init__(self, noise: NoiseLike, scale: NoiseScale, num_experts: int) -> None:
        start = _learned(noise) if isinstance(noise, str) else None
        self.learned = start is not None
        self.schedule = make_schedule("noise", noise) if start is None else Constant(start)
        self.now = 0.0
        self._over = num_experts if scale == "per-expert" else 1

    def first_raw(self) -> float:
        """The first value of the parameter: softplus of it is α."""
        value = self.schedule(0)
        return value + math.log(-math.expm1(-value))  # log(e^x − 1), which overflows for large x

    def std(self, raw: Tensor | None) -> float | Tensor:
        """The standard deviation at this step; 0-d, with a gradient, of a learned one whose parameter is `raw`."""
        return self.now / self._over if raw is None else F.softplus(raw) / self._over


def _learned(text: str) -> float | None:
    """The initial value in `"learned"` or `"learned(0.3)"`; None if the text is neither."""
    if not text.strip().startswith("learned"):
        return None
    found = re.fullmatch(r"\s*learned\s*(?:\((.*)\))?\s*", text)
    try:
        start = math.nan if found is None else float(found[1] or 0.3)
    except ValueError:
        start = math.nan
    if not (start > 0 and math.isfinite(start)):
        raise ValueError(f"noise must be learned or learned(VALUE) with a value above 0, got {text!r}")
    return start
