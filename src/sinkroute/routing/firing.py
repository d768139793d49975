"""Which training steps are routed by a plan: a share p of them, or as many as the gate's imbalance asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinkroute.routing.adaptive import Adaptive
from sinkroute.routing.metrics import max_violation
from sinkroute.routing.schedules import Schedule, check_bounds, make_schedule
from sinkroute.routing.state import RouterState

__all__ = ["Firing", "PlanCount", "ProbabilityLike"]

# What the option takes.
ProbabilityLike = float | str | Schedule | Adaptive | Callable[[int], float]


class Firing:
    """p of every step.

    Args:
        probability: a number, a schedule or its text, a function of the step, or an `Adaptive` rule or its text.

    Attributes:
        rule: the adaptive rule, or None.
        schedule: p by the step, where there is no rule.

    >>> Firing("linear(0.5, 0.1, 4)").probability(2, None, None)
    0.3
    """

    def __init__(self, probability: ProbabilityLike) -> None:
        self.rule: Adaptive | None = None
        self.schedule: Schedule | None = None
        if isinstance(probability, Adaptive):
            self.rule = probability
        elif isinstance(probability, str) and probability.strip().startswith("adaptive"):
            self.rule = Adaptive.parse(probability)
        else:
            self.schedule = make_schedule("probability", probability, most=1)
        self._measured: tuple[float, bool] | None = None

    def state_values(self) -> dict[str, Tensor]:
        """What a rule remembers, at first: the moving average of MaxVio (−1: there is none), and whether it fires."""
        if self.rule is None:
            return {}
        return {"max_vio": torch.tensor(-1.0, device="cpu"), "firing": torch.tensor(0.0, device="cpu")}

    def check(self, step: int, total_steps: int | None) -> None:
        """Refuse a step whose p is not known or no share.

        Raises:
            ValueError: a schedule that is not told how long the training is, or leaves its bounds.
        """
        if self.schedule is not None:
            check_bounds("probability", self.schedule(step, total_steps), 0, 1)

    def probability(self, step: int, total_steps: int | None, state: RouterState | None) -> float:
        """p of this step; of a rule, by what `state` holds."""
        if self.schedule is not None:
            return self.schedule(step, total_steps)
        assert self.rule is not None and state is not None
        return self.rule.rate(self.measured(state)[1])

    def learn(self, gate_load_E: Tensor, state: RouterState) -> None:
        """A step is over, in which the gate's own top-k gave this load (of the whole batch)."""
        assert self.rule is not None
        tokens, max_vio = torch.stack([gate_load_E.sum(), max_violation(gate_load_E)]).tolist()
        if tokens == 0:  # in the whole batch: nothing was measured
            return
        average, firing = self.measured(state)
        # Rounded as it is saved, or a resumed run would go on with another number.
        average = torch.tensor(self.rule.average(average, max_vio), dtype=torch.float32, device="cpu").item()
        self._measured = (average, self.rule.fires(average, firing))
        state.max_vio.fill_(self._measured[0])
        state.firing.fill_(self._measured[1])

    def measured(self, state: RouterState) -> tuple[float, bool]:
        """The moving average of MaxVio, and whether Sinkhorn steps are being fired. A device is asked once."""
        if self._measured is None:
            if state.firing.is_meta:  # there is no value yet
                return -1.0, False
            self._measured = (float(state.max_vio), float(state.firing) > 0.5)
        return self._measured

    def forget(self) -> None:
        """The state was loaded: what was read off it is no longer so."""
        self._measured = None


class PlanCount:
    """How many steps could have had a plan, and how many had one, since the router was made or patched in.

    Args:
        cure: what to do about a router that makes none.

    Attributes:
        due: steps at which a plan had a chance, or was waited for.
        made: steps with a plan.

    >>> count = PlanCount("wait longer")
    >>> for step in (0, 0, 1):  # two micro-batches and the next step
    ...     count.expect(step)
    >>> count.note(1)
    >>> count.due, count.made
    (2, 1)
    """

    def __init__(self, cure: str) -> None:
        self.cure, self.warned = cure, False
        self.due = self.made = 0
        self._due_at = self._made_at = -1

    def expect(self, step: int) -> None:
        """A step may have a plan."""
        self.due += step != self._due_at
        self._due_at = step

    def note(self, step: int) -> None:
        """A training pass has made a plan."""
        self.made += step != self._made_at
        self._made_at = step
