"""The figures of a size as a table."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from sinkroute.lab.bench.sizes import Size
from sinkroute.lab.bench.variants import BASELINE

__all__ = ["size_table"]


def size_table(size: Size, content: dict[str, Any]) -> Table:
    """Time and memory of every variant relative to the baseline."""
    figures, about, settings = content["sizes"][str(size)], content["machine"], content["settings"]
    milliseconds, base_mb = figures["softmax_ms"], figures["extra_mb"][BASELINE]
    table = Table(
        title=f"{size.tokens:,} tokens, {size.experts} experts, top-{size.top_k}: softmax takes "
        f"{milliseconds:.4g} ms and {base_mb:.3g} MiB",
        caption=f"{about['gpu'] or about['cpu']}, {settings['threads']} thread(s), torch {about['torch']}; median, "
        f"smallest and largest of {len(figures['ratios'][BASELINE])} repeats of {figures['turns']} alternating passes",
    )
    for column in ("router", "time", "smallest", "largest", "memory"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for name, values in figures["ratios"].items():
        memory = f"{figures['extra_mb'][name] / base_mb:.2f}" if name in figures["extra_mb"] else ""
        row = (f"{value:.3f}" for value in (statistics.median(values), min(values), max(values)))
        table.add_row(name, *row, memory, end_section=name == "softmax again")
    for name, reason in figures["refused"].items():
        table.add_row(name, f"[dim]{reason.split(';')[0]}[/]")
    return table
