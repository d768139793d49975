"""What to compare: a YAML file with a base configuration, methods, sizes and seeds, read strictly.

A comparison is written as differences: a `base` preset, `config` over it for all runs, `sizes` over that, and a
method's own sections last. `extends` lets one file change another.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from sinkroute._errors import unknown_name
from sinkroute.lab.config import Config, find_preset, from_mapping, preset_folder
from sinkroute.lab.settings import Count, Key, Natural, Positive, settings

__all__ = ["Primary", "StudyConfig", "common_config", "find_study", "merged", "read_base", "read_study", "studies"]

# Their entries have names that the author chose: null takes one out.
_NAMED = ("methods", "sizes", "grid")
# Which keys these may have depends on their name: with another name they start over.
_KINDS = ("router", "model")


@settings("primary")
class Primary:
    """The one comparison that decides, at every size, named before the first run."""

    method: str = ""
    """Empty: no comparison is named, and each method against the reference is one of equals."""
    against: str = ""
    """Empty: the reference."""
    metric: str = ""
    """Empty: the first metric."""
    effect: Positive | None = None
    """The difference, in the metric's unit, that is worth finding."""
    equivalence: Positive | None = None
    """The margin within which two methods count as alike (two one-sided tests)."""

    @model_validator(mode="after")
    def _names_a_method(self) -> Primary:
        if not self.method and any((self.against, self.metric, self.effect, self.equivalence)):
            raise ValueError("primary.method is empty; name the method that is compared")
        return self


@settings()
class StudyConfig:
    """A comparison: every method at every size with every seed."""

    title: str = ""
    """Heading of the page; empty: the name of the file."""
    question: str = ""
    """What it is to answer."""
    out: str = ""
    """Folder for the runs, the table and the page; empty: runs/ and the name of the file."""
    base: str = ""
    """A training preset or file, with which every run begins; empty: the defaults."""
    config: dict[Key, Any] = Field(default_factory=dict)
    """Merged over the base, for all runs."""
    sizes: dict[Key, dict[Key, Any]] = Field(default_factory=dict)
    """Size → what is merged over that, or another `base`; empty: one size."""
    methods: dict[Key, dict[Key, Any]] = Field(default_factory=dict)
    """Method → its sections, and `grid`: dotted key → values, one method for each combination."""
    seeds: tuple[Natural, ...] = (0, 1, 2)
    """A run per method, size and seed."""
    reference: str = ""
    """The method that the others are compared with; empty: the first."""
    metrics: tuple[str, ...] = ()
    """Dotted keys of result.json; empty: quality, attacked quality, MaxVio and time."""
    equivalence: Positive | None = None
    """Methods whose difference to the reference, in the first metric, lies within this margin are called equivalent."""
    primary: Primary = Field(default_factory=Primary)
    """What decides: {method: ssr-dual, against: vanilla, metric: valid.bits_per_byte, effect: 0.02}"""
    jobs: Count | None = None
    """Runs at a time, where the times matter; None: as many as the machine has cores or GPUs."""

    @model_validator(mode="after")
    def _has_runs(self) -> StudyConfig:
        if not self.methods:
            raise ValueError("methods is empty; name at least one, such as vanilla: {router: {name: softmax}}")
        if not self.seeds:
            raise ValueError("seeds is empty; give at least one, such as [0, 1, 2]")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from each other, got {list(self.seeds)}")
        return self


def find_study(name: str, near: Path | None = None) -> Path:
    """The file of a study: a preset of `experiments/compare`, `study/NAME` for one of another folder, or a path.

    `demo` and the others that stand beside it are studies too. `near` is a folder in which a relative path is looked up
    first.
    """
    presets = preset_folder()
    places = [presets / f"{name}.yaml"] if os.sep in name else [presets / "compare" / f"{name}.yaml"]
    places += [path for path in presets.glob("*.yaml") if path.stem == name and _has_methods(path)]
    there = [path for path in places if path.is_file()]
    if near is not None and (near / name).is_file():
        return near / name
    return there[0] if there and not Path(name).is_file() else Path(name)


def studies() -> list[str]:
    """The presets that `sinkroute compare` takes; `sinkroute demo` those of one size.

    >>> {"demo", "paper-lm", "study/dual"} <= set(studies()), "wikipedia-ssr" in studies()
    (True, False)
    """
    presets = preset_folder()
    inner = [path for path in presets.glob("*/*.yaml") if _has_methods(path)]
    names = [path.stem if path.parent.name == "compare" else f"{path.parent.name}/{path.stem}" for path in inner]
    return sorted([*names, *(path.stem for path in presets.glob("*.yaml") if _has_methods(path))])


def _has_methods(path: Path) -> bool:
    return any(line.startswith(("methods:", "extends:")) for line in path.read_text(encoding="utf-8").splitlines())


def read_study(path: Path) -> StudyConfig:
    """Read a comparison with all that it extends.

    Raises:
        FileNotFoundError: there is no such file, or one that it extends.
        ValueError: no YAML, an unknown key, a wrong value, files that extend each other in a ring.
    """
    return from_mapping_of(path, _extended(path, ()))


def from_mapping_of(path: Path, mapping: dict[str, Any]) -> StudyConfig:
    try:
        return from_mapping(StudyConfig, mapping)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def common_config(study: StudyConfig, path: Path) -> Config:
    """What all runs have in common: the base with `config` over it.

    Raises:
        ValueError: an unknown key or a wrong value, or as `read_base`.
    """
    return from_mapping(Config, merged(read_base(study.base, path.parent), study.config))


def read_base(name: str, near: Path) -> dict[str, Any]:
    """The training configuration with which every run begins, as the mapping that its file holds.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: it is no training configuration.
    """
    if not name:
        return {}
    path = near / name if (near / name).is_file() else find_preset(name)
    mapping = _read(path, "base")
    try:
        from_mapping(Config, mapping)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return mapping


def merged(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`new` over `old`: mappings entry by entry, all else replaced; neither is changed.

    A method, a size or an entry of a grid that is null is taken out. `attacks` are replaced as a whole, and so is a
    router or a model that gets another name.

    >>> merged({"train": {"steps": 5, "lr": 1}}, {"train": {"lr": 2}})
    {'train': {'steps': 5, 'lr': 2}}
    >>> merged({"methods": {"a": {}, "b": {}}}, {"methods": {"a": None}})
    {'methods': {'b': {}}}
    """
    out = {key: copy.deepcopy(value) for key, value in old.items()}
    for key, value in new.items():
        before = out.get(key)
        if value is None and where in _NAMED:
            out.pop(key, None)
        elif isinstance(before, dict) and isinstance(value, Mapping) and not _starts_over(key, before, value):
            out[key] = merged(before, value, str(key))
        else:
            out[key] = copy.deepcopy(value)
    return out


def _starts_over(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return key == "attacks" or (key in _KINDS and after.get("name", before.get("name")) != before.get("name"))


def _extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        ring = " → ".join(str(each) for each in (*seen, path.resolve()))
        raise ValueError(f"{path} extends itself: {ring}")
    mapping = _read(path, "study")
    parent = mapping.pop("extends", None)
    if parent is None:
        if "methods" not in mapping and {"model", "train", "router"} & set(mapping):
            raise ValueError(f"{path} has no methods to compare: it is a configuration of `sinkroute train`")
        return mapping
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends must be a name or a path, got {parent!r}")
    found = find_study(parent, near=path.parent)
    return merged(_extended(found, (*seen, path.resolve())), mapping)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if what == "study":
            if find_preset(str(path)).is_file():
                raise ValueError(
                    f"{path} is a configuration of one run, not a comparison of several methods: sinkroute train {path}"
                ) from None
            raise unknown_name("study (neither a preset nor a file)", str(path), studies()) from None
        raise FileNotFoundError(f"{what}: no configuration at {path}; pass a YAML file or a preset") from None
    except IsADirectoryError:
        raise ValueError(f"{what}: {path} is a folder; pass a YAML file or a preset") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if mapping is None:
        raise ValueError(f"{path} is empty; name at least methods, such as methods: {{vanilla: {{router: ...}}}}")
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, got {type(mapping).__name__}")
    return mapping
