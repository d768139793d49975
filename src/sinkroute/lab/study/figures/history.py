"""What logs say over the steps of a training: curves over seeds, loads of experts, shares of Sinkhorn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkroute.lab.study.metric import Quality
from sinkroute.lab.study.runs import Run

__all__ = ["Curve", "curve", "evaluations", "load_history", "relative", "sinkhorn_share", "smooth"]


@dataclass(frozen=True)
class Curve:
    """A quantity over training: the smoothed mean over seeds, the range over seeds, and the mean before smoothing."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    raw: np.ndarray
    seeds: int

    @property
    def drawable(self) -> bool:
        return bool(np.isfinite(self.mean).any())

    @property
    def last(self) -> tuple[float, float]:
        """The last point of a drawable curve."""
        at = int(np.flatnonzero(np.isfinite(self.mean))[-1])
        return float(self.steps[at]), float(self.mean[at])


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over an eighth of the points (none below 12 points); what is not finite stays so.

    The window is centred. At the start it shrinks evenly, for a curve that falls steeply would be bent; at the end it
    is cut off on one side, for there the noise of a single line would decide which curve seems to win.

    >>> smooth(np.array([1.0, 5.0])).tolist()
    [1.0, 5.0]
    """
    reach = max(1, len(values) // 16) if len(values) >= 12 else 0
    out = np.full(len(values), np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        window = values[i - min(reach, i) : i + min(reach, i) + 1]
        out[i] = window[np.isfinite(window)].mean()
    return out


def curve(runs: Sequence[Run], key: str) -> Curve:
    """The curve of `key` ("loss", in the runs' metric, or "max_vio") over the steps of the runs.

    A step's mean is over the runs that have it. A seed that diverged makes the mean nan from there on: an average over
    the survivors would hide it.
    """
    at: dict[int, dict[int, float]] = {}
    for which, run in enumerate(runs):
        for line in run.train:
            value = _loss(line, run.metric) if key == "loss" else _max_vio(line)
            if value is not None:
                at.setdefault(int(line["step"]), {})[which] = value
    steps = sorted(at)
    raw = np.array([sum(at[step].values()) / len(at[step]) for step in steps])
    raw[~np.isfinite(raw)] = np.nan
    mean = smooth(raw)
    seeds = np.array([smooth(np.array([at[step].get(which, np.nan) for step in steps])) for which in range(len(runs))])
    low = np.where(np.isfinite(seeds), seeds, np.inf).min(axis=0, initial=np.inf)
    high = np.where(np.isfinite(seeds), seeds, -np.inf).max(axis=0, initial=-np.inf)
    low, high = (np.where(np.isfinite(mean), side, np.nan) for side in (low, high))
    return Curve(np.array(steps, dtype=float), mean, low, high, raw, len(runs))


def evaluations(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Mean in validation over the runs, at each step where it was measured; nothing if curves show something else."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for line in run.evals if run.metric.drawn else ():
            if isinstance(value := line.get(run.metric.key), (int, float)):
                at.setdefault(int(line["step"]), []).append(float(value))
    means = [(float(step), sum(values) / len(values)) for step, values in sorted(at.items())]
    return [(step, value) for step, value in means if math.isfinite(value)]


def load_history(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Loads relative to uniform over training.

    Returns:
        `edges`, of shape (N + 1,): line n covers the steps after `edges[n]` up to `edges[n + 1]`; and the loads, of
        shape (N, layers, E), 1 = a fair share. Both are empty if the log has no loads.
    """
    lines = [(float(line["step"]), load) for line in run.train if (load := relative(line.get("load"))) is not None]
    lines = [(step, load) for step, load in lines if load.shape == lines[-1][1].shape]
    if not lines:
        return np.zeros(0), np.zeros((0, 0, 0))
    return np.array([0.0, *(step for step, _ in lines)]), np.stack([load for _, load in lines])


def relative(load: object) -> np.ndarray | None:
    """Counts by layer over their mean, (layers, E); None for what is no such table."""
    try:
        counts = np.asarray(load, dtype=float)
    except (TypeError, ValueError):
        return None  # ragged or absent
    if counts.ndim != 2 or not counts.size:
        return None
    mean = counts.mean(axis=-1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


def sinkhorn_share(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the share of the router calls up to each that ran Sinkhorn (any branch that is not softmax)."""
    total: Counter[int] = Counter()
    chosen: Counter[int] = Counter()
    for run in runs:
        for line in run.train:
            for name, calls in (line.get("branches") or {}).items():
                total[int(line["step"])] += calls
                chosen[int(line["step"])] += 0 if name == "softmax" else calls
    steps = sorted(step for step in total if total[step] > 0)
    return np.array(steps, dtype=float), np.array([chosen[step] / total[step] for step in steps])


def _loss(line: Mapping[str, Any], metric: Quality) -> float | None:
    loss = line.get("loss")
    return metric.of_loss(float(loss)) if isinstance(loss, (int, float)) else None


def _max_vio(line: Mapping[str, Any]) -> float | None:
    layers = line.get("max_vio")
    if not isinstance(layers, list) or not layers:
        return None
    return sum(math.nan if value is None else float(value) for value in layers) / len(layers)
