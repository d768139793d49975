"""SSR-Dual: potentials that are kept, and corrected by what top-k counts anyway. Ours; not in the paper.

The potentials b of a plan make the top-k of z + b balanced. They minimise the dual of balanced assignment,

    D(b) = Σ_t [sum of the k largest of z_t + b] − cap · Σ_j b_j,    ∂D/∂b_j = load_j − cap,    cap = k·T/E

so that the loads of a step are a gradient at no cost. The Hessian's diagonal is about d_j, the number of tokens per
unit of bias that are about to come to expert j or to leave it, which the margins between a token's k-th and (k+1)-th
value tell. Online, b moves after every step by a damped Newton step,

    b_j ← b_j + clip(γ · (cap − load_j) / d_j, ±4h),    γ = max(gain, 1/n),    then centred

where h is the width of margins that were counted, and the gain grows while excess loads persist from step to step and
shrinks while they alternate. Only where loads are far off, at first and after a shift of the data, b becomes what
`balanced_topk` finds for a whole batch; n counts the steps since. Served is a slow average of b, which forgets the
sampling errors of single batches. A token's experts depend on no other token of its step.

With `exact`, every micro-batch of the training is balanced by the potentials b_t of that batch (`balanced_topk`), and
the average follows them, or begins anew at b_t where it is far off.

One family: γ = 1 with exact quantiles is quantile balancing, sign(cap − load) is loss-free balancing (arXiv
2408.15664), frozen between plans that are drawn is `ssr-bias`, and forgotten is SSR (arXiv 2511.08972).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sinkroute.kernels.edge import Edge, edge_topk
from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.card import Card
from sinkroute.routing.firing import PlanCount
from sinkroute.routing.ledger import talking
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import best_first, scores
from sinkroute.routing.serving import Serving
from sinkroute.routing.state import RouterState, recomputing
from sinkroute.routing.step_tokens import StepTokens, plans_apart, potentials_of_all
from sinkroute.transport import balanced_topk
from sinkroute.transport.over_ranks import refuse_to_ranks
from sinkroute.transport.ranks import gather_over_ranks

__all__ = ["SSRDualRouter"]

NEAR = 0.3  # the share of tokens, those with the least margins, that say how dense tokens are at the edge
DENSITY_DECAY = 0.9
LEAST_DENSITY = 0.2  # of the mean: an expert that nobody is near would jump
MOST_MOVE = 4.0  # widths of the margins that were counted
SMOOTH, NOISE_RATE = 0.5, 0.1  # of the smoothed residual, and of the level of its noise
FAR = 1.5  # noise levels: a smoothed residual above that is no sampling error
APART = 4  # steps from one plan to the next, at least
FIRST_GAIN, LEAST_GAIN, MOST_GAIN, GAIN_RATE = 0.1, 0.02, 0.5, 0.05
TOL = 0.01  # of the loads of a plan


class SSRDualRouter(Router):
    """Top-k of logits + potentials that are corrected after every step, served with their average.

    Attributes:
        state: holds `bias_E`, the potentials of the training, and `average_E`, those that serve, (E,) float32; and what
            the update remembers.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("ssr-dual", num_experts=4, top_k=1)
    >>> logits_TE = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0, 0])
    >>> for step in range(3):
    ...     sinkroute.set_step(router, step)
    ...     bool(router(logits_TE).load.max() < 105)  # a share is 100
    False
    True
    True
    """

    card = Card(
        "yes", "yes", "top-(k + 1) and counts; a balanced choice at first and after shifts; with exact in every pass"
    )
    needs_step = True
    state: RouterState

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        exact: bool = option(
            False,
            "whether every micro-batch of the training is balanced by the potentials of that batch, so that nothing is "
            "dropped at a capacity of 1. A token's experts depend on the whole micro-batch then. Without groups",
        )
        gain: float | None = option(
            None, "the share of a Newton step by which potentials move. None: as residuals ask for", above=0, most=1
        )
        average: float | None = option(
            None,
            "the weight of the newest potentials in those that serve. None: a fifth of the gain, 0.01 at least; with "
            "exact 0.03",
            above=0,
            most=1,
        )
        bias_on: Literal["logits", "scores"] = option(
            "logits",
            'what potentials are added to: the "logits", or their "scores", as in models with a correction bias '
            "(DeepSeek-V3)",
        )

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        if self.exact and self.top_groups < self.groups:
            raise ValueError(
                f"exact=True with top_groups={self.top_groups} of groups={self.groups}: a balanced assignment cannot "
                "keep a token's experts in some groups; leave exact out, or take all groups"
            )
        vectors = ("bias_E", "average_E", "density_E", "smooth_E", "last_E")
        gain = FIRST_GAIN if self.gain is None else self.gain
        # `moves`: steps since the last plan, that one included; 0: the next step has one. `noise`: 0 is not known.
        numbers = {"gain_now": gain, "noise": 0.0, "moves": 0.0}
        self.state = RouterState(
            num_experts,
            # 2E + 2 numbers over the ranks, with the load. The vector is of densities, or of a plan's potentials.
            sums={"vector": num_experts, "width": 1, "tokens": 1},
            **{name: torch.zeros(num_experts, device="cpu") for name in vectors},
            **{name: torch.tensor(value, device="cpu") for name, value in numbers.items()},
        )
        self.plan_count: PlanCount = PlanCount(
            "the first plan is of the first training step with a real token, and none has come: see that training "
            "passes reach the router"
        )
        self.step_tokens = StepTokens()
        self._plans: bool | None = None
        self._edge: Edge | None = None
        self.register_load_state_dict_post_hook(_ask_again)  # type: ignore[no-untyped-call]

    def choice_bias(self) -> Serving:
        return Serving(self.state.bias_E if self.training else self.state.average_E, self.bias_on)

    def serving(self) -> Serving:
        return Serving(self.state.average_E, self.bias_on)

    def potentials(self) -> tuple[Tensor, ...]:
        return self.state.average_E, self.state.bias_E

    def prepare_step(self) -> None:
        self._plans = None

    def plans_now(self) -> bool:
        """Whether this step finds potentials of whole batches. A device is asked once a step."""
        if self._plans is None:
            self._plans = not self.state.moves.is_meta and float(self.state.moves) == 0
        return self._plans

    # -- a pass ------------------------------------------------------------------------------------------------------

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if self.exact:
            return self._route_exactly(logits_TE, token_mask)
        if recomputing() or not self._has_edge(logits_TE) or self.plans_now():
            return self.topk(logits_TE)
        ties, values_TE = self.tie_seed(), self._cost(logits_TE)
        bias_E: Tensor | None = self.state.bias_E
        if self.top_groups < self.groups:
            values_TE, bias_E = self.within_groups(self.selection(logits_TE, self.choice_bias()), ties), None
        self._edge = edge_topk(values_TE, bias_E, self.top_k, NEAR, ties, token_mask)
        return Routes(self._edge.experts_TK, self.weigh(logits_TE, self._edge.experts_TK))

    def _has_edge(self, logits_TE: Tensor) -> bool:
        """Not where every token has every expert, or there is none."""
        return self.top_k < self.num_experts and len(logits_TE) > 0

    @uncompiled  # which tokens move is known from the data only
    def _route_exactly(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if not recomputing():
            self.plan_count.note(self.step)
        cost_TE = self._cost(logits_TE)
        if plans_apart(self.ranks) and self.clock.told:
            self.step_tokens.note(cost_TE, token_mask)
        group, init_E = self.ranks.plan.group, self.state.average_E
        with talking(self):
            experts_TK, bias_E = balanced_topk(
                cost_TE, self.top_k, TOL, token_mask=token_mask, init=init_E, process_group=group
            )
        experts_TK = best_first(experts_TK, cost_TE, bias_E)
        return Routes(experts_TK, self.weigh(logits_TE, experts_TK), branch="assignment", potentials=bias_E)

    def withdraw(self, device: torch.device) -> None:
        group = self.ranks.plan.group if self.training and self.exact else None
        if group is None:
            super().withdraw(device)
            return
        nothing = torch.empty(0, self.num_experts, device=device)
        refuse_to_ranks(nothing, gather_over_ranks(group), sys.exc_info()[1])  # the others call no more

    def _cost(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.detach() if self.bias_on == "logits" else scores(logits_TE.detach(), self.score)

    @torch.no_grad()
    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        edge, self._edge = self._edge, None
        if not self._has_edge(logits_TE):
            return {}
        if token_mask is None:
            tokens = torch.full((1,), len(logits_TE), dtype=torch.float64, device=logits_TE.device)
        else:
            tokens = token_mask.sum().double().view(1)
        if self.exact or self.plans_now():
            potentials_E = routes.potentials if self.exact else self._potentials(logits_TE, token_mask)
            assert potentials_E is not None
            return {"vector": potentials_E.double() * tokens, "tokens": tokens}
        assert edge is not None
        # How many tokens per unit of bias are at the edge of each expert, and the width of what was counted, by tokens.
        return {"vector": edge.count_E / (2 * edge.width), "width": edge.width * tokens, "tokens": tokens}

    @uncompiled
    def _potentials(self, logits_TE: Tensor, token_mask: Tensor | None) -> Tensor:
        self.plan_count.note(self.step)
        cost_TE = self._cost(logits_TE)
        if self.clock.told:
            self.step_tokens.note(cost_TE, token_mask)
            if self.ranks.load.group is not None:
                return self.state.bias_E  # it chooses nothing here, and is found when the step is over
        return self._find(cost_TE, token_mask=token_mask, init=self.state.bias_E)

    def _find(self, cost_TE: Tensor, **others: Any) -> Tensor:
        return balanced_topk(cost_TE, self.top_k, TOL, **others).bias

    # -- a step ------------------------------------------------------------------------------------------------------

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        tokens = sums["tokens"].clamp(min=1)
        vector_E, known = sums["vector"], sums["tokens"][0] > 0
        potentials_E = vector_E / tokens
        if self.exact:
            if plans_apart(self.ranks):
                potentials_E = potentials_of_all(self.step_tokens, self.ranks, potentials_E, self._find)
            self._follow(potentials_E, known)
        elif self.plans_now():
            self.plan_count.expect(self.step)
            # Of all tokens, so that micro-batches of one process count as those of ranks do.
            if self.ranks.load.group is not None or self.step_tokens.passes > 1:
                start_E = self.state.bias_E.double()
                potentials_E = potentials_of_all(self.step_tokens, self.ranks, start_E, self._find)
            self.step_tokens.forget()
            self._begin_at(potentials_E, known)
        else:
            self._move(load_E.double(), vector_E, sums["width"] / tokens, known)

    def _begin_at(self, potentials_E: Tensor, known: Tensor) -> None:
        """A step with a plan: what the update remembers of steps before is of no use."""
        known = known & potentials_E.isfinite().all()
        potentials_E = potentials_E - potentials_E.mean()
        zeros_E = torch.zeros_like(potentials_E)
        self._set(known, bias_E=potentials_E, average_E=potentials_E, moves=torch.ones_like(potentials_E[0]))
        self._set(known, density_E=zeros_E, smooth_E=zeros_E, last_E=zeros_E)

    def _move(self, load_E: Tensor, count_E: Tensor, width: Tensor, known: Tensor) -> None:
        state, cap = self.state, load_E.mean()
        moves, gain = state.moves.double(), state.gain_now.double()
        # One token more for everybody: no expert's density is 0.
        density_E = count_E + 0.5 / width.clamp(min=1e-6)
        old_E = state.density_E.double()
        density_E = torch.where(old_E.any(), torch.lerp(density_E, old_E, DENSITY_DECAY), density_E)
        newton_E = (cap - load_E) / density_E.clamp(min=LEAST_DENSITY * density_E.mean())
        most = MOST_MOVE * width
        moved_E = (torch.maximum(gain, 1 / moves.clamp(min=1)) * newton_E).clamp(-most, most)
        bias_E = state.bias_E.double() + moved_E
        bias_E = bias_E - bias_E.mean()
        residual_E, last_E = load_E / cap.clamp(min=1e-9) - 1, state.last_E.double()
        agree = torch.nn.functional.cosine_similarity(residual_E, last_E, dim=0)
        if self.gain is None:
            gain = (gain * torch.exp(GAIN_RATE * agree)).clamp(LEAST_GAIN, MOST_GAIN)
        slow = (gain / 5).clamp(min=0.01) if self.average is None else torch.full_like(gain, self.average)
        average_E = torch.lerp(state.average_E.double(), bias_E, torch.maximum(slow, 1 / (moves + 1)))
        smooth_E, noise, far = self._persists(residual_E)
        moves = torch.where(far & (moves >= APART), 0.0, moves + 1)
        known = known & bias_E.isfinite().all()
        self._set(known, bias_E=bias_E, average_E=average_E, density_E=density_E, last_E=residual_E)
        self._set(known, smooth_E=smooth_E, noise=noise, gain_now=gain, moves=moves)

    def _follow(self, potentials_E: Tensor, known: Tensor) -> None:
        """The average of an exact form moves towards the potentials of a step, or begins anew with them."""
        state = self.state
        moves, average_E = state.moves.double(), state.average_E.double()
        potentials_E = potentials_E - potentials_E.mean()
        smooth_E, noise, far = self._persists(potentials_E - average_E)
        anew = (moves == 0) | (far & (moves >= APART))
        slow = torch.full_like(moves, 0.03 if self.average is None else self.average)
        moves = torch.where(anew, 1.0, moves + 1)
        average_E = torch.where(anew, potentials_E, torch.lerp(average_E, potentials_E, torch.maximum(slow, 1 / moves)))
        # The first error is of the gate and no noise.
        noise = torch.where(state.moves == 0, 0.0, noise)
        known = known & potentials_E.isfinite().all()
        self._set(known, average_E=average_E, bias_E=potentials_E, moves=moves, noise=noise)
        self._set(known, smooth_E=torch.where(anew, 0.0, smooth_E))

    def _persists(self, error_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The smoothed error, the level of its noise, and whether the one is far above the other."""
        smooth_E = torch.lerp(self.state.smooth_E.double(), error_E, SMOOTH)
        size, noise = error_E.square().mean().sqrt(), self.state.noise.double()
        has_level, far = noise > 0, FAR * noise
        # Clipped, or an error that persists would pass for noise.
        level = torch.where(has_level, torch.lerp(noise, torch.minimum(size, far), NOISE_RATE), size)
        return smooth_E, level, has_level & (smooth_E.square().mean().sqrt() > far)

    def _set(self, known: Tensor, **values: Tensor) -> None:
        """Set parts of the state, unless nothing was known in the whole batch."""
        here = known.device.type == "cpu"  # can be asked at once; `where` for each takes a third of an update
        if here and not known:
            return
        for name, value in values.items():
            old = getattr(self.state, name)
            old.copy_(value if here else torch.where(known, value, old))


def _ask_again(router: SSRDualRouter, _: object) -> None:
    """The state was loaded: whether the next step has a plan may be another answer."""
    router._plans = None
    router.step_tokens = StepTokens()
