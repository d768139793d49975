"""Runs, read from their folders: `config.yaml`, `log.jsonl` and, once a run is finished, `result.json`.

Reading is strict where a silent mistake would change a number (a broken line in the middle of a log is an error) and
lenient where a killed process leaves a mark (a torn last line, a missing result).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sinkroute.lab.log import read_log
from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.metric import Quality, dig, metric_of, number_at
from sinkroute.lab.study.state import State, check_data, read_record, read_result, read_state

__all__ = [
    "Group",
    "Run",
    "common_metric",
    "group_runs",
    "planned_runs",
    "read_json",
    "read_run",
    "read_runs",
]

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: it need not be there yet.
        method: the router's name.
        label: the method, as tables call it.
        seed: of the run.
        config: what `config.yaml` holds.
        result: what `result.json` holds; None while the run is unfinished.
        size: the heading under which it is compared with others.
        state: how far it is.
        record: by which code and on which machine it was run, where that was written down.
        text: SHA-256 of its data; empty where that is not known.
        hash: of what decides its numbers, where a plan demands one.
    """

    folder: Path
    method: str
    label: str
    seed: int
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None
    size: str = ""
    state: State = field(default_factory=lambda: State("done"))
    record: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    hash: str = ""

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.result is not None

    @cached_property
    def _log(self) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
        path = self.folder / "log.jsonl"
        return read_log(path) if path.is_file() else ((), ())

    @property
    def train(self) -> tuple[Line, ...]:
        """The log's lines of training, in the order of their steps."""
        return self._log[0]

    @property
    def evals(self) -> tuple[Line, ...]:
        """The log's lines of validation on the way, in the order of their steps."""
        return self._log[1]

    @property
    def metric(self) -> Quality:
        """What it is measured in."""
        model = self.config.get("model")
        evaluated = self.evals[-1] if self.result is None and self.evals else {}
        return metric_of(self.result, evaluated, model if isinstance(model, Mapping) else {})

    @property
    def quality(self) -> float | None:
        """The metric on the validation data; None while the run is unfinished."""
        return self.value("valid", self.metric.key)

    @property
    def last_step(self) -> int:
        """The step of the last line in the log; 0 if there is none."""
        return max((int(line["step"]) for line in (*self.train, *self.evals)), default=0)

    @property
    def planned_steps(self) -> int | None:
        """`train.steps` of the configuration; None if it does not say."""
        steps = number_at(self.config, "train.steps")
        return None if steps is None else int(steps)

    @property
    def diverged_at(self) -> int | None:
        """The first logged step whose loss is not finite; None if there is none."""
        losses = ((line["step"], line.get("loss")) for line in self.train)
        return next((int(at) for at, loss in losses if isinstance(loss, float) and not math.isfinite(loss)), None)

    @property
    def load_average(self) -> tuple[float, float] | None:
        """Processes that wanted a core, the average over a minute, when it began and ended; None: not written down."""
        found = dig(self.result, "machine.load_average")
        return (float(found[0]), float(found[1])) if isinstance(found, list) and len(found) == 2 else None

    @property
    def tag(self) -> str:
        """What is special about it: failed, interrupted, diverged, or an empty string."""
        parts = []
        if self.state.kind == "failed":
            parts.append(f"failed: {self.state.note}")
        elif not self.finished and self.state.kind != "waiting":
            of = "" if self.planned_steps is None else f" of {self.planned_steps}"
            parts.append(f"interrupted at step {self.last_step}{of}")
        if self.state.kind != "waiting" and self.diverged_at is not None:
            parts.append(f"diverged: loss not finite at step {self.diverged_at}")
        return "; ".join(parts)

    def value(self, *keys: str) -> float | None:
        """A number of `result.json`, such as `run.value("valid", "bits_per_byte")`; None if it is not there."""
        return number_at(self.result, ".".join(keys))


@dataclass(frozen=True)
class Group:
    """The runs of one method under one heading: they share a label and differ in their seeds.

    `place` says which of the page's inks the method has, under every heading the same.
    """

    label: str
    method: str
    runs: tuple[Run, ...]
    place: int

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def drawn(self) -> tuple[Run, ...]:
        """The runs that curves average: the finished ones, or all of them if none is.

        A mean whose members leave halfway would jump where they leave.
        """
        return self.finished or self.runs

    def values(self, *keys: str) -> list[float]:
        """The numbers at `keys` in the results of the finished runs that have one."""
        found = (run.value(*keys) for run in self.finished)
        return [value for value in found if value is not None]

    @property
    def qualities(self) -> list[float]:
        """The metric of the finished runs on the validation data."""
        return self.values("valid", self.runs[0].metric.key)

    @property
    def selective(self) -> bool:
        """Whether the runs chose between several routing branches while they trained."""
        taken = {
            name for run in self.runs for line in run.train for name, n in (line.get("branches") or {}).items() if n
        }
        return len(taken) > 1


def read_runs(paths: Iterable[str | Path] | str | Path) -> list[Run]:
    """Read run folders.

    Args:
        paths: each a run folder (one that holds `config.yaml`) or a folder of run folders.

    Returns:
        The runs in the order of `paths`. Within a folder of runs: in the order in which they were planned, where that
        is written down there, and then the others sorted by name.

    Raises:
        FileNotFoundError: a path or a file of a run is missing.
        ValueError: a file is there but cannot be understood; the message names the file and, in a log, the line.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("paths is empty; pass at least one run folder or folder of runs, such as ['runs/demo'].")
    return [read_run(folder) for folder in dict.fromkeys(each for path in given for each in _run_folders(Path(path)))]


def read_run(folder: str | Path) -> Run:
    """Read one run folder; see `read_runs` for what is raised."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"run folder {str(folder)!r} has no config.yaml; pass a folder that a training run wrote, "
            "or remove this one if it is a leftover."
        )
    config = read_json(folder / "config.yaml", yaml.safe_load)
    result = _read_result(folder / "result.json") if (folder / "result.json").is_file() else None
    if result is not None and not (folder / "log.jsonl").is_file():
        raise FileNotFoundError(
            f"run folder {str(folder)!r} has a result.json but no log.jsonl; copy the whole folder, or train again."
        )
    method = str(dig(config, "router.name") or folder.name)
    seed = (result or {}).get("seed", config.get("seed", 0))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed of run {str(folder)!r} must be a whole number; received {seed!r}.")
    text, record = (
        read_json(path) if path.is_file() else {} for path in (folder / "corpus.json", folder / "cell.json")
    )
    state = State("unfinished" if result is None else "done")
    label = str(config.get("label") or method)
    run = Run(folder, method, label, seed, config, result, "", state, record, str(text.get("sha256", "")))
    run.train  # a broken log is told now  # noqa: B018
    return run


def planned_runs(plan: Plan) -> list[Run]:
    """The runs of a plan, those that are not begun too; a result counts only under the hash that the plan demands.

    Raises:
        ValueError: a result is not what its run wrote, or runs were trained on different data.
    """
    from sinkroute.lab.config import to_mapping

    out = []
    for cell in plan.cells:
        state = read_state(cell, plan.out)
        result = read_result(cell, plan.out) if state.kind == "done" else None
        config, record = to_mapping(cell.config), read_record(cell, plan.out)
        name, folder = cell.config.router.name, plan.out / cell.name
        out.append(Run(folder, name, cell.method, cell.seed, config, result, cell.size, state, record, hash=cell.hash))
    check_data([cell for cell, run in zip(plan.cells, out, strict=True) if run.finished], plan.out)
    return out


def group_runs(runs: Iterable[Run], labels: Sequence[str] = ()) -> list[Group]:
    """The runs by label, in the order in which the labels first appear; `labels`: all of the page."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    places = {label: place for place, label in enumerate(labels or by_label)}
    return [Group(label, runs[0].method, tuple(runs), places[label]) for label, runs in by_label.items()]


def common_metric(runs: Sequence[Run]) -> Quality:
    """What all the runs are measured in.

    Raises:
        ValueError: there are several metrics, or no runs.
    """
    if not runs:
        raise ValueError("runs is empty; pass what read_runs(['runs/demo']) returns.")
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(run.metric.name, []).append(run.name)
    if len(names) > 1:
        parts = [f"{', '.join(found[:3])}{', …' if len(found) > 3 else ''} in {name}" for name, found in names.items()]
        raise ValueError(
            f"these runs are not measured alike, {'; '.join(parts)}: numbers of different kinds cannot be compared. "
            "Report the runs of each kind by themselves."
        )
    return runs[0].metric


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"paths: {str(path)!r} is {'a file' if path.exists() else 'not there'}; pass a run folder or a folder of "
            "runs, such as 'runs/demo' after `make demo`."
        )
    # A folder with a log but without a configuration is kept, so that read_run says what is missing.
    marks = ("config.yaml", "log.jsonl", "result.json")
    if any((path / mark).is_file() for mark in marks):
        return [path]
    found = sorted(child for child in path.iterdir() if any((child / mark).is_file() for mark in marks))
    if not found:
        raise FileNotFoundError(
            f"paths: {str(path)!r} is no run folder (it has no config.yaml) and holds none; train first "
            "(`make demo`), or pass the folder that holds the runs."
        )
    order: list[str] = []
    for name, key in (("compare.json", "cells"), ("baselines.json", "order")):
        if (path / name).is_file():
            order += [*(read_json(path / name).get(key) or ())]
    place = {name: rank for rank, name in enumerate(dict.fromkeys(map(str, order)))}
    return sorted(found, key=lambda folder: (place.get(folder.name, len(place)), folder.name))


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if not isinstance(result.get("method"), str):
        raise ValueError(
            f"{path}: 'method' must be the router's name; received {result.get('method')!r}. Evaluate again."
        )
    try:
        key = metric_of(result, {}, {}).key
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Evaluate the run again.") from None
    if number_at(result, f"valid.{key}") is None:
        value = dig(result, f"valid.{key}")
        raise ValueError(f"{path}: 'valid.{key}' must be a number; received {value!r}. Evaluate the run again.")
    return result


def read_json(path: Path, parse: Any = json.loads) -> dict[str, Any]:
    """A file that holds a mapping."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        kind = "YAML" if parse is yaml.safe_load else "JSON"
        raise ValueError(f"{path}: not valid {kind} ({error}); restore what the run wrote, or remove it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping, received {type(value).__name__}; restore it, or remove it.")
    return value
