"""The runs of a comparison: size × method × seed, each with its whole configuration and the hash of it.

The hash is the SHA-256 of what decides a run's numbers, as canonical JSON: the configuration without the keys that may
change between two calls of a run (`sinkroute.lab.run_folder.FREE_KEYS`). Numbers are only ever put beside each other
under the hash that the comparison demands.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sinkroute._errors import unknown_name
from sinkroute.lab.config import Config, from_mapping, parse_scalar, to_mapping
from sinkroute.lab.run_folder import FREE_KEYS
from sinkroute.lab.study.config import StudyConfig, merged, read_base

__all__ = ["Cell", "Plan", "configuration_hash", "expand", "flat", "parse_overrides", "select", "short_value"]

_SECTIONS = ("data", "model", "router", "train", "eval")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        size: name of the size; empty where the comparison has one only.
        method: the method with its point of the grid, as tables call it.
        family: the method's name in the file.
        point: dotted key → value of the grid.
        seed: of the run.
        config: of the run.
        hash: of what decides its numbers.
        name: of its folder.
    """

    size: str
    method: str
    family: str
    point: Mapping[str, Any]
    seed: int
    config: Config
    hash: str = field(init=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hash", configuration_hash(self.config))
        parts = [_slug(part) for part in (self.size, self.method) if part]
        object.__setattr__(self, "name", "-".join([*parts, f"seed{self.seed}"]))


@dataclass(frozen=True)
class Plan:
    """A comparison with its runs, in the order in which they are executed.

    Attributes:
        path: of the file that it was read from.
        study: what that says.
        out: folder of the runs.
        overrides: what the command line sets in all runs.
        cells: the runs; seeds outside, sizes in the middle, so that a part of them has all methods alike.
        reference: the method that the others are compared with.
    """

    path: Path
    study: StudyConfig
    out: Path
    overrides: Mapping[str, Any]
    cells: tuple[Cell, ...]
    reference: str

    @property
    def sizes(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(cell.size for cell in self.cells))

    @property
    def methods(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def title(self) -> str:
        return self.study.title or self.path.stem


def configuration_hash(config: Config) -> str:
    """SHA-256 of what decides the numbers that come out of training.

    >>> configuration_hash(Config(label="mine")) == configuration_hash(Config())
    True
    >>> configuration_hash(Config(seed=1)) == configuration_hash(Config())
    False
    """
    decisive = {key: value for key, value in flat(to_mapping(config)).items() if not key.startswith(FREE_KEYS)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def expand(
    path: Path,
    study: StudyConfig,
    *,
    out: str | None = None,
    seeds: Sequence[int] = (),
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """All runs of a comparison.

    Args:
        path: of its file; a `base` is also looked up beside it.
        study: what was read.
        out: instead of the file's.
        seeds: instead of the file's.
        overrides: dotted key → value, over all runs; see `parse_overrides`.

    Raises:
        ValueError: a key or value that is wrong in some run, an unknown reference, two methods of one name.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must differ from each other, got {list(seeds)}")
    _check_sections("config", study.config)
    variants = [variant for name, method in study.methods.items() for variant in _variants(name, method)]
    sizes = {}
    for size, section in (study.sizes or {"": {}}).items():
        own = {key: value for key, value in section.items() if key != "base"}
        _check_sections(f"sizes.{size}", own)
        base = merged(read_base(section.get("base", study.base), path.parent), study.config)
        sizes[size] = merged(base, own)
    cells = []
    for seed in seeds or study.seeds:
        for size, sized in sizes.items():
            for family, label, sections, point in variants:
                mapping = merged(sized, {key: value for key, value in sections.items() if key != "router"})
                if "router" in sections:
                    mapping["router"] = sections["router"]
                for key, value in (*point.items(), *overrides.items()):
                    _put(mapping, key, value)
                mapping |= {"label": f"{size} {label}".strip(), "seed": seed}
                try:
                    config = from_mapping(Config, mapping)
                except ValueError as error:
                    where = f"methods.{family}" + (f" at sizes.{size}" if size else "")
                    raise ValueError(f"{path}: {where}: {error}") from None
                cells.append(Cell(size, label, family, point, seed, config))
    _check_names(path, cells)
    labels = [label for _, label, _, _ in variants]
    reference = study.reference or labels[0]
    if reference not in labels:
        raise unknown_name(f"method in {path}: reference", reference, labels)
    for key in ("method", "against"):
        if (name := getattr(study.primary, key)) and name not in labels:
            raise unknown_name(f"method in {path}: primary.{key}", name, labels)
    folder = Path(out or study.out or Path("runs") / path.stem)
    return Plan(path, study, folder, overrides, tuple(cells), reference)


def select(plan: Plan, only: Sequence[str] = (), sizes: Sequence[str] = ()) -> list[Cell]:
    """The runs of some methods (by their name in the file, or with their point of the grid) at some sizes.

    Raises:
        ValueError: an unknown method or size.
    """
    known = {name for cell in plan.cells for name in (cell.method, cell.family)}
    for name in only:
        if name not in known:
            raise unknown_name("method in --only", name, known)
    for name in sizes:
        if name not in plan.sizes or not name:
            raise unknown_name("size in --sizes-only", name, [size for size in plan.sizes if size])
    return [
        cell
        for cell in plan.cells
        if (not only or cell.method in only or cell.family in only) and (not sizes or cell.size in sizes)
    ]


def _variants(name: str, method: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(name, label, sections, point of the grid) of each method that one entry of the file stands for."""
    sections = {key: value for key, value in method.items() if key != "grid"}
    _check_sections(f"methods.{name}", sections)
    grid = method.get("grid", {})
    if not isinstance(grid, Mapping) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"methods.{name}.grid must map dotted keys to lists of values, got {grid!r}")
    for key in grid:
        _check_key(f"methods.{name}.grid", key)
    tails = [key.rpartition(".")[2] for key in grid]
    short = [tail if tails.count(tail) == 1 else key for key, tail in zip(grid, tails, strict=True)]
    out = []
    for values in itertools.product(*grid.values()):
        point = {key: _scalar(value) for key, value in zip(grid, values, strict=True)}
        told = [f"{key}={short_value(value)}" for key, value in zip(short, point.values(), strict=True)]
        out.append((name, " ".join([name, *told]), sections, point))
    return out


def _scalar(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    return parse_scalar(value) if isinstance(value, str) else value


def short_value(value: Any) -> str:
    """A value of a grid as labels show it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """What the command line sets in all runs.

    Raises:
        ValueError: no KEY=VALUE, an unknown section, or a key of the routers, which are what is compared.

    >>> parse_overrides(["train.steps=50", "train.lr=1e-3"])
    {'train.steps': 50, 'train.lr': 0.001}
    """
    out = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"--set {word} must be KEY=VALUE, such as train.steps=50")
        _check_key("--set", key)
        if key.startswith("router."):
            raise ValueError(f"--set {word}: routers are what is compared; write a file that extends this one instead")
        out[key] = parse_scalar(value)
    return out


def _check_key(where: str, key: str) -> None:
    section, _, rest = str(key).partition(".")
    if section not in _SECTIONS:
        raise unknown_name(f"section in {where}", key, _SECTIONS)
    if not rest:
        raise ValueError(f"{where}: {key!r} is a section; give a key in it, such as train.steps")


def _check_sections(where: str, sections: Mapping[str, Any]) -> None:
    for key in sections:
        if key in ("label", "seed"):
            raise ValueError(f"{where}.{key} cannot be given: labels are the methods' names, and seeds are an axis")
        if key not in _SECTIONS:
            raise unknown_name(f"section in {where}", key, [*_SECTIONS, "grid"])


def _check_names(path: Path, cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name, cell)
        if other is not cell:
            raise ValueError(
                f"{path}: {other.method!r} and {cell.method!r} would share the folder {cell.name}; rename one"
            )


def _put(mapping: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = mapping.get(section)
        mapping[section] = dict(inner) if isinstance(inner, Mapping) else {}
        mapping = mapping[section]
    mapping[last] = value


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys.

    >>> flat({"seed": 0, "model": {"layers": 4}, "router": {}})
    {'seed': 0, 'model.layers': 4, 'router': {}}
    """
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _slug(label: str) -> str:
    """A folder's name that one can still read.

    >>> _slug("ssr-l noise=0.1 probability=adaptive(high=0.5, low=0.2)")
    'ssr-l_noise=0.1_probability=adaptive_high=0.5_low=0.2'
    """
    slug = re.sub(r"[^A-Za-z0-9.=+-]+", "_", label).strip("_.")
    return slug if len(slug) <= 100 else f"{slug[:91]}_{hashlib.sha256(label.encode()).hexdigest()[:8]}"
