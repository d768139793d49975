"""What auxiliary losses are functions of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.scores import Score, log_scores

__all__ = ["LossInputs", "mean_scores"]


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch on one rank.

    Attributes:
        logits_TE: (T, E) float32 or float64, 0 where masked.
        experts_TK: (T, K) int64, the choices, best first.
        chosen_TK: (T, K) bool, False for places of `experts_TK` that are no choice (padding among them); None: all are.
        load_E: (E,) int64, choices of real tokens.
        token_mask: (T,) bool, True for real tokens, or None.
        score: what the model makes of logits.
        batch_load: the load over all ranks and the micro-batches of this step up to this one; a collective call.
    """

    logits_TE: Tensor
    experts_TK: Tensor
    chosen_TK: Tensor | None
    load_E: Tensor
    token_mask: Tensor | None
    score: Score
    batch_load: Callable[[], Tensor]


def mean_scores(logits_TE: Tensor, token_mask: Tensor | None, score: Score = "softmax") -> Tensor:
    """P: (E,) mean over the real tokens of their scores over a token's sum of them.

    >>> mean_scores(torch.zeros(3, 4), None).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return mean_over_tokens(torch.softmax(log_scores(logits_TE, score), dim=-1), token_mask)
