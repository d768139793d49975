"""From gating logits to scores, choices and weights: what families of models do differently.

    softmax    s = softmax(z) over the experts         (Mixtral, OLMoE, Qwen, DeepSeek-V2; GPT-OSS after its top-k)
    sigmoid    s = sigmoid(z), each expert by itself   (DeepSeek-V3, Llama 4, GLM-4)
    sqrtsoftplus    s = √log(1 + eᶻ), each by itself   (DeepSeek-V4)

Group-limited choice (DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2):
experts stand in groups, a token first chooses groups, then experts in them only, so that it visits few machines.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkroute.kernels.storage import readable
from sinkroute.kernels.topk import topk

__all__ = ["GroupScore", "Score", "best_first", "limit_to_groups", "log_scores", "scores", "weigh", "weigh_chosen"]

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["max", "top2-sum"]


def scores(logits_TE: Tensor, score: Score) -> Tensor:
    """(T, E) scores of 0 or more; those of softmax and sigmoid are 1 at most.

    >>> scores(torch.zeros(1, 4), "softmax").tolist(), scores(torch.zeros(1, 2), "sigmoid").tolist()
    ([[0.25, 0.25, 0.25, 0.25]], [[0.5, 0.5]])
    """
    if score == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    return torch.sigmoid(logits_TE) if score == "sigmoid" else F.softplus(logits_TE).sqrt()


def log_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """The logarithms of scores, up to a constant per token: their softmax is the scores over a token's sum.

    Where all scores of a token underflow, the scores themselves would give 0/0.

    >>> log_scores(torch.tensor([[-200.0, -201.0]]), "sqrtsoftplus").tolist()
    [[-100.0, -100.5]]
    """
    if score == "softmax":
        return logits_TE
    if score == "sigmoid":
        return F.logsigmoid(logits_TE)
    # log(1 + eᶻ) is eᶻ to a float32's precision below −17. Both sides finite, or one's gradient would be 0 · ∞.
    return 0.5 * torch.where(logits_TE < -17, logits_TE, F.softplus(logits_TE.clamp(min=-17)).log())


def weigh(logits_TE: Tensor, experts_TK: Tensor, score: Score, normalise: bool) -> Tensor:
    """Scores of the chosen experts, (T, K); `normalise`: over the sum of the chosen ones.

    >>> weigh(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0]]), "softmax", normalise=False).tolist()
    [[0.75]]
    """
    chosen_TK = logits_TE.gather(-1, experts_TK)
    if score == "softmax" and not normalise:
        return torch.exp(chosen_TK - torch.logsumexp(logits_TE, dim=-1, keepdim=True))
    return weigh_chosen(chosen_TK, score, normalise)


def weigh_chosen(chosen_TK: Tensor, score: Score, normalise: bool) -> Tensor:
    """`weigh` where the logits of the chosen experts say all: of a softmax, the scores only if renormalised."""
    if normalise:
        # The softmax over the chosen is the full softmax renormalised over them, in one step and without 0/0; so is
        # that of the logarithms for the other scores.
        log_scores_TK = log_scores(chosen_TK, score)
        if chosen_TK.device.type != "cpu":
            return torch.softmax(log_scores_TK, dim=-1)
        # Of K numbers at a time a CPU's vectors are mostly empty; across tokens they are full, 2 to 4 times as fast.
        return torch.softmax(log_scores_TK.t(), dim=0).t().contiguous()
    return scores(chosen_TK, score)


def best_first(experts_TK: Tensor, values_TE: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """A token's experts by descending value, + bias where there is one; of equal ones the lower first.

    >>> best_first(torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, 3.0, 3.0]])).tolist()
    [[1, 2, 0]]
    """
    if experts_TK.device.type != "cpu" or not readable(experts_TK, values_TE, bias_E):
        return _sorted_by(experts_TK, values_TE, bias_E)
    if experts_TK.shape[1] == 1:
        return experts_TK
    # Most are in order where they come from a top-k, and to see that takes a fraction of two sorts.
    first_TK, then_TK = experts_TK[:, :-1], experts_TK[:, 1:]
    value_TK = _values_of(experts_TK, values_TE, bias_E)
    value_first_TK, value_then_TK = value_TK[:, :-1], value_TK[:, 1:]
    right_TK = (value_first_TK > value_then_TK) | ((value_first_TK == value_then_TK) & (first_TK < then_TK))
    wrong_R = (~right_TK.all(1)).nonzero()[:, 0]
    if not len(wrong_R):
        return experts_TK
    experts_TK = experts_TK.clone()
    experts_TK[wrong_R] = _sorted_by(experts_TK[wrong_R], values_TE[wrong_R], bias_E)
    return experts_TK


def _sorted_by(experts_TK: Tensor, values_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    experts_TK = experts_TK.sort(dim=1).values
    order_TK = _values_of(experts_TK, values_TE, bias_E).argsort(dim=1, descending=True, stable=True)
    return experts_TK.gather(1, order_TK)


def _values_of(experts_TK: Tensor, values_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    value_TK = values_TE.gather(1, experts_TK)
    return value_TK if bias_E is None else value_TK + bias_E[experts_TK]


def limit_to_groups(
    selection_TE: Tensor, groups: int, top_groups: int, group_score: GroupScore, ties: Tensor | None = None
) -> Tensor:
    """`selection_TE` with −inf outside each token's best groups; of equal groups the lower is better.

    Args:
        selection_TE: (T, E), what experts are chosen by; group g holds experts g·E/groups to (g+1)·E/groups − 1.
        groups: into which the experts are divided; divides E.
        top_groups: how many a token may choose from.
        group_score: a group is as good as its best expert (`"max"`, DeepSeek-V2) or its best two together
            (`"top2-sum"`, DeepSeek-V3).
        ties: of equal groups the order is drawn, by this seed; see `topk`.

    >>> limit_to_groups(torch.tensor([[4.0, 0.0, 3.0, 3.0]]), 2, 1, "top2-sum").tolist()
    [[-inf, -inf, 3.0, 3.0]]
    """
    grouped_TGe = selection_TE.detach().unflatten(-1, (groups, -1))
    if group_score == "max":
        value_TG = grouped_TGe.amax(-1)
    else:
        value_TG = grouped_TGe.topk(min(2, grouped_TGe.shape[-1]), dim=-1).values.sum(-1)
    best_TG = topk(value_TG, top_groups, ties)
    allowed_TG = torch.zeros_like(value_TG, dtype=torch.bool).scatter_(-1, best_TG, True)
    allowed_TE = allowed_TG.repeat_interleave(selection_TE.shape[-1] // groups, dim=-1)
    return selection_TE.masked_fill(~allowed_TE, float("-inf"))
