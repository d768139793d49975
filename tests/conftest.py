"""Tests on several ranks: real processes on this machine that talk by gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
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
    """The name of a router that nothing but the registry knows: the example of CONTRIBUTING, which keeps a bias."""
    from sinkroute.routing.registry import ROUTERS

    text = Path(__file__).parents[1].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    module = types.ModuleType("proportional")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where its annotations are looked up
    exec(compile(code[1], "CONTRIBUTING.md", "exec"), vars(module))
    monkeypatch.setitem(ROUTERS, "proportional", module.ProportionalRouter)
    return "proportional"
