"""What a method says of itself, for the list of all."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Balances", "Card"]

Balances = Literal["no", "plans", "partly", "yes", "exact"]


class Card(NamedTuple):
    """What a method is for, and what it costs.

    Attributes:
        training: whether loads are even in training: "no"; on its "plans", which are some of the steps; "partly";
            "yes"; or "exact", in every micro-batch.
        serving: and in `eval()`, if it was trained so.
        work: of a training pass, in words.
    """

    training: Balances
    serving: Balances
    work: str
