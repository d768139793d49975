"""What routing costs: the time and memory of every router's forward and backward pass, relative to plain top-k.

The router only, from given logits to weights and back: neither gate nor experts, which are the same for all.
"""

from sinkroute.lab.bench.run import Bench, run_bench
from sinkroute.lab.bench.sizes import GRID, QUICK, Size
from sinkroute.lab.bench.table import size_table

__all__ = ["GRID", "QUICK", "Bench", "Size", "run_bench", "size_table"]
