"""Balanced top-k over ranks against each rank by itself: what is kept, what it costs in score, messages and time.

    python benchmarks/balanced_ranks.py [--ranks 4] [--seeds 3] [--tokens 4096] [--out FILE.json]

Gloo processes, one thread each. Logits are randn(T, E) + randn(E) + shift · randn(E), the last of each rank's domain.
"Kept" is MaxVio of the top-k of all ranks' logits + bias: by the mean of what ranks find alone, by what they find
together, and by what one process finds that has all tokens. "Lost" is by how much the logits of a token's experts sum
to less than those of plain top-k, against that one process. A message is a call of all_gather; "sent" is what a rank
gives to all of them. Times are of the slowest rank, and of the second call.
"""

from __future__ import annotations

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
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.transport import balanced_topk

CASES = [(experts, k, shift) for shift in (0.5, 1.5) for experts, k in ((16, 2), (64, 8), (256, 8))]


@dataclass
class Benchmark:
    """Balance over ranks."""

    ranks: int = 4
    """Gloo processes."""
    seeds: int = 3
    """Draws of the logits."""
    tokens: int = 4096
    """Of each rank."""
    tol: float = 0.01
    """MaxVio to ask for."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def logits_of(options: Benchmark, experts: int, shift: float, seed: int, rank: int) -> Tensor:
    """(T, E) of one rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    common_E = torch.randn(experts, generator=torch.Generator().manual_seed(1000 * seed + 999))
    domain_E = common_E + shift * torch.randn(experts, generator=generator)
    return torch.randn(options.tokens, experts, generator=generator) + domain_E


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the milliseconds of a second call."""
    found = function()
    start = time.perf_counter()
    function()
    return found, 1e3 * (time.perf_counter() - start)


def on_a_rank(rank: int, options: Benchmark, folder: str) -> None:
    """Everything that one process measures, saved for the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    sent: list[int] = []
    original = dist.all_gather

    def gather(parts: list[Tensor], x: Tensor, **others: Any) -> Any:
        sent.append(x.numel() * x.element_size())
        return original(parts, x, **others)

    dist.all_gather = gather  # type: ignore[assignment]
    found, group = {}, dist.group.WORLD
    for experts, k, shift in CASES:
        for seed in range(options.seeds):
            logits_TE = logits_of(options, experts, shift, seed, rank)
            alone, alone_ms = timed(lambda x=logits_TE, k=k: balanced_topk(x, k, options.tol))  # type: ignore[misc]
            dist.barrier()
            both, ms = timed(lambda x=logits_TE, k=k: balanced_topk(x, k, options.tol, process_group=group))  # type: ignore[misc]
            first = sent[: len(sent) // 2]
            sent.clear()
            balanced_topk(logits_TE, k, options.tol, init=both.bias, process_group=group)
            found[experts, k, shift, seed] = {
                "alone": tuple(alone),
                "together": tuple(both),
                "passes": both.passes,
                "messages": len(first),
                "sent": sum(first),
                "messages_warm": len(sent),
                "ms_alone": alone_ms,
                "ms": ms,
            }
            sent.clear()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compare(options: Benchmark, found: list[dict[Any, Any]]) -> list[dict[str, Any]]:
    """A row for each case and seed, against one process that has all tokens."""
    rows = []
    for experts, k, shift in CASES:
        for seed in range(options.seeds):
            parts = [each[experts, k, shift, seed] for each in found]
            logits_TE = torch.cat([logits_of(options, experts, shift, seed, rank) for rank in range(options.ranks)])
            whole, whole_ms = timed(lambda x=logits_TE, k=k: balanced_topk(x, k, options.tol))  # type: ignore[misc]
            best = logits_TE.topk(k).values.double().sum()

            def lost(experts_TK: Tensor, x: Tensor = logits_TE, best: Tensor = best) -> float:
                return float(best - x.gather(1, experts_TK).double().sum()) / len(x)

            def kept(bias_E: Tensor, x: Tensor = logits_TE, k: int = k) -> float:
                load_E = (x + bias_E).topk(k).indices.flatten().bincount(minlength=x.shape[1]).double()
                return float(load_E.max() / load_E.mean() - 1)

            together_TK = torch.cat([part["together"][0] for part in parts])
            load_E = together_TK.flatten().bincount(minlength=experts).double()
            rows.append(
                {
                    "experts": experts,
                    "k": k,
                    "shift": shift,
                    "seed": seed,
                    "kept_mean": kept(torch.stack([part["alone"][1] for part in parts]).mean(0)),
                    "kept": kept(parts[0]["together"][1]),
                    "kept_one": kept(whole.bias),
                    "same_bits": all(torch.equal(part["together"][1], parts[0]["together"][1]) for part in parts),
                    "load": float(load_E.max() / load_E.mean() - 1),
                    "lost_alone": lost(torch.cat([part["alone"][0] for part in parts])),
                    "lost": lost(together_TK),
                    "lost_one": lost(whole.experts),
                    **{name: parts[0][name] for name in ("passes", "messages", "sent", "messages_warm")},
                    "ms_alone": max(part["ms_alone"] for part in parts),
                    "ms": max(part["ms"] for part in parts),
                    "ms_one": whole_ms,
                }
            )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Means over the seeds, and the worst where that is what counts."""
    table = Table(title="balanced_topk over ranks")
    headings = "E, top-k|shift|kept: mean of ranks|together, worst|one process|loads, worst|lost: ranks alone|together"
    for heading in f"{headings}|one process|/ one, worst|messages, most|warm, most|kB sent|ms alone|ms|ms one".split(
        "|"
    ):
        table.add_column(heading, justify="right")
    for experts, k, shift in CASES:
        of = [row for row in rows if (row["experts"], row["k"], row["shift"]) == (experts, k, shift)]

        def mean(name: str, of: list[dict[str, Any]] = of) -> float:
            return statistics.fmean(row[name] for row in of)

        def worst(name: str, of: list[dict[str, Any]] = of) -> Any:
            return max(row[name] for row in of)

        table.add_row(
            f"{experts}, {k}",
            f"{shift}",
            f"{mean('kept_mean'):.2f}",
            f"{worst('kept'):.4f}",
            f"{worst('kept_one'):.4f}",
            f"{worst('load'):.4f}",
            f"{mean('lost_alone'):.3f}",
            f"{mean('lost'):.3f}",
            f"{mean('lost_one'):.3f}",
            f"{max(row['lost'] / row['lost_one'] for row in of):.4f}",
            f"{worst('messages')}",
            f"{worst('messages_warm')}",
            f"{mean('sent') / 1000:.1f}",
            f"{mean('ms_alone'):.0f}",
            f"{mean('ms'):.0f}",
            f"{mean('ms_one'):.0f}",
        )
    console.print(table)


def main() -> None:
    """Measure, show, write."""
    options = tyro.cli(Benchmark, description=__doc__)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_rank, (options, folder), nprocs=options.ranks)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(options.ranks)]
    rows = compare(options, found)
    show(rows, Console(width=max(Console().width, 170)))
    if options.out:
        write_json({"machine": machine(), "options": asdict(options), "rows": rows}, Path(options.out))


if __name__ == "__main__":
    main()
