"""Which runs may be compared with which, and what stands beside them.

Runs that somebody names are compared only where all is alike but the method: `arrange` puts them under headings that
say what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinkroute.lab.study.cells import flat, short_value
from sinkroute.lab.study.metric import dig, number_at
from sinkroute.lab.study.runs import Run, read_json

__all__ = ["arrange", "describe", "differences", "read_baselines"]


def arrange(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Put runs under headings within which they differ in router, label and seed alone; the headings say the rest.

    Methods that share a label and not their options are told apart by these. A run that repeats another's seed is left
    out.

    Returns:
        The runs, and sentences about what was left out.
    """
    settings = [_setting(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if _differ(settings, key)]
    tails = [key.rpartition(".")[2] for key in keys]
    names = [tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)]
    routers: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        routers.setdefault(run.label, []).append(_told(run.config.get("router")))
    seen: dict[tuple[str, str, int], Run] = {}
    notes = []
    for run, setting in zip(runs, settings, strict=True):
        told = [f"{name}={short_value(setting[key])}" for key, name in zip(keys, names, strict=True) if key in setting]
        own, others = _told(run.config.get("router")), routers[run.label]
        parts = [f"{key.rpartition('.')[2]}={short_value(own[key])}" for key in own if _differ(others, key)]
        size, label = ", ".join(told), " ".join([run.label, *parts])
        other = seen.setdefault((size, label, run.seed), replace(run, size=size, label=label))
        if other.folder != run.folder:
            notes.append(f"{run.folder} repeats seed {run.seed} of {label}, as {other.folder} has it: it is left out.")
    return list(seen.values()), notes


def read_baselines(given: Mapping[str, Any] | str | Path | None, runs: Sequence[Run] = ()) -> dict[str, Any]:
    """The baselines: a mapping as it is, a file's content, or with None the `baselines.json` beside the runs, if any.

    Beside runs that are not measured in bits per byte, or of another text, the n-gram models are left out; so are times
    of a step where a run has another configuration than the one that was timed.

    >>> read_baselines({"bigram": {"bits_per_byte": 3.9}})
    {'bigram': {'bits_per_byte': 3.9}}
    >>> read_baselines(None)
    {}
    """
    if isinstance(given, Mapping):
        found = dict(given)
    elif given is not None:
        path = Path(given)
        path = path / "baselines.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"baselines: there is no file {str(path)!r}; pass a baselines.json, a mapping, or None."
            )
        found = read_json(path)
    else:
        beside = dict.fromkeys(run.folder.parent / "baselines.json" for run in runs)
        found = read_json(next(iter(beside))) if len(beside) == 1 and next(iter(beside)).is_file() else {}
    text = dig(found, "corpus.sha256")
    if any(run.metric.key != "bits_per_byte" or (text and run.text and run.text != text) for run in runs):
        found = {name: entry for name, entry in found.items() if dig(entry, "bits_per_byte") is None}
    timed = dig(found, "step_times.settings")
    if timed is not None and any(_unlike(run, timed.get(run.label)) for run in runs):
        del found["step_times"]
    return found


def describe(baselines: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The n-gram baselines with their bits per byte, in the order of the mapping.

    >>> describe({"bigram": {"bits_per_byte": 3.9}, "corpus": {"name": "wikipedia"}})
    [('bigram', 3.9)]
    """
    found = [(str(name), number_at(entry, "bits_per_byte")) for name, entry in baselines.items()]
    return [(name, bits) for name, bits in found if bits is not None]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The dotted configuration keys in which the runs differ, each with its value in every run (None: not set)."""
    settings = [_told(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in settings for key in one) if _differ(settings, key)]
    return {key: [one.get(key) for one in settings] for key in keys}


def _setting(run: Run) -> dict[str, Any]:
    """All that a run is made of beside method, seed and name."""
    free = ("label", "seed", "name")
    out = {key: value for key, value in _told(run.config).items() if key not in free and not key.startswith("router.")}
    return out | ({"data.sha256": run.text[:12]} if run.text else {})


def _told(config: Any) -> dict[str, Any]:
    """With dotted keys; empty sections say nothing."""
    return {key: value for key, value in flat(config or {}).items() if value != {}}


def _differ(several: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(each.get(key) != several[0].get(key) for each in several)


def _unlike(run: Run, timed: Mapping[str, Any] | None) -> bool:
    own = {key: value for key, value in run.config.items() if key != "seed"}
    return timed is None or {key: value for key, value in timed.items() if key != "seed"} != own
