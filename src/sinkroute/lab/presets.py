"""Configurations of one run, by the name of a preset or a path, and what to say of others."""

from __future__ import annotations

from pathlib import Path

from sinkroute._errors import nearest
from sinkroute.lab.config import find_preset, preset_folder, training_presets
from sinkroute.lab.folders import is_comparison

__all__ = ["find_configuration"]


def find_configuration(name: str) -> Path:
    """The file that a name means, which holds the configuration of one run.

    Raises:
        ValueError: it is a comparison, a run or another folder; the message says what to call.
        FileNotFoundError: there is none; the message lists the presets.

    >>> find_configuration("wikipedia-ssr").name
    'wikipedia-ssr.yaml'
    """
    path, folder = find_preset(name), preset_folder()
    others = [folder / f"{place}.yaml" for place in (f"compare/{name}", name)]
    if path.is_file() and not is_comparison(path):
        return path
    known = ", ".join(training_presets())
    if any(map(is_comparison, (path, *others))):
        command = "demo" if path.parent == folder else "compare"
        words = command if name == command else f"{command} {name}"
        raise ValueError(
            f"{name} is a comparison of several methods, not one run: sinkroute {words}. Presets of one run: {known}"
        )
    presets = f"a YAML file or a preset: {known}"
    if (path / "config.yaml").is_file():
        raise ValueError(f"{name} is a run; its configuration is {path / 'config.yaml'}, and --out {path} continues it")
    if path.is_dir():
        raise ValueError(f"{name} is a folder; pass {presets}")
    hint = nearest(name, training_presets())
    raise FileNotFoundError(f"no configuration at {name}{f'{hint} Pass' if hint else '; pass'} {presets}")
