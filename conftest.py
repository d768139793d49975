"""Shared by all tests: the same draws in every run, one torch thread per worker, no network, no leftovers."""

from __future__ import annotations

import os

# Before torch is imported anywhere: xdist workers share the cores, threads cost tiny operations more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Generator

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Looked at when Triton is first imported, by whichever test that is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

# No time limits: a machine that is busy with other things makes no test fail.
ANY_SPEED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow], "print_blob": True}
# The same examples in every run, on every machine. What random ones find is pinned by `@example`.
hypothesis.settings.register_profile("same", derandomize=True, **ANY_SPEED)
hypothesis.settings.register_profile("fuzz", max_examples=500, **ANY_SPEED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, metavar="SEED", help="the property tests alone, by other examples per SEED")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("same" if config.option.fuzz is None else "fuzz")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws is its own affair, not that of the tests that happened to run before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what libraries draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> None:
    """Accelerate keeps one global state per process; runs of different tests must not see each other's."""
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without an explicit `-m`, `slow` and `ranks` are left out. With `--fuzz SEED`, all but Hypothesis' are."""
    if config.option.fuzz is not None:
        items[:] = [item for item in items if hypothesis.is_hypothesis_test(getattr(item, "obj", None))]
        for function in {item.obj.__func__ if hasattr(item.obj, "__func__") else item.obj for item in items}:
            hypothesis.seed(config.option.fuzz)(function)  # before `derandomize`, if a test asks for that
    if config.option.markexpr:
        return
    for name in ("slow", "ranks"):
        skip = pytest.mark.skip(reason=f"{name}: run with -m {name}")
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test file that cannot be imported is an error.

    `--doctest-ignore-import-errors`, which is for modules whose optional packages are missing, would skip it whole:
    pytest hands out one module for its doctests and its tests.
    """
    report = yield
    tests = collector.path.name.startswith("test_")
    if tests and report.outcome == "skipped" and "unable to import module" in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"{collector.path} cannot be imported: a wrong or missing import"
    return report
