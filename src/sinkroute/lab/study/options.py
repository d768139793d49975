"""The options of `sinkroute compare`, by themselves: who only asks for help loads nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

__all__ = ["CompareCommand"]


@dataclass
class CompareCommand:
    """Methods x sizes x seeds: run what is missing, then a table with intervals and paired tests, a page and a JSON.

    CONFIG is a preset (experiments/compare, study/NAME, demo) or a YAML file. Runs that are finished are read,
    unfinished ones continued; several calls with one folder share the work.
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A preset or a YAML file."""
    seeds: tuple[int, ...] = ()
    """These seeds instead of the file's."""
    only: tuple[str, ...] = ()
    """Run just these methods; the table shows all that are there."""
    sizes_only: tuple[str, ...] = ()
    """Run just these sizes."""
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Change the configuration of all runs: --set train.steps=50 train.lr=1e-3"""
    out: str | None = None
    """The folder of the runs, instead of the file's."""
    jobs: int | None = None
    """Runs at a time; by default one per GPU, or one per core."""
    threads: int | None = None
    """Threads of each; by default the cores, shared out."""
    fresh: bool = False
    """Delete earlier runs, of the methods and sizes that are to run."""
    retry: bool = False
    """Run once more what failed."""
    list: bool = False
    """Only say how far each run is."""
    report: bool = False
    """Only read what is there, and write table, page and JSON."""
    power: bool = False
    """Run nothing: how many seeds the primary comparison needs, by the scatter of earlier results."""
    earlier: tuple[str, ...] = ()
    """For --power: results.json files, or folders; by default those of the repository's study."""
    markdown: str | None = None
    """Also write the table here, to paste it."""
    submit: str | None = None
    """Hand the runs to this partition of a Slurm cluster, by submitit, --jobs of them at a time."""
    submit_options: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Of the jobs: --submit-options timeout_min=600 gpus_per_node=1 cpus_per_task=8 slurm_account=NAME"""
