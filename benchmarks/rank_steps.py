"""Time of a training step on several ranks with each router, relative to vanilla top-k, and what routers send in it.

    python benchmarks/rank_steps.py [--ranks 4] [--repeats 5] [--pairs 8] [--out FILE.json]

So many processes on this machine, one thread each, train a decoder with data parallelism over gloo. With more of them
than cores they wait for each other, so that the times are of a machine that is too small; the ratios are what counts.
Steps of all variants alternate, in an order that is shuffled at each turn and the same on all ranks, and a variant's
time is set against vanilla's of the same turn. A repeat is the median of those ratios; the table shows the median
repeat with the smallest and the largest. SSR's two branches are timed apart (p = 0 and p = 1, plans of all ranks'
tokens): its step at p = 0.001 is their weighted mean. What is sent is counted by the ledger of sinkroute
(`sinkroute.transport.collectives`), mean over steps; what data parallelism itself sends is not in it.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import sinkroute
from sinkroute.lab.bench.timing import alternate
from sinkroute.lab.config import ModelConfig, RouterConfig
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.lab.models import Decoder
from sinkroute.transport.collectives import Sent, sent

PLAN = {"process_group": "world"}
VARIANTS: dict[str, RouterConfig] = {
    "softmax": RouterConfig("softmax"),
    "softmax again": RouterConfig("softmax"),  # what the benchmark calls a difference when there is none
    "ssr-l, softmax step": RouterConfig("ssr-l", {"probability": 0.0, **PLAN}),
    "ssr-l, Sinkhorn step": RouterConfig("ssr-l", {"probability": 1.0, **PLAN}),
    "ssr-dual": RouterConfig("ssr-dual"),
    "loss-free": RouterConfig("loss-free"),
    "global-load-balance": RouterConfig("global-load-balance"),
}
PROBABILITY = 0.001


@dataclass
class Benchmark:
    """Time of a training step on several ranks with each router, relative to vanilla top-k."""

    ranks: int = 4
    """Processes, one thread each."""
    repeats: int = 5
    """Repeats; each gives one ratio per router."""
    pairs: int = 8
    """Steps of each router in a repeat."""
    batch: int = 4
    """Sequences of a rank."""
    length: int = 128
    """Bytes in a sequence."""
    layers: int = 4
    """Layers, each with a mixture of experts."""
    d_model: int = 256
    """Width."""
    d_hidden: int = 128
    """Hidden width of an expert."""
    experts: int = 16
    """Experts of a layer; a token visits two."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def steppers(benchmark: Benchmark) -> dict[str, Callable[[], None]]:
    """Variant → a function that makes a training step of the one model with its routers."""
    torch.manual_seed(0)
    sizes = {name: getattr(benchmark, name) for name in ("layers", "d_model", "d_hidden", "experts")}
    model = Decoder(ModelConfig(**sizes), RouterConfig("softmax"))
    parallel = DistributedDataParallel(model)  # it does not know the buffers of routers that come later
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draws = torch.Generator().manual_seed(1 + dist.get_rank())

    layers = [module for module in model.modules() if isinstance(module, sinkroute.MoE)]

    def make(router: RouterConfig) -> Callable[[], None]:
        routers = [
            sinkroute.create_router(router.name, num_experts=benchmark.experts, top_k=2, **router.options)
            for _ in layers
        ]
        count = iter(range(10**9))

        def step() -> None:
            for layer, own in zip(layers, routers, strict=True):
                layer.router = own
            sinkroute.set_step(model, next(count))
            # Symbols that differ in how frequent they are, or experts would have nothing to tell apart.
            text_BL = (256 * torch.rand(benchmark.batch, benchmark.length + 1, generator=draws) ** 3).long()
            scores_BLV = parallel(text_BL[:, :-1])
            F.cross_entropy(scores_BLV.flatten(0, 1), text_BL[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: make(router) for name, router in VARIANTS.items()}


def measure(benchmark: Benchmark) -> dict[str, Any]:
    """Ratios to vanilla by variant, one a repeat; vanilla's median milliseconds; what was sent in a step."""
    steps = steppers(benchmark)
    for step in steps.values():
        for _ in range(3):  # the first plans, and what ranks ask each other once
            step()
    told = dict.fromkeys(VARIANTS, Sent())

    def timed(name: str) -> float:
        dist.barrier()
        before, start = sent(), time.perf_counter()
        steps[name]()
        dist.barrier()  # a step is over when the last rank has made it
        seconds = time.perf_counter() - start
        told[name] += sent() - before
        return seconds

    repeats = range(benchmark.repeats)
    _, vanilla_ms, ratios = alternate([list(VARIANTS)] * benchmark.pairs, "softmax", timed, repeats=repeats)
    times = benchmark.repeats * benchmark.pairs
    each = {name: {key: value / times for key, value in of._asdict().items()} for name, of in told.items()}
    parts, mixed = [f"ssr-l, {branch} step" for branch in ("softmax", "Sinkhorn")], f"ssr-l at p = {PROBABILITY:g}"
    weights = 1 - PROBABILITY, PROBABILITY
    ratios[mixed] = [
        sum(w * value for w, value in zip(weights, values, strict=True))
        for values in zip(*(ratios[part] for part in parts), strict=True)
    ]
    each[mixed] = {
        key: sum(w * each[part][key] for w, part in zip(weights, parts, strict=True)) for key in Sent._fields
    }
    return {"vanilla_ms": vanilla_ms, "ratios": ratios, "sent": each}


def on_a_rank(rank: int, benchmark: Benchmark, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=benchmark.ranks)
    found = measure(benchmark)
    if rank == 0:
        write_json(found, Path(folder) / "found.json")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    benchmark = tyro.cli(Benchmark)
    os.environ["OMP_NUM_THREADS"] = "1"
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_a_rank, (benchmark, folder), nprocs=benchmark.ranks)
        found = json.loads(Path(folder, "found.json").read_text())
    about = {**machine(), "load_before": before, "load_after": os.getloadavg()[0]}
    table = Table(
        title=f"A step on {benchmark.ranks} ranks relative to vanilla ({found['vanilla_ms']:.0f} ms; "
        f"{benchmark.batch} × {benchmark.length} bytes a rank)",
        caption=f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}; {benchmark.repeats} repeats of "
        f"{benchmark.pairs} alternating steps; load {before:.0f} before and {about['load_after']:.0f} after",
    )
    for column in ("router", "median", "smallest", "largest", "collectives", "messages", "bytes"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for name, values in found["ratios"].items():
        times = (f"{value:.3f}" for value in (statistics.median(values), min(values), max(values)))
        table.add_row(name, *times, *(f"{found['sent'][name][key]:.4g}" for key in Sent._fields))
    Console(width=120).print(table)
    if benchmark.out:
        write_json({"machine": about, "settings": asdict(benchmark) | {"out": None}, **found}, Path(benchmark.out))


if __name__ == "__main__":
    main()
