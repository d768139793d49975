"""What the operations read: rows of logits, the cost that is made of them, and which rows count for how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["COSTS", "Rows", "wide_dtype", "working_dtype"]

# Two buffers of this many numbers: 1 MB in float32, 2 MB in float64.
NUMBERS_PER_CHUNK = 1 << 17
ALL = slice(None)

R = TypeVar("R", bound="Rows")


def _softmax_cost(logits_TE: Tensor) -> Tensor:
    # The softmax of −inf is 0, a cost like another; a forbidden expert has to stay forbidden.
    return logits_TE.softmax(dim=1).masked_fill(logits_TE == -math.inf, -math.inf)


COSTS: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda logits_TE: logits_TE, "softmax": _softmax_cost}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What plans and weights are made of: float64 for float64 logits, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What potentials and sums are made of: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of logits and what they count for. Kernels read its tensors: all are plain memory (`storage.plain`).

    Attributes:
        logits_TE: (T, E) of any floating-point dtype, not copied: rows without mass may hold anything.
        cost: a name of `COSTS`.
        token_mask: (T,) bool, True = real token with mass; None when all are.
        token_mass: (T,) of the working dtype, 0 for masked tokens; None when all real tokens have mass 1.
    """

    logits_TE: Tensor
    cost: str = "linear"
    token_mask: Tensor | None = None
    token_mass: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype of these logits."""
        return working_dtype(self.logits_TE.dtype)

    def cost_TE(self, part: slice = ALL) -> Tensor:
        """C of all rows, or of a part, in the working dtype; rows of masked tokens from logits of 0.

        >>> Rows(torch.tensor([[1.0, 1.0], [5.0, 2.0]]), "softmax").cost_TE(slice(0, 1)).tolist()
        [[0.5, 0.5]]
        """
        clean_RE = self.logits_TE[part].to(self.dtype)
        if self.token_mask is not None:
            # NaN in a masked row must not reach any arithmetic: 0 · NaN is NaN, in values and in gradients.
            clean_RE = torch.where(self.token_mask[part, None], clean_RE, 0)
        return COSTS[self.cost](clean_RE)

    def every(self: R, step: int) -> R:
        """The same on every `step`-th row, without copying."""
        mask_T, mass_T = (None if x is None else x[::step] for x in (self.token_mask, self.token_mass))
        return replace(self, logits_TE=self.logits_TE[::step], token_mask=mask_T, token_mass=mass_T)

    def count(self) -> int:
        """How many of the tokens are real."""
        return len(self.logits_TE) if self.token_mask is None else int(self.token_mask.sum())

    def parts(self) -> Iterator[slice]:
        """The rows in slices of about `NUMBERS_PER_CHUNK` logits, whose temporaries stay in cache."""
        tokens, experts = self.logits_TE.shape
        rows = max(1, NUMBERS_PER_CHUNK // experts)
        return (slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows))
