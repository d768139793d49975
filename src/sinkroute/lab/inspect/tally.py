"""Counts what a model's routers decide, and what balanced routing of the same logits would change.

A forward hook reads each router's decision and counts it on the spot, so that beside the model there is never more than
one batch's logits of one layer, and a few matrices of their size. The alternatives, each balanced over one batch, as a
training step would:

    ssr-l, ssr-s    what an SSR router with its defaults does on a Sinkhorn step, without noise: the top k of the plan,
                    within the model's groups
    ssr-dual        the router that `sinkroute.patch` takes unless told, as it would serve: every batch by what it has
                    learned of those before, the first by what it learns of that one
    balanced        of all routings with equal loads (as whole tokens allow) one with the largest sum of the model's own
                    scores, groups aside: what balance costs at the least
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinkroute.adapters.hf.contracts import CONTRACTS, Contract, Decision, Site
from sinkroute.adapters.hf.find import find_routers
from sinkroute.adapters.hf.scoring import Scoring
from sinkroute.lab.inspect.choices import Keeper
from sinkroute.lab.inspect.result import Alternative, Layer
from sinkroute.lab.inspect.text import InspectError
from sinkroute.routing import create_router
from sinkroute.routing.metrics import router_entropy, saturation
from sinkroute.routing.registry import RECOMMENDED
from sinkroute.routing.router import Router
from sinkroute.routing.scores import scores
from sinkroute.routing.step import end_step, set_step
from sinkroute.routing.watch import Counts
from sinkroute.transport import balanced_topk

__all__ = ["Tallies", "Tally"]

_SSR = ("ssr-l", "ssr-s")


class Tallies:
    """The counts of all routers of a model while it is open.

    Args:
        model: in `eval()`; its weights may be elsewhere.
        checkpoint: what errors call it.
        length: of the windows that it will be called with.
        begun: whether the first token of a window is not to be counted.
        kept: the choices of so many tokens are kept for the viewer.

    Raises:
        InspectError: there is no router in it.
    """

    def __init__(self, model: nn.Module, checkpoint: str, length: int, begun: bool, kept: int = 0) -> None:
        known, refused = find_routers(model)
        if not known and not refused:
            raise InspectError(
                f"{type(model).__name__} holds no mixture of experts that sinkroute knows how to find: no small module "
                "beside a module of experts; name a mixture-of-experts checkpoint"
            )
        order = {path: place for place, (path, _) in enumerate(model.named_modules())}
        found: dict[Site, Scoring | str] = {**known, **refused}
        self.sites = sorted(found, key=lambda site: order[site.path])
        self._tallies = [Tally(site, found[site], checkpoint, length, begun, kept) for site in self.sites]

    def __enter__(self) -> Tallies:
        self._hooks = [tally.site.host.register_forward_hook(tally) for tally in self._tallies]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def layers(self) -> list[Layer]:
        """What was counted, in the model's order."""
        return [tally.layer() for tally in self._tallies]


class Tally:
    """The forward hook on one router."""

    def __init__(self, site: Site, found: Scoring | str, checkpoint: str, length: int, begun: bool, kept: int) -> None:
        self.site, self.checkpoint, self.length, self.begun = site, checkpoint, length, begun
        self.scoring = found if isinstance(found, Scoring) else None
        self.reason = found if isinstance(found, str) else None
        self.kept_in = None if self.scoring is None else _kept_in(self.scoring)
        self.contract: Contract | None = None if self.scoring is None else self.scoring.contract
        self.calls, self.tokens, self.entropy, self.score = 0, 0, 0.0, 0.0
        self.top_k, self.batches = 0, 0
        self.loads: _Loads | None = None  # until its first decision
        self.others: dict[str, _Other] = {}
        self.routers: dict[str, Router] = {}
        self.keeper = Keeper(kept)

    def __call__(self, host: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        self.calls += 1
        if self.contract is None and self.calls == 1:
            # The rule is not known, but what is chosen may be said in a form that is.
            self.contract = next((contract for contract in CONTRACTS if contract.fits(outputs, self.site)), None)
        if self.contract is not None:
            with torch.no_grad():
                self.count(self.contract.read(outputs, self.site))

    def count(self, decision: Decision) -> None:
        tokens = len(decision.logits_TE)
        if tokens % self.length:
            raise InspectError(
                f"{self.site.block} was given {tokens} tokens, which are no whole windows of {self.length}: "
                "it does not see every token once, and its load cannot be counted"
            )
        decision = Decision(*map(self._counted, decision))
        loads = self.loads or self.begin(decision)
        logits_TE = decision.logits_TE if self.scoring is None else self.scoring.logits(decision)
        # A rule that is not known may give -inf to experts that a token may not have.
        if (logits_TE.isnan() if self.scoring is None else ~logits_TE.isfinite()).any():
            raise InspectError(
                f"the logits of {self.site.path} in {self.checkpoint!r} are NaN or infinite: a weight of that layer or "
                f"of one before it is, or they overflow in {str(logits_TE.dtype).removeprefix('torch.')}"
            )
        loads.add(decision.experts_TK)
        self.tokens += len(decision.experts_TK)
        if self.scoring is not None:
            self.compare(self.scoring, logits_TE.float(), decision)
        else:
            self.keeper.add(decision.experts_TK, decision.weights_TK)

    def begin(self, decision: Decision) -> _Loads:
        self.top_k, experts = decision.experts_TK.shape[-1], decision.logits_TE.shape[-1]
        self.loads = _Loads(experts)
        if self.scoring is not None:
            sizes = {"num_experts": self.scoring.num_experts, "top_k": self.scoring.top_k}
            for name in _SSR:
                self.routers[name] = create_router(name, **sizes, **self.scoring.theirs(), probability=1.0, noise=0.0)
            if self.kept_in is not None:
                on: Any = {"bias_on": self.scoring.correction_on} if self.scoring.correction else {}
                self.routers[RECOMMENDED] = create_router(RECOMMENDED, **sizes, **self.scoring.theirs(), **on)
            self.others = {name: _Other(experts) for name in (*self.routers, "balanced")}
        return self.loads

    def compare(self, scoring: Scoring, logits_TE: Tensor, decision: Decision) -> None:
        """Add up what the alternatives would change."""
        experts_TK = decision.experts_TK
        self.entropy += router_entropy(logits_TE, scoring.score).double().sum().item()
        scores_TE = scores(logits_TE, scoring.score)
        self.score += scores_TE.gather(-1, experts_TK).double().sum().item()
        choices = {"balanced": balanced_topk(scores_TE, scoring.top_k, tol=0).experts}
        for name, router in self.routers.items():
            if name == RECOMMENDED:
                choices[name] = self.served(router, logits_TE)
                continue
            router.set_step(self.calls)
            choices[name] = router(logits_TE).experts
        for name, others_TK in choices.items():
            self.others[name].add(scores_TE, experts_TK, others_TK)
        self.keeper.add(experts_TK, decision.weights_TK, scores_TE, choices["balanced"])

    def served(self, router: Router, logits_TE: Tensor) -> Tensor:
        """(T, K) experts by what the router has learned of the batches before, and of this one if it is the first."""

        def learn() -> None:
            set_step(router.train(), self.batches)
            router(logits_TE)
            end_step(router)

        first = self.batches == 0
        if first:
            learn()
        experts_TK = router.eval()(logits_TE).experts
        if not first:
            learn()
        self.batches += 1
        return experts_TK

    def layer(self) -> Layer:
        reason, router = self.reason, type(self.site.host).__name__
        rule = None if self.scoring is None else str(self.scoring)
        if not self.calls:
            reason = "it was never called on this text: its layer is not used, or some kernel bypasses it"
        if self.loads is None:
            return Layer(self.site.path, router, rule, reason)
        load_E = self.loads.load_E
        scale = 1 if len(load_E) == 1 else torch.tensor(len(load_E)).double().log().item()
        understood = self.scoring is not None
        return Layer(
            self.site.path,
            router,
            rule,
            reason,
            tokens=self.tokens,
            top_k=self.top_k,
            load=load_E,
            gate_entropy=self.entropy / self.tokens / scale if understood else None,
            max_vio_batch=self.loads.max_vio_batch,
            alternatives={
                name: other.result(self.tokens, self.top_k, self.score) for name, other in self.others.items()
            },
            choices=self.keeper.choices(),
            kept_in=self.kept_in,
        )

    def _counted(self, values_TX: Tensor) -> Tensor:
        """Without the BOS that stands before each window."""
        if not self.begun:
            return values_TX
        return values_TX.unflatten(0, (-1, self.length))[:, 1:].flatten(0, 1)


class _Loads:
    """The loads of batches, counted as `LoadMonitor` counts those of our routers."""

    def __init__(self, experts: int) -> None:
        self.counts, self.batches = Counts(experts, ("max_vio",), torch.device("cpu"), later=False), 0

    def add(self, experts_TK: Tensor) -> None:
        load_E = torch.bincount(experts_TK.flatten(), minlength=self.counts.num_experts).cpu()
        self.counts.add_load(load_E, assigned=False)
        self.batches += 1

    @property
    def load_E(self) -> Tensor:
        return self.counts.load_E.long()

    @property
    def max_vio_batch(self) -> float:
        """MaxVio of single batches, mean."""
        return self.counts.sums["max_vio"].item() / self.batches


class _Other:
    """The sums of one alternative."""

    def __init__(self, experts: int) -> None:
        self.loads = _Loads(experts)
        self.tokens_kept, self.choices_kept, self.score = 0, 0.0, 0.0

    def add(self, scores_TE: Tensor, experts_TK: Tensor, others_TK: Tensor) -> None:
        self.loads.add(others_TK)
        same_T = (experts_TK.sort(-1).values == others_TK.sort(-1).values).all(-1)
        self.tokens_kept += int(same_T.sum())
        self.choices_kept += saturation(others_TK, experts_TK).item() * others_TK.numel()
        self.score += scores_TE.gather(-1, others_TK).double().sum().item()

    def result(self, tokens: int, top_k: int, score: float) -> Alternative:
        return Alternative(
            tokens_moved=1 - self.tokens_kept / tokens,
            choices_moved=1 - round(self.choices_kept) / (tokens * top_k),
            score_lost=1 - self.score / score,
            load=self.loads.load_E,
            max_vio_batch=self.loads.max_vio_batch,
        )


def _kept_in(scoring: Scoring) -> str | None:
    """What of the model would hold what the recommended router learns."""
    held = scoring.correction or scoring.gate_bias or scoring.gate_weight
    return None if held is None else held.name
