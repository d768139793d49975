"""Methods side by side: runs in parallel, paired statistics, one table, one page.

- `config` reads a comparison, `cells` makes its runs, each with the hash of what decides its numbers;
- `state`, `lock`, `worker`, `pool`, `cluster` execute them, resumably, here or on a cluster;
- `statistics` compares, `results` gathers, `table`, `figures` and `page` show.
"""

from sinkroute.lab.compare.run import CompareCommand, run_compare

__all__ = ["CompareCommand", "run_compare"]
