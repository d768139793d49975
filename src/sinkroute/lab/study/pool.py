"""Workers side by side: who gets which cell, and what happens when one dies.

Each worker is a fresh interpreter with its share of the cores (or one GPU), set before torch is imported. One that dies
is replaced and its cell continued from its checkpoint, once; the cells of the others never notice. (The pools of
concurrent.futures and of loky fail every cell, running and waiting, when one of their workers is killed.)
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sinkroute
from sinkroute._errors import SinkrouteError
from sinkroute.lab.config import to_mapping
from sinkroute.lab.interrupt import StopRequest
from sinkroute.lab.study.cells import Cell
from sinkroute.lab.study.lock import holder
from sinkroute.lab.study.state import record_failure
from sinkroute.lab.study.worker import run_cell

__all__ = ["WorkerError", "order_of", "run_cells", "run_here"]

Listen = Callable[[Cell, dict[str, Any]], None]
_PROGRAM = [sys.executable, "-m", "sinkroute.lab.study.worker"]
_OTHERS_SECONDS = 2.0  # between two looks at what other processes have


class WorkerError(SinkrouteError):
    """Workers do not even start."""


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    log: Path
    cell: Cell | None = None
    ready: bool = False
    leaving: bool = False


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int,
    threads: int,
    gpus: Sequence[str],
    fresh: bool,
    about: dict[str, Any],
    stop: StopRequest,
    listen: Listen,
) -> None:
    """Execute cells, `jobs` at a time; returns when each is done, failed or, after `stop`, saved.

    A cell that another process has is left to it and taken over if that process dies.

    Args:
        cells: in the order in which they are begun.
        out: their folders lie in it.
        jobs: workers at a time.
        threads: of each.
        gpus: dealt out to the workers in turn; empty: none.
        fresh: delete earlier runs.
        about: for the record of each cell.
        stop: when it turns true, all workers save and end.
        listen: told what each cell says ("begin" when a worker gets it, and as `worker.run_cell`).

    Raises:
        WorkerError: a worker ends before it is ready.
    """
    waiting, elsewhere = deque(cells), list[Cell]()
    events: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
    workers: list[_Worker] = []
    deaths: Counter[str] = Counter()
    untouched = {cell.name for cell in cells} if fresh else set()
    looked = time.monotonic()

    def hand_out() -> None:
        idle = [worker for worker in workers if worker.cell is None and not worker.leaving]
        while waiting and (idle or len(workers) < jobs):
            worker = idle.pop() if idle else _start(out, workers, threads, gpus, events)
            cell = worker.cell = waiting.popleft()
            order = order_of(cell, out, fresh=cell.name in untouched, about=about)
            untouched.discard(cell.name)
            listen(cell, {"kind": "begin"})
            _send(worker, order)

    def lost(cell: Cell, how: str, log: Path) -> None:
        deaths[cell.name] += 1
        if deaths[cell.name] == 1:
            listen(cell, {"kind": "lost", "note": f"{how}; it is continued"})
            waiting.appendleft(cell)
        else:
            message = f"{how}, for the second time; see {log}"
            record_failure(out / cell.name, cell.hash, message)
            listen(cell, {"kind": "failed", "note": message})

    def handle(worker: _Worker, event: dict[str, Any]) -> None:
        cell, kind = worker.cell, event["kind"]
        if kind == "ready":
            worker.ready = True
        elif kind == "exit":
            workers.remove(worker)
            if not worker.ready and not stop:
                raise WorkerError(f"a worker ended at once (exit code {event['code']}):\n{_tail(worker.log)}")
            if cell is not None and not stop:
                lost(cell, _death(event["code"]), worker.log)
        elif cell is not None:
            if kind in ("busy", "done", "failed", "interrupted"):
                worker.cell = None
            if kind == "interrupted" and not stop:  # somebody ended this worker alone
                worker.leaving = True
                lost(cell, "the worker was asked to end", worker.log)
                return
            if kind == "busy":
                elsewhere.append(cell)
            listen(cell, event)

    try:
        while True:
            if stop:
                _dismiss(workers)
            elif elsewhere and time.monotonic() - looked > _OTHERS_SECONDS:
                looked = time.monotonic()
                free = [cell for cell in elsewhere if holder(out / cell.name) is None]
                elsewhere = [cell for cell in elsewhere if cell not in free]
                waiting.extend(free)  # done by now, which a worker sees at once, or left unfinished
            if not stop:
                hand_out()
                if not waiting:
                    _dismiss([worker for worker in workers if worker.cell is None])
            if not workers and (stop or not elsewhere):
                return
            try:
                handle(*events.get(timeout=0.3))
            except queue.Empty:
                continue
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def run_here(
    cells: Sequence[Cell],
    out: Path,
    *,
    fresh: bool,
    about: dict[str, Any],
    stop: StopRequest,
    listen: Listen,
) -> None:
    """Execute cells in this process, one after another; arguments as those of `run_cells`."""
    for cell in cells:
        if stop:
            return
        listen(cell, {"kind": "begin"})
        run_cell(order_of(cell, out, fresh=fresh, about=about), stop, lambda _cell=cell, **event: listen(_cell, event))


def order_of(cell: Cell, out: Path, *, fresh: bool, about: dict[str, Any]) -> dict[str, Any]:
    """What a worker is told about a cell."""
    return {
        "name": cell.name,
        "folder": str(out / cell.name),
        "config": to_mapping(cell.config),
        "hash": cell.hash,
        "fresh": fresh,
        "about": about,
    }


def _start(
    out: Path,
    workers: list[_Worker],
    threads: int,
    gpus: Sequence[str],
    events: queue.Queue[tuple[_Worker, dict[str, Any]]],
) -> _Worker:
    number = next(n for n in range(len(workers) + 1) if n not in {worker.number for worker in workers})
    source = str(Path(sinkroute.__file__).parents[1])  # the very code that runs here
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",  # the folder that one stands in holds no modules of ours
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    log = out / "logs" / f"worker-{os.getpid()}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            _PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            encoding="utf-8",
            bufsize=1,
        )
    worker = _Worker(number, process, log)

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):  # torn, for the worker was killed while it wrote
                events.put((worker, json.loads(line)))
        events.put((worker, {"kind": "exit", "code": process.wait()}))

    threading.Thread(target=listen, daemon=True).start()
    workers.append(worker)
    return worker


def _send(worker: _Worker, order: dict[str, Any]) -> None:
    assert worker.process.stdin is not None
    with suppress(BrokenPipeError):  # it is dead, which its listener tells
        worker.process.stdin.write(json.dumps(order) + "\n")
        worker.process.stdin.flush()


def _dismiss(workers: Sequence[_Worker]) -> None:
    """The end of its orders: a worker that has a cell saves it, and ends."""
    for worker in workers:
        if not worker.leaving:
            worker.leaving = True
            assert worker.process.stdin is not None
            with suppress(BrokenPipeError):
                worker.process.stdin.close()


def _death(code: int) -> str:
    if code == -9:
        return "the worker was killed (signal 9), as systems do when memory runs out"
    return f"the worker ended with signal {-code}" if code < 0 else f"the worker ended with exit code {code}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
