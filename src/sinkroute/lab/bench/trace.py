"""Measured loads over a training: from run folders, kept studies and the log of a `LoadMonitor`.

A line of a log often covers several steps (`train.log_every`, a monitor's window). Its loads are then sums, and the
busiest expert of a sum carries at most what the busiest ones of the single steps carry on average: a sum hides whatever
moves from step to step. Of the lab's logs the mean MaxVio of single steps is read beside the sum, which says how much.
Which of the two a large batch is nearer to depends on why steps differ. What is chance in few tokens (`sinkroute bench
--simulate` scales a batch of some hundred tokens to millions) averages out in a large batch as it does in a sum; what
is a burst of one kind of text stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sinkroute.lab.log import read_lines, read_log

__all__ = ["Line", "Trace", "read_traces"]


@dataclass(frozen=True)
class Line:
    """What a line of a log says of the steps since the line before it.

    Attributes:
        step: the last of them.
        steps: how many.
        load_LE: choices of each layer's experts, summed over the steps.
        max_vio_L: mean over the steps of each one's MaxVio; None where only the sum is known.
        loss: mean over the steps; None in a monitor's log.
        plan_passes: of the solver over the logits, all layers and steps together.
    """

    step: int
    steps: int
    load_LE: np.ndarray
    max_vio_L: np.ndarray | None = None
    loss: float | None = None
    plan_passes: float = 0.0


@dataclass(frozen=True)
class Trace:
    """One training.

    Attributes:
        name: label, with which runs of different seeds are put together.
        router: its name; empty where it is not known.
        top_k: choices of a token.
        lines: in the order of steps; one or more.
        total_steps: of the training.
    """

    name: str
    router: str
    top_k: int
    lines: Sequence[Line]
    total_steps: int

    @property
    def experts(self) -> int:
        return int(self.lines[0].load_LE.shape[1])

    @property
    def steps_a_line(self) -> int:
        return max(line.steps for line in self.lines)


def read_traces(places: Iterable[str | Path]) -> list[Trace]:
    """Of each place: a run folder, a folder of run folders, a kept study (`kept/NAME.jsonl`), or a monitor's log.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no loads are in it.
    """
    found = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"trace: there is nothing at {place}; give a run folder, a folder of runs or a log")
        if place.is_dir():
            folders = [place] if (place / "log.jsonl").is_file() else sorted(place.glob("*/"))
            own = [_of_run(folder) for folder in folders if (folder / "log.jsonl").is_file()]
        else:
            rows = read_lines(place)
            kept = [row for row in rows if "config" in row and "log" in row]
            own = [_trace(row["config"], row["log"]) for row in kept] or [_of_monitor(place, rows)]
        traces = [trace for trace in own if trace is not None]
        if not traces:
            raise ValueError(
                f"{place} holds no loads; a run's log.jsonl has them in `load` of its lines, a LoadMonitor's log in "
                "`layers`"
            )
        found += traces
    return found


def _of_run(folder: Path) -> Trace | None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return _trace(config or {}, read_log(folder / "log.jsonl")[0], folder.name)


def _trace(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str = "") -> Trace | None:
    """Of a run of the lab, whose log may have been thinned: then the configuration says where the line before was."""
    router = dict(config.get("router", {}))
    train = dict(config.get("train", {}))
    rows = [row for row in rows if row.get("kind") == "train" and row.get("load")]
    if not rows:
        return None
    # Logged are multiples of these, and the last step.
    every = [int(train[name]) for name in ("log_every", "checkpoint_every") if name in train]
    ends = [int(row["step"]) for row in rows]
    before = [
        max(then, *((end - 1) // each * each for each in every), 0)
        for then, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    lines = [
        Line(
            end,
            end - then,
            np.asarray(row["load"], dtype=float),
            np.asarray(row["max_vio"], dtype=float) if row.get("max_vio") else None,
            row.get("loss"),
            float(row.get("plan_passes") or 0),
        )
        for row, end, then in zip(rows, ends, before, strict=True)
    ]
    label = str(config.get("label") or router.get("name") or name)
    top_k = int(dict(config.get("model", {})).get("top_k", 2))
    return Trace(label, str(router.get("name", "")), top_k, lines, int(train.get("steps", lines[-1].step)))


def _of_monitor(path: Path, rows: Sequence[Mapping[str, Any]]) -> Trace | None:
    """Of a window of passes each layer has the sum of its loads, and the mean MaxVio of single passes."""
    lines: list[Line] = []
    before = 0
    latest = {int(row["step"]): row for row in rows if row.get("mode") == "train" and "step" in row}
    for row in (latest[step] for step in sorted(latest)):  # of a step that a resumed trainer repeats, the later line
        layers = list(dict(row.get("layers") or {}).values())
        if layers and all(layer.get("load") for layer in layers):
            steps = max(1, int(row["step"]) - before) if lines else int(layers[0].get("passes") or 1)
            vio = np.asarray([layer["max_vio"] for layer in layers], dtype=float)
            passes = sum(float(layer.get("plan_passes") or 0) * float(layer.get("plans") or 0) for layer in layers)
            load_LE = np.asarray([layer["load"] for layer in layers], dtype=float)
            lines.append(Line(int(row["step"]), steps, load_LE, vio, None, passes))
            before = int(row["step"])
    tokens = [layer.get("tokens") for row in rows[:1] for layer in dict(row.get("layers") or {}).values()]
    if not lines:
        return None
    top_k = max(1, round(lines[0].load_LE[0].sum() / tokens[0])) if tokens and tokens[0] else 1
    return Trace(path.stem, "", top_k, lines, lines[-1].step)
