"""The hook on one router: it adds what each pass did to sums on the router's device, and makes metrics of the totals.

Nothing is waited for. A forward pass that is repeated for activation checkpointing counts once, and a pass without a
real token counts nowhere.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sinkroute.kernels.operations import uncompiled
from sinkroute.kernels.storage import uncached
from sinkroute.routing.metrics import load_metrics, max_violation, router_entropy
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.state import recomputing

__all__ = ["Counts", "Mode", "Tier", "Watch", "called_with"]

Tier = Literal["brief", "detailed"]
Mode = Literal["train", "eval"]

_BRANCHES = ("softmax", "sinkhorn", "assignment", "expert-choice", "other")
_SUMS = (
    "tokens",  # real ones
    "passes",
    "places",  # for experts that tokens were offered: K each, or fewer where the method takes fewer
    "excess",  # experts of a token beyond K
    "max_vio",
    "losses",  # passes with an auxiliary loss
    "aux_loss",
    *_BRANCHES,  # passes by it
    "assigned_tokens",  # of passes whose branch is not "softmax"
    "max_vio_assigned",
    "plans",  # passes that told of a plan
    "plan_error",
    "plan_passes",
    "collectives",
    "messages",
    "bytes",
)
# Loads are added up so many passes at a time.
_KEPT = 64
_DETAILED_SUMS = ("router_entropy", "moved_tokens", "max_vio_topk")


def called_with(
    logits_TE: Tensor, token_mask: Tensor | None = None, *, plain: object = None
) -> tuple[Tensor, Tensor | None]:
    """Logits and mask of a call of a router, whether given by position or by name."""
    return logits_TE, token_mask


class Counts:
    """What one router did in one mode: one float64 vector on its device, which holds counts exactly up to 2^53.

    In training nothing is added to it in each pass: numbers that the host knows are added up there, and loads are kept
    until some passes are there or somebody reads. Compiled code, which only serving is, would not see that.

    Attributes:
        load_E, sums, plan_error_max: views of it: the load, the sums and, last, the largest error of a plan.
        planned: whether a pass since the last step's end was by the Sinkhorn branch; of training.
    """

    def __init__(self, num_experts: int, names: tuple[str, ...], device: torch.device, later: bool) -> None:
        self.num_experts, self.names, self.later = num_experts, names, later
        self._host: Counter[str] = Counter()
        self._loads: dict[bool, list[Tensor]] = {False: [], True: []}  # by whether the pass was assigned
        self._step: list[Tensor] = []
        self.planned = False
        # In inference mode it would become a tensor that nothing outside it may add to.
        with torch.inference_mode(False):
            self._seen_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
            self._hold(torch.zeros(num_experts + len(names) + 1, dtype=torch.float64, device=device))

    @uncompiled
    def move(self, device: torch.device) -> None:
        self.settle()
        with torch.inference_mode(False):  # as above
            self._hold(self._all_N.to(device))
        self._step = [load_E.to(device) for load_E in self._step]

    def _hold(self, all_N: Tensor) -> None:
        self._all_N, self.load_E, self.plan_error_max = all_N, all_N[: self.num_experts], all_N[-1]
        self.sums = {name: all_N[place] for place, name in enumerate(self.names, start=self.num_experts)}

    def add(self, name: str, value: Any) -> None:
        if self.later and not isinstance(value, Tensor):
            self._host[name] += value
        else:
            self.sums[name].add_(value)

    def add_load(self, load_E: Tensor, assigned: bool) -> None:
        if not self.later:
            self._settle(load_E[None], assigned)
            return
        load_E = load_E.clone()  # the next replay of a CUDA graph writes into the same memory
        self._loads[assigned].append(load_E)
        self._step.append(load_E)
        if len(self._loads[False]) + len(self._loads[True]) >= _KEPT:
            self.settle()

    def _settle(self, load_PE: Tensor, assigned: bool) -> None:
        self.load_E.add_(load_PE.sum(0))
        max_vio = max_violation(load_PE).sum()  # 0 of a pass that is all masked
        self.sums["max_vio"].add_(max_vio)
        if assigned:
            self.sums["max_vio_assigned"].add_(max_vio)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the vector up to date."""
        for name, value in self._host.items():
            self.sums[name].add_(value)
        for assigned, loads in self._loads.items():
            if loads:
                self._settle(torch.stack(loads), assigned)
                loads.clear()
        self._host.clear()
        self._step = self._step and [torch.stack(self._step).sum(0)]

    def all_N(self) -> Tensor:
        """The vector, up to date."""
        self.settle()
        return self._all_N

    def clear(self) -> None:
        """Begin anew."""
        self.settle()
        self._all_N.zero_()
        self._step, self.planned = [], False
        if not self.later:
            self._seen_E.zero_()

    def end_step(self) -> Tensor:
        """(E,) the load since the last call, or since the counts began anew."""
        if not self.later:
            load_E, self._seen_E = self.load_E - self._seen_E.to(self.load_E.device), self.load_E.clone()
            return load_E
        if not self._step:
            return torch.zeros(self.num_experts, dtype=torch.int64, device=self.load_E.device)
        load_E = self._step[0] if len(self._step) == 1 else torch.stack(self._step).sum(0)
        self._step = []
        return load_E


class Watch:
    """A forward hook for one router.

    Attributes:
        counts: by mode; passes add to them in place.
        paused: whether passes count nowhere.
    """

    def __init__(self, router: Router, tier: Tier, device: torch.device) -> None:
        self.num_experts, self.detailed, self.paused = router.num_experts, tier == "detailed", False
        names = _SUMS + (_DETAILED_SUMS if self.detailed else ())
        self.counts = {mode: Counts(router.num_experts, names, device, mode == "train") for mode in get_args(Mode)}
        self.skip_sent(router)

    def __call__(self, router: Router, args: tuple[Any, ...], kwargs: dict[str, Any], routes: Routes) -> None:
        if self.paused or (router.training and not router.balances):
            return
        logits_TE, token_mask = called_with(*args, **kwargs)
        if router.training:
            self._note_training(router, logits_TE, token_mask, routes)
        elif not recomputing():
            self._note(self.counts["eval"], router, logits_TE, token_mask, routes)

    def skip_sent(self, router: Router) -> None:
        """What the router has sent so far is not counted."""
        self._seen = {mode: account.sent for mode, account in router.sent.items()}

    @torch.no_grad()
    def note_sent(self, router: Router) -> None:
        """Count what the router has sent since: repetitions and passes without a token send, too."""
        for mode, then in self._seen.items():
            now = router.sent[mode].sent
            if now is not then:
                for name, count in (now - then)._asdict().items():
                    self.counts[mode].sums[name].add_(count)
        self.skip_sent(router)

    def __reduce__(self) -> tuple[Any, ...]:
        # The hook of a copied or saved model does nothing: the monitor watches the original.
        return _ignoring, ()

    @uncompiled  # compiled code cannot tell a repetition
    def _note_training(self, router: Router, logits_TE: Tensor, token_mask: Tensor | None, routes: Routes) -> None:
        if not recomputing():
            self._note(self.counts["train"], router, logits_TE, token_mask, routes)
            self.counts["train"].planned |= routes.branch == "sinkhorn"

    @uncached  # a repetition does nothing of this
    @torch.no_grad()
    def _note(
        self, counts: Counts, router: Router, logits_TE: Tensor, token_mask: Tensor | None, routes: Routes
    ) -> None:
        if len(logits_TE) == 0:
            return
        if counts.load_E.device != routes.load.device:
            counts.move(routes.load.device)
        sums = counts.sums
        tokens: int | Tensor = len(logits_TE) if token_mask is None else token_mask.sum()
        busy = 1 if isinstance(tokens, int) else tokens > 0
        width = routes.experts.shape[1]
        counts.add_load(routes.load, routes.branch != "softmax")
        counts.add("tokens", tokens)
        counts.add("passes", busy)
        counts.add("places", tokens * min(width, router.top_k))
        if width > router.top_k:
            chosen_TK = torch.ones_like(routes.experts) if routes.chosen is None else routes.chosen
            sums["excess"].add_((chosen_TK.sum(-1) - router.top_k).clamp(min=0).sum())
        if routes.aux_loss is not None:
            counts.add("losses", busy)
            sums["aux_loss"].add_(routes.aux_loss)
        counts.add(routes.branch if routes.branch in _BRANCHES else "other", busy)
        if routes.branch != "softmax":
            counts.add("assigned_tokens", tokens)
        if routes.plan_error is not None and routes.plan_passes is not None:
            error = routes.plan_error * busy
            counts.add("plans", busy)
            sums["plan_error"].add_(error)
            counts.add("plan_passes", routes.plan_passes * busy)
            counts.plan_error_max.copy_(torch.maximum(counts.plan_error_max, error))
        if self.detailed:
            self._note_logits(sums, router, logits_TE, token_mask, routes)

    def _note_logits(
        self, sums: dict[str, Tensor], router: Router, logits_TE: Tensor, token_mask: Tensor | None, routes: Routes
    ) -> None:
        # As the router reads them.
        logits_TE = logits_TE[:, : self.num_experts]
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        if token_mask is not None:
            logits_TE = logits_TE.masked_fill(~token_mask[:, None], 0.0)
        entropy_T = router_entropy(logits_TE, router.score)
        sums["router_entropy"].add_((entropy_T if token_mask is None else entropy_T * token_mask).double().sum())
        if routes.branch == "softmax":
            return
        top_TE = _members(router.plain_experts(logits_TE), None, logits_TE)
        differs_T = (top_TE != _members(routes.experts, routes.chosen, logits_TE)).any(-1)
        if token_mask is not None:
            top_TE, differs_T = top_TE & token_mask[:, None], differs_T & token_mask
        sums["moved_tokens"].add_(differs_T.sum())
        sums["max_vio_topk"].add_(max_violation(top_TE.sum(0)))

    def describe(self, by_rank: Tensor) -> dict[str, Any]:
        """The metrics of this layer, see `LoadMonitor.metrics`, of the (ranks, N) vectors `all_N` of its counts."""
        load_E = by_rank[:, : self.num_experts].sum(0).long()
        totals = by_rank[:, self.num_experts : -1].sum(0).tolist()
        sums = dict(zip(self.counts["train"].names, totals, strict=True))
        of_load = load_metrics(load_E)
        passes, plans = sums["passes"], sums["plans"]
        assigned = passes - sums["softmax"]
        kept = int(load_E.sum()) - sums["excess"]
        metrics: dict[str, Any] = {
            "tokens": int(sums["tokens"]),
            "passes": int(passes),
            "max_vio": sums["max_vio"] / passes if passes else 0.0,
            "max_vio_global": of_load.pop("max_vio"),
            **of_load,
            "dead_share": of_load["dead"] / self.num_experts,
            "drop_rate": _mean(sums["places"] - kept, sums["places"]),
            "aux_loss": _mean(sums["aux_loss"], sums["losses"]),
            "sinkhorn_share": _mean(sums["sinkhorn"], passes),
            "assigned_share": _mean(assigned, passes),
            "max_vio_assigned": _mean(sums["max_vio_assigned"], assigned),
            "plan_error": _mean(sums["plan_error"], plans),
            "plan_error_max": by_rank[:, -1].amax().item() if plans else None,
            "plans": int(plans),
            "plan_passes": _mean(sums["plan_passes"], plans),
            "collectives": _mean(sums["collectives"], passes),
            "messages": _mean(sums["messages"], passes),
            "bytes": _mean(sums["bytes"], passes),
        }
        if self.detailed:
            metrics["router_entropy"] = _mean(sums["router_entropy"], sums["tokens"])
            metrics["disagreement"] = _mean(sums["moved_tokens"], sums["assigned_tokens"])
            metrics["max_vio_topk"] = _mean(sums["max_vio_topk"], assigned)
            metrics["gap"] = _mean(sums["max_vio_topk"] - sums["max_vio_assigned"], assigned)
        metrics["branches"] = {name: int(sums[name]) for name in _BRANCHES if sums[name]}
        metrics["load"] = load_E.tolist()
        return metrics


def _members(experts_TK: Tensor, chosen_TK: Tensor | None, like_TE: Tensor) -> Tensor:
    """(T, E) bool: whether an expert is in the token's set."""
    members_TE = torch.zeros_like(like_TE, dtype=torch.bool)
    if chosen_TK is None:
        return members_TE.scatter_(1, experts_TK, True)
    return members_TE.scatter_(1, experts_TK, chosen_TK)


def _ignoring() -> Any:
    return _ignore


def _ignore(*_: object) -> None:
    """The hook of a copied router."""


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
