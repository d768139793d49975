"""The peers: from a cost (T, E) to the plan that a public solver finds, in as many iterations as it is told.

Each is called as its documentation says, and at its best: uniform marginals, no stopping test of the peer where one can
be turned off. Adding a peer is adding a function and a line of `PEERS`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

os.environ["POT_BACKEND_DISABLE_JAX"] = "1"  # POT is timed on NumPy and torch; its tries of JAX would be start-up only

import jax
import jax.numpy as jnp
import ot
import torch
from geomloss import ot as geomloss
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.acceleration import AndersonAcceleration, Momentum
from ott.solvers.linear.sinkhorn import Sinkhorn, SinkhornState
from sinkhorn_router_pytorch import sinkhorn_router
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Megatron-Core would like to have: Apex, Transformer Engine
    from megatron.core.transformer.moe import moe_utils as megatron

Carry = tuple[jax.Array, jax.Array, SinkhornState]

PACKAGES = ("POT", "ott-jax", "jax", "geomloss", "sinkhorn-router-pytorch", "megatron-core", "numpy")
NEVER = 10**9

Plan = Callable[[Tensor, float, int], Tensor]
"""(cost_TE, reg, iterations) -> plan_TE of any total mass."""

Counting = Callable[[Tensor, float, float, int], int]
"""(cost_TE, reg, tol, most) -> iterations to an error of `tol` by the peer's own arithmetic, or `most`."""


@dataclass(frozen=True)
class Peer:
    """A public solver.

    `counting` says where its number of iterations comes from: "oracle": it runs plain Sinkhorn; "search": runs with
    more and less; "own": it has its own rule of when to stop and takes no number; or a function that finds it.
    `log_domain`: potentials instead of exponentials of cost/reg. `instead_of`: a slower variant of that
    peer, asked only where it failed.
    """

    plan: Plan
    counting: str | Counting = "oracle"
    log_domain: bool = False
    instead_of: str | None = None


def pot(method: str, numpy: bool, double: bool = False, **options: Any) -> Plan:
    def plan(cost_TE: Tensor, reg: float, iterations: int) -> Tensor:
        tokens, experts = cost_TE.shape
        cost_TE = cost_TE.double() if double else cost_TE
        a_T, b_E = cost_TE.new_full((tokens,), 1 / tokens), cost_TE.new_full((experts,), 1 / experts)
        positive_TE = cost_TE.max() - cost_TE  # what is paid, as POT expects it; −C would overflow where this does not
        arrays = [x.numpy() if numpy else x for x in (a_T, b_E, positive_TE)]
        plan_TE = ot.sinkhorn(*arrays, reg, method=method, numItermax=iterations, stopThr=-1, warn=False, **options)
        return torch.as_tensor(plan_TE)

    return plan


class Ott:
    """OTT-JAX's own iteration in a loop of a given length, without its stopping test; compiled once per shape."""

    def __init__(self, **options: Any) -> None:
        solver = Sinkhorn(lse_mode=True, max_iterations=NEVER, inner_iterations=NEVER, **options)

        def start(cost_TE: jax.Array, reg: float) -> tuple[LinearProblem, SinkhornState]:
            problem = LinearProblem(Geometry(cost_matrix=-cost_TE, epsilon=reg))
            return problem, solver.init_state(problem, solver.initializer(problem, lse_mode=True))

        def step(problem: LinearProblem, iteration: jax.Array, state: SinkhornState) -> SinkhornState:
            return solver.one_iteration(problem, state, iteration, compute_error=False)

        def solve(cost_TE: jax.Array, reg: float, iterations: int) -> jax.Array:
            problem, state = start(cost_TE, reg)
            state = jax.lax.fori_loop(0, iterations, lambda i, state: step(problem, i, state), state)
            return problem.geom.transport_from_potentials(state.fu, state.gv)

        def count(cost_TE: jax.Array, reg: float, tol: float, most: int) -> jax.Array:
            problem, state = start(cost_TE, reg)

            def error_of(state: SinkhornState) -> jax.Array:
                sums = [problem.geom.marginal_from_potentials(state.fu, state.gv, axis=axis) for axis in (0, 1)]
                return jnp.maximum(*(jnp.abs(x * len(x) - 1).max() for x in sums))

            def advance(
                carry: tuple[jax.Array, jax.Array, SinkhornState],
            ) -> tuple[jax.Array, jax.Array, SinkhornState]:
                iteration, error, state = carry
                state = step(problem, iteration, state)
                looks = (iteration < 8) | (iteration % 4 == 0)  # a look costs as much as the iteration
                return iteration + 1, jax.lax.cond(looks, error_of, lambda state: error, state), state

            start_with = jnp.array(0), jnp.array(jnp.inf, cost_TE.dtype), state
            return jax.lax.while_loop(lambda carry: (carry[0] < most) & ~(carry[1] <= tol), advance, start_with)[0]

        self._solve, self._count = jax.jit(solve), jax.jit(count)

    def plan(self, cost_TE: Tensor, reg: float, iterations: int) -> Tensor:
        return torch.from_dlpack(self._solve(jnp.from_dlpack(cost_TE), reg, iterations).block_until_ready())

    def count(self, cost_TE: Tensor, reg: float, tol: float, most: int) -> int:
        return int(self._count(jnp.from_dlpack(cost_TE), reg, tol, most))


def geomloss_solve(cost_TE: Tensor, reg: float, iterations: int) -> Tensor:
    tokens, experts = cost_TE.shape
    a_T, b_E = cost_TE.new_full((tokens,), 1 / tokens), cost_TE.new_full((experts,), 1 / experts)
    return geomloss.solve(-cost_TE, reg=reg, a=a_T, b=b_E, max_iter=iterations).plan


def lucidrains(cost_TE: Tensor, reg: float, iterations: int) -> Tensor:
    # It takes the logarithm of what it is given, clamped: fed raw logits (as its own router does) it would lose every
    # negative one, and with its own clamp at 1e-10 all that are 23 below the largest.
    return sinkhorn_router.sinkhorn(
        (cost_TE - cost_TE.max()).exp(), num_iters=iterations, temperature=reg, eps=torch.finfo(torch.float32).tiny
    )


def megatron_core(cost_TE: Tensor, reg: float, iterations: int) -> Tensor:
    return megatron.sinkhorn(cost_TE / reg)


_OTT, _MOMENTUM = Ott(), Ott(momentum=Momentum(value=1.5))
_ANDERSON = Ott(anderson=AndersonAcceleration(memory=5))

# POT's sinkhorn_log on NumPy is not among them: it does the same as on torch and takes longer.
PEERS: dict[str, Peer] = {
    "POT sinkhorn, NumPy": Peer(pot("sinkhorn", numpy=True)),
    "POT sinkhorn, torch": Peer(pot("sinkhorn", numpy=False)),
    "POT sinkhorn, NumPy float64": Peer(pot("sinkhorn", numpy=True, double=True), instead_of="POT sinkhorn, NumPy"),
    "POT sinkhorn_stabilized, NumPy": Peer(pot("sinkhorn_stabilized", numpy=True, print_period=NEVER)),
    "POT sinkhorn_log, torch": Peer(pot("sinkhorn_log", numpy=False), log_domain=True),
    "POT sinkhorn_log, torch float64": Peer(
        pot("sinkhorn_log", numpy=False, double=True), log_domain=True, instead_of="POT sinkhorn_log, torch"
    ),
    "OTT-JAX": Peer(_OTT.plan, log_domain=True),
    "OTT-JAX, momentum 1.5": Peer(_MOMENTUM.plan, counting=_MOMENTUM.count, log_domain=True),
    "OTT-JAX, Anderson 5": Peer(_ANDERSON.plan, counting=_ANDERSON.count, log_domain=True),
    "GeomLoss": Peer(geomloss_solve, counting="search", log_domain=True),
    "sinkhorn-router-pytorch": Peer(lucidrains, log_domain=True),
    "Megatron-Core": Peer(megatron_core, counting="own"),
}


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
