"""Quantile balancing: a bias that would have balanced the last batch (Megatron-Core PRs #5349 and #6637).

Of scores s, a bias b and K experts per token, choose by s + b, weigh by s, and after each step set

    α_t = the (K+1)-th largest of s_t + b            what token t's choices had to beat
    b_j ← such a number that s_tj + b_j > α_t for T·K/E tokens: minus a quantile over t of s_tj − α_t

and centre b. α and b are the potentials of the assignment's linear program, and this is one step of coordinate descent
on its dual; it has no rate, unlike the ±u of loss-free balancing. The bias chooses in `eval()` too, without changing.

Over micro-batches and ranks, as published:

    scope="micro-batch" (#5349)   s are the logits. The exact quantile in every micro-batch of every rank, and the mean
                                  of these over the step.
    scope="batch" (#6637)         s are the sigmoids of the logits. The quantile of the step's whole batch, by counts in
                                  1000 equal bins from min b − 1 to max b + 1 and a straight line within a bin; the
                                  counts are summed over micro-batches and ranks. From the technical report of Kimi K3,
                                  section 2.3.3; torchtitan's form, too (#4577, merged after 0.3.0).

Beyond the published: T·K/E need not be whole (a straight line between two order statistics), tokens may be masked, and
a micro-batch without real tokens takes no part in the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sinkroute.routing.beside import checked_mask
from sinkroute.routing.card import Card
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.serving import Serving
from sinkroute.routing.state import RouterState

__all__ = ["QuantileRouter"]

Scope = Literal["micro-batch", "batch"]

_BINS = 1000


class QuantileRouter(Router):
    """Top-k of score + bias, the bias set once per step to what would have balanced the step's batch. Without groups.

    Attributes:
        state: holds `bias_E` (E,) float32.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("quantile", num_experts=2, top_k=1)
    >>> sinkroute.set_step(router, 0)
    >>> logits_TE = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    >>> router(logits_TE).load.tolist()
    [4, 0]
    >>> sinkroute.end_step(router)
    >>> router.state.bias_E.tolist()
    [-1.0, 1.0]
    """

    card = Card("yes", "yes", "top-k, and a quantile of every expert's scores")
    needs_step = True
    keeps_groups = False
    state: RouterState

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        scope: Scope = option(
            "micro-batch",
            'whose quantile: the mean of those of every "micro-batch" on every rank, or that of the whole "batch", '
            'which takes score="sigmoid"',
        )
        ema: float = option(
            0.0, "how much of the old bias stays: b ← ema · b + (1 − ema) · new", least=0, below=1, published=True
        )

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        if self.scope == "batch" and self.score != "sigmoid":
            raise ValueError(
                f'scope="batch" counts scores from 0 to 1, each by itself, got score={self.score!r}; '
                'take score="sigmoid", or scope="micro-batch"'
            )
        sums = (
            {"quantile_sum": num_experts, "passes": 1}
            if self.scope == "micro-batch"
            else {"counts": num_experts * _BINS}
        )
        self.state = RouterState(num_experts, sums=sums, bias_E=torch.zeros(num_experts, device="cpu"))

    def choice_bias(self) -> Serving:
        return Serving(self.state.bias_E, "logits" if self.scope == "micro-batch" else "scores")

    def _scores(self, logits_TE: Tensor) -> Tensor:
        logits_TE = logits_TE.detach()
        return logits_TE if self.scope == "micro-batch" else torch.sigmoid(logits_TE)

    @torch.no_grad()
    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        if self.top_k == self.num_experts or not len(logits_TE):  # every token has every expert, or there is none
            return {}
        scores_TE = self._scores(logits_TE)
        biased_TE = scores_TE + self.state.bias_E.to(scores_TE.dtype)
        beaten_T1 = biased_TE.topk(self.top_k + 1, dim=1).values[:, -1:]
        needed_TE = beaten_T1 - scores_TE  # the bias with which the expert would draw level
        if self.scope == "batch":
            return {"counts": self._bin_counts(needed_TE, token_mask)}
        quantile_E = balancing_quantile(needed_TE, self.top_k / self.num_experts, token_mask)
        known = quantile_E.isfinite().all()  # not without a real token
        return {"quantile_sum": torch.where(known, quantile_E.double(), 0.0), "passes": known.double().view(1)}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        old_E = self.state.bias_E.double()
        if self.scope == "micro-batch":
            known = sums["passes"] > 0
            new_E = sums["quantile_sum"] / sums["passes"].clamp(min=1)
        else:
            counts_EB = sums["counts"].view(self.num_experts, _BINS)
            known = counts_EB.sum() > 0
            low, width = self._bins()
            new_E = low + width * quantile_of_counts(counts_EB, self.top_k / self.num_experts)
        new_E = torch.lerp(new_E, old_E, self.ema)
        self.state.bias_E.copy_(torch.where(known, new_E - new_E.mean(), old_E))

    # -- counts in bins ----------------------------------------------------------------------------------------------

    def _bins(self) -> tuple[Tensor, Tensor]:
        """Where the first bin begins and how wide bins are: with scores in [0, 1], no needed bias is outside."""
        bias_E = self.state.bias_E.double()
        low, high = bias_E.min() - 1, bias_E.max() + 1
        return low, (high - low) / _BINS

    def _bin_counts(self, needed_TE: Tensor, token_mask: Tensor | None) -> Tensor:
        low, width = self._bins()
        bins_TE = ((needed_TE.double() - low) / width).floor().clamp(0, _BINS - 1).long()
        bins_TE += _BINS * torch.arange(self.num_experts, device=bins_TE.device)
        ones_TE = torch.ones_like(needed_TE) if token_mask is None else token_mask[:, None].expand_as(needed_TE)
        counts = torch.zeros(self.num_experts * _BINS, dtype=torch.float64, device=bins_TE.device)
        return counts.scatter_add_(0, bins_TE.flatten(), ones_TE.double().flatten())


def balancing_quantile(needed_TE: Tensor, share: float, token_mask: Tensor | None) -> Tensor:
    """(E,) the bias above what exactly n = T · share tokens need: the (n+1)-th smallest of each column.

    Args:
        needed_TE: (T, E), T at least 1.
        share: of the tokens that an expert should get, K/E.
        token_mask: (T,) bool, True for real tokens. Without any the result is infinite.

    Between two numbers of tokens, a straight line between the order statistics.

    >>> needed_TE = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> balancing_quantile(needed_TE, 0.5, None).item(), balancing_quantile(needed_TE, 0.375, None).item()
    (5.0, 3.0)
    """
    tokens = len(needed_TE)
    token_mask = checked_mask(token_mask, needed_TE, (tokens,))
    rows = min(tokens, math.floor(tokens * share + 1e-9) + 2)
    if token_mask is None:
        real = torch.full((), tokens, dtype=torch.float64, device=needed_TE.device)
    else:
        needed_TE = needed_TE.masked_fill(~token_mask[:, None], math.inf)
        real = token_mask.sum().double()
    smallest_NE = needed_TE.topk(rows, dim=0, largest=False).values
    place = real * share
    below = (place + 1e-9).floor()  # K/E is rounded, a whole number of tokens must stay one
    last = (real - 1).clamp(min=0)
    lower_E, upper_E = (
        smallest_NE.gather(0, torch.minimum(row, last).long().expand(1, needed_TE.shape[1]))[0]
        for row in (below, below + 1)
    )
    between = torch.lerp(lower_E, upper_E, (place - below).clamp(min=0).to(lower_E.dtype))
    return torch.where(real > 0, between, math.inf)


def quantile_of_counts(counts_EB: Tensor, share: float) -> Tensor:
    """(E,) the quantile at `share` of what was counted in bins of width 1: a straight line within its bin.

    >>> quantile_of_counts(torch.tensor([[2.0, 4.0, 2.0], [8.0, 0.0, 0.0]]), 0.5).tolist()
    [1.5, 0.5]
    """
    target = counts_EB.sum(1, keepdim=True) * share
    upto_EB = counts_EB.cumsum(1)
    bin_E1 = (upto_EB < (target - 1e-9).ceil().clamp(min=1)).sum(1, keepdim=True).clamp(max=counts_EB.shape[1] - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    before_E1 = upto_EB.gather(1, bin_E1) - inside_E1
    return (bin_E1 + ((target - before_E1) / inside_E1.clamp(min=1)).clamp(0, 1)).squeeze(1)
