"""Tests on several ranks: real processes on this machine that talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Longer than a process takes to start where many share the machine. A rank that waits so long for another fails.
SECONDS = 120
PROGRAM = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_ranks(function, world)`: what `function()`, of a test file, returns on each of so many ranks.

    It may return what `torch.load` takes without pickled code: tensors, numbers, text, lists, tuples and dicts. If a
    rank fails, or waits for another in vain, the test fails with what each rank wrote.
    """

    def run(function: Callable[[], Any], world: int) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }
        outputs = [folder / f"{rank}.pt" for rank in range(world)]
        logs = [folder / f"{rank}.log" for rank in range(world)]
        what = [sys.executable, str(PROGRAM), function.__code__.co_filename, function.__name__]
        processes = []
        try:
            for rank in range(world):
                where = [str(rank), str(world), str(folder / "store"), str(outputs[rank]), str(SECONDS)]
                with open(logs[rank], "w") as log:
                    processes.append(
                        subprocess.Popen(what + where, env=environment, stdout=log, stderr=subprocess.STDOUT)
                    )
            until = time.monotonic() + 2 * SECONDS
            codes = [_wait(process, until - time.monotonic()) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if codes != [0] * world:
            said = "\n".join(f"-- rank {rank}: {codes[rank]}\n{logs[rank].read_text()}" for rank in range(world))
            pytest.fail(f"{function.__name__} failed on {world} ranks\n{said}", pytrace=False)
        return [torch.load(output) for output in outputs]

    return run


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | str:
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return "still running"


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a router that keeps a bias on the scores, and that nothing but the registry knows."""
    from sinkroute.routing.registry import ROUTERS
    from sinkroute.routing.router import Router, Serving
    from sinkroute.routing.state import RouterState

    class Newcomer(Router):
        def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
            super().__init__(num_experts, top_k, **options)
            self.state = RouterState(num_experts, bias_E=torch.zeros(num_experts, device="cpu"))

        def choice_bias(self) -> Serving:
            assert self.state is not None
            return Serving(self.state.bias_E, "scores")

        def finish_step(self, load_E: torch.Tensor, sums: dict[str, torch.Tensor]) -> None:
            assert self.state is not None
            self.state.bias_E -= 0.1 * (load_E / load_E.double().mean() - 1)

    monkeypatch.setitem(ROUTERS, "newcomer", Newcomer)
    return "newcomer"
