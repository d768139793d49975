"""One problem, all methods: bring each to the tolerance, verify it in float64, then time all of them in turns."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

import sinkroute

from .attempt import SLACK, Attempt, Record
from .clock import Pace, TooLong, limit, pace, timed
from .oracle import potentials_error, sinkhorn_errors
from .peers import PEERS
from .problems import LARGE, MILLION, Problem

TOLS = (1e-3, 1e-6)


@dataclass
class Contender:
    """A call to be timed; its seconds go to `record`."""

    record: Record
    call: Callable[[], object]


@dataclass
class Bench:
    """What is common to all problems: settings, peers' paces by size, what to tell about the progress."""

    methods: tuple[str, ...]
    peers: tuple[str, ...]
    peers_everywhere: bool
    repeats: int
    cap: float
    tell: Callable[[str], None] = lambda text: None
    order: random.Random = field(default_factory=lambda: random.Random(0))
    paces: dict[tuple[str, str], Pace] = field(default_factory=dict)

    def measure(self, problem: Problem) -> Record:
        """All methods on one problem."""
        logits_TE = problem.logits()
        contenders: list[Contender] = []
        cap = self.cap * max(1 / 3, problem.tokens * problem.experts / (1 << 24))
        record: Record = {"ours": {}, "peers": {}}
        for method in self.methods:
            self.tell(f"{method}: error and passes")
            record["ours"][method] = {
                f"{tol:g}": self.ours(problem, logits_TE, method, tol, contenders) for tol in TOLS
            }
        if self.peers:
            tols = TOLS if problem.tokens < LARGE or self.peers_everywhere else TOLS[:1]
            self.tell("counting Sinkhorn's iterations in float64")
            cost_TE = problem.cost_of(logits_TE)
            sinkhorn = sinkhorn_errors(cost_TE, problem.reg, min(tols), seconds=2 * cap)
            record["sinkhorn"] = {f"{tol:g}": sinkhorn.count(tol)._asdict() for tol in tols}
            record["sinkhorn"]["error_after_8"] = sinkhorn.errors[min(8, len(sinkhorn.errors)) - 1]
            for name in self.peers_for(problem):
                record["peers"][name] = {}
                attempt = Attempt(PEERS[name], problem, logits_TE, self.pace_of(name, problem), cap)
                for tol in tols:
                    other = PEERS[name].instead_of
                    if other and record["peers"].get(other, {}).get(f"{tol:g}", {}).get("status") != "failed":
                        continue
                    self.tell(name)
                    found = attempt.bring(sinkhorn, tol)
                    record["peers"][name][f"{tol:g}"] = found
                    if found["status"] == "reached":
                        contenders.append(Contender(found, partial(attempt.routes, found["iterations"])))
        self.tell("taking turns")
        self.take_turns(contenders, budget=max(0.5, cap / 3))
        return record

    def ours(self, problem: Problem, logits_TE: Tensor, method: str, tol: float, contenders: list[Contender]) -> Record:
        def routes(logits_TE: Tensor, init: Tensor | None = None) -> sinkroute.Plan:
            plan = solve(logits_TE, init)
            plan.topk(2)
            return plan

        def solve(logits_TE: Tensor, init: Tensor | None = None) -> sinkroute.Plan:
            return sinkroute.solve(logits_TE, problem.reg, problem.cost, method=method, tol=tol, init=init)

        drifted_TE = problem.drifted(logits_TE)
        try:
            with limit(5 * self.cap):
                plan = solve(logits_TE)
                warm = solve(drifted_TE, plan.potentials)
        except TooLong as error:
            return {"status": "failed", "why": str(error), "seconds": []}
        true_error = potentials_error(logits_TE, problem.cost, problem.reg, plan.potentials)
        record: Record = {
            "status": "reached" if true_error <= SLACK * tol else "failed",
            "why": "" if bool(plan.converged) else "not converged, as it says",
            "true_error": true_error,
            "column_error": float(plan.column_error),
            "converged": bool(plan.converged),
            "passes": plan.passes,
            "seconds": [],
            "without_topk": {"seconds": []},
            "warm": {"passes": warm.passes, "converged": bool(warm.converged), "seconds": []},
        }
        contenders += [
            Contender(record, partial(routes, logits_TE)),
            Contender(record["without_topk"], partial(solve, logits_TE)),
            Contender(record["warm"], partial(routes, drifted_TE, plan.potentials)),
        ]
        return record

    def peers_for(self, problem: Problem) -> tuple[str, ...]:
        few = ("POT sinkhorn, NumPy", "OTT-JAX")  # with a million tokens all others only take longer
        return tuple(name for name in self.peers if problem.tokens < MILLION[0] or name in few)

    def pace_of(self, name: str, problem: Problem) -> Pace:
        """Of this peer at this size, measured once, on a problem that no peer finds hard."""
        key = name, problem.size
        if key not in self.paces:
            easy = Problem(problem.tokens, problem.experts, 1.0, 0.0, "linear", 1.0, problem.seed)
            cost_TE = easy.logits()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.paces[key] = pace(lambda iterations: PEERS[name].plan(cost_TE, easy.reg, iterations))
        return self.paces[key]

    def take_turns(self, contenders: list[Contender], budget: float) -> None:
        """Rounds in shuffled order; a call that takes long leaves after fewer of them, or was timed when verified."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(self.repeats):
                waiting = [one for one in contenders if sum(one.record["seconds"]) < budget]
                for contender in self.order.sample(waiting, len(waiting)):
                    contender.record["seconds"].append(timed(contender.call))
