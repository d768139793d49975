"""What balance buys in time: the step of an expert-parallel mixture on many ranks, simulated from measured loads.

Everything is a formula; nothing is run. Symbols: R ranks, of which P = gcd(R, E) share a layer's E experts, E / P each,
in the order of their numbers (R / P such groups hold the same experts and other tokens); T tokens a rank, top-K, so
that a group makes C = T K P choices, of which expert e gets n_e = C x (its share of the measured load); width d, hidden
width f, m matrices an expert (3 gated, else 2), b bytes a number; F operations and B bytes a second of a rank; links of
W bytes a second and latency a, N ranks a node, another W and a between nodes.

- Experts of a rank, forward:  sum over its e of max(2 m d f n_e / F, (m d f [if n_e > 0] + n_e (2 d + m f)) b / B).
  Backward is twice that. All wait for the slowest rank.
- All-to-all, four a layer and step (there and back, forward and backward): a ceil(log2 P) + max over ranks of what it
  sends or receives from others, T K (1 - 1/P) sent, n_r (1 - 1/P) received (n_r: the choices of its experts) x d b / W.
  Where P > N the share (P - N) / (P - 1) of that goes between nodes; the two kinds of links work side by side.
- A capacity c cuts n_e at c C / E. What is cut is dropped: less time, fewer tokens.
- Not the mixture: attention's projections and scores, 3 (8 d^2 + 4 d S) a token and layer (S: length of a sequence),
  the gate 6 d E, and 6 d V for the output once a step; at F.
- A router's rule: `PASSES` reads of T x E float32 at B; a plan's passes as measured, 4 T E bytes each, with one
  all_gather of 16 E P bytes each where the plan is over the ranks of a group (`plan_over_ranks`).
- The bias's update: one all_reduce of all layers' sums over R ranks, 2 (R - 1) / R x bytes / W + 2 a ceil(log2 R).
- Gradients: an all_reduce of what ranks share (4 d^2 a layer over R ranks, experts over R / P), hidden behind the
  backward pass, of which only what is longer is counted. The same for all methods.

Nothing overlaps but that. F is peak times `EFFICIENCY`: a grouped product does not reach the peak, and what share it
reaches moves all methods alike, towards more weight of the links where it is high. Ratios are what to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sinkroute.lab.bench.options import Mixture
from sinkroute.lab.bench.trace import Line, Trace

__all__ = ["MACHINES", "LayerTime", "Machine", "StepTime", "balanced", "layer_time", "quality", "step_time"]

EFFICIENCY = 0.5
"""Of the peak, that products of an expert's size reach: an assumption, not a measurement."""


@dataclass(frozen=True)
class Machine:
    """A rank and its links. Rates are those that are reached; the presets' products are peak times `EFFICIENCY`."""

    name: str
    flops: float
    memory: float
    link: float
    link_latency: float
    network: float
    network_latency: float
    node: int


# Dense bf16 peak, HBM and NVLink 4 (a direction) by the maker's data sheets; 400 Gb/s a GPU between nodes. Latencies
# are round figures of what nccl-tests show for small messages.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100-node", EFFICIENCY * 989e12, 3.35e12, 450e9, 5e-6, 50e9, 15e-6, 8),
        Machine("h200-node", EFFICIENCY * 989e12, 4.8e12, 450e9, 5e-6, 50e9, 15e-6, 8),
    )
}

# Reads of T x E float32 in a pass, forward and backward, beside those of plain top-k. By their formulas; a fused kernel
# makes fewer, a framework's eager code more.
PASSES = {"load-balance": 3, "global-load-balance": 3, "z-loss": 2, "quantile": 6, "bip": 14, "noisy": 4}
# float64 of a layer that ranks add up once a step (docs/costs.md), by number of experts.
SUMS = {
    **dict.fromkeys(("loss-free", "smebu"), (1, 0)),
    **dict.fromkeys(("bip", "ssr-bias", "ssr-fold", "quantile"), (2, 1)),
    "ssr-dual": (2, 2),
}


@dataclass(frozen=True)
class LayerTime:
    """Of one mixture in a training step, in seconds.

    Attributes:
        experts: products of the slowest rank, forward and backward.
        exchange: the four all-to-alls.
        slowest: choices of the busiest rank, after a capacity, over the mean before it.
        dropped: share of the choices above the capacity.
    """

    experts: float
    exchange: float
    slowest: float
    dropped: float


@dataclass(frozen=True)
class StepTime:
    """Of a training step, in seconds: the mean over a trace's lines.

    Attributes:
        experts, exchange, router, update, rest: parts; `rest` is what no router changes.
        slowest, dropped: as of `LayerTime`, mean over layers.
    """

    experts: float
    exchange: float
    router: float
    update: float
    rest: float
    slowest: float
    dropped: float

    @property
    def seconds(self) -> float:
        return self.experts + self.exchange + self.router + self.update + self.rest


def layer_time(load_E: np.ndarray, top_k: int, mixture: Mixture, machine: Machine, ranks: int) -> LayerTime:
    """The time of one mixture whose experts share the choices as `load_E` does.

    >>> from sinkroute.lab.bench.options import Mixture
    >>> even, skewed = np.ones(8), np.array([2.0, 1, 1, 1, 1, 1, 1, 0])
    >>> times = [layer_time(load, 2, Mixture(), MACHINES["h100-node"], 8) for load in (even, skewed)]
    >>> [time.slowest for time in times], round(times[1].exchange / times[0].exchange, 2)
    ([1.0, 2.0], 1.95)
    """
    experts = len(load_E)
    group = math.gcd(ranks, experts)
    choices = mixture.tokens * top_k * group
    wanted_E = choices * load_E / load_E.sum()
    got_E = wanted_E
    if mixture.capacity is not None:
        got_E = np.minimum(wanted_E, mixture.capacity * choices / experts)
    weights = mixture.matrices * mixture.d_model * mixture.d_hidden
    moved_E = weights * (got_E > 0) + got_E * (2 * mixture.d_model + mixture.matrices * mixture.d_hidden)
    seconds_E = np.maximum(2 * weights * got_E / machine.flops, moved_E * mixture.bytes / machine.memory)
    got_R = got_E.reshape(group, -1).sum(1)
    products = 3 * float(seconds_E.reshape(group, -1).sum(1).max())
    return LayerTime(
        experts=products,
        exchange=4 * _exchange(float(got_R.max()), group, mixture, machine),
        slowest=float(got_R.max() * group / choices),
        dropped=1 - float(got_E.sum() / wanted_E.sum()),
    )


def _exchange(most: float, group: int, mixture: Mixture, machine: Machine) -> float:
    """One all-to-all in which the busiest rank sends or receives the hidden states of `most` choices."""
    if group == 1:
        return 0.0
    out = most * (1 - 1 / group) * mixture.d_model * mixture.bytes
    far = max(0, group - machine.node) / (group - 1)
    rounds = math.ceil(math.log2(group))
    near = machine.link_latency * rounds + (1 - far) * out / machine.link
    return max(near, machine.network_latency * rounds + far * out / machine.network) if far else near


def step_time(trace: Trace, mixture: Mixture, machine: Machine, ranks: int, *, single_steps: bool = False) -> StepTime:
    """The mean step of a trace.

    Args:
        trace: measured loads.
        mixture: the model to which its shares are scaled; a layer of it is the mean of the measured ones.
        machine: of each rank.
        ranks: as many as the experts can be shared by, or a multiple.
        single_steps: take the mean MaxVio of single steps in place of that of a line's sums. Exact for products that
            are bound by operations and for links; only where each rank has one expert.

    Raises:
        ValueError: `single_steps`, and a rank has several experts or a line has no MaxVio of single steps.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be 1 or more, got {ranks}")
    experts, layers = trace.experts, mixture.layers
    group = math.gcd(ranks, experts)
    parts = []
    for line in trace.lines:
        loads = [
            _of_single_steps(line, each, group) if single_steps else load for each, load in enumerate(line.load_LE)
        ]
        parts += [layer_time(load_E, trace.top_k, mixture, machine, ranks) for load_E in loads]
    mean = {key: float(np.mean([getattr(part, key) for part in parts])) for key in vars(parts[0])}
    backward = layers * (2 / 3 * mean["experts"] + mean["exchange"] / 2)
    return StepTime(
        experts=mean["experts"] * layers,
        exchange=mean["exchange"] * layers,
        router=layers * _rule(trace, mixture, machine, group),
        update=_update(trace, mixture, machine, ranks),
        rest=_rest(trace, mixture, machine, ranks, backward),
        slowest=mean["slowest"],
        dropped=mean["dropped"],
    )


def _of_single_steps(line: Line, layer: int, group: int) -> np.ndarray:
    """Loads with the mean MaxVio of single steps: the busiest expert's share, the others alike."""
    load_E = line.load_LE[layer]
    if line.steps == 1:
        return load_E
    if line.max_vio_L is None or group != len(load_E):
        raise ValueError(
            f"a line of the trace is the sum of {line.steps} steps, and the busiest rank of single steps is known only "
            f"where each rank has one of the {len(load_E)} experts, got {len(load_E) // group}; log every step "
            "(train.log_every=1, monitor.write(..., reset=True) each step), or take the sums"
        )
    busiest = min(1 + line.max_vio_L[layer], float(len(load_E)))
    others = (len(load_E) - busiest) / max(len(load_E) - 1, 1)
    return np.array([busiest, *[others] * (len(load_E) - 1)])


def _rule(trace: Trace, mixture: Mixture, machine: Machine, group: int) -> float:
    """What the router's rule takes in a layer and step, beside plain top-k."""
    read = 4 * mixture.tokens * trace.experts / machine.memory
    steps = sum(line.steps for line in trace.lines) * len(trace.lines[0].load_LE)
    plan = sum(line.plan_passes for line in trace.lines) / steps  # of a layer and step
    talk = 0.0
    if mixture.plan_over_ranks and group > 1:
        far = group > machine.node
        latency, width = (machine.network_latency, machine.network) if far else (machine.link_latency, machine.link)
        talk = latency * math.ceil(math.log2(group)) + 16 * trace.experts * group / width
    return PASSES.get(trace.router, 0) * read + plan * (read + talk)


def _update(trace: Trace, mixture: Mixture, machine: Machine, ranks: int) -> float:
    per_expert, more = SUMS.get(trace.router, (0, 0))
    numbers = (per_expert * trace.experts + more) * mixture.layers
    return _all_reduce(8 * numbers, ranks, machine) if numbers else 0.0


def _all_reduce(size: float, ranks: int, machine: Machine, apart: int = 1) -> float:
    """Of so many ranks; `apart`: from one of them to the next, as those that hold the same experts lie."""
    if ranks == 1:
        return 0.0
    far = ranks * apart > machine.node
    latency, width = (machine.network_latency, machine.network) if far else (machine.link_latency, machine.link)
    return 2 * latency * math.ceil(math.log2(ranks)) + 2 * (ranks - 1) / ranks * size / width


def _rest(trace: Trace, mixture: Mixture, machine: Machine, ranks: int, backward: float) -> float:
    """What no router changes: attention, gate, output, and gradients as far as the backward pass does not hide them."""
    d, group = mixture.d_model, math.gcd(ranks, trace.experts)
    a_layer = 3 * (8 * d * d + 4 * d * mixture.length) + 6 * d * trace.experts
    compute = mixture.tokens * (mixture.layers * a_layer + 6 * d * mixture.vocab) / machine.flops
    own = mixture.matrices * d * mixture.d_hidden * trace.experts // group
    reduce = _all_reduce(mixture.layers * 4 * d * d * mixture.bytes, ranks, machine)
    reduce += _all_reduce(mixture.layers * own * mixture.bytes, ranks // group, machine, group)
    return compute + max(0.0, reduce - 2 / 3 * compute - backward)


def balanced(trace: Trace) -> Trace:
    """The same training with even loads and a router that costs nothing: what no method can beat."""
    load_LE = np.ones_like(trace.lines[0].load_LE)
    line = Line(trace.total_steps, 1, load_LE, np.zeros(len(load_LE)))
    return replace(trace, name="perfect balance, free", router="", lines=[line])


def quality(traces: Mapping[str, Sequence[Trace]], seconds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Loss against simulated time.

    Args:
        traces: method → its runs, one a seed.
        seconds: method → simulated seconds of a step.

    Returns:
        Method → of the mean over its runs `final` (training loss of the last line), `time` (of the whole training),
        `equal` (loss when the quickest method is done, between lines linearly) and `reach` (simulated time until the
        loss is first that of the slowest method's end or lower; None if never). Losses are those of the log, means over
        a line's steps. A slower method is looked at before its learning rate has come down: `equal` is what it had by
        then, and trained for fewer steps from the start it would have more.

    Raises:
        ValueError: a trace without losses, or runs of one method that were logged at different steps.
    """
    total = {name: seconds[name] * max(trace.total_steps for trace in runs) for name, runs in traces.items()}
    curves = {name: _curve(name, runs, seconds[name]) for name, runs in traces.items()}
    goal = curves[max(total, key=lambda name: total[name])][1][-1]
    out: dict[str, dict[str, Any]] = {}
    for name, (at, losses) in curves.items():
        first = next((time for time, loss in zip(at, losses, strict=True) if loss <= goal), None)
        equal = float(np.interp(min(total.values()), at, losses))
        out[name] = {"final": float(losses[-1]), "time": total[name], "equal": equal, "reach": first}
    return out


def _curve(name: str, runs: Sequence[Trace], seconds: float) -> tuple[list[float], np.ndarray]:
    """Simulated time and mean loss of each line. A line's loss is a mean over its steps: it is that of their middle."""
    logged = {tuple(line.step for line in trace.lines) for trace in runs}
    losses = [[line.loss for line in trace.lines if line.loss is not None] for trace in runs]
    if len(logged) > 1 or any(len(own) < len(trace.lines) for own, trace in zip(losses, runs, strict=True)):
        raise ValueError(f"the runs of {name} must have a loss in each line and be logged at the same steps")
    return [(line.step - (line.steps - 1) / 2) * seconds for line in runs[0].lines], np.mean(losses, axis=0)
