"""Reads the folders that training runs leave behind and tells their story: one table, one page, one picture.

>>> from sinkroute.lab.report import read_runs, result_table, write_report
>>> runs = read_runs(["runs/demo"])  # doctest: +SKIP
>>> rich.print(result_table(runs).rich())  # doctest: +SKIP
>>> write_report(runs, "runs/demo/report.html")  # doctest: +SKIP

- `runs` reads run folders and groups the seeds of a method;
- `metric` says what a run is measured in;
- `table` holds every number and every sentence that compares methods, for the terminal and for the page alike;
- `figures` draws (the only module that imports matplotlib);
- `page` puts it all into one HTML file that needs no network.
"""

from sinkroute.lab.report.page import write_picture, write_report
from sinkroute.lab.report.runs import Group, Run, group_runs, read_baselines, read_runs
from sinkroute.lab.report.table import Table, result_table

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
