"""What routing costs, relative to plain top-k.

`run_bench` measures time and memory of every router's forward and backward pass, from given logits to weights and back:
neither gate nor experts, which are the same for all. `measure_steps` times whole training steps of methods in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkroute._lazy import lazily

if TYPE_CHECKING:
    from sinkroute.lab.bench.options import Bench
    from sinkroute.lab.bench.run import run_bench
    from sinkroute.lab.bench.sizes import GRID, QUICK, Size
    from sinkroute.lab.bench.steps import StepTimes, measure_steps, stepper
    from sinkroute.lab.bench.table import size_table

__all__ = ["GRID", "QUICK", "Bench", "Size", "StepTimes", "measure_steps", "run_bench", "size_table", "stepper"]

__getattr__ = lazily(
    __name__,
    {
        "GRID": "sizes",
        "QUICK": "sizes",
        "Bench": "options",
        "Size": "sizes",
        "StepTimes": "steps",
        "measure_steps": "steps",
        "run_bench": "run",
        "size_table": "table",
        "stepper": "steps",
    },
)
