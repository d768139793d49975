"""What a router chose for the first tokens of a text, kept for the token viewer: a few numbers a token, no logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Choices", "Keeper"]


@dataclass(frozen=True)
class Choices:
    """Of T tokens, in the order of the text, on the CPU.

    Attributes:
        experts_TK: (T, K) int16, the model's own, the heaviest first.
        weights_TK: (T, K) float32, what the model multiplies these experts' outputs with.
        scores_TK: (T, K) float32, the gate's scores of these experts; None where the rule is not understood.
        balanced_TK: (T, K) int16, what the audit's `balanced` chooses, the best score first; None as well.
        balanced_scores_TK: (T, K) float32, their scores; None as well.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    scores_TK: Tensor | None = None
    balanced_TK: Tensor | None = None
    balanced_scores_TK: Tensor | None = None

    @property
    def moved_T(self) -> Tensor:
        """(T,) bool: whether balanced routing gives the token another set of experts."""
        if self.balanced_TK is None:
            return torch.zeros(len(self.experts_TK), dtype=torch.bool)
        return (self.experts_TK.sort(-1).values != self.balanced_TK.sort(-1).values).any(-1)


class Keeper:
    """Takes the choices of one layer batch by batch, and keeps those of the first `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens
        self._parts: list[Choices] = []

    def add(
        self,
        experts_TK: Tensor,
        weights_TK: Tensor,
        scores_TE: Tensor | None = None,
        balanced_TK: Tensor | None = None,
    ) -> None:
        """Keep what there is room for; `balanced_TK` comes with the scores."""
        taken = min(self.left, len(experts_TK))
        if not taken:
            return
        self.left -= taken
        experts_TK, weights_TK = _ordered(experts_TK[:taken], weights_TK[:taken].float())
        part = [_small(experts_TK), weights_TK.cpu()]
        if scores_TE is not None and balanced_TK is not None:
            scores_TE, balanced_TK = scores_TE[:taken].float(), balanced_TK[:taken]
            balanced_TK, theirs_TK = _ordered(balanced_TK, scores_TE.gather(-1, balanced_TK))
            part += [scores_TE.gather(-1, experts_TK).cpu(), _small(balanced_TK), theirs_TK.cpu()]
        self._parts.append(Choices(*part))

    def choices(self) -> Choices | None:
        """None where nothing was kept, or where the number of experts per token is not always the same."""
        parts = self._parts
        if not parts or len({part.experts_TK.shape[-1] for part in parts}) > 1:
            return None
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Choices(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _ordered(experts_TK: Tensor, values_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each token first; among equals the expert with the lower number."""
    order_TK = experts_TK.argsort(-1)
    experts_TK, values_TK = experts_TK.gather(-1, order_TK), values_TK.gather(-1, order_TK)
    order_TK = values_TK.argsort(dim=-1, descending=True, stable=True)
    return experts_TK.gather(-1, order_TK), values_TK.gather(-1, order_TK)


def _small(experts_TK: Tensor) -> Tensor:
    return experts_TK.to(torch.int16).cpu()
