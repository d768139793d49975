"""What a worker does with one run, in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkroute.lab.data import load_corpus
from sinkroute.lab.interrupt import StopRequest
from sinkroute.lab.run import execute
from sinkroute.lab.study.cells import Cell, Plan
from sinkroute.lab.study.lock import hold
from sinkroute.lab.study.pool import order_of
from sinkroute.lab.study.state import read_record, read_result, read_state
from sinkroute.lab.study.worker import run_cell

from .conftest import SMALL


@pytest.fixture
def tiny(plan: Callable[..., Plan], text: Path) -> Callable[..., Plan]:
    """Runs that can be trained in a moment."""

    def tiny_(**content: Any) -> Plan:
        config = {**SMALL, "data": {**SMALL["data"], "path": str(text)}}
        return plan(**{"config": config, "seeds": [0], **content})

    return tiny_


def run(cell: Cell, out: Path, stop: StopRequest | None = None, fresh: bool = False) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    run_cell(order_of(cell, out, fresh=fresh, about={"commit": "abc"}), stop, lambda **event: heard.append(event))
    return heard


def test_a_run_gives_what_execute_gives(tiny: Callable[..., Plan], text: Path, tmp_path: Path) -> None:
    found = tiny()
    cell = found.cells[1]
    heard = run(cell, found.out)
    assert [event["kind"] for event in heard if event["kind"] != "status"] == ["progress", "progress", "done"]
    alone = execute(cell.config, load_corpus("text", text), tmp_path / "alone")
    result = read_result(cell, found.out)
    for part in ("valid", "attacked", "serving", "parameters"):
        assert result[part] == alone[part]
    assert read_state(cell, found.out).kind == "done"
    record = read_record(cell, found.out)
    assert (record["hash"], record["commit"], record["threads"]) == (cell.hash, "abc", torch.get_num_threads())
    assert record["seconds"] > 0
    assert run(cell, found.out)[-1]["kind"] == "done"  # it is read, not trained: the log is as it was
    assert read_result(cell, found.out) == result


def test_a_run_that_fails_is_written_down_and_a_retry_clears_it(tiny: Callable[..., Plan]) -> None:
    found = tiny(methods={"bad": {"router": {"name": "ssr-l", "options": {"probabilty": 1}}}})
    event = run(found.cells[0], found.out)[-1]
    assert event["kind"] == "failed"
    assert "probabilty" in event["note"]
    state = read_state(found.cells[0], found.out)
    assert (state.kind, state.note) == ("failed", event["note"])
    folder = found.out / found.cells[0].name
    good = tiny(methods={"bad": {"router": {"name": "ssr-l"}}}).cells[0]
    assert run(good, found.out)[-1]["kind"] == "done"
    assert not (folder / "failed.json").exists()


def test_a_stopped_run_is_saved_and_continued_with_the_same_numbers(tiny: Callable[..., Plan]) -> None:
    found = tiny()
    cell = found.cells[0]
    stop = StopRequest()
    stop.asked = True
    assert run(cell, found.out, stop)[-1]["kind"] == "interrupted"
    assert read_state(cell, found.out).step == 1
    assert run(cell, found.out)[-1]["kind"] == "done"
    resumed = read_result(cell, found.out)
    assert run(cell, found.out, fresh=True)[-1]["kind"] == "done"
    assert read_result(cell, found.out)["valid"] == resumed["valid"]


def test_a_run_that_another_process_has_is_left_to_it(tiny: Callable[..., Plan]) -> None:
    found = tiny()
    with hold(found.out / found.cells[0].name):
        events = run(found.cells[0], found.out)
    assert [event["kind"] for event in events] == ["busy"]
    assert "left to process" in events[0]["note"]
    assert not (found.out / found.cells[0].name / "cell.json").exists()


def test_a_changed_evaluation_is_repeated_without_training(tiny: Callable[..., Plan]) -> None:
    found = tiny()
    run(found.cells[0], found.out)
    log = (found.out / found.cells[0].name / "log.jsonl").read_bytes()
    data = found.cells[0].config.data.path
    config = {**SMALL, "data": {**SMALL["data"], "path": data}, "eval": {"attacks": {"word-swap": {"rate": 0.5}}}}
    changed = tiny(config=config)
    assert run(changed.cells[0], changed.out)[-1]["kind"] == "done"
    assert read_result(changed.cells[0], changed.out)["attacked"]["word-swap"]["rate"] == 0.5
    assert (found.out / found.cells[0].name / "log.jsonl").read_bytes() == log


def test_events_are_json(tiny: Callable[..., Plan]) -> None:
    found = tiny()
    assert json.loads(json.dumps(run(found.cells[0], found.out)))[-1] == {"kind": "done"}


def test_a_worker_ends_with_its_orders_also_where_the_last_one_is_torn() -> None:
    """As it is when the comparison is killed: nobody is left to end the worker."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sinkroute.lab.study.worker"]
    ended = subprocess.run(
        command, input='{"name": "a', env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, '{"kind": "ready"}\n')
