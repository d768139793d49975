"""The importance loss: all experts should get the same total score (Riquelme et al., arXiv 2106.05974, appendix A.2).

    importance_j = Σ_i s_ij
    loss = coefficient · CV(importance)² = coefficient · (std_j importance_j / mean_j importance_j)²

It is 0 at perfect balance and E − 1 where one expert has all. Shazeer et al. (arXiv 1701.06538, section 4) sum the
weights of the chosen experts instead of all scores; that is part of the "noisy" router.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.routing.losses.inputs import mean_scores
from sinkroute.routing.scores import Score

__all__ = ["cv_squared", "importance_loss"]


def importance_loss(logits_TE: Tensor, token_mask: Tensor | None = None, score: Score = "softmax") -> Tensor:
    """The squared coefficient of variation of the experts' total scores over the real tokens, without coefficient.

    Args:
        logits_TE: (T, E) logits.
        token_mask: (T,) bool, True for real tokens. 0 (with a gradient of 0) if there is none.
        score: "softmax", or "sigmoid" (over the sum of a token's sigmoids).

    >>> round(importance_loss(torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()).item(), 6)  # 3/4 against 1/4
    0.25
    """
    return cv_squared(mean_scores(logits_TE, token_mask, score))


def cv_squared(amount_E: Tensor) -> Tensor:
    """Variance over squared mean of (E,) amounts of 0 or more; 0 (with a gradient of 0) if all are 0.

    >>> cv_squared(torch.tensor([2.0, 0.0, 0.0, 2.0])).item()
    1.0
    """
    # As shares of the sum: a square of small amounts could underflow. E² · mean (share − 1/E)².
    share_E = amount_E / amount_E.sum().clamp(min=torch.finfo(amount_E.dtype).tiny)
    return len(share_E) * ((share_E - share_E.mean()) ** 2).sum()
