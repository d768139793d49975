"""The ranks of a framework's routers, found where it keeps them when somebody asks: they may be made after the patch.

Looked at once a step, as routers tell steps apart; all ranks look in the same step, since it may make a group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from sinkroute.routing.clock import Clock
from sinkroute.routing.ranks import Ranks, RouterRanks

__all__ = ["Layout", "Spread", "UnknownLayout", "require_distinct"]


class UnknownLayout(ValueError):
    """Which ranks hold the same tokens cannot be told."""


class Spread(Protocol):
    """How a model is spread over the ranks."""

    def others(self) -> Any:
        """The group of the ranks with other tokens, this one included; None: all hold the same."""

    def named(self, name: str) -> Any:
        """The group of this name (ValueError: there is none, or its ranks hold the same tokens)."""

    def require_others(self, group: Any) -> None:
        """Refuse a group in which tokens would count several times (ValueError)."""


class Layout:
    """Whose tokens the routers of a model plan, count and draw for.

    Args:
        look: finds how the model is spread; None: no more is known than that ranks are those of data parallelism. It
            may raise `UnknownLayout`, which a group that was given overrules.
        clock: of one of the routers.
        given: their option.
    """

    def __init__(self, look: Callable[[], Spread | None], clock: Clock, given: Ranks) -> None:
        self._look, self._clock, self._given = look, clock, given
        self._key: tuple[int, bool, int] | None = None
        self._spread: Spread | None = None
        self._groups: dict[str, Any] = {}

    def ranks(self) -> RouterRanks:
        """For all of the routers."""
        given, others = self._given, _Found(self._others, self._given)
        plan = given if given == Ranks(None) else others if given == Ranks("world") else _Found(self._planned, given)
        return RouterRanks(plan, others, others)

    def forget(self) -> None:
        """Have the next that asks look again, in the same step too."""
        self._key = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_key": None, "_spread": None, "_groups": {}}  # groups cannot be copied

    def _seen(self) -> Spread | None:
        if self._spread is None:
            self._spread = self._look()
        return self._spread

    def _cached(self, what: str, find: Callable[[], Any]) -> Any:
        key = (self._clock.step, self._clock.told, dist.get_world_size())
        if key != self._key:
            self._key, self._spread = key, None
            self._groups.clear()
        if what not in self._groups:
            self._groups[what] = find()
        return self._groups[what]

    def _others(self) -> Any:
        return self._cached("others", lambda: self._find(self._choose_others))

    def _planned(self) -> Any:
        return self._cached("planned", lambda: self._find(self._choose_planned))

    def _find(self, choose: Callable[[Spread | None, Any], Any]) -> Any:
        """What `choose` takes of the layout and the group that was given; of an unknown layout, that group."""
        group = _group_of(self._given)
        try:
            spread = self._seen()
        except UnknownLayout:
            if group is None:
                raise
            return group
        return choose(spread, group)

    def _choose_others(self, spread: Spread | None, group: Any) -> Any:
        return (group or dist.group.WORLD) if spread is None else spread.others()

    def _choose_planned(self, spread: Spread | None, group: Any) -> Any:
        if spread is None:
            return self._given.group  # refuses a name
        if group is None:
            return spread.named(str(self._given.name))
        spread.require_others(group)
        return group


class _Found(Ranks):
    """Ranks whose group is asked for each time. Equal to itself only: those of another model may be others."""

    def __init__(self, find: Callable[[], Any], given: Ranks) -> None:
        super().__init__(given)
        self._find = find

    @property
    def name(self) -> str | None:
        return None

    def _known(self) -> Any:
        return self._find() if dist.is_available() and dist.is_initialized() else None

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Found:
        return _Found(
            copy.deepcopy(self._find, memo), Ranks(self._group)
        )  # a copy of the model may be spread otherwise


def require_distinct(group: Any, same: list[int], what: str) -> None:
    """Refuse a group with several of the ranks that hold the same tokens.

    Args:
        group: that was given for the plan.
        same: all ranks that hold this one's tokens.
        what: how the model is spread, and the cure.

    Raises:
        ValueError: it has.
    """
    if len(twice := sorted({*dist.get_process_group_ranks(group)} & {*same})) > 1:
        raise ValueError(f"process_group has ranks {twice}, which hold the same tokens, as {what}")


def _group_of(ranks: Ranks) -> Any:
    """The `ProcessGroup` that was given, or None."""
    return None if isinstance(ranks._group, (str, type(None))) else ranks._group
