"""Which folders are runs and which files comparisons, and what to say of others. (Without torch: asked before that.)"""

from __future__ import annotations

from pathlib import Path

import yaml

__all__ = ["is_comparison", "require_run", "runs_within"]


def require_run(folder: Path) -> None:
    """Check that a folder is a run's.

    Raises:
        FileNotFoundError: it is none; the message names the runs that lie in it.
    """
    if (folder / "config.yaml").is_file():
        return
    if inside := runs_within(folder):
        named = ", ".join(str(run) for run in inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
        raise FileNotFoundError(f"{folder} is no run but holds {len(inside)}; pass one of them: {named}")
    why = "it is a file" if folder.is_file() else "it has no config.yaml" if folder.is_dir() else "it is not there"
    raise FileNotFoundError(f"{folder} is no run: {why}; pass a folder that sinkroute train or demo made")


def is_comparison(path: Path) -> bool:
    """Whether a file is the YAML of a comparison, of several methods, and not of one run."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and bool({"methods", "extends"} & set(content))


def runs_within(folder: Path) -> list[Path]:
    """The runs in a folder or in the folders within it, sorted; a comparison keeps its runs one floor down."""
    return sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.yaml"))
