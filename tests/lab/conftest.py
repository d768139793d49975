"""Runs on several processes, for the tests of the lab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sinkroute.lab.config import Config, from_mapping, write_yaml

from .browser import MISSING, Browser, browser
from .processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    with Processes() as started:
        yield started


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A browser for all tests that look at pages; they are skipped where there is none."""
    if MISSING is not None:
        pytest.skip(MISSING)
    with browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a run of 10 steps on 40 kB of words, with plans, evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("small")
    words = np.random.default_rng(0).choice(["balanced", "experts", "route", "tokens", "to", "the", "and", "few"], 8000)
    (folder / "words.txt").write_text(" ".join(words))
    settings = from_mapping(
        Config,
        {
            "data": {"name": "text", "length": 16, "path": str(folder / "words.txt")},
            "model": {"layers": 2, "d_model": 16, "heads": 2, "d_hidden": 8, "experts": 4, "top_k": 2},
            "router": {"name": "ssr-l", "options": {"probability": 0.7, "noise": 0.3}},
            "train": {"steps": 10, "batch": 8, "accumulation": 2, "warmup": 3, "log_every": 1, "checkpoint_every": 4},
            "eval": {"every": 3, "limit": 500, "attacks": {}},
        },
    )
    settings.train.keep_checkpoints = 1
    write_yaml(settings, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="session")
def undisturbed(processes: Processes, small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes → folder of a run that nobody disturbed; made when first asked for."""

    class Runs(dict[int, Path]):
        def __missing__(self, number: int) -> Path:
            folder = tmp_path_factory.mktemp("undisturbed") / str(number)
            left = processes.run([["train", str(small), "--out", str(folder)]] * number, folder.parent / "logs")
            assert left.codes == [0] * number, left.texts
            self[number] = folder
            return folder

    return Runs()
