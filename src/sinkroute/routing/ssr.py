"""Selective Sinkhorn Routing (arXiv 2511.08972).

With probability p a training step is routed by the entropy-regularised transport plan with balanced experts: the K
largest entries of a token's row choose its experts and, renormalised, weigh them. Otherwise by softmax top-k, which is
what teaches the gate. Gaussian noise on the scores keeps every expert reachable. Serving is plain softmax top-k: no
plan, no noise, no loss.

    SSR-L: the transport cost is the scores.     SSR-S: the cost is their row softmax.

What the paper's public summaries leave open is an option here, marked "open", with a default and its reason.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sinkroute._errors import require_numbers, unknown_name
from sinkroute._uncompiled import uncompiled
from sinkroute.routing.router import Choice, Router
from sinkroute.transport import solve

__all__ = ["SSRLinearRouter", "SSRRouter", "SSRSoftmaxRouter"]

NoiseBranch = Literal["both", "softmax", "sinkhorn"]
NoiseScale = Literal["per-expert", "absolute"]
PlanGradient = Literal["none", "weights", "full"]
DrawScope = Literal["step", "layer"]


class SSRRouter(Router):
    """Softmax top-k, and now and then the transport plan.

    Args:
        reg: ξ, the entropy regularisation. None: 0.5 for SSR-L, 0.1 for SSR-S.
        probability: p, the share of training steps routed by the plan. The paper advises 0.001 to 0.01 for long runs.
        noise: α, the strength of the Gaussian noise in training; 0 turns it off. The paper's best lie about 0.3 to 1.
        noise_branch: open: which branch gets noise. Default both: a perplexity that is sensitive to α, as the paper's
            is, cannot come from noise on 0.1 % of the steps.
        noise_scale: open: `"per-expert"`, a standard deviation of α/E (the V-MoE convention, arXiv 2106.05974), or
            `"absolute"`, α itself, which for the softmax cost leaves little more than chance of a token's choice.
        plan_gradient: open: what the gate learns on Sinkhorn steps through the weights. `"none"`; `"weights"`, with the
            potentials held fixed; or `"full"`, by implicit differentiation of the plan. Default none: the softmax
            steps are said to keep the gradient flowing.
        draw: open: one draw per `"step"` for all layers, as "training steps" says, or per `"layer"` and micro-batch.
        tol: the relative column error at which the solver stops.
        max_passes: the solver's limit; None: its own.
        norm_topk, seed, layer: see `Router`.

    Raises:
        ValueError: a number out of range or an unknown choice.
    """

    cost: Literal["linear", "softmax"]
    default_reg: float

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        reg: float | None = None,
        probability: float = 1e-3,
        noise: float = 0.3,
        noise_branch: NoiseBranch = "both",
        noise_scale: NoiseScale = "per-expert",
        plan_gradient: PlanGradient = "none",
        draw: DrawScope = "step",
        tol: float = 1e-4,
        max_passes: int | None = None,
        norm_topk: bool | None = None,
        seed: int = 0,
        layer: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, norm_topk=norm_topk, seed=seed, layer=layer)
        reg = self.default_reg if reg is None else reg
        require_numbers(reg=reg, probability=probability, noise=noise)
        if not (reg > 0 and math.isfinite(reg)):
            raise ValueError(f"reg must be a finite number above 0, got {reg}; try 0.5 (ssr-l) or 0.1 (ssr-s)")
        if not 0 <= probability <= 1:
            raise ValueError(
                f"probability must be between 0 and 1, got {probability}; it is a share of the training steps"
            )
        if not (noise >= 0 and math.isfinite(noise)):
            raise ValueError(f"noise must be a finite number of 0 or more, got {noise}")
        for name, value, choices in (
            ("noise_branch", noise_branch, NoiseBranch),
            ("noise_scale", noise_scale, NoiseScale),
            ("plan_gradient", plan_gradient, PlanGradient),
            ("draw", draw, DrawScope),
        ):
            if value not in get_args(choices):
                raise unknown_name(name, value, get_args(choices))
        # No tokens: the solver only checks its numbers, now and not at the first step that needs a plan.
        solve(torch.empty(0, num_experts, device="cpu"), reg, tol=tol, max_passes=max_passes)
        self.reg, self.probability, self.tol, self.max_passes = reg, probability, tol, max_passes
        self.noise, self.noise_branch, self.plan_gradient, self.draw = noise, noise_branch, plan_gradient, draw
        self.noise_std = noise / num_experts if noise_scale == "per-expert" else noise

    def extra_repr(self) -> str:
        options = f"cost={self.cost}, reg={self.reg:g}, probability={self.probability:g}, noise={self.noise:g}"
        return f"{super().extra_repr()}, {options}"

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Choice:
        if self.draw_uniform("branch", per_layer=self.draw == "layer") < self.probability:
            return self.sinkhorn_topk(logits_TE, token_mask)
        return self.softmax_topk(self._noisy(logits_TE, "softmax"))

    @uncompiled  # the solver's loop ends when the data say so
    def sinkhorn_topk(self, logits_TE: Tensor, token_mask: Tensor | None) -> Choice:
        """Choose and weigh by the transport plan."""
        source_TE = logits_TE.detach() if self.plan_gradient == "none" else logits_TE
        cost_TE = torch.softmax(source_TE, dim=-1) if self.cost == "softmax" else source_TE
        cost_TE = self._noisy(cost_TE, "sinkhorn")
        # The cost is made here, so that the noise is on it; to the solver it is linear.
        solve_from_TE = cost_TE if self.plan_gradient == "full" else cost_TE.detach()
        plan = solve(
            solve_from_TE,
            self.reg,
            token_mask=token_mask,
            tol=self.tol,
            max_passes=self.max_passes,
            differentiable=self.plan_gradient == "full",
        )
        if self.plan_gradient == "weights":
            plan = replace(plan, scores=cost_TE)
        weights_TK, experts_TK = plan.topk(self.top_k, normalise=self.norm_topk)
        if self.plan_gradient == "none":
            # A gradient of 0 rather than none at all: data-parallel wrappers refuse a parameter that no loss reaches.
            weights_TK = weights_TK + 0 * logits_TE.gather(-1, experts_TK)
        return Choice(experts_TK, weights_TK, "sinkhorn", plan.column_error, plan.pass_count)

    def _noisy(self, scores_TE: Tensor, branch: str) -> Tensor:
        if self.noise_std == 0 or self.noise_branch not in ("both", branch):
            return scores_TE
        return scores_TE + self.noise_std * self.draw_normal("noise", scores_TE)


class SSRLinearRouter(SSRRouter):
    """SSR-L: the transport cost is the scores themselves. ξ is 0.5 unless told, where the paper's sweeps are."""

    cost, default_reg = "linear", 0.5


class SSRSoftmaxRouter(SSRRouter):
    """SSR-S: the transport cost is the row softmax of the scores, in [0, 1]. ξ is 0.1 unless told.

    Of ξ from 0.01 to 1 this leaves the top-k of the plan best balanced (unit-variance scores, 16 experts, top-2).
    """

    cost, default_reg = "softmax", 0.1
