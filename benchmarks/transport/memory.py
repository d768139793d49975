"""Memory that a call needs on top of its logits: the peak of resident memory in a fresh process.

    python -m benchmarks.transport.memory TOKENS EXPERTS COST METHOD SEED

Linux can forget a process's high-water mark. It does so here when the logits are made and the method has run once on a
few rows (libraries and thread pools are loaded), so what is counted is the work on this problem: temporaries, and the
plan with the cost it keeps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sinkroute
from sinkroute.lab.memory import peak_memory_mb, reset_peak_memory

from .problems import COSTS, MILLION, SIZES, Problem

ROOT = Path(__file__).parents[2]
ITERATIONS = 5
"""Of a peer: its memory does not grow with them."""
PEERS = ("POT sinkhorn, NumPy", "POT sinkhorn_log, torch")


def extra_memory(problem: Problem, method: str) -> dict[str, float]:
    """MiB: of the logits, and at the peak above them in solving and in solving and taking two experts."""
    logits_TE = problem.logits()
    solve, topk = _calls(problem, method)
    topk(logits_TE[:1024].clone())
    extra = {"scores": logits_TE.nbytes / 2**20}
    for name, call in (("solve", solve), ("solve and topk", topk)):
        reset_peak_memory()
        before = peak_memory_mb()
        call(logits_TE)
        extra[name] = peak_memory_mb() - before
    return extra


def _calls(problem: Problem, method: str) -> tuple[Callable[[Tensor], object], Callable[[Tensor], object]]:
    if method not in PEERS:

        def solve(logits_TE: Tensor) -> sinkroute.Plan:
            return sinkroute.solve(logits_TE, problem.reg, problem.cost, method=method, tol=1e-3)

        return solve, lambda logits_TE: solve(logits_TE).topk(2)
    from .peers import PEERS as ALL  # only here: ours is measured without JAX and Megatron-Core in the process

    def plan(logits_TE: Tensor) -> Tensor:
        return ALL[method].plan(problem.cost_of(logits_TE), problem.reg, ITERATIONS)

    return plan, lambda logits_TE: plan(logits_TE).topk(2)


def measure_memory(
    methods: tuple[str, ...], seed: int, tell: Callable[[str], None]
) -> dict[str, dict[str, dict[str, float]]]:
    """By size and cost, and by method."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tokens, experts in (SIZES[-1], MILLION):
        for cost in COSTS:
            title = f"{tokens}x{experts} {cost}"
            found[title] = {}
            for method in (*methods, *PEERS) if tokens == SIZES[-1][0] else methods:
                tell(f"{title}, {method}")
                command = ["-m", "benchmarks.transport.memory", str(tokens), str(experts), cost, method, str(seed)]
                output = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
                found[title][method] = json.loads(output.splitlines()[-1])
    return found


if __name__ == "__main__":
    tokens, experts, cost, method, seed = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of peers about numbers that overflow
    problem = Problem(int(tokens), int(experts), 1.0, 2.0, cost, 0.1, int(seed))
    print(json.dumps(extra_memory(problem, method)))
