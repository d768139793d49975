"""This machine as `sinkroute bench --simulate` wants it: two processes, one thread each, over gloo.

Products are measured at an expert's size (512 rows), forward; memory by copying 64 MB; a link by all_to_all of 8 MB and
of 4 bytes. Each the median of `TURNS`, and of the two processes the slower. What else the machine does is in it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from sinkroute.lab.bench.simulate import Machine

__all__ = ["begin_rank", "measure_machine", "measure_rank"]

TURNS = 15


def measure_machine(d_model: int = 256, d_hidden: int = 256) -> Machine:
    """Measure it; some ten seconds."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (2, folder, d_model, d_hidden), nprocs=2)
        flops, memory, link, latency = torch.load(Path(folder) / "found.pt", weights_only=True)
    return Machine("this-machine", flops, memory, link, latency, link, latency, 2)


def begin_rank(rank: int, ranks: int, folder: str) -> None:
    """Join a group of processes on this machine, one thread each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)


def _rank(rank: int, ranks: int, folder: str, d_model: int, d_hidden: int) -> None:
    begin_rank(rank, ranks, folder)
    found = measure_rank(d_model, d_hidden)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def measure_rank(d_model: int, d_hidden: int, rows: int = 512) -> tuple[float, float, float, float]:
    """Operations, bytes of memory, bytes of a link, each a second, and the latency of a call; the slowest rank's."""
    ranks = dist.get_world_size()
    x, w = torch.randn(rows, d_model), torch.randn(d_model, d_hidden)
    block = torch.randn(2**24)
    message = torch.randn(2**21)
    tiny = torch.zeros(ranks)
    seconds = torch.tensor(
        [
            _seconds(lambda: torch.mm(x, w)),
            _seconds(lambda: block.clone()),
            _seconds(lambda: dist.all_to_all_single(torch.empty_like(message), message)),
            _seconds(lambda: dist.all_to_all_single(torch.empty_like(tiny), tiny)),
        ],
        dtype=torch.float64,
    )
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    product, copy, exchange, call = seconds.tolist()
    sent = 4 * len(message) * (ranks - 1) / ranks
    return 2 * rows * d_model * d_hidden / product, 2 * 4 * len(block) / copy, sent / max(exchange - call, 1e-9), call


def _seconds(call: Callable[[], object]) -> float:
    """The median, with all ranks beginning together."""
    call()
    found = []
    for _ in range(TURNS):
        dist.barrier()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
