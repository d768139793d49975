"""Shared by all tests: one torch thread per worker, no network, no leftovers between tests."""

from __future__ import annotations

import os

# Before torch is imported anywhere: xdist workers share the cores, threads cost tiny operations more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Looked at when Triton is first imported, by whichever test that is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> None:
    """Accelerate keeps one global state per process; runs of different tests must not see each other's."""
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without an explicit `-m`, slow tests are left out."""
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
