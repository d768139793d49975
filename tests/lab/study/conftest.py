"""Studies without training: folders as runs leave them, with numbers that a test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sinkroute.lab.config import write_yaml
from sinkroute.lab.files import write_json
from sinkroute.lab.study.cells import Cell, Plan, expand
from sinkroute.lab.study.config import read_study
from sinkroute.lab.study.state import record_begin, record_end

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
        return expand(path, read_study(path))

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


STEPS, EVERY, LAYERS, EXPERTS = 40, 10, 2, 4


def make_run(
    root: Path,
    name: str,
    method: str,
    label: str,
    *,
    seed: int = 0,
    bits: float = 3.0,
    max_vio: float = 0.5,
    probability: float | None = None,
    dead: int = 0,
    ms: float = 100.0,
    finished: bool = True,
    lines: int = STEPS // EVERY,
    loss: float | None = None,
    options: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    written = {
        "label": label,
        "seed": seed,
        "data": {"name": "wikipedia", "length": 8},
        "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": 2},
        "router": {"name": method, "options": options or {}},
        "train": {"steps": STEPS, "lr": 0.003},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    log = []
    for i in range(1, lines + 1):
        step = i * EVERY
        calls = {"softmax": 16, "sinkhorn": 4} if probability else {"softmax": 20}
        log.append(
            {
                "kind": "train",
                "step": step,
                "loss": (bits + 4 / i) * math.log(2) if loss is None else loss,
                "aux_loss": None,
                "lr": 0.003,
                "max_vio": [max_vio + 1 / i, max_vio],
                "load": [[20 + i, 20, 20, 20 - i], [40, 20, 20, 0]],
                "branches": calls,
            }
        )
        log.append({"kind": "eval", "step": step, "split": "valid", "bits_per_byte": bits + 3 / i})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    if finished:
        values = {
            "method": method,
            "label": label,
            "seed": seed,
            "steps": STEPS,
            "probability": probability,
            "sinkhorn_steps": 4 if probability else 0,
            "parameters": {"total": 1234567, "active": 345678},
            "train": {"seconds": 4.0, "ms_per_step": ms, "peak_memory_mb": 900.0, "max_vio": max_vio},
            "valid": {"bytes": 1000, "bits_per_byte": bits, "perplexity": 2**bits},
            "attacked": {"word-swap": {"bytes": 990, "bits_per_byte": bits + 0.25, "rate": 0.025}},
            "serving": {
                "max_vio": max_vio + 0.125,
                "dead": dead,
                "experts": LAYERS * EXPERTS,
                "load": [[40, 30, 20, 10], [50, 50, 0, 0]],
            },
        }
        values |= result or {}
        (folder / "result.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(name="make_run")
def make_run_fixture() -> Callable[..., Path]:
    return make_run


@pytest.fixture
def baselines() -> dict[str, Any]:
    return {
        "bigram": {"bits_per_byte": 3.9},
        "trigram": {"bits_per_byte": 3.1},
        "corpus": {
            "name": "wikipedia",
            "source": "a dump",
            "sha256": "0123456789abcdef",
            "train": 5480771,
            "valid": 304487,
        },
        "machine": {"cpu": "a CPU", "cores": 2, "python": "3.11.7", "torch": "2.13.0", "sinkroute": "0.1.0"},
    }


@pytest.fixture
def demo(tmp_path: Path, baselines: dict[str, Any]) -> Path:
    """Four methods, one seed each; SSR-S has the lowest bits per byte."""
    root = tmp_path / "demo"
    make_run(root, "balance", "load-balance", "Load-balance", bits=3.05, max_vio=0.25, ms=102.0)
    make_run(root, "softmax", "softmax", "Vanilla", bits=3.04, max_vio=1.5, dead=2, ms=100.0)
    make_run(root, "ssr-l", "ssr-l", "SSR-L", bits=3.06, max_vio=0.75, probability=0.1, ms=110.0)
    make_run(root, "ssr-s", "ssr-s", "SSR-S", bits=3.02, max_vio=0.5, probability=0.1, ms=108.0)
    (root / "baselines.json").write_text(json.dumps(baselines | {"order": ["softmax", "balance"]}), encoding="utf-8")
    return root
