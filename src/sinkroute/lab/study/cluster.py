"""The runs of a comparison as jobs of a cluster, through submitit: one job a run.

A job does what a worker does, lock and checkpoints included, so jobs, workers and further calls can share a folder. One
that is preempted or runs out of time is put back into the queue by submitit and continues from its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkroute.lab.interrupt import stop_on_signal
from sinkroute.lab.study.cells import Cell
from sinkroute.lab.study.pool import order_of
from sinkroute.lab.study.worker import run_cell

__all__ = ["CellJob", "submit"]


class CellJob:
    """What a job does; submitit pickles it, and asks `checkpoint` what to do when the job is to end early."""

    def __call__(self, order: dict[str, Any]) -> str:
        """Run one cell; returns how it ended."""
        import torch

        threads = os.environ.get("SLURM_CPUS_PER_TASK")
        if threads:
            torch.set_num_threads(int(threads))
        heard: list[str] = []
        with stop_on_signal() as stop:
            run_cell(order, stop, lambda **event: heard.append(event["kind"]))
        if heard[-1] == "failed":
            raise RuntimeError(f"{order['name']} failed; see failed.json in {order['folder']}")
        return heard[-1]

    def checkpoint(self, order: dict[str, Any]) -> Any:
        """The same job again: it continues from the run's own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, order | {"fresh": False})


def submit(
    cells: Sequence[Cell],
    out: Path,
    partition: str,
    options: Mapping[str, Any],
    *,
    fresh: bool,
    about: dict[str, Any],
    executor: Any = None,
) -> list[str]:
    """Hand cells to a cluster, as one array of jobs.

    Args:
        cells: to be run.
        out: folder of the comparison; jobs leave their logs in `cluster/` there.
        partition: of Slurm.
        options: of submitit's `update_parameters`, such as timeout_min.
        fresh: delete earlier runs.
        about: for the record of each cell.
        executor: submitit's; None: the one for Slurm.

    Returns:
        The ids of the jobs.

    Raises:
        ModuleNotFoundError: submitit is missing; the message says how to get it.
        ValueError: an option that submitit does not know.
    """
    if executor is None:
        executor = _executor(out / "cluster")
    parameters = {"slurm_partition": partition, **options}
    try:
        executor.update_parameters(**parameters)
    except (TypeError, NameError, ValueError, AssertionError) as error:
        raise ValueError(f"--submit-options: submitit refuses {parameters}: {error}") from None
    orders = [order_of(cell, out, fresh=fresh, about=about) for cell in cells]
    return [str(job.job_id) for job in executor.map_array(CellJob(), orders)]


def _executor(folder: Path) -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise ModuleNotFoundError('--submit needs submitit; install it: pip install "sinkroute[sweep]"') from None
    return submitit.AutoExecutor(folder=folder, cluster="slurm")
