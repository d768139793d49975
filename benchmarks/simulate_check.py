"""Does `sinkroute bench --simulate` say what ranks do? One mixture over 2 and 4 processes, its loads dictated.

    python benchmarks/simulate_check.py [--ranks 2 4] [--repeats 5] [--turns 12] [--out FILE.json]

So many processes on this machine, one thread each, hold two experts each of a mixture and train it, forward and
backward: all_to_all there, two products an expert, all_to_all back. Who gets how many tokens is dictated: evenly, or
the first rank more, by a MaxVio of the busiest rank of 0.25, 0.5 and 1 (with two processes that is all), and of 2 with
four. The skews alternate turn by turn, shuffled alike on all ranks, and each one's time is set against that of even
loads in the same turn; a repeat is the median of those ratios. Beside it stands the ratio that the simulation gives
with this machine's rates, measured by the same processes.

Two clocks. Wall time is what users wait for. With more processes than free cores it says little: ranks that wait leave
their core to the busy one, which no cluster does. The processor's time of the slowest rank, products and copies of
messages, is what the formula is held to then; of the simulation's side the latency of calls is left out there. On a
machine with nothing else to do `--idle` holds the wall clock to it as well, where each process has a core. What no
formula has, calls of small operations, counts less the larger the products are: `--d-model 512 --d-hidden 2048`.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing

from sinkroute.lab.bench.options import Mixture
from sinkroute.lab.bench.simulate import Machine, layer_time
from sinkroute.lab.bench.this_machine import begin_rank, measure_rank
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine

EXPERTS = 2  # of a rank
TOLERANCE = 0.15
"""By how much a simulated ratio may miss the measured one, of it."""


@dataclass
class Check:
    """One mixture over processes of this machine, its loads dictated, and what the simulation says of it."""

    ranks: tuple[int, ...] = (2, 4)
    """Processes, one thread each."""
    repeats: int = 5
    """Repeats; each gives one ratio a skew."""
    turns: int = 12
    """Steps of each skew in a repeat."""
    tokens: int = 1024
    """Choices of a rank in a step."""
    d_model: int = 256
    """Width."""
    d_hidden: int = 1024
    """Hidden width of an expert."""
    idle: bool = False
    """Nothing else runs: judge the wall clock too, where each process has a core."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def skews(ranks: int) -> list[float]:
    return [0.0, 0.25, 0.5, 1.0, *([2.0] if ranks > 2 else [])]


def load(ranks: int, tokens: int, skew: float) -> list[int]:
    """Choices of each expert that one rank makes: those of the first rank's experts `1 + skew` times their share."""
    first = round(tokens / ranks * (1 + skew))
    other = (tokens - first) // (ranks - 1)
    by_rank = [tokens - other * (ranks - 1), *[other] * (ranks - 1)]
    return [part for each in by_rank for part in (each - each // EXPERTS, each // EXPERTS)]


class _Exchange(torch.autograd.Function):
    """all_to_all of rows, whose gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: list[int], here: list[int]) -> Tensor:
        ctx.splits = there, here
        out = x.new_empty(sum(here), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), here, there)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        there, here = ctx.splits
        out = grad.new_empty(sum(there), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), there, here)
        return out, None, None


def step(x: Tensor, weights: list[Tensor], load_E: list[int]) -> None:
    """A training step of the mixture; rows of x lie in the order of their experts."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    there = [sum(load_E[r * EXPERTS : (r + 1) * EXPERTS]) for r in range(ranks)]
    mine = load_E[rank * EXPERTS : (rank + 1) * EXPERTS]
    got: Tensor = _Exchange.apply(x, there, [there[rank]] * ranks)  # type: ignore[no-untyped-call]
    # Of each sender first its rows for the first expert: bring each expert's together.
    parts = got.split(mine * ranks)
    out = []
    for expert in range(EXPERTS):
        rows = torch.cat(parts[expert::EXPERTS])
        out.append((torch.relu(rows @ weights[2 * expert]) @ weights[2 * expert + 1]).split([mine[expert]] * ranks))
    back = torch.cat([part for sender in zip(*out, strict=True) for part in sender])
    out_of: Tensor = _Exchange.apply(back, [there[rank]] * ranks, there)  # type: ignore[no-untyped-call]
    out_of.square().mean().backward()


def _rank(rank: int, ranks: int, folder: str, check: Check) -> None:
    begin_rank(rank, ranks, folder)
    torch.manual_seed(rank)
    rates = measure_rank(check.d_model, check.d_hidden)
    shapes = [(check.d_model, check.d_hidden), (check.d_hidden, check.d_model)] * EXPERTS
    weights = [torch.randn(shape).div(shape[0] ** 0.5).requires_grad_() for shape in shapes]
    x = torch.randn(check.tokens, check.d_model, requires_grad=True)
    loads = {skew: load(ranks, check.tokens, skew) for skew in skews(ranks)}
    for each in loads.values():
        step(x, weights, each)
    order = random.Random(0)
    found: dict[str, dict[float, list[float]]] = {
        clock: {skew: [] for skew in loads} for clock in ("wall", "processor")
    }
    even: list[float] = []
    for _ in range(check.repeats):
        ratios: dict[str, dict[float, list[float]]] = {clock: {skew: [] for skew in loads} for clock in found}
        for _ in range(check.turns):
            seconds = {}
            for skew in order.sample(list(loads), len(loads)):
                dist.barrier()
                clocks = time.perf_counter(), time.process_time()
                step(x, weights, loads[skew])
                spent = torch.tensor([time.perf_counter() - clocks[0], time.process_time() - clocks[1]]).double()
                dist.all_reduce(spent, dist.ReduceOp.MAX)
                seconds[skew] = spent.tolist()
            even.append(seconds[0.0][0])
            for number, own in enumerate(ratios.values()):
                for skew, several in own.items():
                    several.append(seconds[skew][number] / seconds[0.0][number])
        for clock, own in ratios.items():
            for skew, several in own.items():
                found[clock][skew].append(statistics.median(several))
    if rank == 0:
        torch.save({"rates": rates, "ratios": found, "even_ms": 1e3 * statistics.median(even)}, f"{folder}/found.pt")
    dist.destroy_process_group()


def simulated(check: Check, ranks: int, rates: tuple[float, ...], *, latency: bool) -> dict[float, float]:
    flops, memory, link, call = rates
    call = call if latency else 0.0
    here = Machine("this machine", flops, memory, link, call, link, call, ranks)
    mixture = Mixture(1, check.d_model, check.d_hidden, 2, check.tokens, 1, 1, bytes=4)
    out = {}
    for skew in skews(ranks):
        time_ = layer_time(np.array(load(ranks, check.tokens, skew), dtype=float), 1, mixture, here, ranks)
        out[skew] = time_.experts + time_.exchange
    return {skew: seconds / out[0.0] for skew, seconds in out.items()}


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def main() -> int:
    check = tyro.cli(Check)
    console = Console()
    table = Table(title="A mixture's training step, relative to even loads", title_justify="left")
    for head in ("ranks", "MaxVio", "processor's time", "simulated", "misses by", "wall", "simulated", "misses by"):
        table.add_column(head, justify="right", no_wrap=True)
    content: dict[str, Any] = {"machine": machine() | {"load_before": os.getloadavg()[0]}, "settings": asdict(check)}
    content["tolerance"], content["ranks"], worst = TOLERANCE, {}, 0.0
    for ranks in check.ranks:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_rank, (ranks, folder, check), nprocs=ranks)
            found = torch.load(Path(folder) / "found.pt", weights_only=True)
        said = {clock: simulated(check, ranks, found["rates"], latency=clock == "wall") for clock in found["ratios"]}
        content["ranks"][str(ranks)] = found | {"simulated": said}
        for skew in skews(ranks)[1:]:
            row = {clock: [_spread(own[skew]), f"{said[clock][skew]:.2f}"] for clock, own in found["ratios"].items()}
            miss = {clock: said[clock][skew] / statistics.median(found["ratios"][clock][skew]) - 1 for clock in said}
            judged = ["processor", *(["wall"] if check.idle and ranks <= (os.cpu_count() or 1) else [])]
            worst = max(worst, *(abs(miss[clock]) for clock in judged))
            cells = [text for clock in ("processor", "wall") for text in (*row[clock], f"{miss[clock]:+.1%}")]
            table.add_row(str(ranks), f"{skew:g}", *cells)
    content["machine"]["load_after"] = os.getloadavg()[0]
    content["worst"] = worst
    console.print(table)
    console.print(f"Worst miss {worst:.1%}; the tolerance is {TOLERANCE:.0%}.", highlight=False)
    if check.out:
        write_json({**content, "settings": content["settings"] | {"out": None}}, Path(check.out))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
