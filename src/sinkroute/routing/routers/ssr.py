"""Selective Sinkhorn Routing (arXiv 2511.08972).

With probability p a training step is routed by the entropy-regularised transport plan with balanced experts: the K
largest entries of a token's row choose its experts and, renormalised, weigh them. Otherwise by softmax top-k, which is
what teaches the gate. Gaussian noise on the scores keeps every expert reachable. Serving is plain softmax top-k: no
plan, no noise, no loss.

    SSR-L: the transport cost is the logits.     SSR-S: the cost is their row softmax.

What the paper's public summaries leave open is an option here, marked "open", with a default and its reason.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sinkroute.kernels.operations import uncompiled
from sinkroute.kernels.topk import noisy_topk
from sinkroute.routing.adaptive import Adaptive
from sinkroute.routing.card import Card
from sinkroute.routing.firing import Firing, PlanCount, ProbabilityLike
from sinkroute.routing.noise import Noise, NoiseLike, NoiseScale
from sinkroute.routing.options import option
from sinkroute.routing.routers.plan import PlanRouter
from sinkroute.routing.routes import Routes
from sinkroute.routing.schedules import Constant, check_bounds
from sinkroute.routing.scores import weigh_chosen
from sinkroute.routing.serving import Serving
from sinkroute.routing.state import RouterState, recomputing

__all__ = ["Cost", "Inference", "SSRLinearRouter", "SSRRouter", "SSRSoftmaxRouter"]

Cost = Literal["linear", "softmax"]
NoiseBranch = Literal["both", "softmax", "sinkhorn"]
PlanGradient = Literal["none", "weights", "full"]
PlanWeights = Literal["plan", "scores"]
DrawScope = Literal["step", "layer"]
Inference = Literal["none", "noise", "sinkhorn", "both"]


class SSRRouter(PlanRouter):
    """Softmax top-k, and now and then the transport plan.

    With `process_group`, the plan is that of all its ranks' tokens, and so are loads after the top-k, where a member of
    the family balances these.
    """

    card = Card("plans", "no", "top-k; on a share p of the steps a plan")

    @dataclass(frozen=True, kw_only=True)
    class Options(PlanRouter.Options):
        reg: float | None = option(
            None,
            "ξ, the entropy regularisation. None: 0.5 for the linear cost, 0.1 for the softmax cost",
            above=0,
            hint="try 0.5 (ssr-l) or 0.1 (ssr-s)",
        )
        probability: ProbabilityLike = option(
            1e-3,
            "p, the share of training steps routed by the plan. The paper advises 0.001 to 0.01 for long runs. A "
            'number, a schedule (sinkroute.routing.schedules) such as "cosine(0.1, 0.001)", a function of the step, or '
            '"adaptive(high=..., low=..., floor=..., ceiling=...)": as the gate\'s imbalance asks for (Adaptive)',
        )
        noise: NoiseLike = option(
            0.3,
            "α, the strength of the Gaussian noise in training; 0 turns it off. The paper's best lie about 0.3 to 1. A "
            'number, a schedule, a function of the step, or "learned": softplus of a parameter, 0.3 at first '
            '("learned(1.0)": another value). A loss only ever wants less noise; weight decay pulls α to softplus(0) = '
            "0.69, so keep raw_noise out of it",
        )
        noise_branch: NoiseBranch = option(
            "both",
            "open: which branch gets noise. Default both: a perplexity that is sensitive to α, as the paper's is, "
            "cannot come from noise on 0.1 % of the steps",
        )
        noise_scale: NoiseScale = option(
            "per-expert",
            'open: "per-expert", a standard deviation of α/E (the V-MoE convention, arXiv 2106.05974), or "absolute", '
            "α itself, which for the softmax cost leaves little more than chance of a token's choice",
        )
        plan_gradient: PlanGradient = option(
            "none",
            'open: what the gate learns on Sinkhorn steps through the plan\'s weights. "none"; "weights", with the '
            'potentials held fixed; or "full", by implicit differentiation of the plan. Default none: the softmax '
            "steps are said to keep the gradient flowing",
        )
        weights: PlanWeights = option(
            "plan",
            '"plan", the paper\'s: the plan\'s entries weigh the experts on Sinkhorn steps. "scores": the plan chooses '
            "only, and the gate learns from its scores at those experts, as in S-BASE",
        )
        draw: DrawScope = option(
            "step", 'open: one draw per "step" for all layers, as "training steps" says, or per "layer" and micro-batch'
        )
        inference: Inference = option(
            "none",
            'what is done in eval(): "none", plain top-k, which the paper finds best; "noise"; "sinkhorn", the plan '
            'without noise; or "both"',
        )

    options: Options
    cost: Cost
    needs_step = True
    inference_modes: ClassVar[tuple[str, ...]] = get_args(Inference)
    sinkhorn_now = False

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        self.reg: float = self.default_reg() if self.options.reg is None else self.options.reg
        if self.weights == "scores" and self.plan_gradient != "none":
            raise ValueError(
                f'plan_gradient={self.plan_gradient!r} is of the plan\'s weights, and with weights="scores" there are '
                'none; give weights="plan", or leave plan_gradient out'
            )
        self.firing = Firing(self.probability)
        self.plan_count: PlanCount = PlanCount(
            f"probability={self.probability!r} is too small for a run of that length: take a larger one, such as 0.01, "
            "or a router that balances the steps between plans (ssr-dual, ssr-bias); where it is large, see that "
            "training passes reach the router; 0 says that there are to be none"
        )
        self._noise = Noise(self.noise, self.noise_scale, num_experts)
        self.raw_noise: nn.Parameter | None = None
        if self._noise.learned:
            with torch.inference_mode(False):  # it is to be trained, wherever the router is made
                self.raw_noise = nn.Parameter(torch.empty(()))
            self.reset_parameters()
        self.state = self.make_state()
        self.probability_now = 0.0
        self.register_load_state_dict_post_hook(_prepare_again)  # type: ignore[no-untyped-call]
        _prepare_again(self)

    def reset_parameters(self) -> None:
        """The first value of a noise that is learned. (What is remembered resets itself.)"""
        if self.raw_noise is not None:
            nn.init.constant_(self.raw_noise, self._noise.first_raw())

    def extra_repr(self) -> str:
        probability = self.probability if isinstance(self.probability, (str, Adaptive)) else self.firing.schedule
        shown = [f"cost={self.cost}", f"reg={self.reg:g}"]
        for name, value in (("probability", probability), ("noise", self._noise.schedule)):
            shown.append(f"{name}={value.value:g}" if isinstance(value, Constant) else f"{name}={value}")
        return f"{super().extra_repr()}, {', '.join(shown)}"

    def make_state(self) -> RouterState | None:
        """For what this method remembers, or None."""
        values, sums = self.state_values() | self.firing.state_values(), self.state_sums()
        if self.firing.rule is not None:
            sums |= {"gate_load": self.num_experts}
        return RouterState(self.num_experts, sums=sums, **values) if values or sums else None

    def forget(self) -> None:
        """The state was loaded: what was read off it is no longer so."""
        self.firing.forget()

    # -- what members of the family override -------------------------------------------------------------------------

    def default_reg(self) -> float:
        return {"linear": 0.5, "softmax": 0.1}[self.cost]

    def state_values(self) -> dict[str, Tensor]:
        """Name → initial value of what is remembered."""
        return {}

    def state_sums(self) -> dict[str, int]:
        """Name → size of what is summed over a step."""
        return {}

    def make_cost(self, logits_TE: Tensor) -> Tensor:
        """(T, E) what the plan makes the most of, noise aside."""
        return torch.softmax(logits_TE, dim=-1) if self.cost == "softmax" else logits_TE

    def starting_potentials(self) -> Tensor | None:
        """(E,) where the solver starts from."""
        return None

    # -- steps -------------------------------------------------------------------------------------------------------

    def set_step(self, step: int, micro_batch: int = 0, **lengths: int | None) -> None:
        super().set_step(step, micro_batch, **lengths)
        if self.probability_now > 0:
            self.plan_count.expect(step)

    def check_step(self, step: int, total_steps: int | None) -> None:
        total_steps = self.total_steps if total_steps is None else total_steps
        self.firing.check(step, total_steps)
        check_bounds("noise", self._noise.schedule(step, total_steps), 0, math.inf)

    def prepare_step(self) -> None:
        self.probability_now = self.firing.probability(self.step, self.total_steps, self.state)
        self._noise.now = self._noise.schedule(self.step, self.total_steps)
        self.sinkhorn_now = self.draw_uniform("branch", per_layer=self.draw == "layer") < self.probability_now

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        if self.firing.rule is None:
            return {}
        # What is measured is the gate: on a Sinkhorn step the top-k that nobody was sent to.
        experts_TK = self.topk(logits_TE.detach()).experts if routes.branch == "sinkhorn" else routes.experts
        return {"gate_load": self.count(experts_TK, None if token_mask is None else token_mask[:, None])}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        if self.firing.rule is not None:
            assert self.state is not None
            self.firing.learn(sums["gate_load"], self.state)

    # -- routes ------------------------------------------------------------------------------------------------------

    def plans_now(self) -> bool:
        return self.sinkhorn_now if self.training else self.inference in ("sinkhorn", "both")

    def is_plain(self) -> bool:
        quiet = self.raw_noise is None and (self._noise.now == 0 or self.noise_branch == "sinkhorn")
        return super().is_plain() and (not self.training or (quiet and not self.sinkhorn_now))

    def takes_correction(self) -> bool:
        return self.choice_bias() is None

    def serving(self) -> Serving | None:
        return super().serving() if self.inference == "none" else None

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if self.sinkhorn_now:
            return self.route_by_plan(logits_TE, token_mask, noisy=self.noise_branch in ("both", "sinkhorn"))
        if self.noise_branch in ("both", "softmax"):
            return self._noisy_topk(logits_TE)
        routes = self.topk(logits_TE)
        if self.raw_noise is not None:  # a gradient of 0 rather than none, as below
            routes = replace(routes, weights=routes.weights + 0 * self.raw_noise)
        return routes

    def serve(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if self.inference in ("sinkhorn", "both"):
            return self.route_by_plan(logits_TE, token_mask, noisy=self.inference == "both")
        return self.topk(self.with_noise(logits_TE) if self.inference == "noise" else logits_TE)

    def _noisy_topk(self, logits_TE: Tensor) -> Routes:
        """`topk` of logits with noise. Where nobody looks at all of them, no more is drawn than can matter."""
        std = self._noise.std(self.raw_noise)
        quiet = not isinstance(std, Tensor) and std == 0
        # What a softmax makes of a token's noise, its groups and what is added to scores are of all logits.
        of_all = self.top_groups < self.groups or (self.score == "softmax" and not self.norm_topk)
        bias_E, on = self.choice_bias() or Serving()
        if quiet or of_all or self.correction_E is not None or on == "scores":
            return self.topk(self.with_noise(logits_TE))
        experts_TK, noise_TK = noisy_topk(logits_TE, self.top_k, std, self.noise_seed(), bias_E)
        noisy_TK = logits_TE.gather(-1, experts_TK) + std * noise_TK
        return Routes(experts_TK, weigh_chosen(noisy_TK, self.score, self.norm_topk))

    @uncompiled  # the solver's loop ends when the data say so
    def route_by_plan(self, logits_TE: Tensor, token_mask: Tensor | None, noisy: bool) -> Routes:
        """Choose and weigh by the transport plan."""
        if self.training and not recomputing():
            self.plan_count.note(self.step)
        gradient = self.plan_gradient if self.weights == "plan" else "none"
        cost_TE = self.make_cost(logits_TE.detach() if gradient == "none" else logits_TE)
        if noisy:
            cost_TE = self.with_noise(cost_TE)
        full = gradient == "full"
        plan = self.solve_plan(
            cost_TE if full else cost_TE.detach(), token_mask, self.starting_potentials(), differentiable=full
        )
        if gradient == "weights":
            plan = replace(plan, logits=cost_TE)
        experts_TK, chosen_TK, potentials_E = self.choose_by_plan(plan, token_mask)
        if self.weights == "scores":
            weights_TK = self.weigh(logits_TE, experts_TK)
        else:
            weights_TK = plan.weigh(experts_TK, normalise=self.norm_topk and chosen_TK is None)
            if gradient == "none":
                # A gradient of 0 rather than none at all: data-parallel wrappers refuse a parameter that no loss
                # reaches.
                weights_TK = weights_TK + 0 * logits_TE.gather(-1, experts_TK)
        if chosen_TK is not None:
            weights_TK = _among_chosen(weights_TK, chosen_TK, self.norm_topk)
        if self.raw_noise is not None:
            weights_TK = weights_TK + 0 * self.raw_noise
        return Routes(
            experts_TK,
            weights_TK,
            branch="sinkhorn",
            chosen=chosen_TK,
            plan_error=plan.column_error,
            plan_passes=plan.pass_count,
            potentials=potentials_E.detach(),
        )

    @property
    def noise_now(self) -> float:
        """α of this step, unless it is learned."""
        return self._noise.now

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise at this step."""
        std = self._noise.std(self.raw_noise)
        return std.item() if isinstance(std, Tensor) else std

    def with_noise(self, values_TE: Tensor) -> Tensor:
        """(T, E) values and the noise of this pass."""
        std = self._noise.std(self.raw_noise)
        if isinstance(std, Tensor):
            return values_TE + std * self.draw_normal(values_TE)
        # In place: of three matrices T × E two would be made for nothing.
        return values_TE if std == 0 else self.draw_normal(values_TE).mul_(std).add_(values_TE)


def _among_chosen(weights_TK: Tensor, chosen_TK: Tensor, normalise: bool) -> Tensor:
    """Weights that are 0 where not chosen, and sum to 1 over a token's chosen experts if it has any."""
    weights_TK = weights_TK * chosen_TK
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20) if normalise else weights_TK


def _prepare_again(router: SSRRouter, _: object = None) -> None:
    """Once a router is made, and when its state was loaded: what was decided from the state before is no longer so."""
    router.forget()
    with contextlib.suppress(ValueError):  # a schedule that spans the training: set_step says how long that is
        router.check_step(router.step, None)
        router.prepare_step()


class SSRLinearRouter(SSRRouter):
    """The paper's SSR-L: the transport cost is the logits themselves. ξ is 0.5 unless told, where its sweeps are."""

    cost = "linear"


class SSRSoftmaxRouter(SSRRouter):
    """The paper's SSR-S: the transport cost is the row softmax of the logits, in [0, 1]. ξ is 0.1 unless told.

    Of ξ from 0.01 to 1 this leaves the top-k of the plan best balanced (unit-variance logits, 16 experts, top-2).
    """

    cost = "softmax"
