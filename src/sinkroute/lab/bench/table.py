"""The figures of a size as a table."""

from __future__ import annotations

import statistics
from typing import Any

from sinkroute.lab.bench.sizes import Size
from sinkroute.lab.bench.variants import BASELINE
from sinkroute.lab.screen import Column, ScreenTable

__all__ = ["size_table"]

_COLUMNS = (
    Column("router", words=True),
    Column("time", matters=2),
    Column("smallest"),
    Column("largest"),
    Column("memory", matters=1),
)


def size_table(size: Size, content: dict[str, Any]) -> ScreenTable:
    """Time and memory of every variant relative to the baseline."""
    figures, about, settings = content["sizes"][str(size)], content["machine"], content["settings"]
    milliseconds, base_mb = figures["softmax_ms"], figures["extra_mb"][BASELINE]
    table = ScreenTable(
        _COLUMNS,
        title=f"{size.tokens:,} tokens, {size.experts} experts, top-{size.top_k}: softmax takes "
        f"{milliseconds:.4g} ms and {base_mb:.3g} MiB",
        below=[
            *(f"{name}: {reason.split(';')[0]}" for name, reason in figures["refused"].items()),
            f"{about['gpu'] or about['cpu']}, {settings['threads']} thread(s), torch {about['torch']}; median, "
            f"smallest and largest of {len(figures['ratios'][BASELINE])} repeats of {figures['turns']} alternating "
            "passes",
        ],
        elsewhere="the file of figures",
    )
    for name, values in figures["ratios"].items():
        memory = f"{figures['extra_mb'][name] / base_mb:.2f}" if name in figures["extra_mb"] else ""
        row = (f"{value:.3f}" for value in (statistics.median(values), min(values), max(values)))
        table.add(name, *row, memory, end=name == "softmax again")
    return table
