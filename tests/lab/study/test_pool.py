"""Who gets which run, with workers that only pretend; what real ones do when they are killed stands at the end."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinkroute.lab.interrupt import StopRequest
from sinkroute.lab.study import pool
from sinkroute.lab.study.cells import Cell, Plan
from sinkroute.lab.study.lock import hold
from sinkroute.lab.study.pool import WorkerError, run_cells
from sinkroute.lab.study.state import read_result, read_state
from sinkroute.lab.study.worker import run_cell

from .conftest import SMALL

# Does with a run what its method is called, and writes down what it was given.
PRETENDER = """
import json, os, signal, sys, time
def say(**event):
    print(json.dumps(event), flush=True)
say(kind="ready")
for line in sys.stdin:
    order = json.loads(line)
    os.makedirs(order["folder"], exist_ok=True)
    note = {"pid": os.getpid(), "fresh": order["fresh"], "threads": os.environ["OMP_NUM_THREADS"],
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "about": order["about"]}
    with open(order["folder"] + "/seen", "a") as file:
        file.write(json.dumps(note) + "\\n")
    times = sum(1 for _ in open(order["folder"] + "/seen"))
    what = order["config"]["label"].split()[-1]
    say(kind="progress", step=1, loss=1.0, max_vio=0.0)
    if what == "dies" or what == "dies-once" and times == 1:
        print('{"kind": "prog', end="", flush=True)  # in the middle of a line
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "is-asked-to-end" and times == 1:
        say(kind="interrupted", note="")
        break
    if what == "waits":
        sys.stdin.read()
        say(kind="interrupted", note="saved")
        break
    say(kind="failed", note="no") if what == "fails" else say(kind="done")
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "pretender.py"
    program.write_text(PRETENDER)
    monkeypatch.setattr(pool, "_PROGRAM", [sys.executable, "-S", str(program)])
    monkeypatch.setattr(pool, "_OTHERS_SECONDS", 0.1)


def go(
    plan: Plan,
    jobs: int = 2,
    stop: StopRequest | None = None,
    listen: Callable[[Cell, dict[str, Any]], None] | None = None,
    **options: Any,
) -> list[tuple[str, str]]:
    """Run all; returns (method, kind) of every event but progress."""
    heard: list[tuple[str, str]] = []
    stop = StopRequest() if stop is None else stop  # it is false as long as nobody asked

    def hear(cell: Cell, event: dict[str, Any]) -> None:
        if event["kind"] not in ("progress", "status"):
            heard.append((cell.method, event["kind"]))
        if listen is not None:
            listen(cell, event)

    settings: dict[str, Any] = {"threads": 1, "gpus": [], "fresh": False, "about": {}} | options
    run_cells(plan.cells, plan.out, jobs=jobs, stop=stop, listen=hear, **settings)
    return heard


def seen(plan: Plan, method: str) -> list[dict[str, Any]]:
    (cell,) = [cell for cell in plan.cells if cell.method == method]
    return [json.loads(line) for line in (plan.out / cell.name / "seen").read_text().splitlines()]


@pytest.fixture
def methods(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    def methods_(*names: str) -> Plan:
        return plan(methods={name: {} for name in names}, seeds=[0])

    return methods_


@pytest.mark.usefixtures("pretend")
def test_two_workers_share_the_runs_in_their_order(methods: Callable[..., Plan]) -> None:
    found = methods("a", "b", "c", "d")
    heard = go(found)
    assert [method for method, kind in heard if kind == "begin"] == ["a", "b", "c", "d"]
    assert sorted(method for method, kind in heard if kind == "done") == ["a", "b", "c", "d"]
    assert len({seen(found, name)[0]["pid"] for name in "abcd"}) == 2


@pytest.mark.usefixtures("pretend")
def test_each_worker_has_its_threads_and_its_gpu(methods: Callable[..., Plan]) -> None:
    found = methods("a", "b")
    go(found, threads=3, gpus=["4", "7"], about={"commit": "x"})
    told = [seen(found, name)[0] for name in "ab"]
    assert [one["threads"] for one in told] == ["3", "3"]
    assert {one["gpu"] for one in told} == {"4", "7"}
    assert told[0]["about"] == {"commit": "x"}


@pytest.mark.usefixtures("pretend")
def test_a_run_that_fails_does_not_stop_the_others(methods: Callable[..., Plan]) -> None:
    heard = go(methods("a", "fails", "c"), jobs=1)
    assert heard[1::2] == [("a", "done"), ("fails", "failed"), ("c", "done")]


@pytest.mark.usefixtures("pretend")
def test_a_run_whose_worker_dies_is_continued_once(methods: Callable[..., Plan]) -> None:
    found = methods("dies-once", "b")
    heard = go(found, jobs=1)
    kinds = [kind for method, kind in heard if method == "dies-once"]
    assert kinds == ["begin", "lost", "begin", "done"]
    assert ("b", "done") in heard


@pytest.mark.usefixtures("pretend")
def test_a_run_that_kills_its_worker_twice_has_failed(methods: Callable[..., Plan]) -> None:
    found = methods("dies", "b")
    heard = go(found, jobs=1)
    assert [kind for method, kind in heard if method == "dies"] == ["begin", "lost", "begin", "failed"]
    assert ("b", "done") in heard
    state = read_state(found.cells[0], found.out)
    assert state.kind == "failed"
    assert "killed (signal 9), as systems do when memory runs out, for the second time" in state.note


@pytest.mark.usefixtures("pretend")
def test_a_worker_that_is_asked_to_end_is_replaced(methods: Callable[..., Plan]) -> None:
    heard = go(methods("is-asked-to-end", "b"), jobs=1)
    assert [kind for method, kind in heard if method == "is-asked-to-end"] == ["begin", "lost", "begin", "done"]


@pytest.mark.usefixtures("pretend")
def test_an_earlier_run_is_deleted_once_even_if_a_worker_dies(methods: Callable[..., Plan]) -> None:
    found = methods("dies-once")
    go(found, fresh=True)
    assert [one["fresh"] for one in seen(found, "dies-once")] == [True, False]


@pytest.mark.usefixtures("pretend")
def test_a_stop_lets_all_workers_save_and_begins_nothing_new(methods: Callable[..., Plan]) -> None:
    found, stop = methods("waits", "c"), StopRequest()

    def listen(cell: Cell, event: dict[str, Any]) -> None:
        stop.asked |= event["kind"] == "progress"

    assert go(found, 1, stop, listen) == [("waits", "begin"), ("waits", "interrupted")]


def test_workers_that_do_not_start_are_an_error_with_their_last_words(
    methods: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_PROGRAM", [sys.executable, "-S", "-c", "raise SystemExit('no torch here')"])
    with pytest.raises(WorkerError, match=r"a worker ended at once \(exit code 1\):\nno torch here"):
        go(methods("a", "b"))


def test_real_workers_survive_a_kill_and_share_with_others(plan: Callable[..., Plan], text: Path) -> None:
    """One is killed after its checkpoint, and one run is held by somebody else at first: this very process."""
    train = {**SMALL["train"], "steps": 40, "checkpoint_every": 10, "log_every": 10}
    config = {**SMALL, "data": {**SMALL["data"], "path": str(text)}, "train": train}
    found = plan(config=config, seeds=[0])
    killed, elsewhere = found.cells
    guard = hold(found.out / elsewhere.name)
    guard.__enter__()
    victims: list[int] = []

    def listen(cell: Cell, event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["step"] == 20 and not victims:
            victims.append(json.loads((found.out / cell.name / ".lock").read_text())["pid"])
            os.kill(victims[0], signal.SIGKILL)
        if event["kind"] == "busy":
            guard.__exit__(None, None, None)

    heard = go(found, 1, listen=listen)
    assert [kind for method, kind in heard if method == killed.method] == ["begin", "lost", "begin", "done"]
    assert [kind for method, kind in heard if method == elsewhere.method] == ["begin", "busy", "begin", "done"]
    resumed = read_result(killed, found.out)
    order = pool.order_of(killed, found.out, fresh=True, about={})
    run_cell(order, None, lambda **event: None)
    for part in ("valid", "attacked", "serving"):
        assert read_result(killed, found.out)[part] == resumed[part]
