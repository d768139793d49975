"""Selective Sinkhorn Routing (arXiv 2511.08972).

With probability p a training step is routed by the entropy-regularised transport plan with balanced experts: the K
largest entries of a token's row choose its experts and, renormalised, weigh them. Otherwise by softmax top-k, which is
what teaches the gate. Gaussian noise on the scores keeps every expert reachable. Serving is plain softmax top-k: no
plan, no noise, no loss.

    SSR-L: the transport cost is the scores.     SSR-S: the cost is their row softmax.

What the paper's public summaries leave open is an option here, marked "open", with a default and its reason.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from sinkroute._errors import require_numbers, unknown_name
from sinkroute.kernels.operations import uncompiled
from sinkroute.kernels.topk import noisy_topk
from sinkroute.routing.adaptive import Adaptive
from sinkroute.routing.metrics import max_violation
from sinkroute.routing.router import CommonOptions, Router, Serving
from sinkroute.routing.routes import Routes
from sinkroute.routing.schedules import Constant, Schedule, check_bounds, make_schedule
from sinkroute.routing.scores import weigh_chosen
from sinkroute.routing.state import RouterState
from sinkroute.transport import Plan, solve

__all__ = ["Inference", "SSRLinearRouter", "SSROptions", "SSRRouter", "SSRSoftmaxRouter"]

Cost = Literal["linear", "softmax"]
NoiseBranch = Literal["both", "softmax", "sinkhorn"]
NoiseScale = Literal["per-expert", "absolute"]
PlanGradient = Literal["none", "weights", "full"]
PlanWeights = Literal["plan", "scores"]
DrawScope = Literal["step", "layer"]
Inference = Literal["none", "noise", "sinkhorn", "both"]

ProbabilityLike = float | str | Schedule | Adaptive | Callable[[int], float]
NoiseLike = float | str | Schedule | Callable[[int], float]


class PlanChoice(NamedTuple):
    """What is made of a plan.

    Attributes:
        experts_TK: (T, K') int64.
        chosen_TK: (T, K') bool, False for places that count nowhere; None: all chosen.
        bias_E: (E,) what is added to the scores so that their top-k is balanced; what methods remember of a plan.
    """

    experts_TK: Tensor
    chosen_TK: Tensor | None
    bias_E: Tensor


class SSROptions(CommonOptions, total=False):
    """The keyword options of every member of the family; see `SSRRouter`."""

    reg: float | None
    probability: ProbabilityLike
    noise: NoiseLike
    noise_branch: NoiseBranch
    noise_scale: NoiseScale
    plan_gradient: PlanGradient
    weights: PlanWeights
    draw: DrawScope
    inference: Inference
    tol: float
    max_passes: int | None


class SSRRouter(Router):
    """Softmax top-k, and now and then the transport plan.

    Args:
        reg: ξ, the entropy regularisation. None: 0.5 for the linear cost, 0.1 for the softmax cost.
        probability: p, the share of training steps routed by the plan. The paper advises 0.001 to 0.01 for long runs.
            A number, a schedule (`sinkroute.routing.schedules`) such as `"cosine(0.1, 0.001)"`, a function of the step,
            or `"adaptive(high=..., low=..., floor=..., ceiling=...)"`: as the gate's imbalance asks for (`Adaptive`).
        noise: α, the strength of the Gaussian noise in training; 0 turns it off. The paper's best lie about 0.3 to 1.
            A number, a schedule, a function of the step, or `"learned"`: softplus of a parameter, 0.3 at first
            (`"learned(1.0)"`: another value). A loss only ever wants less noise; weight decay pulls α to softplus(0) =
            0.69, so keep `raw_noise` out of it.
        noise_branch: open: which branch gets noise. Default both: a perplexity that is sensitive to α, as the paper's
            is, cannot come from noise on 0.1 % of the steps.
        noise_scale: open: `"per-expert"`, a standard deviation of α/E (the V-MoE convention, arXiv 2106.05974), or
            `"absolute"`, α itself, which for the softmax cost leaves little more than chance of a token's choice.
        plan_gradient: open: what the gate learns on Sinkhorn steps through the plan's weights. `"none"`; `"weights"`,
            with the potentials held fixed; or `"full"`, by implicit differentiation of the plan. Default none: the
            softmax steps are said to keep the gradient flowing.
        weights: `"plan"`, the paper's: the plan's entries weigh the experts on Sinkhorn steps. `"scores"`: the plan
            chooses only, and the gate learns from its own scores at those experts, as in S-BASE.
        draw: open: one draw per `"step"` for all layers, as "training steps" says, or per `"layer"` and micro-batch.
        inference: what is done in `eval()`: `"none"`, plain top-k, which the paper finds best; `"noise"`; `"sinkhorn"`,
            the plan without noise; or `"both"`.
        tol: the relative column error at which the solver stops.
        max_passes: the solver's limit; None: its own.
        common: see `Router`. With `process_group`, the plan is that of all its ranks' tokens. (Loads after the top-k,
            where a member of the family balances these, are those of this rank.)

    Raises:
        ValueError: a number out of range or an unknown choice.
    """

    cost: Cost
    needs_step = True

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        reg: float | None = None,
        probability: ProbabilityLike = 1e-3,
        noise: NoiseLike = 0.3,
        noise_branch: NoiseBranch = "both",
        noise_scale: NoiseScale = "per-expert",
        plan_gradient: PlanGradient = "none",
        weights: PlanWeights = "plan",
        draw: DrawScope = "step",
        inference: Inference = "none",
        tol: float = 1e-4,
        max_passes: int | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        reg = self.default_reg() if reg is None else reg
        require_numbers(reg=reg)
        if not (reg > 0 and math.isfinite(reg)):
            raise ValueError(f"reg must be a finite number above 0, got {reg}; try 0.5 (ssr-l) or 0.1 (ssr-s)")
        for name, value, choices in (
            ("noise_branch", noise_branch, NoiseBranch),
            ("noise_scale", noise_scale, NoiseScale),
            ("plan_gradient", plan_gradient, PlanGradient),
            ("weights", weights, PlanWeights),
            ("draw", draw, DrawScope),
            ("inference", inference, Inference),
        ):
            if value not in get_args(choices):
                raise unknown_name(name, value, get_args(choices))
        if weights == "scores" and plan_gradient != "none":
            raise ValueError(
                f'plan_gradient={plan_gradient!r} is of the plan\'s weights, and with weights="scores" there are none; '
                "leave one of them out"
            )
        # No tokens: the solver only checks its numbers, now and not at the first step that needs a plan.
        solve(torch.empty(0, num_experts, device="cpu"), reg, tol=tol, max_passes=max_passes)
        self.reg, self.tol, self.max_passes = reg, tol, max_passes
        self.plan_gradient, self.weights, self.draw, self.inference = plan_gradient, weights, draw, inference
        self.noise_branch, self.noise_scale = noise_branch, noise_scale
        self.probability, self.noise = probability, noise
        self.adaptive: Adaptive | None = None
        if isinstance(probability, Adaptive):
            self.adaptive = probability
        elif isinstance(probability, str) and probability.strip().startswith("adaptive"):
            self.adaptive = Adaptive.parse(probability)
        self._rate = None if self.adaptive else make_schedule("probability", probability, most=1)  # type: ignore[arg-type]
        self.raw_noise: nn.Parameter | None = None
        if isinstance(noise, str) and (start := _learned(noise)) is not None:
            with torch.inference_mode(False):  # it is to be trained, wherever the router is made
                self.raw_noise = nn.Parameter(torch.empty(()))
            self._noise_schedule: Schedule = Constant(start)
            self.reset_parameters()
        else:
            self._noise_schedule = make_schedule("noise", noise)
        self.state = self.make_state()
        self.sinkhorn_now, self.noise_now = False, 0.0
        self._measured: tuple[float, bool] | None = None
        self.register_load_state_dict_post_hook(_prepare_again)
        _prepare_again(self)

    def reset_parameters(self) -> None:
        """The first value of a noise that is learned. (What is remembered resets itself.)"""
        if self.raw_noise is not None:
            nn.init.constant_(self.raw_noise, _softplus_inverse(self._noise_schedule(0)))

    def extra_repr(self) -> str:
        probability = self.probability if isinstance(self.probability, (str, Adaptive)) else self._rate
        shown = [f"cost={self.cost}", f"reg={self.reg:g}"]
        for name, value in (("probability", probability), ("noise", self._noise_schedule)):
            shown.append(f"{name}={value.value:g}" if isinstance(value, Constant) else f"{name}={value}")
        return f"{super().extra_repr()}, {', '.join(shown)}"

    def make_state(self) -> RouterState | None:
        """For what this method remembers, or None."""
        values, sums = self.state_values(), self.state_sums()
        if self.adaptive:
            values |= {"max_vio": torch.tensor(-1.0, device="cpu"), "firing": torch.tensor(0.0, device="cpu")}
            sums |= {"gate_load": self.num_experts}
        return RouterState(self.num_experts, sums=sums, **values) if values or sums else None

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

    def choose_on_plan(self, plan: Plan, token_mask: Tensor | None) -> PlanChoice:
        """The choice on Sinkhorn steps."""
        return PlanChoice(self.choose_in(plan), None, plan.potentials)

    def starting_potentials(self) -> Tensor | None:
        """(E,) where the solver starts from."""
        return None

    # -- steps -------------------------------------------------------------------------------------------------------

    def check_step(self, step: int, total_steps: int | None) -> None:
        total_steps = self.total_steps if total_steps is None else total_steps
        if self._rate is not None:
            check_bounds("probability", self._rate(step, total_steps), 0, 1)
        check_bounds("noise", self._noise_schedule(step, total_steps), 0, math.inf)

    def prepare_step(self) -> None:
        if self.adaptive is not None:
            probability = self.adaptive.rate(self.measured()[1])
        else:
            assert self._rate is not None
            probability = self._rate(self.step, self.total_steps)
        self.noise_now = self._noise_schedule(self.step, self.total_steps)
        self.probability_now = probability
        self.sinkhorn_now = self.draw_uniform("branch", per_layer=self.draw == "layer") < probability

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        if self.adaptive is None:
            return {}
        # What is measured is the gate: on a Sinkhorn step its own top-k, which nobody was sent to.
        experts_TK = self.score_topk(logits_TE.detach()).experts if routes.branch == "sinkhorn" else routes.experts
        counted_T1 = None if token_mask is None else token_mask[:, None]
        return {"gate_load": self._count(experts_TK, counted_T1)}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        if self.adaptive is None:
            return
        assert self.state is not None
        gate_load_E = sums["gate_load"]
        tokens, max_vio = torch.stack([gate_load_E.sum(), max_violation(gate_load_E)]).tolist()
        if tokens == 0:  # in the whole batch: nothing was measured
            return
        ema, firing = self.measured()
        # Rounded as it is saved, or a resumed run would go on with another number.
        ema = torch.tensor(self.adaptive.average(ema, max_vio), dtype=torch.float32, device="cpu").item()
        self._measured = (ema, self.adaptive.fires(ema, firing))
        self.state.max_vio.fill_(self._measured[0])
        self.state.firing.fill_(self._measured[1])

    def measured(self) -> tuple[float, bool]:
        """The moving average of MaxVio (−1: there is none yet), and whether Sinkhorn steps are being fired."""
        if self._measured is None:  # made or loaded just now; a device is asked this once
            assert self.state is not None
            if self.state.firing.is_meta:  # there is no value yet
                return -1.0, False
            self._measured = (float(self.state.max_vio), float(self.state.firing) > 0.5)
        return self._measured

    # -- routes ------------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        quiet = self.raw_noise is None and (self.noise_now == 0 or self.noise_branch == "sinkhorn")
        return super().is_plain() and (not self.training or (quiet and not self.sinkhorn_now))

    def takes_correction(self) -> bool:
        return self.choice_bias() is None

    def serving(self) -> Serving | None:
        return super().serving() if self.inference == "none" else None

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if self.sinkhorn_now:
            return self.sinkhorn_topk(logits_TE, token_mask, noisy=self.noise_branch in ("both", "sinkhorn"))
        if self.noise_branch in ("both", "softmax"):
            return self.noisy_gate_topk(logits_TE)
        routes = self.score_topk(logits_TE)
        if self.raw_noise is not None:  # a gradient of 0 rather than none, as below
            routes = replace(routes, weights=routes.weights + 0 * self.raw_noise)
        return routes

    def withdraw(self, device: torch.device) -> None:
        plans = self.sinkhorn_now if self.training else self.inference in ("sinkhorn", "both")
        if not (plans and self._withdraw_from_plan(device, self.tol, self.max_passes)):
            super().withdraw(device)

    def serve(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if self.inference in ("sinkhorn", "both"):
            return self.sinkhorn_topk(logits_TE, token_mask, noisy=self.inference == "both")
        return self.score_topk(self._noisy(logits_TE) if self.inference == "noise" else logits_TE)

    def noisy_gate_topk(self, logits_TE: Tensor) -> Routes:
        """`score_topk` of logits with noise. Where nobody looks at all of them, no more is drawn than can matter."""
        std = self._noise_std()
        quiet = not isinstance(std, Tensor) and std == 0
        # What a softmax makes of a token's noise, its groups and what the model adds to scores are of all logits.
        of_all = self.top_groups < self.groups or (self.score == "softmax" and not self.norm_topk)
        bias_E, on = self.choice_bias() or Serving()
        if quiet or of_all or self.correction_E is not None or on == "scores":
            return self.score_topk(self._noisy(logits_TE))
        experts_TK, noise_TK = noisy_topk(logits_TE, self.top_k, std, self.noise_seed(), bias_E)
        noisy_TK = logits_TE.gather(-1, experts_TK) + std * noise_TK
        return Routes(experts_TK, weigh_chosen(noisy_TK, self.score, self.norm_topk))

    @uncompiled  # the solver's loop ends when the data say so
    def sinkhorn_topk(self, logits_TE: Tensor, token_mask: Tensor | None, noisy: bool) -> Routes:
        """Choose and weigh by the transport plan."""
        gradient = self.plan_gradient if self.weights == "plan" else "none"
        source_TE = logits_TE.detach() if gradient == "none" else logits_TE
        cost_TE = self.make_cost(source_TE)
        if noisy:
            cost_TE = self._noisy(cost_TE)
        # The cost is made here, so that the noise is on it; to the solver it is linear.
        plan = solve(
            cost_TE if gradient == "full" else cost_TE.detach(),
            self.reg,
            token_mask=token_mask,
            tol=self.tol,
            max_passes=self.max_passes,
            init=self.starting_potentials(),
            differentiable=gradient == "full",
            process_group=self.process_group.group,
        )
        if gradient == "weights":
            plan = replace(plan, logits=cost_TE)
        experts_TK, chosen_TK, bias_E = self.choose_on_plan(plan, token_mask)
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
            potentials=bias_E.detach(),
        )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise at this step."""
        std = self._noise_std()
        return std.item() if isinstance(std, Tensor) else std

    def _noise_std(self) -> float | Tensor:
        strength: float | Tensor = self.noise_now if self.raw_noise is None else F.softplus(self.raw_noise)
        return strength / self.num_experts if self.noise_scale == "per-expert" else strength

    def _noisy(self, scores_TE: Tensor) -> Tensor:
        std = self._noise_std()
        if isinstance(std, Tensor):
            return scores_TE + std * self.draw_normal(scores_TE)
        # In place: of three matrices T × E two would be made for nothing.
        return scores_TE if std == 0 else self.draw_normal(scores_TE).mul_(std).add_(scores_TE)


def _learned(text: str) -> float | None:
    """The initial value in `"learned"` or `"learned(0.3)"`; None if the text is neither."""
    if not text.strip().startswith("learned"):
        return None
    found = re.fullmatch(r"\s*learned\s*(?:\((.*)\))?\s*", text)
    try:
        start = math.nan if found is None else float(found[1] or 0.3)
    except ValueError:
        start = math.nan
    if not (start > 0 and math.isfinite(start)):
        raise ValueError(f"noise must be learned or learned(VALUE) with a value above 0, got {text!r}")
    return start


def _softplus_inverse(value: float) -> float:
    # log(e^x − 1), which overflows for large x.
    return value + math.log(-math.expm1(-value))


def _among_chosen(weights_TK: Tensor, chosen_TK: Tensor, normalise: bool) -> Tensor:
    """Weights that are 0 where not chosen, and sum to 1 over a token's chosen experts if it has any."""
    weights_TK = weights_TK * chosen_TK
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20) if normalise else weights_TK


def read_cost(cost: str) -> Cost:
    """`cost`, for members of the family that have the choice.

    Raises:
        ValueError: it is neither "linear" nor "softmax".
    """
    if cost not in get_args(Cost):
        raise unknown_name("cost", cost, get_args(Cost))
    return "softmax" if cost == "softmax" else "linear"


def _prepare_again(router: SSRRouter, _: object = None) -> None:
    """Once a router is made, and when its state was loaded: what was decided from the state before is no longer so."""
    router._measured = None
    with contextlib.suppress(ValueError):  # a schedule that spans the training: set_step says how long that is
        router.check_step(router.step, None)
        router.prepare_step()


class SSRLinearRouter(SSRRouter):
    """SSR-L: the transport cost is the scores themselves. ξ is 0.5 unless told, where the paper's sweeps are."""

    cost = "linear"


class SSRSoftmaxRouter(SSRRouter):
    """SSR-S: the transport cost is the row softmax of the scores, in [0, 1]. ξ is 0.1 unless told.

    Of ξ from 0.01 to 1 this leaves the top-k of the plan best balanced (unit-variance scores, 16 experts, top-2).
    """

    cost = "softmax"
