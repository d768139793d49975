"""Auxiliary losses by name. A new loss is one file and one line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from sinkroute._errors import require_numbers, unknown_name
from sinkroute.routing.losses.global_load_balance import global_load_balance_loss
from sinkroute.routing.losses.gshard import gshard_loss
from sinkroute.routing.losses.importance import importance_loss
from sinkroute.routing.losses.inputs import LossInputs
from sinkroute.routing.losses.load_balance import load_balance_loss
from sinkroute.routing.losses.z_loss import z_loss

__all__ = ["LOSSES", "Loss", "LossesLike", "read_losses"]


class Loss(NamedTuple):
    """A loss without its coefficient (0-d; 0 with a gradient of 0 where no token is real), and the published one.

    `of_batch`: whether it asks for `batch_load`, a collective call, which all ranks have to make then.
    """

    function: Callable[[LossInputs], Tensor]
    coefficient: float
    of_batch: bool = False


LOSSES: dict[str, Loss] = {
    "load-balance": Loss(lambda i: load_balance_loss(i.logits_TE, i.load_E, i.token_mask, i.score), 0.01),
    "gshard": Loss(lambda i: gshard_loss(i.logits_TE, i.experts_TK, i.token_mask, i.score, i.chosen_TK), 0.01),
    "global-load-balance": Loss(global_load_balance_loss, 0.01, of_batch=True),
    "importance": Loss(lambda i: importance_loss(i.logits_TE, i.token_mask, i.score), 0.005),
    "z-loss": Loss(lambda i: z_loss(i.logits_TE, i.token_mask), 1e-3),
}

# What the option takes: names; names with coefficients; or, where there is only text, "z-loss, load-balance: 0.02".
LossesLike = str | Sequence[str] | Mapping[str, float]


def read_losses(losses: LossesLike) -> dict[str, float]:
    """The option as name → coefficient.

    Raises:
        TypeError: it is something else.
        ValueError: an unknown name, a coefficient that is negative or not finite.

    >>> read_losses(["z-loss"]), read_losses("z-loss: 0.01, load-balance")
    ({'z-loss': 0.001}, {'z-loss': 0.01, 'load-balance': 0.01})
    """
    if isinstance(losses, str):
        parts = [part.partition(":") for part in losses.split(",") if part.strip()]
        pairs = [(name.strip(), _number(name.strip(), text) if text else None) for name, _, text in parts]
    elif isinstance(losses, Mapping):
        pairs = list(losses.items())
    elif isinstance(losses, Sequence):
        pairs = [(name, None) for name in losses]
    else:
        raise TypeError(f'losses must be names, such as ["z-loss"], or name → coefficient, got {losses!r}')
    found = {}
    for name, coefficient in pairs:
        if name not in LOSSES:
            raise unknown_name("loss", name, LOSSES)
        published = LOSSES[name].coefficient
        value = published if coefficient is None else coefficient
        found[name] = check_coefficient(f"coefficient of {name}", value, published)
    return found


def check_coefficient(argument: str, coefficient: float, published: float) -> float:
    """`coefficient`, if it can be one; the message says what the published value is.

    Raises:
        TypeError, ValueError: it is no number, negative, or not finite.
    """
    require_numbers(**{argument: coefficient})
    if not (coefficient >= 0 and math.isfinite(coefficient)):
        raise ValueError(
            f"{argument} must be a finite number of 0 or more, got {coefficient}; {published:g} is the published value"
        )
    return coefficient


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"coefficient of {name} must be a number, got {text.strip()!r}") from None
