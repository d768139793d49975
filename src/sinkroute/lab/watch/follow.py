"""Runs that are being trained, read a few lines at a time from what they write.

A run is a folder of the lab's (`config.yaml`, `log.jsonl`, at its end `result.json`), or the file to which a
`LoadMonitor` writes in a trainer of somebody's own. It may begin later, be killed, continue from an earlier step (the
later line of a step counts), start anew, and its last line may be half written: what is shown is what its log says.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sinkroute.lab.folders import runs_within
from sinkroute.lab.log import Lines, number

__all__ = ["DEAD", "Followed", "Follower", "Point", "fair_shares"]

QUIET = 60.0  # seconds without a line, and ten times the usual gap between two, after which a run is called silent
DEAD = 0.01  # of a fair share: `sinkroute.routing.metrics.DEAD`, without torch
PLAIN = ("softmax", "plain")  # branches that make no plan


@dataclass(frozen=True)
class Point:
    """A line of training, of either kind of log; None and empty where it does not say.

    Attributes:
        step: optimiser steps done.
        loss: of these steps; NaN or infinite where it diverged.
        max_vio: mean over layers.
        worst: of the layer where it is largest.
        tokens_per_second: of these steps.
        seconds: of all training so far.
        branches: calls of routers by the branch that they took; of a `LoadMonitor`'s log "plan" and "plain".
        dead: experts under 1 % of a fair share, over all layers.
    """

    step: int
    loss: float | None
    max_vio: float | None
    worst: float | None
    tokens_per_second: float | None
    seconds: float | None
    branches: Mapping[str, float]
    dead: int

    @property
    def planned(self) -> float | None:
        """Share of the calls that took another branch than plain top-k; None where the line does not say."""
        return _planned([self.branches])


@dataclass(eq=False)
class Followed:
    """A run as far as it has been read.

    Attributes:
        path: its folder, or its log file.
        name: what it is called on the screen.
        points: step → what its line says, the later line of a step.
        evals: step → what was measured on validation data, and the name of that.
        method: name of the router; empty where no configuration says.
        load: layer → load of each expert, as the last line has it.
        last: the point that was read last.
        steps: planned; None where no configuration says.
    """

    path: Path
    name: str
    points: dict[int, Point] = field(default_factory=dict)
    evals: dict[int, tuple[str, float]] = field(default_factory=dict)
    load: dict[str, list[float]] = field(default_factory=dict)
    last: Point | None = None
    method: str = ""
    steps: int | None = None
    result: tuple[str, float] | None = None
    failure: str = ""

    def __post_init__(self) -> None:
        is_log = self.path.suffix == ".jsonl"
        self.folder = None if is_log else self.path
        self._lines = Lines(self.path if is_log else self.path / "log.jsonl")
        self._about: float | None = None

    def poll(self) -> list[Point]:
        """Read what is new; the points of it in the order of the file."""
        void, lines = self._lines.new()
        if void:
            self.points, self.evals, self.load, self.last = {}, {}, {}, None
        if self.folder is not None:
            self._read_folder(self.folder)
        new = []
        for line in lines:
            step = _count(line.get("step"))
            if step is None:
                continue
            if line.get("kind") == "eval":
                measured = [(k, known) for k, v in line.items() if k != "step" and (known := number(v)) is not None]
                if measured and line.get("split", "valid") == "valid":
                    self.evals[step] = measured[0]
            elif line.get("kind", "train") == "train" and line.get("mode", "train") == "train":
                load = _loads(line)
                self.load = load or self.load
                self.points.pop(step, None)  # in the order in which they were read
                self.last = self.points[step] = _point(step, line, load)
                new.append(self.last)
        return new

    def _read_folder(self, folder: Path) -> None:
        config, result = folder / "config.yaml", folder / "result.json"
        try:
            written = config.stat().st_mtime
        except OSError:
            written = None
        if written != self._about and written is not None:
            about = _yaml(config)
            self.method = str(_dig(about, "router", "name") or "")
            self.steps = _count(_dig(about, "train", "steps"))
            self._about = written
        if not result.is_file():
            self.result = None
        elif self.result is None:
            valid = _json(result).get("valid")
            measured = list(valid.items())[1:2] if isinstance(valid, dict) else []  # the first is how many
            self.result = next(((k, known) for k, v in measured if (known := number(v)) is not None), ("", math.nan))
        self.failure = str(_json(folder / "failed.json").get("message", "")) if self.result is None else ""

    @property
    def sorted(self) -> list[Point]:
        """The points in the order of their steps."""
        return [self.points[step] for step in sorted(self.points)]

    @property
    def state(self) -> str:
        """Waiting (for its first line), running, silent (for longer than usual), diverged, failed, or finished."""
        if self.result is not None:
            return "finished"
        if self.failure:
            return "failed"
        if self.last is None:
            return "waiting"
        if self.last.loss is not None and not math.isfinite(self.last.loss):
            return "diverged"
        return "silent" if self.silence > QUIET + 10 * self._gap else "running"

    @property
    def silence(self) -> float:
        """Seconds since the log was written to."""
        try:
            return max(0.0, time.time() - self._lines.path.stat().st_mtime)
        except OSError:
            return 0.0

    @property
    def left(self) -> float | None:
        """Seconds of training still to come at the pace of the last lines; None where that cannot be said."""
        recent = self._recent
        if self.state != "running" or self.steps is None or len(recent) < 2:
            return None
        done, seconds = recent[-1].step - recent[0].step, (recent[-1].seconds or 0) - (recent[0].seconds or 0)
        return max(0, self.steps - recent[-1].step) * seconds / done if done > 0 and seconds > 0 else None

    @property
    def planned(self) -> float | None:
        """Share of the calls of routers that took another branch than plain top-k, over all lines."""
        return _planned([point.branches for point in self.points.values()])

    @property
    def _recent(self) -> list[Point]:
        timed = [point for point in list(self.points.values())[-10:] if point.seconds is not None]
        return sorted(timed, key=lambda point: point.step)

    @property
    def _gap(self) -> float:
        seconds = [point.seconds or 0.0 for point in self._recent]
        return max((after - before for before, after in itertools.pairwise(seconds)), default=0.0)


class Follower:
    """All runs at some paths, also those that begin later.

    Args:
        paths: run folders, folders of runs (a comparison's or a demo's, also two floors up), log files. They may come
            into being later, but the folder in which they lie has to be there.

    Raises:
        FileNotFoundError: not even the folder above a path is there.
        ValueError: a path is a file that is no `.jsonl`.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self.runs: dict[Path, Followed] = {}
        for path in self.paths:
            if not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"{path} is not there, nor is the folder in which it would be made")
            if path.is_file() and path.suffix != ".jsonl":
                raise ValueError(f"{path} is no log: pass a run's folder, a folder of runs, or a .jsonl file")
        self._looked = 0.0
        self.to_come: dict[Path, int | None] = {}
        """Folder of runs → how many more are planned in it; None where nothing says."""

    def poll(self, every: float = 2.0) -> list[tuple[Followed, Point]]:
        """Read what is new in all runs; for new runs is looked at most once in so many seconds."""
        if time.monotonic() - self._looked >= every or not self.runs:
            self._look()
            self._looked = time.monotonic()
        return [(run, point) for run in self.runs.values() for point in run.poll()]

    @property
    def missing(self) -> list[Path]:
        """Paths at which there is nothing to follow yet."""
        return [path for path in self.paths if not any(run == path or path in run.parents for run in self.runs)]

    @property
    def over(self) -> bool:
        """Whether nothing can come any more: all runs that were named, or planned in a folder, have finished."""
        begun = all(path in self.runs or self.to_come.get(path) == 0 for path in self.paths)
        return begun and all(run.state == "finished" for run in self.runs.values())

    def _look(self) -> None:
        for path in self.paths:
            one = path.suffix == ".jsonl" or any((path / mark).is_file() for mark in ("config.yaml", "log.jsonl"))
            for folder in [path] if one else runs_within(path):
                if folder not in self.runs:
                    several = len(self.paths) > 1
                    name = folder.name or str(folder)
                    if not one:
                        name = str(folder.relative_to(path.parent if several else path))
                    self.runs[folder] = Followed(folder, name)
            if not one:  # what a comparison, or a demo, wrote of its plan
                planned = _json(path / "compare.json").get("cells") or _json(path / "baselines.json").get("order")
                self.to_come[path] = sum(path / str(name) not in self.runs for name in planned) if planned else None


def _planned(branches: Iterable[Mapping[str, float]]) -> float | None:
    calls = [call for each in branches for call in each.items()]
    total = sum(number for _, number in calls)
    return sum(number for name, number in calls if name not in PLAIN) / total if total else None


def _point(step: int, line: Mapping[str, Any], load: Mapping[str, Sequence[float]]) -> Point:
    layers = line.get("layers")
    of = [part for part in layers.values() if isinstance(part, dict)] if isinstance(layers, dict) else []
    if of:  # of a LoadMonitor
        vio = [value for part in of if (value := number(part.get("max_vio"))) is not None]
        planned = [(number(part.get("assigned_share")) or 0.0, number(part.get("passes")) or 0.0) for part in of]
        plans = sum(share * passes for share, passes in planned)
        branches = {"plan": plans, "plain": sum(passes for _, passes in planned) - plans}
    else:
        given = line.get("max_vio")
        vio = [value for value in map(number, given if isinstance(given, list) else []) if value is not None]
        counted = line.get("branches")
        branches = {
            str(name): value
            for name, calls in (counted.items() if isinstance(counted, dict) else ())
            if (value := number(calls)) is not None
        }
    dead = sum(share < DEAD for shares in load.values() for share in fair_shares(shares))
    return Point(
        step,
        number(line.get("loss")),
        sum(vio) / len(vio) if vio else None,
        max(vio, default=None),
        number(line.get("tokens_per_second")),
        number(line.get("seconds")),
        {name: calls for name, calls in branches.items() if calls},
        dead,
    )


def fair_shares(load: Sequence[float]) -> list[float]:
    """The load of each expert over the mean; 1 is fair. Of a layer without any load, all are.

    >>> fair_shares([6, 2, 0, 0])
    [3.0, 1.0, 0.0, 0.0]
    """
    mean = sum(load) / len(load)
    return [part / mean if mean else 1.0 for part in load]


def _loads(line: Mapping[str, Any]) -> dict[str, list[float]]:
    layers, load = line.get("layers"), line.get("load")
    if isinstance(layers, dict):
        found = {str(name): part.get("load") for name, part in layers.items() if isinstance(part, dict)}
    else:
        found = {str(place): part for place, part in enumerate(load if isinstance(load, list) else [])}
    return {
        name: [known if math.isfinite(known := number(value) or 0.0) else 0.0 for value in values]
        for name, values in found.items()
        if isinstance(values, list) and values
    }


def _count(value: Any) -> int | None:
    """A whole number that can be drawn; None for what is none."""
    known = number(value)
    return value if isinstance(value, int) and known is not None and math.isfinite(known) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
