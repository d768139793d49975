"""Balanced routing as entropic optimal transport: from logits to a plan that loads every expert alike.

T tokens ask for E experts with logits X. The plan Π (T × E) is the solution of

    argmax  <Π, C> − ξ <Π, log Π>
    s.t.    Π 1 = 1                       every token spends all of its mass,
            Πᵀ 1 = (T / E) 1              every expert carries the same load,

with cost `C = X` ("linear") or `C = softmax(X)` over each row ("softmax") and entropy weight ξ (`reg`).
Eliminating the T row constraints leaves E unknown potentials g, one per expert, and

    Π_ij = softmax_j((C_ij + g_j) / ξ).

That is what `solve` returns: E numbers and the cost. The matrix is made only when asked for.
Source: Nguyen et al., *Selective Sinkhorn Routing for Improved Sparse Mixture of Experts*, arXiv 2511.08972.

Shape suffixes, here and in the names of every variable:

    T  tokens
    E  experts
    K  experts per token

One file a part:

    `problem`    what is asked and what a solver finds        `dual`                 the solver, L-BFGS in g
    `checks`     every check of an argument                   `sinkhorn`, `naive`    solvers to compare it with
    `plan`       what comes back                              `implicit`             the gradient
    `solve`      the entrance and the registry of solvers     `ranks`                tokens spread over processes
    `balanced`   whole tokens instead of mass                 `over_ranks`, `quotas` the same over processes
    `search`     its bias, by counting                        `loads`                its loads, by moving tokens

What goes over all logits is an operation of `sinkroute.kernels`.
"""

from sinkroute.transport.balanced import BalancedTopK, balanced_topk
from sinkroute.transport.plan import Plan, TopK
from sinkroute.transport.solve import list_solvers, solve

__all__ = ["BalancedTopK", "Plan", "TopK", "balanced_topk", "list_solvers", "solve"]
