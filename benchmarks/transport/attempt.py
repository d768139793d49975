"""A peer on a problem: bring it to a tolerance that is verified in float64, or find out why it does not get there."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any, NamedTuple

from torch import Tensor

from .clock import Pace, TooLong, limit
from .oracle import Sinkhorn, plan_error
from .peers import Counting, Peer
from .problems import Problem

SLACK = 1.01
"""Counts are made in float64, peers compute in float32: an error this much above the tolerance has reached it."""

Record = dict[str, Any]


class Run(NamedTuple):
    """A run of a peer: error of its plan (NaN for none), seconds, whether it was cut off, what there is to say."""

    error: float
    seconds: float
    cut_off: bool
    why: str


class Attempt:
    """A peer on a problem; it knows its runs by their number of iterations, and the most that there is time for."""

    def __init__(self, peer: Peer, problem: Problem, logits_TE: Tensor, pace: Pace, cap: float) -> None:
        self.peer, self.problem, self.logits_TE, self.pace, self.cap = peer, problem, logits_TE, pace, cap
        self.most = pace.iterations_within(cap)
        self.runs: dict[int, Run] = {}

    def routes(self, iterations: int) -> Tensor:
        """The plan, on the way two experts per token and weights that sum to 1. This is what is timed."""
        plan_TE = self.peer.plan(self.problem.cost_of(self.logits_TE), self.problem.reg, iterations)
        top_TK, _ = plan_TE.topk(2, dim=1)
        top_TK /= top_TK.sum(dim=1, keepdim=True)
        return plan_TE

    def run(self, iterations: int) -> Run:
        if iterations not in self.runs:
            self.runs[iterations] = self.new_run(iterations)
            if self.runs[iterations].cut_off:  # the pace was measured on an easier problem
                self.most = max(1, iterations // 3)
        return self.runs[iterations]

    def new_run(self, iterations: int) -> Run:
        begin = time.perf_counter()
        try:
            with limit(1.5 * self.cap), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan_TE = self.routes(iterations)
        except (ArithmeticError, RuntimeError, TooLong, ValueError) as reason:
            seconds = time.perf_counter() - begin
            return Run(math.nan, seconds, isinstance(reason, TooLong), f"{type(reason).__name__}: {reason}")
        seconds = time.perf_counter() - begin
        error = plan_error(plan_TE)
        return Run(error, seconds, False, "NaN" if math.isnan(error) else f"error {error:.1e}")

    def bring(self, sinkhorn: Sinkhorn, tol: float) -> Record:
        """To the tolerance, or to the reason why not."""
        needed = sinkhorn.count(tol).iterations
        # An iteration of another kind costs no less than Sinkhorn's: twice as many are not worth a wait.
        other = 2 * needed + 20
        if self.peer.counting == "own":
            return self.verdict(0, tol)
        if self.peer.counting == "search":
            return self.search(needed, min(self.most, other), tol)
        if callable(self.peer.counting):
            return self.counted(self.peer.counting, min(self.pace.iterations_within(2 * self.cap), other), tol)
        if needed <= self.most and not self.run(needed).cut_off:
            return self.nearly(needed, tol)
        return self.extrapolate(needed, sinkhorn)

    def verdict(self, iterations: int, tol: float) -> Record:
        run = self.run(iterations)
        found = {"iterations": iterations, "error": run.error}
        if run.error <= SLACK * tol:
            return {"status": "reached", **found, "seconds": [run.seconds] if run.seconds > self.cap / 3 else []}
        return {"status": "failed", "why": run.why, **found, "seconds": []}

    def nearly(self, iterations: int, tol: float) -> Record:
        """With some more iterations if need be: rounding may cost a few."""
        found = self.verdict(iterations, tol)
        if found["status"] == "failed" and not math.isnan(found["error"]):
            found = self.verdict(math.ceil(1.1 * iterations) + 1, tol)
            if self.run(found["iterations"]).cut_off:
                found["status"] = "capped"
        return found

    def counted(self, count: Counting, most: int, tol: float) -> Record:
        """A peer that counts by its own measure of the error, if that takes no more than `most` iterations."""
        iterations = count(self.problem.cost_of(self.logits_TE), self.problem.reg, tol, most)
        if iterations < most and iterations > self.most:
            seconds = self.pace.seconds(iterations)
            return {"status": "extrapolated", "extrapolated_seconds": seconds, "iterations": iterations, "seconds": []}
        return self.capped(self.nearly(iterations, tol), most)

    def capped(self, found: Record, most: int) -> Record:
        """Who was cut off, or still had a finite error after the most iterations, has not failed: nobody knows."""
        late = found["iterations"] >= most and not math.isnan(found["error"])
        if found["status"] == "failed" and (late or self.run(found["iterations"]).cut_off):
            found["status"] = "capped"
        return found

    def search(self, guess: int, most: int, tol: float) -> Record:
        """The fewest iterations that reach the tolerance, within a fifth, if a run within the cap does."""
        low, found = 0, self.verdict(min(guess, most), tol)
        while found["status"] != "reached":
            low = found["iterations"]
            if low >= most or math.isnan(found["error"]):
                return self.capped(found, most)
            found = self.verdict(min(2 * low, most), tol)
        while found["iterations"] - low > max(1, found["iterations"] // 5):
            middle = self.verdict((low + found["iterations"]) // 2, tol)
            if middle["status"] == "reached":
                found = middle
            else:
                low = middle["iterations"]
        return found

    def extrapolate(self, needed: int, sinkhorn: Sinkhorn) -> Record:
        """Time for more iterations than there is time for, if those that there is time for go as the oracle's."""
        iterations = max(1, self.most // 2)
        while (run := self.run(iterations)).cut_off and iterations > 1:
            iterations = max(1, self.most // 2)
        found = {"iterations": needed, "error": run.error, "seconds": []}
        if run.cut_off:
            return {"status": "capped", "why": run.why, **found}
        expected = sinkhorn.errors[min(iterations, len(sinkhorn.errors)) - 1]
        least = 0.9 * expected if iterations <= len(sinkhorn.errors) else 0.0
        if not least <= run.error <= 1.1 * expected:
            why = f"{run.why} after {iterations} iterations, not {expected:.1e}"
            return {"status": "failed", "why": why, **found}
        seconds = run.seconds * self.pace.seconds(needed) / self.pace.seconds(iterations)
        return {"status": "extrapolated", "extrapolated_seconds": seconds, **found}
