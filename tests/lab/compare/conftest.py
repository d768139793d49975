"""Comparisons without training: folders as runs leave them, with numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sinkroute.lab.compare.cells import Cell, Plan, expand
from sinkroute.lab.compare.config import read_comparison
from sinkroute.lab.compare.state import record_begin, record_end
from sinkroute.lab.config import write_yaml
from sinkroute.lab.files import write_json

SMALL: dict[str, Any] = {
    "data": {"name": "text", "length": 32},
    "model": {"layers": 1, "d_model": 32, "heads": 2, "d_hidden": 16, "experts": 4, "top_k": 2},
    "train": {"steps": 4, "batch": 4, "warmup": 2, "log_every": 2, "checkpoint_every": 2},
    "eval": {"batch": 64},
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for runs that are really trained."""
    words = np.random.default_rng(0).choice(["balanced", "experts", "route", "tokens", "to", "the", "few"], 4000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(**content)`: a file of a small comparison, `content` over it."""

    def write_(name: str = "mine", **content: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), **content}, sort_keys=False))
        return path

    return write_


@pytest.fixture
def plan(write: Callable[..., Path]) -> Callable[..., Plan]:
    """`plan(**content)`: the runs of such a file, on SMALL, of vanilla and ssr-l unless `content` says otherwise."""

    def plan_(**content: Any) -> Plan:
        methods = {"vanilla": {"router": {"name": "softmax"}}, "ssr-l": {"router": {"name": "ssr-l"}}}
        path = write(**{"config": SMALL, "methods": methods, **content})
        return expand(path, read_comparison(path))

    return plan_


def finish(cell: Cell, out: Path, bits: float, **over: Any) -> None:
    """Leave a folder as a finished run of the cell does; its quality is `bits`, `over` goes over its other sections."""
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    record_begin(
        folder, cell.hash, {"commit": None, "sinkroute": "0", "torch": "2", "cpu": "c", "gpu": None, "cores": 1}
    )
    write_yaml(cell.config, folder / "config.yaml")
    write_json({"name": "text", "source": "", "sha256": "0"}, folder / "corpus.json")
    write_json({"kind": "train", "step": cell.config.train.steps}, folder / "log.jsonl", indent=None)
    result = {
        "task": "text",
        "metric": "bits_per_byte",
        "method": cell.config.router.name,
        "seed": cell.seed,
        "parameters": {"total": 3000, "active": 2000},
        "train": {"ms_per_step": 10.0, "max_vio": 1.0, "seconds": 5.0},
        "valid": {"bits_per_byte": bits},
        "attacked": {"word-swap": {"bits_per_byte": bits + 0.1, "rate": 0.025}},
        "serving": {"max_vio": 1.0, "load": [[1, 2]]},
    }
    write_json({**result, **over}, folder / "result.json")
    record_end(folder, 7.0, done=True)
