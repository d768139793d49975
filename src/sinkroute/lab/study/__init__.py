"""Studies: methods side by side, from a plan of runs to one table and one page.

- `config` reads a study, `cells` makes its runs, each with the hash of what decides its numbers;
- `state`, `lock`, `worker`, `pool`, `cluster` execute them, resumably, here or on a cluster;
- `runs` reads the folders that runs leave; `statistics` compares, `results` gathers;
- `table`, `curves`, `forest` and `page` show.
"""

from sinkroute.lab.study.page import write_picture, write_report
from sinkroute.lab.study.runs import Group, Run, group_runs, read_baselines, read_runs
from sinkroute.lab.study.table import Table, result_table

__all__ = [
    "Group",
    "Run",
    "Table",
    "group_runs",
    "read_baselines",
    "read_runs",
    "result_table",
    "write_picture",
    "write_report",
]
