"""Loads into their bounds: how far one may be from its target, and the choice repaired until all are as near."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sinkroute.kernels.choose import Choice
from sinkroute.kernels.repair import repair
from sinkroute.transport.problem import Problem

__all__ = ["bounds", "into_bounds", "one_sided", "repaired", "within"]


def bounds(target_E: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest load (E,) int64 within tol of the target, which never exclude the target rounded."""
    # What float32 masses make of a whole number is meant to be that number. In all it is less than one choice, or no
    # loads within the bounds might have the right sum.
    rounding = (1e-7 * target_E).clamp(max=0.1 / len(target_E))
    lower_E = torch.minimum(((1 - tol) * target_E - rounding).ceil(), (target_E + rounding).floor())
    upper_E = torch.maximum(((1 + tol) * target_E + rounding).floor(), (target_E - rounding).ceil())
    return lower_E.clamp(min=0).long(), upper_E.clamp(max=2**53).long()  # whatever tol is


def within(loads_E: Tensor, lower_E: Tensor, upper_E: Tensor) -> bool:
    """Whether all loads are within the bounds."""
    return bool(((lower_E <= loads_E) & (loads_E <= upper_E)).all())


def one_sided(centred_E: Tensor, target_E: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Those of `bounds` in which slack raises the sum, for a bias of mean 0.

    A load above its target raises the sum where the price is low, as all want the expert, and one below where it is
    high.
    """
    lower_E, upper_E = bounds(target_E, tol)
    floor_E, ceiling_E = bounds(target_E, 0)
    wanted_E = centred_E < 0
    return torch.where(wanted_E, floor_E, lower_E), torch.where(wanted_E, upper_E, ceiling_E)


def into_bounds(problem: Problem, choice: Choice, target_E: Tensor, tol: float) -> tuple[Choice, int]:
    """The choice with every load within tol of its target, and the moves that took; an error where none can be."""
    lower_E, upper_E = bounds(target_E, tol)
    # To whole numbers, the best of them, where no other loads are allowed.
    rounds = bool((upper_E > lower_E).any() & (upper_E - lower_E <= 1).all())
    # The repair may leave a target where that raises the sum, and elsewhere only if too much is forbidden otherwise.
    choice, moves = repaired(problem, choice, *one_sided(problem.centre(choice.bias_E), target_E, tol), rounds)
    if not within(choice.loads_E, lower_E, upper_E):
        choice, more = repaired(problem, choice, lower_E, upper_E, rounds)
        moves += more
    above_E = choice.loads_E - upper_E
    if (above_E > 0).any():
        worst = int(above_E.argmax())
        raise ValueError(
            f"tol={tol} cannot be kept: expert {worst} has a load of {int(choice.loads_E[worst])} and may have "
            f"{int(upper_E[worst])}, but its tokens are allowed (logits above −inf) no expert with room; raise tol "
            "or expert_mass, or allow more"
        )
    return choice, moves


def repaired(problem: Problem, choice: Choice, lower_E: Tensor, upper_E: Tensor, rounds: bool) -> tuple[Choice, int]:
    """The choice with its loads inside the bounds, as far as possible, and the moves that took."""
    if within(choice.loads_E, lower_E, upper_E) and not rounds:
        return choice, 0
    # The repair goes from token to token, which is nothing for an accelerator.
    mask, device = problem.token_mask, choice.bias_E.device
    here = replace(problem, logits_TE=problem.logits_TE.cpu(), token_mask=None if mask is None else mask.cpu())
    changed = Choice(*(x.cpu() for x in choice))._replace(bias_E=choice.bias_E.cpu().double())
    moves = repair(here, changed, lower_E.cpu(), upper_E.cpu(), rounds=rounds)
    bias_E = changed.bias_E.to(choice.bias_E.dtype)
    return Choice(*(x.to(device) for x in changed._replace(bias_E=bias_E))), moves
