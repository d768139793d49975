"""`sinkroute.solve` against public solvers of the same problem, from logits to two experts per token with weights.

    python -m benchmarks.transport [--quick] [--only 65536x256 ...] [--methods auto ...] [--faults]

It needs a separate environment with the peers (benchmarks/requirements.txt): `make bench-transport`.

What is compared is time to the same *true* error, computed in float64 afterwards from what came back:

    ours   max_j |s_j / (T/E) − 1|  of the plan of the returned potentials; its rows are exact by construction
    peers  the same of the plan that they return, scaled to mass T, and not less than its rows' max_i |r_i − 1|

Peers are flattered. Whoever runs plain Sinkhorn iterations is handed the number that it needs, counted beforehand in
float64 (`oracle`), and so need not watch its own error; OTT-JAX runs as one compiled loop, compile time excluded. What
is timed is all that a router needs, from the logits: set-up, conversion of arrays, plan, two experts, their weights.
Methods alternate in shuffled rounds, so a drift of the machine hits all of them; a run that takes longer than a third
of `--cap` is timed once, when it is verified.

    reached       the error is there
    failed        NaN, an error that stays above the tolerance, or a stopping rule that never stops: no time
    extrapolated  plain Sinkhorn that needs longer than `--cap`: run for half of it, found to follow the oracle, then
                  prolonged; for accelerated variants: iterations as counted, at the pace of this size
    capped        others that need longer than `--cap`, or twice Sinkhorn's iterations: no time, but no failure

From 65536 tokens on peers are brought to 1e-3 only, with a million only two of them run.

One file a part: `problems` (the grid), `oracle` (float64), `peers` (one function each), `clock` (limits and pace),
`attempt` (one peer on one problem), `measure` (one problem, all methods), `memory`, `faults`, `summary` (ratios and
tables), `bar` (progress), `__main__` (command, resume).

Shape suffixes: T tokens, E experts, K experts per token.
"""
