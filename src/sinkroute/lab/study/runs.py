"""Run folders, read from disk: `config.yaml`, `log.jsonl` and, once a run is finished, `result.json`.

Reading is strict where a silent mistake would change a number (a broken line in the middle of a log is an error) and
lenient where a killed process leaves a mark (a torn last line, a missing result).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sinkroute.lab.study.metric import Metric, metric_of

__all__ = [
    "Group",
    "Run",
    "common_metric",
    "differences",
    "flatten",
    "group_runs",
    "read_baselines",
    "read_run",
    "read_runs",
]


@dataclass(frozen=True)
class Run:
    """One training run.

    `train` and `evals` are the log's objects in the order of their steps; `result` is None while the run is unfinished.
    """

    folder: Path
    method: str
    label: str
    seed: int
    config: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]
    evals: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def metric(self) -> Metric:
        """What it is measured in."""
        model = _dig(self.config, "model")
        return metric_of(self.result, self.evals[-1] if self.evals else {}, model if isinstance(model, Mapping) else {})

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
        steps = _dig(self.config, "train", "steps")
        return int(steps) if isinstance(steps, (int, float)) and not isinstance(steps, bool) else None

    @property
    def diverged_at(self) -> int | None:
        """The first logged step whose loss is not finite; None if there is none."""
        for line in self.train:
            loss = line.get("loss")
            if isinstance(loss, (int, float)) and not math.isfinite(loss):
                return int(line["step"])
        return None

    def value(self, *keys: str) -> float | None:
        """A number of `result.json`, such as `run.value("valid", "bits_per_byte")`; None if it is not there."""
        found = _dig(self.result, *keys)
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


@dataclass(frozen=True)
class Group:
    """The runs of one method: they share a label and differ in their seeds."""

    label: str
    method: str
    runs: tuple[Run, ...]

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
        The runs in the order of `paths`. Within a folder of runs: those that its `baselines.json` names under
        `"order"`, in that order, and then the others sorted by name.

    Raises:
        FileNotFoundError: a path or a file of a run is missing.
        ValueError: a file is there but cannot be understood; the message names the file and, in a log, the line.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("paths is empty; pass at least one run folder or folder of runs, such as ['runs/demo'].")
    folders: list[Path] = []
    for path in map(Path, given):
        folders += [folder for folder in _run_folders(path) if folder not in folders]
    return [read_run(folder) for folder in folders]


def read_run(folder: str | Path) -> Run:
    """Read one run folder; see `read_runs` for what is raised."""
    folder = Path(folder)
    config_file, log_file, result_file = folder / "config.yaml", folder / "log.jsonl", folder / "result.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"run folder {str(folder)!r} has no config.yaml; pass a folder that a training run wrote, "
            "or remove this one if it is a leftover."
        )
    config = _read_yaml(config_file)
    result = _read_result(result_file) if result_file.is_file() else None
    if log_file.is_file():
        train, evals = _read_log(log_file)
    elif result is not None:
        raise FileNotFoundError(
            f"run folder {str(folder)!r} has a result.json but no log.jsonl; copy the whole folder, or train again."
        )
    else:
        train, evals = (), ()  # killed before the first log line: it is still shown, as interrupted at step 0

    method = str(_dig(config, "router", "name") or folder.name)
    label = str(config.get("label") or method)
    seed = (result or {}).get("seed", config.get("seed", 0))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed of run {str(folder)!r} must be a whole number; received {seed!r}.")
    return Run(folder, method, label, seed, config, train, evals, result)


def read_baselines(given: Mapping[str, Any] | str | Path | None, runs: Sequence[Run] = ()) -> dict[str, Any]:
    """The baselines: a mapping as it is, a file's content, or with None the `baselines.json` beside the runs, if any.

    Beside runs that are not measured in bits per byte the n-gram models are left out: they are models of bytes.

    >>> read_baselines({"bigram": {"bits_per_byte": 3.9}})
    {'bigram': {'bits_per_byte': 3.9}}
    >>> read_baselines(None)
    {}
    """
    found = _baselines(given, runs)
    if all(run.metric.key == "bits_per_byte" for run in runs):
        return found
    return {name: entry for name, entry in found.items() if _dig(entry, "bits_per_byte") is None}


def _baselines(given: Mapping[str, Any] | str | Path | None, runs: Sequence[Run]) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    if given is not None:
        path = Path(given)
        path = path / "baselines.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"baselines: there is no file {str(path)!r}; pass a baselines.json, a mapping, or None."
            )
        return _read_json(path)
    for run in runs:
        beside = run.folder.parent / "baselines.json"
        if beside.is_file():
            return _read_json(beside)
    return {}


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """The runs by label, in the order in which the labels first appear."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    return [Group(label, members[0].method, tuple(members)) for label, members in by_label.items()]


def common_metric(runs: Sequence[Run]) -> Metric:
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys; empty mappings say nothing and are left out.

    >>> flatten({"seed": 0, "model": {"layers": 4}, "router": {}})
    {'seed': 0, 'model.layers': 4}
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The dotted configuration keys in which the runs differ, each with its value in every run (None: not set)."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"paths: there is no folder {str(path)!r}; pass a run folder or a folder of runs, such as 'runs/demo' "
            "after `make demo`."
        )
    if (path / "config.yaml").is_file():
        return [path]
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
    baselines = path / "baselines.json"
    order = _read_json(baselines).get("order") if baselines.is_file() else None
    if isinstance(order, list):
        place = {str(name): i for i, name in enumerate(order)}
        found.sort(key=lambda folder: (place.get(folder.name, len(place)), folder.name))
    return found


def _read_log(path: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    lines = path.read_bytes().splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    train: dict[int, Mapping[str, Any]] = {}
    evals: dict[int, Mapping[str, Any]] = {}
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw.decode("utf-8"))
            if not isinstance(line, dict):
                raise ValueError(f"expected an object, received {type(line).__name__}")
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
            if number == len(lines):
                break  # the process was killed while it wrote this line
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error}); only the last line of a log may be torn. "
                "Repair or remove this line."
            ) from error
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"{path}, line {number}: 'step' must be a whole number; received {step!r}.")
        # A run that was resumed may repeat a step: the later line is the one whose weights live on.
        if line.get("kind") == "train":
            train[step] = line
        elif line.get("kind") == "eval" and line.get("split", "valid") == "valid":
            evals[step] = line
    return tuple(train[step] for step in sorted(train)), tuple(evals[step] for step in sorted(evals))


def _read_result(path: Path) -> dict[str, Any]:
    result = _read_json(path)
    if not isinstance(result.get("method"), str):
        raise ValueError(
            f"{path}: 'method' must be the router's name; received {result.get('method')!r}. Evaluate again."
        )
    try:
        key = metric_of(result, {}, {}).key
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Evaluate the run again.") from None
    value = _dig(result, "valid", key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: 'valid.{key}' must be a number; received {value!r}. Evaluate the run again.")
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); write it again or remove it.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, received {type(value).__name__}; write it again or remove it."
        )
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({error}); restore the file the run wrote.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a mapping, received {type(value).__name__}; restore the file the run wrote."
        )
    return value


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
